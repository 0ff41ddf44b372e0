"""Rules that decide for each entry what every source contributes: by nearness, by overlap, by variance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from paft_merge.compute.blocks import NOTHING, Block, KeepThreshold, Outcome
from paft_merge.methods.rules.rule import Combine, Rule, TensorPass, write_merged
from paft_merge.methods.rules.thresholds import Trim, trim_survivals
from paft_merge.methods.rules.walks import OVERLAPS, SELECTED, TALLY, TRANSFORM, VARIANCE, Walks


@dataclass(frozen=True)
class NearSwap(Rule):
    """Move every entry of the base towards the only source by the share `t / |delta|` of the distance, at most all of it."""

    t: float

    wants: ClassVar[Literal["deltas"]] = "deltas"

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """Nothing is measured."""
        return Walks(TRANSFORM, made=1)

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Nothing is measured."""

        def combine(block: Block, out: Any, key: int) -> Outcome:
            return write_merged(walk.ops, block, walk.ops.swap(block, self.t), out, key, deltas)

        return combine


@dataclass(frozen=True)
class Overlap(Rule):
    """Add entries that one source alone changes, average those that several change (Reinforced Agent Merging, arXiv:2601.13572).

    A source changes an entry if |delta| > epsilon. With a `boost`, entries that the source alone changes are multiplied by
    1 + boost * min(shared / own, limit), from the source's counts of changed entries in this tensor.
    """

    epsilon: float
    boost: float = 0.0
    limit: float = 0.0

    wants: ClassVar[Literal["deltas"]] = "deltas"

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """With a `boost`, one walk measures."""
        return Walks(TRANSFORM, (OVERLAPS,) if self.boost else (), made=1)

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """With a `boost`, count the changed entries of each source."""
        scales = self._scales(walk) if self.boost else [1.0] * len(walk.active)

        def combine(block: Block, out: Any, key: int) -> Outcome:
            outcome = write_merged(walk.ops, block, walk.ops.share(block, self.epsilon, scales), out, key, deltas)
            counts, energy = walk.ops.overlaps(block, self.epsilon)
            outcome.counts[:, 5:7], outcome.sums[:, 2:] = counts.sum(1)[:, None], energy[:, None]
            return outcome

        return combine

    def _scales(self, walk: TensorPass) -> list[float]:
        blocks = walk.each(lambda block: walk.ops.overlaps(block, self.epsilon)[0])
        counts = np.sum(blocks, axis=0) if blocks else np.zeros((len(walk.active), 2), np.int64)
        # A source that changes no entry alone has nothing to boost; the least divisor epsilon is mergekit's.
        return [
            1 + self.boost * min(max(shared / max(own, self.epsilon), 0), self.limit) for shared, own in counts.tolist()
        ]


@dataclass(frozen=True)
class Largest(Rule):
    """At each entry the weighted delta of the largest magnitude, of equal ones the first source's (MagMax, arXiv:2407.06322)."""

    weights: tuple[float, ...]
    """Weight times lambda of each source."""

    wants: ClassVar[Literal["deltas"]] = "deltas"

    @property
    def selection_weights(self) -> tuple[float, ...]:
        """Weight times lambda."""
        return self.weights

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """Nothing is measured."""
        return Walks(TRANSFORM, made=1)

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Nothing is measured."""
        weights = [self.weights[i] for i in walk.active]

        def combine(block: Block, out: Any, key: int) -> Outcome:
            merged, won, energy = walk.ops.largest(block, weights)
            outcome = write_merged(walk.ops, block, merged, out, key, deltas)
            outcome.counts[:, 6], outcome.sums[:, 3] = won, energy
            return outcome

        return combine


@dataclass(frozen=True)
class Fuse(Rule):
    """Select entries by their variance over the sources, weight each source by its energy there, and elect signs.

    SCE (arXiv:2408.07990). Of the entries whose variance is not zero, the share `topk` with the largest survives. The weight
    of a source is its mean square among them, divided by the sum of these (equal weights if that sum is under 1e-6, as in
    mergekit). At each entry the deltas with the sign of their sum are averaged by weight.
    """

    sources: int
    topk: float

    wants: ClassVar[Literal["deltas"]] = "deltas"

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """The zeros, the threshold of the variances, the energies."""
        if self.topk >= 1:
            return Walks(TRANSFORM, (TALLY,), made=1)
        return Walks(SELECTED, (VARIANCE, VARIANCE, SELECTED), sampled=True, ties=1, made=2 + len(active))

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Find the variances that survive, then each source's energy among the selected entries."""
        selected = self._selection(walk)
        squares = walk.each(lambda block: walk.ops.tally(selected(block))[1][:, 1])
        energies = [math.fsum(block[i] for block in squares) / max(walk.numel, 1) for i in range(len(walk.active))]
        total = math.fsum(energies)
        weights = [e / total for e in energies] if total >= 1e-6 else [1 / self.sources] * len(energies)

        def combine(block: Block, out: Any, key: int) -> Outcome:
            kept = selected(block)
            merged, elected, energy = walk.ops.fuse(kept, weights)
            outcome = write_merged(walk.ops, block, merged, out, key, deltas)
            counts, sums = walk.ops.tally(kept)
            outcome.counts[:, 5], outcome.counts[:, 6] = counts[:, 5], elected
            outcome.sums[:, 2], outcome.sums[:, 3] = sums[:, 1], energy
            return outcome

        return combine

    def _selection(self, walk: TensorPass) -> Callable[[Block], Block]:
        if self.topk >= 1:
            return lambda block: block
        survival = self._survival(walk)

        def selected(block: Block) -> Block:
            return walk.ops.select(block, walk.ops.variance(block, self.sources), survival)

        return selected

    def _survival(self, walk: TensorPass) -> KeepThreshold:
        """The variances that survive."""
        spread = walk.each.derived(lambda block: walk.ops.variance(block, self.sources))
        zeros = sum(spread(lambda block: int(walk.ops.tally(block)[0][0, 0])))
        kept = int((walk.numel - zeros) * self.topk)
        return trim_survivals([Trim("count", kept)], walk.numel, spread, walk.ops)[0] if kept > 0 else NOTHING
