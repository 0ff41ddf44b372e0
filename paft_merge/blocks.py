"""A block of a tensor, and what can be computed on one: the operations that a method is built from.

A tensor is walked in *tiles* that depend on its shape alone; a block is one tile's elements from the base and from every
source. Sums are taken tile by tile and added in tile order, and each low-rank product is one call per tile, so the merged
bits do not depend on threads, memory, shards or how many tiles somebody handles at a time.

Shapes: E elements of a block, n sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from paft_merge import loops
from paft_merge.loops import lines
from paft_merge.loops.feed import FULL, Feed
from paft_merge.scratch import SCRATCH

T = TypeVar("T")
Counts = NDArray[np.int64]
Sums = NDArray[np.float64]

TILE = 1 << 21
"""Elements of a tile, about: large beside the cost of a call, small beside memory; caches see its pieces (see `loops.feed`)."""


def tile_bounds(numel: int, row: int) -> list[tuple[int, int]]:
    """Flat `[start, stop)` of every tile of a tensor of `numel` elements in rows of `row`.

    A tile is a whole number of rows, and of 16 rows where it can be, which keeps every factor of a low-rank product aligned.
    """
    rows = max(1, TILE // row)
    rows = rows // 16 * 16 if rows >= 16 else rows
    step = rows * row
    return [(start, min(start + step, numel)) for start in range(0, numel, step)]


def sample_end(start: int, stop: int, row: int) -> int:
    """Where a sample of the tile `[start, stop)` ends: a whole number of its rows of `row`, and one at least.

    One row of 16, as rows of an adapter's delta differ more than entries of a row do; one entry of 32 where rows are single ones.
    """
    return start + max(1, (stop - start) // row // (32 if row == 1 else 16)) * row


NOT_PICKED = 1, np.empty((1, 0), np.uint32), np.zeros(1, np.int64)
"""The `picking` of a block of which nothing is wanted."""


class Block:
    """One tile of the base and of the sources, as bits (see `loops`) or, on another device, as float32 tensors.

    Args:
        index: flat index of the first element in its tensor.
        base: `[E]`, or `[0]` where the merge has no base; `[0]` of its type where `feed` makes all of the block.
        sources: `[n, E]`: values, or deltas; `[n, 0]` likewise.
        subtract: the sources are values and the method wants their deltas.
        feed: what fills the arrays when they are first looked at, or, piece by piece, while a loop walks them (see `unfilled`).
    """

    __slots__ = ("_base", "_feed", "_sources", "index", "picking", "size", "subtract")

    def __init__(self, index: int, base: Any, sources: Any, subtract: bool, feed: Feed | None = None) -> None:
        self.index, self.subtract = index, subtract
        self._base, self._sources, self._feed = base, sources, feed
        self.size = feed.size if feed is not None else int(sources.shape[1])
        """E."""
        self.picking: tuple[int, Any, Any] = NOT_PICKED
        """What a loop that writes the block takes of it for a sample: `stride`, `picked`, `taken` of `loops.kernels.blend`."""

    @property
    def base(self) -> Any:
        self._fill()
        return self._base

    @property
    def sources(self) -> Any:
        self._fill()
        return self._sources

    @property
    def count(self) -> int:
        """n."""
        return len(self._sources)

    def unfilled(self, only: int | None = None) -> tuple[Any, Any, bool, Any]:
        """Base, sources, `subtract` and what fills them, for a loop that walks the whole block; then tell `filled`.

        `only`: the one source that the loop looks at; the others stay as they are.
        """
        if self._feed is None:
            return self._base, self._sources, self.subtract, FULL
        arrays = self._arrays(self._feed.piece) if self._made else (self._base, self._sources)
        return *arrays, self.subtract, self._feed.how(*arrays, only)

    def filled(self, result: int) -> int:
        """`result` of such a loop, where it is not negative.

        Raises:
            PaftMergeError: what the block is made of cannot be read.
        """
        if result < 0 and self._feed is not None:
            self._feed.explain()
        if not self._made:
            self._feed = None
        return result

    def _fill(self) -> None:
        if self._feed is not None:
            if self._made:
                self._base, self._sources = self._arrays(self.size)
            self._feed.fill(self._base, self._sources)
            self._feed = None

    @property
    def _made(self) -> bool:
        """Whether the feed makes all of the block, so that a piece of memory does."""
        return self._feed is not None and self._sources.shape[1] < self.size

    def _arrays(self, size: int) -> tuple[Any, Any]:
        """Memory of this thread for so many entries."""
        assert self._feed is not None
        base = SCRATCH.array("base", size if self._feed.has_base else 0, self._base.dtype)
        return base, SCRATCH.array("sources", (self.count, size), self._sources.dtype)


@dataclass(frozen=True)
class Survival:
    """Which entries of one delta survive, and what becomes of them. The default keeps everything as it is.

    An entry survives when its magnitude (float32 bits) is above `low`, or equal to it at a flat index below `low_cut`;
    unless it passes `high` in the same way; and when its hash stays below `keep`.
    """

    low: int = 0
    low_cut: int = 0
    high: int = 0xFFFFFFFF
    high_cut: int = 0
    keep: int = 1 << 32
    key: int = 0
    shrink: float = 0.0
    scale: float = 1.0


NOTHING = Survival(low=0xFFFFFFFF)


@dataclass
class Tally:
    """What a merge saw of each source's delta of one tensor, gathered block by block (columns: `loops.COUNTS`, `SUMS`)."""

    counts: Counts
    sums: list[Sums] = field(default_factory=list)

    @classmethod
    def empty(cls, sources: int) -> Tally:
        return cls(np.zeros((sources, len(loops.COUNTS)), np.int64))

    def add(self, counts: Counts, sums: Sums) -> None:
        """Add one block; blocks must come in tile order, because their sums are rounded."""
        largest = np.maximum(self.counts[:, -1], counts[:, -1])
        self.counts += counts
        self.counts[:, -1] = largest
        self.sums.append(sums)

    def total(self) -> Sums:
        """`[n, 4]` float64: the correctly rounded sum over the blocks, so that their order cannot matter."""
        if not self.sums:
            return np.zeros((len(self.counts), len(loops.SUMS)))
        stacked = np.stack(self.sums)
        return np.array(
            [[math.fsum(stacked[:, i, k]) for k in range(stacked.shape[2])] for i in range(stacked.shape[1])]
        )


