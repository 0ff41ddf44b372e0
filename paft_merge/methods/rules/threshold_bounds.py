"""Where a threshold must lie: a short run of the entries of a tensor in order of size, guessed from a sample of it.

Entries are ordered by magnitude, the largest first, and equal ones by position, which is the order that ranks count in. So a run
of them can be short where many are equal, as in the difference of two bfloat16 checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.blocks import NO_BITS, Ops
from paft_merge.compute.kernels import product
from paft_merge.compute.magnitudes import INFINITY, MAGNITUDE
from paft_merge.compute.scratch import SCRATCH

FOREVER = 1 << 62
"""Beyond every flat index."""

_SMALL = 1 << 16
"""Entries of one or two tiles that are too few for a sample to tell anything."""

_SAMPLED = 1 << 12, 1 << 15
"""Entries that are looked at in each tile, and in all tiles together, at least."""

_ROWS, _SAMPLED_OF_ROWS = 64, 1 << 17
"""Rows of a product that are looked at, and entries in all of them."""

_SAMPLE_ERRORS = 3.5
"""Half the width of a guessed bracket, in standard errors of the sampled share. A miss costs one more pass."""

_SAMPLE_MARGIN = 0.001
"""Half the width of a guessed bracket, as a share of the entries, at least."""

_PARTS = 64
"""Parts of a sample, whose differences tell how far off it may be."""


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

NOWHERE = Bracket(NO_BITS, 0)
"""Nothing inside, and nothing above."""


@dataclass(frozen=True)
class Sample:
    """Magnitudes of some entries of a tensor: of its tiles one after the other, or of rows from the smallest to the largest."""

    bits: Any
    """`[n, K]` uint32: of every source."""
    starts: Sequence[int] = ()
    """Flat index of each tile's first element, ascending; empty where the order is another one."""
    ends: Sequence[int] = ()
    """Where each tile ends in `bits`."""

    def inside(self, source: int, bracket: Bracket) -> float:
        """The share of a source's sampled entries that are inside a bracket."""
        bits, found, begin = self.bits[source], 0, 0
        tiles = zip(self.starts, [*self.starts[1:], FOREVER], self.ends, strict=True)
        for start, stop, end in tiles if self.starts else [(0, FOREVER, bits.size)]:
            low, width = bracket.within(start, stop)
            found += int(np.count_nonzero(bits[begin:end] - np.uint32(low) < np.uint32(width)))
            begin = end
        return float(found / bits.size)

    def error(self, source: int, least: int) -> float:
        """The standard error of the share of a source's entries that are at least `least`.

        From the differences of neighbours: parts of a sample that goes through a tensor in order are alike.
        """
        bits = self.bits[source]
        ends = bits.size * np.arange(1, _PARTS + 1) // _PARTS
        counts = np.diff(np.searchsorted(np.flatnonzero(bits >= least), ends), prepend=0)
        steps = np.diff(counts) * (_PARTS / bits.size)
        return float(np.sqrt(np.square(steps).mean() / 2 / _PARTS))


