"""Recipes of a run: what is wrong is told whole, with lines and hints, before anything is done; arms and their shared work."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from toys.run import make_world, sections
from toys.train import THEIR_WARNINGS

from paft_merge.cli import run_tables
from paft_merge.errors import PaftMergeError, RecipeError
from paft_merge.evaluating import harness
from paft_merge.methods import METHODS
from paft_merge.pipeline import load_run, plan, run
from paft_merge.pipeline.adapter_sections import placed
from paft_merge.pipeline.execution import _renamed
from paft_merge.pipeline.named_models import labels
from paft_merge.pipeline.overrides import parse_key_path, put
from paft_merge.pipeline.results_table import Cell, Row, Table
from paft_merge.pipeline.steps import Merge, Planner, Train
from paft_merge.recipe import ModelRef
from paft_merge.training import train

pytestmark = THEIR_WARNINGS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and its data, which no test changes."""
    return make_world(tmp_path_factory.mktemp("world"))


def planned(world: Path, tmp_path: Path, **changes: Any) -> Any:
    """The plan of the toy's recipe with other sections; training data is not looked at when nothing is trained."""
    recipe = world.with_name(f"{tmp_path.name}.yaml")
    data = {key: value for key, value in {**sections(), **changes}.items() if value is not None}
    recipe.write_text(yaml.safe_dump(data, sort_keys=False))
    return plan(recipe, tmp_path / "run")


def told(world: Path, tmp_path: Path, **changes: Any) -> str:
    """What planning that recipe complains of."""
    with pytest.raises(PaftMergeError) as caught:
        planned(world, tmp_path, **changes)
    return str(caught.value)


def test_files_beside_the_recipe_are_passed_to_training_by_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "r.py").touch()
    (tmp_path / "chatml").touch()
    section = {"chat_template": "chatml", "reward": [{"function": "r.py:f", "weight": 2}, {"function": "a.b:f"}]}
    assert placed(section, tmp_path) == {
        "chat_template": "chatml",  # the name, as in merge:
        "reward": [{"function": f"{tmp_path / 'r.py'}:f", "weight": 2}, {"function": "a.b:f"}],
    }
    assert placed({"reward": {"rule": "short"}}, tmp_path) == {"reward": [{"rule": "short"}]}


COMPARE = {"arms": ["base", "individual", "sequential", "parallel"], "methods": ["ties", "linear", "slerp"]}


