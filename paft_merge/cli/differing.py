"""`paft diff`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from paft_merge.cli.auditing import entries_bar
from paft_merge.cli.terminal import (
    console,
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

    from paft_merge.differences import ModelDiff, TensorDifference

_ROWS = 40
_STYLES = {
    "different": "red",
    "moved": "red",
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
        click.echo("A and B are the same model." if not found.of_adapters else "A and B are the same adapter.")
    else:
        click.echo("A and B differ.")


def _summary(what: str, tensors: Sequence[TensorDifference], kinds: dict[Any, int]) -> None:
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
    say(f"{len(tensors):,} {what}: {counts}", err=False)


def _table(tensors: Sequence[TensorDifference], most: int | None) -> None:
    """Print the tensors that are not the same, by kind and then by size of the difference."""
    from rich.table import Table

    from paft_merge.differences.kinds import NUMBERS, worst_first

    rows = worst_first(tensors)
    if not rows:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("kind", "tensor", *NUMBERS):
        right = name in NUMBERS and name != "where"
        table.add_column(
            name, no_wrap=name not in ("tensor", "where"), justify="right" if right else "left", overflow="fold"
        )
    for one in rows[:most]:
        style = _STYLES.get(one.kind, "")
        table.add_row(f"[{style}]{one.kind}[/]" if style else one.kind, _name(one), *one.shown())
    console(highlight=False).print(table)
    if most is not None and len(rows) > most:
        click.echo(f"and {len(rows) - most:,} more (--all shows them)")


def _name(one: TensorDifference) -> str:
    return plain(one.name) + (f" [dim]B: {plain(one.other)}[/]" if one.other else "")
