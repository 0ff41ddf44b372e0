"""Fill a block piece by piece, from files, codes and factors, without the interpreter lock (see `block_source`)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from paft_merge.compute.kernels.block_source import (
    BYTES,
    CODED,
    CODES,
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
from paft_merge.compute.kernels.decoding import decode
from paft_merge.compute.kernels.low_rank import multiply
from paft_merge.compute.kernels.primitives import jit

_INT = ir.IntType(64)


@intrinsic
def _floats(_: Any, address: Any) -> Any:
    """An address as a pointer to float32."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def _pread(_: Any, function: Any, fd: Any, address: Any, count: Any, offset: Any) -> Any:
    """Call pread of the C library, at the address `function`: the number of bytes read, or -1."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        at, fd, *rest = arguments
        kind = ir.FunctionType(_INT, [ir.IntType(32), _INT, _INT, _INT])
        return builder.call(builder.inttoptr(at, kind.as_pointer()), [builder.trunc(fd, ir.IntType(32)), *rest])

    return types.int64(*[types.int64] * 5), generate


@intrinsic
def _bytes(_: Any, address: Any) -> Any:
    """An address as a pointer to bytes."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(types.int64), generate


@jit
def _read(source_desc: Any, fd: int, address: int, wanted: int, offset: int) -> bool:
    """Read bytes of a file; False where that failed."""
    done = 0
    while done < wanted:
        got = _pread(source_desc[PREAD], fd, address + done, wanted - done, offset + done)
        if got <= 0:
            return False
        done += got
    return True


@jit
def _codes(source_desc: Any, job: int, ready: int, at: int, count: int) -> bool:
    """Read codes of `count` entries from `ready` on, and write their values from entry `at` of their array on; False where the read failed."""
    address, fd, offset, each = source_desc[job], source_desc[job + 1], source_desc[job + 2], source_desc[job + 3]
    table, scales, zeros = source_desc[job + 4], source_desc[job + 5], source_desc[job + 6]
    shape = (source_desc[job + 7], source_desc[job + 8])
    none = (0, 0)
    wanted = (count + each - 1) // each
    if not _read(source_desc, fd, source_desc[BYTES], wanted, offset + ready // each):
        return False
    decode(
        carray(_bytes(source_desc[BYTES]), (wanted,)),
        carray(_floats(table), (256, each)),
        carray(_floats(scales), shape),
        carray(_floats(zeros), shape if zeros else none),
        source_desc[job + 9],
        source_desc[job + 10],
        source_desc[job + 11] + ready,
        carray(_floats(address + 4 * at), (count,)),
    )
    return True


@jit
def fill(source_desc: Any, upto: int) -> int:
    """Fill the arrays of a block until at least `upto` of its entries have been filled.

    Args:
        source_desc: `[K]` int64, the reads, products and codes (see `block_source`); its READY is updated.
        upto: at most the size of the block.

    Returns:
        The number of entries filled so far, or -1 where a read failed.
    """
    ready, size, row = source_desc[READY], source_desc[SIZE], source_desc[ROW]
    while ready < upto:
        count = min(source_desc[STEP], size - ready)
        at = ready if source_desc[KEPT] else 0
        for k in range(source_desc[READS]):
            job = HEAD + 4 * k
            address, width, fd, offset = (
                source_desc[job] + at * source_desc[job + 1],
                source_desc[job + 1],
                source_desc[job + 2],
                source_desc[job + 3],
            )
            if not _read(source_desc, fd, address, count * width, offset + ready * width):
                return -1
        for k in range(source_desc[READS], source_desc[READS] + source_desc[PRODUCTS]):
            job = HEAD + 4 * k
            address, left, rank, right = (
                source_desc[job],
                source_desc[job + 1],
                source_desc[job + 2],
                source_desc[job + 3],
            )
            first, many = ready // row, count // row
            multiply(
                carray(_floats(left + 4 * first * rank), (many, rank)),
                carray(_floats(right), ((row + COLUMNS - 1) // COLUMNS, rank, COLUMNS)),
                carray(_floats(address + 4 * at), (many, row)),
                carray(_floats(source_desc[TOTAL]), (ROWS, COLUMNS)),
                carray(_floats(source_desc[LEFT]), (ROWS, rank)),
            )
        first_codes = HEAD + 4 * (source_desc[READS] + source_desc[PRODUCTS])
        for k in range(source_desc[CODES]):
            if not _codes(source_desc, first_codes + CODED * k, ready, at, count):
                return -1
        ready += count
    source_desc[READY] = ready
    return int(ready)