def test_every_fault_of_every_section_is_told_at_once_with_its_line(world: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(
        """base_model: base
adaptrs: {}
adapters:
  sft: {objective: sft, data: sft.jsonl, lora: {rr: 3}}
merge: [1]
audit: {epsilon: -1}
evaluate: {metrics: {a: {kind: perplexity, dta: x}}}
compare: {arms: [paralel]}
push: {repo_id: nobody}
seeds: [0, 0]
"""
    )
    with pytest.raises(RecipeError) as caught:
        load_run(recipe)
    text = str(caught.value)
    for part in (
        "bad.yaml:2: adaptrs: unknown key; did you mean 'adapters'?",
        "bad.yaml:4: adapters.sft.lora.rr: unknown key",
        "bad.yaml:5: merge: a merge recipe is a mapping",
        "bad.yaml:6: audit.epsilon: must be above 0, got -1",
        "bad.yaml:7: evaluate.metrics.a.dta: unknown key; did you mean 'data'?",
        "bad.yaml:8: compare.arms[0]: must be one of base, individual, sequential, sequential_reversed, parallel, mixed, polish, got 'paralel'; did you mean 'parallel'?",
        "bad.yaml:9: push.repo_id: must match the pattern ",
        "bad.yaml:10: seeds: must be different whole numbers",
    ):
        assert part in text, (part, text)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"base_model": "./bse/x/y"}, "base_model: ./bse/x/y is not a Hub repository, and is neither beside the recipe ("),
        ({"merge": {"merge_method": "tis", "models": [{"model": "sft"}]}}, "did you mean 'ties'?"),
        ({"merge": {"merge_method": "linear", "models": [{"model": "sfft", "parameters": {"weight": 1}}]}}, "did you mean 'sft'?"),
        ({"merge": {"merge_method": "ties", "models": [{"model": "sft", "parameters": {"weight": 1, "densty": 1}}]}}, "did you mean 'density'?"),
        ({"audit": {"require": ["sparsty(1e-5) > 1"]}}, "audit.require[0]: sparsty(1e-5) > 1: there is no metric 'sparsty'"),
        ({"audit": {"require": ["sparsity(1e-5) [source=stf] > 1"]}}, "no adapter is called 'stf'; did you mean 'sft'?"),
        ({"audit": {"require": ["kept > 1"]}}, "kept needs a preview of a merge"),
        ({"evaluate": {"metrics": {"a": {"kind": "perplexity", "data": "nix.txt"}}}}, "evaluate: nix.txt: no such file, neither beside the recipe ("),
        ({"evaluate": None, "compare": {}}, "compare needs evaluate"),
        ({"compare": {"skill": "sftt"}}, "compare.skill: no adapter 'sftt'; did you mean 'sft'?"),
        ({"compare": {"methods": ["ties", "tiess"]}}, "compare.methods[1]"),
        ({"compare": {"methods": [{"weight": 1}]}}, "a merge recipe needs merge_method"),
        ({"compare": {"methods": [{"merge_method": "ties", "name": "x!"}, {"merge_method": "linear", "name": "x?"}]}}, "'x!' and 'x?' would have one folder, parallel-x"),
        ({"compare": {"methods": [{"merge_method": "ties", "name": "x" * 300}]}}, "the name of the arm has 300 characters; at most 141"),
        ({"merge": None, "push": {"repo_id": "a/b"}}, "push needs merge"),
        ({"seeds": "all"}, "seeds: must be different whole numbers"),
        ({"evaluate": {}}, "evaluate: names no evaluation"),
        ({"adapters": {"base": sections()["adapters"]["sft"]}, "merge": None}, "a name that comparisons use"),
    ],
)  # fmt: skip
def test_what_a_recipe_names_is_looked_at_before_anything_is_run(
    changes: dict[str, Any], expected: str, world: Path, tmp_path: Path
) -> None:
    assert expected in told(world, tmp_path, **changes)
    assert not (tmp_path / "run").exists()


def test_fields_targets_and_columns_of_training_are_looked_at_too(world: Path, tmp_path: Path) -> None:
    adapters = sections()["adapters"]
    adapters["sft"]["training"] = {"learning_rat": 1}
    adapters["dpo"]["lora"] = {"r": 2, "target_modules": ["q_prj"]}
    adapters["dpo"]["data"] = "sft.jsonl"
    text = told(world, tmp_path, adapters=adapters)
    assert "SFTConfig does not have this field; did you mean 'learning_rate'?" in text
    assert "lora.target_modules: q_prj: the base does not have this module; did you mean 'q_proj'?" in text
    assert "needs chosen and rejected; the columns are text" in text


def test_missing_data_is_reported_together_with_a_missing_base(world: Path, tmp_path: Path) -> None:
    adapters = sections()["adapters"]
    adapters["sft"]["data"] = "my-sft.jsonl"
    adapters["dpo"]["data"] = "my-pairs.csv"
    lines = told(world, tmp_path, base_model="./bse/x/y", adapters=adapters).splitlines()
    assert len(lines) == 3, lines
    assert "./bse/x/y is not a Hub repository" in lines[0]
    for line, name in zip(lines[1:], ("my-sft.jsonl", "my-pairs.csv"), strict=True):
        assert f"{name}: no such file, neither beside the recipe (" in line
        assert "nor in the working directory" in line


def test_a_recipe_for_paft_merge_is_refused_in_one_line(world: Path, tmp_path: Path) -> None:
    (tmp_path / "ties.yaml").write_text("models: [{model: a}, {model: b}]\nmerge_method: ties\n")
    with pytest.raises(RecipeError) as caught:
        load_run(tmp_path / "ties.yaml")
    what = "ties.yaml:2: merge_method: this is a merge recipe, not a run recipe; use paft merge"
    assert str(caught.value) == f"{tmp_path}/{what}"
    with pytest.raises(RecipeError) as caught:
        train(tmp_path / "ties.yaml", tmp_path / "out")
    assert str(caught.value) == f"{tmp_path}/{what}"


