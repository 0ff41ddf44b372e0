"""A study's page: tables and sentences, made from its results and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from paft_merge.studies.seed_intervals import LEAST, Interval, interval_of
from paft_merge.studies.study import Cell, Definition, Metric, Study, TableSpec


@dataclass(frozen=True)
class Results:
    """The content of `results.json`."""

    data: Mapping[str, Any]

    def has(self, cell: Cell, metric: str) -> bool:
        """Whether there is such a row and it has the metric; overrides of the parameters may leave rows out."""
        return metric in self.data["tables"].get(cell[0], {}).get(cell[1], {})

    def values(self, cell: Cell, metric: str) -> list[float]:
        """The values of a row, one for each seed."""
        table, row = cell
        found: list[float] = self.data["tables"][table][row][metric]
        return found

    def interval(self, cell: Cell, metric: str) -> Interval:
        """The mean of a row over the seeds."""
        return interval_of(self.values(cell, metric))


def number(value: float, metric: Metric) -> str:
    """A value with the digits of its metric."""
    return f"{value * 100:.{metric.digits}f} %" if metric.percent else f"{value:.{metric.digits}f}"


def label(definition: Definition, row: str) -> str:
    """The name of a row on the page."""
    return definition.labels.get(row, row)


def table(definition: Definition, spec: TableSpec, results: Results) -> str:
    """A table in Markdown: the mean over seeds and the half width of its interval; one column for each table and metric."""
    rows = [*_rows(spec, results)]
    columns = [
        (one, name)
        for one in spec.tables
        for name in spec.metrics
        if any(results.has((one, row), name) for row in rows)
    ]
    heads = [
        ", ".join(part for part in (one if len(spec.tables) > 1 else "", definition.metrics[name].title) if part)
        for one, name in columns
    ]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        if not any(results.has((one, row), name) for one, name in columns):
            continue
        cells = [_cell(definition, results, one, row, name) for one, name in columns]
        lines.append(f"| {label(definition, row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows(spec: TableSpec, results: Results) -> Iterable[str]:
    """The rows of a table; without a list, all that its first table has."""
    return spec.rows or results.data["tables"].get(spec.tables[0], {})


def _cell(definition: Definition, results: Results, table: str, row: str, name: str) -> str:
    if not results.has((table, row), name):
        return ""
    found, metric = results.interval((table, row), name), definition.metrics[name]
    spread = f" ± {number(found.half, metric)}" if found.known else ""
    return f"{number(found.mean, metric)}{spread}"


def claims(definition: Definition, results: Results) -> list[list[str]]:
    """The claims and the verdicts on each: a claim holds, or the opposite does, only where an interval excludes zero."""
    found, more = [], _other_tables(definition, results)
    for claim in definition.claims:
        metric = definition.metrics[claim.metric]
        lines = [f"**{claim.says}** ({metric.title}). {claim.note}".rstrip()]
        of_tables = all(table == "{each}" for table, _ in (*claim.plus, *claim.minus))
        for each in [*claim.each, *(more if of_tables else [])]:
            plus, minus = claim.cells("plus", each), claim.cells("minus", each)
            if all(results.has(cell, claim.metric) for cell in (*plus, *minus)):
                verdict = _verdict(metric, *([results.values(c, claim.metric) for c in side] for side in (plus, minus)))
                lines.append(f"{label(definition, each)}: {verdict}" if each else verdict)
        found += [lines] if len(lines) > 1 else []
    return found


def _other_tables(definition: Definition, results: Results) -> list[str]:
    """The tables of the results that the definition does not name: those of parameters of the user."""
    named = {table for spec in definition.tables for table in spec.tables}
    return [table for table in results.data["tables"] if table not in named]


def _verdict(metric: Metric, plus: Sequence[Sequence[float]], minus: Sequence[Sequence[float]]) -> str:
    """A verdict, the means, and the difference with its interval, paired within each seed; a row of values for each cell."""
    found = np.sum(plus, axis=0) - np.sum(minus, axis=0)
    rounding = 1e-12 * np.abs([*plus, *minus]).max()
    difference = interval_of(np.where(np.abs(found) <= rounding, 0.0, found).tolist())
    means = [float(np.mean(values)) for values in (*plus, *minus)]
    if len(means) == 2:
        shown = f"{number(means[0], metric)} against {number(means[1], metric)}"
    else:
        first, second = means[0] - means[2], means[3] - means[1]
        shown = f"a change of {_signed(first, metric)} against one of {_signed(second, metric)}"
    shown += f", difference {_signed(difference.mean, metric)}"
    if not difference.known:
        return f"**fewer than {LEAST} seeds show nothing**; {shown}"
    if difference.mean and difference.half <= rounding:
        return f"**the same in every seed, which gives no interval**; {shown}"
    bounds = f"{_signed(difference.low, metric)} to {_signed(difference.high, metric)}"
    return f"**{difference.verdict(metric.better)}**; {shown}, 95 % interval {bounds}"


def _signed(value: float, metric: Metric) -> str:
    """A difference; that of two percentages is in points."""
    return f"{'+' if value > 0 else ''}{number(value, metric).replace(' %', ' points')}"


Pictures: TypeAlias = Sequence[tuple[str, str]]
"""Titles and names of files."""


def body(definition: Definition, results: Results, plots: Pictures = (), frontiers: Pictures = ()) -> str:
    """The part of the page that is made from the results; frontiers come first, plots last."""
    count, versions = len(results.data["seeds"]), results.data["versions"]
    found = claims(definition, results)
    head = f"{count} seed{'s' * (count != 1)}, {results.data['seconds']:.0f} s of processor time, torch {versions['torch']}."
    if results.data["smoke"]:
        head += " This is the smoke form, which is too small to show anything."
    rules = (
        "The ± of a number is half the width of the 95 % interval over seeds, by Student's t. A claim holds, or the opposite of it, "
        "only where the interval of the difference within a seed excludes zero; of "
        f"{sum(len(one) - 1 for one in found)} such verdicts about one in twenty would by chance, if nothing differed."
    )
    few = f"Fewer than {LEAST} seeds have no interval, so nothing here is a finding."
    parts = [f"{head} {rules if count >= LEAST else few}"]
    if frontiers:
        parts += ["### Frontiers", _FRONTIER, *(f"![{title}]({file})" for title, file in frontiers)]
    parts += ["### Claims"] * bool(found)
    for says, *verdicts in found:
        parts.append("\n".join([says, "", *(f"- {one}" for one in verdicts)]))
    others = [
        TableSpec(title=name, tables=[name], metrics=[*definition.metrics])
        for name in _other_tables(definition, results)
    ]
    for spec in (*definition.tables, *others):
        if any(
            results.has((one, row), name)
            for one in spec.tables
            for row in _rows(spec, results)
            for name in spec.metrics
        ):
            parts += [f"### {spec.title}", table(definition, spec, results)]
    parts += [f"![{title}]({file})" for title, file in plots]
    return "\n\n".join(parts)


_FRONTIER = (
    "Each mark is a model; the points of a sweep are joined, and the shade is the third number. Whiskers are intervals over seeds, from 3 on. "
    "A ring: no other model has better means on both axes."
)


def write_page(path: Path, study: Study, results: Results, plots: Pictures, frontiers: Pictures) -> None:
    """Write the page of a run."""
    definition = study.definition
    text = (
        f"# {definition.title}\n\nClaims of {definition.claim_of}.\n\n{body(definition, results, plots, frontiers)}\n"
    )
    path.write_text(text, encoding="utf-8")
