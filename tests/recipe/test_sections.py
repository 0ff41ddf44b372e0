"""Sections of a recipe: errors in plain English; renamed keys are accepted with one warning, and fingerprints keep the former names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BeforeValidator, Field

from paft_merge.errors import RecipeError
from paft_merge.evaluating.schema import EvaluateSpec
from paft_merge.recipe import Located, load_yaml
from paft_merge.recipe.sections import Section, as_list, current_keys, fields_at, former_keys, read_section
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


class Rows(Section):
    path: str
    take: Annotated[int, Field(ge=1)] | None = None


class Shape(Section):
    rank: int = 16


class Root(Section):
    kind: Literal["sft", "dpo"]
    rows: Annotated[list[Rows], BeforeValidator(as_list)]
    shape: Shape = Shape()
    targets: str | list[str] = "all"
    named: dict[str, Rows] = Field(default_factory=dict)
    lam: Annotated[float, Field(alias="lambda", le=1)] = 0.5


GOOD: dict[str, Any] = {"kind": "sft", "rows": {"path": "a"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sfd"}, "kind: must be one of sft, dpo, got 'sfd'; did you mean 'sft'?"),
        ({"rows": 5}, "rows: must be a list, got 5; begin every item with '- '"),
        ({"rows": [5]}, "rows[0]: must be a mapping, got 5; write {path: ...}"),
        ({"rows": {"path": "a", "tkae": 1}}, "rows.tkae: unknown key; did you mean 'take'?"),
        ({"rows": [{"take": 0}]}, "rows[0].path: missing; add path: ...\nrows[0].take: must be at least 1, got 0"),
        ({"shape": 3}, "shape: must be a mapping, got 3; write {rank: ...}"),
        ({"targets": 3}, "targets: must be text or a list, got 3"),
        ({"targets": ["q", 3]}, "targets[1]: must be text, got 3; quote it"),
        ({"named": {"kind": {"path": 1}}}, "named.kind.path: must be text, got 1; quote it"),
        ({"named": {"x": {"path": "a", "z": 1}}}, "named.x.z: unknown key; known: path, take"),
        ({"lambda": 2}, "lambda: must be at most 1, got 2"),
        ({"zzzzz": 2}, "zzzzz: unknown key; known: kind, lambda, named, rows, shape, targets"),
    ],
)
def test_an_error_says_where_it_is_what_is_wrong_and_how_to_fix_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_section(Root, Located({**GOOD, **change}))
    assert str(caught.value) == message


def test_an_empty_section_lacks_its_required_keys() -> None:
    with pytest.raises(RecipeError) as caught:
        read_section(Root, Located(None))
    assert str(caught.value) == "kind: missing; add kind: ...\nrows: missing; add rows: ..."


def test_the_keys_of_a_section_are_found_by_its_key_path() -> None:
    assert fields_at(Root, ("rows", 0)) == fields_at(Root, ("rows",)) == ["path", "take"]
    assert fields_at(Root, ("named", "shape")) == ["path", "take"]
    assert fields_at(Root, ("targets",)) == []
