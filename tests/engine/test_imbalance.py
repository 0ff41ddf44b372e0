"""Sources of very different size are told of: before the merge where records tell it, after it where they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_state, save_adapter, save_checkpoint
from toys.merge import paft, write_recipe

import paft_merge
from paft_merge.engine.api import open_plan
from paft_merge.engine.imbalance import expected_weights
from paft_merge.errors import Problem


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """Two adapters whose deltas differ 25-fold: their factors do 5-fold."""
    state = random_state(0, torch.bfloat16)
    return {
        "base": save_checkpoint(tmp_path / "base", state),
        "sft": save_adapter(tmp_path / "sft", state, 3),
        "dpo": save_adapter(tmp_path / "dpo", state, 4, size=2e-3),
    }


def recipe(
    pair: dict[str, Path], weights: tuple[float | str, float | str] = (1.0, 1.0), method: str = "task_arithmetic"
) -> Any:
    models = [
        {"model": f"{pair['base']}+{pair[name]}", "parameters": {"weight": weight}}
        for name, weight in zip(("sft", "dpo"), weights, strict=True)
    ]
    return {"merge_method": method, "base_model": str(pair["base"]), "models": models}


def record(folder: Path, norm: float, entries: int = 1000, **more: Any) -> None:
    delta = {"norm": norm, "matrices": [{"name": "q", "entries": entries, "norm": norm}]}
    (folder / "paft_train.json").write_text(json.dumps({"format": 1, "delta": delta, **more}))


def merged(recipe: Any, out: Path) -> tuple[list[Problem], dict[str, Any], str]:
    told: list[Problem] = []
    paft_merge.merge(recipe, out, warn=told.extend)
    manifest = json.loads((out / "merge_manifest.json").read_text())
    return told, manifest, (out / "README.md").read_text()


def test_a_merge_of_deltas_of_very_different_size_tells_it_with_numbers(pair: dict[str, Path], tmp_path: Path) -> None:
    told, manifest, card = merged(recipe(pair), tmp_path / "out")
    (problem,) = (p for p in told if p.code == "SCALE")
    sizes = [row["weighted_l2"] / row["entries"] ** 0.5 for row in manifest["totals"]]
    fold = sizes[0] / sizes[1]
    assert 20 < fold < 30
    assert f"differs {fold:.0f}-fold" in problem.what
    assert f"sft {sizes[0]:.2g}, dpo {sizes[1]:.2g}): sft decides" in problem.what
    assert f"up to {fold:.0f} times" in problem.fix
    assert manifest["warnings"] == [str(problem)]
    assert str(problem) in card.replace("\\", "")  # Markdown escapes the asterisk


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_weights_that_make_up_for_it_are_taken_into_account(method: str, pair: dict[str, Path], tmp_path: Path) -> None:
    told, manifest, card = merged(recipe(pair, (0.04, 1.0), method), tmp_path / "out")
    assert [p for p in told if p.code == "SCALE"] == manifest["warnings"] == []
    assert "Note:" not in card


def test_the_records_of_training_tell_it_before_anything_is_written(pair: dict[str, Path], tmp_path: Path) -> None:
    record(pair["sft"], norm=15.0)
    record(pair["dpo"], norm=1.0)
    with open_plan(recipe(pair)) as plan:
        (problem,) = (p for p in plan.warnings if p.code == "SCALE")
        assert "differs 15-fold" in problem.what
    with open_plan(recipe(pair, (1.0, 4.0))) as plan:
        assert not [p for p in plan.warnings if p.code == "SCALE"]
    told, manifest, _ = merged(recipe(pair), tmp_path / "out")
    assert [p.code for p in told].count("SCALE") == 1
    assert len(manifest["warnings"]) == 1


def test_adapters_of_different_targets_are_compared_by_entry(pair: dict[str, Path]) -> None:
    record(pair["sft"], norm=10.0, entries=1_000_000)
    record(pair["dpo"], norm=1.0, entries=10_000)
    with open_plan(recipe(pair)) as plan:
        assert not [p for p in plan.warnings if p.code == "SCALE"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9}', '{"format": 1}', '{"format": 1, "delta": {"norm": 1}}'])
def test_a_record_that_cannot_be_read_is_told_and_left_aside(text: str, pair: dict[str, Path]) -> None:
    (pair["sft"] / "paft_train.json").write_text(text)
    with open_plan(recipe(pair)) as plan:
        assert [p.code for p in plan.warnings if p.code in ("SCALE", "TRAIN_RECORD")] == ["TRAIN_RECORD"]


def test_a_plan_shows_the_weights_that_records_lead_to_expect(pair: dict[str, Path], tmp_path: Path) -> None:
    asked = write_recipe(tmp_path / "r.yaml", recipe(pair, ("auto", "auto")))
    measured = "weights that follow from norms are measured by the merge"
    assert measured in " ".join(paft("merge", asked, "--dry-run").output.split())
    record(pair["sft"], norm=15.0)
    record(pair["dpo"], norm=1.0)
    with open_plan(asked) as plan:
        assert not [p for p in plan.warnings if p.code == "SCALE"]
        assert [*expected_weights(plan).values()] == [0.533333, 8.0]
    for shown in (paft("merge", asked, "--dry-run"), paft("explain", asked)):
        assert "weights of about sft 0.533, dpo 8, by the norms in the records" in " ".join(shown.output.split())
    shown = json.loads(paft("merge", asked, "--dry-run", "--json").stdout)["expected_weights"]
    assert [*shown.values()] == [0.533333, 8.0]
    with open_plan(recipe(pair, (1.0, "equal_norm"))) as plan:
        assert [*expected_weights(plan).values()] == [1.0, 15.0]
    with open_plan(recipe(pair)) as plan:
        assert expected_weights(plan) == {}
        (problem,) = (p for p in plan.warnings if p.code == "SCALE")
        assert "a sum (task_arithmetic) keeps both" in problem.fix
        assert "for an election give dpo more weight, or weight: equal_norm, up to 15 times" in problem.fix
    record(pair["sft"], norm=1e40)
    with open_plan(recipe(pair)) as plan:
        (problem,) = (p for p in plan.warnings if p.code == "SCALE")
        assert "differs 1e+40-fold" in problem.what