class Ranked:
    """`[K]` unsigned numbers in order of size, of which only those near one rank are put in order.

    What is near is told by a sample of them: a few per cent, or one large tie.
    """

    _REACH = 160
    """Of 4096 sampled numbers, how many on either side are near: five standard errors and more."""

    def __init__(self, bits: Any, rank: int) -> None:
        self.bits = bits
        some = np.sort(bits[:: max(1, bits.size // 4096)])
        at = (bits.size - rank) * some.size // bits.size
        self._order(some[max(at - self._REACH, 0)], some[min(at + self._REACH, some.size - 1)])

    def __call__(self, rank: int) -> tuple[int, int, int]:
        """The `rank`-th largest number, how many are larger, and how many are equal; 1 <= rank <= K."""
        if not self._larger < rank <= self._larger + self._near.size:
            self._order(0, 0xFFFFFFFF)
        near = self._near
        found = near[near.size - (rank - self._larger)]
        first, end = np.searchsorted(near, found, side="left"), np.searchsorted(near, found, side="right")
        return int(found), self._larger + near.size - int(end), int(end - first)

    def _order(self, low: Any, high: Any) -> None:
        self._near = self.bits[(self.bits >= low) & (self.bits <= high)]
        if low < high:
            self._near.sort()
        self._larger = int(np.count_nonzero(self.bits > high))


def small(numel: int, each: BlockWalk) -> bool:
    """Whether a tensor is too small for a sample, and small enough to look at all of it."""
    return each.tiles <= 2 and numel < _SMALL


def draw_sample(each: BlockWalk, ops: Ops) -> Sample:
    """Look at some entries of every tile."""
    of_each, of_all = _SAMPLED
    wanted = max(of_each, of_all // each.tiles)
    # An odd step goes through all columns of rows whose length is even, instead of through the same few.
    drawn = each(lambda b: (b.index, ops.sample(b, b.size // wanted | 1)), sample=each.tiles > 2)
    tiles = [tile for _, tile in drawn]
    ends = np.cumsum([tile.shape[1] for tile in tiles]).tolist()
    return Sample(np.concatenate(tiles, axis=1), [start for start, _ in drawn], ends)


def draw_rows(pairs: Sequence[tuple[Any, Any] | None]) -> Sample | None:
    """Look at some rows of every delta, when all of them are products of factors.

    A row's norm is known from the factors without the row, and entries differ in size as the norms of their rows do. So the rows
    that are looked at are spread evenly over the order of norms; those of a few tiles would be seven times as far off.

    Args:
        pairs: of each source, B `[O, R]` and A `[R, I]`, or None where its delta is not `B @ A`.

    Returns:
        None where there is a source without factors, or too few rows.
    """
    picked, count = [], 0
    for pair in pairs:
        if pair is None or (count := min(_ROWS, len(pair[0]) // 8)) < 16:
            return None
        left, right = pair
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is told of when it is merged
            norms = np.einsum("or,or->o", left @ (right @ right.T), left)
        rows = np.argsort(norms)[(2 * np.arange(count) + 1) * len(left) // (2 * count)]
        made = SCRATCH.array("sampled_rows", (count, right.shape[1]), np.float32)
        product(left[rows], right, made)
        step = made.size // _SAMPLED_OF_ROWS | 1
        picked.append(made.reshape(-1)[::step].view(np.uint32) & np.uint32(MAGNITUDE))
    return Sample(np.stack(picked))


def guess_bracket(sample: Sample, source: int, share: float) -> Bracket:
    """A bracket that very likely holds the last of the share `share` of a source's entries, the largest first.

    Args:
        sample: of the tensor.
        source: its row.
        share: in (0, 1).
    """
    bits = sample.bits[source]
    size = bits.size
    ranked = Ranked(bits, max(int(share * size), 1))

    def at(place: float) -> tuple[int, int]:
        """The magnitude at a place in order of size, and the tile where it is."""
        before = min(int(place), size - 1)
        value, larger, _ = ranked(before + 1)
        if not sample.starts:
            return value, 0
        equal = np.flatnonzero(bits == value)
        return value, int(np.searchsorted(sample.ends, equal[before - larger], side="right"))

    centre = max(at(share * size)[0], 1)
    # Of those that are equal there, the tiles before the threshold hold all, and the ones behind it none.
    margin = max(_SAMPLE_ERRORS * max(sample.error(source, least) for least in (centre, centre + 1)), _SAMPLE_MARGIN)
    high, first = at((share - margin) * size) if share > margin else (INFINITY - 1, 0)
    low, last = at((share + margin) * size) if share + margin < 1 else (0, -1)
    begin = sample.starts[first] if sample.starts else 0
    if low == 0:
        return Bracket(1, max(high, 1), begin)
    end = sample.starts[last + 1] if last + 1 < len(sample.starts) else FOREVER
    return Bracket(low, max(high, low) - low + 1, begin, end)


def largest(bits: Any, rank: int) -> tuple[int, int, int]:
    """The `rank`-th largest of `[K]` unsigned numbers, how many are larger, and how many are equal; 1 <= rank <= K."""
    return Ranked(bits, rank)(rank)
