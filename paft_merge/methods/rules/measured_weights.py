"""Weights that follow from the sizes of the deltas: `weight: equal_norm` and `inverse_norm` (NAN, arXiv:2505.16148).

A rule with such weights is built when the norms of the deltas are known: before a merge for those over the whole model, before
a tensor is merged for those of the tensor alone. The norm of a low-rank delta follows from its factors, without the delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from paft_merge.compute.block_walk import BlockWalk, TiledTensor
from paft_merge.compute.blocks import KeepThreshold, Ops, Wants
from paft_merge.errors import MergeError
from paft_merge.methods.rules.rule import Combine, Rule, TensorPass
from paft_merge.methods.rules.thresholds import AddUp, Trim
from paft_merge.methods.rules.walks import DROPS, Walks

Weight: TypeAlias = float | str
"""A number, or `equal_norm` (also `auto`) or `inverse_norm`."""

_NOTHING = 1e-7
"""A norm under this counts as zero."""


class SourcedTensor(TiledTensor, Protocol):
    """A tensor whose sources have names, and factors where their deltas are low-rank products."""

    @property
    def name(self) -> str:
        """Its name, for messages."""

    @property
    def source_names(self) -> Sequence[str]:
        """The name of each source; the same model has the same name in all tensors."""

    @property
    def products(self) -> Sequence[tuple[Any, Any] | None] | None:
        """Of each source, B `[O, R]` and A `[R, I]`, whose product its delta is, or None without a delta; None if a delta is not a product."""


def weights_for(given: Sequence[Weight], norms: Sequence[float]) -> tuple[float, ...]:
    """The weights of sources whose deltas have these Frobenius norms.

    `equal_norm`    weight * norm is the same for all: the mean of |weight| * norm over the sources with a number that is not
                    zero, or the mean of all norms if there are none.
    `inverse_norm`  proportional to 1 / norm, with a mean of 1.

    They are rounded to six digits, so that rounding errors of a norm do not reach them. A source with a norm under 1e-7 does not
    count, and gets the weight 0.

    Args:
        given: one a source. `inverse_norm` is for all sources or none.
        norms: one a source.
    """
    measured = [norm for weight, norm in zip(given, norms, strict=True) if isinstance(weight, str) and norm >= _NOTHING]
    numbers = [abs(w) * n for w, n in zip(given, norms, strict=True) if not isinstance(w, str) and w and n >= _NOTHING]
    if not measured:
        return tuple(0.0 if isinstance(weight, str) else weight for weight in given)
    if "inverse_norm" in given:
        wanted = len(measured) / math.fsum(1 / norm for norm in measured)
    else:
        wanted = math.fsum(numbers or measured) / len(numbers or measured)
    return tuple(
        weight if not isinstance(weight, str) else float(f"{wanted / norm:.6g}") if norm >= _NOTHING else 0.0
        for weight, norm in zip(given, norms, strict=True)
    )


@dataclass(frozen=True)
class MeasuredWeights(Rule):
    """A rule whose weights are not all known before its deltas are measured."""

    given: tuple[Weight, ...]
    scope: Literal["global", "tensor"]
    """`global`: the norms are those of the whole model."""
    unit: Rule
    """The rule with the weight 1 in place of each word."""
    build: Callable[[Sequence[float]], Rule] = field(compare=False, repr=False)
    """Makes the rule from the weights."""
    known: tuple[float, ...] | None = None
    """The weights, once they are known."""

    def __post_init__(self) -> None:
        if "inverse_norm" in self.given and len({*self.given}) > 1:
            others = ", ".join(str(one) for one in dict.fromkeys(self.given) if one != "inverse_norm")
            raise ValueError(f"weight: inverse_norm is for all sources or for none, and others have {others}")

    @property
    def wants(self) -> Wants:
        """As the rule."""
        return self.unit.wants

    @property
    def keeps_equals(self) -> bool:
        """As the rule."""
        return self.unit.keeps_equals

    @property
    def needs_model(self) -> bool:
        """Whether its weights or thresholds are still to be found over the whole model."""
        return self.weighs_model or self.unit.needs_model

    @property
    def weighs(self) -> bool:
        """Whether its weights are still to be found."""
        return self.known is None

    @property
    def weighs_model(self) -> bool:
        """Whether its weights are still to be found over the whole model."""
        return self.scope == "global" and self.known is None

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Measure the norms, if the weights are not known, and prepare the rule with these."""
        if self.known is None:
            squares = _walked(walk.each, walk.ops)
            held = dict(zip(walk.active, squares, strict=True))
            return self.weighed([math.sqrt(held.get(i, 0.0)) for i in range(len(self.given))]).prepare(walk, deltas)
        return self.resolved.prepare(walk, deltas)

    def weighed(self, norms: Sequence[float]) -> MeasuredWeights:
        """This rule with the weights that follow from the norms of its sources."""
        return replace(self, known=weights_for(self.given, norms))

    def measured(self, tensor: SourcedTensor, each: BlockWalk, ops: Ops) -> MeasuredWeights:
        """This rule with its weights, from the norms in this tensor unless they are known.

        Raises:
            MergeError: NONFINITE, a delta has no norm.
        """
        if self.known is not None:
            return self
        squares = squares_of(tensor, each, ops)
        _check_finite(tensor, squares)
        return self.weighed([math.sqrt(square) for square in squares])

    @property
    def resolved(self) -> Rule:
        """The rule with its known weights."""
        assert self.known is not None
        return self.build(self.known)

    def row(self, shape: tuple[int, ...]) -> int:
        """As the rule."""
        return self.unit.row(shape)

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """As the rule, and one that measures norms."""
        found = self.unit.walks(numel, active)
        return found if self.known is not None else replace(found, norms=(DROPS,), norms_over_model=self.weighs_model)

    @property
    def selection_weights(self) -> tuple[float, ...] | None:
        """As the rule; with weights that are not known, those of `unit`."""
        return (self.unit if self.known is None else self.resolved).selection_weights

    def trims_by(self, trim: Trim) -> bool:
        """As the rule."""
        return self.unit.trims_by(trim)

    @property
    def global_trims(self) -> tuple[Any, ...] | None:
        """As the rule."""
        return self.unit.global_trims

    def global_thresholds(self, walk: BlockWalk, ops: Ops, add_up: AddUp) -> Sequence[KeepThreshold]:
        """As the rule: thresholds do not depend on weights."""
        return self.unit.global_thresholds(walk, ops, add_up)

    def with_thresholds(self, thresholds: Sequence[KeepThreshold]) -> MeasuredWeights:
        """As the rule."""
        unit, build = self.unit.with_thresholds(thresholds), self.build
        return replace(self, unit=unit, build=lambda weights: build(weights).with_thresholds(thresholds))


