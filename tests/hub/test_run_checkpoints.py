"""The checkpoints of a run as sources: `run/checkpoint-*` and `last: k`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import near, random_state, save_adapter, save_checkpoint
from toys.hub import files_of, hub
from toys.hub_server import HubServer
from toys.merge import paft

import paft_merge
from paft_merge.engine.reproduction import reproduce
from paft_merge.errors import PaftMergeError
from paft_merge.hub import pull
from paft_merge.hub.run_checkpoints import checkpoints, expand
from paft_merge.pipeline.named_models import _beside
from paft_merge.recipe import Located, ModelRef

__all__ = ["hub"]

STEPS = (50, 100, 1000)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base`, `run` with three adapters, `full` with three checkpoints, in the working directory."""
    base = random_state(0)
    save_checkpoint(tmp_path / "base", base)
    for step in STEPS:
        save_adapter(tmp_path / "run" / f"checkpoint-{step}", base, step)
        save_checkpoint(tmp_path / "full" / f"checkpoint-{step}", near(base, step))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(*models: Any, **changes: Any) -> dict[str, Any]:
    made = [one if isinstance(one, dict) else {"model": one} for one in models]
    sources = [{"parameters": {"weight": 0.5}, **one} for one in made]
    return {"merge_method": "task_arithmetic", "base_model": "base", "models": sources, "dtype": "float32", **changes}


def weights(made: dict[str, Any], out: str) -> dict[str, bytes]:
    files = files_of(paft_merge.merge(made, out).path)
    return {name: content for name, content in files.items() if name.endswith(".safetensors")}


def named(made: Any) -> list[str]:
    with paft_merge.open_plan(made) as plan:
        return [str(ref) for ref in plan.recipe.references if str(ref) != "base"]


@pytest.mark.parametrize("run", ["base+run", "full"])
@pytest.mark.parametrize("last", [None, 2])
def test_a_run_is_its_checkpoints_by_step_number(place: Path, run: str, last: int | None) -> None:
    entry = {"model": f"{run}/checkpoint-*", **({"last": last} if last else {})}
    single = [f"{run}/checkpoint-{step}" for step in STEPS[-last if last else 0 :]]
    assert named(recipe(entry)) == single
    assert weights(recipe(entry), "one") == weights(recipe(*single), "other")


def test_the_recipe_is_recorded_with_each_checkpoint_and_merges_again(place: Path) -> None:
    entry = {"model": "base+run/checkpoint-*", "last": 2}
    out = paft_merge.merge(recipe(entry, merge_method="dare_linear", seed=3), place / "out").path
    manifest = json.loads((out / "merge_manifest.json").read_text())
    models = [one["model"] for one in manifest["recipe"]["models"]]
    assert models == ["base+run/checkpoint-100", "base+run/checkpoint-1000"]
    assert "checkpoint-*" not in (out / "README.md").read_text()
    save_adapter(place / "run" / "checkpoint-2000", random_state(0), 4)
    assert reproduce(out).identical


def test_lines_and_parameters_are_those_of_the_entry(place: Path) -> None:
    text = (
        "merge_method: ties\nbase_model: base\nmodels:\n- model: base+run/checkpoint-*\n  parameters:\n    weight: 0.5\n"
        "    density: 0.25\n- model: full/checkpoint-50\n  parameters:\n    weight: 0.25\n    density: 7\n"
    )
    (place / "r.yaml").write_text(text)
    with pytest.raises(PaftMergeError, match=r"r.yaml:11: models\[3\].parameters.density"):
        paft_merge.merge("r.yaml", place / "out")
    (place / "r.yaml").write_text(text.replace("density: 7", "density: 0.5"))
    with paft_merge.open_plan("r.yaml") as plan:
        sources = plan.recipe.slices[0].sources
        settings = [source.levels[0].settings["density"] for source in sources[:4]]
    assert [one.conditions[0].value for one in settings] == [0.25, 0.25, 0.25, 0.5]
    assert [one.spot.line for one in settings] == [7, 7, 7, 11]
    shown = paft("explain", "r.yaml").output
    assert all(f"checkpoint-{step}" in shown for step in STEPS)


