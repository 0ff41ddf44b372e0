"""`paft diff`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from paft_merge.cli.auditing import entries_bar
from paft_merge.cli.terminal import (
    json_option,
    links_option,
    plain,
    print_json,
    say,
    sigterm_as_interrupt,
    warn,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from paft_merge.differences import ModelDiff, TensorDifference

_ROWS = 40
_WIDE = 110
"""Columns of a terminal that shows norms and places too."""
_NARROW = 70
"""Columns of a terminal in which each tensor is a sentence."""
_STYLES = {
    "different": "red",
    "moved": "red",
    "permuted": "red",
    "shape": "red",
    "only in A": "red",
    "only in B": "red",
    "rounded": "yellow",
}


@click.command(short_help="Compare two models or adapters tensor by tensor.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--only", default="*", metavar="PATTERN", help="Only tensors whose names match, e.g. '*.0.mlp.*'.")
@click.option(
    "--tolerance", default=0.0, metavar="X", type=click.FloatRange(min=0),
    help="A tensor counts as the same if the norm of its difference is at most X times its norm.",
)  # fmt: skip
@click.option("--all", "every", is_flag=True, help="Show every tensor that differs, not only the first 40.")
@json_option("Print JSON with every tensor instead of a table.")
@click.option("--lazy-unpickle", is_flag=True, help="Read .bin files through a reader that runs no code of them.")
@links_option
@click.option("--threads", type=click.IntRange(1), help="Blocks compared at a time. Default: all cores, at most 8.")
@click.option("--quiet", is_flag=True, help="Hide the progress bar.")
def diff(
    a: str, b: str, only: str, tolerance: float, every: bool, as_json: bool, lazy_unpickle: bool, follow_links: bool,
    threads: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Compare A and B, two models or two adapters: a folder, a file of tensors, a Hub name, or BASE+ADAPTER.

    Each tensor is the same, only renamed, equal in another type, rounded, or different; config, tokenizer and chat template
    are compared in words. Nothing is loaded whole. See docs/diff.md.

    Exits with 3 if A and B differ in a value, or in a setting that changes what the model does.
    """
    from paft_merge import differences

    if not math.isfinite(tolerance):
        raise click.UsageError(f"--tolerance {tolerance} is not a number.")
    with sigterm_as_interrupt(), entries_bar(quiet) as progress:
        found = differences.diff(
            a,
            b,
            only=only,
            tolerance=tolerance,
            lazy_unpickle=lazy_unpickle,
            follow_links=follow_links,
            threads=threads,
            progress=progress,
        )
    warn(found.warnings)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found, None if every else _ROWS)
    if not found.same:
        raise click.exceptions.Exit(3)


def _show(found: ModelDiff, most: int | None) -> None:
    """Print the summary, the settings, and the tensors that differ."""
    from paft_merge.differences.kinds import kinds_of

    say(f"A  {found.refs[0]}", err=False)
    say(f"B  {found.refs[1]}", err=False)
    _summary("tensors", found.tensors, kinds_of(found.tensors))
    if found.deltas is not None:
        _summary("deltas", found.deltas, kinds_of(found.deltas))
    for change in found.changes:
        say(f"{change.file}: {change.what}{'' if change.counts else ' (changes nothing)'}", err=False)
    _table(found.counted, most)
    if found.same:
        renamed = ", under other names" if found.kinds.get("renamed") else ""
        click.echo(f"A and B are the same {'adapter' if found.of_adapters else 'model'}{renamed}.")
    else:
        click.echo("A and B differ.")


def _summary(what: str, tensors: Sequence[TensorDifference], kinds: dict[Any, int]) -> None:
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    say(f"{len(tensors):,} {what}: {counts}", err=False)


def _table(tensors: Sequence[TensorDifference], most: int | None) -> None:
    """Print the tensors that are not the same, by kind and then by size of the difference."""
    from paft_merge.cli.plan_tables import terminal
    from paft_merge.differences.kinds import worst_first

    rows = worst_first(tensors)
    if not rows:
        return
    out = terminal(highlight=False)
    shown = rows[:most]
    if out.width < _NARROW:
        for one in shown:
            out.print(f"{_kind(one.kind)} {plain(_paragraph(one))}")
    else:
        _columns(out, shown)
    if most is not None and len(rows) > most:
        click.echo(f"and {len(rows) - most:,} more (--all shows them)")


def _kind(kind: str) -> str:
    """A kind in its colour."""
    style = _STYLES.get(kind, "")
    return f"[{style}]{kind}[/]" if style else kind


def _paragraph(one: TensorDifference) -> str:
    """A tensor in one sentence."""
    relative, norm, largest, share, where = one.shown()
    numbers = (f"relative {relative}", f"norm {norm}", f"largest {largest}") if relative else ()
    parts = (f"in B {one.other}" if one.other else "", *numbers, f"{share} differ" if share else "", where)
    return f"{one.name}: {', '.join(filter(None, parts))}"


def _columns(out: Console, shown: Sequence[TensorDifference]) -> None:
    """Print tensors as a table."""
    from rich.table import Table

    wide = out.width >= _WIDE
    cells = [[one.kind, *_numbers(one, wide=wide)] for one in shown]
    headings = ["kind", "relative", *(["norm"] if wide else []), "largest", "differ", *(["where"] if wide else [])]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    left = out.width - sum(width + 2 for width in widths) + (widths[-1] if wide else 0)
    most_wide = max(left * 3 // 5, left - widths[-1] - 4) if wide else left - 2
    names = [[shortened(line, most_wide) for line in _lines(one, wide=wide)] for one in shown]
    named = max(len(line) for lines in names for line in lines)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("kind", no_wrap=True, min_width=widths[0])
    table.add_column("tensor", no_wrap=True, min_width=named)
    for heading, width in zip(headings[1:], widths[1:], strict=True):
        if heading == "where":
            table.add_column(heading, no_wrap=True, overflow="ellipsis", max_width=max(8, left - named - 4))
        else:
            table.add_column(heading, no_wrap=True, min_width=width, justify="right")
    for lines, (kind, *numbers) in zip(names, cells, strict=True):
        table.add_row(_kind(kind), "\n".join(map(plain, lines)), *map(plain, numbers))
    out.print(table)


def _lines(one: TensorDifference, *, wide: bool) -> list[str]:
    """The name, the other name, and in a narrow terminal what its numbers do not show."""
    more = () if wide else (one.order, one.types if one.norm is None else one.odd)
    return list(filter(None, (one.name, f"B: {one.other}" if one.other else "", *more)))


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters, without its middle if it has more."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[len(text) - most // 2 :]}"


def _numbers(one: TensorDifference, *, wide: bool) -> tuple[str, ...]:
    relative, norm, largest, share, where = one.shown()
    return (relative, norm, largest, share, where) if wide else (relative, largest, share)
