"""Randomised low-rank approximation of a dense matrix that is streamed (Halko, Martinsson, Tropp 2011, arXiv:0909.4061).

One pass over the rows of D `[O, I]` computes Y = D X and Z = D^T Y together, for X `[I, L]`. The left singular vectors U of Y span
the columns of D X, and U^T D follows from Z without another pass: Y = U S V^T gives U^T D = S^-1 V^T Z^T. Its right singular vectors
are the X of the next pass. So P power iterations take P + 1 passes: two passes span the columns of D D^T D X for a random X.

O = rows, I = columns, N = rows of one chunk, L = the rank and some columns more, C = carried columns, K = kept rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from threading import Lock
from typing import Any, Protocol, TypeVar

import numpy as np

from paft_merge.compute.splitmix64 import numbers
from paft_merge.lowrank.factors import Array, LowRank, Matrix, Store, as_float32, balanced, rank_for

T = TypeVar("T")

_STRONG = 2.5e-4
"""Square root of float32's machine epsilon: D^T D X does not resolve singular values below this share of the largest. Their left
singular vectors, which D X resolves, are carried over to the next pass as they are."""

_CANCELS = 0.05
"""Relative error below which the difference of squared norms is not exact to a thousandth in float32; a pass measures it then."""


class Rows(Protocol):
    """A dense matrix, read in passes."""

    @property
    def shape(self) -> tuple[int, int]:
        """O, I."""

    def each(self, work: Callable[[int, Array], T]) -> list[T]:
        """Make one pass over all rows, in chunks that depend on the shape alone.

        Args:
            work: called once for each chunk, from any thread and in any order, with the number of its first row and its
                rows `[N, I]` float32, finite. It does not keep or modify them.

        Returns:
            The results in the order of the rows.
        """


def approximate(
    rows: Rows,
    rank: int | None,
    *,
    energy: float | None = None,
    max_rank: int | None = None,
    oversample: int | None = None,
    power: int = 1,
    seed: int,
    store: Store = as_float32,
) -> LowRank:
    """Approximate a streamed matrix by factors of at most a given rank.

    The result does not depend on threads if BLAS runs on one core (`stats.spectrum.on_one_core`).

    Args:
        rows: the matrix D, finite.
        rank: the rank to keep; None finds it from `energy`.
        energy: keep no more than `rank_for` needs.
        max_rank: limit of the rank that `energy` finds; None for no limit.
        oversample: columns of X beyond the rank; None for as many as the rank, and at least 16. Two passes then give an error
            within 1 % of the smallest possible one for TIES of adapters, and for singular values that fall as 1/i or faster.
        power: power iterations, at least 1; `power + 1` passes over the matrix, and one more where the error is small.
        seed: of the random matrix.
        store: rounds the factors to the type they are stored in; the error is theirs.

    Returns:
        Factors of rank at most `rank`, and less where fewer singular values are above rounding noise.
    """
    full = min(rows.shape)
    most = min(full, max_rank or full) if rank is None else min(full, rank)
    width = most if rank is not None or energy is None else min(most, 64)
    while True:
        sketch = _Sketch.of(rows, width + (max(width, 16) if oversample is None else oversample), power, seed)
        kept = width if energy is None else rank_for(sketch.parts[1], sketch.norm, energy)
        if width == most or kept <= width:
            return sketch.truncated(rows, min(width, kept), store)
        width = min(most, 4 * width)


def measured_error(rows: Rows, left: Array, right: Array) -> float:
    """Compute ||D - left @ right||_F in one pass."""

    def work(first: int, chunk: Array) -> float:
        return _squares(chunk - left[first : first + len(chunk)] @ right)

    return float(np.sqrt(sum(rows.each(work))))


class _Sketch:
    """U U^T D after one pass, for the U that spans the columns of Y.

    Attributes:
        y: Y `[O, L]` float32.
        norm: ||D||_F.
        values, vectors: singular values of Y and its right singular vectors, as columns.
        b: U^T D `[L, I]` float64.
    """

    def __init__(self, rows: Rows, x: Array | None, carried: Array) -> None:
        """Make one pass with Y = [D X, carried], for X `[I, L - C]`, None for the identity, and carried `[O, C]`."""
        strong = rows.shape[1] if x is None else x.shape[1]
        self.y = np.concatenate([np.empty((rows.shape[0], strong), np.float32), carried], 1)
        total = _OrderedSum((rows.shape[1], self.y.shape[1]))

        def work(first: int, chunk: Array) -> float:
            part = self.y[first : first + len(chunk)]
            part[:, :strong] = chunk if x is None else chunk @ x
            if x is not None:
                total.add(first, len(chunk), chunk.T @ part)
            return _squares(chunk)

        self.norm = float(np.sqrt(sum(rows.each(work))))
        y = self.y.astype(np.float64)
        self.values, self.vectors = _right_singular(y.T @ y)
        vt = self.vectors.T
        self.b = self.values[:, None] * vt if x is None else vt / self.values[:, None] @ total.value.T

    @classmethod
    def of(cls, rows: Rows, width: int, power: int, seed: int) -> _Sketch:
        """Make `power + 1` passes of `width` columns; one pass if these are all columns."""
        height, columns = rows.shape
        nothing = np.empty((height, 0), np.float32)
        if width >= columns:
            return cls(rows, None, nothing)
        sketch = cls(rows, _random(columns, width, seed), nothing)
        for _ in range(power):
            strong = sketch.values > _STRONG * sketch.values[:1].sum()
            _, _, right = _decomposed(sketch.b[strong])
            carried = sketch.y @ sketch.vectors[:, ~strong]
            sketch = cls(rows, right.T.astype(np.float32, order="C"), carried.astype(np.float32))
        return sketch

    @cached_property
    def parts(self) -> tuple[Matrix, Matrix, Matrix]:
        """The singular value decomposition of U^T D: vectors as columns, values, vectors as rows."""
        return _decomposed(self.b)

    def truncated(self, rows: Rows, rank: int, store: Store) -> LowRank:
        """Return factors of at most `rank`, with their error."""
        w, singular, vt = self.parts
        rank = min(rank, len(singular))
        root = np.sqrt(singular[:rank])
        left, right = self.y @ (self.vectors / self.values @ w[:, :rank] * root), root[:, None] * vt[:rank]
        lost = self.norm**2 - float(np.square(singular[:rank]).sum())
        if lost >= _CANCELS**2 * self.norm**2:
            return balanced(left, right, singular, self.norm, float(np.sqrt(lost)), store)
        result = balanced(left, right, singular, self.norm, 0.0, store)
        return result._replace(error=measured_error(rows, result.left, result.right))


class _OrderedSum:
    """A float64 sum of matrices that arrive in any order and are added in the order of their rows."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.value = np.zeros(shape)
        self._next, self._early, self._lock = 0, dict[int, tuple[int, Any]](), Lock()

    def add(self, first: int, count: int, part: Array) -> None:
        """Add the part of rows `[first, first + count)` as soon as those of all earlier rows are added."""
        with self._lock:
            self._early[first] = count, part
            while self._next in self._early:
                count, part = self._early.pop(self._next)
                self.value += part
                self._next += count


def _right_singular(gram: Matrix) -> tuple[Matrix, Matrix]:
    """Return the singular values of M, largest first, and its right singular vectors as columns, from M^T M.

    Values below 1e-7 of the largest, the rounding noise of float32, are left out with their vectors.
    """
    squares, vectors = np.linalg.eigh(gram)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    kept = int((values > 1e-7 * values[:1].sum()).sum())
    return values[:kept], vectors[:, ::-1][:, :kept]


def _decomposed(b: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Return the singular value decomposition of a wide matrix: U, S, V^T."""
    s, u = _right_singular(b @ b.T)
    return u, s, (u / s).T @ b


def _squares(values: Array) -> float:
    return float(np.einsum("ni,ni->n", values, values).sum(dtype=np.float64))


def _random(rows: int, columns: int, seed: int) -> Array:
    """`[rows, columns]` float32, each entry a centred sum of four 16-bit numbers: nearly normal, and the same on every platform."""
    words = numbers(seed % 2**64, 0, rows * columns).view(np.uint16).reshape(rows, columns, 4)
    values: Array = ((words.sum(2, dtype=np.int64) - 2 * 65535) / 65536).astype(np.float32)
    return values
