"""Spaces of low dimension in which a method merges the deltas of adapters: the deltas of one tensor as small matrices.

Shapes: O = out features, I = in features, K and L = dimensions of the space, R = rank of one adapter, n sources.
Every delta is a product D_i = B_i A_i of B_i `[O, R_i]`, which includes the scale, and A_i `[R_i, I]`. Arithmetic is float64.

**Core Space** (Panariello et al. 2025, arXiv:2509.17786). With orthonormal bases U `[O, K]` of the columns of [B_1 ... B_n]
and V `[I, L]` of the rows of [A_1; ...; A_n], both from a singular value decomposition, the core of a source is
M_i = U^T B_i A_i V, and D_i = U M_i V^T exactly. A method merges the M_i as it merges deltas, and U M V^T has rank min(K, L) at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paft_merge.lowrank.factors import LowRank, Matrix, Pair, Store, as_float32, truncate_between

NULL = 1e-13
"""A direction whose singular value is at most this share of the largest is rounding of float64, and is left out of a basis."""


class Space(NamedTuple):
    """The deltas of one tensor as coordinates: D_i = `left @ coordinates[i] @ right`, or its part that the space holds."""

    left: Matrix
    """`[O, K]`, orthonormal columns."""
    coordinates: list[Matrix]
    """One a source: `[K, L]`, zeros for a delta that is zero."""
    right: Matrix | None
    """`[L, I]`, orthonormal rows; None stands for the identity."""
    outside: float = 0.0
    """Root of the sum of ||D_i - left @ coordinates[i] @ right||^2 over the sources; 0 for a space that holds them."""

    def truncated(
        self, merged: NDArray[Any], rank: int | None, energy: float | None = None, store: Store = as_float32
    ) -> LowRank:
        """The delta of merged coordinates `[K, L]`, exact if the rank allows it; see `factors.truncate`."""
        return truncate_between(self.left, merged.astype(np.float64), self.right, rank, energy, store)


def core_of(pairs: Sequence[Pair]) -> Space:
    """The Core Space of the deltas `pairs`, at least one; see the module."""
    return Space(*cores(pairs))


def cores(pairs: Sequence[Pair]) -> tuple[Matrix, list[Matrix], Matrix]:
    """U `[O, K]`, the core M_i `[K, L]` of every source, and V^T `[L, I]`.

    A source whose B or A is zero does not take part in the bases. Directions that the stacked factors do not span (equal adapters,
    a shared A) are left out, so K and L are their ranks; the authors' code keeps them, with arbitrary vectors.
    """
    active = [(b.astype(np.float64), a.astype(np.float64)) for b, a in pairs if b.any() and a.any()]
    rows, columns = pairs[0][0].shape[0], pairs[0][1].shape[1]
    left, b_KR = _basis(np.concatenate([b for b, _ in active], axis=1) if active else np.zeros((rows, 0)))
    right, a_LR = _basis(np.concatenate([a for _, a in active]).T if active else np.zeros((columns, 0)))
    coordinates, end = list[Matrix](), 0
    for b, a in pairs:
        if not (b.any() and a.any()):
            coordinates.append(np.zeros((len(b_KR), len(a_LR))))
            continue
        start, end = end, end + b.shape[1]
        coordinates.append(b_KR[:, start:end] @ a_LR[:, start:end].T)
    return left, coordinates, right.T


def _basis(stack: Matrix) -> tuple[Matrix, Matrix]:
    """The left singular vectors `[N, K]` of `stack` `[N, R]`, by falling singular value, and `stack` in this basis, `[K, R]`."""
    if not stack.shape[1]:
        return stack, np.zeros((0, 0))
    q, r = np.linalg.qr(stack)
    u, s, vt = np.linalg.svd(r, full_matrices=False)
    kept = s > NULL * s[0]
    return q @ u[:, kept], s[kept, None] * vt[kept]
