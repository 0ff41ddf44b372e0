"""A block of a tensor, and the operations on blocks that methods are built from.

A tensor is read in *tiles*, which depend on its shape alone. A block holds the elements of one tile from the base and from
every source. Sums are taken tile by tile and added in tile order, and each low-rank product is one call per tile, so the
merged bits do not depend on threads, memory, shards or the number of tiles computed at a time.

Shapes: E elements of a block, n sources.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute import kernels
from paft_merge.compute.kernels.block_source import FULL, BlockSource
from paft_merge.compute.scratch import SCRATCH

Counts = NDArray[np.int64]
Sums = NDArray[np.float64]

TILE = 1 << 21
"""Approximate elements per tile: large relative to per-call overhead, small relative to memory. Kernels work on cache-sized
pieces of it (see `kernels.block_source`)."""

NO_BITS = 0xFFFFFFFF
"""Greater than every bit pattern of a magnitude: an interval that begins here is empty, with no entry above it."""


def tile_bounds(numel: int, row: int) -> list[tuple[int, int]]:
    """Flat `[start, stop)` of every tile of a tensor of `numel` elements in rows of `row`.

    A tile holds whole rows, a multiple of 16 if it has that many, which keeps every factor of a low-rank product aligned.
    """
    rows = max(1, TILE // row)
    rows = rows // 16 * 16 if rows >= 16 else rows
    step = rows * row
    return [(start, min(start + step, numel)) for start in range(0, numel, step)]


def sample_end(start: int, stop: int, row: int) -> int:
    """End of the sample of the tile `[start, stop)`: its first rows of `row` elements, at least one.

    A sample has one row of 16, because rows of an adapter's delta differ more than entries of a row do; or one entry of 32
    if rows are single entries.
    """
    return start + max(1, (stop - start) // row // (32 if row == 1 else 16)) * row


NOT_PICKED = 1, np.empty((1, 0), np.uint32), np.zeros(1, np.int64)
"""The `picking` of a block that is not sampled."""


class Block:
    """One tile of the base and of the sources, as bits (see `kernels`) or, on another device, as float32 tensors.

    Args:
        index: flat index of the first element in its tensor.
        base: `[E]`, or `[0]` if the merge has no base; `[0]` of its dtype if `feed` computes the whole block.
        sources: `[n, E]`: values, or deltas; `[n, 0]` likewise.
        subtract: the sources are values, and the method needs their deltas.
        feed: fills the arrays at first use, or piece by piece while a kernel runs over them (see `unfilled`).
    """

    __slots__ = ("_base", "_feed", "_sources", "index", "picking", "size", "subtract")

    def __init__(self, index: int, base: Any, sources: Any, subtract: bool, feed: BlockSource | None = None) -> None:
        self.index, self.subtract = index, subtract
        self._base, self._sources, self._feed = base, sources, feed
        self.size = feed.size if feed is not None else int(sources.shape[1])
        """E."""
        self.picking: tuple[int, Any, Any] = NOT_PICKED
        """The sample that a writing kernel takes: `stride`, `picked`, `taken` of `kernels.merging.blend`."""

    @property
    def base(self) -> Any:
        """`[E]`, or `[0]`; see the class."""
        self._fill()
        return self._base

    @property
    def sources(self) -> Any:
        """`[n, E]`; see the class."""
        self._fill()
        return self._sources

    @property
    def count(self) -> int:
        """n."""
        return len(self._sources)

    def unfilled(self, only: int | None = None) -> tuple[Any, Any, bool, Any]:
        """Arguments for a kernel that runs over the whole block: base, sources, `subtract`, and how to fill them.

        Pass the kernel's result to `filled`. `only`: the one source that the kernel reads; the others may stay unfilled.
        """
        if self._feed is None:
            return self._base, self._sources, self.subtract, FULL
        arrays = self._arrays(self._feed.piece) if self._made else (self._base, self._sources)
        return *arrays, self.subtract, self._feed.descriptor(*arrays, only)

    def filled(self, result: int) -> int:
        """Return the `result` of a kernel that got `unfilled`, unless it is negative.

        Raises:
            PaftMergeError: an input of the block cannot be read.
        """
        if result < 0 and self._feed is not None:
            self._feed.explain()
        if not self._made:
            self._feed = None
        return result

    def pieces(self) -> Iterator[Block]:
        """The block in parts, each of which is valid until the next one. Their memory does not grow with the block where a feed
        computes it; otherwise there is one part, the block itself.
        """
        if self._feed is None or not self._made:
            self._fill()
            yield self
            return
        for start, base, sources in self._feed.pieces(*self._arrays(self._feed.piece)):
            yield Block(self.index + start, base, sources, self.subtract)

    def _fill(self) -> None:
        if self._feed is not None:
            if self._made:
                self._base, self._sources = self._arrays(self.size)
            self._feed.fill(self._base, self._sources)
            self._feed = None

    @property
    def _made(self) -> bool:
        """Whether the feed computes the whole block, so that memory for one piece suffices."""
        return self._feed is not None and self._sources.shape[1] < self.size

    def _arrays(self, size: int) -> tuple[Any, Any]:
        """Memory of this thread for `size` entries."""
        assert self._feed is not None
        if self._base.size:
            return self._base[:size], SCRATCH.array("sources", (self.count, size), self._sources.dtype)
        base = SCRATCH.array("base", size if self._feed.has_base else 0, self._base.dtype)
        return base, SCRATCH.array("sources", (self.count, size), self._sources.dtype)


@dataclass(frozen=True)
class KeepThreshold:
    """Which entries of one delta survive, and how they are changed. The default keeps everything unchanged.

    An entry survives if its magnitude (float32 bits) is above `low`, or equal to it at a flat index below `low_cut`; and does
    not pass `high` in the same way; and if its hash by `key` is below `keep` (of 2**32). Survivors move towards zero by
    `shrink` and are multiplied by `scale`.
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
    """Statistics of each source's delta of one tensor, gathered block by block (columns: `kernels.COUNTS`, `SUMS`)."""

    counts: Counts
    sums: list[Sums] = field(default_factory=list)

    @classmethod
    def empty(cls, sources: int) -> Tally:
        """A tally of no blocks."""
        return cls(Outcome.empty(sources).counts)

    def add(self, counts: Counts, sums: Sums) -> None:
        """Add one block; blocks must come in tile order, because their sums are rounded."""
        largest = np.maximum(self.counts[:, -1], counts[:, -1])
        self.counts += counts
        self.counts[:, -1] = largest
        self.sums.append(sums)

    def total(self) -> Sums:
        """`[n, 4]` float64: the correctly rounded sum over the blocks, which does not depend on their order."""
        if not self.sums:
            return np.zeros((len(self.counts), len(kernels.SUMS)))
        stacked = np.stack(self.sums)
        return np.array(
            [[math.fsum(stacked[:, i, k]) for k in range(stacked.shape[2])] for i in range(stacked.shape[1])]
        )


