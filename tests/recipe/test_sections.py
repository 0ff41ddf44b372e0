"""Sections of a recipe: renamed keys are accepted with one warning, and fingerprints keep the former names."""

from __future__ import annotations

from pathlib import Path

import pytest

from paft_merge.errors import RecipeError
from paft_merge.evaluating.schema import EvaluateSpec
from paft_merge.recipe import load_yaml
from paft_merge.recipe.sections import current_keys, former_keys, read_section
from paft_merge.training.schema import AdapterSpec, read_adapters

FORMER = """
adapters:
  sft:
    objective: sft
    data:
      - {path: x, take: 3, rename: {take: prompt, max_rows: completion}}
    l1: {on: product}
"""


def test_former_keys_are_read_with_one_warning_each_that_names_the_line_and_the_present_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(FORMER)
    for _ in range(2):
        spec = read_adapters(load_yaml(path))["sft"]
    assert spec.l1 is not None
    assert (spec.l1.penalize, spec.data[0].max_rows) == ("product", 3)
    assert spec.data[0].rename == {"take": "prompt", "max_rows": "completion"}  # columns of the data, not keys
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}:6: adapters.sft.data[0].take: the key `take` was renamed; write `max_rows`",
        f"{path}:7: adapters.sft.l1.on: the key `on` was renamed; write `penalize`",
    ]


def test_a_metric_may_be_called_like_a_former_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("metrics: {take: {kind: perplexity, data: x, by: line, take: 2}}\n")
    measurement = read_section(EvaluateSpec, load_yaml(path)).metrics["take"]
    assert (measurement.unit, measurement.max_rows) == ("line", 2)


def test_a_fingerprint_sees_the_former_keys_whichever_are_written(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(FORMER)
    former = load_yaml(path).data["adapters"]["sft"]
    present = current_keys(AdapterSpec, former)
    assert present["l1"] == {"penalize": "product"}
    assert former_keys(AdapterSpec, present) == former_keys(AdapterSpec, former) == former


def test_a_key_with_both_of_its_names_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("metrics: {a: {kind: perplexity, data: x, by: line, unit: text}}\n")
    with pytest.raises(RecipeError, match="by: the former name of `unit`, which is given too; remove it"):
        read_section(EvaluateSpec, load_yaml(path))
