"""The fused float32 loops that a CPU merge spends its time in: numba, one block of a tensor at a time, no lock held.

A block is a run of consecutive elements of one tensor, as bits: `uint16` holds bfloat16, `uint32` holds float32.

    base     [E]     the base's elements
    sources  [n, E]  the sources' elements, or (float32 only) their deltas
    out      [E]     where the merged elements go

Every loop walks the block in strips that stay in the L1 cache and keeps each step a plain vector loop over the strip.
Nothing here depends on where a block begins or ends, so the same bits come out for any block size and thread: counts are
integers, and sums run over a strip in float32, in as many lanes as the processor's vectors have, and then in float64, that
the caller adds block by block in order. What they tell of a delta is right to 2**-18 of itself, in practice to seven digits of a small tensor and nine of a large one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

Bits = NDArray[np.uint16] | NDArray[np.uint32]

STRIP = 1024
"""Elements of a strip: 4 KiB of float32, so that a handful of strips fill the L1 cache."""

BINS = 1 << 15
"""Bins of a histogram of magnitudes: the upper 15 bits of a float32 without its sign (8 of exponent, 7 of mantissa)."""

ELECT = {"none": 0, "weighted": 1, "unweighted": 2, "count": 3}
"""How the sign of an entry is elected; see `methods.Consensus`."""

NORMALIZE = {"none": 0, "weights": 1, "count": 2}
"""What the kept entries are divided by; see `methods.Consensus`."""

COUNTS = ("zeros", "below_1e-06", "below_1e-05", "below_1e-04", "below_1e-03", "kept", "elected", "max_bits")
"""The integer columns of a tally, one row a source."""

SUMS = ("abs", "square", "kept_square", "elected_square")
"""The float64 columns of a tally, one row a source: what the delta holds, and what trimming and election leave of it."""

_MAGNITUDE = np.uint32(0x7FFFFFFF)
INFINITY = 0x7F800000
"""Bits of infinity: every finite magnitude is below."""
_INFINITY = np.uint32(INFINITY)
_E6, _E5, _E4, _E3 = (np.float32(e).view(np.uint32) for e in (1e-6, 1e-5, 1e-4, 1e-3))
_SMALL, _LARGE = (np.float32(e).view(np.uint32) for e in (2.0**-50, 2.0**60))
"""Bits of magnitudes whose squares, and some thousand of them added, are far from the ends of float32."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)

jit = njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)


@intrinsic
def _bits_of(_: Any, value: Any) -> Any:
    """The bits of a float32, in a register: a view of a whole array, read as one type and written as another, is no vector loop."""
    return types.uint32(types.float32), lambda _, builder, __, arguments: builder.bitcast(arguments[0], ir.IntType(32))


@intrinsic
def _float_of(_: Any, bits: Any) -> Any:
    """The float32 that has these bits."""
    return types.float32(types.uint32), lambda _, builder, __, arguments: builder.bitcast(arguments[0], ir.FloatType())


