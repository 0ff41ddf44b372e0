"""The table of a run as a page of HTML, with the picture of its frontiers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paft_merge.auditing.report.figures import Scatter, Spot
from paft_merge.auditing.report.html import rendered
from paft_merge.auditing.report.png import can_draw, drawn
from paft_merge.auditing.report.svg import draw
from paft_merge.output.report_files import write_file
from paft_merge.pipeline.comparisons import Row, TableData

log = logging.getLogger(__name__)

ARROWS = {1: " ↑", -1: " ↓", 0: ""}
PICTURE = "frontier.png"


def page(table: TableData, *, whole: bool = True) -> str:
    """The table, its sentences, the picture and all differences as one self-contained page; or a part for a notebook."""
    figure = frontier_figure(table)
    columns = [f"{column}{ARROWS[table.better[column]]}" for column in table.columns]
    costs = table.shown_costs()
    differences = {
        rival: ([d.column for d in next(iter(found.values()))], found)
        for rival, found in table.against.items()
        if found
    }
    return rendered(
        "pipeline/table.html.j2", whole=whole, table=table, columns=columns, costs=costs, figure=figure, arrows=ARROWS,
        picture=draw(figure) if figure else "", differences=differences,
    )  # fmt: skip


def write_picture(table: TableData, folder: Path) -> None:
    """Write `frontier.png`, if the table has frontiers and the extra `plots` is installed; else remove an old one."""
    figure, place = frontier_figure(table), folder / PICTURE
    if figure is not None and can_draw():
        write_file(place, drawn(figure))
        return
    place.unlink(missing_ok=True)
    if figure is not None:
        log.warning("no %s: resvg_py or matplotlib is not installed (pip install 'paft-merge[plots]')", PICTURE)


def frontier_figure(table: TableData) -> Scatter | None:
    """Every arm by the two metrics of the frontier, with 95 % intervals; the third metric is the shade."""
    if not table.frontier or any(column not in table.columns for column in table.frontier):
        return None
    x, y, *third = table.frontier
    rows = [row for row in table.rows if x in row.cells and y in row.cells]
    if not rows:
        return None
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(row.frontier or row.name, []).append(row)
    series = dict(sorted(series.items(), key=lambda one: not one[1][0].frontier))  # these need the most different marks
    shades = {row.name: row.cells[column].mean for column in third for row in rows if column in row.cells}
    low, high = _inner_range(list(shades.values()))
    # The best value has the darkest shade.
    weak, strong = (high, low) if third and table.better[third[0]] < 0 else (low, high)

    def spot(row: Row) -> Spot:
        means = {column: row.cells[column].mean for column in table.frontier if column in row.cells}
        across, up = table.interval(row, x), table.interval(row, y)
        share = None
        if row.name in shades and strong != weak:
            share = min(max((shades[row.name] - weak) / (strong - weak), 0.0), 1.0)
        text = ", ".join(f"{column} {mean:.3f}" for column, mean in means.items())
        label = ", ".join(map(str, row.point.values())) or row.name
        return Spot(
            label, f"{row.name}: {text}", means[x], means[y], (across.low, across.high) if across else None,
            (up.low, up.high) if up else None, share, row.name in table.pareto,
        )  # fmt: skip

    beyond = {
        end: any((value - end) * (end - other) > 0 for value in shades.values())
        for end, other in ((weak, strong), (strong, weak))
    }
    ends = (
        (f"{weak:.3g}{' or worse' * beyond[weak]}", f"{strong:.3g}{' or better' * beyond[strong]}")
        if len(set(shades.values())) > 1
        else ("", "")
    )
    caption = (
        f"Arms by {x} and {y}, means over seeds with 95 % intervals; the points of a sweep are joined. A ring: no arm has "
        "better means in both."
    )
    return Scatter(
        "frontier", f"{y} against {x}", caption, f"{x}{ARROWS[table.better[x]]}", f"{y}{ARROWS[table.better[y]]}",
        tuple((name if mine[0].frontier else "", tuple(map(spot, mine))) for name, mine in series.items()),
        third[0] + ARROWS[table.better[third[0]]] if ends[0] else "", ends,
    )  # fmt: skip


def _inner_range(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest value that are not outliers: within 1.5 interquartile ranges of the quartiles (Tukey's fences)."""
    if not values:
        return 0.0, 0.0
    first, third = np.quantile(values, (0.25, 0.75))
    fence = 1.5 * (third - first)
    inner = [value for value in values if first - fence <= value <= third + fence]
    return min(inner), max(inner)
