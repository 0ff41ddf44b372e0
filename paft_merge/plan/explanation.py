"""Explanations of planned tensors: the sources, and every parameter with the line of the recipe that set it."""

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
from paft_merge.recipe.resolution import Origin


@dataclass(frozen=True)
class ExplainedSource:
    """One input of a tensor."""

    model: str
    tensor: str
    """The model's name of the tensor."""
    delta: str
    """`checkpoint`, `document` (an intermediate merge), the kind of an adapter's delta, or `none`: the base's own tensor."""
    parameters: dict[str, Resolved]


@dataclass(frozen=True)
class Explained:
    """One output tensor."""

    name: str
    method: str
    """A method, or `copy`."""
    why: str
    """Why it is copied; empty where it is merged."""
    dtype: str
    shape: tuple[int, ...]
    t: float
    """Place on gradients, in [0, 1]."""
    base: ExplainedSource | None
    sources: tuple[ExplainedSource, ...]
    shared: dict[str, Resolved]

    @property
    def likeness(self) -> tuple[Any, ...]:
        """A key that is equal for tensors whose explanations differ only in layer numbers and in values of gradients."""

        def described(source: ExplainedSource) -> tuple[Any, ...]:
            tensor = "" if self.why else _without_numbers(source.tensor)
            return source.model, tensor, source.delta, _origins(source.parameters)

        inputs = tuple(map(described, [*([self.base] if self.base else []), *self.sources]))
        name = "" if self.why else _without_numbers(self.name)
        return self.method, self.why, self.dtype, name, inputs, _origins(self.shared)


def explain(plan: MergePlan, pattern: str = "*") -> Iterator[Explained]:
    """Explain the output tensors whose names match the glob `pattern` or, if none does, contain it.

    Raises:
        RecipeError: no tensor matches.
    """
    chosen = [t for t in plan.tensors if fnmatchcase(t.name, pattern)]
    chosen = chosen or [t for t in plan.tensors if pattern in t.name]
    if not chosen:
        fix = did_you_mean(pattern, [t.name for t in plan.tensors]) or f"the first is {plan.tensors[0].name}"
        raise RecipeError.of("TENSOR", pattern, "matches no tensor of the output", fix)
    return (_explained(plan, tensor) for tensor in chosen)


def _explained(plan: MergePlan, tensor: PlannedTensor) -> Explained:
    output = tensor.place
    assert output is not None
    slice_ = output.slice
    shared, per_source = (
        ({}, [{} for _ in slice_.sources]) if tensor.method == COPY else resolved(output, plan.recipe.method)
    )
    if word := tensor.parameters.get("router"):
        shared = {"router": Resolved(word, Origin("recipe", plan.recipe.located.spot(("router",))))}
        per_source = [{name: one for name, one in given.items() if name == "weight"} for given in per_source]
    base, of_base = None, None
    if slice_.base:
        of_base = slice_.base.read(output.template_name)
        base = ExplainedSource(slice_.base.ref, _stored_name(of_base), _delta(of_base, None), {})
    sources = tuple(
        _explained_source(model.ref, model.read(output.name_in(i)), of_base, per_source[i])
        for i, (_, model) in enumerate(slice_.sources)
        if model.has(output.name_in(i))
    )
    dtype = str(DTYPES[tensor.dtype].torch)
    return Explained(tensor.name, tensor.method, tensor.why, dtype, tensor.shape, output.t, base, sources, shared)


def _explained_source(ref: str, read: Read, base: Read | None, parameters: dict[str, Resolved]) -> ExplainedSource:
    return ExplainedSource(ref, _stored_name(read), _delta(read, base), parameters)


def _stored_name(read: Read) -> str:
    """The model's name of a tensor; of several that it is made of, the first one and how many more there are."""
    first, *others = read.checkpoint.stored_names(read.name)
    return f"{first} and {len(others):,} more" if others else first


def _delta(read: Read, base: Read | None) -> str:
    if read.delta:
        return read.delta.kind
    if read.checkpoint.computed:
        return "document"
    return "none" if base is not None and read.same_weight(base) else "checkpoint"


def to_json(tensor: Explained) -> dict[str, Any]:
    """One explanation as JSON: every parameter as `{value, set_by, line}`."""

    def source(one: ExplainedSource) -> dict[str, Any]:
        found = {"model": one.model, "tensor": one.tensor, "delta": one.delta}
        return {**found, "parameters": _parameters(one.parameters)} if one.parameters else found

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
    """Group tensors of equal `likeness`, in the order of the first of each group."""
    groups: dict[tuple[Any, ...], list[Explained]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.likeness, []).append(tensor)
    return list(groups.values())


def _origins(parameters: dict[str, Resolved]) -> tuple[Any, ...]:
    return tuple((name, one.origin) for name, one in parameters.items())


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".#", name)
