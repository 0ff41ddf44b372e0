"""Kernels of the main loop of a merge: weighted sum, consensus, Gram matrix, sample.

    base     [E]     bits of the base's elements
    sources  [n, E]  bits of the sources' elements, or (float32 only) of their deltas
    out      [E]     bits of the merged elements

A kernel gives the same bits wherever a block begins or ends, and on any thread: counts are integers, and sums run over a strip
in float32, in as many lanes as the processor's vectors have, and then in float64, which the caller adds in the order of the
blocks. The relative error of the sums is at most 2**-18; in practice it is 1e-7 on small tensors and 1e-9 on large ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from paft_merge.compute.kernels import RUN, STRIP
from paft_merge.compute.kernels.primitives import (
    GOLDEN,
    MAGNITUDE,
    advance_block,
    bits_of,
    counter,
    double_if,
    extent,
    float_of,
    in_range_mask,
    jit,
    load,
    load_counted,
    low_mask,
    lowest,
    mixed,
    nonfinite,
    random,
    reassoc_add,
    square_of,
    start_block,
    store,
    strip,
    strip_of,
    widen,
)


@jit
def gram(base: Any, sources: Any, subtract: bool, source_desc: Any, out: Any, lines: Any, lanes: Any) -> int:
    """Inner products of the sources (or of their deltas) over one block.

    Args:
        base, sources, subtract, source_desc: as in `thresholds.histogram`.
        out: `[n, n]` float64; receives the symmetric matrix.
        lines: `[n + 1, LINE]` float32, memory.
        lanes: `[n * n, LINE]` float64, memory.

    Returns:
        0; -1 where the block could not be filled.
    """
    n, size, ready, origin = start_block(sources, source_desc)
    minus, values = lines[0], lines[1:]
    minus[:] = np.float32(0)
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
            load(strip_of(sources, i, at, m), minus, values[i])
        for i in range(n):
            for k in range(i + 1):
                left, right, lane = values[i], values[k], lanes[i * n + k]
                for j in range(m):
                    lane[j] += np.float64(left[j]) * np.float64(right[j])
    for i in range(n):
        for k in range(i + 1):
            out[i, k] = lanes[i * n + k, :STRIP].sum()
            out[k, i] = out[i, k]
    return 0


@jit
def _pick(
    base: Any, sources: Any, subtract: bool, skip: int, index: int, size: int, stride: int, out: Any, at: int, nothing: Any
) -> int:  # fmt: skip
    """`pick` from `size` entries that begin at position `skip` of the arrays and flat index `index`, into `out` from column `at` on."""
    n, span, values = extent(sources)[0], RUN * stride, out.view(np.float32)
    for number in range(index // span, (index + size + span - 1) // span):
        first = number * span + RUN * np.int64(random(np.uint64(0), number) % np.uint64(stride)) - index
        start, stop = max(int(first), 0), min(int(first) + RUN, size)
        m = stop - start
        if m <= 0:
            continue
        below = values[n, at : at + m]
        widen(strip(base, skip + start, m), below)
        minus = below if subtract else nothing
        for i in range(n):
            load(strip_of(sources, i, skip + start, m), minus, values[i, at : at + m])
        at += m
    return at


@jit
def _picked_on(
    base: Any, sources: Any, subtract: bool, source_desc: Any, index: int, begin: int, stride: int, picked: Any, taken: Any, nothing: Any
) -> tuple[int, int]:  # fmt: skip
    """`advance_block` from entry `begin` on, and `pick` the sample of the new piece."""
    origin, ready = advance_block(source_desc, begin)
    if picked.size and ready > begin:
        skip, count = begin - origin, ready - begin
        taken[0] = _pick(base, sources, subtract, skip, index + begin, count, stride, picked, taken[0], nothing)
    return origin, ready


@jit
def blend(
    out: Any, base: Any, sources: Any, subtract: bool, source_desc: Any, index: int, base_weight: float, weights: Any, key: np.uint64,
    tally: bool, counts: Any, sums: Any, stride: int, picked: Any, taken: Any, lines: Any,
) -> int:  # fmt: skip
    """Weighted sum: `base_weight * base + sum_i weights_i * source_i`, in that order, in float32, rounded once.

    Args:
        out: `[E]` bits, written.
        base: `[E]` bits, or empty when `base_weight` is 0.
        sources: `[n, E]` bits.
        subtract: a source enters as its delta, `source_i - base`.
        source_desc: as in `thresholds.histogram`.
        index: flat index of the block's first element in its tensor.
        base_weight: float32.
        weights: `[n]` float32.
        key: stream of stochastic rounding; 0 rounds to nearest.
        tally: whether to count the sources as deltas into `counts` `[n, 8]` and `sums` `[n, 4]`.
        stride, picked: as `stride` and `out` of `pick`; `picked` is `[n + 1, 0]` where no sample is wanted.
        taken: `[1]` int64, receives the number of sampled entries.
        lines: `[4, LINE]` float32, memory.

    Returns:
        The number of elements of `out` that are not finite; -1 where the block could not be filled.
    """
    n, size, ready, origin = start_block(sources, source_desc)
    minus, values, total, nothing = lines[0], lines[1], lines[2], lines[3]
    minus[:] = np.float32(0)
    nothing[:] = np.float32(0)
    wb, bad = np.float32(base_weight), 0
    taken[0] = 0
    if picked.size and ready:
        taken[0] = _pick(base, sources, subtract, 0, index, size, stride, picked, 0, nothing)
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if start + m > ready:
            origin, ready = _picked_on(
                base, sources, subtract, source_desc, index, ready, stride, picked, taken, nothing
            )
            if ready < 0:
                return -1
        at = start - origin
        if subtract:
            widen(strip(base, at, m), minus)
        half, whole = strip(base, at, m)
        for j in range(half.size):
            total[j] = wb * float_of(half[j])
        for j in range(whole.size):
            total[j] = wb * float_of(whole[j])
        if half.size + whole.size == 0:
            for j in range(m):
                total[j] = np.float32(0)
        for i in range(n):
            w = weights[i]
            if tally:
                load_counted(strip_of(sources, i, at, m), minus, values, counts[i], sums[i])
                for j in range(m):
                    total[j] = total[j] + w * values[j]
            else:
                half, whole = strip_of(sources, i, at, m)
                for j in range(half.size):
                    total[j] = total[j] + w * (float_of(half[j]) - minus[j])
                for j in range(whole.size):
                    total[j] = total[j] + w * (float_of(whole[j]) - minus[j])
        bad += nonfinite(total, m)
        store(total, strip(out, start, m), key, index + start)
    for i in range(n):
        # Nothing is trimmed and no sign is elected: every nonzero entry counts as kept and as elected.
        for k in range(2, 4):
            sums[i, k] = sums[i, 1]
        for k in range(5, 7):
            counts[i, k] += size - counts[i, 0]
    return bad


@njit(inline="always")
def set_aside(
    values: Any, base_f: Any, m: int, start: int, low: Any, width: Any, place: Any, held: Any, found: Any, tally: Any, at: int
) -> int:  # fmt: skip
    """Move the undecided entries of a strip into `held` and zero their deltas; returns the number of entries in `held`."""
    n, begin = len(low), at
    for first in range(0, m, 64):
        left = np.uint64(0)
        for i in range(n):
            left |= in_range_mask(values[i], first, low[i], width[i])
        left &= low_mask(m - first)
        while left:
            place[at] = first + lowest(left)
            at += 1
            left &= left - np.uint64(1)
    for i in range(n):
        row, lo, span, many, above = values[i], low[i], width[i], tally[i, 0], tally[i, 1]
        high = np.uint32(lo + span)
        for k in range(begin, at):
            j = place[k]
            v = row[j]
            row[j] = np.float32(0)
            held[i, k] = v
            u = np.uint32(bits_of(v) & MAGNITUDE)
            found[i, many] = u
            many += np.int64(np.uint32(u - lo) < span)
            above += np.int64(u >= high)
        tally[i, 0], tally[i, 1] = many, above
    for k in range(begin, at):
        j = place[k]
        held[n, k] = base_f[j]
        place[k] = start + j
    return at


@njit(inline="always")
def cast_vote(
    delta: Any, m: int, least: Any, scale: Any, weight: Any, by_count: bool, vote: Any, fresh: bool
) -> tuple[int, float]:  # fmt: skip
    """Trim a strip, scale the rest and add it to the votes; returns the number of kept entries, and the sum of their squares.

    Args:
        delta: `[m]` float32; receives the kept entries times `scale * weight`.
        least: magnitudes (bits) below this are trimmed.
        by_count: a kept entry's vote is its sign.
        vote: `[m]` float32, added to; set with `fresh`.
    """
    zero, one = np.float32(0), np.float32(1)
    kept, square = np.uint32(0), zero
    for j in range(m):
        u = bits_of(delta[j])
        stays = np.uint32(u & MAGNITUDE) >= least
        v = float_of(u) if stays else zero
        kept = np.uint32(kept + double_if(stays))
        square = reassoc_add(square, v * v)
        v = v * scale * weight
        delta[j] = v
        sign = one if v > zero else (-one if v < zero else zero)
        before = vote[j]
        vote[j] = (zero if fresh else before) + (sign if by_count else v)
    return kept >> 1, square


@njit(inline="always")
def agree(
    delta: Any, m: int, vote: Any, everyone: bool, weight: Any, share: Any, result: Any, divisor: Any, fresh: bool
) -> tuple[int, float]:  # fmt: skip
    """Add the entries with the elected sign to the result; returns their number, and the sum of their squares.

    Args:
        delta: `[m]` float32, the kept entries of a source.
        vote: `[m]` float32, the elected signs; ignored with `everyone`.
        weight: multiplies the delta.
        share: added to the divisor wherever the source agrees and is not zero.
        result, divisor: `[m]` float32, added to; set with `fresh`.
    """
    zero = np.float32(0)
    elected, square = np.uint32(0), zero
    for j in range(m):
        v = delta[j]
        v = v if (v * vote[j] > zero) | everyone else zero
        agrees = v != zero
        so_far, divided = result[j], divisor[j]
        result[j] = (zero if fresh else so_far) + v * weight
        divisor[j] = (zero if fresh else divided) + (share if agrees else zero)
        elected = np.uint32(elected + double_if(agrees))
        square = reassoc_add(square, v * v)
    return elected >> 1, square


@jit
def consensus(
    out: Any, base: Any, sources: Any, subtract: bool, source_desc: Any, index: int, weights: Any, scales: Any,
    low: Any, low_cut: Any, high: Any, high_cut: Any, shrink: Any, keep: Any, keys: Any,
    elect: int, tie_positive: bool, normalize: int, factor: float, key: np.uint64, counts: Any, sums: Any,
    open_low: Any, open_width: Any, place: Any, held: Any, found: Any, tally: Any,
    stride: int, picked: Any, taken: Any, wide: Any, lines: Any,
) -> int:  # fmt: skip
    """Trim or drop each delta, elect a sign per entry, and add the entries that agree to the base.

    Args:
        out, base, sources, subtract, source_desc, index, key: as in `blend`.
        weights: `[n]` float32, the scalar of each source.
        scales: `[n]` float32, multiplies the surviving entries of a delta (rescaling).
        low, low_cut: `[n]` uint32 and int64: an entry survives when its magnitude (bits) is above `low`, or equal to it
            with a flat index below `low_cut`.
        high, high_cut: likewise, an upper bound: an entry that passes it is dropped (outliers). `high` of 0xFFFFFFFF drops none.
        shrink: `[n]` float32, subtracted from the magnitude of each survivor (soft thresholding).
        keep, keys: as in `thresholds.dropped_norms`; `keep` of 2**32 or more drops nothing.
        elect: a value of ELECT.
        tie_positive: whether a vote of zero elects +; otherwise no source agrees there.
        normalize: a value of NORMALIZE; a divisor of zero counts as one.
        factor: float32, multiplies the merged delta.
        counts, sums: `[n, 8]` int64 and `[n, 4]` float64, the tally (`kernels.COUNTS`, `SUMS`), zeros.
        open_low, open_width: `[n]` uint32, an interval of magnitudes per source, as in `thresholds.collect`. An entry is undecided
            where any source is inside its interval, because the final threshold may keep or drop it. Its deltas are counted, moved
            to `held`, and merged as zero.
        place: `[E]` int32, receives the positions of undecided entries in the block in ascending order; `[0]` without intervals.
        held: `[n + 1, E]` float32, receives the deltas of the undecided entries and, last, the base; `[n + 1, 0]` likewise.
        found: `[n, E]` uint32, receives the magnitudes inside each source's interval.
        tally: `[n + 1, 2]` int64, added to: entries inside each interval and above it. Its last row receives the number undecided.
        stride, picked: as `stride` and `out` of `pick`; `picked` is `[n + 1, 0]` where no sample is wanted.
        taken: `[1]` int64, receives the number of sampled entries.
        wide: `[n]` uint8, memory.
        lines: `[n + 5, LINE]` float32, memory.

    Returns:
        The number of elements of `out` that are not finite; -1 where the block could not be filled.
    """
    n, size, ready, origin = start_block(sources, source_desc)
    base_f, nothing, vote, result, divisor, values = lines[0], lines[1], lines[2], lines[3], lines[4], lines[5:]
    nothing[:] = np.float32(0)
    minus = base_f if subtract else nothing
    lam, zero, one = np.float32(factor), np.float32(0), np.float32(1)
    everything = np.uint64(1) << np.uint64(32)
    bad, many = 0, 0
    taken[0] = 0
    if picked.size and ready:
        taken[0] = _pick(base, sources, subtract, 0, index, size, stride, picked, 0, nothing)
    for start in range(0, size, STRIP):
        m, first = min(STRIP, size - start), index + start
        if start + m > ready:
            origin, ready = _picked_on(
                base, sources, subtract, source_desc, index, ready, stride, picked, taken, nothing
            )
            if ready < 0:
                return -1
        at = start - origin
        widen(strip(base, at, m), base_f)
        for i in range(n):
            wide[i] = load_counted(strip_of(sources, i, at, m), minus, values[i], counts[i], sums[i])
        if place.size:
            many = set_aside(values, base_f, m, start, open_low, open_width, place, held, found, tally, many)
        for i in range(n):
            delta, soft, least = values[i], shrink[i], np.uint32(1)
            lo, lo_cut, hi, hi_cut = low[i], low_cut[i], high[i], high_cut[i]
            whole = (first + m <= lo_cut) | (first >= lo_cut)
            if whole & (hi == np.uint32(0xFFFFFFFF)) & (hi_cut <= 0) & (soft == zero):
                least = np.uint32(min(max(lo + np.uint32(first >= lo_cut), 1), 0xFFFFFFFF))
            else:
                for j in range(m):
                    u, at = np.uint32(bits_of(delta[j]) & MAGNITUDE), first + j
                    stays = ((u > lo) | ((u == lo) & (at < lo_cut))) & ~((u > hi) | ((u == hi) & (at < hi_cut)))
                    delta[j] = delta[j] if stays else zero
            if keep[i] < everything:
                z = counter(keys[i], first)
                for j in range(m):
                    delta[j] = delta[j] if (mixed(z) >> np.uint64(32)) < keep[i] else zero
                    z += GOLDEN
            if soft != zero:
                for j in range(m):
                    v = delta[j]
                    delta[j] = v - soft if v > zero else (v + soft if v < zero else v)
            if wide[i]:
                for j in range(m):
                    delta[j] = delta[j] if (bits_of(delta[j]) & MAGNITUDE) >= least else zero
                sums[i, 2] += square_of(delta, m)
            weight = weights[i] if elect == 1 else one
            kept, square = cast_vote(delta, m, least, scales[i], weight, elect == 3, vote, i == 0)
            counts[i, 5] += kept
            tally[i, 1] += kept  # outside an interval, an entry is kept exactly when it is above
            if not wide[i]:
                sums[i, 2] += np.float64(square)
        for j in range(m):
            s = vote[j]
            vote[j] = one if (s > zero) | (tie_positive & (s == zero)) else (-one if s < zero else zero)
        for i in range(n):
            delta, everyone = values[i], elect == 0
            if wide[i]:
                for j in range(m):
                    delta[j] = delta[j] if (delta[j] * vote[j] > zero) | everyone else zero
                sums[i, 3] += square_of(delta, m)
            weight, share = one if elect == 1 else weights[i], weights[i] if normalize == 1 else one
            elected, square = agree(delta, m, vote, everyone, weight, share, result, divisor, i == 0)
            counts[i, 6] += elected
            if not wide[i]:
                sums[i, 3] += np.float64(square)
        if n == 0:
            result[:m] = zero
        elif normalize != 0:
            for j in range(m):
                d = divisor[j]
                result[j] = result[j] / (d if d != zero else one)
        for j in range(m):
            result[j] = base_f[j] + lam * result[j]
        bad += nonfinite(result, m)
        store(result, strip(out, start, m), key, first)
    for i in range(n):
        # The squares are those of weight * scale * delta; the tally counts the delta.
        unit = np.float64(scales[i]) * (np.float64(weights[i]) if elect == 1 else 1.0)
        sums[i, 3] = sums[i, 3] / (unit * unit) if unit != 0.0 else 0.0
    tally[n, 0] = many
    return bad


@jit
def pick(base: Any, sources: Any, subtract: bool, index: int, stride: int, out: Any, lines: Any) -> int:
    """Copy the sampled entries of a block into `out`: one run of RUN entries, at a random position, of every `stride` runs.

    Args:
        base, sources, subtract: as in `thresholds.histogram`.
        index: flat index of the block's first element in its tensor.
        stride: runs of which one is taken.
        out: `[n + 1, K]` uint32, receives the deltas and, last, the base; K must be large enough.
        lines: `[1, LINE]` float32, memory.

    Returns:
        The number of sampled entries.
    """
    lines[0, :RUN] = np.float32(0)
    return int(_pick(base, sources, subtract, 0, index, extent(sources)[1], stride, out, 0, lines[0]))
