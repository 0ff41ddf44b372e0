"""Bounds of a threshold: a short run of a tensor's entries in order of size, guessed from a sample.

Entries are ordered by magnitude, the largest first, and equal ones by position, as ranks are. So a run can be short even if
many entries are equal, as in the difference of two bfloat16 checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
"""Tensors of one or two tiles with fewer entries are too small for a sample."""

_SAMPLED = 1 << 12, 1 << 15
"""Fewest sampled entries of each tile, and of all tiles together."""

_ROWS, _SAMPLED_OF_ROWS = 64, 1 << 17
"""Most sampled rows of a product, and sampled entries of all of them."""

_SAMPLE_ERRORS = 3.5
"""Half the width of a bracket, in standard errors of the sampled share. A miss costs one more pass."""

_SAMPLE_MARGIN = 0.001
"""Least half width of a bracket, as a share of the entries."""

_PARTS = 64
"""Parts of a sample whose differences give its standard error."""


@dataclass(frozen=True)
class Bracket:
    """A run of entries in order of size.

    Inside are the magnitudes (bits) in `[low, low + width)`, with two exceptions. Entries equal to the highest of them at a flat
    index below `begin` are above; entries equal to `low` at the index `end` or later are below.
    """

    low: int
    width: int
    begin: int = 0
    end: int = FOREVER

    def within(self, start: int, stop: int) -> tuple[int, int]:
        """Lowest bits and number of bits for the block `[start, stop)`; a block that contains `begin` or `end` has all ties inside."""
        low, high = self.low + (start >= self.end), self.low + self.width - (stop <= self.begin)
        return low, max(high - low, 0)

    @property
    def open_below(self) -> bool:
        """Whether only zeros are below."""
        return self.low == 1 and self.end == FOREVER


EVERY = Bracket(1, INFINITY - 1)
"""Every finite magnitude except zero."""

NONE = Bracket(1, 0)
"""Nothing inside, and every magnitude except zero above."""

NOWHERE = Bracket(NO_BITS, 0)
"""Nothing inside, and nothing above."""


@dataclass(frozen=True)
class Sample:
    """Magnitudes of some entries of one delta: tile by tile, or by rows from the smallest to the largest."""

    bits: Any
    """`[K]` uint32."""
    starts: Sequence[int] = ()
    """Flat index of each tile's first element, ascending; empty if the entries are sampled by rows."""
    ends: Sequence[int] = ()
    """Where each tile ends in `bits`."""

    def inside(self, bracket: Bracket) -> float:
        """The share of the sampled entries inside a bracket."""
        bits, found, begin = self.bits, 0, 0
        tiles = zip(self.starts, [*self.starts[1:], FOREVER], self.ends, strict=True)
        for start, stop, end in tiles if self.starts else [(0, FOREVER, bits.size)]:
            low, width = bracket.within(start, stop)
            found += int(np.count_nonzero(bits[begin:end] - np.uint32(low) < np.uint32(width)))
            begin = end
        return float(found / bits.size)

    def error(self, least: int) -> float:
        """The standard error of the share of entries that are at least `least`.

        It comes from the differences of neighbouring parts, because a sample in the order of the tensor varies slowly.
        """
        bits = self.bits
        ends = bits.size * np.arange(1, _PARTS + 1) // _PARTS
        counts = np.diff(np.searchsorted(np.flatnonzero(bits >= least), ends), prepend=0)
        steps = np.diff(counts) * (_PARTS / bits.size)
        return float(np.sqrt(np.square(steps).mean() / 2 / _PARTS))


class Ranked:
    """`[K]` unsigned numbers, of which only those near one rank are sorted.

    A sample selects them: a few per cent of the numbers, or one large tie.
    """

    _REACH = 160
    """Of 4096 sampled numbers, how many on either side of the rank are near: more than five standard errors."""

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
    """Whether a tensor is too small for a sample, so that all of it is read."""
    return each.tiles <= 2 and numel < _SMALL


def samples_of(
    each: BlockWalk, ops: Ops, factors: Sequence[Callable[[], tuple[Any, Any] | None]]
) -> Sequence[Callable[[], Sample]]:
    """What draws the sample of each source, one at a time where all deltas are products: 100 samples take 50 MB.

    Args:
        each, ops: the walk over the tensor, and the operations on its blocks.
        factors: for each source, what gives its factors for `draw_rows`, or None; empty if they are not known.
    """
    pairs = [known() for known in factors]
    if pairs and all(pair is not None and _sampled_rows(pair) for pair in pairs):
        return [partial(draw_rows, pair) for pair in pairs if pair]
    return [partial(lambda one: one, sample) for sample in draw_sample(each, ops)]


def draw_sample(each: BlockWalk, ops: Ops) -> list[Sample]:
    """Sample some entries of every tile, the same of each source."""
    of_each, of_all = _SAMPLED
    wanted = max(of_each, of_all // each.tiles)
    # An odd step visits all columns of rows of even length, an even step only a few of them.
    drawn = each(lambda b: (b.index, ops.sample(b, b.size // wanted | 1)), sample=each.tiles > 2)
    tiles = [tile for _, tile in drawn]
    ends = np.cumsum([tile.shape[1] for tile in tiles]).tolist()
    return [Sample(bits, [start for start, _ in drawn], ends) for bits in np.concatenate(tiles, axis=1)]


def _sampled_rows(pair: tuple[Any, Any]) -> int:
    """How many rows of a product a sample has; 0 if there are too few."""
    count = min(_ROWS, len(pair[0]) // 8)
    return count if count >= 16 else 0


def draw_rows(pair: tuple[Any, Any]) -> Sample:
    """Sample some rows of a delta that is a product of factors.

    The norm of a row follows from the factors without computing the row, and entries differ in size as the norms of their rows
    do. So the sampled rows are spread evenly over the order of norms. The rows of a few tiles would be seven times less exact.

    Args:
        pair: B `[O, R]` and A `[R, I]`, with at least 128 rows of B.
    """
    left, right = pair
    count = _sampled_rows(pair)
    with np.errstate(over="ignore", invalid="ignore"):  # the merge reports values that are not finite
        norms = np.einsum("or,or->o", left @ (right @ right.T), left)
    rows = np.argsort(norms)[(2 * np.arange(count) + 1) * len(left) // (2 * count)]
    made = SCRATCH.array("sampled_rows", (count, right.shape[1]), np.float32)
    product(left[rows], right, made)
    step = made.size // _SAMPLED_OF_ROWS | 1
    return Sample(made.reshape(-1)[::step].view(np.uint32) & np.uint32(MAGNITUDE))


def guess_bracket(sample: Sample, share: float) -> Bracket:
    """A bracket that very likely contains the last of the share `share` of a delta's entries, the largest first.

    Args:
        sample: sample of the delta.
        share: in (0, 1).
    """
    bits = sample.bits
    size = bits.size
    ranked = Ranked(bits, max(int(share * size), 1))

    def at(place: float) -> tuple[int, int]:
        """The magnitude at a place in order of size, and its tile."""
        before = min(int(place), size - 1)
        value, larger, _ = ranked(before + 1)
        if not sample.starts:
            return value, 0
        equal = np.flatnonzero(bits == value)
        return value, int(np.searchsorted(sample.ends, equal[before - larger], side="right"))

    centre = max(at(share * size)[0], 1)
    # Of the entries equal to the threshold, tiles before it contain all those kept, and tiles after it none.
    margin = max(_SAMPLE_ERRORS * max(sample.error(least) for least in (centre, centre + 1)), _SAMPLE_MARGIN)
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
