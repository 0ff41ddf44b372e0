"""A study's plots: lines with intervals, readable in black and white, as SVG."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from paft_merge.studies.pages import Results, label
from paft_merge.studies.study import Cell, Definition, PlotSpec

log = logging.getLogger(__name__)

MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLES = ("-", "--", ":", "-.")

_TICKS = 6
"""Values on a logarithmic axis that are all labelled."""

_LABEL = 1.8
"""Inches for an entry of the legend."""


def plots_of(definition: Definition, results: Results) -> list[PlotSpec]:
    """The plots of a study that have rows in its results."""
    return [spec for spec in definition.plots if any(results.has(cell, spec.metric) for cell in spec.cells())]


def draw(definition: Definition, results: Results, folder: Path) -> list[tuple[str, str]]:
    """Draw every plot into `folder`; returns their titles and the names of their files. Skipped without matplotlib."""
    if find_spec("matplotlib") is None:
        log.warning("no plots: matplotlib is not installed (pip install 'paft-merge[plots]')")
        return []
    import matplotlib

    found = []
    # Without a date and with a fixed salt, equal results give equal files.
    with matplotlib.rc_context({"svg.hashsalt": "paft", "svg.fonttype": "none", "text.parse_math": False}):
        for spec in plots_of(definition, results):
            name = f"{definition.study}-{spec.name}.svg"
            figure = _lines(definition, spec, results) if spec.x else _intervals(definition, spec, results)
            figure.savefig(folder / name, metadata={"Date": None, "Creator": None})
            found.append((spec.title, name))
    return found


def _panels(spec: PlotSpec, height: float) -> tuple[Any, Any]:
    """A figure with one panel for each table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(spec.tables) + 1.2, height), layout="constrained")
    panels = figure.subplots(1, len(spec.tables), sharey=True, squeeze=False)[0]
    for panel, table in zip(panels, spec.tables, strict=True):
        panel.set_title(table, fontsize="medium")
        panel.grid(alpha=0.3)
    return figure, panels


def _lines(definition: Definition, spec: PlotSpec, results: Results) -> Any:
    """The means of each line along x, and a vertical bar for the interval of each point."""
    from matplotlib.ticker import NullFormatter

    figure, panels = _panels(spec, 4.0)
    for panel, table in zip(panels, spec.tables, strict=True):
        for number, line in enumerate(spec.lines):
            points = _points(results, spec, {x: (table, spec.row_at(line, x)) for x in spec.x})
            colour, mark, style = f"C{number}", MARKS[number % len(MARKS)], STYLES[number % len(STYLES)]
            # A small shift keeps the bars of several lines apart.
            at = [x * 1.015**number if spec.log_x else x + 0.006 * number * (spec.x[-1] - spec.x[0]) for x in points]
            means, low, high = ([one[k] for one in points.values()] for k in range(3))
            text = label(definition, line)
            panel.plot(at, means, color=colour, marker=mark, linestyle=style, markersize=4, linewidth=1.2, label=text)
            if np.isfinite([*low, *high]).all():
                panel.vlines(at, low, high, color=colour, linewidth=1)
        panel.set_xlabel(spec.x_label)
        panel.set_xscale("log" if spec.log_x else "linear")
        panel.set_yscale("log" if spec.log_y else "linear")
        for axis in [panel.xaxis] * spec.log_x + [panel.yaxis] * spec.log_y:
            axis.set_major_formatter(
                lambda value, _: f"{value:g}"
            )  # matplotlib's own is a formula, which SVG shows as text
            axis.set_minor_formatter(NullFormatter())
        if spec.log_x and len(spec.x) <= _TICKS:
            panel.set_xticks(spec.x)
    panels[0].set_ylabel(definition.metrics[spec.metric].title)
    handles, columns = panels[0].get_legend_handles_labels(), int(figure.get_figwidth() / _LABEL)
    figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure


def _intervals(definition: Definition, spec: PlotSpec, results: Results) -> Any:
    """A dot and a bar for each row."""
    figure, panels = _panels(spec, 1.4 + 0.28 * len(spec.lines))
    for panel, table in zip(panels, spec.tables, strict=True):
        points = _points(results, spec, {float(at): (table, row) for at, row in enumerate(spec.lines)})
        means, low, high = ([one[k] for one in points.values()] for k in range(3))
        panel.plot(means, list(points), "ko", markersize=4)
        if np.isfinite([*low, *high]).all():
            panel.hlines(list(points), low, high, color="k", linewidth=1.2)
        panel.set_yticks(range(len(spec.lines)), [label(definition, row) for row in spec.lines])
        panel.set_xlabel(definition.metrics[spec.metric].title)
    panels[0].invert_yaxis()
    return figure


def _points(results: Results, spec: PlotSpec, cells: Mapping[float, Cell]) -> dict[float, tuple[float, float, float]]:
    """Mean, low and high end of the cells that are there, by their place on the axis."""
    found = {at: results.interval(cell, spec.metric) for at, cell in cells.items() if results.has(cell, spec.metric)}
    return {at: (one.mean, one.low, one.high) for at, one in found.items()}
