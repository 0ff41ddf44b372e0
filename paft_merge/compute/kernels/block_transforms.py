"""Kernels from one block to another, which the rarer methods apply before the weighted sum.

Arguments are those of `merging`. No kernel here rounds to a storage type: the result is float32, and `merging.blend` or
`merging.consensus` writes it.

    base     [E]        bits, read only with `subtract`
    sources  [n, E]     bits of values or deltas
    lines    [K, LINE]  float32, memory
    lanes    [K, LINE]  float64, memory
"""

from __future__ import annotations

from typing import Any

import numpy as np

from paft_merge.compute.kernels import STRIP
from paft_merge.compute.kernels.primitives import extent, jit, load, load_counted, random, strip, strip_of, widen


@jit
def tally(base: Any, sources: Any, subtract: bool, counts: Any, sums: Any, lines: Any) -> None:
    """Add counts and sums of a block's deltas to `counts` `[n, 8]` int64 and `sums` `[n, 4]` float64 (see `kernels.COUNTS`, `SUMS`).

    Nothing is trimmed and no sign is elected: every nonzero entry counts as kept and as elected.
    """
    n, size = extent(sources)
    minus, values = lines[0], lines[1]
    minus[:] = np.float32(0)
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            widen(strip(base, start, m), minus)
        for i in range(n):
            load_counted(strip_of(sources, i, start, m), minus, values, counts[i], sums[i])
    for i in range(n):
        for k in range(2, 4):
            sums[i, k] = sums[i, 1]
        for k in range(5, 7):
            counts[i, k] += size - counts[i, 0]


@jit
def variance(base: Any, sources: Any, subtract: bool, total: int, out: Any, lines: Any, lanes: Any) -> None:
    """Variance of every entry over `total` sources; the `total - n` sources that are not given count as zero.

    Args:
        base, sources, subtract: as above.
        total: at least n.
        out: `[E]` float32, written; computed in float64 and rounded once, so equal sources give exactly zero.
    """
    n, size = extent(sources)
    minus, values = lines[0], lines[1:]
    minus[:] = np.float32(0)
    mean, spread = lanes[0], lanes[1]
    absent = np.float64(total - n)
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            widen(strip(base, start, m), minus)
        for j in range(m):
            mean[j] = 0.0
        for i in range(n):
            load(strip_of(sources, i, start, m), minus, values[i])
            for j in range(m):
                mean[j] += np.float64(values[i, j])
        for j in range(m):
            mean[j] /= total
            spread[j] = absent * (mean[j] * mean[j])
        for i in range(n):
            for j in range(m):
                apart = np.float64(values[i, j]) - mean[j]
                spread[j] += apart * apart
        for j in range(m):
            out[start + j] = np.float32(spread[j] / total)


@jit
def select(
    base: Any, sources: Any, subtract: bool, index: int, by: Any, low: Any, low_cut: int, out: Any, lines: Any
) -> None:
    """Keep the entries of every source at which `by` is large enough, and zero the others.

    Args:
        base, sources, subtract: as above.
        index: flat index of the block's first element in its tensor.
        by: `[E]` float32 bits, not negative.
        low, low_cut: an entry is kept where `by` is above `low` (bits), or equal to it at a flat index below `low_cut`.
        out: `[n, E]` float32, written.
    """
    n, size = extent(sources)
    minus, values = lines[0], lines[1]
    minus[:] = np.float32(0)
    bound = np.uint32(low)
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            widen(strip(base, start, m), minus)
        for i in range(n):
            load(strip_of(sources, i, start, m), minus, values)
            for j in range(m):
                u = by[start + j]
                stays = (u > bound) | ((u == bound) & (index + start + j < low_cut))
                out[i, start + j] = values[j] if stays else np.float32(0)


@jit
def swap(base: Any, sources: Any, subtract: bool, t: float, out: Any, lines: Any) -> None:
    """NearSwap: `delta * clip(t / max(|delta|, 1e-6), 0, 1)` of one source into `out` `[E]` float32."""
    size = extent(sources)[1]
    minus, values = lines[0], lines[1]
    minus[:] = np.float32(0)
    reach, zero, one, least = np.float32(t), np.float32(0), np.float32(1), np.float32(1e-6)
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            widen(strip(base, start, m), minus)
        load(strip_of(sources, 0, start, m), minus, values)
        for j in range(m):
            weight = reach / max(abs(values[j]), least)
            out[start + j] = values[j] * min(max(weight, zero), one)