@dataclass(frozen=True)
class RankedKeep:
    """How likely an entry of each rank stays: below `keep[rank]` of 2**32 (rank 0 is the smallest of a row), by `key`'s hash."""

    keep: NDArray[np.uint64]
    key: int


@dataclass(frozen=True)
class Election:
    """How what survives of the deltas becomes one delta; see `methods.Consensus` for the words."""

    weights: tuple[float, ...]
    elect: str
    tie_positive: bool
    normalize: str
    factor: float


class Ops(Protocol):
    """The operations on a block, for one kind of device."""

    def sample(self, block: Block, step: int) -> Any: ...
    def histogram(self, block: Block, lows: bool) -> tuple[Counts, Counts]: ...
    def collect(self, block: Block, low: Sequence[int], width: Sequence[int]) -> tuple[Counts, list[Any]]: ...
    def locate(self, block: Block, source: int, bits: int, nth: int) -> int: ...
    def dropped_l1(self, block: Block, survivals: Sequence[Survival]) -> Sums: ...
    def gram(self, block: Block) -> Sums: ...
    def blend(
        self, block: Block, out: Any, base_weight: float, weights: Sequence[float], key: int, tally: bool
    ) -> Outcome: ...
    def consensus(
        self, block: Block, out: Any, survivals: Sequence[Survival], election: Election, key: int
    ) -> Outcome: ...

    # From one block to another, for the rarer methods.
    def tally(self, block: Block) -> tuple[Counts, Sums]: ...
    def variance(self, block: Block, total: int) -> Block: ...
    def select(self, block: Block, by: Block, survival: Survival) -> Block: ...
    def swap(self, block: Block, t: float) -> Block: ...
    def overlaps(self, block: Block, epsilon: float) -> tuple[Counts, Sums]: ...
    def share(self, block: Block, epsilon: float, scales: Sequence[float]) -> Block: ...
    def fuse(self, block: Block, weights: Sequence[float]) -> tuple[Block, Counts, Sums]: ...
    def drop_ranked(self, block: Block, length: int, inner: int, drops: Sequence[RankedKeep]) -> Block: ...
    def gram_rows(self, block: Block, row: int) -> Sums: ...
    def gram_columns(self, block: Block, row: int) -> Sums: ...
    def mix(self, block: Block, weights: Any, row: int, *, across: bool) -> Block: ...


@dataclass(slots=True)
class Outcome:
    """What writing one block showed: how many results are not finite, and the block's share of the tally."""

    bad: int
    counts: Counts
    sums: Sums


