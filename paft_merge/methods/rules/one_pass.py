"""TIES in one pass: a sample bounds each threshold, entries near a threshold are set aside, and merged once it is known.

Reading a delta twice costs twice, and an adapter's delta is a product. So every entry is merged as it is read, except the few
whose magnitude is inside the sampled bracket of a source. Those entries hold the exact threshold (see `thresholds`), which then
decides how each of them is merged. The bits are those of measuring first and merging then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.blocks import Block, DeferringOps, Election, KeepThreshold, Ops, Outcome, Undecided
from paft_merge.compute.magnitudes import MAGNITUDE
from paft_merge.methods.rules.threshold_bounds import (
    EVERY,
    FOREVER,
    NONE,
    Bracket,
    guess_bracket,
    largest,
    samples_of,
    small,
)
from paft_merge.methods.rules.thresholds import Trim

_MOST_UNDECIDED = 0.1
"""Share of a sample that may be inside its bracket. Tiles that differ more are measured first, which is cheaper."""

_MOST_COPIED = 2.0
"""Most numbers that undecided entries take for each entry of a tensor: the deltas of every source, which are merged once more."""

_MOST_HELD = 128 << 20
"""Bytes of the undecided entries of one tensor. With many sources nearly every entry is undecided for one of them."""


@dataclass(frozen=True)
class OnePass:
    """The brackets of one tensor, and how its undecided entries are merged once its thresholds are known."""

    ranks: tuple[int, ...]
    """Rank of each source's last kept entry; 0 keeps everything."""
    brackets: tuple[Bracket, ...]
    """One a source; `threshold_bounds.NONE` if it keeps everything."""
    election: Election
    ops: DeferringOps
    held_bytes: int = 0
    """Most bytes that the undecided entries are expected to take; 0 if all of them may be undecided."""

    def merge(self, block: Block, out: Any, memory: Any) -> tuple[Outcome, Undecided]:
        """Write the merged block, with the base at undecided entries.

        Args:
            block: deltas, with the base.
            out: `[E]`, receives the merged elements.
            memory: `[bytes]` uint8 to hold the undecided entries; what does not fit is allocated.
        """
        bounds = self.bounds(block.index, block.index + block.size)
        return self.ops.consensus_outside(block, out, bounds, self.election, memory)

    def bounds(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Lowest bits and number of bits of each source's bracket in the block `[start, stop)`."""
        return [bracket.within(start, stop) for bracket in self.brackets]

    def thresholds(self, starts: Sequence[int], undecided: Sequence[Undecided]) -> list[KeepThreshold] | None:
        """The threshold of each source; None if one of them is outside its bracket.

        Args:
            starts: flat index of the first element of each block, ascending.
            undecided: the undecided entries of each block.
        """
        found = []
        for i, (rank, bracket) in enumerate(zip(self.ranks, self.brackets, strict=True)):
            bits = np.concatenate([u.inside[i] for u in undecided])
            rank -= sum(int(u.above[i]) for u in undecided)
            if bracket == NONE or (rank > bits.size and bracket.open_below):
                found.append(KeepThreshold())  # everything is kept, or fewer than `rank` entries are not zero
                continue
            if not 0 < rank <= bits.size:
                return None
            threshold, larger, _ = largest(bits, rank)
            found.append(KeepThreshold(threshold, self._cut(i, threshold, rank - larger, starts, undecided)))
        return found

    def _cut(self, i: int, threshold: int, kept: int, starts: Sequence[int], undecided: Sequence[Undecided]) -> int:
        """The flat index below which `kept` entries of source `i` equal the threshold: ties keep the lowest."""
        for start, stop, u in zip(starts, [*starts[1:], FOREVER], undecided, strict=True):
            low, width = self.brackets[i].within(start, stop)
            if not low <= threshold < low + width:
                continue  # the ties of this block are decided; those set aside are undecided for another source
            ties = u.place[(u.held[i].view(np.uint32) & np.uint32(MAGNITUDE)) == threshold]
            if ties.size >= kept:
                return start + int(ties[kept - 1]) + 1
            kept -= ties.size
        raise AssertionError("the ties of a threshold were counted and then not found")

    def resolve(
        self, start: int, undecided: Undecided, thresholds: Sequence[KeepThreshold], out: Any, outcome: Outcome
    ) -> None:
        """Merge the undecided entries of a block.

        Args:
            start: flat index of the block's first element.
            undecided: its entries, from `merge`.
            thresholds: one a source, from `thresholds`.
            out, outcome: what `merge` wrote and returned; both are updated.
        """
        out[undecided.place] = self.resolved(start, undecided, thresholds, outcome, out.dtype)

    def resolved(
        self, start: int, undecided: Undecided, thresholds: Sequence[KeepThreshold], outcome: Outcome, dtype: Any
    ) -> Any:
        """The merged elements at the undecided entries, as bits of `dtype`; see `resolve`."""
        merged = np.empty(undecided.place.size, dtype)
        second = self.ops.consensus(undecided.block, merged, undecided.within(start, thresholds), self.election, 0)
        # `merge` counted the deltas of these entries, but not how many are kept and elected.
        outcome.counts[:, 5:7] += second.counts[:, 5:7]
        outcome.sums[:, 2:] += second.sums[:, 2:]
        # And it counted the elements of the base that are not finite, as it wrote the base there.
        outcome.bad += second.bad - int(np.count_nonzero(~np.isfinite(undecided.held[-1])))
        return merged


def plan_one_pass(
    trims: Sequence[Trim],
    election: Election,
    numel: int,
    each: BlockWalk,
    ops: Ops,
    factors: Callable[[int], tuple[Any, Any] | None],
) -> OnePass | None:
    """Guess the brackets of one tensor; None if one pass is impossible, or measuring first is cheaper.

    Args:
        trims: one a source.
        election: how the kept entries are merged.
        numel: entries of the tensor.
        each: walks its blocks.
        ops: operations on them.
        factors: called where a sample is needed; see `TensorPass.factors`.
    """
    deferring = ops.deferring
    ranks = [_last_kept(trim, numel) for trim in trims]
    known = [rank or 0 for rank in ranks]
    if deferring is None or None in ranks or not any(known):
        return None
    brackets = [NONE] * len(trims)
    samples, undecided = (
        None if small(numel, each) else samples_of(each, ops, [partial(factors, i) for i in range(len(trims))]),
        0.0,
    )
    for i, rank in enumerate(known):
        if rank and samples is None:
            brackets[i] = EVERY
        elif rank and samples is not None:
            sample = samples[i]()
            brackets[i] = guess_bracket(sample, rank / numel)
            inside = sample.inside(brackets[i])
            undecided += inside
            if inside > _MOST_UNDECIDED or undecided * (len(trims) + 2) > _MOST_COPIED:
                return None
    held = int(min(undecided, 1.0) * numel) * 4 * (len(trims) + 2)  # a place, the deltas and the base
    return None if held > _MOST_HELD else OnePass(tuple(known), tuple(brackets), election, deferring, held)


def _last_kept(trim: Trim, numel: int) -> int | None:
    """The rank of the last entry kept, 0 if all are kept; None if nothing is kept or no rank decides."""
    if trim.soft or trim.rule not in ("density", "count"):
        return None
    ranks = trim.ranks(numel)
    return ranks[0] if ranks else 0 if trim.keeps_all(numel) else None
