"""Random drops whose probability depends on an entry's rank by magnitude within its row (DELLA's MagPrune)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from paft_merge.compute.blocks import Block, Election, KeepThreshold, Outcome, RankedKeep
from paft_merge.compute.kernels import SUMS
from paft_merge.methods.rules.rule import Combine, Rule, TensorPass
from paft_merge.methods.rules.thresholds import Rescale, norm_ratio
from paft_merge.methods.rules.walks import RANKED, Walks


@dataclass(frozen=True)
class RankedDrop:
    """Keep an entry with a probability from `density - epsilon` (the smallest of its row) to `density + epsilon` (the largest).

    DELLA (arXiv:2406.11617). A density of 1 or more keeps everything, one of 0 or less nothing, whatever the epsilon.

    Raises:
        ValueError: `density` plus or minus `epsilon` leaves (0, 1).
    """

    density: float
    epsilon: float
    key: int

    def __post_init__(self) -> None:
        ends = self.density - self.epsilon, self.density + self.epsilon
        if self.random and not 0 < min(ends) <= max(ends) < 1:
            what = f"density {self.density:g} plus or minus epsilon {self.epsilon:g} must stay inside (0, 1)"
            raise ValueError(f"{what}; write a smaller epsilon")

    @property
    def random(self) -> bool:
        """Whether chance decides; else everything is kept, or nothing."""
        return 0 < self.density < 1

    def keep(self, length: int) -> RankedKeep:
        """The probabilities for rows of `length`; the entry of a row of one has no rank and is kept with the density."""
        ranks = np.linspace(0, 1, length) if length > 1 else np.full(length, 0.5)
        shares = (
            self.density - self.epsilon + ranks * 2 * self.epsilon if self.random else np.full(length, self.density)
        )
        return RankedKeep(np.rint(np.clip(shares, 0, 1) * 2**32).astype(np.uint64), self.key)


@dataclass(frozen=True)
class RankedConsensus(Rule):
    """Drop by rank, rescale, then elect and add as `consensus.Consensus` does.

    Rows run along the second dimension of a tensor, also if more dimensions follow, and a vector is one row, as in mergekit:
    in fused experts `[experts, out, in]` an entry is ranked among those of its input.
    """

    drops: tuple[RankedDrop, ...]
    election: Election
    rescale: Rescale

    wants: ClassVar[Literal["deltas"]] = "deltas"

    @property
    def selection_weights(self) -> tuple[float, ...]:
        """Weight times lambda."""
        return self.election.factors

    def row(self, shape: tuple[int, ...]) -> int:
        """Blocks must hold whole rows."""
        return max(math.prod(shape[1:] if len(shape) > 1 else shape), 1)

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """Entries are ranked in every walk."""
        drawn = self.rescale != "none" and any(self.drops[i].random for i in active)
        return Walks(RANKED, (RANKED,) if drawn else (), made=8 + 2 * len(active))

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """With `rescale`, measure the norms before and after the drops."""
        shape = walk.shape if len(walk.shape) > 1 else (1, walk.numel)
        length, inner = max(shape[1], 1), max(math.prod(shape[2:]), 1)
        drops = [self.drops[i] for i in walk.active]
        keeps = [drop.keep(length) for drop in drops]
        election = self.election.among(walk.active)

        def dropped(block: Block) -> Block:
            return walk.ops.drop_ranked(block, length, inner, keeps)

        survivals = [KeepThreshold()] * len(drops)
        if self.rescale != "none" and any(drop.random for drop in drops):
            at = SUMS.index("square" if self.rescale == "l2" else "abs")
            tallies = walk.each(
                lambda block: (walk.ops.tally(block)[1][:, at], walk.ops.tally(dropped(block))[1][:, at])
            )
            for i, drop in enumerate(drops):
                before, after = (math.fsum(part[k][i] for part in tallies) for k in (0, 1))
                survivals[i] = KeepThreshold(scale=norm_ratio(self.rescale, before, after) if drop.random else 1.0)

        def combine(block: Block, out: Any, key: int) -> Outcome:
            outcome = walk.ops.consensus(dropped(block), out, survivals, election, key)
            counts, sums = walk.ops.tally(block)
            outcome.counts[:, [0, 1, 2, 3, 4, 7]] = counts[:, [0, 1, 2, 3, 4, 7]]
            outcome.sums[:, :2] = sums[:, :2]
            return outcome

        return combine