@dataclass(frozen=True)
class RankedKeep:
    """Random drops by rank: an entry stays if its hash by `key` is below `keep[rank]` of 2**32 (rank 0: smallest of a row)."""

    keep: NDArray[np.uint64]
    key: int


@dataclass(frozen=True)
class Election:
    """How the surviving entries of all deltas become one delta.

    elect      `weighted`    sign of the sum of weight * delta (mergekit)
               `unweighted`  sign of the sum of deltas (the TIES paper, and PEFT)
               `count`       sign of the sum of signs (PAFT's formula; PEFT's "frequency")
               `none`        every surviving entry is kept
    normalize  `weights`     divide by the weights of the entries kept at that index (mergekit)
               `count`       divide by their number (the TIES paper, and PEFT)
               `none`        plain sum

    With `weighted` an entry agrees if weight * delta has the elected sign, otherwise if the delta itself has it.
    """

    weights: tuple[float, ...]
    elect: str = "weighted"
    tie_positive: bool = True
    """A sum of zero elects +; else nothing agrees there."""
    normalize: str = "weights"
    factor: float = 1.0
    """Multiplies the result (lambda)."""

    def among(self, active: Sequence[int]) -> Election:
        """The same election among the sources `active`."""
        return replace(self, weights=tuple(self.weights[i] for i in active))

    @property
    def factors(self) -> tuple[float, ...]:
        """Weight times `factor` of each source."""
        return tuple(weight * self.factor for weight in self.weights)


