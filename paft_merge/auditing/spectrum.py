"""What the factors of a delta tell without the delta: singular values, subspaces, inner products, idle components.

B `[O, R]` (scale included), A `[R, I]`, D = B A. With B = Q_B R_B and A^T = Q_A R_A, the singular values of D are those of
the R x R core R_B R_A^T. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paft_merge.auditing.metrics import UNDEFINED

IDLE = 1e-6
"""A row or component whose norm is at most this share of the largest counts as zero: float32 cannot tell it from one."""


_EPSILON = 1.2e-7
"""Float32's: factors are stored in it at best."""


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
        """exp of the entropy of the singular values over their sum (Roy and Vetterli 2007)."""
        total = self.nuclear
        if not total:
            return UNDEFINED
        shares = [v / total for v in self.values if v > 0]
        return math.exp(-math.fsum(p * math.log(p) for p in shares))

    @property
    def nuclear(self) -> float:
        """Sum of the singular values."""
        return math.fsum(self.values)

    def to_json(self) -> dict[str, Any]:
        """As the report's JSON has it."""
        return {"stable_rank": self.stable_rank, "effective_rank": self.effective_rank, "values": list(self.values)}


@dataclass(frozen=True)
class FactorCounts:
    """Where L1 on the factors acts: entries of A and B, rows of B, components b_j a_j. Counts add up over tensors."""

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
        """The counts of everything in `parts`."""
        names = ("rows", "zero_rows", "components", "zero_components", "elements", "zero_elements")
        return cls(**{name: sum(getattr(p, name) for p in parts) for name in names})

    def to_json(self) -> dict[str, int]:
        """As the report's JSON has it."""
        return dict(vars(self))


@dataclass(frozen=True)
class Factored:
    """One tensor's delta in factors, decomposed: the singular values, and orthonormal bases of its two subspaces."""

    b_OR: Tensor
    a_RI: Tensor
    left_OK: Tensor
    """Left singular vectors of the K singular values that are not rounding noise."""
    right_IK: Tensor
    spectrum: Spectrum
    counts: FactorCounts

    @classmethod
    def of(cls, b: NDArray[np.float32], a: NDArray[np.float32]) -> Factored:
        """Decompose B `[O, R]` and A `[R, I]`."""
        b_OR, a_RI = torch.from_numpy(b).double(), torch.from_numpy(a).double()
        q_b, r_b = torch.linalg.qr(b_OR)
        q_a, r_a = torch.linalg.qr(a_RI.T)
        u, values, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        kept = int((values > max(b_OR.shape[0], a_RI.shape[1]) * _EPSILON * values.max()).sum())
        left, right = q_b @ u[:, :kept], q_a @ vt[:kept].T
        return cls(b_OR, a_RI, left, right, Spectrum(tuple(values.tolist())), _counts(b_OR, a_RI))

    def dot(self, other: Factored) -> float:
        """<D1, D2> = tr((B1^T B2)(A2 A1^T)), exact at R x R cost."""
        return float(((self.b_OR.T @ other.b_OR) * (self.a_RI @ other.a_RI.T)).sum())

    def overlap(self, other: Factored) -> tuple[float, float]:
        """||U1^T U2||_F^2 / min(rank 1, rank 2) of the left and of the right subspaces, in [0, 1]."""
        return _overlap(self.left_OK, other.left_OK), _overlap(self.right_IK, other.right_IK)


def _overlap(one: Tensor, other: Tensor) -> float:
    least = min(one.shape[1], other.shape[1])
    return float((one.T @ other).square().sum() / least) if least else UNDEFINED


def _counts(b_OR: Tensor, a_RI: Tensor) -> FactorCounts:
    rows, elements = torch.linalg.vector_norm(b_OR, dim=1), b_OR.numel() + a_RI.numel()
    components = torch.linalg.vector_norm(b_OR, dim=0) * torch.linalg.vector_norm(a_RI, dim=1)
    filled = int(torch.count_nonzero(b_OR)) + int(torch.count_nonzero(a_RI))
    return FactorCounts(len(rows), _idle(rows), len(components), _idle(components), elements, elements - filled)


def _idle(norms: Tensor) -> int:
    return int((norms <= IDLE * norms.max()).sum())