def test_a_loaded_recipe_and_sources_of_slices_are_expanded_too(place: Path) -> None:
    slices = [{"sources": [{"model": "base", "layer_range": [0, 3]},
                           {"model": "full/checkpoint-*", "layer_range": [0, 3], "last": 1, "parameters": {"weight": 1}}]}]  # fmt: skip
    loaded = paft_merge.load_recipe({"merge_method": "task_arithmetic", "base_model": "base", "slices": slices})
    assert named(loaded) == ["full/checkpoint-1000"]
    slerp = {"merge_method": "slerp", "base_model": "full/checkpoint-50", "parameters": {"t": 0.5}}
    two = paft_merge.load_recipe({**slerp, "models": [{"model": "full/checkpoint-*"}]})
    with pytest.raises(PaftMergeError, match="exactly 1"):
        paft_merge.merge(two, place / "out")


def test_folders_after_the_step_and_paths_with_a_user(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.renames("full/checkpoint-50", "deep/step50/model")
    os.renames("full/checkpoint-100", "deep/step100/model")
    (place / "deep" / "step7").mkdir()
    monkeypatch.setenv("HOME", str(place))
    assert named(recipe("deep/step*/model")) == ["deep/step50/model", "deep/step100/model"]
    assert named(recipe(f"{place}/deep/step*/model"))[0] == f"{place}/deep/step50/model"
    assert named(recipe("~/deep/step*/model"))[0] == "~/deep/step50/model"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("run/epoch-*", "no folder matches"),
        ("run/checkpoint-1*", "models\\[0\\].model: base\\+run"),
        ("nowhere/checkpoint-*", "there is no folder 'nowhere/' here"),
        ("*/model", "no folder matches"),
        ("run/checkpoint-*+run/checkpoint-*", "more than one '\\*'"),
        ("run/**", "more than one '\\*'"),
        ({"model": "full/checkpoint-50", "last": 2}, r"models\[0\].last: counts the checkpoints of a run"),
        ({"model": "full/checkpoint-*", "last": 0}, r"models\[0\].last: "),
        ({"model": "full/checkpoint-*", "last": -2}, r"models\[0\].last: "),
        ({"model": "full/checkpoint-*", "last": True}, r"models\[0\].last: "),
        ({"model": "full/checkpoint-*", "last": "2"}, r"models\[0\].last: "),
    ],
)
def test_what_a_star_cannot_mean_is_refused(place: Path, entry: Any, message: str) -> None:
    if entry == "run/checkpoint-1*":
        entry, message = "base+run/checkpoint-10*", "no folder matches"
        for step in STEPS[1:]:
            os.rename(f"run/checkpoint-{step}", f"run/old-{step}")
    with pytest.raises(PaftMergeError, match=message):
        paft_merge.merge(recipe(entry), place / "out")
    assert not (place / "out").exists()


def test_a_checkpoint_that_is_a_broken_link_is_not_left_out(place: Path) -> None:
    os.rename("run/checkpoint-1000", "moved")
    os.symlink("../moved", "run/checkpoint-1000")
    entry = {"model": "base+run/checkpoint-*", "last": 2}
    assert named(recipe(entry)) == ["base+run/checkpoint-100", "base+run/checkpoint-1000"]
    os.rename("moved", "moved again")
    with pytest.raises(PaftMergeError, match=r"run/checkpoint-1000: is a link to \.\./moved, which does not exist"):
        paft_merge.merge(recipe(entry), place / "out")


def test_a_star_outside_the_lists_is_refused_with_its_place(place: Path) -> None:
    with pytest.raises(PaftMergeError, match="only in the models: and sources:"):
        paft_merge.merge(recipe("full/checkpoint-50", base_model="full/checkpoint-*"), place / "out")


