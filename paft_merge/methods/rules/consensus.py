"""The rule of the TIES family: trim or drop each delta, elect a sign for every entry, add what agrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.blocks import Block, Election, KeepThreshold, Ops, Outcome
from paft_merge.methods.rules.one_pass import OnePass, plan_one_pass
from paft_merge.methods.rules.rule import Combine, Rule, TensorPass
from paft_merge.methods.rules.thresholds import (
    EVERYTHING,
    AddUp,
    Rescale,
    Trim,
    drop_survival,
    rescale_drops,
    trim_globally,
    trim_survivals,
    trim_walks,
)
from paft_merge.methods.rules.walks import COLLECT, DROP_ELECT, DROPS, ELECT, HISTOGRAM_SUMS, Walks


@dataclass(frozen=True)
class Drop:
    """Random sparsification: each entry stays with probability `density`, by its own stream (DARE, arXiv:2311.03099)."""

    density: float
    key: int


@dataclass(frozen=True)
class Consensus(Rule):
    """Trim or drop each delta, elect a sign for every entry, and add what agrees with it to the base."""

    sparsifiers: tuple[Trim | Drop, ...]
    """One a source."""
    election: Election
    rescale: Rescale = "none"
    """Scale each sparsified delta so that it keeps this norm."""
    trim_scope: Literal["tensor", "global"] = "tensor"
    """`global`: magnitudes are ranked over the whole model (TIES paper); see `model_wide.measure_over_model`."""
    fixed: tuple[KeepThreshold, ...] | None = None
    """Known thresholds, one a source; they replace the sparsifiers."""

    wants: ClassVar[Literal["deltas"]] = "deltas"

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Find the threshold of each source."""
        survivals, election = self._survivals(walk), self.election.among(walk.active)

        def combine(block: Block, out: Any, key: int) -> Outcome:
            return walk.ops.consensus(block, out, survivals, election, key)

        return combine

    def one_pass(self, walk: TensorPass) -> OnePass | None:
        """Possible for trims by rank without rescaling; see `Rule.one_pass`."""
        chosen = [self.sparsifiers[i] for i in walk.active]
        trims = [t for t in chosen if isinstance(t, Trim)]
        if self.rescale != "none" or self.fixed is not None or len(trims) < len(chosen):
            return None
        return plan_one_pass(trims, self.election.among(walk.active), walk.numel, walk.each, walk.ops, walk.factors)

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """As `_survivals` finds the thresholds."""
        chosen = [self.sparsifiers[i] for i in active]
        trims = self._trims(chosen)
        if self.fixed is None and any(isinstance(one, Drop) and one.density < 1 for one in chosen):
            return Walks(DROP_ELECT, (DROPS,) if self.rescale != "none" else ())
        if self.fixed is not None or all(trim.keeps_all(numel) for trim in trims):
            return Walks(ELECT)
        found = trim_walks(trims, numel, rescale=self.rescale)
        if self.trim_scope == "global":
            collected = [one for one in found.measuring if one is COLLECT]
            return Walks(ELECT, over_model=(HISTOGRAM_SUMS, *collected))
        return found

    @property
    def selection_weights(self) -> tuple[float, ...]:
        """Weight times lambda."""
        return self.election.factors

    def trims_by(self, trim: Trim) -> bool:
        """Whether every sparsifier is `trim`, ranked in each tensor and not rescaled."""
        plain = self.fixed is None and self.rescale == "none" and self.trim_scope == "tensor"
        return plain and all(one == trim for one in self.sparsifiers)

    @property
    def global_trims(self) -> tuple[Trim | Drop, ...] | None:
        """The sparsifiers, with `trim_scope: global`, until the thresholds are known."""
        return self.sparsifiers if self.trim_scope == "global" and self.fixed is None else None

    def global_thresholds(self, walk: BlockWalk, ops: Ops, add_up: AddUp) -> Sequence[KeepThreshold]:
        """See `thresholds.trim_globally`."""
        return trim_globally(self._trims(self.sparsifiers), walk.numel, walk, ops, rescale=self.rescale, add_up=add_up)

    def with_thresholds(self, thresholds: Sequence[KeepThreshold]) -> Consensus:
        """This rule with `fixed` thresholds."""
        return replace(self, fixed=tuple(thresholds))

    @staticmethod
    def _trims(sparsifiers: Sequence[Trim | Drop]) -> list[Trim]:
        return [t if isinstance(t, Trim) else EVERYTHING for t in sparsifiers]

    def _survivals(self, walk: TensorPass) -> list[KeepThreshold]:
        if self.fixed is not None:
            return [self.fixed[i] for i in walk.active]
        chosen = [self.sparsifiers[i] for i in walk.active]
        drops = [drop_survival(t.density, t.key) if isinstance(t, Drop) else KeepThreshold() for t in chosen]
        if any(isinstance(t, Drop) and t.density < 1 for t in chosen):
            return drops if self.rescale == "none" else rescale_drops(drops, walk.each, walk.ops, self.rescale)
        trims = self._trims(chosen)
        if all(trim.keeps_all(walk.numel) for trim in trims):
            return drops
        found = list[KeepThreshold]()
        for part, each in walk.groups:
            some, factors = [trims[k] for k in part], [partial(walk.factors, k) for k in part]
            found += trim_survivals(some, walk.numel, each, walk.ops, rescale=self.rescale, factors=factors)
        return found
