"""`kind: agreement` in a run and in a search: the sources answer once, and their answers are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from toys import adapters as toys
from toys.run import Killed, write_rows
from toys.train import THEIR_WARNINGS, saved

from paft_merge.cli import cli
from paft_merge.evaluating import light
from paft_merge.pipeline import plan, run, tuning
from paft_merge.pipeline.ray_steps import units_of
from paft_merge.pipeline.schema import load_run
from paft_merge.pipeline.steps import Answer, Evaluate, Planner
from paft_merge.pipeline.tuning import tune

pytestmark = [THEIR_WARNINGS, pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that merges two adapters, which exist, and seeks agreement with each on its own prompts."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    saved(folder / "base", toys.llama())
    for seed, name in enumerate(("x", "y"), 1):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(toys.llama(), config).save_pretrained(folder / name)
        write_rows(folder / f"{name}.jsonl", [{"prompt": f"w{i} w{i + seed}"} for i in range(6)])
    metrics = {
        name: {"kind": "agreement", "data": f"{name}.jsonl", "with": name, "max_new_tokens": 2} for name in ("x", "y")
    }
    recipe = {
        "base_model": "base",
        "adapters": {"x": "x", "y": "y"},
        "merge": {
            "merge_method": "task_arithmetic",
            "models": [{"model": "x", "parameters": {"weight": 1.0}}, {"model": "y", "parameters": {"weight": 0.0}}],
        },
        "evaluate": {"metrics": metrics, "max_length": 16},
        "tune": {"metric": "x + y", "space": {"models[0].parameters.weight": [0.0, 1.0]}, "trials": 3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "recipe.yaml"


def counted(patch: pytest.MonkeyPatch) -> list[str]:
    """The models that are asked for answers, from now on."""
    asked, real = list[str](), light.answers_of

    def ask(subject: Any, *given: Any) -> list[str]:
        asked.append(Path(subject.name.rpartition("+")[2]).name)
        return real(subject, *given)

    patch.setattr(light, "answers_of", ask)
    return asked


def test_a_search_asks_the_sources_once_and_a_run_uses_their_answers(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real, merges = counted(monkeypatch), tuning.try_merge, iter(range(1, 100))

    def dies(*given: Any) -> Any:
        if next(merges) == 2:
            raise Killed
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "try_merge", dies)
        with pytest.raises(Killed):
            tune(world, tmp_path, parallel=1)
    found = tune(world, tmp_path, parallel=1)
    assert asked == ["x", "y"], "once, before the first trial, and not again when the search continues"
    first = found.trials[0]
    assert first.scores["x"] == 1, "the merge as it is has the weights of x alone"
    assert first.scores["y"] < 1
    assert first.value == first.scores["x"] + first.scores["y"]
    assert len({tuple(trial.scores.values()) for trial in found.trials}) > 1
    done = run(world, tmp_path, overrides=("tune=false",))
    assert asked == ["x", "y"]
    (row,) = done.table.rows
    assert {name: row.cells[name].mean for name in ("x", "y")} == first.scores
    kept = json.loads((tmp_path / "evaluations" / "answers" / "y" / "y.json").read_text())["answers"]
    mine = json.loads((tmp_path / "evaluations" / "merged" / "y.json").read_text())
    assert mine["y"]["rows"] == [float(a.strip() == b.strip()) for a, b in zip(mine["y"]["outputs"], kept, strict=True)]
    again = tune(world, tmp_path, overrides=("evaluate.metrics.y.with=base",), trials=1)
    assert asked == ["x", "y", "base"], "another source is another search"
    assert len(again.trials) == 1


def test_the_steps_of_answers_come_before_the_evaluations_that_need_them(world: Path, tmp_path: Path) -> None:
    changes = ("evaluate.metrics.x.with=[x, base, ../elsewhere]", "tune=false", "merge.base_model=base")
    (world.parent.parent / "elsewhere").mkdir()
    (world.parent.parent / "elsewhere" / "config.json").write_text("{}")
    planner = plan(world, tmp_path, overrides=changes).planner
    answers = {name: step for name, step in planner.steps.items() if isinstance(step.job, Answer)}
    of_x = planner.steps["evaluate/merged/x"]
    mine = [name for name in of_x.needs if name in answers]
    assert mine[:2] == ["evaluate/answers/x/x", "evaluate/answers/base/x"]
    assert mine[2].startswith("evaluate/answers/..-elsewhere-")
    assert isinstance(of_x.job, Evaluate)
    assert [planner.steps[name].out for name in mine] == list(of_x.job.answers)
    assert len(answers) == 4
    units = {unit.name: unit for unit in units_of(planner.ordered, gate=False)}
    assert set(mine) < units["evaluate/merged"].after


def test_the_sources_of_a_seed_are_its_adapters(world: Path, tmp_path: Path) -> None:
    changes = ["adapters.x={objective: sft, data: x.jsonl}", "seeds=[3, 4]", "compare={arms: [base, individual]}"]
    recipe = load_run(world, [*changes, "evaluate.metrics.x.with=[x, y]"])
    steps = Planner.plan(recipe, tmp_path).steps
    needs = steps["evaluate/seed-4/x/x"].needs
    assert needs == ("train/seed-4/x", "evaluate/seed-4/answers/x/x", "evaluate/answers/y/x")
    assert steps[needs[1]].needs == ("train/seed-4/x",)
    assert steps["evaluate/base/x"].needs[0] == "evaluate/seed-3/answers/x/x", "of the first seed"


def test_an_evaluation_outside_of_a_run_finds_existing_adapters_and_refuses_those_that_a_run_trains(
    world: Path,
) -> None:
    base = str(world.parent / "base")
    done = CliRunner().invoke(cli, ["evaluate", base, "--recipe", str(world), "--json"])
    assert done.exit_code == 0, done.output
    assert {*json.loads(done.stdout)} == {"x", "y"}
    alone = ["--agreement", str(world.parent / "x.jsonl"), f"{base}+{world.parent / 'x'}", "--max-new-tokens", "2"]
    option = CliRunner().invoke(cli, ["evaluate", base, *alone, "--json"])
    assert option.exit_code == 0, option.output
    assert json.loads(option.stdout)["agreement"]["rows"] == json.loads(done.stdout)["x"]["rows"]
    trained = ["--set", "adapters.x={objective: sft, data: x.jsonl}"]
    refused = CliRunner().invoke(cli, ["evaluate", base, "--recipe", str(world), *trained])
    assert refused.exit_code == 1
    assert "names the adapter 'x', which a run trains" in refused.stderr
