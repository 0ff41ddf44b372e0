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
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute import kernels
from paft_merge.compute.kernels.block_source import FULL, BlockSource
from paft_merge.compute.scratch import SCRATCH

T = TypeVar("T")
Counts = NDArray[np.int64]
Sums = NDArray[np.float64]

TILE = 1 << 21
"""Elements of a tile, about: large beside the cost of a call, small beside memory; caches see its pieces (see `kernels.block_source`)."""


NO_BITS = 0xFFFFFFFF
"""Above every bit pattern of a magnitude: an interval that begins here is empty, and no entry counts as above it."""


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
    """One tile of the base and of the sources, as bits (see `kernels`) or, on another device, as float32 tensors.

    Args:
        index: flat index of the first element in its tensor.
        base: `[E]`, or `[0]` where the merge has no base; `[0]` of its type where `feed` makes all of the block.
        sources: `[n, E]`: values, or deltas; `[n, 0]` likewise.
        subtract: the sources are values and the method wants their deltas.
        feed: what fills the arrays when they are first looked at, or, piece by piece, while a loop walks them (see `unfilled`).
    """

    __slots__ = ("_base", "_feed", "_sources", "index", "picking", "size", "subtract")

    def __init__(self, index: int, base: Any, sources: Any, subtract: bool, feed: BlockSource | None = None) -> None:
        self.index, self.subtract = index, subtract
        self._base, self._sources, self._feed = base, sources, feed
        self.size = feed.size if feed is not None else int(sources.shape[1])
        """E."""
        self.picking: tuple[int, Any, Any] = NOT_PICKED
        """What a loop that writes the block takes of it for a sample: `stride`, `picked`, `taken` of `kernels.merging.blend`."""

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
        return *arrays, self.subtract, self._feed.descriptor(*arrays, only)

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
class KeepThreshold:
    """Which entries of one delta survive, and what becomes of them. The default keeps everything as it is.

    An entry survives when its magnitude (float32 bits) is above `low`, or equal to it at a flat index below `low_cut`;
    unless it passes `high` in the same way; and when its hash stays below `keep`.
    """

    low: int = 0
    low_cut: int = 0
    high: int = NO_BITS
    high_cut: int = 0
    keep: int = 1 << 32
    key: int = 0
    shrink: float = 0.0
    scale: float = 1.0


NOTHING = KeepThreshold(low=NO_BITS)


@dataclass
class Tally:
    """What a merge saw of each source's delta of one tensor, gathered block by block (columns: `kernels.COUNTS`, `SUMS`)."""

    counts: Counts
    sums: list[Sums] = field(default_factory=list)

    @classmethod
    def empty(cls, sources: int) -> Tally:
        return cls(np.zeros((sources, len(kernels.COUNTS)), np.int64))

    def add(self, counts: Counts, sums: Sums) -> None:
        """Add one block; blocks must come in tile order, because their sums are rounded."""
        largest = np.maximum(self.counts[:, -1], counts[:, -1])
        self.counts += counts
        self.counts[:, -1] = largest
        self.sums.append(sums)

    def total(self) -> Sums:
        """`[n, 4]` float64: the correctly rounded sum over the blocks, so that their order cannot matter."""
        if not self.sums:
            return np.zeros((len(self.counts), len(kernels.SUMS)))
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
    def dropped_l1(self, block: Block, survivals: Sequence[KeepThreshold]) -> Sums: ...
    def gram(self, block: Block) -> Sums: ...
    def blend(
        self, block: Block, out: Any, base_weight: float, weights: Sequence[float], key: int, tally: bool
    ) -> Outcome: ...
    def consensus(
        self, block: Block, out: Any, survivals: Sequence[KeepThreshold], election: Election, key: int
    ) -> Outcome: ...

    # From one block to another, for the rarer methods.
    def tally(self, block: Block) -> tuple[Counts, Sums]: ...
    def variance(self, block: Block, total: int) -> Block: ...
    def select(self, block: Block, by: Block, survival: KeepThreshold) -> Block: ...
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
class Undecided:
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


class BlockMap(Protocol):
    """Runs a function on every block of a tensor and returns the results in tile order."""

    @property
    def tiles(self) -> int:
        """How many tiles the tensor has."""

    def __call__(
        self, work: Callable[[Block], T], *, sample: bool = False, tiles: Sequence[int] | None = None
    ) -> list[T]:
        """`sample`: on a small part of each tile's rows only. `tiles`: on these tiles only."""


Wants = Literal["values", "deltas", "either", "offsets"]
"""`either`: the engine may give deltas where they are what it has. `offsets`: deltas where there is a base, else values."""
