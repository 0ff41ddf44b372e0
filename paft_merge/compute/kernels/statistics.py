"""Kernels of an audit over one block of deltas: exact counts, and sums in float64.

A delta is its float32 bits, `[E]` uint32. A packed histogram counts and sums the entries of a bin in one int64, so that counting costs one
update per entry: of each, its magnitude (bits) and `1 << COUNT_SHIFT` are added. As the magnitudes of a bin share their upper bits, a
division gives the count, and its remainder is the sum of the lower 16 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from paft_merge.compute.kernels import CACHED, COUNT_SHIFT, STRIP
from paft_merge.compute.kernels.merging import agree, cast_vote, set_aside
from paft_merge.compute.kernels.primitives import (
    MAGNITUDE,
    advance_block,
    bits_of,
    double_if,
    float_of,
    is_wide,
    jit,
    load,
    square_of,
    start_block,
    strip,
    strip_of,
    two_of,
    widen,
)
from paft_merge.compute.kernels.vectors import (
    LANES,
    at_least,
    bits_at,
    count_below,
    count_erased,
    count_where,
    lesser,
    no_counts,
    no_sums,
    opposed,
    plus,
    plus_where,
    squares_of,
    sum_of,
    times,
    total,
    where_both,
    widened,
)

_ROUND = np.uint32(0x7FFF)
_ONE = np.uint32(1)
_HALF = np.uint32(16)
_WORD, _LOWER, _UPPER_BIN = np.uint64(32), np.uint64(0xFFFFFFFF), np.uint64(48)
"""Shifts and a mask that split two magnitudes in a uint64 (see `two_of`), and give the bin of the upper one."""
_COUNT = np.int64(1) << COUNT_SHIFT
_UNPACKED = 64
"""Bins that are unpacked at once."""

# Sums may be reordered into vector lanes: the last bits of an audit's float64 sums are not reproducible across processors.
_sums = njit(error_model="numpy", boundscheck=False, fastmath={"reassoc", "contract"})


@_sums
def add_squares(bits: Any, sums: Any) -> None:
    """Add the squares of `[E]` float32 bits to `sums` `[1]` float64; `[0]` where they are not wanted."""
    total, values = 0.0, bits.view(np.float32)
    for j in range(bits.size if sums.size else 0):
        total += np.float64(values[j]) * np.float64(values[j])
    if sums.size:
        sums[0] += total


@_sums
def measure(
    delta: Any, base: Any, edges: Any, below: Any, packed: Any, sums: Any, erased: Any, weight: Any, lines: Any
) -> int:  # fmt: skip
    """Count and sum one block of a delta.

    Args:
        delta: `[E]` uint32, at most MOST entries.
        base: `[E]` bits of the weight, bfloat16 (uint16) or float32 (uint32); `[0]` where it is not known.
        edges: `[T]` uint32, thresholds as bits.
        below: `[T]` int64; entries with a magnitude below each threshold are added.
        packed: `[BINS]` int64, the packed histogram, added to.
        sums: `[2]` float64; the sums of delta**2 and delta**4 are added.
        erased: `[1]` int64; the entries that the cast to bfloat16 erases are added: `bf16(weight + delta) == bf16(weight)`, zeros included.
        weight: `[1]` float64; the sum of the weights' squares is added. `[0]` where it is not wanted.
        lines: `[1, LINE]` float32, memory.

    Returns:
        The largest magnitude, as bits.
    """
    values = delta.view(np.float32)
    largest, none, many = np.uint32(0), np.uint32(0), edges.size
    a = edges[0] if many > 0 else none
    b = edges[1] if many > 1 else none
    c = edges[2] if many > 2 else none
    d = edges[3] if many > 3 else none
    e = edges[4] if many > 4 else none
    for start in range(0, delta.size, STRIP):
        m = min(STRIP, delta.size - start)
        part, floats, (half, whole) = delta[start : start + m], values[start : start + m], strip(base, start, m)
        magnitudes, top = lines[0].view(np.uint32), np.uint32(0)
        for j in range(m):
            u = np.uint32(part[j] & MAGNITUDE)
            magnitudes[j] = u
            top = u if u > top else top
        largest = max(largest, top)
        steps = m - m % (2 * LANES)
        if half.size:
            found = _steps(packed, magnitudes[:steps], floats, half, weight.size > 0, a, b, c, d, e)
        elif whole.size:
            found = _steps(packed, magnitudes[:steps], floats, whole, weight.size > 0, a, b, c, d, e)
        else:
            found = _steps(packed, magnitudes[:steps], floats, None, False, a, b, c, d, e)
        counts, (second, fourth, squared) = found
        for t in range(min(many, 5)):
            below[t] += counts[t]
        erased[0] += counts[5]
        if m == STRIP:
            sums[0] += second
            sums[1] += fourth
            if weight.size:
                weight[0] += squared
        else:
            _add_powers(floats, sums)
        for j in range(steps, m):
            u = magnitudes[j]
            packed[u >> _HALF] += _COUNT + np.int64(u)
            for t in range(min(many, 5)):
                below[t] += np.int64(u < edges[t])
            if half.size:
                erased[0] += np.int64(_equal(np.uint32(half[j]), _bfloat16(float_of(half[j]) + floats[j])))
            if whole.size:
                value = float_of(whole[j])
                erased[0] += np.int64(_equal(_bfloat16(value), _bfloat16(value + floats[j])))
        for t in range(5, many):
            edge, twice = edges[t], np.uint32(0)
            for j in range(m):  # twice as many 32-bit counters fit a register
                twice = np.uint32(twice + double_if(magnitudes[j] < edge))
            below[t] += twice >> 1
        if m < STRIP:
            widen((half, whole), lines[0])
            add_squares(lines[0, : half.size + whole.size].view(np.uint32), weight)
    return largest


@_sums
def _steps(
    packed: Any, magnitudes: Any, floats: Any, weights: Any, squares: bool, a: Any, b: Any, c: Any, d: Any, e: Any
) -> Any:  # fmt: skip
    """Count and sum a strip, a whole number of double steps; what LLVM cannot vectorise, between vectors.

    Args:
        packed: as in `measure`.
        magnitudes: `[m]` uint32.
        floats: the deltas.
        weights: bits of bfloat16 or of float32; None where they are not known.
        squares: whether to square the weights.
        a, b, c, d, e: thresholds as bits.

    Returns:
        The numbers of entries below each threshold and of erased ones; and the sums of delta**2, of delta**4, and of weight**2.
    """
    of_a, of_b, of_c, of_d, of_e, same = no_counts(), no_counts(), no_counts(), no_counts(), no_counts(), no_counts()
    second, second_2, fourth, fourth_2 = no_sums(), no_sums(), no_sums(), no_sums()
    squared, squared_2 = no_sums(), no_sums()
    # The stores of the histogram leave the processor time for all else.
    for at in range(0, magnitudes.size, LANES):
        for j in range(at, at + LANES, 2):
            two = two_of(magnitudes, j)
            packed[np.uint64(np.uint32(two) >> _HALF)] += _COUNT + np.int64(two & _LOWER)
            packed[two >> _UPPER_BIN] += _COUNT + np.int64(two >> _WORD)
        of_a, of_b = count_below(of_a, magnitudes, at, a), count_below(of_b, magnitudes, at, b)
        of_c, of_d = count_below(of_c, magnitudes, at, c), count_below(of_d, magnitudes, at, d)
        of_e = count_below(of_e, magnitudes, at, e)
        square = squares_of(floats, at)
        second, second_2 = second_2, plus(second, square)
        fourth, fourth_2 = fourth_2, plus(fourth, times(square, square))
        if weights is not None:
            same = count_erased(same, weights, floats, at)
        if weights is not None and squares:
            squared, squared_2 = squared_2, plus(squared, squares_of(weights, at))
    counts = sum_of(of_a), sum_of(of_b), sum_of(of_c), sum_of(of_d), sum_of(of_e), sum_of(same)
    return counts, (total(second, second_2), total(fourth, fourth_2), total(squared, squared_2))


@_sums
def _add_powers(floats: Any, sums: Any) -> None:
    """Add the squares and the fourth powers of `[E]` float32 to `sums` `[2]` float64."""
    second, fourth = 0.0, 0.0
    for j in range(floats.size):
        square = np.float64(floats[j]) * np.float64(floats[j])
        second += square
        fourth += square * square
    sums[0] += second
    sums[1] += fourth


@njit(inline="always")
def _equal(a: Any, b: Any) -> Any:
    """Whether two bfloat16 (bits) are equal; zeros are, whatever their signs."""
    return (a == b) | (np.uint32(np.uint32(a | b) << np.uint32(17)) == np.uint32(0))


@njit(inline="always")
def _bfloat16(value: Any) -> Any:
    """The bits of a value rounded to bfloat16, to nearest even."""
    bits = bits_of(value)
    odd = np.uint32(np.uint32(bits >> _HALF) & _ONE)
    return np.uint32(np.uint32(np.uint32(bits + _ROUND) + odd) >> _HALF)


@_sums
def compare(left: Any, right: Any, edge: np.uint32, counts: Any, sums: Any) -> None:
    """Compare two deltas entry by entry.

    Args:
        left, right: `[E]` uint32.
        edge: a magnitude (bits), not 0; an entry counts as above where both magnitudes are at least this.
        counts: `[4]` int64, added to: entries nonzero in both; of these, with different signs; above in both; of these, with different signs.
        sums: `[5]` float64, added to: products; the smaller magnitude of each entry; the same where the signs differ; and
            squares of left and of right where the signs differ.
    """
    a_values, b_values = left.view(np.float32), right.view(np.float32)
    for start in range(0, left.size, STRIP):
        m = min(STRIP, left.size - start)
        a_u, b_u = left[start : start + m], right[start : start + m]
        a_f, b_f = a_values[start : start + m], b_values[start : start + m]
        if m == STRIP:
            _compare_strip(a_u, b_u, edge, counts, sums)
            continue
        both, against, above, above_against = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
        for j in range(m):
            a_bits, b_bits = np.uint32(a_u[j]), np.uint32(b_u[j])
            least = np.uint32(min(np.uint32(a_bits & MAGNITUDE), np.uint32(b_bits & MAGNITUDE)))
            here, over, differ = least != np.uint32(0), least >= edge, np.int32(a_bits ^ b_bits) < np.int32(0)
            both = np.uint32(both + double_if(here))
            against = np.uint32(against + double_if(here & differ))
            above = np.uint32(above + double_if(over))
            above_against = np.uint32(above_against + double_if(over & differ))
        product, smaller, smaller_against, left_square, right_square = 0.0, 0.0, 0.0, 0.0, 0.0
        for j in range(m):
            a, b = np.float64(a_f[j]), np.float64(b_f[j])
            one, size = a * b, min(abs(a), abs(b))  # the product of two float32 does not underflow float64
            differs = 1.0 if one < 0.0 else 0.0
            product += one
            smaller += size
            smaller_against += size * differs
            left_square += a * a * differs
            right_square += b * b * differs
        counts[0] += both >> 1
        counts[1] += against >> 1
        counts[2] += above >> 1
        counts[3] += above_against >> 1
        sums[0] += product
        sums[1] += smaller
        sums[2] += smaller_against
        sums[3] += left_square
        sums[4] += right_square


@_sums
def _compare_strip(left: Any, right: Any, edge: np.uint32, counts: Any, sums: Any) -> None:
    """`compare` a strip of a whole number of steps."""
    here, against, above, above_against = no_counts(), no_counts(), no_counts(), no_counts()
    product, smaller, smaller_against, left_square, right_square = no_sums(), no_sums(), no_sums(), no_sums(), no_sums()
    for at in range(0, left.size, LANES):
        a, b = bits_at(left, at), bits_at(right, at)
        least = lesser(a, b)
        filled, over, differ = at_least(least, _ONE), at_least(least, edge), opposed(a, b)
        differ = where_both(filled, differ)
        here, against = count_where(here, filled), count_where(against, differ)
        above, above_against = count_where(above, over), count_where(above_against, where_both(over, differ))
        one, two, size = widened(a), widened(b), widened(least)
        product, smaller = plus(product, times(one, two)), plus(smaller, size)
        smaller_against = plus_where(smaller_against, size, differ)
        left_square = plus_where(left_square, times(one, one), differ)
        right_square = plus_where(right_square, times(two, two), differ)
    for k, count in enumerate((here, against, above, above_against)):
        counts[k] += sum_of(count)
    for k, found in enumerate((product, smaller, smaller_against, left_square, right_square)):
        sums[k] += total(found, no_sums())


@_sums
def shared_support(left: Any, right: Any, index: int, low: Any, cut: Any, counts: Any) -> None:
    """Count the entries that survive a threshold in both deltas, and in either.

    Args:
        left, right: `[E]` uint32.
        index: flat index of the block's first element in its tensor.
        low, cut: `[2]` uint32 and int64, `low` and `low_cut` of the `blocks.KeepThreshold` of left and of right.
        counts: `[4]` int64, added to: in both, in either, in left, in right.
    """
    low_a, low_b, cut_a, cut_b = low[0], low[1], cut[0], cut[1]
    for start in range(0, left.size, STRIP):
        m = min(STRIP, left.size - start)
        a_u, b_u = left[start : start + m], right[start : start + m]
        first = index + start
        both, in_a, in_b = np.uint32(0), np.uint32(0), np.uint32(0)
        if (first >= cut_a or first + m <= cut_a) and (first >= cut_b or first + m <= cut_b):
            least_a = np.uint32(low_a + np.uint32(first >= cut_a))
            least_b = np.uint32(low_b + np.uint32(first >= cut_b))
            for j in range(m):
                a, b = np.uint32(a_u[j] & MAGNITUDE) >= least_a, np.uint32(b_u[j] & MAGNITUDE) >= least_b
                both = np.uint32(both + double_if(a & b))
                in_a = np.uint32(in_a + double_if(a))
                in_b = np.uint32(in_b + double_if(b))
        else:
            for j in range(m):
                u, v = a_u[j] & MAGNITUDE, b_u[j] & MAGNITUDE
                a = (u > low_a) | ((u == low_a) & (first + j < cut_a))
                b = (v > low_b) | ((v == low_b) & (first + j < cut_b))
                both = np.uint32(both + double_if(a & b))
                in_a = np.uint32(in_a + double_if(a))
                in_b = np.uint32(in_b + double_if(b))
        counts[0] += both >> 1
        counts[1] += (in_a >> 1) + (in_b >> 1) - (both >> 1)
        counts[2] += in_a >> 1
        counts[3] += in_b >> 1


@jit
def survey(
    base: Any, sources: Any, subtract: bool, source_desc: Any, made: Any, edges: Any, below: Any, packed: Any, most: int, counted: Any, lows: Any,
    largest: Any, sums: Any, gone: Any, weight: Any, edge: np.uint32, pair_counts: Any, pair_sums: Any, support: Any,
    open_low: Any, open_width: Any, place: Any, held: Any, found: Any, tally: Any,
    weights: Any, elect: int, tie_positive: bool, normalize: int, factor: float, kept: Any, kept_sums: Any, merged: Any,
    tops: Any, least: Any, cut: Any, lines: Any,
) -> int:  # fmt: skip
    """Measure the deltas of a block, each alone and against every other one, and preview a merge, while the block is filled.

    Args:
        base, source_desc: as in `thresholds.histogram`; the base is read for `gone`, and with `subtract`.
        sources: `[n, E]` bits: deltas, float32 bits, or with `subtract` values.
        made: `[n, CACHED]` float32, memory for deltas with `subtract`; else `[n, 0]`.
        edges: as in `measure`; the first is 1, the smallest magnitude.
        below, packed, sums: as in `measure`, one row a source.
        most: entries that a packed histogram can hold. Before there are more, it is moved to
        counted, lows: `[n, BINS]` int64, as `counts` and `lows` of `thresholds.histogram`; `[n, 0]` where E is at most `most`.
        largest: `[n]` uint32, receives the largest magnitudes.
        gone, weight: `[n]` int64 and float64, receive `erased` and `weight` of `measure`; `[0]` where the base's values are not known.
        edge: as in `compare`.
        pair_counts, pair_sums: as in `compare`, one row a pair (0, 1), (0, 2), ...; `[0, 4]` and `[0, 5]` to compare nothing.
        support: `[pairs, 4]` int64, as `counts` in `shared_support`, of the entries outside the first intervals that are above them.
        open_low, open_width: `[P, n]` uint32, as in `merging.consensus`, for P merges; `[0, n]` for none.
        place, held, found, tally: `[P, E]`, `[P, n + 1, E]`, `[P, n, E]` and `[P, n + 1, 2]`, likewise. The base is zero.
        weights, elect, tie_positive, normalize, factor: as in `merging.consensus`, of the last merge; `elect` of -1 merges nothing.
        kept, kept_sums: as `counts` and `sums` in `merging.consensus`; only the columns of kept and elected entries are written.
        merged: `[1]` float64; the sum of squares of the merged deltas is added.
        tops: `[n]` uint32, memory.
        least, cut: `[2]` uint32 and int64, memory.
        lines: `[n + 5, LINE]` float32, memory.

    Returns:
        0; -1 where the block could not be filled.
    """
    n, size, ready, origin = start_block(sources, source_desc)
    converted, minus, passes = made.view(np.uint32), lines[0], len(place)
    cut[:] = 0
    start, packed_from = 0, 0
    # The difference of two bfloat16, added again, gives the other one: only zeros are erased.
    exact = subtract and base[0].size > 0
    while start < size:
        if start >= ready:
            origin, ready = advance_block(source_desc, ready)
            if ready < 0:
                return -1
        stop = min(ready, start + CACHED)
        begin, m = start - origin, stop - start
        if stop - packed_from > most:
            unpack(packed, counted, lows)
            packed_from = start
        for at in range(0, m if subtract else 0, STRIP):
            count = min(STRIP, m - at)
            widen(strip(base, begin + at, count), minus)
            if exact:
                add_squares(minus[:count].view(np.uint32), weight[:1])
            for i in range(n):
                load(strip_of(sources, i, begin + at, count), minus, made[i, at : at + count])
        deltas = converted if subtract else sources[1]
        first = 0 if subtract else begin
        for i in range(n):
            one = deltas[i, first : first + m]
            known = m if gone.size and not exact else 0
            tops[i] = measure(
                one, strip(base, begin, known), edges, below[i], packed[i], sums[i], gone[i : i + 1],
                weight[: int(i == 0 and known > 0)], lines,
            )  # fmt: skip
            largest[i] = max(largest[i], tops[i])
        pair = 0
        for i in range(n if pair_counts.size else 0):
            for k in range(i + 1, n):
                left, right = deltas[i, first : first + m], deltas[k, first : first + m]
                compare(left, right, edge, pair_counts[pair], pair_sums[pair])
                pair += 1
        for p in range(passes):
            _preview(
                deltas, first, m, start, open_low[p], open_width[p], place[p], held[p], found[p], tally[p],
                support[: len(support) if p == 0 else 0], weights, elect if p == passes - 1 else -1, tie_positive, normalize, factor, kept, kept_sums, merged, tops, least, cut, lines,
            )  # fmt: skip
        start = stop
    for i in range(len(weight)):
        weight[i] = weight[0]
        gone[i] = below[i, 0] if exact else gone[i]
    for i in range(n if elect == 1 else 0):  # the squares of weight * delta
        unit = np.float64(weights[i])
        kept_sums[i, 3] = kept_sums[i, 3] / (unit * unit) if unit != 0.0 else 0.0
    return 0


@jit
def unpack(packed: Any, counts: Any, lows: Any) -> None:
    """Move packed histograms `[n, BINS]` to `counts` and `lows` `[n, BINS]`, which are added to."""
    for i in range(packed.shape[0]):
        for begin in range(0, packed.shape[1], _UNPACKED):
            group = packed[i, begin : begin + _UNPACKED]
            any_of = np.int64(0)
            for j in range(_UNPACKED):
                any_of |= group[j]
            if any_of:  # most are empty
                for j in range(_UNPACKED):
                    held, each = np.uint64(group[j]), np.uint64(_COUNT + ((begin + j) << 16))
                    many = held // each
                    counts[i, begin + j] += np.int64(many)
                    lows[i, begin + j] += np.int64(held - many * each)
                    group[j] = 0


@jit
def _preview(
    deltas: Any, first: int, count: int, begin: int, low: Any, width: Any, place: Any, held: Any, found: Any, tally: Any,
    support: Any, weights: Any, elect: int, tie_positive: bool, normalize: int, factor: float, kept: Any, sums: Any, merged: Any,
    tops: Any, least: Any, cut: Any, lines: Any,
) -> None:  # fmt: skip
    """Merge `count` entries of `deltas` `[n, ...]` uint32 from `first` on as `merging.consensus` does, and store only what it counts.

    Args:
        begin: position of the first entry in its block.
        low, width: `[n]` uint32, the interval of each source.
        tops: `[n]` uint32, the largest magnitude of each source; the others as in `survey`, of one merge.
    """
    n, values = len(weights), lines[5:]
    nothing, vote, result, divisor = lines[1], lines[2], lines[3], lines[4]
    zero, one, lam = np.float32(0), np.float32(1), np.float32(factor)
    nothing[:] = zero
    for start in range(0, count, STRIP):
        m = min(STRIP, count - start)
        for i in range(n):
            row, to = deltas[i, first + start : first + start + m], values[i].view(np.uint32)
            for j in range(m):
                to[j] = row[j]
        tally[n, 0] = set_aside(values, nothing, m, begin + start, low, width, place, held, found, tally, tally[n, 0])
        pair = 0
        for i in range(n if support.size else 0):
            for k in range(i + 1, n):
                least[0], least[1] = low[i] + width[i] - _ONE, low[k] + width[k] - _ONE
                shared_support(
                    values[i, :m].view(np.uint32), values[k, :m].view(np.uint32), 0, least, cut, support[pair]
                )
                pair += 1
        for i in range(n):
            bound, wide = np.uint32(max(np.uint32(low[i] + width[i]), _ONE)), is_wide(tops[i])
            if wide:
                for j in range(m):
                    values[i, j] = values[i, j] if (bits_of(values[i, j]) & MAGNITUDE) >= bound else zero
                sums[i, 2] += square_of(values[i], m) if elect >= 0 else 0.0
            weight = weights[i] if elect == 1 else one
            above, square = cast_vote(values[i], m, bound, one, weight, elect == 3, vote, i == 0)
            tally[i, 1] += above
            if elect >= 0:
                kept[i, 5] += above
                sums[i, 2] += 0.0 if wide else np.float64(square)
        if elect < 0:
            continue
        for j in range(m):
            s = vote[j]
            vote[j] = one if (s > zero) | (tie_positive & (s == zero)) else (-one if s < zero else zero)
        for i in range(n):
            wide = is_wide(tops[i])
            if wide:
                for j in range(m):
                    values[i, j] = values[i, j] if (values[i, j] * vote[j] > zero) | (elect == 0) else zero
                sums[i, 3] += square_of(values[i], m)
            weight, share = one if elect == 1 else weights[i], weights[i] if normalize == 1 else one
            agreed, square = agree(values[i], m, vote, elect == 0, weight, share, result, divisor, i == 0)
            kept[i, 6] += agreed
            sums[i, 3] += 0.0 if wide else np.float64(square)
        if normalize != 0:
            for j in range(m):
                d = divisor[j]
                result[j] = result[j] / (d if d != zero else one)
        for j in range(m if lam != one else 0):
            result[j] = lam * result[j]
        add_squares(result[:m].view(np.uint32), merged)
