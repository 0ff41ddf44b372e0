"""Adapters that exist already in a recipe of `paft run`: audited, merged and compared without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from toys.hub import files_of, hub
from toys.hub_server import HubServer
from toys.run import make_world, sections
from toys.train import THEIR_WARNINGS

from paft_merge.cli import cli
from paft_merge.errors import PaftMergeError, RecipeError
from paft_merge.pipeline import Planned, plan, run
from paft_merge.pipeline.steps import Merge, Train
from paft_merge.training import train

__all__ = ["hub"]
pytestmark = THEIR_WARNINGS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data, and two trained adapters in `mine/`."""
    folder = tmp_path_factory.mktemp("world")
    train(make_world(folder), folder / "mine")
    return folder


EXISTING = {"sft": "mine/sft", "dpo": {"path": "mine/dpo"}}


def written(world: Path, name: str, **changes: Any) -> Path:
    """A recipe on those adapters, without training."""
    data = {**sections(), "adapters": EXISTING, **changes}
    metrics = {key: data["evaluate"]["metrics"][key] for key in ("pairs", "text")}
    data["evaluate"] = {"metrics": metrics}
    recipe = world / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}, sort_keys=False))
    return recipe


def arms(planned: Planned) -> list[str]:
    return [arm.name for arm in planned.planner.arms]


def test_a_table_over_methods_needs_no_training(world: Path, tmp_path: Path) -> None:
    compare = {"methods": ["ties", "linear", "slerp"]}
    gate = {"epsilon": 1e-5, "html": False, "require": ["sparsity(1e-5) [source=sft] < 1"]}
    recipe = written(world, "table", compare=compare, audit=gate)
    before = {path: path.stat().st_mtime_ns for path in (world / "mine").rglob("*")}
    done = run(recipe, tmp_path / "run")
    assert [row.name for row in done.table.rows] == [
        "base", "sft", "dpo", "parallel ties", "parallel linear", "parallel slerp", "merged",
    ]  # fmt: skip
    assert len({row.cells["text"].mean for row in done.table.rows}) == 7, "the arms are different models"
    assert {name.split("/")[0] for name in done.done} == {"audit", "merge", "evaluate"}
    audit = json.loads((tmp_path / "run/audit/audit.json").read_text())
    assert [source["label"] for source in audit["sources"]] == ["sft", "dpo"]
    assert run(recipe, tmp_path / "run").done == ()
    assert {path: path.stat().st_mtime_ns for path in (world / "mine").rglob("*")} == before, (
        "adapters stay as they are"
    )


def test_its_merge_is_that_of_the_same_adapters_trained_in_the_run(world: Path, tmp_path: Path) -> None:
    run(written(world, "exists", audit=None, evaluate=sections()["evaluate"]), tmp_path / "given", only="merge")
    run(world / "recipe.yaml", tmp_path / "trained", overrides=["audit=false", "evaluate=false"])
    one, two = (tmp_path / name / "merged/model.safetensors" for name in ("given", "trained"))
    assert one.read_bytes() == two.read_bytes()


