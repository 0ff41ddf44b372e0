"""Where a threshold must lie: a short run of the entries of a tensor in order of size, guessed from a sample of it.

Entries are ordered by magnitude, the largest first, and equal ones by position, which is the order that ranks count in. So a run
of them can be short where many are equal, as in the difference of two bfloat16 checkpoints.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paft_merge.blocks import Each, Ops
from paft_merge.loops import INFINITY

FOREVER = 1 << 62
"""Beyond every flat index."""

_SMALL = 1 << 16
"""Entries of one or two tiles that are too few for a sample to tell anything."""

_SAMPLED, _SAMPLED_OF_FEW = 1 << 12, 1 << 14
"""Entries that are looked at in each tile, and in each where there are only one or two."""

_SAMPLE_ERRORS = 3.5
"""Half the width of a guessed bracket, in standard errors of the sampled share between tiles. A miss costs one more pass."""

_SAMPLE_MARGIN = 0.01
"""Half the width of a guessed bracket, as a share of the entries, where tiles are too few to tell the standard error."""


@dataclass(frozen=True)
class Bracket:
    """A run of entries in order of size.

    Inside are the magnitudes (bits) from `low` on, `width` bit patterns; but of those equal to the highest none at a flat index
    below `begin`, which are above, and of those equal to `low` none from the index `end` on, which are below.
    """

    low: int
    width: int
    begin: int = 0
    end: int = FOREVER

    def within(self, start: int, stop: int) -> tuple[int, int]:
        """Lowest bits and number of bits in the block `[start, stop)`; a block that holds `begin` or `end` has all ties inside."""
        low, high = self.low + (start >= self.end), self.low + self.width - (stop <= self.begin)
        return low, max(high - low, 0)

    @property
    def open_below(self) -> bool:
        """Whether nothing but zeros is below."""
        return self.low == 1 and self.end == FOREVER


EVERY = Bracket(1, INFINITY - 1)
"""Every finite magnitude but zero."""

NONE = Bracket(1, 0)
"""Nothing inside, and every magnitude but zero above."""

NOWHERE = Bracket(0xFFFFFFFF, 0)
"""Nothing inside, and nothing above."""


@dataclass(frozen=True)
class Sample:
    """Magnitudes of some entries of every tile of a tensor."""

    starts: Sequence[int]
    """Flat index of each tile's first element, ascending."""
    tiles: Sequence[Any]
    """`[n, K]` uint32 each: of every source."""

    def inside(self, source: int, bracket: Bracket) -> float:
        """The share of a source's sampled entries that are inside a bracket."""
        shares = []
        for start, stop, tile in zip(self.starts, [*self.starts[1:], FOREVER], self.tiles, strict=True):
            low, width = bracket.within(start, stop)
            shares.append(np.mean(tile[source] - np.uint32(low) < np.uint32(width)))
        return float(np.mean(shares))


def small(numel: int, each: Each) -> bool:
    """Whether a tensor is too small for a sample, and small enough to look at all of it."""
    return each.tiles <= 2 and numel < _SMALL


def draw_sample(each: Each, ops: Ops) -> Sample:
    """Look at some entries of every tile."""
    few = each.tiles <= 2
    wanted = _SAMPLED_OF_FEW if few else _SAMPLED
    # An odd step goes through all columns of rows whose length is even, instead of through the same few.
    drawn = each(lambda b: (b.index, ops.sample(b, b.sources.shape[1] // wanted | 1)), sample=not few)
    return Sample([start for start, _ in drawn], [tile for _, tile in drawn])


def guess_bracket(sample: Sample, source: int, share: float) -> Bracket:
    """A bracket that very likely holds the last of the share `share` of a source's entries, the largest first.

    Args:
        sample: of the tensor.
        source: its row.
        share: in (0, 1).
    """
    tiles = [tile[source] for tile in sample.tiles]
    every, sizes = np.concatenate(tiles), np.array([tile.size for tile in tiles])
    ends = np.cumsum(sizes)
    ordered, parted = every.copy(), [0, every.size]

    def at(place: float) -> tuple[int, int]:
        """The magnitude at a place in order of size, and the tile where it is."""
        rank = max(every.size - 1 - int(place), 0)
        # What was asked before has left smaller ones before it and larger ones behind.
        cut = bisect_right(parted, rank)
        part = ordered[parted[cut - 1] : parted[cut]]
        part.partition(rank - parted[cut - 1])
        insort(parted, rank)
        bits = ordered[rank]
        equal = np.flatnonzero(every == bits)
        before = int(place) - int(np.count_nonzero(every > bits))
        return int(bits), int(np.searchsorted(ends, equal[min(before, equal.size - 1)], side="right"))

    margin = _SAMPLE_MARGIN
    if len(tiles) >= 8:
        centre = max(at(share * every.size)[0], 1)
        # Of those that are equal there, the tiles before the threshold hold all, and the ones behind it none.
        counts = [np.add.reduceat(every >= bits, ends - sizes, dtype=np.int64) for bits in (centre, centre + 1)]
        error = float(np.std(counts / sizes, axis=1, ddof=1).max()) / math.sqrt(len(tiles))
        margin = max(_SAMPLE_ERRORS * error, _SAMPLE_MARGIN / 10)
    high, first = at((share - margin) * every.size) if share > margin else (INFINITY - 1, 0)
    low, last = at((share + margin) * every.size) if share + margin < 1 else (0, -1)
    if low == 0:
        return Bracket(1, max(high, 1), sample.starts[first])
    end = sample.starts[last + 1] if last + 1 < len(tiles) else FOREVER
    return Bracket(low, max(high, low) - low + 1, sample.starts[first], end)


def largest(bits: Any, rank: int) -> tuple[int, int, int]:
    """The `rank`-th largest of `[K]` unsigned numbers, how many are larger, and how many are equal; 1 <= rank <= K.

    Only what lies between two numbers of a sample is put in order, if it is there: a few per cent, or one large tie.
    """
    some = np.sort(bits[:: max(1, bits.size // 4096)])
    at = (bits.size - rank) * some.size // bits.size
    low, high = some[max(at - 96, 0)], some[min(at + 96, some.size - 1)]
    larger = int(np.count_nonzero(bits > high))
    near = bits[(bits >= low) & (bits <= high)]
    if not larger < rank <= larger + near.size:
        near, larger = bits, 0
    place = near.size - (rank - larger)
    found = np.partition(near, place)[place] if low != high or near is bits else low
    return int(found), larger + int(np.count_nonzero(near > found)), int(np.count_nonzero(near == found))