@dataclass(slots=True)
class Open:
    """The entries of a block of which nobody can say yet what survives, because a source lies inside its bracket there."""

    place: NDArray[np.int32]
    """`[K]`: positions in the block, ascending."""
    held: list[NDArray[np.float32]]
    """`[K]` each: the deltas of the sources there and, last, the base."""
    inside: list[NDArray[np.uint32]]
    """Of each source, the magnitudes inside its bracket."""
    above: Counts
    """`[n]`: how many entries of the block lie above each source's bracket."""

    @property
    def block(self) -> Block:
        """These entries one beside the other, as a block at flat index 0."""
        *sources, base = [row.view(np.uint32) for row in self.held]
        return Block(0, base, np.stack(sources), subtract=False)


class Each(Protocol):
    """Runs a function on every block of a tensor and returns the results in tile order."""

    @property
    def tiles(self) -> int:
        """How many tiles the tensor has."""

    def __call__(
        self, work: Callable[[Block], T], *, sample: bool = False, tiles: Sequence[int] | None = None
    ) -> list[T]:
        """`sample`: on a small part of each tile's rows only. `tiles`: on these tiles only."""


class CpuOps:
    """The operations by `loops`: blocks are NumPy bits."""

    def sample(self, block: Block, step: int) -> NDArray[np.uint32]:
        """The magnitudes of every `step`-th entry, `[n, ceil(E / step)]`."""
        rows, base = block.sources[:, ::step], block.base[::step]
        made = np.empty(rows.shape, np.uint32)
        _widen(rows, made)
        if block.subtract:
            below = SCRATCH.array("sampled_base", base.size, np.uint32)
            _widen(base, below)
            made.view(np.float32)[:] -= below.view(np.float32)
        made &= np.uint32(0x7FFFFFFF)
        return made

    def histogram(self, block: Block, lows: bool) -> tuple[Counts, Counts]:
        """Counts by the upper 15 bits of magnitude, `[n, BINS]`, and the sums of the lower 16 bits (or `[n, 0]`)."""
        n = block.count
        counts = np.zeros((n, loops.BINS), np.int64)
        low = np.zeros((n, loops.BINS if lows else 0), np.int64)
        block.filled(loops.histogram(*block.unfilled(), counts, low, lines(2)))
        return counts, low

    def collect(self, block: Block, low: Sequence[int], width: Sequence[int]) -> tuple[Counts, list[Any]]:
        """Per source: how many magnitudes lie inside `[low, low + width)` and above it, `[n, 2]`; and those inside."""
        n, size = block.count, block.size
        found, counts = SCRATCH.array("found", (n, size), np.uint32), np.empty((n, 2), np.int64)
        bounds = np.array(low, np.uint32), np.array(width, np.uint32)
        block.filled(loops.collect(*block.unfilled(), *bounds, found, counts, lines(2)))
        return counts, [row[:inside].copy() for row, inside in zip(found, counts[:, 0], strict=True)]

    def locate(self, block: Block, source: int, bits: int, nth: int) -> int:
        """Flat index in the tensor of the `nth` entry (from 0) of the block whose magnitude is exactly `bits`."""
        at = loops.locate(*block.unfilled(source), source, np.uint32(bits), nth, lines(2))
        if at < 0:
            block.filled(at)
        assert at < block.size
        return block.index + at

    def dropped_l1(self, block: Block, survivals: Sequence[Survival]) -> Sums:
        """`[n, 2]`: the sums of |delta| before and after the random drop of each survival."""
        sums = np.empty((block.count, 2))
        keep = np.array([s.keep for s in survivals], np.uint64)
        keys = np.array([s.key for s in survivals], np.uint64)
        memory = _strips(2, 2 * len(sums))
        block.filled(loops.dropped_l1(*block.unfilled(), block.index, keep, keys, sums, *memory))
        return sums

    def gram(self, block: Block) -> Sums:
        """`[n, n]`: inner products of the sources (or deltas)."""
        n = block.count
        out = np.empty((n, n))
        block.filled(loops.gram(*block.unfilled(), out, *_strips(n + 1, n * n)))
        return out

    def blend(
        self, block: Block, out: Any, base_weight: float, weights: Sequence[float], key: int, tally: bool
    ) -> Outcome:
        """Write `base_weight * base + sum weights_i * source_i` (see `loops.kernels.blend`)."""
        outcome = _no_outcome(block.count)
        outcome.bad = block.filled(loops.blend(
            out, *block.unfilled(), block.index, float(base_weight), np.array(weights, np.float32),
            np.uint64(key), tally, outcome.counts, outcome.sums, *block.picking, lines(4),
        ))  # fmt: skip
        return outcome

    def consensus(self, block: Block, out: Any, survivals: Sequence[Survival], election: Election, key: int) -> Outcome:
        """Write the base plus the elected delta (see `loops.kernels.consensus`)."""
        return _consensus(block, out, survivals, election, key)[0]

    def consensus_outside(
        self, block: Block, out: Any, brackets: Sequence[tuple[int, int]], election: Election, room: Any
    ) -> tuple[Outcome, Open]:
        """Write what magnitudes outside the brackets decide, and set the rest aside; where they lie, `out` is the base.

        Args:
            brackets: lowest bits, at least 1, and number of bits, one a source. What is above survives, what is below does not.
            room: `[bytes]`, memory for what is set aside; beyond it there is fresh memory.
        """
        above = [Survival(low=low + width - 1) for low, width in brackets]
        outcome, opened = _consensus(block, out, above, election, 0, brackets, room)
        assert opened is not None
        return outcome, opened

    def tally(self, block: Block) -> tuple[Counts, Sums]:
        """The block's share of a tally, of deltas that are merged as they are (see `loops.mixing.tally`)."""
        outcome = _no_outcome(len(block.sources))
        loops.tally(block.base, block.sources, block.subtract, outcome.counts, outcome.sums, lines(2))
        return outcome.counts, outcome.sums

    def variance(self, block: Block, total: int) -> Block:
        """One row: every entry's variance over `total` sources, those that are not here being zero."""
        out = _one_row(block)
        made, memory = out.sources[0].view(np.float32), _strips(len(block.sources) + 1, 2)
        loops.variance(block.base, block.sources, block.subtract, total, made, *memory)
        return out

    def select(self, block: Block, by: Block, survival: Survival) -> Block:
        """The deltas where the only row of `by`, which is not negative, survives by its size; zero elsewhere."""
        out = np.empty(block.sources.shape, np.float32)
        bounds = np.uint32(survival.low), survival.low_cut
        loops.select(block.base, block.sources, block.subtract, block.index, by.sources[0], *bounds, out, lines(2))
        return Block(block.index, block.base, out.view(np.uint32), subtract=False)

    def swap(self, block: Block, t: float) -> Block:
        """One row: the delta of the only source, cut to what is near (see `loops.mixing.swap`)."""
        out = _one_row(block)
        loops.swap(block.base, block.sources, block.subtract, float(t), out.sources[0].view(np.float32), lines(2))
        return out

    def overlaps(self, block: Block, epsilon: float) -> tuple[Counts, Sums]:
        """Changed entries `[n, 2]`, shared ones and the source's own, and the sum of their squares `[n]`."""
        counts, energy = np.zeros((len(block.sources), 2), np.int64), np.zeros(len(block.sources))
        memory = _strips(len(counts) + 3, len(counts))
        loops.overlaps(block.base, block.sources, block.subtract, float(epsilon), counts, energy, *memory)
        return counts, energy

    def share(self, block: Block, epsilon: float, scales: Sequence[float]) -> Block:
        """One row: own changes times `scales`, shared ones averaged (see `loops.mixing.share`)."""
        out, own = _one_row(block), np.array(scales, np.float32)
        made, memory = out.sources[0].view(np.float32), lines(len(own) + 3)
        loops.share(block.base, block.sources, block.subtract, float(epsilon), own, made, memory)
        return out

    def fuse(self, block: Block, weights: Sequence[float]) -> tuple[Block, Counts, Sums]:
        """One row: the elected weighted mean of deltas; and, `[n]` each, how many were elected and their squares' sum."""
        n = len(block.sources)
        out, elected, energy = _one_row(block), np.zeros(n, np.int64), np.zeros(n)
        merged, own = out.sources[0].view(np.float32), np.array(weights, np.float32)
        loops.fuse(block.base, block.sources, block.subtract, own, merged, elected, energy, *_strips(n + 4, n))
        return out, elected, energy

    def drop_ranked(self, block: Block, length: int, inner: int, drops: Sequence[RankedKeep]) -> Block:
        """Drop entries of each source by their rank among `length` entries that lie `inner` apart; ties rank by position."""
        deltas = (
            np.stack([_as_float32(row) for row in block.sources])
            if len(block.sources)
            else np.empty((0, 0), np.float32)
        )
        if block.subtract:
            deltas -= _as_float32(block.base)
        out = np.empty_like(deltas)
        places = np.arange(length, dtype=np.uint64)
        for row, kept, drop in zip(deltas, out, drops, strict=True):
            magnitudes = (row.view(np.uint32) & np.uint32(0x7FFFFFFF)).reshape(-1, length, inner).swapaxes(1, 2)
            order = np.sort(np.ascontiguousarray((magnitudes.astype(np.uint64) << np.uint64(32)) | places)).reshape(
                -1, length
            )
            loops.keep_ranked(row, order, inner, block.index, drop.keep, np.uint64(drop.key), kept)
        return Block(block.index, block.base, out.view(np.uint32), subtract=False)

    def gram_rows(self, block: Block, row: int) -> Sums:
        """`[E / row, n, n]`: inner products of the sources within every row."""
        n, size = block.sources.shape
        out = np.zeros((size // row, n, n))
        loops.gram_rows(block.base, block.sources, block.subtract, row, out, *_strips(n + 1, n * n))
        return out

    def gram_columns(self, block: Block, row: int) -> Sums:
        """`[n, n, row]`: inner products of the sources within every column of the block's rows."""
        out = np.zeros((*[len(block.sources)] * 2, row))
        loops.gram_columns(block.base, block.sources, block.subtract, row, out, lines(len(out) + 1))
        return out

    def mix(self, block: Block, weights: Any, row: int, *, across: bool) -> Block:
        """One row: the weighted sum with weights `[n, E / row]`, one a row, or `[n, row]` with `across`, one a column."""
        out, own = _one_row(block), np.ascontiguousarray(weights, np.float32)
        made = out.sources[0].view(np.float32)
        loops.mix(block.base, block.sources, block.subtract, row, across, own, made, lines(3))
        return out


def _consensus(
    block: Block,
    out: Any,
    survivals: Sequence[Survival],
    election: Election,
    key: int,
    brackets: Sequence[tuple[int, int]] | None = None,
    room: Any = None,
) -> tuple[Outcome, Open | None]:
    n, size = block.count, block.size
    outcome, most, tally = _no_outcome(n), size if brackets is not None else 0, np.zeros((n + 1, 2), np.int64)
    place = SCRATCH.array("open_place", most, np.int32)
    held = SCRATCH.array("open_held", (n + 1, most), np.float32)
    found = SCRATCH.array("found", (n, most), np.uint32)

    def column(name: str, dtype: Any) -> Any:
        return np.array([getattr(s, name) for s in survivals], dtype)

    lows, widths = zip(*brackets, strict=True) if brackets else ([0] * n, [0] * n)
    outcome.bad = block.filled(loops.consensus(
        out, *block.unfilled(), block.index,
        np.array(election.weights, np.float32), column("scale", np.float32),
        column("low", np.uint32), column("low_cut", np.int64), column("high", np.uint32), column("high_cut", np.int64),
        column("shrink", np.float32), column("keep", np.uint64), column("key", np.uint64),
        loops.ELECT[election.elect], election.tie_positive, loops.NORMALIZE[election.normalize], float(election.factor),
        np.uint64(key), outcome.counts, outcome.sums,
        np.array(lows, np.uint32), np.array(widths, np.uint32), place, held, found, tally,
        *block.picking, SCRATCH.array("wide", n, np.uint8), lines(n + 5),
    ))  # fmt: skip
    if not most:
        return outcome, None
    many = int(tally[n, 0])
    inside = [row[:count] for row, count in zip(found, tally[:n, 0], strict=True)]
    kept = _moved([place[:many], *(row[:many] for row in held), *inside], room)
    return outcome, Open(kept[0], kept[1 : n + 2], kept[n + 2 :], tally[:n, 1])


def _moved(arrays: Sequence[Any], room: Any) -> list[Any]:
    """Copies of arrays of 4-byte elements, one behind the other in `room` `[bytes]` as long as there is any."""
    copies, at = [], 0
    for array in arrays:
        fits = at + array.nbytes <= room.size
        copy = room[at : at + array.nbytes].view(array.dtype) if fits else np.empty_like(array)
        copy[:] = array
        copies.append(copy)
        at += array.nbytes if fits else 0
    return copies


def _strips(of_float32: int, of_float64: int) -> tuple[Any, Any]:
    return lines(of_float32), lines(of_float64, of=np.float64)


def _one_row(block: Block) -> Block:
    """A block of one row for what is computed from `block`."""
    return Block(block.index, block.base, np.empty((1, block.size), np.uint32), subtract=False)


def _no_outcome(sources: int) -> Outcome:
    counts = np.zeros((sources, len(loops.COUNTS)), np.int64)
    return Outcome(0, counts, np.zeros((sources, len(loops.SUMS))))


def _widen(bits: Any, out: Any) -> None:
    """Stored bits as those of float32, into `out`."""
    np.left_shift(bits, np.uint32(0 if bits.dtype == np.uint32 else 16), out=out, dtype=np.uint32)


def _as_float32(bits: Any) -> NDArray[np.float32]:
    wide = bits if bits.dtype == np.uint32 else bits.astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)  # type: ignore[no-any-return]
