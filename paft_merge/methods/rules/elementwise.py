"""Rules that decide entry by entry what each source contributes: by nearness, by overlap, by variance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from paft_merge.compute.blocks import NOTHING, Block, BlockMap, KeepThreshold, Outcome
from paft_merge.methods.rules.rule import Combine, TensorPass, write_merged
from paft_merge.methods.rules.thresholds import Trim, trim_survivals

T = TypeVar("T")


@dataclass(frozen=True)
class NearSwap:
    """Move the base towards the only source by `t / |delta|` of the way at every entry, at most all of it."""

    t: float
    wants: Literal["deltas"] = "deltas"
    keeps_equals: bool = True

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        def combine(block: Block, out: Any, key: int) -> Outcome:
            return write_merged(walk.ops, block, walk.ops.swap(block, self.t), out, key, deltas)

        return combine


@dataclass(frozen=True)
class Overlap:
    """Add what one source alone changes, and average what several change (Reinforced Agent Merging, arXiv:2601.13572).

    An entry is changed where |delta| > epsilon. With a `boost`, what is a source's own is multiplied by
    1 + boost * min(shared / own, limit), from the source's counts of changed entries in this tensor.
    """

    epsilon: float
    boost: float = 0.0
    limit: float = 0.0
    wants: Literal["deltas"] = "deltas"
    keeps_equals: bool = True

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
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
        # A source with nothing of its own has nothing to boost; the epsilon below is mergekit's guard.
        return [
            1 + self.boost * min(max(shared / max(own, self.epsilon), 0), self.limit) for shared, own in counts.tolist()
        ]


@dataclass(frozen=True)
class Fuse:
    """Select entries by their variance over the sources, weigh each source by its energy there, and elect signs.

    SCE (arXiv:2408.07990): the `topk` share of the entries whose variance is not zero survives, the largest first; a source's
    weight is its mean square among them over the sum of those (equal weights where that sum is under 1e-6, as in mergekit);
    at each entry the deltas with the sign of their sum are averaged by weight.
    """

    sources: int
    topk: float
    wants: Literal["deltas"] = "deltas"
    keeps_equals: bool = True

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
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
        """Which variances survive."""
        spread = Derived(walk.each, lambda block: walk.ops.variance(block, self.sources))
        zeros = sum(spread(lambda block: int(walk.ops.tally(block)[0][0, 0])))
        kept = int((walk.numel - zeros) * self.topk)
        return trim_survivals([Trim("count", kept)], walk.numel, spread, walk.ops)[0] if kept > 0 else NOTHING


@dataclass(frozen=True)
class Derived:
    """Walks the blocks that are computed from another walk's (see `blocks.Each`)."""

    each: BlockMap
    derive: Callable[[Block], Block]

    @property
    def tiles(self) -> int:
        return self.each.tiles

    def __call__(
        self, work: Callable[[Block], T], *, sample: bool = False, tiles: Sequence[int] | None = None
    ) -> list[T]:
        return self.each(lambda block: work(self.derive(block)), sample=sample, tiles=tiles)
