"""Filling a block piece by piece, from files and from factors, without a lock of Python's (see `feed`)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from paft_merge.compute.kernels.block_source import (
    COLUMNS,
    HEAD,
    KEPT,
    LEFT,
    PREAD,
    PRODUCTS,
    READS,
    READY,
    ROW,
    ROWS,
    SIZE,
    STEP,
    TOTAL,
)
from paft_merge.compute.kernels.low_rank import multiply
from paft_merge.compute.kernels.primitives import jit

_INT = ir.IntType(64)


@intrinsic
def _floats(_: Any, address: Any) -> Any:
    """A pointer to float32."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def _pread(_: Any, function: Any, fd: Any, address: Any, count: Any, offset: Any) -> Any:
    """The C library's, at the address `function`: how many bytes were read, or -1."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        at, fd, *rest = arguments
        kind = ir.FunctionType(_INT, [ir.IntType(32), _INT, _INT, _INT])
        return builder.call(builder.inttoptr(at, kind.as_pointer()), [builder.trunc(fd, ir.IntType(32)), *rest])

    return types.int64(*[types.int64] * 5), generate


@jit
def fill(how: Any, upto: int) -> int:
    """Fill the arrays of a block until at least `upto` entries are there, or have been.

    Args:
        how: `[K]` int64, what with (see `feed`); keeps how many are there.
        upto: at most the size of the block.

    Returns:
        How many are there, or -1 where something cannot be read.
    """
    ready, size, row = how[READY], how[SIZE], how[ROW]
    while ready < upto:
        count = min(how[STEP], size - ready)
        at = ready if how[KEPT] else 0
        for k in range(how[READS]):
            job = HEAD + 4 * k
            address, width, fd, offset = how[job] + at * how[job + 1], how[job + 1], how[job + 2], how[job + 3]
            done, wanted = 0, count * width
            while done < wanted:
                got = _pread(how[PREAD], fd, address + done, wanted - done, offset + ready * width + done)
                if got <= 0:
                    return -1
                done += got
        for k in range(how[READS], how[READS] + how[PRODUCTS]):
            job = HEAD + 4 * k
            address, left, rank, right = how[job], how[job + 1], how[job + 2], how[job + 3]
            first, many = ready // row, count // row
            multiply(
                carray(_floats(left + 4 * first * rank), (many, rank)),
                carray(_floats(right), ((row + COLUMNS - 1) // COLUMNS, rank, COLUMNS)),
                carray(_floats(address + 4 * at), (many, row)),
                carray(_floats(how[TOTAL]), (ROWS, COLUMNS)),
                carray(_floats(how[LEFT]), (ROWS, rank)),
            )
        ready += count
    how[READY] = ready
    return int(ready)
