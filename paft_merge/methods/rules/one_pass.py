"""TIES in one pass: a sample says where each threshold must lie; what lies there is set aside, and settled once it is known.

Reading a delta twice costs twice, and an adapter's is a product. Here every entry is merged as it is read, but for the
few whose magnitude is inside the sampled bracket of a source; those hold exactly the threshold (`sparsify`), and with it
the merge of each is decided. The bits are those of measuring first and merging then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paft_merge.compute.blocks import Block, BlockMap, Election, KeepThreshold, Outcome, Undecided
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.magnitudes import MAGNITUDE
from paft_merge.methods.rules.threshold_bounds import (
    EVERY,
    FOREVER,
    NONE,
    Bracket,
    draw_rows,
    draw_sample,
    guess_bracket,
    largest,
    small,
)
from paft_merge.methods.rules.thresholds import Trim, kept_count

_OPEN_AT_MOST = 0.1
"""Share of a sample that may be inside its bracket; where tiles differ so much that more is, measuring first is cheaper."""


@dataclass(frozen=True)
class Settling:
    """One tensor's brackets, and what to do once its thresholds are known."""

    ranks: tuple[int, ...]
    """Of each source's last entry kept; 0 keeps everything."""
    brackets: tuple[Bracket, ...]
    """One a source; `brackets.NONE` where it keeps everything."""
    election: Election
    numel: int

    def merge(self, block: Block, out: Any, room: Any) -> tuple[Outcome, Undecided]:
        """Write the block but for what is open; where that lies, the base. `room` `[bytes]` is for what is set aside."""
        bounds = [bracket.within(block.index, block.index + block.size) for bracket in self.brackets]
        return CpuOps().consensus_outside(block, out, bounds, self.election, room)

    def survivals(self, starts: Sequence[int], opened: Sequence[Undecided]) -> list[KeepThreshold] | None:
        """The thresholds, from what every block set aside; None when one of them is not in its bracket.

        Args:
            starts: flat index of the first element of each block, ascending.
            opened: what each of them set aside.
        """
        found = []
        for i, (rank, bracket) in enumerate(zip(self.ranks, self.brackets, strict=True)):
            bits = np.concatenate([o.inside[i] for o in opened])
            rank -= sum(int(o.above[i]) for o in opened)
            if bracket == NONE or (rank > bits.size and bracket.open_below):
                found.append(KeepThreshold())  # all of it is kept, or fewer entries than that are not zero
                continue
            if not 0 < rank <= bits.size:
                return None
            threshold, larger, _ = largest(bits, rank)
            found.append(KeepThreshold(threshold, self._cut(i, threshold, rank - larger, starts, opened)))
        return found

    def _cut(self, i: int, threshold: int, kept: int, starts: Sequence[int], opened: Sequence[Undecided]) -> int:
        """The flat index below which `kept` entries of source `i` equal the threshold: ties keep the lowest."""
        for start, stop, o in zip(starts, [*starts[1:], FOREVER], opened, strict=True):
            low, width = self.brackets[i].within(start, stop)
            if not low <= threshold < low + width:
                continue  # its ties are decided; what is set aside of them was another source's to open
            ties = o.place[(o.held[i].view(np.uint32) & np.uint32(MAGNITUDE)) == threshold]
            if ties.size >= kept:
                return start + int(ties[kept - 1]) + 1
            kept -= ties.size
        raise AssertionError("the ties of a threshold were counted and then not found")

    def settle(
        self, start: int, opened: Undecided, survivals: Sequence[KeepThreshold], out: Any, outcome: Outcome
    ) -> None:
        """Merge what a block set aside, into its merged elements `out` and its `outcome`.

        Args:
            start: flat index of the block's first element.
            opened: what `merge` set aside there.
            survivals: the thresholds.
            out, outcome: what `merge` wrote and returned.
        """
        cuts = [int(np.searchsorted(opened.place, s.low_cut - start)) for s in survivals]
        near = [KeepThreshold(s.low, cut) for s, cut in zip(survivals, cuts, strict=True)]
        merged = np.empty(opened.place.size, out.dtype)
        late = CpuOps().consensus(opened.block, merged, near, self.election, 0)
        out[opened.place] = merged
        # What the deltas are was counted when they were set aside; what is kept and elected of them only now.
        outcome.counts[:, 5:7] += late.counts[:, 5:7]
        outcome.sums[:, 2:] += late.sums[:, 2:]
        outcome.bad += late.bad - int(np.count_nonzero(~np.isfinite(opened.held[-1])))  # the base stood there before


def settling(
    trims: Sequence[Trim], election: Election, numel: int, each: BlockMap, pairs: Sequence[tuple[Any, Any] | None]
) -> Settling | None:
    """Guess the brackets of one tensor; None where measuring first is the better way.

    Args:
        trims: one a source.
        election: how what survives is merged.
        numel: entries of the tensor.
        each: walks its blocks.
        pairs: of each source, the factors that its delta is the product of, where it is one (see `brackets.draw_rows`).
    """
    ranks = [_rank(trim, numel) for trim in trims]
    known = [rank or 0 for rank in ranks]
    if None in ranks or not any(known):
        return None
    brackets = [NONE] * len(trims)
    sample = None if small(numel, each) else draw_rows(pairs) or draw_sample(each, CpuOps())
    for i, rank in enumerate(known):
        if rank:
            brackets[i] = EVERY if sample is None else guess_bracket(sample, i, rank / numel)
            if sample is not None and sample.inside(i, brackets[i]) > _OPEN_AT_MOST:
                return None
    return Settling(tuple(known), tuple(brackets), election, numel)


def _rank(trim: Trim, numel: int) -> int | None:
    """The rank of the last entry kept, 0 where all are; None where no rank says it."""
    if trim.soft or trim.rule not in ("density", "count"):
        return None
    kept = kept_count(numel, trim.value) if trim.rule == "density" else int(trim.value)
    return None if kept <= 0 else 0 if kept >= numel else kept