@intrinsic
def _sum(_: Any, total: Any, value: Any) -> Any:
    """`total + value` in float32, where the order of many such additions is free: so that a loop of them can be a vector loop."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=("reassoc",))

    return types.float32(types.float32, types.float32), generate


def _load(x: Any, bits: Any) -> Any:
    """Put the elements of `x` into `bits` as float32 bits."""


@overload(_load, inline="always")
def _load_impl(x: Any, bits: Any) -> Any:
    if x.dtype == types.uint16:

        def widen(x: Any, bits: Any) -> Any:
            for j in range(x.size):
                bits[j] = np.uint32(x[j]) << np.uint32(16)

        return widen

    def copy(x: Any, bits: Any) -> Any:
        for j in range(x.size):
            bits[j] = x[j]

    return copy


def _store(bits: Any, out: Any, key: Any, index: Any) -> Any:
    """Round the float32 of `bits` into `out`: to nearest even, or stochastically when `key` is not 0."""


@overload(_store, inline="always")
def _store_impl(bits: Any, out: Any, key: Any, index: Any) -> Any:
    if out.dtype == types.uint16:

        def narrow(bits: Any, out: Any, key: Any, index: Any) -> Any:
            if key != np.uint64(0):
                for j in range(out.size):
                    # A uniform 16-bit number added below the cut carries with the probability that the cut-off part has.
                    noise = np.uint32(_hash(key, index + j) >> np.uint64(48))
                    out[j] = np.uint16((bits[j] + noise) >> np.uint32(16))
            else:
                for j in range(out.size):
                    u = bits[j]
                    odd = (u >> np.uint32(16)) & np.uint32(1)
                    out[j] = np.uint16((u + np.uint32(0x7FFF) + odd) >> np.uint32(16))

        return narrow

    def copy(bits: Any, out: Any, key: Any, index: Any) -> Any:
        for j in range(out.size):
            out[j] = bits[j]

    return copy


@njit(inline="always")
def _hash(key: np.uint64, index: int) -> np.uint64:
    """The `index`-th number of SplitMix64 started at `key` (Steele, Lea, Flood 2014)."""
    z = key + np.uint64(index + 1) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


@njit(inline="always")
def _load_delta(strip: Any, base_f: Any, subtract: bool, bits: Any, values: Any) -> None:
    """Put a strip of one source's delta into `values` (whose bits are `bits`)."""
    _load(strip, bits)
    if subtract:
        for j in range(strip.size):
            values[j] = values[j] - base_f[j]


@jit
def histogram(base: Any, sources: Any, subtract: bool, counts: Any, lows: Any) -> None:
    """Count magnitudes by their upper bits, exactly.

    Args:
        base: `[E]` bits; read only with `subtract`.
        sources: `[n, E]` bits.
        subtract: sources are values, and their deltas are meant.
        counts: `[n, BINS]` int64; entries of each bin are added.
        lows: `[n, BINS]` int64; the sum of the entries' lower 16 bits is added. With `counts` it gives the L1 norm of a
            bin without rounding (see `sparsify.l1_of_bins`). May be `[n, 0]` when it is not wanted.
    """
    n, size = sources.shape
    base_u, bits = np.empty(STRIP, np.uint32), np.empty(STRIP, np.uint32)
    base_f, values = base_u.view(np.float32), bits.view(np.float32)
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            _load(base[start : start + m], base_u)
        for i in range(n):
            _load_delta(sources[i, start : start + m], base_f, subtract, bits, values)
            row, low = counts[i], lows[i]
            if low.size:
                for j in range(m):
                    u = bits[j] & _MAGNITUDE
                    row[u >> np.uint32(16)] += 1
                    low[u >> np.uint32(16)] += np.int64(u & np.uint32(0xFFFF))
            else:
                for j in range(m):
                    row[(bits[j] & _MAGNITUDE) >> np.uint32(16)] += 1


