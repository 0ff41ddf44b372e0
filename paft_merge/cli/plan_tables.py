"""Plans and methods as tables of the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from paft_merge.cli.terminal import console, plain
from paft_merge.engine.options import size_text
from paft_merge.errors import RecipeError
from paft_merge.inputs.source_labels import labels_of
from paft_merge.methods import REQUIRED, Method, Parameter
from paft_merge.plan import MergePlan
from paft_merge.plan.formatting import show_bytes, show_seconds, show_value
from paft_merge.plan.planned import bytes_free
from paft_merge.recipe import did_you_mean

if TYPE_CHECKING:
    from paft_merge.engine.factors import Loss
    from paft_merge.engine.prediction import Prediction


def plan_table(planned: MergePlan, out: Path | str | None) -> None:
    """Print a plan: models, arithmetic, tensors by kind, and sizes."""
    shown, recipe = terminal(), planned.recipe
    space = "" if recipe.space == "weight" else f" in space: {recipe.space}"
    shown.print(f"[bold]{recipe.merge_method}[/]{space} of {len(planned.models)} models:")
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
    most = "at most " if recipe.output.kind == "delta" else ""
    shown.print(
        f"reads {read}{where}, writes {most}{written} in {files}{f'; {show_bytes(free)} are free on that disk' if free is not None else f' of {plain(str(out))}'}"
    )
    if most:
        shown.print("every delta is merged twice: its size is known when the entries that are not zero are counted")


def weights_line(planned: MergePlan, expected: Mapping[str, float]) -> None:
    """Print the weights that are expected where norms decide them; nothing if they are not known before the merge."""
    if expected:
        pairs = zip(labels_of(list(expected)), expected.values(), strict=True)
        each = ", ".join(f"{plain(label)} {weight:.3g}" for label, weight in pairs)
        terminal().print(f"weights of about {each}, by the norms in the records of training; the merge measures them")
    elif any(tensor.rule.weighs for tensor in planned.tensors if tensor.rule.wants != "whole"):
        terminal().print("weights that follow from norms are measured by the merge: its manifest has the numbers")


def adapter_line(planned: MergePlan, loss: Loss | None) -> None:
    """Print the rank of an adapter, and the error that is known from the factors of its sources."""
    modules = len({tensor.factor.module for tensor in planned.tensors if tensor.factor})
    auto = planned.recipe.output.rank == "auto"
    rank = loss.rank if auto and loss and loss.modules == modules else planned.config["r"]
    text = f"adapter of rank {rank}{' or less' if auto and rank == planned.config['r'] else ''} on {modules} modules"
    if loss is None:
        shown = "the merge measures its error"
    else:
        cost = cost_text(loss.relative, loss.outside)
        error = cost if cost.startswith("exact") else f"with a {cost}"
        rest = modules - loss.modules
        shown = error + (f" on {loss.modules} of them; the merge measures that of the others" if rest else "")
    terminal().print(f"{text}, {shown}" if loss else f"{text}; {shown}")


def cost_text(error: float, outside: float | None) -> str:
    """What an adapter loses of the merged deltas.

    Args:
        error: relative error of the factors.
        outside: as `Loss.outside`.
    """
    held = "" if outside is None else f", in subspaces that hold {1 - outside:.1%} of the sources' squared norms"
    return ("exact but for rounding" if error < _ROUNDING else f"relative error of {error:.3g}") + held


_ROUNDING = 1e-5
"""Relative error that is due to float32 alone."""

_WORKERS_SHOWN = 16


def prediction_table(found: Prediction, origin: str, files: int, spread: int | None, compiling: float) -> None:
    """Print the predicted cost of a merge.

    Args:
        found: the prediction.
        origin: where its rates come from.
        files: of the output.
        spread: size of files that balances the workers' shares better, if they are uneven.
        compiling: seconds to compile kernels first.
    """
    shown, slowest, count = terminal(), found.slowest, len(found.workers)
    who = f"worker {slowest.worker} of {count}, the slowest, takes" if count > 1 else "the merge takes"
    cached = max(one.seconds_cached for one in found.workers)
    shown.print(
        f"{who} about {show_seconds(slowest.seconds)} with inputs on disk, {show_seconds(cached)} in the page cache, on "
        f"{found.threads} thread{'s' * (found.threads != 1)}; {show_bytes(max(w.peak_bytes for w in found.workers))} of memory, "
        f"{show_bytes(max(w.scratch_bytes for w in found.workers))} of scratch"
    )
    if count > 1:
        table = _table("worker", "files", "seconds", "in cache", "reads", "from disk", "writes", "memory", "scratch")
        ordered = sorted((one for one in found.workers if one.files), key=lambda one: -one.seconds)
        for one in ordered[:_WORKERS_SHOWN]:
            sizes = one.bytes_read, one.bytes_from_disk, one.bytes_written, one.peak_bytes, one.scratch_bytes
            table.add_row(
                str(one.worker), str(one.files), f"{one.seconds:g}", f"{one.seconds_cached:g}", *map(show_bytes, sizes)
            )
        shown.print(table)
        if rest := ordered[_WORKERS_SHOWN:]:
            shown.print(f"{len(rest)} more workers take {rest[-1].seconds:g} to {rest[0].seconds:g} s")
    if found.idle:
        who = f"workers {_ranges(found.idle)} have" if len(found.idle) > 1 else f"worker {found.idle[0]} has"
        shown.print(f"{who} nothing to do: the output has {files} file{'s' * (files != 1)}")
        if not spread:
            shown.print("its tensors do not spread over so many workers, whatever the sizes of files")
    if spread:
        shown.print(f"--out-shard-size {size_text(spread)} spreads the merge over {count} workers")
    if compiling:
        shown.print(f"and up to {show_seconds(compiling)} here, once, to compile kernels for this processor")
    rates = found.rates
    shown.print(
        f"rates: reads {rates.read_gbps:.3g} GB/s, writes {rates.write_gbps:.3g} GB/s, {rates.gflops:.3g} GFLOP/s a core, "
        f"loops x {rates.loops:.3g}: {plain(origin)}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges: `3..7, 9`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join("..".join(map(str, ends)) for ends in found)


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
    method, shown = method_named(name, methods), terminal()
    shown.print(f"[bold]{name}[/]: {method.title}, {method.paper}; base {method.base}; computed {_computed(method)}")
    table = _table("parameter", "value", "default", "given", "meaning")
    for p in method.parameters:
        default = "required" if p.default is REQUIRED else "-" if p.default is None else show_value(p.default)
        table.add_row(f"[bold]{p.name}[/]", _values(p), default, "per source" if p.scope == "source" else "once", p.doc)
    shown.print(table)


def method_named(name: str, methods: Mapping[str, Method]) -> Method:
    """A method by its name.

    Raises:
        RecipeError: RECIPE, the method is unknown.
    """
    if name not in methods:
        fix = did_you_mean(name, methods) or f"one of {', '.join(methods)}"
        raise RecipeError.of("RECIPE", name, "is not a method", fix)
    return methods[name]


def methods_json(methods: Mapping[str, Method]) -> dict[str, Any]:
    """Methods as plain data, with the bounds, choices and defaults of their parameters."""
    return {
        name: {
            "title": method.title, "paper": method.paper, "base": method.base, "streamed": method.streamed,
            "min_sources": method.min_sources, "max_sources": method.max_sources,
            "parameters": {p.name: _parameter_json(p) for p in method.parameters},
        }
        for name, method in methods.items()
    }  # fmt: skip


def _parameter_json(parameter: Parameter) -> dict[str, Any]:
    required = parameter.default is REQUIRED
    return {
        "type": parameter.type.__name__, "scope": parameter.scope, "required": required,
        "default": None if required else parameter.default,
        "low": parameter.low if isfinite(parameter.low) else None,
        "high": parameter.high if isfinite(parameter.high) else None,
        "choices": list(parameter.choices), "words": list(parameter.words), "meaning": parameter.doc,
    }  # fmt: skip


def _values(parameter: Parameter) -> str:
    if parameter.choices:
        return " | ".join(parameter.choices)
    bounds = f" {parameter.low:g}..{parameter.high:g}" if parameter.high < float("inf") else ""
    return " | ".join([parameter.type.__name__ + bounds, *parameter.words])
