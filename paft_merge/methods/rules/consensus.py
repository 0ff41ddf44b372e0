"""The rule of the TIES family: trim or drop each delta, elect a sign for every entry, add what agrees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from paft_merge.compute.blocks import Block, BlockMap, Election, KeepThreshold, Ops, Outcome
from paft_merge.methods.rules.one_pass import Settling, settling
from paft_merge.methods.rules.rule import Combine, TensorPass
from paft_merge.methods.rules.thresholds import (
    EVERYTHING,
    Trim,
    drop_survival,
    rescale_drops,
    trim_globally,
    trim_survivals,
)


@dataclass(frozen=True)
class Drop:
    """Random sparsification: each entry stays with probability `density`, by its own stream (DARE, arXiv:2311.03099)."""

    density: float
    key: int


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
    fixed: tuple[KeepThreshold, ...] | None = None
    """Thresholds that were found over the whole model; they stand in for `thin`."""

    wants: Literal["deltas"] = "deltas"
    keeps_equals: bool = True

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        survivals, election = self._survivals(walk), self._election(walk)

        def combine(block: Block, out: Any, key: int) -> Outcome:
            return walk.ops.consensus(block, out, survivals, election, key)

        return combine

    def settling(self, walk: TensorPass, pairs: Callable[[], Sequence[tuple[Any, Any] | None]]) -> Settling | None:
        """How to merge a tensor in one pass; None where its thresholds must be known before.

        `pairs`: of each active source, the factors B and A that its delta is the product of, or None.
        """
        thin = [self.thin[i] for i in walk.active]
        trims = [t for t in thin if isinstance(t, Trim)]
        if self.rescale or self.fixed is not None or len(trims) < len(thin):
            return None
        return settling(trims, self._election(walk), walk.numel, walk.each, pairs())

    def _election(self, walk: TensorPass) -> Election:
        weights = tuple(self.weights[i] for i in walk.active)
        return Election(weights, self.elect, self.tie_positive, self.normalize, self.factor)

    def over_the_model(self, numel: int, each: BlockMap, ops: Ops) -> Consensus:
        """This rule with thresholds over all tensors together: `numel` entries, every source in every block of `each`."""
        trims = [t if isinstance(t, Trim) else EVERYTHING for t in self.thin]
        return replace(self, fixed=tuple(trim_globally(trims, numel, each, ops, rescale=self.rescale)))

    def _survivals(self, walk: TensorPass) -> list[KeepThreshold]:
        if self.fixed is not None:
            return [self.fixed[i] for i in walk.active]
        thin = [self.thin[i] for i in walk.active]
        drops = [drop_survival(t.density, t.key) if isinstance(t, Drop) else KeepThreshold() for t in thin]
        if any(isinstance(t, Drop) and t.density < 1 for t in thin):
            return rescale_drops(drops, walk.each, walk.ops) if self.rescale else drops
        trims = [t if isinstance(t, Trim) else EVERYTHING for t in thin]
        if all(t.value >= 1 and t.rule != "epsilon" for t in trims):
            return drops
        return trim_survivals(trims, walk.numel, walk.each, walk.ops, rescale=self.rescale)