def test_paths_are_sought_in_one_place_where_the_recipe_is_in_the_working_directory(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.parent)
    text = told(world, tmp_path, evaluate={"metrics": {"a": {"kind": "preference", "data": "nix.jsonl"}}})
    assert f"evaluate: nix.jsonl: no such file, not in the working directory ({world.parent}); check the path" in text


def test_an_evaluation_whose_package_is_missing_is_found_before_training(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    text = told(world, tmp_path, evaluate={"suite": "open-llm-v1"})
    assert ": evaluate: lm-eval's tasks: lm_eval and requests" in text
    assert "not installed; pip install 'paft-merge[eval]'" in text


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed (extra [eval])")
@pytest.mark.filterwarnings("default")
def test_a_task_whose_data_is_not_here_is_found_before_training(world: Path, tmp_path: Path) -> None:
    task = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "none.jsonl"}},
            "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "x", "doc_to_choice": ["a"], "doc_to_target": 0}  # fmt: skip
    (world.parent / "mine.yaml").write_text(yaml.safe_dump(task))
    planned(world, tmp_path, evaluate={"tasks": ["mine.yaml"]})
    with pytest.raises(PaftMergeError) as caught:  # a plan does not load it, because lm-eval runs code of task files
        run(world.with_name(f"{tmp_path.name}.yaml"), tmp_path / "out")
    assert re.search(r"evaluate: .*mine: .*none.jsonl", str(caught.value))
    assert not (tmp_path / "out/adapters").exists()
    planned(world, tmp_path, evaluate={"tasks": ["mine.yaml"]}, adapters=None, audit=None, merge=None)


def test_a_comparison_without_l1_has_no_sparse_arm(world: Path, tmp_path: Path) -> None:
    adapters = sections()["adapters"]
    del adapters["sft"]["l1"]
    assert "compare.sft: sft is not trained sparse" in told(world, tmp_path, adapters=adapters, compare={"sft": ["l1"]})
    names = [arm.name for arm in planned(world, tmp_path, adapters=adapters, compare=COMPARE, merge=None).planner.arms]
    assert names == ["base", "sft", "dpo", "sequential", "parallel ties", "parallel linear", "parallel slerp"]


def test_arms_share_the_adapters_that_they_have_in_common(world: Path, tmp_path: Path) -> None:
    made = planned(world, tmp_path, compare=COMPARE, seeds=[3, 4])
    trained = [step.name for step in made.steps if isinstance(step.job, Train)]
    per_seed = ["sft", "dpo", "sft-dense", "after-sft-dense/dpo", "after-sft/dpo"]
    assert sorted(trained) == sorted(f"train/seed-{seed}/{name}" for seed in (3, 4) for name in per_seed)
    names = list(dict.fromkeys(arm.name for arm in made.planner.arms))
    assert names == [
        "base", "sft (l1)", "dpo", "sft (dense)", "sequential (dense)", "sequential (l1)",
        *(f"parallel {method} ({kind})" for kind in ("dense", "l1") for method in ("ties", "linear", "slerp")), "merged",
    ]  # fmt: skip
    jobs = {step.name: step.job for step in made.steps}
    dense, sparse = jobs["train/seed-3/sft-dense"], jobs["train/seed-3/sft"]
    assert isinstance(dense, Train)
    assert isinstance(sparse, Train)
    assert "l1" in sparse.section
    assert "l1" not in dense.section
    assert dense.section["training"]["seed"] == 3
    keys = {step.name: step.key for step in made.steps}
    assert keys["train/seed-3/sft"] != keys["train/seed-4/sft"]


