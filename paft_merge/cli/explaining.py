"""`paft explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from paft_merge.cli.merging import planning_options
from paft_merge.cli.terminal import json_option, plain, print_json, recipe_place, warn
from paft_merge.engine.options import MergeOptions
from paft_merge.inputs.source_labels import labels_of

if TYPE_CHECKING:
    from rich.table import Table

    from paft_merge.plan.explanation import Explained, ExplainedSource
    from paft_merge.recipe import Resolved


@click.command(short_help="Every tensor's method, sources and parameters, with lines.")
@click.argument("recipe")
@click.option(
    "--tensor", "pattern", default="*", metavar="GLOB", help="Only tensors whose names match, e.g. '*.0.mlp.*'."
)
@json_option("Every tensor, as JSON.")
@planning_options
def explain(recipe: str, pattern: str, as_json: bool, **planning: Any) -> None:
    """Show the sources of each tensor, and every parameter with the line of RECIPE that set it. Reads only headers."""
    from paft_merge.cli.plan_tables import weights_line
    from paft_merge.engine import api, imbalance
    from paft_merge.plan import explanation

    with api.open_plan(recipe_place(recipe), MergeOptions(stream_from_hub=True, **planning)) as plan:
        warn(plan.warnings)
        tensors = explanation.explain(plan, pattern)
        if as_json:
            print_json([explanation.to_json(tensor) for tensor in tensors])
            return
        refs = [model.ref for model in plan.models]
        labels = dict(zip(refs, labels_of(refs), strict=True))
        if any(label != ref for ref, label in labels.items()):
            _show_labels(labels)
        weights_line(plan, imbalance.expected_weights(plan))
        for group in explanation.alike(tensors):
            _show(group, labels)


def _show_labels(labels: Mapping[str, str]) -> None:
    """Print which model each short name stands for."""
    from paft_merge.cli.plan_tables import terminal

    shown, width = terminal(), max(map(len, labels.values()))
    for ref, label in labels.items():
        shown.print(f"[bold]{plain(label):{width}}[/]  {plain(ref)}", highlight=False, soft_wrap=True)
    shown.print()


def _show(group: Sequence[Explained], labels: Mapping[str, str]) -> None:
    """Print one tensor, or several alike: each input with its parameters, and where they were set."""
    from rich.padding import Padding

    from paft_merge.cli.plan_tables import terminal

    first, shown = group[0], terminal()
    shape = " x ".join(map(str, first.shape)) if len({one.shape for one in group}) == 1 else "several shapes"
    places = sorted({one.t for one in group})
    at = f"  depth {places[0]:.3g}" + (f" to {places[-1]:.3g}" if len(places) > 1 else "")
    alike = f" [dim]and {len(group) - 1:,} alike[/]" if group[1:] else ""
    shown.print(f"[bold]{plain(first.name)}[/]{alike}", highlight=False)
    method = f"[cyan]{first.method}[/]" + (f": {plain(first.why)}" if first.why else "")
    shown.print(f"  {method}  [dim]{first.dtype}  {shape or 'scalar'}{'' if first.why else at}[/]", highlight=False)
    if first.base and not first.why:
        shown.print(f"  base    {_input(first, first.base, labels)}", highlight=False)
    for i, source in enumerate(first.sources if not first.why else ()):
        shown.print(f"  source  {_input(first, source, labels)}", highlight=False)
        shown.print(Padding(_table([one.sources[i].parameters for one in group]), (0, 0, 0, 4)))
    if not first.why:
        shown.print(Padding(_table([one.shared for one in group]), (0, 0, 0, 2)))
    shown.print()


def _input(tensor: Explained, source: ExplainedSource, labels: Mapping[str, str]) -> str:
    kind = {"checkpoint": "", "none": "  [dim]no delta[/]", "document": "  [dim]merged on the fly[/]"}.get(
        source.delta, f"  [dim]{source.delta}[/]"
    )
    renamed = "" if source.tensor == tensor.name else f"  [yellow]{plain(source.tensor)}[/]"
    return f"{plain(labels.get(source.model, source.model))}{renamed}{kind}"


def _table(found: Sequence[dict[str, Resolved]]) -> Table:
    """Return a table of parameters: a row for each that was set, one for all defaults; gradients as first to last value."""
    from rich.table import Table

    from paft_merge.plan.formatting import show_value

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, min_width=12)
    table.add_column(overflow="fold")
    defaults = []
    for name, one in found[0].items():
        values = list(dict.fromkeys(show_value(parameters[name].value) for parameters in found))
        value = values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
        if one.origin.level == "default":
            defaults.append(f"{name} {value}")
        else:
            table.add_row(name, plain(value), f"[green]{plain(str(one.origin.spot))}[/]")
    if defaults:
        table.add_row("[dim]default[/]", "", f"[dim]{plain(', '.join(defaults))}[/]")
    return table
