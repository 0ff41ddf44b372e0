"""Links of a stranger's folder lead no command to files outside of it, unless the user allows it."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import random_state, save_adapter, save_checkpoint
from toys.merge import files_of, on, paft, recipe, write_recipe
from toys.run import make_world

import paft_merge
from paft_merge.errors import CheckpointError, HubError, PaftMergeError
from paft_merge.hub import prepare_upload
from paft_merge.inputs.links import following_links, refuse_links_out
from paft_merge.plan.vocabulary.tokenizers import files_in
from paft_merge.training import launch

Make = Callable[..., dict[str, Path]]


def link_out(folder: Path, *names: str) -> Path:
    """Move files to a folder beside it, and leave links to them."""
    outside = folder.with_name(f"{folder.name}-outside")
    for name in names:
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / name, outside / name)
        (folder / name).symlink_to(outside / name)
    return outside


def merge_of(models: dict[str, Path], **extra: Any) -> dict[str, Any]:
    return recipe("task_arithmetic", models["base"], (on(models["base"], models["sft"]), {"weight": 0.5}), **extra)


def test_a_push_follows_no_link_out_of_the_folder(family: Make, tmp_path: Path) -> None:
    base = family()["base"]
    (tmp_path / "private.txt").write_text("private")
    (base / "inside.txt").symlink_to("config.json")
    assert "inside.txt" in prepare_upload(base).files
    (base / "NOTICE.txt").symlink_to(tmp_path / "private.txt")
    for allowed in (False, True):
        with (
            following_links(allowed),
            pytest.raises(
                HubError, match=r"NOTICE\.txt: is a link to .*private\.txt, outside the folder; copy the file"
            ),
        ):
            prepare_upload(base)


def test_every_link_out_of_a_folder_is_refused_at_once(family: Make, tmp_path: Path) -> None:
    models = family(shards=2)
    (models["base"] / "tokenizer.json").write_text("{}")
    (models["base"] / "LICENSE").write_text("MIT")
    names = sorted(path.name for path in models["base"].iterdir())
    outside = link_out(models["base"], *names)
    link_out(models["sft"], "adapter_config.json", "adapter_model.safetensors")
    with pytest.raises(PaftMergeError) as caught:
        paft_merge.merge(merge_of(models), tmp_path / "out")
    assert {problem.code for problem in caught.value.problems} == {"LINK_OUTSIDE"}
    named = {Path(problem.where).name for problem in caught.value.problems}
    assert named == {*names, "adapter_config.json", "adapter_model.safetensors"} - {"LICENSE"}
    assert f"config.json: is a link to {outside / 'config.json'}, outside the folder; copy" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_merge_with_the_option_is_that_of_the_files(family: Make, tmp_path: Path) -> None:
    models = family(shards=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        (models["base"] / name).write_text("{}")
    paft_merge.merge(merge_of(models), tmp_path / "plain", write_model_card=False)
    for one in ("base", "sft"):
        link_out(models[one], *(path.name for path in models[one].iterdir()))
    file = write_recipe(tmp_path / "recipe.yaml", merge_of(models))
    refused = paft("merge", file, tmp_path / "out", "--quiet")
    assert (refused.exit_code, "pass --follow-links if you trust" in refused.stderr) == (1, True)
    done = paft("merge", file, tmp_path / "out", "--quiet", "--follow-links", "--no-write-model-card")
    assert done.exit_code == 0, done.output
    ours, plain = ({k: v for k, v in files_of(tmp_path / o).items() if "manifest" not in k} for o in ("out", "plain"))
    assert ours == plain
    assert "LICENSE" in ours


def test_links_inside_into_the_cache_and_to_the_folder_are_followed(family: Make, tmp_path: Path) -> None:
    models = family()
    base, blobs = models["base"], tmp_path / "elsewhere/models--me--x/blobs"
    blobs.mkdir(parents=True)
    shutil.move(base / "model.safetensors", base / "weights.bytes")
    (base / "model.safetensors").symlink_to("weights.bytes")
    shutil.move(models["sft"] / "adapter_model.safetensors", blobs / "0123")
    (models["sft"] / "adapter_model.safetensors").symlink_to(blobs / "0123")
    os.link(models["sft"] / "adapter_config.json", tmp_path / "hard.json")
    for one in ("base", "sft"):
        shutil.move(models[one], tmp_path / f"{one}-real")
        models[one].symlink_to(tmp_path / f"{one}-real")
    paft_merge.merge(merge_of(models), tmp_path / "out")


def test_a_linked_folder_of_a_module_is_refused(family: Make, tmp_path: Path) -> None:
    base = family()["base"]
    shutil.copytree(base, tmp_path / "outside")
    (base / "modules.json").write_text(json.dumps([{"path": "2_Dense"}]))
    (base / "2_Dense").symlink_to(tmp_path / "outside")
    (base / "logs").symlink_to(tmp_path / "outside")  # nothing reads it
    with pytest.raises(CheckpointError, match=r"2_Dense/model\.safetensors: is a link to .*, outside the folder"):
        refuse_links_out(base)
    (base / "modules.json").unlink()
    refuse_links_out(base)


def test_a_link_that_climbs_back_into_a_folder_of_a_similar_name_is_refused(family: Make, tmp_path: Path) -> None:
    base = family()["base"]
    shutil.copytree(base, tmp_path / "base2")
    for name, target in (("config.json", "../base2/config.json"), ("generation_config.json", "config.json")):
        (base / name).unlink(missing_ok=True)
        (base / name).symlink_to(target)
    with pytest.raises(CheckpointError) as caught:
        refuse_links_out(base)
    assert len(caught.value.problems) == 2  # the second link leads out through the first


def test_tokenizers_outside_are_read_with_the_option_only(family: Make) -> None:
    base = family()["base"]
    (base / "tokenizer.json").write_text("{}")
    link_out(base, "tokenizer.json")
    assert "tokenizer.json" not in files_in(base)
    with following_links(True), following_links(False):  # an inner call does not take back what an outer one allows
        assert "tokenizer.json" in files_in(base)
    assert "tokenizer.json" not in files_in(base)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's recipe whose base has linked weights, and an adapter that exists and is linked."""
    file = make_world(tmp_path_factory.mktemp("world"), audit=None)
    link_out(file.parent / "base", "model.safetensors", "config.json")
    return file