def test_a_methods_name_stands_for_a_recipe_on_both_adapters(world: Path, tmp_path: Path) -> None:
    methods = [
        "task_arithmetic",
        "slerp",
        "linear",
        {"merge_method": "ties", "name": "mine", "parameters": {"density": 0.3}},
    ]
    made = planned(world, tmp_path, compare={"sft": ["dense"], "methods": methods, "arms": ["parallel"]})
    recipes = {s.name: s.job.recipe for s in made.steps if isinstance(s.job, Merge) and s.stage == "merge"}
    assert list(recipes) == [
        "merge/parallel-task_arithmetic", "merge/parallel-slerp", "merge/parallel-linear", "merge/parallel-mine", "merge/merged",
    ]  # fmt: skip
    ties = recipes["merge/parallel-mine"]
    assert [m["model"]["lora"]["path"].rsplit("/", 1)[1] for m in ties["models"]] == ["sft-dense", "dpo"]
    assert [m["parameters"]["weight"] for m in ties["models"]] == [1.0, 0.5], "as the recipe's own merge says"
    assert ties["out_dtype"] == "float32", "as the recipe's own merge says"
    assert recipes["merge/parallel-slerp"]["base_model"]["lora"]["path"].endswith("sft-dense")
    assert "base_model" not in recipes["merge/parallel-linear"], "linear would merge it as one more model"
    assert recipes["merge/merged"]["models"][0]["model"]["lora"]["path"].endswith("adapters/sft")


def test_the_name_of_every_method_that_merges_two_adapters_is_a_recipe(world: Path, tmp_path: Path) -> None:
    one_source = ("passthrough", "nearswap", "arcee_fusion")
    names = [name for name, method in METHODS.items() if name not in one_source and not method.core_only]
    made = planned(world, tmp_path, compare={"sft": ["l1"], "methods": names, "arms": ["parallel"]}, merge=False)
    recipes = {s.name.removeprefix("merge/parallel-"): s.job.recipe for s in made.steps if isinstance(s.job, Merge)}
    assert set(recipes) == set(names)
    weights = {name: [m.get("parameters", {}).get("weight") for m in data["models"]] for name, data in recipes.items()}
    own = {name for name in names if weights[name] == [None, None]}
    assert own == {"slerp", "karcher", "model_stock", "ram", "ramplus_tl", "sce", "geometric_median"}
    means = {"linear", "nuslerp", "multislerp"}
    assert {name: weights[name] for name in weights if name not in own} == {
        name: [0.5, 0.5] if name in means else [1.0, 1.0] for name in names if name not in own
    }
    parameters = {name: data.get("parameters") for name, data in recipes.items()}
    assert parameters["geometric_median"] == {"lambda": 2.0}, "as large as the sum"
    assert parameters["breadcrumbs"]["density"] < 1, "else nothing is pruned"
    assert all(parameters[name]["density"] == 0.5 for name in ("ties", "della", "dare_linear", "pcb"))


def test_a_merge_of_a_comparison_may_have_adapters_that_have_no_role(world: Path, tmp_path: Path) -> None:
    adapters = sections()["adapters"]
    models = [{"model": "other"}, {"model": "sft"}]
    compare = {"sft": ["dense"], "skill": "sft", "preference": "dpo", "arms": ["parallel"],
               "methods": [{"merge_method": "l1_ties", "models": models}]}  # fmt: skip
    made = planned(world, tmp_path, adapters={**adapters, "other": adapters["sft"]}, compare=compare, merge=False)
    [step] = [step for step in made.steps if isinstance(step.job, Merge)]
    found = [m["model"]["lora"]["path"].rsplit("/", 1)[1] for m in step.job.recipe["models"]]
    assert found == ["other", "sft-dense"]
    assert step.needs == ("train/sft-dense", "train/other")


def test_the_weights_of_a_geometric_median_are_counts_and_no_factors(world: Path, tmp_path: Path) -> None:
    compare = {"sft": ["l1"], "methods": ["geometric_median", "magmax"], "arms": ["parallel"]}
    merge = {"merge_method": "l1_ties", "models": BALANCE}
    made = planned(world, tmp_path, compare=compare, merge=merge)
    recipes = {s.name: s.job.recipe for s in made.steps if isinstance(s.job, Merge)}
    assert ["parameters" in model for model in recipes["merge/parallel-geometric_median"]["models"]] == [False, False]
    assert [m["parameters"]["weight"] for m in recipes["merge/parallel-magmax"]["models"]] == [1.0, 4.0]
    swept = planned(world, tmp_path, compare={**compare, "weights": [0.5, 2.0]}, merge=merge)
    arms = [arm.name for arm in swept.planner.arms if arm.group == "parallel"]
    assert arms == ["parallel geometric_median", "parallel magmax weight=0.5", "parallel magmax weight=2"]


