"""Kernels that find thresholds: histograms of magnitudes, entries within an interval, norms around a random drop."""

from __future__ import annotations

from typing import Any

import numpy as np

from paft_merge.compute.kernels import BINS, MIDDLE, STRIP
from paft_merge.compute.kernels.primitives import (
    GOLDEN,
    MAGNITUDE,
    advance_block,
    bits_of,
    counter,
    in_range_mask,
    jit,
    load,
    load_above,
    low_mask,
    lowest,
    mixed,
    start_block,
    strip,
    strip_of,
    widen,
)


@jit
def histogram(base: Any, sources: Any, subtract: bool, source_desc: Any, counts: Any, lows: Any, lines: Any) -> int:
    """Count magnitudes by their upper bits, exactly.

    Args:
        base: `[E]` bits; read only with `subtract`.
        sources: `[n, E]` bits.
        subtract: whether the sources are values whose deltas are wanted.
        source_desc: `[K]` int64, fills the block during the loop (see `block_source`); `[0]` for a full block.
        counts: `[n, BINS]` int64; entries of each bin are added.
        lows: `[n, BINS]` int64; the sum of the entries' lower 16 bits is added. With `counts` it gives the L1 norm of a
            bin without rounding (see `histogram.l1_of_bins`). `[n, 2 * BINS]`: then the sum of the squared distances of these
            bits from `MIDDLE`, for L2 norms (see `histogram.squares_of_bins`). `[n, 0]` where neither is wanted.
        lines: `[2, LINE]` float32, memory.

    Returns:
        0; -1 where the block could not be filled.
    """
    n, size, ready, origin = start_block(sources, source_desc)
    minus, values = lines[0], lines[1]
    minus[:] = np.float32(0)
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if start + m > ready:
            origin, ready = advance_block(source_desc, ready)
            if ready < 0:
                return -1
        at = start - origin
        if subtract:
            widen(strip(base, at, m), minus)
        for i in range(n):
            load(strip_of(sources, i, at, m), minus, values)
            row, low = counts[i], lows[i]
            if low.size > BINS:
                for j in range(m):
                    u = bits_of(values[j]) & MAGNITUDE
                    into, part = np.int64(u >> np.uint32(16)), np.int64(u & np.uint32(0xFFFF))
                    row[into] += 1
                    low[into] += part
                    low[BINS + into] += (part - MIDDLE) * (part - MIDDLE)
            elif low.size:
                for j in range(m):
                    u = bits_of(values[j]) & MAGNITUDE
                    row[u >> np.uint32(16)] += 1
                    low[u >> np.uint32(16)] += np.int64(u & np.uint32(0xFFFF))
            else:
                for j in range(m):
                    row[(bits_of(values[j]) & MAGNITUDE) >> np.uint32(16)] += 1
    return 0


@jit
def collect(
    base: Any, sources: Any, subtract: bool, source_desc: Any, low: Any, width: Any, found: Any, counts: Any, lines: Any
) -> int:
    """Collect the magnitudes inside an interval of each source and count those above it.

    Args:
        base, sources, subtract, source_desc: as in `histogram`.
        low: `[n]` uint32, the lowest magnitude (bits) of each source's interval; 0xFFFFFFFF skips the source.
        width: `[n]` uint32, the number of bit patterns in the interval.
        found: `[n, E]` uint32; row i receives the magnitudes inside, in order of position.
        counts: `[n, 2]` int64; receives the number inside and the number above.
        lines: `[2, LINE]` float32, memory.

    Returns:
        0; -1 where the block could not be filled.
    """
    n, size, ready, origin = start_block(sources, source_desc)
    minus, values = lines[0], lines[1]
    minus[:] = np.float32(0)
    for i in range(n):
        counts[i, 0] = 0
        counts[i, 1] = 0
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if start + m > ready:
            origin, ready = advance_block(source_desc, ready)
            if ready < 0:
                return -1
        at = start - origin
        if subtract:
            widen(strip(base, at, m), minus)
        for i in range(n):
            if low[i] == np.uint32(0xFFFFFFFF):
                continue
            lo, span, row, many = low[i], width[i], found[i], counts[i, 0]
            high, (half, whole) = np.uint32(lo + span), strip_of(sources, i, at, m)
            above = load_above(half, minus, values, high) + load_above(whole, minus, values, high)
            for first in range(0, m, 64):
                left = in_range_mask(values, first, lo, span) & low_mask(m - first)
                while left:
                    row[many] = bits_of(values[first + lowest(left)]) & MAGNITUDE
                    many += 1
                    left &= left - np.uint64(1)
            counts[i, 0] = many
            counts[i, 1] += above
    return 0