def test_steps_follow_the_bytes_of_an_adapter_and_not_its_place(world: Path, tmp_path: Path) -> None:
    recipe = written(world, "prints", compare={"methods": ["ties"]})
    run(recipe, tmp_path / "run")
    moved = Path(shutil.copytree(world, tmp_path / "elsewhere"))
    assert plan(moved / "prints.yaml", tmp_path / "run").todo == ()
    (moved / "mine/sft/checkpoint-1").mkdir()
    (moved / "mine/sft/checkpoint-1/optimizer.pt").write_bytes(b"x")
    assert plan(moved / "prints.yaml", tmp_path / "run").todo == (), "checkpoints are not part of the adapter"
    config = json.loads((moved / "mine/dpo/adapter_config.json").read_text())
    (moved / "mine/dpo/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8}))
    todo = {step.name for step in plan(moved / "prints.yaml", tmp_path / "run").todo}
    same = {f"evaluate/{arm}/{of}" for arm in ("base", "sft") for of in ("pairs", "text", "sparsity")}
    every = {step.name for step in plan(recipe, tmp_path / "none").steps}
    assert todo == every - same


def test_an_existing_adapter_is_evaluated_once_for_all_seeds(world: Path, tmp_path: Path) -> None:
    planned = plan(written(world, "seeds", compare={"methods": ["dare_ties"]}, seeds=[0, 1]), tmp_path / "run")
    assert arms(planned) == [
        "base", "sft", "dpo", "parallel dare_ties", "merged", "parallel dare_ties", "merged",
    ]  # fmt: skip


def test_three_adapters_are_merged_together(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "mine/dpo", world / "mine/third", dirs_exist_ok=True)
    adapters = {**EXISTING, "third": "mine/third"}
    planned = plan(written(world, "three", adapters=adapters, compare={}), tmp_path / "run")
    names = ("ties", "dare_ties", "task_arithmetic", "linear", "l1_ties", "sign_election")
    assert arms(planned) == ["base", *adapters, *(f"parallel {name}" for name in names), "merged"], "slerp takes two"
    recipes = {s.name: s.job.recipe for s in planned.steps if isinstance(s.job, Merge)}
    models = recipes["merge/parallel-linear"]["models"]
    assert [model["model"]["label"] for model in models] == list(adapters)
    weights = [model["parameters"]["weight"] for model in models]
    assert weights == [1.0, 0.5, 1.0], "those of the recipe's merge; 1 for an adapter that it does not name"


def test_an_existing_skill_may_be_trained_upon(world: Path, tmp_path: Path) -> None:
    adapters = {"sft": EXISTING["sft"], "dpo": sections()["adapters"]["dpo"]}
    compare = {"skill": "sft", "methods": ["ties"]}
    planned = plan(written(world, "mixed", adapters=adapters, compare=compare), tmp_path / "run")
    assert arms(planned) == ["base", "sft", "dpo", "sequential", "parallel ties", "merged"]
    assert [s.name for s in planned.steps if isinstance(s.job, Train)] == ["train/dpo", "train/after-sft/dpo"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"compare": {"arms": ["sequential"]}}, "sequential trains the preference adapter on the merged skill model, and each adapter of this recipe exists already; leave sequential out of arms"),
        ({"compare": {"arms": ["sequential"], "skill": "sft", "preference": "dpo"}}, "and dpo exists already; leave sequential out of arms"),
        ({"compare": {}, "adapters": {"sft": "mine/sft"}, "merge": None}, "parallel merges adapters, and there is only one"),
        ({"adapters": {"sft": "mine/stf", "dpo": "./none"}, "merge": None}, "adapters.dpo: ./none: neither beside the recipe ("),
        ({"adapters": {"sft": "base"}, "merge": None}, "base: is not an adapter: it has neither adapter_config.json nor adapter_model.safetensors"),
        ({"adapters": {"sft": "base+mine/sft"}, "merge": None}, "; write the adapter alone: mine/sft"),
        ({"adapters": {"sft": "base:mine/sft"}, "merge": None}, "; write the adapter alone: mine/sft"),
        ({"adapters": {"sft": " mine/sft"}, "merge": None}, "; write the adapter alone: mine/sft"),
        ({"adapters": {"sft": "run"}, "merge": None}, "run/checkpoint-20 (or an earlier one: checkpoint-10)"),
        ({"adapters": {"sft": {"path": "mine/sft", "revison": "v1"}}, "merge": None}, "adapters.sft.revison: unknown key; did you mean 'revision'?"),
        ({"audit": {"require": "sparsity(1e-5) [source=stf] > 0"}}, "no adapter is called 'stf'; did you mean 'sft'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_with_them_is_one_line(
    changes: dict[str, Any], expected: str, world: Path, tmp_path: Path
) -> None:
    for step in (10, 20):
        shutil.copytree(world / "mine/sft", world / f"run/checkpoint-{step}", dirs_exist_ok=True)
    with pytest.raises(PaftMergeError) as caught:
        plan(written(world, "wrong", **changes), tmp_path / "run")
    lines = [line for line in str(caught.value).splitlines() if expected in line]
    assert len(lines) == 1, str(caught.value)