BALANCE = [{"model": "sft"}, {"model": "dpo", "parameters": {"weight": 4.0}}]
NORMS = [{"model": "sft"}, {"model": "dpo", "parameters": {"weight": "equal_norm"}}]


@pytest.mark.parametrize(
    ("merge", "method", "weights"),
    [
        ({"models": BALANCE}, "linear", [1.0, 4.0]),
        ({"models": BALANCE}, {"merge_method": "della"}, [1.0, 4.0]),
        ({"models": BALANCE[::-1], "parameters": {"weight": 0.5}}, "ties", [0.5, 4.0]),
        ({"models": [{"model": "sft"}, {"model": "dpo"}]}, "linear", [0.5, 0.5]),
        ({"models": BALANCE}, {"merge_method": "ties", "parameters": {"weight": 3}}, [None, None]),
        ({"models": BALANCE}, {"merge_method": "model_stock"}, [None, None]),
        ({"models": BALANCE}, "slerp", [None, None]),
        ({"models": [{"model": "sft", "parameters": {"weight": [0.0, 1.0]}}]}, "ties", [[0.0, 1.0], 1.0]),
        ({"models": NORMS}, "ties", [1.0, "equal_norm"]),
        ({"models": NORMS}, "linear", [0.5, 0.5]),
    ],
)
def test_the_arms_have_the_weights_of_the_recipes_merge_or_their_own(
    world: Path, tmp_path: Path, merge: dict[str, Any], method: object, weights: list[object]
) -> None:
    compare = {"sft": ["l1"], "methods": [method], "arms": ["parallel"]}
    made = planned(world, tmp_path, compare=compare, merge={"merge_method": "l1_ties", **merge})
    arm = next(s.job.recipe for s in made.steps if isinstance(s.job, Merge) and s.name.startswith("merge/parallel"))
    assert [model.get("parameters", {}).get("weight") for model in arm["models"]] == weights


def test_the_methods_of_a_comparison_are_the_papers_and_ours_by_default(world: Path, tmp_path: Path) -> None:
    made = planned(world, tmp_path, compare={"arms": ["parallel"], "sft": ["l1"]})
    names = ("slerp", "ties", "dare_ties", "task_arithmetic", "linear", "l1_ties", "sign_election")
    assert [arm.name for arm in made.planner.arms] == [*(f"parallel {name}" for name in names), "merged"]


def test_faults_of_sections_files_columns_and_merges_are_told_together(world: Path, tmp_path: Path) -> None:
    adapters = sections()["adapters"]
    adapters["sft"]["data"] = "pairs.jsonl"
    adapters["dpo"]["training"] = {"learning_rat": 1}
    merge = {**sections()["merge"], "merge_method": "l1_tis"}
    text = told(
        world, tmp_path, adapters=adapters, merge=merge, evaluate={"suit": "open-llm-v1"}, audit={"epsilon": -1}
    )
    for part in ("audit.epsilon", "evaluate.suit", "did you mean 'l1_ties'", "the columns are", "'learning_rate'"):
        assert part in text


def test_a_source_keeps_the_name_that_the_recipe_gives_it(world: Path, tmp_path: Path) -> None:
    other = world.parent / "other"
    other.mkdir(exist_ok=True)
    models = [{"model": "sft"}, {"model": "./other"}, {"model": f"other@main+{other}"}, {"model": "org/name"}]
    merge = {**sections()["merge"], "models": models}
    made = planned(world, tmp_path, merge=merge, seeds=[3, 4], compare={"arms": ["parallel"], "methods": ["ties"]})
    recipes = {s.name: s.job.recipe for s in made.steps if isinstance(s.job, Merge) and s.stage == "merge"}
    refs = [ModelRef.parse(one["model"]) for one in recipes["merge/seed-4/merged"]["models"]]
    assert [ref.label for ref in refs] == ["sft", "./other", f"other@main+{other}", None], "drops go by these"
    assert [ref.path for ref in refs] == [str(world.parent / "base"), str(other), str(other), "org/name"]
    names = labels(recipes["merge/seed-4/merged"])
    long = f"{world.parent / 'base'}+{tmp_path / 'run/seed-4/adapters/sft'}"
    assert _renamed(f"{long} is larger than {other}", names) == "sft is larger than ./other"
    for name in ("parallel-ties-dense", "parallel-ties-l1"):
        names = [one["model"]["label"] for one in recipes[f"merge/seed-3/{name}"]["models"]]
        assert names == ["sft", "dpo"], "the same drops for the dense twin, so that the two can be compared"
    assert {name: recipe["seed"] for name, recipe in recipes.items() if "merged" in name} == {
        "merge/seed-3/merged": 3, "merge/seed-4/merged": 4,
    }  # fmt: skip
    own = planned(world, tmp_path, merge={**sections()["merge"], "seed": 7}, seeds=[3, 4])
    assert [step.job.recipe["seed"] for step in own.steps if isinstance(step.job, Merge)] == [7, 7]