def weigh_over_model(
    rules: dict[int, MeasuredWeights],
    tensors: Sequence[SourcedTensor],
    pool: Executor | None,
    ops: Ops,
    add_up: AddUp,
) -> dict[int, MeasuredWeights]:
    """Find the weights that follow from norms over the whole model.

    Args:
        rules: those rules of `tensors`, by position.
        tensors: all tensors of the model.
        pool, ops, add_up: as for `model_wide.measure_over_model`.

    Raises:
        MergeError: NONFINITE, a delta has no norm; DEGENERATE, the delta of a source with a word for its weight is zero.
    """
    chosen = [tensors[i] for i in rules]
    place, widest = (
        {id(tensor): at for at, tensor in enumerate(chosen)},
        max(len(rule.given) for rule in rules.values()),
    )

    def of_products(tensor: SourcedTensor) -> list[float] | None:
        found = _of_products(tensor)
        tensor.release()
        return found

    def count(each: BlockWalk) -> tuple[Any, ...]:
        # Each element is not zero in one part of the walk only, so that adding up the parts does not round.
        squares, part = np.zeros((len(chosen), widest)), [chosen[place[id(tensor)]] for tensor in each.tensors]
        known = list((map if pool is None else pool.map)(of_products, part))
        for tensor, found in zip(part, known, strict=True):
            row = _walked(replace(each, tensors=[tensor]), ops) if found is None else found
            squares[place[id(tensor)], : len(row)] = row
        return (squares,)

    (squares,) = add_up(BlockWalk(chosen, pool, all_sources=True), count)
    parts: dict[str, list[float]] = {}
    for tensor, row in zip(chosen, squares.tolist(), strict=True):
        _check_finite(tensor, row)
        for name, square in zip(tensor.source_names, row, strict=False):
            parts.setdefault(name, []).append(square)
    norms = {name: math.sqrt(math.fsum(some)) for name, some in parts.items()}
    for (i, rule), tensor in zip(rules.items(), chosen, strict=True):
        for weight, name in zip(rule.given, tensor.source_names, strict=True):
            if isinstance(weight, str) and norms[name] < _NOTHING:
                what = f"its delta is zero, so no weight gives it the size that {weight} asks for"
                raise MergeError.of("DEGENERATE", name, what, "leave it out, or write a number as its weight")
        rules[i] = rule.weighed([norms[name] for name in tensor.source_names])
    return rules


def squares_of(tensor: SourcedTensor, each: BlockWalk, ops: Ops) -> list[float]:
    """The squared Frobenius norm of each source's delta in one tensor, from factors where all have some.

    Args:
        tensor: the tensor.
        each: walks its blocks, with a row for each source.
        ops: operations on them.
    """
    found = _of_products(tensor)
    return _walked(replace(each, all_sources=True), ops) if found is None else found


def _of_products(tensor: SourcedTensor) -> list[float] | None:
    pairs = tensor.products
    return None if pairs is None else [0.0 if pair is None else product_square(*pair) for pair in pairs]


def product_square(left: Any, right: Any) -> float:
    """||B A||^2 = sum of (B^T B) * (A A^T), in float64, for B `[O, R]` and A `[R, I]`."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    return max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)


def _walked(each: BlockWalk, ops: Ops) -> list[float]:
    """The sum of the squares of each row of a tensor's blocks, correctly rounded from those of its blocks."""
    blocks = each(lambda block: ops.dropped_norms(block, [KeepThreshold()] * block.count, squares=True)[:, 0])
    return [math.fsum(row) for row in zip(*blocks, strict=True)]


def _check_finite(tensor: SourcedTensor, squares: Sequence[float]) -> None:
    for name, square in zip(tensor.source_names, squares, strict=False):
        if not math.isfinite(square):
            what = "the delta has NaN or infinite values, so that it has no norm"
            raise MergeError.of("NONFINITE", f"{name}: {tensor.name}", what, "repair the source, or give it a number")
