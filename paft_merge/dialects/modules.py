"""An adapter without a dialect: the factors of each module, as every dialect can write them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from paft_merge.dialects.matrices import Matrix
from paft_merge.errors import AdapterError, Problem

Kind = Literal["linear", "embedding", "convolution", "experts"]

_SAME = 1e-6
"""Relative difference of two scales that are one number, rounded differently."""


@dataclass(frozen=True)
class Factors:
    """The factors of one module, and the scale of their product.

    Attributes:
        path: the module in the model.
        a: `[r, in]`; of an embedding `[r, vocabulary]`; of experts `[E * r, in]`, expert by expert.
        b: `[out, r]`; of an embedding `[dim, r]`; of experts `[out, r * E]`, the expert varying fastest.
        scale: the delta is scale * B A.
        kind: what the module is.
        magnitude: of DoRA, `[out]`.
        depth: of experts, the number of PEFT wrappers around their parameter.
        rank: r.
        parameter: of experts, the name of their parameter, if it is known.
    """

    path: str
    a: Matrix
    b: Matrix
    scale: float
    kind: Kind = "linear"
    magnitude: Matrix | None = None
    depth: int = 0
    rank: int = 0
    parameter: str = ""

    @property
    def count(self) -> int:
        """Number of experts; 1 of any other module."""
        return self.a.shape[0] // self.rank

    def with_rank(self, rank: int) -> Factors:
        """The same product from factors of a larger rank, padded with zeros."""
        if rank == self.rank:
            return self
        if self.kind != "experts":
            return replace(self, a=self.a.padded(0, rank), b=self.b.padded(1, rank), rank=rank)
        (rows, columns), count = (self.b.shape[0], self.a.shape[1]), self.count
        a = self.a.reshaped(count, self.rank, columns).padded(1, rank).reshaped(count * rank, columns)
        b = self.b.reshaped(rows, self.rank, count).padded(1, rank).reshaped(rows, rank * count)
        return replace(self, a=a, b=b, rank=rank)


@dataclass(frozen=True)
class Lora:
    """An adapter.

    Attributes:
        modules: in the order of its file.
        base_name: the base that it names; empty if it names none.
        whole: full tensors that replace those of the base, trained rows of embeddings and biases of factors, by the name
            that PEFT gives them, without its prefix.
        config: `adapter_config.json` of PEFT, if it had one.
        notes: what was changed or left out, for the user.
    """

    modules: tuple[Factors, ...]
    base_name: str = ""
    whole: Mapping[str, Matrix] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[Problem, ...] = ()

    def noting(self, what: str, fix: str = "") -> Lora:
        """The same with a further note."""
        return replace(self, notes=(*self.notes, Problem("CONVERTED", "", what, fix)))

    def with_one_rank(self, rank: int | None = None) -> Lora:
        """The same with modules of one rank, padded with zeros; the largest, if it is not given."""
        rank = rank or max(module.rank for module in self.modules)
        short = [module for module in self.modules if module.rank != rank]
        if not short:
            return self
        padded = replace(self, modules=tuple(module.with_rank(rank) for module in self.modules))
        return padded.noting(f"{len(short):,} modules were padded with zeros to rank {rank}, which changes no value")

    def with_one_scale(self) -> Lora:
        """The same with the scale of most modules for all; the factor B of the others is multiplied by the ratio."""
        scale = common_scale(self.modules)
        modules, rounded, changed = list[Factors](), list[str](), 0
        for module in self.modules:
            if is_same(module.scale, scale):
                modules.append(replace(module, scale=scale))
                continue
            b, exact = module.b.times(module.scale / scale)
            changed += 1
            if not exact:
                rounded.append(module.path)
            modules.append(replace(module, b=b, scale=scale))
        if not changed:
            return replace(self, modules=tuple(modules))
        how = f"rounded to {modules[0].b.dtype} in {len(rounded):,} of them" if rounded else "exactly"
        noted = replace(self, modules=tuple(modules))
        return noted.noting(f"the scales of {changed:,} modules were multiplied into their factor B, {how}")


def common_scale(modules: Sequence[Factors]) -> float:
    """The scale that most modules have; the first of those that are equally frequent."""
    return Counter(module.scale for module in modules).most_common(1)[0][0]


def is_same(one: float, other: float) -> bool:
    """Whether two scales are the same number, apart from rounding."""
    return abs(one - other) <= _SAME * abs(other)


def refuse(where: object, names: Iterable[str], what: str, fix: str) -> None:
    """Raise AdapterError ADAPTER_UNSUPPORTED, naming the first of `names`, if there are any."""
    listed = list(names)
    if listed:
        named = f"{', '.join(listed[:3])}{', ...' if listed[3:] else ''}"
        raise AdapterError.of("ADAPTER_UNSUPPORTED", where, f"{what}: {named}", fix)