def test_an_adapter_of_another_base_is_found_before_anything_is_run(world: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(world / "mine/sft", tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "r": 7}))
    with pytest.raises(RecipeError, match=r"adapters\.sft: "):
        plan(written(world, "other", adapters={"sft": str(other)}, merge=None), tmp_path / "run")


def test_training_such_a_recipe_trains_the_others(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="every adapter exists already, so there is nothing to train"):
        train(written(world, "none"), tmp_path / "out")
    mixed = {"sft": EXISTING["sft"], "dpo": sections()["adapters"]["dpo"]}
    assert list(train(written(world, "some", adapters=mixed), tmp_path / "out")) == ["dpo"]


def test_dry_run_shows_no_training(world: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(cli, ["run", "--dry-run", str(written(world, "dry", compare={})), str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    assert "parallel" in shown.stdout
    assert "train/" not in shown.stdout
    assert not (tmp_path / "run").exists()


def test_an_adapter_on_the_hub_is_pinned_to_its_commit(world: Path, hub: HubServer, tmp_path: Path) -> None:
    first = hub.add("me/dpo", files_of(world / "mine/dpo"))
    adapters = {"sft": EXISTING["sft"], "dpo": "me/dpo"}
    recipe = written(world, "hub", adapters=adapters, compare={"methods": ["ties"]})
    assert {s.stage for s in plan(recipe, tmp_path / "run").todo} == {"audit", "merge", "evaluate"}
    assert not list((tmp_path / "home").rglob("adapter_model.safetensors")), "a plan fetches no weights"
    run(recipe, tmp_path / "run")
    local = run(written(world, "local", compare={"methods": ["ties"]}), tmp_path / "local")
    merged = [(folder / "merged/model.safetensors").read_bytes() for folder in (tmp_path / "run", local.folder)]
    assert merged[0] == merged[1]
    manifest = json.loads((tmp_path / "run/merged/merge_manifest.json").read_text())
    assert manifest["recipe"]["models"][1]["model"]["lora"] == {"path": "me/dpo", "revision": first}
    assert plan(recipe, tmp_path / "run").todo == ()
    hub.add("me/dpo", {"adapter_config.json": hub.files("me/dpo")["adapter_config.json"] + b"\n"})
    adapters["dpo"] = {"path": "me/dpo", "revision": hub.repositories["me/dpo"].resolve("main")}
    again = plan(written(world, "hub", adapters=adapters, compare={"methods": ["ties"]}), tmp_path / "run")
    assert "merge/merged" in {step.name for step in again.todo}


def test_a_base_that_is_missing_is_reported_once(world: Path, tmp_path: Path) -> None:
    with pytest.raises(PaftMergeError) as caught:
        plan(written(world, "nobase", base_model="nowhere/base", merge=None, audit=None, compare={}), tmp_path / "run")
    (line,) = str(caught.value).splitlines()
    assert "base_model: nowhere/base: not a local folder" in line


def test_a_merge_to_an_adapter_is_evaluated_on_its_base(world: Path, tmp_path: Path) -> None:
    output = {"kind": "adapter", "rank": 2}
    methods = [{"merge_method": "task_arithmetic", "name": "small", "output": output}, "task_arithmetic"]
    merged = {**sections()["merge"], "output": output}
    recipe = written(world, "adapters", merge=merged, compare={"arms": ["parallel"], "methods": methods}, audit=None)
    done = run(recipe, tmp_path / "run")
    for folder in ("merged", "arms/parallel-small"):
        assert (tmp_path / "run" / folder / "adapter_config.json").is_file()
    table = {row.name: row.cells["text"].mean for row in done.table.rows}
    assert table["parallel small"] != table["parallel task_arithmetic"]
    assert len({table["merged"], table["parallel small"], table["parallel task_arithmetic"]}) == 3
