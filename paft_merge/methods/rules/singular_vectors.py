"""Rules on the singular vectors of the deltas, which need every entry of a matrix at once; arithmetic is float64.

Shapes: K and L = sides of the matrix (of a core, in `space: core`), n sources.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute.blocks import Block, Outcome
from paft_merge.methods.rules.rule import Combine, Rule, TensorPass, write_merged
from paft_merge.methods.rules.walks import MIXED, Walks

Matrix: TypeAlias = NDArray[np.float64]

_EPSILON = float(np.finfo(np.float32).eps)
"""Machine epsilon of float32, the type of the deltas: smaller singular values, by this and the longer side, are rounding."""


@dataclass(frozen=True)
class MatrixRule(Rule):
    """A rule that merges whole matrices in memory. A tensor of another shape is a matrix of its first dimension and the rest."""

    weights: tuple[float, ...]
    factor: float
    """Multiplies the result (lambda)."""

    wants: ClassVar[Literal["deltas"]] = "deltas"

    @property
    def keeps_equals(self) -> bool:
        """Equal deltas have one set of singular vectors, which does not come back unchanged."""
        return False

    def row(self, shape: tuple[int, ...]) -> int:
        """A block holds the whole tensor."""
        return max(math.prod(shape), 1)

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """Everything is measured in the block that is merged."""
        return Walks(MIXED, made=1 + len(active))

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Nothing is measured."""
        weights = [self.weights[i] for i in walk.active]
        rows = walk.shape[0] if walk.shape else 1

        def combine(block: Block, out: Any, key: int) -> Outcome:
            matrices = block.sources.view(np.float32).reshape(block.count, rows, -1).astype(np.float64)
            merged = (self.factor * self.merge(list(matrices), weights)).astype(np.float32).view(np.uint32)
            row = Block(block.index, block.base, merged.reshape(1, -1), subtract=False)
            return write_merged(walk.ops, block, row, out, key, deltas)

        return combine

    @abstractmethod
    def merge(self, matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
        """Merge matrices `[K, L]` with one weight each, before lambda."""


@dataclass(frozen=True)
class TaskSingularVectors(MatrixRule):
    """TSV-Merge (Gargiulo et al. 2025, arXiv:2412.00081): singular vectors of all deltas, made orthogonal.

    With the leading singular triples U_i, S_i, V_i of each delta, U = [U_1 ... U_n] is replaced by the nearest matrix with
    orthonormal columns, P Q^T of its decomposition P S Q^T, and V likewise; the result is U diag(w_i S_i) V^T.
    """

    def merge(self, matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
        """Keep the same number of triples of each delta, as many as fit into the matrix; a delta of lower rank has fewer.

        The authors keep min(K, L) // n of each: equal for deltas of equal rank that fill the space. Where their ranks differ, deltas
        of higher rank keep the places that others do not need, and no vectors of singular values of zero take part.
        """
        triples = [(u, w * s, vt) for w, (u, s, vt) in zip(weights, map(_svd, matrices), strict=True) if w and s.size]
        if not triples:
            return np.zeros_like(matrices[0])
        each = _each([s.size for _, s, _ in triples], min(matrices[0].shape))
        left, right = np.hstack([u[:, :each] for u, _, _ in triples]), np.hstack([vt[:each].T for _, _, vt in triples])
        merged: Matrix = (_orthogonal(left) * np.concatenate([s[:each] for _, s, _ in triples])) @ _orthogonal(right).T
        return merged


@dataclass(frozen=True)
class Isotropic(MatrixRule):
    """Iso-C (Marczak et al. 2025, arXiv:2502.04959): the sum of the deltas with all singular values set to their mean."""

    def merge(self, matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
        """Singular values that are rounding of zero are no part of the mean, and their vectors, which are arbitrary, are left out."""
        u, s, vt = _svd(sum((w * m for w, m in zip(weights, matrices, strict=True)), np.zeros_like(matrices[0])))
        merged: Matrix = (u * (s.sum() / max(s.size, 1))) @ vt
        return merged


def _svd(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """U `[K, R]`, S `[R]` and V^T `[R, L]` of the singular values above rounding."""
    if not matrix.any():
        return matrix[:, :0], np.zeros(0), matrix[:0]
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = s > max(matrix.shape) * _EPSILON * s[0]
    return u[:, kept], s[kept], vt[kept]


def _each(ranks: Sequence[int], places: int) -> int:
    """The largest number with sum of min(rank, number) <= `places`; at least 1."""
    fitting = [n for n in range(1, max(ranks) + 1) if sum(min(rank, n) for rank in ranks) <= places]
    return max(fitting, default=1)


def _orthogonal(vectors: Matrix) -> Matrix:
    """The nearest matrix with orthonormal columns (Procrustes); with orthonormal rows if there are more columns than rows."""
    u, _, vt = np.linalg.svd(vectors, full_matrices=False)
    return u @ vt  # type: ignore[no-any-return]
