"""Vectors of sums and of counts in registers, for steps beside one that LLVM does not vectorise, such as the updates of a histogram.

A processor does both at the same time: updates wait for stores, of which one a cycle is written.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, register_model

from paft_merge.compute.kernels.processors import has_avx512

LANES = 16 if has_avx512() else 8
"""Entries of a step: two registers of float64, one of int32. Sums are added in the order of the loops that LLVM makes with AVX-512, so that
the last bits are the same for whole strips and in `add_squares`."""


class _Vector(types.Type):
    """LANES numbers of an LLVM type."""

    def __init__(self, name: str, kind: Any) -> None:
        super().__init__(name=name)
        self.kind = ir.VectorType(kind, LANES)


@register_model(_Vector)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: _Vector) -> None:
        super().__init__(manager, kind, kind.kind)


_SUMS, _COUNTS, _MASK = (
    _Vector(name, kind)
    for name, kind in (("Sums", ir.DoubleType()), ("Counts", ir.IntType(32)), ("Mask", ir.IntType(1)))
)
_WHOLE, _HALF, _REAL = (ir.VectorType(kind, LANES) for kind in (ir.IntType(32), ir.IntType(16), ir.FloatType()))


def _all(value: int) -> Any:
    return ir.Constant(_WHOLE, [value] * LANES)


def _bits(context: Any, builder: Any, array: types.Array, held: Any, first: Any) -> Any:
    """LANES elements of an array from `first` on, as integers of 32 bits: those of bfloat16 are widened."""
    kind, size = (_HALF, 2) if array.dtype == types.uint16 else (_WHOLE, 4)
    begin = builder.gep(context.make_array(array)(context, builder, held).data, [first])
    bits = builder.load(builder.bitcast(begin, kind.as_pointer()), align=size)
    return bits if size == 4 else builder.shl(builder.zext(bits, _WHOLE), _all(16))


def _each(builder: Any, value: Any) -> Any:
    """A vector of one int32."""
    nowhere, zeros = ir.Constant(_WHOLE, ir.Undefined), ir.Constant(_WHOLE, None)
    return builder.shuffle_vector(
        builder.insert_element(nowhere, value, ir.Constant(ir.IntType(32), 0)), nowhere, zeros
    )


def _counted(builder: Any, counts: Any, where: Any) -> Any:
    """Counts with two more where a mask is set, as LLVM makes more instructions of ones; see `sum_of`."""
    return builder.add(counts, builder.select(where, _all(2), _all(0)))


@intrinsic
def no_sums(_: Any) -> Any:
    """A vector of sums, zeros."""
    return _SUMS(), lambda *_: ir.Constant(_SUMS.kind, None)


@intrinsic
def squares_of(_: Any, values: Any, first: Any) -> Any:
    """The squares of the values from `values[first]` on: float32, or the bits of float32 (uint32) or of bfloat16 (uint16)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = _bits(context, builder, signature.args[0], *arguments)
        wide = builder.fpext(builder.bitcast(bits, _REAL), _SUMS.kind)
        return builder.fmul(wide, wide, flags=("contract",))

    return _SUMS(values, types.int64), generate


@intrinsic
def times(_: Any, left: Any, right: Any) -> Any:
    """The products of two vectors."""
    return _SUMS(_SUMS, _SUMS), lambda _, builder, __, arguments: builder.fmul(*arguments, flags=("contract",))


@intrinsic
def plus(_: Any, left: Any, right: Any) -> Any:
    """The sums of two vectors. A product that is added is not rounded before, if the processor can do so."""
    return _SUMS(_SUMS, _SUMS), lambda _, builder, __, arguments: builder.fadd(*arguments, flags=("contract",))


@intrinsic
def plus_where(_: Any, left: Any, right: Any, where: Any) -> Any:
    """`plus`, but the numbers of `left` alone where `where` is not set."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        left, right, where = arguments
        return builder.select(where, builder.fadd(left, right, flags=("contract",)), left)

    return _SUMS(_SUMS, _SUMS, _MASK), generate


@intrinsic
def bits_at(_: Any, values: Any, first: Any) -> Any:
    """The bits from `values[first]` on, uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _bits(context, builder, signature.args[0], *arguments)

    return _COUNTS(values, types.int64), generate


@intrinsic
def widened(_: Any, bits: Any) -> Any:
    """Float32 with these bits as float64."""
    return _SUMS(_COUNTS), lambda _, builder, __, arguments: builder.fpext(
        builder.bitcast(arguments[0], _REAL), _SUMS.kind
    )


