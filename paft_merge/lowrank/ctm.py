"""Compress then Merge: the deltas in shared subspaces of rank R, where a method merges them (He et al. 2026, arXiv:2606.03723).

Orthonormal U `[O, R]` and V `[I, R]` maximise the energy sum_i c_i^2 ||U^T D_i V||_F^2 that the subspaces keep of all sources: the
Tucker decomposition of the stacked deltas in two modes, by higher-order orthogonal iteration inside the core space. The factors
c_i = 1 / ||D_i||_F give every source the same say (the authors' `beta` of 0). The coordinates are U^T D_i V, not normalised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from paft_merge.lowrank.core_space import Space, cores
from paft_merge.lowrank.factors import Matrix, Pair

ITERATIONS = 1000
TOLERANCE = 1e-6
"""The iteration ends when the relative error of the decomposition changes by less, as in the authors' code."""


def compressed_of(pairs: Sequence[Pair], rank: int) -> Space:
    """The deltas `pairs` in their shared subspaces of dimension `rank`, or less if the core space is smaller.

    A delta that is zero has no say; the authors' code divides by its norm.
    """
    left, coordinates, right = cores(pairs)
    norms = [float(np.linalg.norm(one)) for one in coordinates]
    sources = [one / norm for one, norm in zip(coordinates, norms, strict=True) if norm]
    if not sources:
        return Space(left, coordinates, right)
    u, v = _subspaces(sources, rank)
    held = [u.T @ one @ v for one in coordinates]
    outside = math.hypot(*(float(np.linalg.norm(one - u @ h @ v.T)) for one, h in zip(coordinates, held, strict=True)))
    return Space(left @ u, held, v.T @ right, outside)


def _subspaces(sources: Sequence[Matrix], rank: int) -> tuple[Matrix, Matrix]:
    """U `[K, R]` and V `[L, R]` of `sources`, each `[K, L]` of norm 1."""
    total = float(len(sources))
    left, right = _leading(sources, rank), _leading([one.T for one in sources], rank)
    before = math.inf
    for _ in range(ITERATIONS):
        left = _leading([one @ right for one in sources], rank)
        right = _leading([one.T @ left for one in sources], rank)
        kept = sum(float(np.square(left.T @ one @ right).sum()) for one in sources)
        error = math.sqrt(max(total - kept, 0.0) / total)
        if abs(before - error) < TOLERANCE:
            break
        before = error
    return left, right


def _leading(matrices: Sequence[Matrix], rank: int) -> Matrix:
    """The first `rank` left singular vectors of the matrices side by side."""
    return np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)[0][:, :rank]
