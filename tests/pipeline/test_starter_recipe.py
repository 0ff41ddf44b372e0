"""`paft init`: the recipe runs, its paths hold from any directory, and what does not fit is reported before it is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import toys.adapters
import yaml
from click.testing import CliRunner
from peft import LoraConfig
from toys.merge import manifest_of
from toys.run import make_world, write_rows
from toys.train import THEIR_WARNINGS

import paft_merge
from paft_merge.cli import cli
from paft_merge.pipeline import plan, run
from paft_merge.pipeline.starter_recipe import starter
from paft_merge.training import train

pytestmark = THEIR_WARNINGS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and its data, which no test changes."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_the_starter_recipe_is_one_that_runs(gpus: int, world: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "start.yaml"
    args = ["init", str(recipe), "--base", str(world.parent / "base"), "--gpus", str(gpus)]
    args += ["--data", str(world.parent / "sft.jsonl"), "--data", str(world.parent / "pairs.jsonl")]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    ready = plan(recipe, tmp_path / "run", overrides=["adapters.sft.training.max_length=64"])
    assert repr(ready) == f"Planned({str(recipe)!r}, 4 of 4 steps to do)"
    assert [step.name for step in ready.todo] == ["train/sft", "train/dpo", "audit/adapters", "merge/merged"]
    assert CliRunner().invoke(cli, args).exit_code == 1, "an existing file is not replaced"
    uncommented = starter("me/base", gpus=gpus).replace("# evaluate:", "evaluate:").replace("#   suite", "  suite")
    assert yaml.safe_load(uncommented)["evaluate"] == {"suite": "open-llm-v1"}


def test_the_starter_is_printed_without_a_place(tmp_path: Path) -> None:
    base = tmp_path / "a b: 'c'"
    base.mkdir()
    (base / "config.json").write_text("{}")
    done = CliRunner().invoke(cli, ["init", "--base", str(base)])
    assert yaml.safe_load(done.stdout)["base_model"] == str(base)


def test_paths_are_relative_to_the_recipe_so_that_it_runs_from_any_directory(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.parent)
    args = ["init", "deeper/start.yaml", "--base", "base", "--data", "sft.jsonl", "--data", "pairs.jsonl"]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    assert done.stdout == "deeper/start.yaml\n"
    assert yaml.safe_load(Path("deeper/start.yaml").read_text())["adapters"]["dpo"]["data"] == "../pairs.jsonl"
    monkeypatch.chdir(tmp_path)
    recipe = world.parent / "deeper/start.yaml"
    assert plan(recipe, tmp_path / "run", overrides=["adapters.sft.training.max_length=64"]).todo


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--base", "base", "--data", "nofile.jsonl"], "error[DATA]: nofile.jsonl: there is no such file"),
        (["--base", "../base/x", "--data", "no.csv"], "error[BASE]: ../base/x: not a local folder and not a valid Hub repository name"),
        (["--base", "base", "--data", "pairs.jsonl", "--data", "sft.jsonl"], "give the SFT data first, then the preference data"),
        (["--base", "base", "--data", "other.json"], "sft: needs messages, or a question and an answer, or text; the columns are task, reply; name them with rename"),
        (["--base", "base", "--data", "broken.jsonl"], "error[DATA]: broken.jsonl:1: is not JSON"),
        (["--base", "base", "--adapter", "base", "--adapter", "me/dpo"], "error[ADAPTER]: base: has no adapter_config.json"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_reported_and_nothing_is_written(
    args: list[str], expected: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.parent)
    Path("other.json").write_text(json.dumps([{"task": "a", "reply": "b"}], indent=1))
    Path("broken.jsonl").write_text('{"text": ')
    done = CliRunner().invoke(cli, ["init", *args, str(tmp_path / "r.yaml")])
    assert done.exit_code == 1
    assert expected in done.stderr
    assert not (tmp_path / "r.yaml").exists()


def test_chats_on_a_base_without_a_template_are_noticed(world: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    write_rows(tmp_path / "chat.jsonl", [{"messages": turns}])
    base = Path(shutil.copytree(world.parent / "base", tmp_path / "base"))
    args = ["init", "--base", str(base), "--data", str(tmp_path / "chat.jsonl")]
    assert "chat_template" not in CliRunner().invoke(cli, args).output, "this base has a template"
    for path in base.glob("*template*"):
        path.unlink()
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(cli, args)
    assert "warning[TEMPLATE]" in done.stderr
    assert "REQUIRED: the rows are chats" in done.stdout
    assert yaml.safe_load(done.stdout)["merge"]["chat_template"] == "auto"
    plain = CliRunner().invoke(cli, ["init", "--base", "gpt9", "--data", "me/data"])
    assert plain.stderr.startswith("warning[BASE]: gpt9: not a local folder; written as a Hub name")
    assert "chat_template" not in plain.stdout


def test_adapters_that_exist_give_a_recipe_that_compares_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(world, tmp_path / "mine")
    config = json.loads((tmp_path / "mine/sft/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(world.parent / "base")
    (tmp_path / "mine/sft/adapter_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    data = [f"--data={world.parent / name}" for name in ("test.jsonl", "pairs.jsonl", "text.txt")]
    args = ["init", "new/compare.yaml", "--adapter", "mine/sft", "--adapter", "mine/dpo", *data]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    recipe = yaml.safe_load((tmp_path / "new/compare.yaml").read_text())
    assert Path(recipe["base_model"]) == world.parent / "base", "the base that the adapters name"
    assert recipe["adapters"] == {"sft": "../mine/sft", "dpo": "../mine/dpo"}
    kinds = {name: metric["kind"] for name, metric in recipe["evaluate"]["metrics"].items()}
    assert kinds == {"test": "exact_match", "pairs": "preference", "text": "perplexity"}
    monkeypatch.chdir(world.parent)
    planned = plan(tmp_path / "new/compare.yaml", tmp_path / "run")
    assert {step.stage for step in planned.steps} == {"audit", "merge", "evaluate"}
    assert len(planned.planner.arms) == 11
    assert CliRunner().invoke(cli, ["init", "--adapter", str(tmp_path / "mine/sft")]).exit_code == 2


def test_the_merge_of_the_starter_is_the_sum_of_both_deltas(world: Path) -> None:
    args = ["init", "--base", str(world.parent / "base")]
    args += ["--data", str(world.parent / "sft.jsonl"), "--data", str(world.parent / "pairs.jsonl")]
    merge = yaml.safe_load(CliRunner().invoke(cli, args).stdout)["merge"]
    assert merge["merge_method"] == "task_arithmetic"
    assert [(one["model"], one["parameters"]) for one in merge["models"]] == [
        ("sft", {"weight": 1.0}), ("dpo", {"weight": 1.0}),
    ]  # fmt: skip


def test_the_first_merge_of_the_starter_is_not_sft_alone(world: Path, tmp_path: Path) -> None:
    """The rates and weights of the template give deltas of one size: the run has no SCALE warning."""
    recipe = tmp_path / "start.yaml"
    args = ["init", str(recipe), "--base", str(world.parent / "base")]
    args += ["--data", str(world.parent / "sft.jsonl"), "--data", str(world.parent / "pairs.jsonl")]
    assert CliRunner().invoke(cli, args).exit_code == 0
    steps = ["training.max_length=32", "training.max_steps=6"]
    made = run(
        recipe, tmp_path / "run", overrides=[f"adapters.{name}.{step}" for name in ("sft", "dpo") for step in steps]
    )
    totals = manifest_of(made.folder / "merged")["totals"]
    assert all(row["weighted_l2"] for row in totals)
    assert manifest_of(made.folder / "merged")["warnings"] == []


@pytest.mark.parametrize(("factor", "noted"), [(1.0, False), (0.01, True)])
def test_adapters_of_very_different_sizes_are_added_and_their_sizes_are_noted(
    factor: float, noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    toys.adapters.train(toys.adapters.llama(), Path(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    shutil.move("adapter", "a")
    shutil.copytree("a", "b")
    toys.adapters.edit_tensors(
        Path("b"), lambda tensors: {k: v * factor if "lora_B" in k else v for k, v in tensors.items()}
    )
    done = CliRunner().invoke(cli, ["init", "--base", "base", "--adapter", "a", "--adapter", "b", "r.yaml"])
    assert done.exit_code == 0, done.output
    written = Path("r.yaml").read_text()
    assert ("# the root mean squares of the deltas are a " in written) == noted
    merge = yaml.safe_load(written)["merge"]
    assert merge == {
        "merge_method": "task_arithmetic", "models": [{"model": name, "parameters": {"weight": 1.0}} for name in "ab"],
    }  # fmt: skip
    models = [{**model, "model": f"base+{model['model']}"} for model in merge["models"]]
    assert paft_merge.merge({**merge, "base_model": "base", "models": models}, "out")


def test_an_adapter_that_names_no_base_needs_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    done = CliRunner().invoke(cli, ["init", "--adapter", str(tmp_path / "a"), "--adapter", str(tmp_path / "b")])
    assert done.exit_code == 2
    assert "Missing option '--base' (the adapters do not name their base)." in done.stderr