@intrinsic
def lesser(_: Any, left: Any, right: Any) -> Any:
    """The smaller magnitude (bits) of each two float32."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        left, right = (builder.and_(one, _all(0x7FFFFFFF)) for one in arguments)
        return builder.select(builder.icmp_unsigned("<", left, right), left, right)

    return _COUNTS(_COUNTS, _COUNTS), generate


@intrinsic
def opposed(_: Any, left: Any, right: Any) -> Any:
    """Where the signs of two float32 differ."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.icmp_signed("<", builder.xor(*arguments), _all(0))

    return _MASK(_COUNTS, _COUNTS), generate


@intrinsic
def at_least(_: Any, magnitudes: Any, edge: Any) -> Any:
    """Where magnitudes are at least `edge` (bits)."""
    return _MASK(_COUNTS, types.uint32), lambda _, builder, __, arguments: builder.icmp_unsigned(
        ">=", arguments[0], _each(builder, arguments[1])
    )


@intrinsic
def where_both(_: Any, left: Any, right: Any) -> Any:
    """Where both are set."""
    return _MASK(_MASK, _MASK), lambda _, builder, __, arguments: builder.and_(*arguments)


@intrinsic
def count_where(_: Any, counts: Any, where: Any) -> Any:
    """The counts, and one more where `where` is set."""
    return _COUNTS(_COUNTS, _MASK), lambda _, builder, __, arguments: _counted(builder, *arguments)


@intrinsic
def total(_: Any, left: Any, right: Any) -> Any:
    """The sum of two vectors: register after register, then the halves of the sum, and so on."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        size = LANES // 2

        def part(values: Any, start: int) -> Any:
            mask = ir.Constant(ir.VectorType(ir.IntType(32), size), list(range(start, start + size)))
            return builder.shuffle_vector(values, ir.Constant(values.type, ir.Undefined), mask)

        held, *others = (part(values, start) for values in arguments for start in (0, size))
        for other in others:
            held = builder.fadd(held, other)
        while size > 1:
            size //= 2
            held = builder.fadd(part(held, 0), part(held, size))
        return builder.extract_element(held, ir.Constant(ir.IntType(32), 0))

    return types.float64(_SUMS, _SUMS), generate


@intrinsic
def no_counts(_: Any) -> Any:
    """A vector of counts, zeros."""
    return _COUNTS(), lambda *_: _all(0)


@intrinsic
def count_below(_: Any, counts: Any, magnitudes: Any, first: Any, edge: Any) -> Any:
    """The counts, and one more where a magnitude from `magnitudes[first]` on is below `edge` (bits)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counts, held, at, edge = arguments
        bits = _bits(context, builder, signature.args[1], held, at)
        return _counted(builder, counts, builder.icmp_unsigned("<", bits, _each(builder, edge)))

    return _COUNTS(_COUNTS, magnitudes, types.int64, types.uint32), generate


@intrinsic
def count_erased(_: Any, counts: Any, weights: Any, values: Any, first: Any) -> Any:
    """The counts, and one more where a weight from `weights[first]` on equals `weight + value`, both rounded to bfloat16.

    Zeros are equal, whatever their signs. The weights are the bits of float32 (uint32) or of bfloat16 (uint16).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counts, weights, values, at = arguments

        def rounded(bits: Any) -> Any:  # to nearest even
            odd = builder.and_(builder.lshr(bits, _all(16)), _all(1))
            return builder.lshr(builder.add(builder.add(bits, _all(0x7FFF)), odd), _all(16))

        weight = _bits(context, builder, signature.args[1], weights, at)
        value = _bits(context, builder, signature.args[2], values, at)
        added = builder.fadd(builder.bitcast(weight, _REAL), builder.bitcast(value, _REAL))
        before = builder.lshr(weight, _all(16)) if signature.args[1].dtype == types.uint16 else rounded(weight)
        after = rounded(builder.bitcast(added, _WHOLE))
        zeros = builder.icmp_unsigned("==", builder.shl(builder.or_(before, after), _all(17)), _all(0))
        same = builder.or_(builder.icmp_unsigned("==", before, after), zeros)
        return _counted(builder, counts, same)

    return _COUNTS(_COUNTS, weights, values, types.int64), generate


@intrinsic
def sum_of(_: Any, counts: Any) -> Any:
    """The sum of all counts of a vector."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        lanes = [builder.extract_element(arguments[0], ir.Constant(ir.IntType(32), lane)) for lane in range(LANES)]
        first, *others = lanes
        for other in others:
            first = builder.add(first, other)
        return builder.zext(builder.lshr(first, ir.Constant(ir.IntType(32), 1)), ir.IntType(64))

    return types.int64(_COUNTS), generate