@dataclass(slots=True)
class Outcome:
    """The result of writing one block: how many elements are not finite, and the block's share of the tally."""

    bad: int
    counts: Counts
    sums: Sums

    @classmethod
    def empty(cls, sources: int) -> Outcome:
        """The outcome of a block without elements."""
        return cls(0, np.zeros((sources, len(kernels.COUNTS)), np.int64), np.zeros((sources, len(kernels.SUMS))))


@dataclass(slots=True)
class Undecided:
    """The entries of a block that wait for a threshold, because a source is inside its bracket there."""

    place: NDArray[np.int32]
    """`[K]`: positions in the block, ascending."""
    held: NDArray[np.float32]
    """`[n + 1, K]`: the deltas of the sources there and, last, the base."""
    inside: list[NDArray[np.uint32]]
    """The magnitudes of each source inside its bracket."""
    above: Counts
    """`[n]`: how many entries of the block are above each source's bracket."""

    @property
    def block(self) -> Block:
        """These entries side by side, as a block at flat index 0."""
        bits = self.held.view(np.uint32)
        return Block(0, bits[-1], bits[:-1], subtract=False)

    def within(self, start: int, thresholds: Sequence[KeepThreshold]) -> list[KeepThreshold]:
        """The thresholds of a tensor for `block`; `start` is the flat index of the block that these entries are from."""
        cuts = [int(np.searchsorted(self.place, t.low_cut - start)) for t in thresholds]
        return [KeepThreshold(t.low, cut) for t, cut in zip(thresholds, cuts, strict=True)]


