"""What a method does to one tensor, in two steps: *measure* it block by block, then *combine* block by block.

A rule knows its numbers (weights, densities, keys of random streams) and nothing of files or recipes. `prepare` reads
whatever it must know of the whole tensor and returns a function that writes one merged block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

from paft_merge.blocks import Block, Each, Election, Ops, Outcome, Survival, Tally
from paft_merge.settling import Settling, settling
from paft_merge.sparsify import EVERYTHING, Trim, drop_survival, rescale_drops, trim_globally, trim_survivals

Combine = Callable[[Block, Any, int], Outcome]
"""`combine(block, out, key)`: write the merged block into `out`; `key` is the stream of stochastic rounding, or 0."""


Wants = Literal["values", "deltas", "either", "offsets"]
"""`either`: the engine may give deltas where they are what it has. `offsets`: deltas where there is a base, else values."""


@dataclass(frozen=True)
class Drop:
    """Random sparsification: each entry stays with probability `density`, by its own stream (DARE, arXiv:2311.03099)."""

    density: float
    key: int


@dataclass(frozen=True)
class Walk:
    """One tensor as a rule sees it: its size, how to walk its blocks and what to compute on them."""

    numel: int
    each: Each
    ops: Ops
    active: Sequence[int]
    """Which sources the rows of a block's `sources` are, as indices into the rule's own tuples."""
    shape: tuple[int, ...] = ()
    """Of the tensor; rules by rows need it."""


class Rule(Protocol):
    """The law of one merged tensor."""

    @property
    def wants(self) -> Wants:
        """What a block's sources have to be."""

    @property
    def keeps_equals(self) -> bool:
        """Whether sources that are all equal (to the base too, where there is one) come out as they went in."""

    def prepare(self, walk: Walk, deltas: bool) -> Combine:
        """Measure the tensor. `deltas`: the blocks hold deltas or, with `subtract`, stand for them."""


@runtime_checkable
class ByRow(Protocol):
    """A rule whose blocks must hold whole rows."""

    def row(self, shape: tuple[int, ...]) -> int:
        """Elements that must not be parted, for a tensor of `shape`."""


def row_of(rule: object, shape: tuple[int, ...]) -> int:
    """Elements that `rule` wants together in one block."""
    return rule.row(shape) if isinstance(rule, ByRow) else 1


def write_merged(ops: Ops, block: Block, merged: Block, out: Any, key: int, deltas: bool) -> Outcome:
    """Write a computed row, on top of the base if it is a delta, and tally the block it was computed from."""
    outcome = ops.blend(merged, out, 1.0 if deltas else 0.0, [1.0], key, False)
    if deltas:
        return Outcome(outcome.bad, *ops.tally(block))
    nothing = Tally.empty(block.count)
    return Outcome(outcome.bad, nothing.counts, nothing.total())


@dataclass(frozen=True)
class WeightedSum:
    """Sum of weight times source, over values (linear) or over deltas on top of the base (task arithmetic)."""

    weights: tuple[float, ...]
    of: Literal["values", "deltas"]

    @property
    def wants(self) -> Wants:
        return "either" if self.of == "values" else "deltas"

    @property
    def keeps_equals(self) -> bool:
        return self.of == "deltas" or abs(math.fsum(self.weights) - 1) < 1e-6

    def prepare(self, walk: Walk, deltas: bool) -> Combine:
        weights = [self.weights[i] for i in walk.active]
        # A sum of values that share a base is that base times all weights, plus the weighted deltas.
        base = 1.0 if self.of == "deltas" else math.fsum(self.weights) if deltas else 0.0

        def combine(block: Block, out: Any, key: int) -> Outcome:
            return walk.ops.blend(block, out, base, weights, key, deltas)

        return combine


@dataclass(frozen=True)
class Consensus:
    """Trim or drop each delta, elect a sign for every entry, and add what agrees with it to the base.

    elect      `weighted`    sign of the sum of weight * delta (mergekit)
               `unweighted`  sign of the sum of deltas (the TIES paper, and PEFT)
               `count`       sign of the sum of signs (PAFT's formula; PEFT's "frequency")
               `none`        every surviving entry is kept
    normalize  `weights`     divide by the weights of what was kept at that entry (mergekit)
               `count`       divide by how many were kept (the TIES paper, and PEFT)
               `none`        plain sum

    With `weighted` an entry agrees when weight * delta has the elected sign, with the others when the delta itself has it.
    """

    weights: tuple[float, ...]
    thin: tuple[Trim | Drop, ...]
    elect: Literal["weighted", "unweighted", "count", "none"] = "weighted"
    tie_positive: bool = True
    normalize: Literal["weights", "count", "none"] = "weights"
    factor: float = 1.0
    rescale: bool = False
    trim_scope: Literal["tensor", "global"] = "tensor"
    """`global`: magnitudes are ranked over the whole model (TIES paper), so `over_the_model` comes before `prepare`."""
    fixed: tuple[Survival, ...] | None = None
    """Thresholds that were found over the whole model; they stand in for `thin`."""

    wants: Literal["deltas"] = "deltas"
    keeps_equals: bool = True

    def prepare(self, walk: Walk, deltas: bool) -> Combine:
        survivals, election = self._survivals(walk), self._election(walk)

        def combine(block: Block, out: Any, key: int) -> Outcome:
            return walk.ops.consensus(block, out, survivals, election, key)

        return combine

    def settling(self, walk: Walk, pairs: Callable[[], Sequence[tuple[Any, Any] | None]]) -> Settling | None:
        """How to merge a tensor in one pass; None where its thresholds must be known before.

        `pairs`: of each active source, the factors B and A that its delta is the product of, or None.
        """
        thin = [self.thin[i] for i in walk.active]
        trims = [t for t in thin if isinstance(t, Trim)]
        if self.rescale or self.fixed is not None or len(trims) < len(thin):
            return None
        return settling(trims, self._election(walk), walk.numel, walk.each, pairs())

    def _election(self, walk: Walk) -> Election:
        weights = tuple(self.weights[i] for i in walk.active)
        return Election(weights, self.elect, self.tie_positive, self.normalize, self.factor)

    def over_the_model(self, numel: int, each: Each, ops: Ops) -> Consensus:
        """This rule with thresholds over all tensors together: `numel` entries, every source in every block of `each`."""
        trims = [t if isinstance(t, Trim) else EVERYTHING for t in self.thin]
        return replace(self, fixed=tuple(trim_globally(trims, numel, each, ops, rescale=self.rescale)))

    def _survivals(self, walk: Walk) -> list[Survival]:
        if self.fixed is not None:
            return [self.fixed[i] for i in walk.active]
        thin = [self.thin[i] for i in walk.active]
        drops = [drop_survival(t.density, t.key) if isinstance(t, Drop) else Survival() for t in thin]
        if any(isinstance(t, Drop) and t.density < 1 for t in thin):
            return rescale_drops(drops, walk.each, walk.ops) if self.rescale else drops
        trims = [t if isinstance(t, Trim) else EVERYTHING for t in thin]
        if all(t.value >= 1 and t.rule != "epsilon" for t in trims):
            return drops
        return trim_survivals(trims, walk.numel, walk.each, walk.ops, rescale=self.rescale)