def test_a_comparison_runs_to_its_table(world: Path, tmp_path: Path) -> None:
    recipe = world.with_name("compare.yaml")
    data = {**sections(), "compare": {**COMPARE, "sft": ["l1"]}, "audit": None}
    data["evaluate"] = {"metrics": {key: data["evaluate"]["metrics"][key] for key in ("pairs", "text")}}
    recipe.write_text(yaml.safe_dump({k: v for k, v in data.items() if v}, sort_keys=False))
    done = run(recipe, tmp_path / "run")
    rows = {row.name: row for row in done.table.rows}
    assert list(rows) == [
        "base",
        "sft",
        "dpo",
        "sequential",
        "parallel ties",
        "parallel linear",
        "parallel slerp",
        "merged",
    ]
    assert "sparsity" not in rows["base"].cells
    assert all(0 <= row.cells["sparsity"].mean <= 1 for name, row in rows.items() if name != "base")
    assert len({row.cells["text"].mean for row in rows.values()}) > 5, "the arms are different models"
    text = (tmp_path / "run/table.md").read_text()
    assert text.startswith("| arm | pairs ↑ | text ↓ | sparsity |")
    assert (tmp_path / "run/table.csv").read_text().startswith("arm,group,pairs,pairs_spread,text")
    again = run(recipe, tmp_path / "run", overrides=["compare.methods=[ties, linear]"])
    assert again.done == ()
    assert "parallel slerp" not in (tmp_path / "run/table.md").read_text()
    swept = run(recipe, tmp_path / "run", overrides=["compare.methods=[ties]", "compare.weights=[0.5, 2]"])
    assert {name.split("/")[0] for name in swept.done} == {"merge", "evaluate"}, "nothing is trained again"
    points = [row for row in swept.table.rows if row.frontier]
    assert [(row.name, row.frontier, row.point) for row in points] == [
        (f"parallel ties weight={w}", "parallel ties", {"weight": w}) for w in (0.5, 2)
    ]
    assert points[0].cells["text"].mean != points[1].cells["text"].mean
    assert swept.table.frontier == ("pairs", "text")
    record = json.loads((tmp_path / "run/run.json").read_text())["steps"]
    costs = {row.name: row.cost for row in swept.table.rows}
    assert costs["base"] == {"train_seconds": (0.0,), "train_tokens": (0,), "merge_seconds": (0.0,)}
    tokens = {name: record[f"train/{name}"]["result"]["tokens"] for name in ("sft", "dpo", "after-sft/dpo")}
    assert costs["sft"]["train_tokens"] == (tokens["sft"],)
    assert (
        costs["parallel ties weight=2"]["train_tokens"]
        == costs["merged"]["train_tokens"]
        == (tokens["sft"] + tokens["dpo"],)
    )
    assert costs["sequential"]["train_tokens"] == (tokens["sft"] + tokens["after-sft/dpo"],)
    assert costs["sequential"]["train_seconds"] > costs["sft"]["train_seconds"] > (0.0,)
    assert costs["sequential"]["merge_seconds"] == (record["train/after-sft/base"]["seconds"],)
    # Everything is rebuilt from the run folder, and again the same.
    files = {path: path.read_bytes() for path in (tmp_path / "run").glob("table.*")}
    assert {path.suffix for path in files} == {".md", ".csv", ".json", ".html"}
    for path in files:
        path.unlink()
    assert run(recipe, tmp_path / "run", overrides=["compare.methods=[ties]", "compare.weights=[0.5, 2]"]).done == ()
    assert {path: path.read_bytes() for path in files} == files
    assert (tmp_path / "run/frontier.png").read_bytes().startswith(b"\x89PNG")
    one = json.loads((tmp_path / "run/evaluations/merged/text.json").read_text())["text"]
    mean = sum(loss * n for loss, n in zip(one["rows"], one["tokens"], strict=True)) / sum(one["tokens"])
    assert one["value"] == pytest.approx(math.exp(mean))