def test_init_measures_linked_adapters_with_the_option_only(tmp_path: Path) -> None:
    state = random_state(0)
    base = save_checkpoint(tmp_path / "base", state)
    words: list[Path | str] = ["init", "--base", base]
    for name, size in (("one", 1e-3), ("two", 1e-2)):
        link_out(save_adapter(tmp_path / name, state, 1, size=size), "adapter_model.safetensors")
        words += ["--adapter", tmp_path / name]
    for option, measured in ((), False), (("--follow-links",), True):
        done = paft(*words, *option)
        assert done.exit_code == 0, done.output
        assert ("the root mean squares of the deltas are" in done.output) == measured


@pytest.mark.parametrize(
    "command",
    [
        ("run", "{recipe}", "{out}", "--dry-run"),
        ("train", "{recipe}", "{out}", "--dry-run"),
        ("train", "{recipe}", "--show", "1"),
        ("evaluate", "{base}", "--perplexity", "{data}"),
        ("explain", "{merge}"),
        ("merge", "{merge}", "--dry-run"),
        ("audit", "{base}", "--base", "{base}"),
    ],
    ids=lambda command: "-".join(word for word in command if "{" not in word),
)
def test_every_command_that_opens_models_takes_the_option(
    world: Path, command: tuple[str, ...], tmp_path: Path
) -> None:
    base = world.parent / "base"
    merge = write_recipe(tmp_path / "merge.yaml", recipe("linear", None, (base, {"weight": 1.0})))
    given = {"recipe": world, "out": tmp_path / "out", "base": base, "data": world.parent / "text.txt", "merge": merge}
    words = [word.format_map(given) for word in command]
    refused = paft(*words)
    assert refused.exit_code == 1
    assert refused.stderr.count("error[LINK_OUTSIDE]") >= 2
    assert "--follow-links" in refused.stderr
    followed = paft(*words, "--follow-links")
    assert "LINK_OUTSIDE" not in followed.output
    assert followed.exit_code == 0 or "there is nothing to audit" in followed.stderr, followed.output


def test_training_and_its_processes_take_the_option(world: Path, tmp_path: Path) -> None:
    file = world.with_name("one.yaml")
    data = yaml.safe_load(world.read_text())
    file.write_text(yaml.safe_dump({**data, "adapters": {"sft": data["adapters"]["sft"]}}))
    refused = paft("train", file, tmp_path / "out", "--quiet", "--schedule", "processes")
    assert (refused.exit_code, "error[LINK_OUTSIDE]" in refused.stderr) == (1, True)
    assert not (tmp_path / "out").exists()
    ours = logging.getLogger("paft_merge")
    level = ours.level
    try:
        assert launch.main([str(file), str(tmp_path / "child"), "sft"]) == 0  # its parent has checked the links
    finally:
        ours.setLevel(level)
    done = paft("train", file, tmp_path / "out", "--quiet", "--schedule", "sequential", "--follow-links")
    assert done.exit_code == 0, done.output
