"""What a plan does with each tensor and why: its sources, and every parameter with the line of the recipe that set it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from paft_merge.errors import RecipeError
from paft_merge.inputs.checkpoint import DTYPES
from paft_merge.inputs.tensor_inputs import Read
from paft_merge.plan import COPY, MergePlan, PlannedTensor, resolved
from paft_merge.recipe import Resolved, did_you_mean


@dataclass(frozen=True)
class ExplainedSource:
    """One input of a tensor."""

    model: str
    tensor: str
    """What it is called there."""
    delta: str
    """`checkpoint`, `document` (merged on the way), or the kind of its adapter's delta; `none`: it is the base's own tensor."""
    parameters: dict[str, Resolved]


@dataclass(frozen=True)
class Explained:
    """One output tensor."""

    name: str
    method: str
    """A method, or `copy`."""
    why: str
    """Why it is copied."""
    dtype: str
    shape: tuple[int, ...]
    t: float
    """Place on gradients, in [0, 1]."""
    base: ExplainedSource | None
    sources: tuple[ExplainedSource, ...]
    shared: dict[str, Resolved]

    @property
    def likeness(self) -> tuple[Any, ...]:
        """Equal for tensors of which the same can be said, but for their layers, and with them the values of gradients."""

        def told(source: ExplainedSource) -> tuple[Any, ...]:
            return (
                source.model,
                "" if self.why else _without_numbers(source.tensor),
                source.delta,
                _origins(source.parameters),
            )

        inputs = tuple(told(s) for s in [*([self.base] if self.base else []), *self.sources])
        name = "" if self.why else _without_numbers(self.name)
        return self.method, self.why, self.dtype, name, inputs, _origins(self.shared)


def explain(plan: MergePlan, pattern: str = "*") -> Iterator[Explained]:
    """Explain every tensor whose name fits `pattern`, a glob (or is a part of its name), in the order of the output.

    Raises:
        RecipeError: no tensor fits.
    """
    chosen = [t for t in plan.tensors if fnmatchcase(t.name, pattern)]
    chosen = chosen or [t for t in plan.tensors if pattern in t.name]
    if not chosen:
        fix = did_you_mean(pattern, [t.name for t in plan.tensors]) or f"the first is {plan.tensors[0].name}"
        raise RecipeError.of("TENSOR", pattern, "fits no tensor of the output", fix)
    return (_explained(plan, tensor) for tensor in chosen)


def _explained(plan: MergePlan, tensor: PlannedTensor) -> Explained:
    place = tensor.place
    assert place is not None
    making = place.making
    shared, per_source = (
        ({}, [{} for _ in making.sources]) if tensor.method == COPY else resolved(place, plan.recipe.method)
    )
    base = None
    if making.base:
        base = ExplainedSource(making.base.ref, place.lead, _delta(making.base.read(place.lead), None), {})
    sources = tuple(
        ExplainedSource(model.ref, place.name_in(i), _delta(model.read(place.name_in(i)), base), per_source[i])
        for i, (_, model) in enumerate(making.sources)
        if model.has(place.name_in(i))
    )
    dtype = str(DTYPES[tensor.dtype].torch)
    return Explained(tensor.name, tensor.method, tensor.why, dtype, tensor.shape, place.t, base, sources, shared)


def _delta(read: Read, base: ExplainedSource | None) -> str:
    if read.delta:
        return read.delta.kind
    if read.checkpoint.computed:
        return "document"
    same = base is not None and read.source.split("+")[0] == base.model and read.name == base.tensor
    return "none" if same else "checkpoint"


def to_json(tensor: Explained) -> dict[str, Any]:
    """One explanation as JSON: every parameter as `{value, set_by, line}`."""

    def source(one: ExplainedSource) -> dict[str, Any]:
        said = {"model": one.model, "tensor": one.tensor, "delta": one.delta}
        return {**said, "parameters": _parameters(one.parameters)} if one.parameters else said

    return {
        "name": tensor.name, "method": tensor.method, **({"why": tensor.why} if tensor.why else {}),
        "dtype": tensor.dtype, "shape": list(tensor.shape), "t": tensor.t,
        "base": source(tensor.base) if tensor.base else None,
        "sources": [source(one) for one in tensor.sources],
        "parameters": _parameters(tensor.shared),
    }  # fmt: skip


def _parameters(found: dict[str, Resolved]) -> dict[str, Any]:
    return {
        name: {"value": one.value, "set_by": one.origin.level, "where": str(one.origin.spot)}
        if one.origin.level != "default"
        else {"value": one.value, "set_by": "default"}
        for name, one in found.items()
    }


def alike(tensors: Iterator[Explained]) -> list[Sequence[Explained]]:
    """Tensors of which the same can be said, together, in the order of the first of each."""
    groups: dict[tuple[Any, ...], list[Explained]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.likeness, []).append(tensor)
    return list(groups.values())


def _origins(parameters: dict[str, Resolved]) -> tuple[Any, ...]:
    return tuple((name, one.origin) for name, one in parameters.items())


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".#", name)