@jit
def collect(base: Any, sources: Any, subtract: bool, low: Any, width: Any, found: Any, counts: Any) -> None:
    """Gather the magnitudes inside a bracket and count those above it.

    Args:
        base, sources, subtract: as in `histogram`.
        low: `[n]` uint32, the lowest magnitude (bits) of each source's bracket.
        width: `[n]` uint32, the number of bit patterns in the bracket; 0 skips the source.
        found: `[n, E + 1]` uint32; row i receives the magnitudes inside, in order of position.
        counts: `[n, 2]` int64; receives how many are inside and how many above.
    """
    n, size = sources.shape
    base_u, bits = np.empty(STRIP, np.uint32), np.empty(STRIP, np.uint32)
    base_f, values = base_u.view(np.float32), bits.view(np.float32)
    inside = np.zeros(STRIP, np.uint8)
    words = inside.view(np.uint64)  # eight flags at a time: few are set
    for i in range(n):
        counts[i, 0] = 0
        counts[i, 1] = 0
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            _load(base[start : start + m], base_u)
        for i in range(n):
            if width[i] == 0:
                continue
            _load_delta(sources[i, start : start + m], base_f, subtract, bits, values)
            lo, span, row, at = low[i], width[i], found[i], counts[i, 0]
            high, above = lo + span, np.uint32(0)
            for j in range(m):
                u = bits[j] & _MAGNITUDE
                bits[j] = u
                above = np.uint32(above + np.uint32(u >= high))
                inside[j] = np.uint8(np.uint32(u - lo) < span)
            for word in range((m + 7) // 8):
                if words[word]:
                    for j in range(8 * word, min(8 * word + 8, m)):
                        row[at] = bits[j]
                        at += np.int64(inside[j])
            counts[i, 0] = at
            counts[i, 1] += above


@jit
def dropped_l1(base: Any, sources: Any, subtract: bool, index: int, keep: Any, keys: Any, sums: Any) -> None:
    """Add up |delta| before and after a random drop.

    Args:
        base, sources, subtract: as in `histogram`.
        index: flat index of the block's first element in its tensor.
        keep: `[n]` uint64, an entry stays when the upper 32 bits of its hash are below this.
        keys: `[n]` uint64, the stream of each source.
        sums: `[n, 2]` float64; receives the sums before and after.
    """
    n, size = sources.shape
    base_u, bits = np.empty(STRIP, np.uint32), np.empty(STRIP, np.uint32)
    base_f, values = base_u.view(np.float32), bits.view(np.float32)
    before, after = np.zeros((n, STRIP)), np.zeros((n, STRIP))
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            _load(base[start : start + m], base_u)
        for i in range(n):
            _load_delta(sources[i, start : start + m], base_f, subtract, bits, values)
            key, bound, lanes_before, lanes_after = keys[i], keep[i], before[i], after[i]
            for j in range(m):
                size_j = abs(np.float64(values[j]))
                lanes_before[j] += size_j
                stays = (_hash(key, index + start + j) >> np.uint64(32)) < bound
                lanes_after[j] += size_j if stays else 0.0
    for i in range(n):
        sums[i, 0] = before[i].sum()
        sums[i, 1] = after[i].sum()


@jit
def gram(base: Any, sources: Any, subtract: bool, out: Any) -> None:
    """Inner products of the sources (or of their deltas) over one block.

    Args:
        base, sources, subtract: as in `histogram`.
        out: `[n, n]` float64; receives the symmetric matrix.
    """
    n, size = sources.shape
    base_u = np.empty(STRIP, np.uint32)
    base_f = base_u.view(np.float32)
    bits = np.empty((n, STRIP), np.uint32)
    values = bits.view(np.float32)
    lanes = np.zeros((n, n, STRIP))
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            _load(base[start : start + m], base_u)
        for i in range(n):
            _load_delta(sources[i, start : start + m], base_f, subtract, bits[i], values[i])
        for i in range(n):
            for k in range(i + 1):
                left, right, lane = values[i], values[k], lanes[i, k]
                for j in range(m):
                    lane[j] += np.float64(left[j]) * np.float64(right[j])
    for i in range(n):
        for k in range(i + 1):
            out[i, k] = lanes[i, k].sum()
            out[k, i] = out[i, k]


@njit(inline="always")
def _tally(values: Any, count: int, counts: Any, sums: Any) -> bool:
    """Add one strip of a delta to its row of the tally; say whether its squares leave the range of float32."""
    largest, zeros, e6, e5, e4, e3 = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
    absolute, square = np.float32(0), np.float32(0)
    for j in range(count):  # 32-bit counters: twice as many of them fit in a register
        v = values[j]
        u = _bits_of(v) & _MAGNITUDE
        largest = max(largest, u)
        zeros = np.uint32(zeros + np.uint32(u == np.uint32(0)))
        e6 = np.uint32(e6 + np.uint32(u < _E6))
        e5 = np.uint32(e5 + np.uint32(u < _E5))
        e4 = np.uint32(e4 + np.uint32(u < _E4))
        e3 = np.uint32(e3 + np.uint32(u < _E3))
        absolute = _sum(absolute, abs(v))
        square = _sum(square, v * v)
    counts[0] += zeros
    counts[1] += e6
    counts[2] += e5
    counts[3] += e4
    counts[4] += e3
    counts[7] = max(counts[7], np.int64(largest))
    wide = (largest > _LARGE) | ((largest < _SMALL) & (largest > np.uint32(0)))
    if wide:
        for j in range(count):
            sums[0] += abs(np.float64(values[j]))
        sums[1] += _square(values, count)
    else:
        sums[0] += np.float64(absolute)
        sums[1] += np.float64(square)
    return wide


@njit(inline="always")
def _square(values: Any, count: int) -> float:
    """The sum of v*v over a strip whose squares are too large or too small for float32."""
    total = 0.0
    for j in range(count):
        total += np.float64(values[j]) * np.float64(values[j])
    return total


@jit
def blend(
    out: Any, base: Any, sources: Any, base_weight: float, weights: Any, subtract: bool, index: int, key: np.uint64,
    tally: bool, counts: Any, sums: Any,
) -> int:  # fmt: skip
    """Weighted sum: `base_weight * base + sum_i weights_i * source_i`, in that order, in float32, rounded once.

    Args:
        out: `[E]` bits, written.
        base: `[E]` bits, or empty when `base_weight` is 0.
        sources: `[n, E]` bits.
        base_weight: float32.
        weights: `[n]` float32.
        subtract: a source stands for its delta, `source_i - base`.
        index: flat index of the block's first element in its tensor.
        key: stream of stochastic rounding, 0 for rounding to nearest.
        tally: whether to count the sources as deltas into `counts` `[n, 8]` and `sums` `[n, 4]`.

    Returns:
        The number of elements of `out` that are not finite.
    """
    n, size = sources.shape
    base_u, bits, total_u = np.empty(STRIP, np.uint32), np.empty(STRIP, np.uint32), np.empty(STRIP, np.uint32)
    base_f, values, total = base_u.view(np.float32), bits.view(np.float32), total_u.view(np.float32)
    wb = np.float32(base_weight)
    bad = 0
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if base.size:
            _load(base[start : start + m], base_u)
            for j in range(m):
                total[j] = wb * base_f[j]
        else:
            for j in range(m):
                total[j] = np.float32(0)
        for i in range(n):
            _load_delta(sources[i, start : start + m], base_f, subtract, bits, values)
            if tally:
                _tally(values, m, counts[i], sums[i])
            w = weights[i]
            for j in range(m):
                total[j] = total[j] + w * values[j]
        bad += _nonfinite(total_u, m)
        _store(total_u, out[start : start + m], key, index + start)
    for i in range(n):
        # Nothing is trimmed and no sign is elected here: all that is not zero is kept, and counts as elected.
        for k in range(2, 4):
            sums[i, k] = sums[i, 1]
        for k in range(5, 7):
            counts[i, k] += size - counts[i, 0]
    return bad


@njit(inline="always")
def _nonfinite(bits: Any, count: int) -> Any:
    """How many of a strip's float32 bits are NaN or infinite."""
    bad = np.uint32(0)
    for j in range(count):
        bad = np.uint32(bad + np.uint32((bits[j] & _MAGNITUDE) >= _INFINITY))
    return bad


@njit(inline="always")
def _set_aside(
    bits: Any, values: Any, base_f: Any, m: int, start: int, low: Any, width: Any, place: Any, held: Any, found: Any,
    tally: Any, at: int, opened: Any,
) -> int:  # fmt: skip
    """Put a strip's open entries into `held` and make their deltas zero; returns how many are held by now."""
    n = len(bits)
    words = opened.view(np.uint64)  # eight flags at a time: few are set
    words[:] = np.uint64(0)
    for i in range(n):
        if width[i]:
            row, lo, span, over = bits[i], low[i], width[i], np.uint32(0)
            high = lo + span
            for j in range(m):
                u = row[j] & _MAGNITUDE
                over = np.uint32(over + np.uint32(u >= high))
                opened[j] |= np.uint8(np.uint32(u - lo) < span)
            tally[i, 1] += over
    first = at
    for word in range((m + 7) // 8):
        if words[word]:
            for j in range(8 * word, 8 * word + 8):
                place[at] = j
                at += np.int64(opened[j])
    for k in range(first, at):
        j = place[k]
        held[n, k] = base_f[j]
        for i in range(n):
            u = bits[i, j] & _MAGNITUDE
            if np.uint32(u - low[i]) < width[i]:
                found[i, tally[i, 0]] = u
                tally[i, 0] += 1
            held[i, k] = values[i, j]
            values[i, j] = np.float32(0)
        place[k] = start + j
    return at


@jit
def consensus(
    out: Any, base: Any, sources: Any, subtract: bool, index: int, weights: Any, scales: Any,
    low: Any, low_cut: Any, high: Any, high_cut: Any, shrink: Any, keep: Any, keys: Any,
    elect: int, tie_positive: bool, normalize: int, factor: float, key: np.uint64, counts: Any, sums: Any,
    open_low: Any, open_width: Any, place: Any, held: Any, found: Any, tally: Any,
) -> tuple[int, int]:  # fmt: skip
    """Trim or drop each delta, elect a sign per entry, and add what agrees to the base.

    Args:
        out, base, sources, subtract, index, key: as in `blend`.
        weights: `[n]` float32, the scalar of each source.
        scales: `[n]` float32, what survives of a delta is multiplied by this (rescaling).
        low, low_cut: `[n]` uint32 and int64: an entry survives when its magnitude (bits) is above `low`, or equal to it
            with a flat index below `low_cut`.
        high, high_cut: likewise, and an entry that passes this one is dropped again (outliers); `high` of 0xFFFFFFFF
            drops none.
        shrink: `[n]` float32, taken off the magnitude of each survivor (soft thresholding).
        keep, keys: as in `dropped_l1`; `keep` of 2**32 or more drops nothing.
        elect: a value of ELECT.
        tie_positive: an election that ends in zero elects + (else nothing agrees there).
        normalize: a value of NORMALIZE; a divisor of zero is taken as one.
        factor: float32, multiplies the merged delta.
        counts, sums: `[n, 8]` int64 and `[n, 4]` float64, the tally (COUNTS, SUMS), added to.
        open_low, open_width: `[n]` uint32, a bracket of magnitudes as in `collect`: an entry is open when any source is
            inside its bracket, so that nobody can say yet what survives there. Its deltas count as they are and are then
            taken as zero; they are put aside for later.
        place: `[E + 1]` int32, receives the positions in the block of what is open, ascending; `[0]` when nothing can be.
        held: `[n + 1, E]` float32, receives the deltas of what is open and, last, the base; `[n + 1, 0]` likewise.
        found: `[n, E]` uint32, receives the magnitudes inside each source's bracket.
        tally: `[n, 2]` int64; how many are inside each bracket, and above it, are added.

    Returns:
        The number of elements of `out` that are not finite, and of entries that are open.
    """
    n, size = sources.shape
    base_u, bits = np.empty(STRIP, np.uint32), np.empty((n, STRIP), np.uint32)
    base_f, values = base_u.view(np.float32), bits.view(np.float32)
    vote, divisor = np.empty(STRIP, np.float32), np.empty(STRIP, np.float32)
    result_u = np.empty(STRIP, np.uint32)
    result = result_u.view(np.float32)
    stays, wide, agreeing = np.empty(STRIP, np.bool_), np.empty(n, np.bool_), np.zeros(n)
    lam = np.float32(factor)
    zero, one = np.float32(0), np.float32(1)
    everything = np.uint64(1) << np.uint64(32)
    flags = np.empty(STRIP, np.uint8)
    bad, opened = 0, 0
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        _load(base[start : start + m], base_u)
        for j in range(m):
            vote[j] = zero
        for i in range(n):
            _load_delta(sources[i, start : start + m], base_f, subtract, bits[i], values[i])
            wide[i] = _tally(values[i], m, counts[i], sums[i])
        if place.size:
            opened = _set_aside(
                bits, values, base_f, m, start, open_low, open_width, place, held, found, tally, opened, flags
            )
        for i in range(n):
            delta, first = values[i], index + start
            lo, lo_cut, hi, hi_cut = low[i], low_cut[i], high[i], high_cut[i]
            soft, scale, w, kept, square = shrink[i], scales[i], weights[i], np.uint32(0), zero
            whole = (first + m <= lo_cut) | (first >= lo_cut)
            if whole & (hi == np.uint32(0xFFFFFFFF)) & (hi_cut <= 0) & (keep[i] >= everything) & (soft == zero):
                least = max(lo + np.uint32(first >= lo_cut), np.uint32(1))
                for j in range(m):
                    u = _bits_of(delta[j])
                    stay = np.uint32((u & _MAGNITUDE) >= least)
                    v = _float_of(np.uint32(u * stay))
                    delta[j] = v
                    kept = np.uint32(kept + stay)
                    square = _sum(square, v * v)
            else:
                for j in range(m):
                    u, at = _bits_of(delta[j]) & _MAGNITUDE, first + j
                    stays[j] = ((u > lo) | ((u == lo) & (at < lo_cut))) & ~((u > hi) | ((u == hi) & (at < hi_cut)))
                if keep[i] < everything:
                    for j in range(m):
                        stays[j] &= (_hash(keys[i], first + j) >> np.uint64(32)) < keep[i]
                for j in range(m):
                    v = delta[j] if stays[j] else zero
                    v = v - soft if v > zero else (v + soft if v < zero else v)
                    delta[j] = v
                    kept = np.uint32(kept + np.uint32(v != zero))
                    square = _sum(square, v * v)
            counts[i, 5] += kept
            sums[i, 2] += _square(delta, m) if wide[i] else np.float64(square)
            if elect == 1:
                for j in range(m):
                    v = delta[j] * scale * w
                    delta[j] = v
                    vote[j] += v
            elif elect == 2:
                for j in range(m):
                    v = delta[j] * scale
                    delta[j] = v
                    vote[j] += v
            elif elect == 3:
                for j in range(m):
                    v = delta[j] * scale
                    delta[j] = v
                    vote[j] += one if v > zero else (-one if v < zero else zero)
            else:
                for j in range(m):
                    delta[j] = delta[j] * scale
        for j in range(m):
            s = vote[j]
            vote[j] = one if (s > zero) | (tie_positive & (s == zero)) else (-one if s < zero else zero)
            result[j] = zero
            divisor[j] = zero
        for i in range(n):
            delta, w, elected, square = values[i], weights[i], np.uint32(0), zero
            coefficient = one if elect == 1 else w
            share = w if normalize == 1 else one
            for j in range(m):
                v = delta[j]
                v = v if (v * vote[j] > zero) | (elect == 0) else zero
                agrees = v != zero
                delta[j] = v
                result[j] += v * coefficient
                divisor[j] += share if agrees else zero
                elected = np.uint32(elected + np.uint32(agrees))
                square = _sum(square, v * v)
            counts[i, 6] += elected
            agreeing[i] += _square(delta, m) if wide[i] else np.float64(square)
        if normalize != 0:
            for j in range(m):
                d = divisor[j]
                result[j] = result[j] / (d if d != zero else one)
        for j in range(m):
            result[j] = base_f[j] + lam * result[j]
        bad += _nonfinite(result_u, m)
        _store(result_u, out[start : start + m], key, index + start)
    for i in range(n):
        # What agrees is weight * scale * delta; the tally is about the delta.
        unit = np.float64(scales[i]) * (np.float64(weights[i]) if elect == 1 else 1.0)
        if unit != 0.0:
            sums[i, 3] += agreeing[i] / (unit * unit)
    return bad, opened