# --- the table --------------------------------------------------------------------------------------------------------


def table_of(rows: dict[str, tuple[str, float, float]], noise: float = 0.01) -> Table:
    """Arms with a skill (more is better) and a loss (less is better)."""
    made = tuple(
        Row(name, group, {"skill": Cell((skill,), noise), "loss": Cell((loss,), noise)})
        for name, (group, skill, loss) in rows.items()
    )
    return Table(("skill", "loss"), made, (), {"skill": 1, "loss": -1})


def test_the_table_says_which_merges_win_trade_and_lose() -> None:
    table = table_of({
        "sft": ("individual", 0.9, 3.0),
        "sequential": ("sequential", 0.7, 2.0),
        "parallel good": ("parallel", 0.8, 1.5),
        "parallel mixed": ("parallel", 0.9, 2.5),
        "parallel bad": ("parallel", 0.6, 2.0),
        "parallel same": ("parallel", 0.705, 2.005),
    })  # fmt: skip
    assert table.verdicts() == [
        table.verdicts()[0],
        "merges against sequential: better and nowhere worse: parallel good; not told apart: parallel same; "
        "worse and nowhere better: parallel bad; 1 of 4 better in one column and worse in another",
        "a difference counts where its 95 % interval, paired over items and seeds, excludes zero; of differences that are "
        "none, 1 in 20 does so by chance",
    ]
    assert re.fullmatch(
        r"sequential against sft: better in loss -1\.000 \(-1\.0\d\d to -0\.9\d\d\); "
        r"worse in skill -0\.200 \(-0\.2\d\d to -0\.1\d\d\)",
        table.verdicts()[0],
    )
    assert "none is better without being worse somewhere" in " ".join(
        table_of({"sequential": ("sequential", 0.7, 2.0), "parallel bad": ("parallel", 0.6, 2.0)}).verdicts()
    )


def test_the_terminal_breaks_names_and_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {column: Cell((-0.125, 0.25), 0.1) for column in ("skill", "happy", "pairs", "text", "sparsity")}
    rows = tuple(Row(f"parallel {name} (dense)", "parallel", cells) for name in ("task_arithmetic", "sign_election"))
    shown = Table(tuple(cells), rows, (0, 1), dict.fromkeys(cells, 1))
    for width, number in ((80, "0.062±0.265"), (120, "0.062 ± 0.265")):
        console = Console(width=width, file=io.StringIO())
        monkeypatch.setattr(run_tables, "terminal", lambda console=console, **_: console)
        run_tables.table(shown)
        text = console.file.getvalue()
        assert text.count(number) == 10, f"at {width} columns"
        assert all(len(line) <= width for line in text.splitlines()[:12])


def test_the_terminal_groups_the_points_of_frontiers_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {column: Cell((-0.125, 0.25), 0.1) for column in ("skill", "happy", "text")}
    cost = {"train_seconds": (1234.0, 1236.0), "train_tokens": (5_000_000, 5_000_000)}
    made = [Row("sequential (dense)", "sequential", cells, cost=cost)]
    for method in ("task_arithmetic", "sign_election", "l1_ties"):
        for at in range(13):
            frontier = f"parallel {method} (dense)"
            made.append(
                Row(f"{frontier} {at}", "parallel", cells, frontier, {"weight": at / 10, "density": 0.25}, cost)
            )
    shown = Table(tuple(cells), tuple(made), (0, 1), dict.fromkeys(cells, 1), ("skill", "happy"))
    texts = {}
    for width in (80, 140):
        console = Console(width=width, file=io.StringIO())
        monkeypatch.setattr(run_tables, "terminal", lambda console=console, **_: console)
        run_tables.table(shown)
        texts[width] = console.file.getvalue()
    table = texts[80].split("mean ±")[0].splitlines()
    assert all(len(line) <= 80 for line in table)
    assert len(table) < 1 + 39 + 3 * 2 + 8, "a line for each arm, and at most two for each name of a frontier"
    assert "parallel task_arithmetic" in texts[80]
    assert "◆ weight=0.3 density=0.25" in texts[80]
    assert "5M" not in texts[80]
    assert "1.24k" in texts[140]