@jit
def overlaps(
    base: Any, sources: Any, subtract: bool, epsilon: float, counts: Any, energy: Any, lines: Any, lanes: Any
) -> None:
    """Count, per source, the entries with |delta| > epsilon that other sources share, and those of this source alone.

    Args:
        base, sources, subtract: as above.
        epsilon: compared in float32.
        counts: `[n, 2]` int64, added to: shared entries, and those of the source alone.
        energy: `[n]` float64, added to: the sum of the squares of both.
    """
    n, size = extent(sources)
    minus, values, many, large = lines[0], lines[1], lines[2], lines[3:]
    minus[:] = np.float32(0)
    bound = np.float32(epsilon)
    zero, one = np.float32(0), np.float32(1)
    lanes[:] = 0.0
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            widen(strip(base, start, m), minus)
        for j in range(m):
            many[j] = zero
        for i in range(n):
            load(strip_of(sources, i, start, m), minus, values)
            for j in range(m):
                large[i, j] = one if abs(values[j]) > bound else zero
                many[j] += large[i, j]
                wide = np.float64(values[j]) if large[i, j] > zero else 0.0
                lanes[i, j] += wide * wide
        for i in range(n):
            shared, own = 0, 0
            for j in range(m):
                shared += (large[i, j] > zero) & (many[j] > one)
                own += (large[i, j] > zero) & (many[j] == one)
            counts[i, 0] += shared
            counts[i, 1] += own
    for i in range(n):
        energy[i] += lanes[i, :STRIP].sum()


@jit
def share(base: Any, sources: Any, subtract: bool, epsilon: float, scales: Any, out: Any, lines: Any) -> None:
    """Reinforced Agent Merging: entries that one source changes are added, entries that several change are averaged over them.

    Args:
        base, sources, subtract: as above.
        epsilon: an entry counts as changed when |delta| > epsilon, in float32.
        scales: `[n]` float32, multiplies the entries that a source alone changes.
        out: `[E]` float32, written.
    """
    n, size = extent(sources)
    minus, many, total, values = lines[0], lines[1], lines[2], lines[3:]
    minus[:] = np.float32(0)
    bound, zero = np.float32(epsilon), np.float32(0)
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            widen(strip(base, start, m), minus)
        for j in range(m):
            many[j] = zero
            total[j] = zero
        for i in range(n):
            load(strip_of(sources, i, start, m), minus, values[i])
            for j in range(m):
                values[i, j] = values[i, j] if abs(values[i, j]) > bound else zero
                many[j] += np.float32(values[i, j] != zero)
        for i in range(n):
            scale = scales[i]
            for j in range(m):
                total[j] += values[i, j] / many[j] if many[j] > np.float32(1) else values[i, j] * scale
        for j in range(m):
            out[start + j] = total[j]


@jit
def fuse(
    base: Any, sources: Any, subtract: bool, weights: Any, out: Any, elected: Any, energy: Any, lines: Any, lanes: Any
) -> None:
    """SCE's fusion: the weighted mean, at each entry, of the deltas with the sign of their sum (zero elects +).

    Args:
        base, sources, subtract: as above.
        weights: `[n]` float32, not negative.
        out: `[E]` float32, written; the divisor is at least 1e-6.
        elected: `[n]` int64, added to: entries with the elected sign.
        energy: `[n]` float64, added to: the sum of their squares.
    """
    n, size = extent(sources)
    minus, vote, total, divisor, values = lines[0], lines[1], lines[2], lines[3], lines[4:]
    minus[:] = np.float32(0)
    zero, least = np.float32(0), np.float32(1e-6)
    lanes[:] = 0.0
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        for j in range(m):
            vote[j] = zero
            total[j] = zero
            divisor[j] = zero
        if subtract:
            widen(strip(base, start, m), minus)
        for i in range(n):
            load(strip_of(sources, i, start, m), minus, values[i])
            for j in range(m):
                vote[j] += values[i, j]
        for i in range(n):
            w, count = weights[i], 0
            for j in range(m):
                v = values[i, j]
                agrees = ((v > zero) & (vote[j] >= zero)) | ((v < zero) & (vote[j] < zero))
                total[j] += v * w if agrees else zero
                divisor[j] += w if agrees else zero
                count += agrees
                wide = np.float64(v) if agrees else 0.0
                lanes[i, j] += wide * wide
            elected[i] += count
        for j in range(m):
            out[start + j] = total[j] / max(divisor[j], least)
    for i in range(n):
        energy[i] += lanes[i, :STRIP].sum()


@jit
def largest(
    base: Any, sources: Any, subtract: bool, weights: Any, out: Any, won: Any, energy: Any, lines: Any, lanes: Any
) -> None:
    """MagMax: at each entry the weighted delta of the largest magnitude; of equal ones the first.

    Args:
        base, sources, subtract: as above.
        weights: `[n]` float32; magnitudes are those of weight * delta.
        out: `[E]` float32, written.
        won: `[n]` int64, added to: entries that are taken from a source, without zeros.
        energy: `[n]` float64, added to: the sum of the squares of the deltas there.
    """
    n, size = extent(sources)
    minus, best, owner, values = lines[0], lines[1], lines[2], lines[3:]
    minus[:] = np.float32(0)
    lanes[:] = 0.0
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            widen(strip(base, start, m), minus)
        for j in range(m):
            best[j] = np.float32(0)
            owner[j] = np.float32(-1)
        for i in range(n):
            load(strip_of(sources, i, start, m), minus, values[i])
            w, number, row = weights[i], np.float32(i), values[i]
            for j in range(m):
                v, so_far, by = w * row[j], best[j], owner[j]
                larger = abs(v) > abs(so_far)
                best[j] = v if larger else so_far
                owner[j] = number if larger else by
        for i in range(n):
            count, number, row, lane = np.uint32(0), np.float32(i), values[i], lanes[i]
            for j in range(m):
                mine, v = owner[j] == number, row[j]
                count += np.uint32(mine)
                wide = np.float64(v if mine else np.float32(0))
                lane[j] += wide * wide
            won[i] += np.int64(count)
        for j in range(m):
            out[start + j] = best[j]
    for i in range(n):
        energy[i] += lanes[i, :STRIP].sum()


