"""Sweeps of a comparison: their points, the recipes of these, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from toys.run import sections

from paft_merge.errors import PaftMergeError, Problems
from paft_merge.pipeline import load_run
from paft_merge.pipeline.arms import ComparedMerge, check_compare, merges_of
from paft_merge.pipeline.preflight import check_merge
from paft_merge.pipeline.steps import Planner


def recipe_of(folder: Path, compare: dict[str, Any], **changes: Any) -> Any:
    """The toy's recipe with a comparison."""
    file = folder / "recipe.yaml"
    file.write_text(
        yaml.safe_dump({**sections(), "compare": {"arms": ["parallel"], **compare}, **changes}, sort_keys=False)
    )
    return load_run(file)


def merges(folder: Path, compare: dict[str, Any], **changes: Any) -> dict[str, ComparedMerge]:
    """The merges of that comparison, which has no fault, by name."""
    recipe, problems = recipe_of(folder, compare, **changes), Problems()
    check_compare(recipe, problems)
    assert problems.found == []
    return {merge.name: merge for merge in merges_of(recipe)}


def weights(merge: ComparedMerge) -> dict[str, Any]:
    """The weights of a merge by adapter."""
    return {m["model"]: m.get("parameters", {}).get("weight") for m in merge.written["models"]}


ALONE = {"merge_method": "ties", "models": [{"model": "sft"}, {"model": "dpo"}]}
"""A merge that gives no weights."""


def test_weights_are_those_of_the_preference_adapter_in_every_method_that_has_some(tmp_path: Path) -> None:
    own = {"merge_method": "ties", "name": "fixed", "parameters": {"weight": 0.7}}
    compare = {"weights": [0.6, 1], "methods": ["ties", "slerp", "linear", "model_stock", own]}
    found = merges(tmp_path, compare, merge=ALONE)
    assert list(found) == [
        "ties weight=0.6", "ties weight=1", "slerp", "linear weight=0.6", "linear weight=1", "model_stock", "fixed",
    ]  # fmt: skip
    assert weights(found["ties weight=0.6"]) == weights(found["linear weight=0.6"]) == {"sft": 1.0, "dpo": 0.6}
    assert found["ties weight=0.6"].written["parameters"] == {"density": 0.5}, "as the plain name"
    assert [(m.frontier, m.point) for m in found.values()][:3] == [
        ("ties", {"weight": 0.6}), ("ties", {"weight": 1}), ("", {}),
    ]  # fmt: skip
    assert weights(merges(tmp_path, compare)["ties weight=1"]) == {"sft": 1.0, "dpo": 1.0}, "sft's of the own merge"


def test_a_grid_of_weights_has_every_combination(tmp_path: Path) -> None:
    found = merges(tmp_path, {"weights": {"dpo": [0.5, 1.5], "sft": [1, 0.8]}, "methods": ["task_arithmetic"]})
    assert list(found) == [f"task_arithmetic dpo={d} sft={s}" for d in (0.5, 1.5) for s in (1, 0.8)]
    assert weights(found["task_arithmetic dpo=1.5 sft=0.8"]) == {"sft": 0.8, "dpo": 1.5}


def test_a_method_sweeps_its_own_parameters(tmp_path: Path) -> None:
    methods = [
        {"name": "mine", "merge_method": "ties", "sweep": {"weight": [0.6], "density": [0.2, [0.2, 0.8]]}},
        {"merge_method": "slerp", "sweep": {"t": [0.3, 0.7]}},
        {"merge_method": "l1_ties", "sweep": {"trim.l1_mass": [0.9, 1.0], "rescale": ["l1", "none"]}},
        {"merge_method": "della", "parameters": {"density": 0.4}, "sweep": {"weight": {"sft": [0.5]}}},
    ]
    found = merges(tmp_path, {"weights": [9.0], "methods": methods}, merge=ALONE)
    assert list(found) == [
        "mine weight=0.6 density=0.2", "mine weight=0.6 density=[0.2, 0.8]", "slerp t=0.3", "slerp t=0.7",
        *(f"l1_ties weight=9 trim.l1_mass={m} rescale={r}" for m in (0.9, 1) for r in ("l1", "none")), "della sft=0.5",
    ]  # fmt: skip
    assert found["slerp t=0.7"].written["parameters"] == {"t": 0.7}
    assert found["l1_ties weight=9 trim.l1_mass=0.9 rescale=l1"].written["parameters"] == {
        "trim": {"l1_mass": 0.9}, "rescale": "l1",
    }  # fmt: skip
    assert found["della sft=0.5"].written["parameters"] == {"density": 0.4}
    assert weights(found["della sft=0.5"]) == {"sft": 0.5, "dpo": 1.0}
    assert all("sweep" not in merge.written for merge in found.values())


