"""Plans and methods as tables of the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from paft_merge.cli.terminal import console, plain
from paft_merge.errors import RecipeError
from paft_merge.methods import REQUIRED, Method, Parameter
from paft_merge.plan import MergePlan
from paft_merge.plan.formatting import show_bytes, show_value
from paft_merge.plan.planned import bytes_free
from paft_merge.recipe import did_you_mean


def plan_table(planned: MergePlan, out: Path | str | None) -> None:
    """Print a plan: models, arithmetic, tensors by kind, and sizes."""
    shown, recipe = terminal(), planned.recipe
    shown.print(f"[bold]{recipe.merge_method}[/] of {len(planned.models)} models:")
    for model in planned.models:
        role = "  (gives names, order, files, config and tokenizer)" if model is planned.config_source else ""
        role += "  (merged on the fly)" if model.checkpoint.computed else ""
        shown.print(f"  {plain(model.ref)}{role}", soft_wrap=True)
    where = "float32, rounded once" if recipe.arithmetic == "float32" else "as in mergekit, in the storage type"
    shown.print(f"arithmetic {where} ({recipe.rounding}), seed {recipe.seed}")
    if planned.vocabulary and (facts := planned.vocabulary.facts):
        shown.print(f"vocabulary of {facts['tokens']:,} tokens in {facts['rows']:,} rows")
    table = _table("tensors", "method", "inputs", "output", "parameters")
    for kind, count in planned.summary():
        table.add_row(f"{count:,}", *map(plain, kind))
    shown.print(table)
    files = f"{len(planned.shards)} file{'s' * (len(planned.shards) != 1)}"
    read, written, free = show_bytes(planned.bytes_read), show_bytes(planned.bytes_written), bytes_free(out)
    far = planned.bytes_on_hub
    where = f" ({show_bytes(far)} of files are not on this machine)" if far else ""
    shown.print(
        f"reads {read}{where}, writes {written} in {files}{f'; {show_bytes(free)} are free on that disk' if free is not None else f' of {plain(str(out))}'}"
    )


def method_table(methods: Mapping[str, Method]) -> None:
    """Print every method with its paper, its parameters, and how it is computed."""
    table = _table("method", "what", "paper", "computed", "parameters")
    for name, method in methods.items():
        parameters = ", ".join(p.name for p in method.parameters)
        table.add_row(f"[bold]{name}[/]", method.title, method.paper, _computed(method), parameters)
    terminal().print(table)


def terminal(*, highlight: bool = True) -> Console:
    """Return a console as wide as the terminal; where the output is not a terminal, as `COLUMNS` says, or 160 columns wide."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return console(width=None if known else 160, highlight=highlight)


def _table(*headings: str) -> Table:
    """Return a table; its first column never wraps, the others fold."""
    table = Table(box=box.SIMPLE)
    for i, heading in enumerate(headings):
        table.add_column(heading, no_wrap=i == 0, overflow="fold")
    return table


def _computed(method: Method) -> str:
    return "block by block" if method.streamed else "by mergekit, whole tensors"


def method_details(name: str, methods: Mapping[str, Method]) -> None:
    """Print the parameters of one method: type, default, scope and meaning.

    Raises:
        RecipeError: RECIPE, the method is unknown.
    """
    if name not in methods:
        fix = did_you_mean(name, methods) or f"one of {', '.join(methods)}"
        raise RecipeError.of("RECIPE", name, "is not a method", fix)
    method, shown = methods[name], terminal()
    shown.print(f"[bold]{name}[/]: {method.title}, {method.paper}; base {method.base}; computed {_computed(method)}")
    table = _table("parameter", "value", "default", "given", "meaning")
    for p in method.parameters:
        default = "required" if p.default is REQUIRED else "-" if p.default is None else show_value(p.default)
        table.add_row(f"[bold]{p.name}[/]", _values(p), default, "per source" if p.scope == "source" else "once", p.doc)
    shown.print(table)


def _values(parameter: Parameter) -> str:
    if parameter.choices:
        return " | ".join(parameter.choices)
    bounds = f" {parameter.low:g}..{parameter.high:g}" if parameter.high < float("inf") else ""
    return parameter.type.__name__ + bounds
