"""Sums and best low-rank approximations of products of factors, without forming a product.

O = rows of the delta, I = its columns, R = rank, K = kept rank. A pair is B `[O, R]` and A `[R, I]` float32; the delta is B A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Matrix = NDArray[np.float64]
Pair = tuple[Array, Array]
Store = Callable[[Array], Array]
"""Rounds float32 values to those of the type that stores them, for example bfloat16; returns float32."""


class LowRank(NamedTuple):
    """A low-rank approximation of one delta.

    The factors share the scale: B = U sqrt(S), A = sqrt(S) V^T.

    Attributes:
        left: B `[O, K]` float32.
        right: A `[K, I]` float32.
        error: ||delta - B A||_F of these factors as they are stored.
        norm: ||delta||_F.
        singular: the known singular values of the delta, largest first, float64: all that are not zero from factors; from
            a streamed matrix estimates of the largest ones, which are never above the true values but for rounding.
    """

    left: Array
    right: Array
    error: float
    norm: float
    singular: Matrix


def as_float32(values: Array) -> Array:
    """Keep float32 values as they are: the `Store` of float32."""
    return values


def stacked(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Write the sum of `weight * B A` as one product, by concatenation.

    Args:
        pairs: at least one, all of the same O and I.
        weights: one for each pair; multiplied into B.

    Returns:
        B `[O, sum of R]`, A `[sum of R, I]`.
    """
    left = np.concatenate([b * np.float32(w) for (b, _), w in zip(pairs, weights, strict=True)], 1)
    return left, np.concatenate([a for _, a in pairs])


def padded(pair: Pair, rank: int) -> Pair:
    """Extend the factors to `rank` by columns and rows of zeros, which leave the product as it is."""
    left, right = pair
    more = rank - left.shape[1]
    return np.pad(left, ((0, 0), (0, more))), np.pad(right, ((0, more), (0, 0)))


def truncate(
    left: Array, right: Array, rank: int | None, energy: float | None = None, store: Store = as_float32
) -> LowRank:
    """Return the best approximation of the product `left @ right` of at most a given rank.

    QR decompositions of both factors leave an R x R core, whose singular values are those of the product; all in float64.

    Args:
        left: `[O, R]`, finite.
        right: `[R, I]`, finite.
        rank: the largest rank to keep; None for no limit.
        energy: keep no more than `rank_for` needs; None keeps all up to `rank`.
        store: rounds the factors to the type they are stored in.

    Returns:
        Factors of rank at most `rank`, and less where fewer singular values are above rounding noise.
    """
    q_left, r_left = np.linalg.qr(left.astype(np.float64))
    q_right, r_right = np.linalg.qr(right.T.astype(np.float64))
    return truncate_between(q_left, r_left @ r_right.T, q_right.T, rank, energy, store)


def truncate_between(
    left: Matrix,
    core: Matrix,
    right: Matrix | None,
    rank: int | None,
    energy: float | None = None,
    store: Store = as_float32,
) -> LowRank:
    """Return the best approximation of `left @ core @ right` of at most a given rank, from the decomposition of the core.

    Args:
        left: `[O, K]` float64, orthonormal columns.
        core: `[K, L]` float64.
        right: `[L, I]` float64, orthonormal rows; None for the identity.
        rank, energy, store: as in `truncate`.
    """
    u, s, vt = np.linalg.svd(core, full_matrices=False)
    columns = core.shape[1] if right is None else right.shape[1]
    s = s[s > max(len(left), columns) * np.finfo(np.float64).eps * s[:1].sum()]
    norm = _norm(s)
    kept = _kept(s, norm, rank, energy)
    root = np.sqrt(s[:kept])
    inner = root[:, None] * vt[:kept]
    outer = inner if right is None else inner @ right
    return balanced(left @ (u[:, :kept] * root), outer, s, norm, _norm(s[kept:]), store)


def balanced(
    left: Matrix, right: Matrix, singular: Matrix, norm: float, error: float, store: Store = as_float32
) -> LowRank:
    """Round exact factors to the type they are stored in, and add the effect of the rounding to their error.

    Args:
        left, right: B `[O, K]` and A `[K, I]` float64.
        singular, norm: see `LowRank`.
        error: the error of the exact factors.
        store: rounds the factors.
    """
    b, a = store(left.astype(np.float32)), store(right.astype(np.float32))
    # B A - B' A' = (B - B') A + B' (A - A'). The part of the delta that the factors leave out is orthogonal to it, but for
    # terms of second order.
    lost = _product_norm(np.concatenate([left - b, b], 1), np.concatenate([right, right - a]))
    return LowRank(b, a, float(np.hypot(error, lost)), norm, singular)


def rank_for(singular: Matrix, norm: float, energy: float) -> int:
    """Return the smallest R with s_1^2 + ... + s_R^2 >= energy * norm^2.

    Args:
        singular: singular values, largest first.
        norm: Frobenius norm of the delta.
        energy: in (0, 1]. A relative error of e needs 1 - e^2.

    Returns:
        At least 1 unless the norm is zero; the number of singular values if all of them do not reach `energy`.
    """
    reached = np.cumsum(np.square(singular))
    # The tolerance is the rounding of the sums: energy 1 asks for all that is above it.
    return min(int(np.searchsorted(reached, energy * norm**2 * (1 - 1e-12))) + 1, len(singular)) if norm else 0


def _kept(singular: Matrix, norm: float, rank: int | None, energy: float | None) -> int:
    most = len(singular) if rank is None else min(rank, len(singular))
    return most if energy is None else min(most, rank_for(singular, norm, energy))


def _norm(values: Any) -> float:
    return float(np.linalg.norm(values))


def _product_norm(left: Matrix, right: Matrix) -> float:
    """||left @ right||_F from the Gram matrices, to eight digits of the norms of the factors."""
    return float(np.sqrt(max(0.0, ((left.T @ left) * (right @ right.T)).sum())))
