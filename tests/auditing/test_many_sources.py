"""An audit of many sources stays readable: figures and tables of all sources together, and the pairs that matter most."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import random_state, save_adapter, save_checkpoint

from paft_merge.auditing import Audit, audit
from paft_merge.auditing.report.figures import (
    MANY,
    MOST_ALIKE,
    MOST_PAIRS,
    Chart,
    Heat,
    figures_of,
    shown_advice,
    shown_pairs,
)
from paft_merge.auditing.report.html import page
from paft_merge.cli import cli


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and 12 adapters; `a11` is the opposite of `a3`."""
    place = tmp_path_factory.mktemp("many")
    state = random_state(0, torch.bfloat16, layers=2)
    save_checkpoint(place / "base", state)
    for i in range(11):
        save_adapter(place / f"a{i}", state, 10 + i, rank=2, alpha=2)
    save_adapter(place / "a11", state, 13, rank=2, alpha=-2)
    return place


def audit_of(place: Path, count: int) -> Audit:
    return audit(*(place / f"a{i}" for i in range(12 - count, 12)), base=place / "base")


def test_few_sources_are_shown_one_by_one(place: Path) -> None:
    found = audit_of(place, 3)
    names = [figure.name for figure in figures_of(found)]
    assert {"sparsity_map_0", "sparsity_map_2", "conflict_0", "conflict_2"} < set(names)
    assert shown_pairs(found) == (found.pairs, "")
    assert shown_advice(found, found.advice) == (found.advice, "")


def test_figures_of_many_sources_are_one_map_each(place: Path) -> None:
    found = audit_of(place, 12)
    figures = {figure.name: figure for figure in figures_of(found)}
    assert not [name for name in figures if name.startswith(("conflict_", "sparsity_map_"))]
    conflicts, sparsity = figures["conflicts"], figures["sparsity_by_layer"]
    assert isinstance(conflicts, Heat)
    assert isinstance(sparsity, Heat)
    for pair in found.pairs:
        a, b = (conflicts.rows.index(name) for name in (pair.left, pair.right))
        assert conflicts.values[a][b] == conflicts.values[b][a] == pair.total.conflict_weighted
    assert all(conflicts.values[i][i] is None for i in range(12))
    for source, row in zip(found.sources, sparsity.values, strict=True):
        assert row == tuple(group.measure.sparsity(found.epsilon) for group in source.layers.values())
    kept = figures["preview"]
    assert isinstance(kept, Heat)
    assert found.preview is not None
    first = [t for t in found.preview.tensors if t.layer == 0]
    assert kept.values[3][0] == found.preview.of("a3", first).elected_energy
    assert isinstance(figures["sparsity_by_module"], Heat)
    assert not [line for figure in figures.values() if isinstance(figure, Chart) for line in figure.lines if line.label]


@pytest.mark.parametrize("count", [MANY, MANY + 1])
def test_the_page_of_many_sources_has_a_row_for_each_and_no_cards(place: Path, count: int) -> None:
    text = page(audit_of(place, count))
    few = count == MANY
    assert ('<div class="card">' in text) == few
    assert (text.count("<details") == 2 * count) == few
    assert few or text.count("<td>a11</td>") == 2, "a row of the sources, and one of the numbers"


def test_tables_of_many_sources_show_the_pairs_whose_signs_differ_most(place: Path) -> None:
    found = audit_of(place, 12)
    pairs, about = shown_pairs(found)
    assert (len(found.pairs), len(pairs)) == (66, MOST_PAIRS)
    assert (pairs[0].left, pairs[0].right, pairs[0].total.conflict) == ("a3", "a11", 1.0)
    assert min(p.total.conflict_weighted for p in pairs) >= sorted(p.total.conflict_weighted for p in found.pairs)[-MOST_PAIRS]  # fmt: skip
    others = [replace(one, metric=f"m{i}", level="info") for i, one in enumerate(found.advice)]
    first = replace(others[-1], level="warn")
    assert shown_advice(found, [*others[:-1], first])[0] == [first, *others[: MOST_PAIRS - 1]]
    advice, further = shown_advice(found, found.advice)
    told = Counter(one.metric for one in found.advice)
    assert Counter(one.metric for one in advice) == {metric: min(count, MOST_ALIKE) for metric, count in told.items()}
    assert further.startswith(f"{len(found.advice) - len(advice)} further")
    page = found.to_html()
    assert about in page
    assert further in page
    assert page.count("Every source; by kind of module and by layer") == 1
    assert len(found.to_json()["pairs"]) == 66


def test_the_command_prints_no_table_for_each_of_many_sources(place: Path) -> None:
    for count in (MANY, MANY + 1):
        given = [str(place / f"a{i}") for i in range(count)]
        done = CliRunner().invoke(cli, ["audit", *given, "--base", str(place / "base")])
        assert done.exit_code == 0, done.output
        assert ("a0, by kind of module" in done.output) == (count == MANY)
        assert ("exactly zero" in done.output) == (count == MANY), "a column for each of a few sources"
        assert bool(re.search(r"^ a8 +\d", done.output, re.MULTILINE)) == (count > MANY), "a row for each of many"
        assert ("pairs whose signs differ most" in done.output) == (count > MANY)