@jit
def locate(
    base: Any, sources: Any, subtract: bool, source_desc: Any, source: int, bits: np.uint32, nth: int, lines: Any
) -> int:  # fmt: skip
    """Position in the block of the `nth` entry (from 0) of a source whose magnitude is exactly `bits`.

    Args:
        base, sources, subtract, source_desc: as in `histogram`; only this source needs to be filled.
        lines: `[2, LINE]` float32, memory.

    Returns:
        The position; the size of the block where there are fewer entries; -1 where the block could not be filled.
    """
    _, size, ready, origin = start_block(sources, source_desc)
    minus, values = lines[0], lines[1]
    minus[:] = np.float32(0)
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if start + m > ready:
            origin, ready = advance_block(source_desc, ready)
            if ready < 0:
                return -1
        at = start - origin
        if subtract:
            widen(strip(base, at, m), minus)
        load(strip_of(sources, source, at, m), minus, values)
        for first in range(0, m, 64):
            left = in_range_mask(values, first, bits, np.uint32(1)) & low_mask(m - first)
            while left:
                if nth == 0:
                    return int(start + first + lowest(left))
                nth -= 1
                left &= left - np.uint64(1)
    return int(size)


@jit
def dropped_norms(
    base: Any, sources: Any, subtract: bool, source_desc: Any, index: int, keep: Any, keys: Any, squares: bool, sums: Any, lines: Any,
    lanes: Any,
) -> int:  # fmt: skip
    """Sum |delta|, or its square, before and after a random drop.

    Args:
        base, sources, subtract, source_desc: as in `histogram`.
        index: flat index of the block's first element in its tensor.
        keep: `[n]` uint64, an entry stays when the upper 32 bits of its random number are below this.
        keys: `[n]` uint64, the SplitMix64 stream of each source.
        squares: sum squares.
        sums: `[n, 2]` float64; receives the sums before and after.
        lines: `[2, LINE]` float32, memory.
        lanes: `[2 * n, LINE]` float64, memory.

    Returns:
        0; -1 where the block could not be filled.
    """
    n, size, ready, origin = start_block(sources, source_desc)
    minus, values = lines[0], lines[1]
    minus[:] = np.float32(0)
    before, after = lanes[:n], lanes[n:]
    lanes[:] = 0.0
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if start + m > ready:
            origin, ready = advance_block(source_desc, ready)
            if ready < 0:
                return -1
        at = start - origin
        if subtract:
            widen(strip(base, at, m), minus)
        for i in range(n):
            load(strip_of(sources, i, at, m), minus, values)
            bound, lanes_before, lanes_after = keep[i], before[i], after[i]
            z = counter(keys[i], index + start)
            for j in range(m):
                size_j = abs(np.float64(values[j]))
                size_j = size_j * size_j if squares else size_j
                lanes_before[j] += size_j
                lanes_after[j] += size_j if (mixed(z) >> np.uint64(32)) < bound else 0.0
                z += GOLDEN
    for i in range(n):
        sums[i, 0] = before[i, :STRIP].sum()
        sums[i, 1] = after[i, :STRIP].sum()
    return 0