@jit
def keep_ranked(delta: Any, order: Any, inner: int, index: int, keep: Any, key: Any, out: Any) -> None:
    """Drop entries at random, with a probability that depends on the rank of an entry within its row.

    Args:
        delta: `[E]` float32, rows of `L * inner` entries; entry (p, j) of a row is at `p * inner + j`.
        order: `[E / L, L]` uint64, for each row and j: magnitude in the upper 32 bits, p in the lower, smallest first.
        inner: entries between two neighbours in rank.
        index: flat index of the block's first element in its tensor.
        keep: `[L]` uint64, an entry of rank r stays when the upper 32 bits of its random number are below `keep[r]`.
        key: uint64, the SplitMix64 stream of the source.
        out: `[E]` float32, written.
    """
    rows, length = order.shape
    for row in range(rows):
        first = row // inner * (length * inner) + row % inner
        for rank in range(length):
            at = first + np.int64(order[row, rank] & np.uint64(0xFFFFFFFF)) * inner
            stays = (random(key, index + at) >> np.uint64(32)) < keep[rank]
            out[at] = delta[at] if stays else np.float32(0)


@jit
def gram_rows(base: Any, sources: Any, subtract: bool, row: int, out: Any, lines: Any, lanes: Any) -> None:
    """Inner products of the sources within every row of `row` entries, into `out` `[E / row, n, n]` float64."""
    n, size = extent(sources)
    minus, values = lines[0], lines[1:]
    minus[:] = np.float32(0)
    width = min(row, STRIP)
    for r in range(size // row):
        for i in range(n):
            for k in range(i + 1):
                for j in range(width):
                    lanes[i * n + k, j] = 0.0
        for start in range(r * row, (r + 1) * row, STRIP):
            m = min(STRIP, (r + 1) * row - start)
            if subtract:
                widen(strip(base, start, m), minus)
            for i in range(n):
                load(strip_of(sources, i, start, m), minus, values[i])
            for i in range(n):
                for k in range(i + 1):
                    for j in range(m):
                        lanes[i * n + k, j] += np.float64(values[i, j]) * np.float64(values[k, j])
        for i in range(n):
            for k in range(i + 1):
                out[r, i, k] = lanes[i * n + k, :width].sum()
                out[r, k, i] = out[r, i, k]


@jit
def gram_columns(base: Any, sources: Any, subtract: bool, row: int, out: Any, lines: Any) -> None:
    """Inner products of the sources within every column of rows of `row` entries, added to `out` `[n, n, row]` float64."""
    n, size = extent(sources)
    minus, values = lines[0], lines[1:]
    minus[:] = np.float32(0)
    for r in range(size // row):
        first = r * row
        for column in range(0, row, STRIP):
            m = min(STRIP, row - column)
            start = first + column
            if subtract:
                widen(strip(base, start, m), minus)
            for i in range(n):
                load(strip_of(sources, i, start, m), minus, values[i])
            for i in range(n):
                for k in range(n):
                    lane = out[i, k, column : column + m]
                    for j in range(m):
                        lane[j] += np.float64(values[i, j]) * np.float64(values[k, j])


@jit
def mix(base: Any, sources: Any, subtract: bool, row: int, across: bool, weights: Any, out: Any, lines: Any) -> None:
    """Weighted sum of the sources with separate weights for every row, or for every column.

    Args:
        base, sources, subtract: as above.
        row: entries of a row.
        across: whether weights are per column.
        weights: float32, `[n, row]` with `across`, else `[n, E / row]`.
        out: `[E]` float32, written.
    """
    n, size = extent(sources)
    minus, values, total = lines[0], lines[1], lines[2]
    minus[:] = np.float32(0)
    for r in range(size // row):
        for column in range(0, row, STRIP):
            m = min(STRIP, row - column)
            start = r * row + column
            if subtract:
                widen(strip(base, start, m), minus)
            for j in range(m):
                total[j] = np.float32(0)
            for i in range(n):
                load(strip_of(sources, i, start, m), minus, values)
                if across:
                    own = weights[i, column : column + m]
                    for j in range(m):
                        total[j] += own[j] * values[j]
                else:
                    w = weights[i, r]
                    for j in range(m):
                        total[j] += w * values[j]
            for j in range(m):
                out[start + j] = total[j]
