"""Steps of the kernels, each a loop over one strip (see `kernels` for the words).

The bits of a block are two arrays to every kernel, uint16 and uint32, one of them empty (see `object_cache.Compiled`), and a
step goes over both: one machine code serves every storage type.

LLVM makes a vector loop of each step. Operations that numba does not vectorise are written as LLVM intrinsics. Sums run over a
strip in float32, in as many lanes as the processor's vectors have, and then in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from paft_merge.compute import magnitudes, splitmix64
from paft_merge.compute.kernels.block_source import KEPT, SIZE

MAGNITUDE = np.uint32(magnitudes.MAGNITUDE)
_INFINITY = np.uint32(magnitudes.INFINITY)
_E6, _E5, _E4, _E3 = (np.float32(e).view(np.uint32) for e in magnitudes.EPSILONS)
_SMALL, _LARGE = (np.float32(e).view(np.uint32) for e in (2.0**-50, 2.0**60))
"""Magnitudes (bits) between which a sum of a thousand squares neither underflows nor overflows float32."""
GOLDEN = np.uint64(splitmix64.GOLDEN)
_MIX1 = np.uint64(splitmix64.MIX1)
_MIX2 = np.uint64(splitmix64.MIX2)

jit = njit(error_model="numpy", boundscheck=False)


@intrinsic
def bits_of(_: Any, value: Any) -> Any:
    """The bits of a float32 in a register. A view of a whole array with another type would keep LLVM from vectorising the loop."""
    return types.uint32(types.float32), lambda _, builder, __, arguments: builder.bitcast(arguments[0], ir.IntType(32))


@intrinsic
def float_of(_: Any, bits: Any) -> Any:
    """The float32 with these 32 bits, or the value of the bfloat16 with these 16."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        (wide,) = arguments
        if bits == types.uint16:
            wide = builder.shl(builder.zext(wide, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def double_if(_: Any, condition: Any) -> Any:
    """2 or 0, for counting in twos: LLVM makes more instructions of a sum of ones, and branches of a Python conditional."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        two, none = (ir.Constant(ir.IntType(32), number) for number in (2, 0))
        return builder.select(arguments[0], two, none)

    return types.uint32(types.boolean), generate


@intrinsic
def in_range_mask(_: Any, values: Any, first: Any, low: Any, width: Any) -> Any:
    """uint64 mask of the 64 values from `values[first]` on whose magnitude (bits) is in `[low, low + width)`; the first is the lowest bit."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, at, *bounds = arguments
        kind = ir.VectorType(ir.IntType(32), 64)
        begin = builder.gep(context.make_array(signature.args[0])(context, builder, row).data, [at])
        bits = builder.load(builder.bitcast(begin, kind.as_pointer()), align=4)
        undefined, all_first = ir.Constant(kind, ir.Undefined), ir.Constant(kind, None)
        lows, widths = (
            builder.shuffle_vector(
                builder.insert_element(undefined, b, ir.Constant(ir.IntType(32), 0)), undefined, all_first
            )
            for b in bounds
        )
        magnitudes = builder.and_(bits, ir.Constant(kind, [int(MAGNITUDE)] * 64))
        within = builder.icmp_unsigned("<", builder.sub(magnitudes, lows), widths)
        return builder.bitcast(within, ir.IntType(64))

    return types.uint64(values, types.int64, types.uint32, types.uint32), generate


@intrinsic
def two_of(_: Any, bits: Any, first: Any) -> Any:
    """The 32 bits at `bits[first]` and, in the upper half of a uint64, those at `bits[first + 1]`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, at = arguments
        begin = builder.gep(context.make_array(signature.args[0])(context, builder, row).data, [at])
        return builder.load(builder.bitcast(begin, ir.IntType(64).as_pointer()), align=4)

    return types.uint64(bits, types.int64), generate


@intrinsic
def lowest(_: Any, bits: Any) -> Any:
    """Position of the lowest set bit. At least one bit must be set."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@intrinsic
def reassoc_add(_: Any, total: Any, value: Any) -> Any:
    """`total + value` in float32, where LLVM may reorder a series of such additions into vector lanes."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=("reassoc",))

    return types.float32(types.float32, types.float32), generate


@intrinsic
def _feed(_: Any, source_desc: Any, upto: Any) -> Any:
    """Fill the block until `upto` entries have been filled; returns the result of `fill_loop.fill`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole, integer = ir.IntType(64).as_pointer(), ir.IntType(64)
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        kind = ir.FunctionType(integer, [whole, integer, integer])
        fill = builder.inttoptr(builder.load(array.data), kind.as_pointer())
        length = builder.extract_value(array.shape, 0)
        return builder.call(fill, [array.data, length, arguments[1]])

    return types.int64(source_desc, types.int64), generate


@njit(inline="always")
def extent(sources: Any) -> tuple[int, int]:
    """The number of sources, and the entries of each that the arrays hold."""
    return sources[0].shape[0], sources[0].shape[1] + sources[1].shape[1]


@njit(inline="always")
def strip(bits: Any, at: int, count: int) -> Any:
    """`count` entries of bits `[E]` from `at` on."""
    return bits[0][at : at + count], bits[1][at : at + count]


@njit(inline="always")
def strip_of(bits: Any, i: int, at: int, count: int) -> Any:
    """`count` entries of row `i` of bits `[n, E]`, from `at` on."""
    return bits[0][i, at : at + count], bits[1][i, at : at + count]


@njit(inline="always")
def start_block(sources: Any, source_desc: Any) -> tuple[int, int, int, int]:
    """The sources and entries of a block, the entries filled so far, and the index of the first one in the arrays."""
    n, held = extent(sources)
    return (n, source_desc[SIZE], 0, 0) if source_desc.size else (n, held, held, 0)


@njit(inline="always")
def advance_block(source_desc: Any, ready: int) -> tuple[int, int]:
    """Fill the next piece of a block: the index of the first entry in the arrays, and the entries filled so far, or -1."""
    return (0 if source_desc[KEPT] else ready), _feed(source_desc, ready + 1)


@njit(inline="always")
def widen(bits: Any, values: Any) -> None:
    """Convert stored elements to float32 `values`."""
    for j in range(bits[0].size):
        values[j] = float_of(bits[0][j])
    for j in range(bits[1].size):
        values[j] = float_of(bits[1][j])


@njit(inline="always")
def load(bits: Any, minus: Any, values: Any) -> None:
    """Subtract `minus` from stored elements into `values`: deltas where it holds the base, values where it holds zeros."""
    for j in range(bits[0].size):
        values[j] = float_of(bits[0][j]) - minus[j]
    for j in range(bits[1].size):
        values[j] = float_of(bits[1][j]) - minus[j]


@njit(inline="always")
def random(key: np.uint64, index: int) -> Any:
    """Number `index` of the SplitMix64 stream `key` (see `splitmix64.numbers`)."""
    return mixed(counter(key, index))


@njit(inline="always")
def counter(key: np.uint64, index: int) -> np.uint64:
    """SplitMix64's counter of number `index`; the next counter is `GOLDEN` more."""
    return key + np.uint64(index + 1) * GOLDEN


@njit(inline="always")
def mixed(z: np.uint64) -> Any:
    """SplitMix64's number of a counter."""
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


@njit(inline="always")
def store(values: Any, out: Any, key: Any, index: Any) -> None:
    """Round float32 `values` into the bits `out`: to nearest even, or stochastically where `key` is not 0."""
    half, whole = out
    if key != np.uint64(0):
        for j in range(half.size):
            # A uniform 16-bit number added below the cut carries with a probability equal to the cut-off part.
            noise = np.uint32(random(key, index + j) >> np.uint64(48))
            half[j] = np.uint16((bits_of(values[j]) + noise) >> np.uint32(16))
    else:
        for j in range(half.size):
            u = bits_of(values[j])
            odd = (u >> np.uint32(16)) & np.uint32(1)
            half[j] = np.uint16((u + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    for j in range(whole.size):
        whole[j] = bits_of(values[j])


@njit(inline="always")
def nonfinite(values: Any, count: int) -> Any:
    """The number of values of a strip that are NaN or infinite."""
    bad = np.uint32(0)
    for j in range(count):
        bad = np.uint32(bad + np.uint32((bits_of(values[j]) & MAGNITUDE) >= _INFINITY))
    return bad


@njit(inline="always")
def low_mask(count: int) -> Any:
    """uint64 mask of the lowest `count` bits."""
    return ~np.uint64(0) if count >= 64 else (np.uint64(1) << np.uint64(count)) - np.uint64(1)


@jit
def load_above(bits: Any, minus: Any, values: Any, high: Any) -> int:
    """`load` a strip of one type; returns the number of magnitudes that are at least `high` (bits)."""
    above = np.uint32(0)
    for j in range(bits.size):
        v = float_of(bits[j]) - minus[j]
        u = np.uint32(bits_of(v) & MAGNITUDE)
        values[j] = v
        above = np.uint32(above + double_if(u >= high))
    return np.int64(above >> np.uint32(1))


@njit(inline="always")
def load_counted(bits: Any, minus: Any, values: Any, counts: Any, sums: Any) -> Any:
    """`load` a strip of a delta and add it to its row of the tally; returns whether its squares leave the range of float32."""
    count = bits[0].size + bits[1].size
    largest, absolute, square = (
        _counted(bits[0], minus, values, counts) if bits[0].size else _counted(bits[1], minus, values, counts)
    )
    counts[7] = max(counts[7], np.int64(largest))
    wide = is_wide(largest)
    if wide:
        for j in range(count):
            sums[0] += abs(np.float64(values[j]))
        sums[1] += square_of(values, count)
    else:
        sums[0] += np.float64(absolute)
        sums[1] += np.float64(square)
    return wide


@njit(inline="always")
def is_wide(largest: Any) -> Any:
    """Whether the squares of a strip whose largest magnitude is `largest` (bits) may leave the range of float32."""
    return (largest > _LARGE) | ((largest < _SMALL) & (largest > np.uint32(0)))


@jit
def _counted(bits: Any, minus: Any, values: Any, counts: Any) -> Any:
    """The largest magnitude (bits) of a strip, and the sums of its magnitudes and squares."""
    largest, zeros, e6, e5, e4, e3 = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
    absolute, square = np.float32(0), np.float32(0)
    for j in range(bits.size):  # twice as many 32-bit counters fit a register
        v = float_of(bits[j]) - minus[j]
        values[j] = v
        u = np.uint32(bits_of(v) & MAGNITUDE)
        largest = u if u > largest else largest
        zeros = np.uint32(zeros + double_if(u == np.uint32(0)))
        e6 = np.uint32(e6 + double_if(u < _E6))
        e5 = np.uint32(e5 + double_if(u < _E5))
        e4 = np.uint32(e4 + double_if(u < _E4))
        e3 = np.uint32(e3 + double_if(u < _E3))
        absolute = reassoc_add(absolute, abs(v))
        square = reassoc_add(square, v * v)
    counts[0] += zeros >> 1
    counts[1] += e6 >> 1
    counts[2] += e5 >> 1
    counts[3] += e4 >> 1
    counts[4] += e3 >> 1
    return largest, absolute, square


@njit(inline="always")
def square_of(values: Any, count: int) -> float:
    """The sum of v*v over a strip whose squares are too large or too small for float32."""
    total = 0.0
    for j in range(count):
        total += np.float64(values[j]) * np.float64(values[j])
    return total