def test_columns_that_do_not_fit_beside_the_names_follow_in_further_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [f"metric_{at}" for at in range(8)]
    cells = {column: Cell((-0.125, 0.25), 0.1) for column in columns}
    name = "parallel task_arithmetic (dense)"
    made = [Row(f"{name} {at}", "parallel", cells, name, {"weight": at}) for at in (0.6, 1)]
    shown = Table(
        tuple(columns), (Row("sequential (dense)", "sequential", cells), *made), (0, 1), dict.fromkeys(cells, 1)
    )
    console = Console(width=80, file=io.StringIO())
    monkeypatch.setattr(run_tables, "terminal", lambda **_: console)
    for several in (5, 8):
        console.file = io.StringIO()
        run_tables.table(replace(shown, columns=tuple(columns[:several])))
        text = console.file.getvalue()
        assert text.count("weight=0.6") == text.count("sequential (dense)  ") == 2
        assert text.count("0.062±0.265") == 3 * several
        assert all(f" {column} ↑" in text for column in columns[:several])


def test_a_cell_has_its_spread_over_seeds() -> None:
    cell = Cell((0.5, 0.7, 0.6), 0.03)
    assert str(cell) == "0.600 ± 0.100"
    assert str(Cell((0.5,))) == "0.500"
    alone = table_of({"a": ("base", 0.1, 0.2)})
    assert json.dumps(alone.to_json())
    assert "**" not in alone.to_markdown(), "a single row is not the best of anything"


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_reach_any_depth_and_lists() -> None:
    data: dict[str, Any] = {"a": {"b": [{"c": 1}]}}
    put(data, parse_key_path("a.b[0].c"), 2)
    put(data, parse_key_path("a.b.0.d"), 3)
    put(data, parse_key_path("a.new.deep"), 4)
    assert data == {"a": {"b": [{"c": 2, "d": 3}], "new": {"deep": 4}}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seeds", "has no '='"),
        ("adaptrs.sft.l1=1", "the recipe has no such section; did you mean 'adapters'?"),
        ("merge.models[7].model=x", "merge.models is a list of 2; give a number from 0 to 1"),
        ("base_model.x=1", "base_model is 'base'; it has no keys"),
        ("merge.seed=[", "the value is not valid YAML"),
        ("a..b=1", "is not a key path"),
    ],
)
def test_an_override_that_leads_nowhere_is_told(override: str, expected: str, world: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_run(world, [override])
    assert expected in str(caught.value)


def test_an_override_is_read_as_yaml(world: Path) -> None:
    read = load_run(world, ["adapters.sft.l1.strength=1e-3", "seeds=[1, 2]", "audit=false"])
    assert read.adapters["sft"].l1 is not None
    assert read.adapters["sft"].l1.strength == 1e-3
    assert read.seeds == (1, 2)
    assert read.audit is None


def test_the_run_recipe_of_the_readme_is_one(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (recipe,) = re.findall(r"```yaml\n(# paft run .*?)```", readme, re.DOTALL)
    (tmp_path / "r.yaml").write_text(recipe)
    made = Planner.plan(load_run(tmp_path / "r.yaml"), tmp_path / "run")
    assert {step.stage for step in made.steps.values()} == {"train", "merge", "evaluate"}


def test_the_recipe_of_a_run_is_kept_in_its_folder(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world.parent, tmp_path / "world")
    overrides = ["adapters=false", "merge=false", "audit=false", "evaluate.metrics.skill.max_rows=1"]
    run(tmp_path / "world/recipe.yaml", tmp_path / "run", overrides=overrides)
    kept = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert kept["evaluate"]["metrics"]["skill"]["max_rows"] == 1
    assert "merge" not in kept
    assert [row["arm"] for row in json.loads((tmp_path / "run/table.json").read_text())["rows"]] == ["base"]
