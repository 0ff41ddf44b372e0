"""The low-rank product: an adapter's delta from its factors, with the same bits for any choice of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from paft_merge.compute.kernels.block_source import COLUMNS, ROWS
from paft_merge.compute.kernels.primitives import jit
from paft_merge.compute.kernels.processors import has_avx512

_LANES, _VECTORS = (16, 4) if has_avx512() else (8, 2)
"""Lanes of a vector, and vectors of a tile of ROWS rows, that fit the registers of the processor. No bit depends on them."""


@intrinsic
def _tile(_: Any, left: Any, first: Any, panels: Any, c: Any, out: Any, row: Any, column: Any) -> Any:
    """Multiply ROWS rows of `left` from `first` on by panel `c` into `out` at `row` and `column`, with totals in registers.

    The rank must be at least 1. Emitted as LLVM IR, because numba cannot generate this register tiling.
    """
    kind, whole = ir.VectorType(ir.FloatType(), _LANES), ir.IntType(64)
    fma = ir.FunctionType(kind, [kind] * 3)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, first, panels, c, out, row, column = arguments
        left, panels, out = (
            context.make_array(of)(context, builder, array)
            for of, array in zip(signature.args[0:5:2], (left, panels, out), strict=True)
        )
        rank, width = builder.extract_value(panels.shape, 1), builder.extract_value(out.shape, 1)
        add = builder.module.declare_intrinsic(f"llvm.fma.v{_LANES}f32", (), fma)

        def number(value: int) -> Any:
            return ir.Constant(whole, value)

        def place(data: Any, row: Any, length: Any, column: Any) -> Any:
            return builder.gep(data, [builder.add(builder.mul(row, length), column)])

        def vector(at: Any, j: int) -> Any:
            return builder.bitcast(builder.gep(at, [number(j)]), kind.as_pointer())

        lefts = [place(left.data, builder.add(first, number(k)), rank, number(0)) for k in range(ROWS)]
        panel = place(panels.data, builder.mul(c, rank), number(COLUMNS), number(0))
        for j in range(0, COLUMNS, _LANES * _VECTORS):
            before = builder.block
            over, done = builder.append_basic_block("ranks"), builder.append_basic_block("done")
            builder.branch(over)
            builder.position_at_end(over)
            r = builder.phi(whole)
            totals = [[builder.phi(kind) for _ in range(_VECTORS)] for _ in range(ROWS)]
            at = place(panel, r, number(COLUMNS), number(j))
            rights = [builder.load(vector(at, v * _LANES), align=4) for v in range(_VECTORS)]
            for values, line in zip(lefts, totals, strict=True):
                one = builder.load(builder.gep(values, [r]))
                lane = builder.insert_element(ir.Constant(kind, ir.Undefined), one, ir.Constant(ir.IntType(32), 0))
                many = builder.shuffle_vector(lane, lane, ir.Constant(ir.VectorType(ir.IntType(32), _LANES), None))
                for v, total in enumerate(line):
                    total.add_incoming(ir.Constant(kind, None), before)
                    total.add_incoming(builder.call(add, [many, rights[v], total]), over)
            following = builder.add(r, number(1))
            r.add_incoming(number(0), before)
            r.add_incoming(following, over)
            builder.cbranch(builder.icmp_signed("<", following, rank), over, done)
            builder.position_at_end(done)
            for k, line in enumerate(totals):
                to = place(out.data, builder.add(row, number(k)), width, builder.add(column, number(j)))
                for v, total in enumerate(line):
                    builder.store(total.incomings[1][0], vector(to, v * _LANES), align=4)
        return context.get_dummy_value()

    return types.void(left, first, panels, c, out, row, column), generate


@jit
def multiply(left: Any, panels: Any, out: Any, total: Any, rows: Any) -> None:
    """Low-rank product `out = left @ right` in float32, one fused multiply-add per rank, in the order of the ranks.

    An element depends only on its row of `left` and its column of `right`, and not on the other rows of the call. A BLAS does
    not promise this, and it makes the bits of a merge independent of how rows are grouped. Up to ranks of some hundreds this is also
    faster than a BLAS.

    Args:
        left: `[N, R]` float32.
        panels: `[C, R, COLUMNS]` float32, the right factor `[R, I]` in panels (see `block_source.packed`).
        out: `[N, I]` float32, overwritten.
        total: `[ROWS, COLUMNS]` float32, memory.
        rows: `[ROWS, R]` float32, memory.
    """
    n, rank = left.shape
    if rank == 0:
        out[:] = np.float32(0)
        return
    for c in range(panels.shape[0]):
        column = c * COLUMNS
        m = min(COLUMNS, out.shape[1] - column)
        for first in range(0, n, ROWS):
            many = min(ROWS, n - first)
            if m == COLUMNS and many == ROWS:
                _tile(left, first, panels, c, out, first, column)
                continue
            for k in range(many):
                for r in range(rank):
                    rows[k, r] = left[first + k, r]
            _tile(rows, 0, panels, c, total, 0, 0)
            for k in range(many):
                for j in range(m):
                    out[first + k, column + j] = total[k, j]
