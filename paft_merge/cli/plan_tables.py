"""What the terminal shows of plans and methods."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paft_merge.errors import RecipeError
from paft_merge.methods import REQUIRED, Method, Parameter
from paft_merge.plan import COPY, MergePlan, PlannedTensor
from paft_merge.recipe import did_you_mean


def plan_json(planned: MergePlan, out: Path | None) -> dict[str, Any]:
    """The whole plan: totals, files, and every tensor with its inputs and resolved parameters."""
    return {
        "recipe": planned.recipe.resolved(),
        "arithmetic": planned.recipe.arithmetic,
        "bytes_read": planned.bytes_read,
        "bytes_on_hub": _on_hub(planned),
        "bytes_written": planned.bytes_written,
        "bytes_free": _free(out),
        "files": {s.file: s.size for s in planned.shards},
        "config": dict(planned.config),
        "vocabulary": dict(planned.vocabulary.facts) if planned.vocabulary else {},
        "warnings": [str(w) for w in planned.warnings],
        "tensors": [_tensor_json(t) for t in planned.tensors],
    }


def _tensor_json(tensor: PlannedTensor) -> dict[str, Any]:
    inputs = tensor.inputs
    return {
        "name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "method": tensor.method, "form": inputs.form,
        "base": inputs.base.source if inputs.base else None,
        "sources": [r.source for r in inputs.sources],
        "adapters": {r.source: r.delta.kind for r in inputs.sources if r.delta},
        "parameters": dict(tensor.parameters),
    }  # fmt: skip


def plan_table(planned: MergePlan, out: Path | None) -> None:
    """The plan as a person reads it: what will be done, with what, and what it takes."""
    console, recipe = terminal(), planned.recipe
    console.print(f"[bold]{recipe.merge_method}[/] of {len(planned.models)} models:")
    for model in planned.models:
        role = "  (names, order, files, config and tokenizer are its)" if model is planned.donor else ""
        role += "  (merged on the way)" if model.checkpoint.computed else ""
        console.print(f"  {escape(model.ref)}{role}", soft_wrap=True)
    where = "float32, rounded once" if recipe.arithmetic == "float32" else "as mergekit does it, in the storage type"
    console.print(f"arithmetic {where} ({recipe.rounding}), seed {recipe.seed}")
    if planned.vocabulary and (facts := planned.vocabulary.facts):
        console.print(f"vocabulary of {facts['tokens']:,} tokens in {facts['rows']:,} rows")
    table = _table("tensors", "method", "inputs", "output", "parameters")
    groups = Counter(_kind(t) for t in planned.tensors)
    for (method, inputs, dtype, parameters), count in groups.most_common(12):
        table.add_row(f"{count:,}", method, inputs, dtype, escape(parameters))
    if len(groups) > 12:
        rest = sum(count for _, count in groups.most_common()[12:])
        table.add_row(f"{rest:,}", "...", "", "", "other parameters: see --json")
    console.print(table)
    files = f"{len(planned.shards)} file{'s' * (len(planned.shards) != 1)}"
    read, written, free = map(_size, (planned.bytes_read, planned.bytes_written, _free(out)))
    far = _on_hub(planned)
    where = f" ({_size(far)} of files are on the Hub only)" if far else ""
    console.print(f"reads {read}{where}, writes {written} in {files}; {free} are free on that disk")


def _on_hub(planned: MergePlan) -> int:
    """Bytes of input files that are on the Hub and not in its cache."""
    return sum(_far_files(planned).values())


def _far_files(planned: MergePlan) -> dict[tuple[Path, str], int]:
    found: dict[tuple[Path, str], int] = {}
    for model in planned.models:
        for checkpoint in (model.checkpoint, *([model.adapter.file] if model.adapter else [])):
            found |= {(checkpoint.folder, name): size for name, size in checkpoint.far.items()}
        if isinstance(beneath := getattr(model.checkpoint, "plan", None), MergePlan):
            found |= _far_files(beneath)
    return found


def _kind(tensor: PlannedTensor) -> tuple[str, str, str, str]:
    adapters = Counter(r.delta.kind for r in tensor.inputs.sources if r.delta)
    inputs = ", ".join(f"{n} x {kind}" for kind, n in sorted(adapters.items())) or tensor.inputs.form
    if tensor.method == COPY:
        return COPY, "", tensor.dtype, ""
    shared = {k: v for k, v in tensor.parameters.items() if k != "sources"}
    sources = tensor.parameters.get("sources", [])
    per_source = {k: [s.get(k) for s in sources] for k in dict.fromkeys(k for s in sources for k in s)}
    parameters = " ".join(f"{k}={_short(v)}" for k, v in {**per_source, **shared}.items())
    return tensor.method, inputs, tensor.dtype, parameters


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _free(out: Path | None) -> int:
    folder = (out or Path()).resolve()
    return shutil.disk_usage(next(p for p in [folder, *folder.parents] if p.exists())).free


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def method_table(methods: Mapping[str, Method]) -> None:
    """Every method with its paper and parameters, and who computes it."""
    table = _table("method", "what", "paper", "computed", "parameters")
    for name, method in methods.items():
        parameters = ", ".join(p.name for p in method.parameters)
        table.add_row(f"[bold]{name}[/]", method.title, method.paper, _computed(method), parameters)
    terminal().print(table)


def terminal() -> Console:
    """As wide as the terminal; wide enough for whole lines where the output goes elsewhere."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def _table(*headings: str) -> Table:
    """A table whose first column is never broken, and whose others are never cut."""
    table = Table(box=box.SIMPLE)
    for i, heading in enumerate(headings):
        table.add_column(heading, no_wrap=i == 0, overflow="fold")
    return table


def _computed(method: Method) -> str:
    return "block by block" if method.streamed else "by mergekit, whole tensors"


def method_details(name: str, methods: Mapping[str, Method]) -> None:
    """One method's parameters: type, default, scope and meaning."""
    if name not in methods:
        fix = did_you_mean(name, methods) or f"one of {', '.join(methods)}"
        raise RecipeError.of("RECIPE", name, "is no method here", fix)
    method, console = methods[name], terminal()
    console.print(f"[bold]{name}[/]: {method.title}, {method.paper}; base {method.base}; computed {_computed(method)}")
    table = _table("parameter", "value", "default", "given", "meaning")
    for p in method.parameters:
        default = "required" if p.default is REQUIRED else "-" if p.default is None else _short(p.default)
        table.add_row(f"[bold]{p.name}[/]", _values(p), default, "per source" if p.scope == "source" else "once", p.doc)
    console.print(table)


def _values(parameter: Parameter) -> str:
    if parameter.choices:
        return " | ".join(parameter.choices)
    bounds = f" {parameter.low:g}..{parameter.high:g}" if parameter.high < float("inf") else ""
    return parameter.type.__name__ + bounds
