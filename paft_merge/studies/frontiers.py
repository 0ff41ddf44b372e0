"""A study's frontiers: models by two metrics, a third one as the shade, as SVG that needs no other package."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from paft_merge.auditing.report.svg import standalone
from paft_merge.output.report_files import write_file
from paft_merge.pipeline.comparisons import Cell, Row, TableData
from paft_merge.pipeline.paired_intervals import Interval
from paft_merge.pipeline.results_page import frontier_figure
from paft_merge.studies.pages import Results
from paft_merge.studies.seed_intervals import interval_of
from paft_merge.studies.study import Definition, FrontierSpec, Metric

_KIND = re.compile(r" \((dense|l1)\)$")
_POINT = re.compile(r" ([\w.-]+)=(\S+)")
"""A swept value in the name of an arm of `paft run`."""


class _Seeds(TableData):
    """Rows of a study, whose intervals are those over its seeds."""

    def interval(self, row: Row, column: str) -> Interval | None:
        """The 95 % interval of a mean by Student's t; None for too few seeds."""
        found = interval_of(row.cells[column].values)
        return Interval(found.mean, found.low, found.high) if found.known else None


def frontiers_of(definition: Definition, results: Results) -> list[FrontierSpec]:
    """The frontiers of a study: those of its definition, and the one that its recipe of `paft run` names.

    The latter has a picture for each setting and each variant of the skill adapter.
    """
    given = [spec for spec in definition.frontiers if spec.table in results.data["tables"]]
    return [*given, *_of_recipe(results)]


def _of_recipe(results: Results) -> Iterator[FrontierSpec]:
    """A frontier for each table of runs whose recipe has `compare: {frontier: [...]}`."""
    recipe: Any = results.data.get("parameters", {}).get("recipe") or {}
    axes: Sequence[str] = (recipe.get("compare") or {}).get("frontier") or ()
    for table, rows in results.data["tables"].items() if axes else ():
        kinds = dict.fromkeys(found[1] for name in rows if (found := _KIND.search(name)))
        for kind in kinds or ("",):
            lines: dict[str, dict[str, str]] = {}
            for name in rows:
                if name.endswith(f" ({kind})") or not _KIND.search(name):
                    line, label = _place(_KIND.sub("", name))
                    lines.setdefault(line, {})[label] = name
            lines = {
                line
                if len(points) > 1
                else _KIND.sub("", next(iter(points.values()))).removeprefix("parallel "): points
                for line, points in lines.items()
            }
            title = f"{table}, {kind}" if kind else table
            slug = re.sub(r"[^a-z0-9]+", "-", f"frontier-{title}".lower()).strip("-")
            x, y, *shade = axes
            yield FrontierSpec(
                name=slug, title=f"Frontiers: {title}", table=table, x=x, y=y, shade="".join(shade), lines=lines
            )


def _place(name: str) -> tuple[str, str]:
    """The line that an arm is a point of, and the label of the point; without swept values both are its name."""
    points = _POINT.findall(name)
    alone = _POINT.sub("", name).removeprefix("parallel ")
    if not points:
        return alone, alone
    return f"{alone}, {' and '.join(axis for axis, _ in points)}", ", ".join(value for _, value in points)


def draw_frontiers(definition: Definition, results: Results, folder: Path) -> list[tuple[str, str]]:
    """Draw every frontier into `folder`; returns the titles and the names of the files."""
    found = []
    for spec in frontiers_of(definition, results):
        table = _table(definition, spec, results)
        if (figure := frontier_figure(table)) is not None:
            name = f"{definition.study}-{spec.name}.svg"
            write_file(folder / name, standalone(replace(figure, title=spec.title)))
            found.append((spec.title, name))
    return found


def _table(definition: Definition, spec: FrontierSpec, results: Results) -> TableData:
    """The rows of a frontier as the table of a run."""
    metrics = {name: definition.metrics[name] for name in (spec.x, spec.y, spec.shade) if name}
    titles = {name: f"{one.title}{', %' * one.percent}" for name, one in metrics.items()}
    rows = []
    for line, points in spec.lines.items():
        for label, row in points.items():
            cells = {titles[name]: _cell(results, (spec.table, row), name, one) for name, one in metrics.items()
                     if results.has((spec.table, row), name)}  # fmt: skip
            several = len(points) > 1
            rows.append(
                Row(row if several else line, "", cells, line if several else "", {"": label} if several else {})
            )
    better = {titles[name]: {"higher": 1, "lower": -1, "neither": 0}[one.better] for name, one in metrics.items()}
    columns = tuple(titles.values())
    return _Seeds(columns, tuple(rows), tuple(results.data["seeds"]), better, columns)


def _cell(results: Results, cell: tuple[str, str], name: str, metric: Metric) -> Cell:
    return Cell(tuple(value * (100 if metric.percent else 1) for value in results.values(cell, name)))