def test_points_are_arms_of_one_frontier_for_each_kind_of_skill_adapter(tmp_path: Path) -> None:
    planner = Planner.plan(recipe_of(tmp_path, {"weights": [0.5, 2], "methods": ["ties"]}), tmp_path / "run")
    assert [(arm.name, arm.frontier, arm.point) for arm in planner.arms if arm.group == "parallel"] == [
        (f"parallel ties weight={w} ({kind})", f"parallel ties ({kind})", {"weight": w})
        for kind in ("dense", "l1") for w in (0.5, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("compare", "expected"),
    [
        ({"weights": []}, "compare.weights"),
        ({"weights": [0.5, 0.50]}, "the same value twice"),
        ({"weights": [float("nan")]}, "not finite"),
        ({"weights": {"dop": [1.0]}}, "no adapter 'dop' is merged; did you mean 'dpo'?"),
        ({"weights": [0.5], "methods": ["slerp", "model_stock"]}, "none of the methods takes these weights"),
        ({"methods": [{"merge_method": "slerp", "sweep": {"weight": [1.0]}}]}, "slerp has no weights"),
        ({"methods": [{"merge_method": "ties", "sweep": {}}]}, "a sweep is a mapping of lists"),
        (
            {"methods": [{"merge_method": "ties", "sweep": {"density": 0.5}}]},
            "density is not a list of values, got 0.5",
        ),
        ({"methods": [{"merge_method": "ties", "sweep": {"weight": ["a"]}}]}, "must be numbers"),
        ({"methods": [{"merge_method": "ties", "sweep": {"weight": {}}}]}, "names no values"),
        ({"methods": [{"merge_method": "ties", "sweep": {"a..b": [1]}}]}, "is not the key path of a parameter"),
        ({"methods": [{"merge_method": "ties", "parameters": 3, "sweep": {"density": [1]}}]}, "it has no keys"),
        ({"methods": [{"merge_method": "ties", "sweep": {k: list(range(11)) for k in "abc"}}]}, "at most 1000 points"),
        ({"methods": [{"merge_method": "ties", "slices": [], "sweep": {"weight": [1]}}]}, "inside slices"),
        ({"methods": [{**ALONE, "models": ["sft", "dpo"], "sweep": {"weight": [1]}}]}, "write {model: dpo}"),
        ({"frontier": ["skill"]}, "two evaluations as axes"),
        ({"frontier": ["skill", "pairs", "words", "text"]}, "optionally, one as the shade; got 4"),
        ({"frontier": ["skill", "skill"]}, "must differ"),
        ({"frontier": ["skill", "txt"]}, "no evaluation 'txt'; did you mean 'text'?"),
    ],
)
def test_a_sweep_that_cannot_be_made_is_refused(compare: dict[str, Any], expected: str, tmp_path: Path) -> None:
    problems = Problems()
    with problems.catching():
        check_compare(recipe_of(tmp_path, compare), problems)
    assert expected in "\n".join(map(str, problems.found))


def test_a_list_of_weights_needs_a_preference_adapter(tmp_path: Path) -> None:
    there = {"sft": "a", "dpo": "b"}
    problems, recipe = Problems(), recipe_of(tmp_path, {"weights": [0.5], "methods": ["ties"]}, adapters=there)
    check_compare(recipe, problems)
    assert [problem.fix for problem in problems.found] == ["name it with preference:, or write {dpo: [...]}"]
    named = merges(tmp_path, {"weights": [0.5], "methods": ["ties"], "preference": "dpo"}, adapters=there)
    assert list(named) == ["ties weight=0.5"]
    with pytest.raises(PaftMergeError, match="weights"):
        recipe_of(tmp_path, {"weights": "0.5"})


def test_a_point_whose_weights_cannot_be_used_together_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    recipe, problems = recipe_of(tmp_path, {"weights": [-1.0, 1.0], "methods": ["linear"]}, merge=ALONE), Problems()
    for merge in merges_of(recipe):
        check_merge(recipe, merge.written, merge.steps, problems)
    [problem] = problems.found
    assert (problem.code, problem.what) == ("PARAM_RANGE", "the weights add up to zero, so they cannot be normalized")
    assert "compare.methods[0]" in problem.where
