"""Kernels of PCB-Merging: how the entries of a delta compete with each other and with those of the other deltas.

Arguments are those of `block_transforms`. For each pair of sources, products of their deltas are brought into [0, 1]:

    least, scale  [n, n]     float64; product p becomes `(p - least) * scale`

Products of two float32 are exact in float64, and `exponentials` are the same on every processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from paft_merge.compute import exponentials
from paft_merge.compute.kernels import STRIP
from paft_merge.compute.kernels.primitives import extent, float_of, jit, load, strip, strip_of, widen

_CENTRE, _HIGHEST = exponentials.CENTRE, exponentials.COEFFICIENTS[0]
_OTHERS = np.array(exponentials.COEFFICIENTS[1:])


@njit(inline="always")
def _exponentials(left: Any, right: Any, m: int, least: float, scale: float, out: Any, place: Any) -> None:
    """exp((product - least) * scale - 0.5) of a strip of two deltas into `out`; `place` is memory."""
    for j in range(m):
        place[j] = (np.float64(left[j]) * np.float64(right[j]) - least) * scale - _CENTRE
        out[j] = _HIGHEST
    for k in range(_OTHERS.size):
        coefficient = _OTHERS[k]
        for j in range(m):
            out[j] = out[j] * place[j] + coefficient


@jit
def products(base: Any, sources: Any, subtract: bool, out: Any, lines: Any, lanes: Any) -> None:
    """The least and the greatest product of each pair of deltas.

    Args:
        base, sources, subtract: as above.
        out: `[2, n, n]` float64, written: the least, then the greatest.
        lines: `[n + 1, LINE]` float32, memory.
        lanes: `[2 * n * n, LINE]` float64, memory.
    """
    n, size = extent(sources)
    minus, values = lines[0], lines[1:]
    minus[:] = np.float32(0)
    lanes[: n * n] = np.inf
    lanes[n * n :] = -np.inf
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            widen(strip(base, start, m), minus)
        for i in range(n):
            load(strip_of(sources, i, start, m), minus, values[i])
        for i in range(n):
            for k in range(i + 1):
                left, right, least, greatest = values[i], values[k], lanes[i * n + k], lanes[n * n + i * n + k]
                for j in range(m):
                    product = np.float64(left[j]) * np.float64(right[j])
                    least[j] = product if product < least[j] else least[j]
                    greatest[j] = product if product > greatest[j] else greatest[j]
    for i in range(n):
        for k in range(i + 1):
            least, greatest, low, high = lanes[i * n + k], lanes[n * n + i * n + k], np.inf, -np.inf
            for j in range(STRIP):
                low = least[j] if least[j] < low else low
                high = greatest[j] if greatest[j] > high else high
            out[0, i, k] = low
            out[0, k, i] = low
            out[1, i, k] = high
            out[1, k, i] = high


@jit
def exponential_sums(
    base: Any, sources: Any, subtract: bool, least: Any, scale: Any, out: Any, lines: Any, lanes: Any
) -> None:
    """The sum of `exp(x - 0.5)` of each pair's products in [0, 1], into `out` `[n, n]` float64.

    `lines` is `[n + 1, LINE]` float32 and `lanes` `[n * n + 2, LINE]` float64, memory.
    """
    n, size = extent(sources)
    minus, values, place, found = lines[0], lines[1:], lanes[n * n], lanes[n * n + 1]
    minus[:] = np.float32(0)
    lanes[:] = 0.0
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            widen(strip(base, start, m), minus)
        for i in range(n):
            load(strip_of(sources, i, start, m), minus, values[i])
        for i in range(n):
            for k in range(i + 1):
                lane = lanes[i * n + k]
                _exponentials(values[i], values[k], m, least[i, k], scale[i, k], found, place)
                for j in range(m):
                    lane[j] += found[j]
    for i in range(n):
        for k in range(i + 1):
            out[i, k] = lanes[i * n + k, :STRIP].sum()
            out[k, i] = out[i, k]


@jit
def scores(
    base: Any, sources: Any, subtract: bool, least: Any, scale: Any, shares: Any, power: int, out: Any, lines: Any, lanes: Any
) -> None:  # fmt: skip
    """The score of every entry of every delta i: `exp(x_ii - 0.5) ** power * sum_k shares_ik * exp(x_ik - 0.5)`.

    Args:
        base, sources, subtract, least, scale: as above; x_ik is the product of deltas i and k in [0, 1].
        shares: `[n, n]` float64, symmetric; 0 leaves a pair out.
        power: at least 0.
        out: `[n, E]` float32, written; computed in float64 and rounded once.
        lines: `[n + 1, LINE]` float32, memory.
        lanes: `[2 * n + 2, LINE]` float64, memory.
    """
    n, size = extent(sources)
    minus, values, place, found = lines[0], lines[1:], lanes[2 * n], lanes[2 * n + 1]
    minus[:] = np.float32(0)
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            widen(strip(base, start, m), minus)
        for i in range(n):
            load(strip_of(sources, i, start, m), minus, values[i])
            lanes[i, :m] = 0.0
            lanes[n + i, :m] = 1.0
        for i in range(n):
            for k in range(i + 1):
                share, one, other, own = shares[i, k], lanes[i], lanes[k], lanes[n + i]
                _exponentials(values[i], values[k], m, least[i, k], scale[i, k], found, place)
                for j in range(m):
                    one[j] += share * found[j]
                if k != i:
                    for j in range(m):
                        other[j] += share * found[j]
                else:
                    for _ in range(power):
                        for j in range(m):
                            own[j] *= found[j]
        for i in range(n):
            total, own, row = lanes[i], lanes[n + i], out[i]
            for j in range(m):
                row[start + j] = np.float32(own[j] * total[j])


@njit(inline="always")
def _shares(bits: Any, bound: Any, equal: bool, scale: Any, out: Any) -> None:
    """The scores of a strip times `scale` where they (bits) are above `bound`, or with `equal` at it; else 0."""
    for j in range(bits.size):
        u = bits[j]
        out[j] = float_of(u) * scale if (u > bound) | (equal & (u == bound)) else np.float32(0)


@jit
def compete(
    base: Any, sources: Any, subtract: bool, index: int, by: Any, low: Any, low_cut: Any, scales: Any, weights: Any, out: Any,
    kept: Any, energy: Any, lines: Any, lanes: Any,
) -> None:  # fmt: skip
    """The mean of the deltas by their scores, over those whose score is large enough; zero where no score is.

    Args:
        base, sources, subtract: as above.
        index: flat index of the block's first element in its tensor.
        by: `[n, E]` float32 bits, the scores, not negative.
        low, low_cut: `[n]` uint32 and int64; an entry takes part where its score is above `low` (bits), or equal to it at a flat index
            below `low_cut`.
        scales: `[n]` float32, multiplies the scores of a source.
        weights: `[n]` float32, multiplies its delta, but not its share of the divisor.
        out: `[E]` float32, written.
        kept: `[n]` int64, added to: entries that take part with a positive score, without zeros.
        energy: `[n]` float64, added to: the sum of their squares.
        lines: `[5, LINE]` float32, memory.
        lanes: `[n, LINE]` float64, memory.
    """
    n, size = extent(sources)
    minus, values, total, divisor, share = lines[0], lines[1], lines[2], lines[3], lines[4]
    minus[:] = np.float32(0)
    zero, one = np.float32(0), np.float32(1)
    lanes[:] = 0.0
    for start in range(0, size, STRIP):
        m = min(STRIP, size - start)
        if subtract:
            widen(strip(base, start, m), minus)
        for j in range(m):
            total[j] = zero
            divisor[j] = zero
        for i in range(n):
            load(strip_of(sources, i, start, m), minus, values)
            scale, weight, lane, row = scales[i], weights[i], lanes[i], by[i, start : start + m]
            before = int(min(max(low_cut[i] - index - start, 0), m))
            _shares(row[:before], low[i], True, scale, share[:before])
            _shares(row[before:], low[i], False, scale, share[before:m])
            count = np.uint32(0)
            for j in range(m):
                v, part = values[j], share[j]
                held = v if part > zero else zero
                total[j] += part * weight * v
                divisor[j] += part
                wide = np.float64(held)
                lane[j] += wide * wide
                count += np.uint32(held != zero)
            kept[i] += np.int64(count)
        for j in range(m):
            d = divisor[j]
            out[start + j] = total[j] / (d if d > zero else one)
    for i in range(n):
        energy[i] += lanes[i, :STRIP].sum()
