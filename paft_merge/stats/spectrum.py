"""Singular values, subspaces, inner products and idle components of a delta, from its factors alone.

B `[O, R]` (scale included), A `[R, I]`, D = B A. The R x R matrices B^T B and A A^T suffice, and B1^T B2 and A1 A2^T for two deltas:
with B = Q S E^T, where E S^2 E^T = B^T B and Q has orthonormal columns, D D^T = Q (S E^T A A^T E S) Q^T. The core
in parentheses has the squared singular values of D, and its eigenvectors W give the left singular vectors Q W.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paft_merge.stats.metrics import UNDEFINED

Matrix = NDArray[np.float64]

IDLE = 1e-6
"""A row or component whose norm is at most this share of the largest counts as zero, because float32 cannot resolve it."""

_EPSILON = 1.2e-7
"""Machine epsilon of float32, the most precise type of stored factors."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one tensor's delta, largest first."""

    values: tuple[float, ...]

    @property
    def stable_rank(self) -> float:
        """||D||_F^2 / ||D||_2^2."""
        return math.fsum(v * v for v in self.values) / self.values[0] ** 2 if self.values[0] else UNDEFINED

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007)."""
        total = math.fsum(self.values)
        if not total:
            return UNDEFINED
        shares = [v / total for v in self.values if v > 0]
        return math.exp(-math.fsum(p * math.log(p) for p in shares))

    def to_json(self) -> dict[str, Any]:
        """The fields by their names in the report's JSON."""
        return {"stable_rank": self.stable_rank, "effective_rank": self.effective_rank, "values": list(self.values)}


@dataclass(frozen=True)
class FactorCounts:
    """Zeros that an L1 penalty on the factors makes: entries of A and B, rows of B, components b_j a_j. Counts add up over tensors."""

    rows: int
    zero_rows: int
    """Rows of B whose norm is at most `IDLE` of the largest."""
    components: int
    zero_components: int
    """Components with ||b_j|| ||a_j|| at most `IDLE` of the largest."""
    elements: int
    zero_elements: int
    """Entries of A and B that are exactly zero."""

    @classmethod
    def total(cls, parts: Sequence[FactorCounts]) -> FactorCounts:
        """The sum of `parts`."""
        return cls(**{name: sum(getattr(p, name) for p in parts) for name in cls.__dataclass_fields__})

    def to_json(self) -> dict[str, int]:
        """The fields by their names in the report's JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Factored:
    """The singular value decomposition of one tensor's delta, as its factors and matrices of order R."""

    b_OR: Any
    a_IR: Any
    """A, transposed."""
    left_RK: Matrix
    """`b_OR @ left_RK` are the left singular vectors of the K singular values above rounding noise."""
    right_RK: Matrix
    """`a_IR @ right_RK` are the right singular vectors."""
    spectrum: Spectrum
    counts: FactorCounts

    @classmethod
    def of(cls, b: NDArray[np.float32], a: NDArray[np.float32], dtype: type[Any] = np.float64) -> Factored:
        """Decompose B `[O, R]` and A `[R, I]`, both finite.

        Args:
            b, a: the factors, float32.
            dtype: type of the arithmetic. float64 gives every singular value. float32 takes half the time, and gives those above
                1e-3 of the largest, and inner products to six digits.
        """
        b_OR, a_IR = b.astype(dtype, order="C", copy=False), a.astype(dtype, order="C", copy=False).T
        bb_RR, aa_RR = _crossed(b_OR, b_OR), _crossed(a_IR, a_IR)
        squares, e_RR = np.linalg.eigh(bb_RR)
        s_R = np.sqrt(np.where(squares > 64 * np.finfo(dtype).eps * squares[-1], squares, 0.0))
        es_RR = e_RR * s_R
        core, w_RR = np.linalg.eigh(es_RR.T @ aa_RR @ es_RR)
        values, w_RR = np.sqrt(np.maximum(core[::-1], 0.0)), w_RR[:, ::-1]
        kept = int((values > max(len(b_OR), len(a_IR)) * _EPSILON * values[0]).sum())
        inverse = np.divide(1.0, s_R, out=np.zeros_like(s_R), where=s_R > 0)
        left, right = (e_RR * inverse) @ w_RR[:, :kept], es_RR @ w_RR[:, :kept] / values[:kept]
        counts = _counts(b_OR, a, np.sqrt(np.diagonal(bb_RR) * np.diagonal(aa_RR)))
        return cls(b_OR, a_IR, left, right, Spectrum(tuple(values.tolist())), counts)

    def relate(self, other: Factored) -> tuple[float, tuple[float, float]]:
        """Inner product with another delta, and the overlap of the subspaces.

        Returns:
            <D1, D2> = tr((B1^T B2)(A2 A1^T)), exact; and ||U1^T U2||_F^2 / min(rank 1, rank 2) in [0, 1] of the left
            and of the right singular vectors.
        """
        bb, aa = _crossed(self.b_OR, other.b_OR), _crossed(self.a_IR, other.a_IR)
        least = min(self.left_RK.shape[1], other.left_RK.shape[1])
        sides = (self.left_RK, bb, other.left_RK), (self.right_RK, aa, other.right_RK)
        left, right = (float(np.square(u.T @ m @ v).sum()) / least if least else UNDEFINED for u, m, v in sides)
        return float((bb * aa).sum()), (left, right)


@contextmanager
def on_one_core() -> Iterator[None]:
    """Limit BLAS to the calling core: on a busy machine its threads cost ten times the work of R x R matrices."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


def _crossed(left: Any, right: Any) -> Matrix:
    """Inner products of the columns of two matrices, float64."""
    return (left.T @ right).astype(np.float64)  # type: ignore[no-any-return]


def _counts(b: Any, a: Any, components: Matrix) -> FactorCounts:
    rows, elements = np.sqrt(np.einsum("or,or->o", b, b)), b.size + a.size
    # Four times as fast as np.count_nonzero of floats.
    filled = int(np.count_nonzero(b != 0)) + int(np.count_nonzero(a != 0))
    return FactorCounts(len(rows), _idle(rows), len(components), _idle(components), elements, elements - filled)


def _idle(norms: Matrix) -> int:
    return int((norms <= IDLE * norms.max()).sum())