class Ops(Protocol):
    """The operations on a block, for one kind of device.

    "Deltas" are the block's sources, less its base if `subtract` is set. The operations that return a `Block` compute float32
    rows from the deltas and keep the index and the base.
    """

    @property
    def deferring(self) -> DeferringOps | None:
        """These operations if they can set undecided entries aside, else None."""

    def sample(self, block: Block, step: int) -> Any:
        """`[n, ceil(E / step)]` uint32: the magnitudes of every `step`-th entry of the deltas."""

    def histogram(self, block: Block, sums: int) -> tuple[Counts, Counts]:
        """Counts by the upper 15 bits of magnitude, `[n, BINS]`, and exact sums over each bin, `[n, sums * BINS]`.

        `sums` of 1: the lower 16 bits, for L1 norms. 2: then their squared distances from `kernels.MIDDLE`, for L2 norms.
        """

    def collect(self, block: Block, low: Sequence[int], width: Sequence[int]) -> tuple[Counts, list[Any]]:
        """Per source, how many magnitudes are inside `[low, low + width)` and above it, `[n, 2]`; and those inside."""

    def locate(self, block: Block, source: int, bits: int, nth: int) -> int:
        """Flat index in the tensor of the `nth` entry (from 0) of the block whose magnitude is exactly `bits`."""

    def dropped_norms(self, block: Block, survivals: Sequence[KeepThreshold], *, squares: bool) -> Sums:
        """`[n, 2]`: the sums of |delta|, or of its square, before and after the random drop of each survival."""

    def gram(self, block: Block) -> Sums:
        """`[n, n]`: inner products of the deltas."""

    def blend(
        self, block: Block, out: Any, base_weight: float, weights: Sequence[float], key: int, tally: bool
    ) -> Outcome:
        """Write `base_weight * base + sum weights_i * delta_i`.

        Args:
            block: the base counts as zero if the block has none.
            out: `[E]` uint32 (float32 bits) or uint16 (bfloat16 bits), receives the result.
            base_weight: rounded to float32, as the weights are.
            weights: one a source.
            key: stream of stochastic rounding to bfloat16; 0 rounds to nearest.
            tally: fill the outcome's counts and sums.
        """

    def consensus(
        self, block: Block, out: Any, survivals: Sequence[KeepThreshold], election: Election, key: int
    ) -> Outcome:
        """Write the base plus the elected delta.

        Args:
            block: it has a base.
            out: as in `blend`.
            survivals: which entries of each delta survive.
            election: how they become one delta.
            key: as in `blend`.
        """

    def tally(self, block: Block) -> tuple[Counts, Sums]:
        """The block's share of a tally of deltas that are merged unchanged (columns: `kernels.COUNTS`, `SUMS`)."""

    def variance(self, block: Block, total: int) -> Block:
        """One row: the variance of every entry over `total` sources; sources without a row count as zero."""

    def select(self, block: Block, by: Block, survival: KeepThreshold) -> Block:
        """The deltas where the only row of `by`, which is not negative, passes the lower threshold; zero elsewhere."""

    def swap(self, block: Block, t: float) -> Block:
        """One row: the delta of the only source times `clip(t / |delta|, 0, 1)`; magnitudes under 1e-6 count as 1e-6."""

    def overlaps(self, block: Block, epsilon: float) -> tuple[Counts, Sums]:
        """Entries with |delta| > epsilon, `[n, 2]`: those several sources share and those of one alone; their squares, `[n]`."""

    def share(self, block: Block, epsilon: float, scales: Sequence[float]) -> Block:
        """One row: an entry with |delta| > epsilon in one source alone times its scale; the mean where several have one."""

    def fuse(self, block: Block, weights: Sequence[float]) -> tuple[Block, Counts, Sums]:
        """One row: the weighted mean of the deltas that have the sign of their sum.

        Returns:
            The row; and, `[n]` each, how many entries were elected and the sum of their squares.
        """

    def largest(self, block: Block, weights: Sequence[float]) -> tuple[Block, Counts, Sums]:
        """One row: of the deltas times their weights, the one of the largest magnitude; of equal ones the first.

        Returns:
            The row; and, `[n]` each, how many entries are taken from a source, without zeros, and the sum of their squares.
        """

    def drop_ranked(self, block: Block, length: int, inner: int, drops: Sequence[RankedKeep]) -> Block:
        """Drop entries of each delta by their rank among `length` entries that are `inner` apart; ties rank by position."""

    def products(self, block: Block) -> Sums:
        """`[2, n, n]`: the least and the greatest product of each pair of deltas, and of each with itself."""

    def exponential_sums(self, block: Block, least: Sums, scale: Sums) -> Sums:
        """`[n, n]`: the sum of exp(x - 0.5), where x is `(product - least) * scale` of a pair of deltas, in [0, 1]."""

    def scores(self, block: Block, least: Sums, scale: Sums, shares: Sums) -> Block:
        """Scores of the entries of each delta, not negative, by which `compete` weighs them (see `methods.rules.competition`).

        Args:
            least, scale: `[n, n]`, as in `exponential_sums`.
            shares: `[n, n]`, divided by the sums of exponentials; zero for sources that do not take part.
        """

    def compete(
        self,
        block: Block,
        scores: Block,
        survivals: Sequence[KeepThreshold],
        scales: Sequence[float],
        weights: Sequence[float],
    ) -> tuple[Block, Counts, Sums]:
        """One row: the sum of score * weight * delta over the sum of scores, of the entries whose score passes its lower threshold.

        Args:
            scores: from `scores`.
            survivals: the threshold of each source's scores.
            scales: multiply the scores of each source.
            weights: one a source.

        Returns:
            The row; and, `[n]` each, how many entries of a source take part, without zeros, and the sum of their squares.
        """  # fmt: skip

    def gram_rows(self, block: Block, row: int) -> Sums:
        """`[E / row, n, n]`: inner products of the deltas within every row."""

    def gram_columns(self, block: Block, row: int) -> Sums:
        """`[n, n, row]`: inner products of the deltas within every column of the block's rows."""

    def mix(self, block: Block, weights: Any, row: int, *, across: bool) -> Block:
        """One row: the weighted sum with weights `[n, E / row]`, one a row, or `[n, row]` with `across`, one a column."""


class DeferringOps(Ops, Protocol):
    """Operations that can merge a block before its thresholds are known."""

    def consensus_outside(
        self, block: Block, out: Any, brackets: Sequence[tuple[int, int]], election: Election, memory: Any
    ) -> tuple[Outcome, Undecided]:
        """Write what magnitudes outside the brackets decide, and set the other entries aside; there `out` is the base.

        Args:
            block: it has a base.
            out: as in `blend`.
            brackets: lowest bits, at least 1, and number of bits, one a source. Larger magnitudes survive, smaller ones do not.
            election: as in `consensus`.
            memory: `[bytes]` uint8 to hold the undecided entries; what does not fit is allocated.
        """


Wants = Literal["values", "deltas", "either", "offsets"]
"""`either`: values, or deltas if that is what the engine has. `offsets`: deltas if there is a base, else values."""
