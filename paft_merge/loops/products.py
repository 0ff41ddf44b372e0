"""The low-rank product: an adapter's delta from its factors, with the same bits whichever rows are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from paft_merge.loops.feed import COLUMNS

_LINE = 64
"""What columns are rounded up to: a loop of a multiple of this is all vectors."""


@njit(error_model="numpy", boundscheck=False, fastmath={"contract"})
def multiply(left: Any, panels: Any, out: Any, total: Any, rows: Any) -> None:
    """Low-rank product `out = left @ right` in float32, one fused multiply-add a rank, in the order of the ranks.

    An element depends on its row of `left` and its column of `right` alone, whatever else is computed in the same call:
    that is what a BLAS does not promise, and what makes a merge's bits independent of how rows are grouped. On ranks up to
    64 it is also as fast as one, or faster.

    Args:
        left: `[N, R]` float32.
        panels: `[C, P, STRIDE]` float32, the right factor `[R, I]` in panels of COLUMNS columns (see `feed.packed`).
        out: `[N, I]` float32, overwritten.
        total, rows: `[4, STRIDE]`, `[4, P]` float32, memory; P is R rounded up to fours.
    """
    n, rank = left.shape
    width, padded = out.shape[1], panels.shape[1]
    rows[:] = np.float32(0)
    for c in range(panels.shape[0]):
        column, panel = c * COLUMNS, panels[c]
        m = min(COLUMNS, width - column)
        columns = (m + _LINE - 1) // _LINE * _LINE
        for first in range(0, n, 4):
            many = min(4, n - first)
            for k in range(many):
                for r in range(rank):
                    rows[k, r] = left[first + k, r]
            for k in range(4):
                for j in range(columns):
                    total[k, j] = np.float32(0)
            for r in range(0, padded, 4):
                p = panel[r : r + 4]
                a0, a1, a2, a3 = rows[0, r], rows[0, r + 1], rows[0, r + 2], rows[0, r + 3]
                b0, b1, b2, b3 = rows[1, r], rows[1, r + 1], rows[1, r + 2], rows[1, r + 3]
                c0, c1, c2, c3 = rows[2, r], rows[2, r + 1], rows[2, r + 2], rows[2, r + 3]
                d0, d1, d2, d3 = rows[3, r], rows[3, r + 1], rows[3, r + 2], rows[3, r + 3]
                for j in range(columns):
                    v0, v1, v2, v3 = p[0, j], p[1, j], p[2, j], p[3, j]
                    total[0, j] = total[0, j] + a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
                    total[1, j] = total[1, j] + b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
                    total[2, j] = total[2, j] + c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
                    total[3, j] = total[3, j] + d0 * v0 + d1 * v1 + d2 * v2 + d3 * v3
            for k in range(many):
                line = out[first + k, column : column + m]
                for j in range(m):
                    line[j] = total[k, j]