def test_what_matched_less_than_expected_is_noted(place: Path) -> None:
    def notes(entry: Any) -> list[str]:
        with paft_merge.open_plan(recipe(entry)) as plan:
            return [one.what for one in plan.warnings if one.code == "CHECKPOINTS"]

    assert notes({"model": "full/checkpoint-*", "last": 2}) == []
    assert notes({"model": "full/checkpoint-*", "last": 9}) == ["full/checkpoint-* has 3 of the last 9 checkpoints"]
    os.rename("full/checkpoint-100", "full/checkpoint-best")
    assert notes("full/checkpoint-*") == [
        "full/checkpoint-* leaves out 'full/checkpoint-best', whose names have no step number"
    ]
    os.rename("full/checkpoint-50", "elsewhere")
    os.rename("full/checkpoint-best", "best")
    assert notes("full/checkpoint-*") == ["full/checkpoint-* is a single checkpoint, full/checkpoint-1000"]


def test_a_run_on_the_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, made = random_state(0), tmp_path / "made"
    hub.add("me/base", files_of(save_checkpoint(made / "base", base)))
    files = {}
    for step in STEPS:
        folder = save_adapter(made / f"checkpoint-{step}", base, step)
        files |= {f"out/checkpoint-{step}/{name}": content for name, content in files_of(folder).items()}
    hub.add("me/run", files)
    entry = {"model": "me/base+me/run/out/checkpoint-*", "last": 2}
    out = paft_merge.merge(recipe(entry, base_model="me/base"), tmp_path / "out").path
    manifest = json.loads((out / "merge_manifest.json").read_text())
    assert [s["folder"] for s in manifest["sources"] if "folder" in s] == ["out/checkpoint-100", "out/checkpoint-1000"]
    hub.add(
        "me/run", {name.replace("checkpoint-50", "checkpoint-2000"): files[name] for name in files if "-50/" in name}
    )
    assert reproduce(out).identical
    again = recipe(entry, base_model="me/base")
    with paft_merge.open_plan(again) as plan:  # the cache's list, as for weights
        assert "checkpoint-1000" in str(plan.recipe.references)
        assert "checkpoint-2000" not in str(plan.recipe.references)
    folders = pull("me/run/out/checkpoint-*")
    assert [folder.name for folder in folders][-1] == "checkpoint-2000"
    with paft_merge.open_plan(again) as plan:
        assert "checkpoint-2000" in str(plan.recipe.references)
    for wrong in ("me/run/checkpoint-*", "me/*/checkpoint-5", "me/none/checkpoint-*"):
        with pytest.raises(PaftMergeError) as caught:
            checkpoints(ModelRef(wrong))
        assert caught.value.problems[0].code in ("NOT_FOUND", "HUB_NOT_FOUND")


def test_the_checkpoints_of_a_run_beside_the_recipe_of_paft_run(place: Path, tmp_path: Path) -> None:

    made = _beside("base+run/checkpoint-*", place)
    models = expand(Located({"models": [{"model": made}]}))[0].data["models"]
    assert [one["model"]["label"] for one in models] == [f"base+run/checkpoint-{step}" for step in STEPS]
    assert models[0]["model"]["lora"]["path"] == f"{place}/run/checkpoint-50"


def test_an_audit_takes_every_checkpoint(place: Path) -> None:
    found = paft_merge.audit("base+run/checkpoint-*", preview=None)
    assert [one.header.label for one in found.sources] == [f"checkpoint-{step}" for step in STEPS]


def test_a_folder_whose_name_has_a_star_is_this_folder(place: Path) -> None:
    for name in ("base", "run"):
        (place / "st*r").mkdir(exist_ok=True)
        (place / name).rename(place / "st*r" / name)
    one = "st*r/base+st*r/run/checkpoint-50"
    assert named(recipe(one, base_model="st*r/base")) == ["st*r/base", one]
    assert paft("audit", "st*r/run/checkpoint-50").exit_code == 0
    several = "st*r/base+plain/checkpoint-*"
    (place / "st*r" / "run").rename(place / "plain")
    found = [f"st*r/base+plain/checkpoint-{step}" for step in STEPS]
    assert named(recipe(several, base_model="st*r/base")) == ["st*r/base", *found]
    assert weights(recipe(several, base_model="st*r/base"), "out")
