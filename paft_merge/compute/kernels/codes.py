"""Kernels that round values to codes with scales, block by block (see `inputs.quantized.rounding`).

A matrix `[R, W]` has blocks of `height` rows; `groups` `[W]` is the block that each column belongs to, of `A` in a line of blocks.
Blocks of `size` columns follow each other; 0: the columns of a block may be anywhere.
Scales are tried: `[K, L, A]` arrays hold K scales for each of the blocks in L lines. A scaled value `v / step` is rounded to a
value `q` of the grid, and `(q - zero) * scale` is what its code stands for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from paft_merge.compute.kernels import STRIP
from paft_merge.compute.kernels.primitives import MAGNITUDE, bits_of, float_of, jit, random

_FORCE = np.float32(3 << 22)
"""A magnitude below 2**22 plus this number has steps of one: adding and subtracting it rounds to the nearest even integer."""
_MOST_HALVINGS = 6
_SIGN = np.uint32(31)
_MANTISSA = np.uint32(23)


@njit(inline="always")
def _halvings(size: int) -> int:
    """How often neighbours can be joined without joining two blocks."""
    count = 0
    while size > 0 and size % 2 == 0 and count < _MOST_HALVINGS:
        size, count = size // 2, count + 1
    return count


@jit
def _least(values: Any, other: Any) -> None:
    """Write the smaller one of each two neighbours of `values` into the first half of `other`."""
    for j in range(values.size // 2):
        a, b = values[2 * j], values[2 * j + 1]
        other[j] = a if a < b else b
    if values.size % 2:
        other[values.size // 2] = values[values.size - 1]


@jit
def _greatest(values: Any, other: Any) -> None:
    """Write the larger one of each two neighbours of `values` into the first half of `other`."""
    for j in range(values.size // 2):
        a, b = values[2 * j], values[2 * j + 1]
        other[j] = a if a > b else b
    if values.size % 2:
        other[values.size // 2] = values[values.size - 1]


@jit
def _added(values: Any, other: Any) -> None:
    """Write the sum of each two neighbours of `values` into the first half of `other`."""
    for j in range(values.size // 2):
        other[j] = values[2 * j] + values[2 * j + 1]
    if values.size % 2:
        other[values.size // 2] = values[values.size - 1]


@jit
def _widen_limits(values: Any, low: Any, high: Any) -> None:
    """Lower `low` and raise `high` to the values of a strip."""
    for j in range(values.size):
        v = values[j]
        low[j] = v if v < low[j] else low[j]
        high[j] = v if v > high[j] else high[j]


@jit
def limits(values: Any, groups: Any, height: int, size: int, found: Any, lines: Any) -> None:
    """Write the least and the greatest value of each block, and zero where all have one sign, into `found` `[2, L, A]`.

    `lines`: `[4, LINE]` float32, memory.
    """
    rows, width = values.shape
    found[:] = np.float32(0)
    halvings = _halvings(size)
    for line in range(found.shape[1]):
        for start in range(0, width, STRIP):
            m = min(STRIP, width - start)
            low, high, other, another = lines[0], lines[1], lines[2], lines[3]
            low[:m] = np.float32(0)
            high[:m] = np.float32(0)
            for row in range(line * height, min(line * height + height, rows)):
                _widen_limits(values[row, start : start + m], low, high)
            for _ in range(halvings):
                _least(low[:m], other)
                _greatest(high[:m], another)
                low, other, high, another, m = other, low, another, high, (m + 1) // 2
            for j in range(m):
                g = groups[start + (j << halvings)]
                found[0, line, g] = min(found[0, line, g], low[j])
                found[1, line, g] = max(found[1, line, g], high[j])


@jit
def _spread(of_blocks: Any, groups: Any, size: int, start: int, out: Any) -> None:
    """Write the value of its block for each of the columns from `start` on."""
    count = out.size
    if size < 2:
        for j in range(count):
            out[j] = of_blocks[groups[start + j]]
        return
    for g in range(start // size, (start + count - 1) // size + 1):
        value = of_blocks[g]
        for j in range(max(g * size - start, 0), min(g * size + size - start, count)):
            out[j] = value


@njit(inline="always")
def _even(value: Any) -> Any:
    """The nearest integer, of two the even one."""
    return (value + _FORCE) - _FORCE


@njit(inline="always")
def _whole(value: Any, chance: Any, drawn: bool) -> Any:
    """The nearest even integer, or one of the two integers around a value: the upper one if `chance` is below the fraction."""
    near = _even(value)
    if not drawn:
        return near
    down = near - np.float32(near > value)
    return down + np.float32(chance < value - down)


@jit
def _floats(scaled: Any, zeros: Any, chances: Any, drawn: bool, form: Any, table: Any, found: Any, codes: Any) -> None:
    """Round to floats of `form`: bits of the mantissa, least exponent, bit of the sign, whether zero has one; `table`: the largest."""
    bits, lowest, sign, signed = np.uint32(form[1]), np.uint32(form[2] + 127), np.uint32(form[3]), form[4] != 0
    most = table[0]
    for j in range(scaled.size):
        u = bits_of(scaled[j] - (np.float32(0) - zeros[j]))  # a sum would lose the sign of zero
        magnitude = min(float_of(np.uint32(u & MAGNITUDE)), most)
        exponent = max(np.uint32(bits_of(magnitude) >> _MANTISSA), lowest)
        steps = _whole(
            magnitude * float_of(np.uint32((np.uint32(254) - exponent + bits) << _MANTISSA)), chances[j], drawn
        )
        value = bits_of(steps * float_of(np.uint32((exponent - bits) << _MANTISSA)))
        code = np.uint32(((exponent - lowest) << bits) + np.uint32(np.int32(steps)))
        minus = np.uint32(u >> _SIGN) if signed or code != np.uint32(0) else np.uint32(0)
        found[j] = float_of(np.uint32(value | (minus << _SIGN)))
        codes[j] = np.uint8(code | (minus << sign))


@jit
def _integers(scaled: Any, zeros: Any, chances: Any, drawn: bool, form: Any, found: Any, codes: Any) -> None:
    """Round to integers of `form`: the least, the greatest, the code of 0, and whether the zero is added after rounding."""
    low, high, zero_code, after = np.float32(form[1]), np.float32(form[2]), np.int32(form[3]), form[4] != 0
    far = np.float32(1 << 20)
    for j in range(scaled.size):
        if after:
            value = _whole(min(max(scaled[j], -far), far), chances[j], drawn) + zeros[j]
            value = min(max(value, low), high)
        else:
            value = _whole(min(max(scaled[j] + zeros[j], low), high), chances[j], drawn)
        found[j] = value
        codes[j] = np.uint8(np.int32(value) + zero_code)


@jit
def _levels(scaled: Any, chances: Any, drawn: bool, form: Any, table: Any, found: Any, codes: Any, passed: Any) -> None:
    """Round to the 16 levels of `table`: first the levels in their order, then the middles between them. `form[1:]`: their codes.

    A value in the middle gets the smaller level.
    """
    bounds = table[1:] if drawn else table[16:]
    for j in range(scaled.size):
        value, count = scaled[j], np.float32(0)
        for level in range(15):
            count += np.float32(value > bounds[level])
        passed[j] = count
    for j in range(scaled.size):
        at = np.int64(passed[j])
        if drawn and at < 15:
            low, high = table[at], table[at + 1]
            at += chances[j] * (high - low) < scaled[j] - low
        found[j], codes[j] = table[at], np.uint8(form[1 + at])


@njit(inline="always")
def _round(
    scaled: Any, zeros: Any, chances: Any, drawn: bool, form: Any, table: Any, found: Any, codes: Any, passed: Any
) -> None:
    """Round scaled values to values of the grid and their codes; `form[0]` is the kind of grid."""
    if form[0] == 0:
        _floats(scaled, zeros, chances, drawn, form, table, found, codes)
    elif form[0] == 1:
        _integers(scaled, zeros, chances, drawn, form, found, codes)
    else:
        _levels(scaled, chances, drawn, form, table, found, codes, passed)


@njit(inline="always")
def _scale(values: Any, steps: Any, multiply: bool, scaled: Any) -> None:
    """Divide values by their steps, or multiply them; a step of zero gives zero."""
    if multiply:
        for j in range(values.size):
            scaled[j] = values[j] * steps[j]
    else:
        for j in range(values.size):
            step = steps[j]
            scaled[j] = values[j] / step if step != np.float32(0) else np.float32(0)


@jit
def _errors(values: Any, found: Any, zeros: Any, scales: Any, factor: Any, sums: Any) -> None:
    """Add the squared errors of the rounded values of a strip to `sums`."""
    for j in range(values.size):
        error = np.float64(((found[j] - zeros[j]) * scales[j]) * factor) - np.float64(values[j])
        sums[j] += error * error


@jit
def round_codes(
    values: Any,
    groups: Any,
    height: int,
    size: int,
    steps: Any,
    scales: Any,
    zeros: Any,
    usable: Any,
    multiply: bool,
    factor: float,
    form: Any,
    table: Any,
    key: np.uint64,
    index: int,
    codes: Any,
    decoded: Any,
    chosen: Any,
    errors: Any,
    best_of: Any,
    memory: Any,
    lines: Any,
    spare: Any,
) -> None:
    """Round every block to codes with the scale whose squared error is the smallest, of equal ones the first.

    Args:
        values: `[R, W]` float32.
        groups: `[W]` int32, the block of each column in its line.
        height: rows of a block; the last line may be cut.
        size: columns of a block, see the module.
        steps, scales, zeros: `[K, L, A]` float32, see the module.
        usable: `[K, L, A]`; a scale that is not usable is not chosen, except the first if none is.
        multiply: multiply by `steps` instead.
        factor: factor of all values, in float32.
        form, table: the grid, see `_floats`, `_integers` and `_levels`.
        key: stream of stochastic rounding; 0 rounds to nearest.
        index: number of the first value in that stream.
        codes: `[R, W]`; overwritten.
        decoded: `[R, W]` float32, what the codes stand for; overwritten.
        chosen: `[L, A]` int64, the scale of each block; overwritten.
        errors: `[K, A]` float64, memory.
        best_of: `[3, A]` float32, memory.
        memory: `[2, LINE]` float64, memory.
        lines: `[7, LINE]` float32, memory.
        spare: `[STRIP]` uint8, memory.
    """
    rows, width = values.shape
    tried, count, across = scales.shape
    scaled, found, step, scale, zero = lines[0], lines[1], lines[2], lines[3], lines[4]
    chances, passed, factor32 = lines[5], lines[6], np.float32(factor)
    halvings = _halvings(size)
    for line in range(count):
        first, stop = line * height, min(line * height + height, rows)
        if tried > 1:
            errors[:] = 0.0
            for t in range(tried):
                for start in range(0, width, STRIP):
                    m = min(STRIP, width - start)
                    _spread(steps[t, line], groups, size, start, step[:m])
                    _spread(scales[t, line], groups, size, start, scale[:m])
                    _spread(zeros[t, line], groups, size, start, zero[:m])
                    sums, other = memory[0], memory[1]
                    sums[:m] = 0.0
                    for row in range(first, stop):
                        some = values[row, start : start + m]
                        _scale(some, step, multiply, scaled)
                        _round(scaled[:m], zero, chances, False, form, table, found, spare, passed)
                        _errors(some, found, zero, scale, factor32, sums)
                    for _ in range(halvings):
                        _added(sums[:m], other)
                        sums, other, m = other, sums, (m + 1) // 2
                    for j in range(m):
                        errors[t, groups[start + (j << halvings)]] += sums[j]
        for g in range(across):
            best = 0
            for t in range(1, tried):
                if usable[t, line, g] and (errors[t, g] < errors[best, g] or (best == 0 and not usable[0, line, g])):
                    best = t
            chosen[line, g] = best
            for k, of_block in enumerate((steps, scales, zeros)):
                best_of[k, g] = of_block[best, line, g]
        for start in range(0, width, STRIP):
            m = min(STRIP, width - start)
            _spread(best_of[0], groups, size, start, step[:m])
            _spread(best_of[1], groups, size, start, scale[:m])
            _spread(best_of[2], groups, size, start, zero[:m])
            for row in range(first, stop):
                some, out = values[row, start : start + m], decoded[row, start : start + m]
                mine = codes[row, start : start + m]
                _scale(some, step, multiply, scaled)
                _round(scaled[:m], zero, chances, False, form, table, found, mine, passed)
                for j in range(m):
                    out[j] = ((found[j] - zero[j]) * scale[j]) * factor32
                if key == np.uint64(0):
                    continue
                at = index + row * width + start
                for j in range(m):
                    chances[j] = np.float32(random(key, at + j) >> np.uint64(40)) * np.float32(2.0**-24)
                _round(scaled[:m], zero, chances, True, form, table, found, spare, passed)
                for j in range(m):
                    if out[j] != some[j]:
                        mine[j] = spare[j]
                        out[j] = ((found[j] - zero[j]) * scale[j]) * factor32


@jit
def lost(merged: Any, base: Any, written: Any, counts: Any, sums: Any, memory: Any) -> None:
    """Compare merged values with those of their codes; an update is the merged value minus the base's.

    Args:
        merged, base, written: `[E]` float32.
        counts: `[2]` int64; receives how many updates are not zero, and of how many of these the written value is the base's.
        sums: `[2]` float64; receives the sums of the squares of the updates and of the errors.
        memory: `[2, LINE]` float64, memory.
    """
    updates, errors, updated, unmoved = memory[0], memory[1], 0, 0
    updates[:STRIP] = 0.0
    errors[:STRIP] = 0.0
    for start in range(0, merged.size, STRIP):
        m = min(STRIP, merged.size - start)
        new, old, coded = merged[start : start + m], base[start : start + m], written[start : start + m]
        for j in range(m):
            update, error = np.float64(new[j] - old[j]), np.float64(coded[j] - new[j])
            updates[j] += update * update
            errors[j] += error * error
            updated += new[j] != old[j]
            unmoved += (new[j] != old[j]) & (coded[j] == old[j])
    counts[0], counts[1] = updated, unmoved
    sums[0], sums[1] = updates[:STRIP].sum(), errors[:STRIP].sum()
