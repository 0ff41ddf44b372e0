"""The operations on a block by the compiled kernels, on NumPy bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute import kernels
from paft_merge.compute.blocks import Block, Counts, Election, KeepThreshold, Outcome, RankedKeep, Sums, Undecided
from paft_merge.compute.kernels import lines
from paft_merge.compute.magnitudes import MAGNITUDE
from paft_merge.compute.scratch import SCRATCH


class CpuOps:
    """The operations of `blocks.Ops` by `kernels`: blocks are NumPy bits."""

    @property
    def deferring(self) -> CpuOps:
        """See `blocks.Ops`."""
        return self

    def sample(self, block: Block, step: int) -> NDArray[np.uint32]:
        """The magnitudes of every `step`-th entry, `[n, ceil(E / step)]`."""
        found = []
        for piece in block.pieces():  # the whole block of many sources takes much memory
            chosen = slice(-(piece.index - block.index) % step, None, step)
            deltas = _as_float32(piece.sources[:, chosen])
            if block.subtract:
                deltas = deltas - _as_float32(piece.base[chosen])
            found.append(deltas.view(np.uint32) & np.uint32(MAGNITUDE))
        return np.concatenate(found, axis=1)

    def histogram(self, block: Block, sums: int) -> tuple[Counts, Counts]:
        """Counts by the upper 15 bits of magnitude, and sums for L1 or L2 norms (see `kernels.thresholds.histogram`)."""
        n = block.count
        counts = np.zeros((n, kernels.BINS), np.int64)
        low = np.zeros((n, sums * kernels.BINS), np.int64)
        block.filled(kernels.histogram(*block.unfilled(), counts, low, lines(2)))
        return counts, low

    def collect(self, block: Block, low: Sequence[int], width: Sequence[int]) -> tuple[Counts, list[Any]]:
        """Per source: how many magnitudes are inside `[low, low + width)` and above it, `[n, 2]`; and those inside."""
        n, size = block.count, block.size
        found, counts = SCRATCH.array("found", (n, size), np.uint32, sparse=True), np.empty((n, 2), np.int64)
        bounds = np.array(low, np.uint32), np.array(width, np.uint32)
        block.filled(kernels.collect(*block.unfilled(), *bounds, found, counts, lines(2)))
        return counts, [row[:inside].copy() for row, inside in zip(found, counts[:, 0], strict=True)]

    def locate(self, block: Block, source: int, bits: int, nth: int) -> int:
        """Flat index in the tensor of the `nth` entry (from 0) of the block whose magnitude is exactly `bits`."""
        at = kernels.locate(*block.unfilled(source), source, np.uint32(bits), nth, lines(2))
        if at < 0:
            block.filled(at)
        assert at < block.size
        return block.index + at

    def dropped_norms(self, block: Block, survivals: Sequence[KeepThreshold], *, squares: bool) -> Sums:
        """`[n, 2]`: the sums of |delta|, or of its square, before and after the random drop of each survival."""
        sums = np.empty((block.count, 2))
        keep = np.array([s.keep for s in survivals], np.uint64)
        keys = np.array([s.key for s in survivals], np.uint64)
        memory = _strips(2, 2 * len(sums))
        block.filled(kernels.dropped_norms(*block.unfilled(), block.index, keep, keys, squares, sums, *memory))
        return sums

    def gram(self, block: Block) -> Sums:
        """`[n, n]`: inner products of the sources (or deltas)."""
        n = block.count
        out = np.empty((n, n))
        block.filled(kernels.gram(*block.unfilled(), out, *_strips(n + 1, n * n)))
        return out

    def blend(
        self, block: Block, out: Any, base_weight: float, weights: Sequence[float], key: int, tally: bool
    ) -> Outcome:
        """Write `base_weight * base + sum weights_i * source_i` (see `kernels.merging.blend`)."""
        outcome = Outcome.empty(block.count)
        outcome.bad = block.filled(kernels.blend(
            out, *block.unfilled(), block.index, float(base_weight), np.array(weights, np.float32),
            np.uint64(key), tally, outcome.counts, outcome.sums, *block.picking, lines(4),
        ))  # fmt: skip
        return outcome

    def consensus(
        self, block: Block, out: Any, survivals: Sequence[KeepThreshold], election: Election, key: int
    ) -> Outcome:
        """Write the base plus the elected delta (see `kernels.merging.consensus`)."""
        return _consensus(block, out, survivals, election, key)[0]

    def consensus_outside(
        self, block: Block, out: Any, brackets: Sequence[tuple[int, int]], election: Election, memory: Any
    ) -> tuple[Outcome, Undecided]:
        """See `blocks.DeferringOps`."""
        above = [KeepThreshold(low=low + width - 1) for low, width in brackets]
        outcome, undecided = _consensus(block, out, above, election, 0, brackets, memory)
        assert undecided is not None
        return outcome, undecided

    def tally(self, block: Block) -> tuple[Counts, Sums]:
        """The block's share of a tally of deltas that are merged unchanged (see `kernels.block_transforms.tally`)."""
        outcome = Outcome.empty(len(block.sources))
        kernels.tally(block.base, block.sources, block.subtract, outcome.counts, outcome.sums, lines(2))
        return outcome.counts, outcome.sums

    def variance(self, block: Block, total: int) -> Block:
        """One row: the variance of every entry over `total` sources; sources without a row count as zero."""
        out = _one_row(block)
        made, memory = out.sources[0].view(np.float32), _strips(len(block.sources) + 1, 2)
        kernels.variance(block.base, block.sources, block.subtract, total, made, *memory)
        return out

    def select(self, block: Block, by: Block, survival: KeepThreshold) -> Block:
        """The deltas where the only row of `by`, which is not negative, passes the lower threshold; zero elsewhere."""
        out = np.empty(block.sources.shape, np.float32)
        bounds = np.uint32(survival.low), survival.low_cut
        kernels.select(block.base, block.sources, block.subtract, block.index, by.sources[0], *bounds, out, lines(2))
        return Block(block.index, block.base, out.view(np.uint32), subtract=False)

    def swap(self, block: Block, t: float) -> Block:
        """One row: the delta of the only source, reduced where it is larger than `t` (see `kernels.block_transforms.swap`)."""
        out = _one_row(block)
        kernels.swap(block.base, block.sources, block.subtract, float(t), out.sources[0].view(np.float32), lines(2))
        return out

    def overlaps(self, block: Block, epsilon: float) -> tuple[Counts, Sums]:
        """Entries with |delta| > epsilon, `[n, 2]`: those several sources share and those of one alone; their squares, `[n]`."""
        counts, energy = np.zeros((len(block.sources), 2), np.int64), np.zeros(len(block.sources))
        memory = _strips(len(counts) + 3, len(counts))
        kernels.overlaps(block.base, block.sources, block.subtract, float(epsilon), counts, energy, *memory)
        return counts, energy

    def share(self, block: Block, epsilon: float, scales: Sequence[float]) -> Block:
        """One row: changes of one source times its scale, shared ones averaged (see `kernels.block_transforms.share`)."""
        out, own = _one_row(block), np.array(scales, np.float32)
        made, memory = out.sources[0].view(np.float32), lines(len(own) + 3)
        kernels.share(block.base, block.sources, block.subtract, float(epsilon), own, made, memory)
        return out

    def fuse(self, block: Block, weights: Sequence[float]) -> tuple[Block, Counts, Sums]:
        """One row: the elected weighted mean; and, `[n]` each, how many entries were elected and the sum of their squares."""
        n = len(block.sources)
        out, elected, energy = _one_row(block), np.zeros(n, np.int64), np.zeros(n)
        merged, own = out.sources[0].view(np.float32), np.array(weights, np.float32)
        kernels.fuse(block.base, block.sources, block.subtract, own, merged, elected, energy, *_strips(n + 4, n))
        return out, elected, energy

    def largest(self, block: Block, weights: Sequence[float]) -> tuple[Block, Counts, Sums]:
        """One row: the weighted delta of the largest magnitude; and, `[n]` each, how many entries are each source's, and their squares."""
        n = len(block.sources)
        out, won, energy = _one_row(block), np.zeros(n, np.int64), np.zeros(n)
        merged, own = out.sources[0].view(np.float32), np.array(weights, np.float32)
        kernels.largest(block.base, block.sources, block.subtract, own, merged, won, energy, *_strips(n + 3, n))
        return out, won, energy

    def drop_ranked(self, block: Block, length: int, inner: int, drops: Sequence[RankedKeep]) -> Block:
        """Drop entries of each delta by their rank among `length` entries that are `inner` apart; ties rank by position."""
        deltas = _as_float32(block.sources)
        if block.subtract:
            deltas = deltas - _as_float32(block.base)
        out = np.empty_like(deltas)
        places = np.arange(length, dtype=np.uint64)
        for row, kept, drop in zip(deltas, out, drops, strict=True):
            magnitudes = (row.view(np.uint32) & np.uint32(MAGNITUDE)).reshape(-1, length, inner).swapaxes(1, 2)
            order = np.sort(np.ascontiguousarray((magnitudes.astype(np.uint64) << np.uint64(32)) | places)).reshape(
                -1, length
            )
            kernels.keep_ranked(row, order, inner, block.index, drop.keep, np.uint64(drop.key), kept)
        return Block(block.index, block.base, out.view(np.uint32), subtract=False)

    def products(self, block: Block) -> Sums:
        """`[2, n, n]`: the least and the greatest product of each pair of deltas."""
        n = len(block.sources)
        out = np.empty((2, n, n))
        kernels.products(block.base, block.sources, block.subtract, out, *_strips(n + 1, 2 * n * n))
        return out

    def exponential_sums(self, block: Block, least: Sums, scale: Sums) -> Sums:
        """See `blocks.Ops`."""
        n = len(block.sources)
        out = np.empty((n, n))
        memory = _strips(n + 1, n * n + 2)
        kernels.exponential_sums(block.base, block.sources, block.subtract, least, scale, out, *memory)
        return out

    def scores(self, block: Block, least: Sums, scale: Sums, shares: Sums) -> Block:
        """See `blocks.Ops`."""
        out, n = np.empty(block.sources.shape, np.float32), len(block.sources)
        power, memory = np.count_nonzero(np.diagonal(shares)), _strips(n + 1, 2 * n + 2)
        kernels.scores(block.base, block.sources, block.subtract, least, scale, shares, int(power), out, *memory)
        return Block(block.index, block.base, out.view(np.uint32), subtract=False)

    def compete(
        self,
        block: Block,
        scores: Block,
        survivals: Sequence[KeepThreshold],
        scales: Sequence[float],
        weights: Sequence[float],
    ) -> tuple[Block, Counts, Sums]:
        """See `blocks.Ops`."""
        n = len(block.sources)
        out, kept, energy = _one_row(block), np.zeros(n, np.int64), np.zeros(n)
        bounds = np.array([s.low for s in survivals], np.uint32), np.array([s.low_cut for s in survivals], np.int64)
        own = np.array(scales, np.float32), np.array(weights, np.float32)
        kernels.compete(
            block.base, block.sources, block.subtract, block.index, scores.sources, *bounds, *own, out.sources[0].view(np.float32),
            kept, energy, *_strips(5, n),
        )  # fmt: skip
        return out, kept, energy

    def gram_rows(self, block: Block, row: int) -> Sums:
        """`[E / row, n, n]`: inner products of the sources within every row."""
        n, size = block.sources.shape
        out = np.zeros((size // row, n, n))
        kernels.gram_rows(block.base, block.sources, block.subtract, row, out, *_strips(n + 1, n * n))
        return out

    def gram_columns(self, block: Block, row: int) -> Sums:
        """`[n, n, row]`: inner products of the sources within every column of the block's rows."""
        out = np.zeros((*[len(block.sources)] * 2, row))
        kernels.gram_columns(block.base, block.sources, block.subtract, row, out, lines(len(out) + 1))
        return out

    def mix(self, block: Block, weights: Any, row: int, *, across: bool) -> Block:
        """One row: the weighted sum with weights `[n, E / row]`, one a row, or `[n, row]` with `across`, one a column."""
        out, own = _one_row(block), np.ascontiguousarray(weights, np.float32)
        made = out.sources[0].view(np.float32)
        kernels.mix(block.base, block.sources, block.subtract, row, across, own, made, lines(3))
        return out


def _consensus(
    block: Block,
    out: Any,
    survivals: Sequence[KeepThreshold],
    election: Election,
    key: int,
    brackets: Sequence[tuple[int, int]] | None = None,
    memory: Any = None,
) -> tuple[Outcome, Undecided | None]:
    n, size = block.count, block.size
    outcome, most, tally = Outcome.empty(n), size if brackets is not None else 0, np.zeros((n + 1, 2), np.int64)
    place = SCRATCH.array("open_place", most, np.int32)
    held = SCRATCH.array("open_held", (n + 1, most), np.float32, sparse=True)
    found = SCRATCH.array("open_found", (n, most), np.uint32, sparse=True)

    def column(name: str, dtype: Any) -> Any:
        return np.array([getattr(s, name) for s in survivals], dtype)

    lows, widths = zip(*brackets, strict=True) if brackets else ([0] * n, [0] * n)
    outcome.bad = block.filled(kernels.consensus(
        out, *block.unfilled(), block.index,
        np.array(election.weights, np.float32), column("scale", np.float32),
        column("low", np.uint32), column("low_cut", np.int64), column("high", np.uint32), column("high_cut", np.int64),
        column("shrink", np.float32), column("keep", np.uint64), column("key", np.uint64),
        kernels.ELECT[election.elect], election.tie_positive, kernels.NORMALIZE[election.normalize], float(election.factor),
        np.uint64(key), outcome.counts, outcome.sums,
        np.array(lows, np.uint32), np.array(widths, np.uint32), place, held, found, tally,
        *block.picking, SCRATCH.array("wide", n, np.uint8), lines(n + 5),
    ))  # fmt: skip
    return outcome, undecided(place, held, found, tally, memory) if most else None


def undecided(place: Any, held: Any, found: Any, tally: Any, memory: Any) -> Undecided:
    """The undecided entries that a kernel stored, copied (see `kernels.merging.consensus` and `blocks.DeferringOps`)."""
    *inside, many = map(int, tally[:, 0])
    copied = [place[:many], held[:, :many], *(row[:count] for row, count in zip(found, inside, strict=True))]
    kept, deltas, *magnitudes = _moved(copied, memory)
    return Undecided(kept, deltas, magnitudes, tally[:-1, 1])


def _moved(arrays: Sequence[Any], memory: Any) -> list[Any]:
    """Copies of arrays of 4-byte elements, one after the other in `memory` `[bytes]`; those that do not fit are allocated."""
    copies, at = [], 0
    for array in arrays:
        fits = at + array.nbytes <= memory.size
        copy = memory[at : at + array.nbytes].view(array.dtype) if fits else np.empty(array.size, array.dtype)
        copy = copy.reshape(array.shape)
        copy[:] = array
        copies.append(copy)
        at += array.nbytes if fits else 0
    return copies


def _strips(of_float32: int, of_float64: int) -> tuple[Any, Any]:
    return lines(of_float32), lines(of_float64, of=np.float64)


def _one_row(block: Block) -> Block:
    """A block with one uninitialised row, with the index and the base of `block`."""
    return Block(block.index, block.base, np.empty((1, block.size), np.uint32), subtract=False)


def _as_float32(bits: Any) -> NDArray[np.float32]:
    wide = bits if bits.dtype == np.uint32 else bits.astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)  # type: ignore[no-any-return]
