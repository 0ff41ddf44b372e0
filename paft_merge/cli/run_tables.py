"""The tables of runs and evaluations in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.table import Table as RichTable

from paft_merge.cli.plan_tables import terminal
from paft_merge.cli.terminal import plain

if TYPE_CHECKING:
    from paft_merge.evaluating.light import Score
    from paft_merge.pipeline import Planned
    from paft_merge.pipeline.comparisons import Row
    from paft_merge.pipeline.results_table import Table as Results

_ARROWS = {1: " ↑", -1: " ↓", 0: ""}


def table(results: Results) -> None:
    """Print the table of a run, the best of each column in bold, and its sentences. Only names are broken into lines.

    The points of a frontier are below its name. Columns that do not fit beside the names follow in further tables, and costs are
    shown where they fit.
    """
    out = terminal(highlight=False)
    heads = {column: cell_len(_heading(results, column)) for column in results.columns}
    widths = {
        column: max([head, *(len(str(row.cells.get(column, ""))) for row in results.rows)])
        for column, head in heads.items()
    }
    labels = [_indented(row) for row in results.rows if row.frontier]
    names = [f"◆ {row.name}" for row in results.rows if not row.frontier]
    needed = max(map(cell_len, (*names, *labels)), default=0) + sum(widths.values()) + 3 * len(widths) + 6
    costs, tight = results.shown_costs(), needed > out.width
    if needed + sum(len(heading) + 3 for heading in costs) > out.width:
        costs = {}
    parts = [list(results.columns)]
    if tight:
        words = [word for row in results.rows for word in (row.frontier or row.name).split()]
        room = out.width - min(max(map(cell_len, (*words, *labels))), out.width // 2) - 5
        parts = _parts({column: max(width - _SAVED, heads[column]) + 2 for column, width in widths.items()}, room)
    for part in parts:
        out.print(_table(results, part, costs, tight))
    if len(results.seeds) > 1:
        out.print(f"mean ± standard deviation over seeds {', '.join(map(str, results.seeds))}", style="dim")
    for verdict in results.verdicts():
        out.print(f"- {plain(verdict)}", soft_wrap=True)


_SAVED = len(" ± ") - len("±")


def _parts(widths: Mapping[str, int], room: int) -> list[list[str]]:
    """Columns in their order, as many together as fit into `room`; each part has at least one."""
    parts, left = list[list[str]](), 0
    for column, width in widths.items():
        if width > left:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= width
    return parts


def _table(results: Results, columns: Sequence[str], costs: Mapping[str, Mapping[str, str]], tight: bool) -> RichTable:
    """The rows with some of the columns."""
    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1) if tight else (0, 1))
    shown.add_column("arm", overflow="fold")
    for column in columns:
        shown.add_column(plain(_heading(results, column)), justify="right", no_wrap=True)
    for heading in costs:
        shown.add_column(heading, justify="right", no_wrap=True)
    group, frontier = results.rows[0].group if results.rows else "", ""
    for row in results.rows:
        if row.group != group:
            shown.add_section()
            group = row.group
        if row.frontier != frontier:
            frontier = row.frontier
            if frontier:
                shown.add_row(plain(frontier))
        cells = []
        for column in columns:
            cell = row.cells.get(column)
            best = cell is not None and cell.mean == results.best(column)
            text = str(cell).replace(" ± ", "±") if tight else str(cell)
            cells.append("" if cell is None else f"[bold]{text}[/]" if best else text)
        mark = _mark(results, row)
        name = _indented(row, mark) if frontier else mark + row.name
        shown.add_row(plain(name), *cells, *(texts[row.name] for texts in costs.values()))
    return shown


def _heading(results: Results, column: str) -> str:
    return column + _ARROWS[results.better[column]]


def _mark(results: Results, row: Row) -> str:
    return "◆ " if row.name in results.pareto else ""


def _indented(row: Row, mark: str = "") -> str:
    """The swept values of a point, for a line below the name of its frontier."""
    return f"{mark or '  '}{row.label}"


def steps_table(planned: Planned) -> None:
    """Print every step and why it is to do; the evaluations of one model are one row."""
    shown = RichTable(box=box.SIMPLE_HEAD)
    for column in ("step", "why it runs", "output"):
        shown.add_column(column, overflow="fold")
    rows: dict[tuple[str, str, str], int] = {}
    for step in planned.steps:
        out = step.out.relative_to(planned.planner.run) if step.out else None
        several = step.stage == "evaluate"
        name = step.name.rpartition("/")[0] if several else step.name
        name += " (vLLM)" if planned.engine_of(step) == "vllm" else ""
        place = (out.parent if several else out).as_posix() if out else ""
        row = name, planned.why(step), place
        rows[row] = rows.get(row, 0) + 1
    for (name, why, place), count in rows.items():
        times = f" ({count} evaluations)" if count > 1 else ""
        shown.add_row(plain(name) + times, plain(why) if why else "[dim]finished[/]", plain(place))
    screen = terminal(highlight=False)
    screen.print(shown)
    screen.print(f"{len(planned.todo)} of {len(planned.steps)} steps to do")


def scores(found: Mapping[str, Score]) -> None:
    """Evaluations of one model."""
    shown = RichTable(box=box.SIMPLE_HEAD)
    shown.add_column("evaluation")
    shown.add_column("value", justify="right")
    shown.add_column("standard error", justify="right")
    for name, score in found.items():
        shown.add_row(plain(name), f"{score.value:.4f}", "" if score.stderr is None else f"{score.stderr:.4f}")
    screen = terminal(highlight=False)
    screen.print(shown)
    for name, score in found.items():
        if score.warning:
            screen.print(plain(f"- {name}: {score.warning}"), soft_wrap=True)
