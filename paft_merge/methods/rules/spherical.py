"""Rules by angles and lengths: weighted sums, whose weights are functions of the sources' inner products.

So a tensor is read twice and never stored: once for its Gram matrix, once to be merged. The weights are computed in float64
from n x n numbers. If the vectors are rows or columns, each of them has a Gram matrix and weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute.blocks import Block, Outcome
from paft_merge.errors import MergeError
from paft_merge.methods.rules.rule import Combine, Rule, TensorPass, write_merged
from paft_merge.methods.rules.walks import BLEND, GRAM, MIXED, TALLIED, Walks

Matrix = NDArray[np.float64]
"""`[..., n, n]`: inner products of all sources of a rule; a source without a delta has zeros."""
Weights = NDArray[np.float64]
"""`[..., n]`: one weight a source."""

COLUMN_TILES = 32
"""Tiles whose sums over columns are in memory at a time."""


@dataclass(frozen=True)
class Slerp(Rule):
    """Spherical interpolation from the first value to the second by `t`; each tensor is one vector.

    Nearly parallel or opposite vectors (|cos| > 0.9995) are interpolated linearly, and a norm under 1e-8 counts as one, as in
    mergekit.
    """

    t: float

    wants: ClassVar[Literal["values"]] = "values"

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """One walk measures the Gram matrix."""
        return Walks(BLEND, (GRAM,))

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Measure the Gram matrix."""
        return _by_tensor(walk, self._weights, deltas, 2)

    def _weights(self, dots: Matrix) -> Weights:
        lengths = np.sqrt(np.diagonal(dots))
        lengths = np.where(lengths > 1e-8, lengths, 1.0)
        cosine = min(max(dots[0, 1] / (lengths[0] * lengths[1]), -1.0), 1.0)
        if abs(cosine) > 0.9995:
            return np.array([1 - self.t, self.t])
        angle = math.acos(cosine)
        return np.sin(np.array([1 - self.t, self.t]) * angle) / math.sin(angle)


@dataclass(frozen=True)
class NuSlerp(Rule):
    """Spherical interpolation from one source to another: of their deltas if there is a base, else of their values.

    The weights are those of an interpolation on the unit sphere, applied to the sources with their lengths. Vectors whose
    squared cosine is one in float32 are interpolated linearly.
    """

    t: float
    of: Literal["tensor", "rows", "columns"] = "tensor"
    """The vectors: the whole tensor, or its slices along the last dimension (rows) or the first one (columns)."""

    wants: ClassVar[Literal["offsets"]] = "offsets"

    def row(self, shape: tuple[int, ...]) -> int:
        """Blocks must hold whole rows, or whole lines of columns."""
        if self.of == "tensor" or (self.of == "columns" and len(shape) < 2):
            return 1
        return max(math.prod(shape[1:]) if self.of == "columns" else math.prod(shape[-1:]), 1)

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """Rows are measured in the walk that merges them."""
        if self.of == "tensor":
            return Walks(BLEND, (GRAM,))
        return Walks(MIXED, (GRAM,) if self.of == "columns" else (), made=1)

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Measure the Gram matrix of the tensor or of every column; blocks measure those of rows."""
        if self.of == "columns" and len(walk.shape) >= 2:
            return _by_column(walk, self._weights, deltas, self.row(walk.shape))
        if self.of == "tensor" or self.of == "columns":
            return _by_tensor(walk, self._weights, deltas, 2)
        return _by_row(walk, self._weights, deltas, 2, self.row(walk.shape))

    def _weights(self, dots: Matrix) -> Weights:
        lengths = np.maximum(np.sqrt(np.diagonal(dots, axis1=-2, axis2=-1)), 1e-7)
        cosine = np.clip(dots[..., 0, 1] / (lengths[..., 0] * lengths[..., 1]), -1, 1)
        # A cosine that is one in float32: the formula for the sphere would divide by nearly zero.
        colinear = 1 - np.square(cosine.astype(np.float32)) <= 1e-16
        angle = np.arccos(np.where(colinear, 0.0, cosine))[..., None]
        share = np.array([1 - self.t, self.t])
        return np.where(colinear[..., None], share, np.sin(share * angle) / np.sin(angle))


@dataclass(frozen=True)
class MultiSlerp(Rule):
    """Barycentric interpolation on a sphere: of deltas if there is a base, else of values.

    mergekit's formula goes to the tangent space at the weighted mean of the unit vectors and back. The weighted sum of the
    tangents at that mean is zero, so the result has the mean's direction and the weighted mean of the lengths. A single source
    is unchanged; two sources that cancel out are interpolated linearly.
    """

    weights: tuple[float, ...]
    eps: float

    wants: ClassVar[Literal["offsets"]] = "offsets"

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """One walk measures the Gram matrix."""
        return Walks(BLEND, (GRAM,))

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Measure the Gram matrix."""
        return _by_tensor(walk, self._weights, deltas, len(self.weights))

    def _weights(self, dots: Matrix) -> Weights:
        weights = np.array(self.weights)
        if len(weights) == 1:
            return np.ones(1)
        lengths = np.sqrt(np.diagonal(dots))
        shares = weights / (lengths + self.eps)
        mean = math.sqrt(max(float(shares @ dots @ shares), 0.0))
        if mean > 0 and mean >= self.eps:
            return shares * (float(lengths @ weights) / mean)
        if len(weights) == 2 or not lengths.any():
            return weights
        what = "the sources' directions cancel out under these weights, so they have no mean"
        raise MergeError.of("DEGENERATE", "multislerp", what, "use other weights")


@dataclass(frozen=True)
class Karcher(Rule):
    """The Karcher mean of the sources' directions, times the mean of their lengths; all sources have the same weight.

    Riemannian gradient descent on the unit sphere, in the coordinates of the sources: at most `max_iter` steps, until a step
    is shorter than `tol`. Sources shorter than `tol` have no direction, only a length.
    """

    sources: int
    max_iter: int
    tol: float

    wants: ClassVar[Literal["values"]] = "values"

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """One walk measures the Gram matrix."""
        return Walks(BLEND, (GRAM,))

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Measure the Gram matrix."""
        return _by_tensor(walk, self._weights, deltas, self.sources)

    def _weights(self, dots: Matrix) -> Weights:
        lengths = np.sqrt(np.diagonal(dots))
        valid = np.flatnonzero(lengths > self.tol)
        if self.sources == 1 or not valid.size:
            return np.ones(self.sources) if self.sources == 1 else np.zeros(self.sources)
        units = dots[np.ix_(valid, valid)] / np.outer(lengths[valid], lengths[valid])
        weights = np.zeros(self.sources)
        weights[valid] = self._mean(units) / lengths[valid] * lengths.mean()
        return weights

    def _mean(self, units: Matrix) -> Weights:
        """The mean direction, as coordinates of the unit vectors with the inner products `units`."""
        n = len(units)
        mean = np.full(n, 1 / n)
        length = _length(mean, units)
        mean = mean / length if length >= self.tol else np.eye(n)[0]
        for _ in range(self.max_iter):
            tangent = self._tangent(mean, units)
            step = _length(tangent, units)
            if step < self.tol:
                break
            mean = math.cos(step) * mean + math.sin(step) / step * tangent
            mean = mean / _length(mean, units)
        return mean

    def _tangent(self, mean: Weights, units: Matrix) -> Weights:
        """The mean of the sources' logarithms at `mean`."""
        cosines = np.clip(units @ mean, -1, 1)
        angles = np.arccos(cosines)
        # An opposite vector has no unique direction from the mean, so it does not contribute.
        pulls = np.where(
            (angles < self.tol) | (angles > math.pi - 1e-6), 0.0, angles / np.maximum(np.sin(angles), 1e-300)
        )
        return (pulls - float(pulls @ cosines) * mean) / len(units)


@dataclass(frozen=True)
class ModelStock(Rule):
    """The base plus `t` times the mean delta, with `t` from the angle between the deltas (arXiv:2403.19522, eq. 5).

    `t = n c / (1 + (n - 1) c)` for n deltas whose cosines have the mean `c`; the base is kept where this is undefined.
    """

    sources: int
    by_row: bool

    wants: ClassVar[Literal["deltas"]] = "deltas"

    def row(self, shape: tuple[int, ...]) -> int:
        """With `by_row`, blocks must hold whole rows."""
        return max(math.prod(shape[-1:]), 1) if self.by_row else 1

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """Rows are measured in the walk that merges them."""
        return Walks(MIXED, made=1) if self.by_row else Walks(TALLIED, (GRAM,))

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Measure the Gram matrix; with `by_row`, blocks measure it."""
        if self.by_row:
            return _by_row(walk, self._weights, deltas, self.sources, self.row(walk.shape))
        return _by_tensor(walk, self._weights, deltas, self.sources)

    def _weights(self, dots: Matrix) -> Weights:
        n = self.sources
        lengths = np.sqrt(np.diagonal(dots, axis1=-2, axis2=-1))
        products = np.maximum(lengths[..., :, None] * lengths[..., None, :], 1e-6)
        cosines = np.clip(dots / products, -1, 1)
        first, second = np.triu_indices(n, 1)
        cosine = cosines[..., first, second].mean(-1)
        divisor = 1 + (n - 1) * cosine
        singular = np.abs(divisor) < 1e-6
        t = np.where(singular, 0.0, n * cosine / np.where(singular, 1.0, divisor))
        return np.repeat(t[..., None] / n, n, axis=-1)


@dataclass(frozen=True)
class GeometricMedian(Rule):
    """The geometric median of the deltas: the point with the least weighted sum of distances to them.

    A delta is the median if the unit vectors from it to the others, times their weights, add up to a vector shorter than its own
    weight (Vardi and Zhang 2000). Otherwise the median is between the deltas, and Weiszfeld's iteration finds it; a step from a point
    that is a delta leaves this delta out. It begins at the weighted mean, which remains where it is one of several medians, as between two
    deltas of equal weight. Points are weights of the deltas that add up to one, and distances come from the Gram matrix.
    """

    shares: tuple[float, ...]
    """Weights of the sources, not negative, with the sum 1."""
    iterations: int
    epsilon: float
    factor: float
    """Multiplies the median (lambda)."""

    wants: ClassVar[Literal["deltas"]] = "deltas"

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """One walk measures the Gram matrix."""
        return Walks(TALLIED, (GRAM,))

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Measure the Gram matrix."""
        return _by_tensor(walk, self._weights, deltas, len(self.shares))

    def _weights(self, dots: Matrix) -> Weights:
        squares = np.diagonal(dots)
        sums = squares[:, None] + squares
        apart = sums - 2 * dots
        apart = np.where(apart > 1e-14 * sums, apart, 0.0)  # below that is rounding
        shares = np.array(self.shares)
        return self.factor * next(self._at_deltas(shares, apart), self._between(shares, apart))

    @staticmethod
    def _at_deltas(shares: Weights, apart: Matrix) -> Iterator[Weights]:
        """The deltas that are the median; several only if they are equal."""
        for i, squares in enumerate(apart):
            here = squares == 0
            pulls = np.where(here, 0.0, shares / np.sqrt(np.where(here, 1.0, squares)))
            pulls[i] = -pulls.sum()
            if _span(pulls, apart) < shares[here].sum() - 1e-9:
                yield np.eye(len(apart))[i]

    def _between(self, shares: Weights, apart: Matrix) -> Weights:
        """The median as weights of the deltas whose squared distances are `apart`."""
        point, least = shares, 1e-16 * float(apart.max(initial=0.0))
        for _ in range(self.iterations):
            squares = apart @ point - 0.5 * float(point @ apart @ point)
            here = squares <= least
            pulls = np.where(here, 0.0, shares / np.sqrt(np.where(here, 1.0, squares)))
            total, held = float(pulls.sum()), float(shares[here].sum())
            pull = _span(pulls - total * point, apart)
            if total == 0 or pull - held <= self.epsilon:
                break
            point = pulls / total
        return point


def _span(weights: Weights, apart: Matrix) -> float:
    """The length of a weighted sum of points with the squared distances `apart`; the weights add up to zero."""
    return math.sqrt(max(-0.5 * float(weights @ apart @ weights), 0.0))


def _length(vector: Weights, dots: Matrix) -> float:
    return math.sqrt(max(float(vector @ dots @ vector), 0.0))


def _gram(walk: TensorPass, sources: int) -> Matrix:
    """The Gram matrix of a whole tensor: the correctly rounded sum over its blocks, which does not depend on their order."""
    blocks = walk.each(walk.ops.gram)
    full = np.zeros((sources, sources))
    for i, one in enumerate(walk.active):
        for j, other in enumerate(walk.active):
            full[one, other] = math.fsum(block[i, j] for block in blocks)
    return full


def _full(walk: TensorPass, sources: int, dots: Matrix) -> Matrix:
    """Expand `[..., n, n]` of the active sources to all sources."""
    if len(walk.active) == sources:
        return dots
    full = np.zeros((*dots.shape[:-2], sources, sources))
    active = np.array(walk.active)
    full[..., active[:, None], active] = dots
    return full


def _weighed(weigh: Callable[[Matrix], Weights], dots: Matrix) -> Weights:
    """The weights for `dots`; NaN without a warning where a source is not finite, because the merge reports that."""
    with np.errstate(invalid="ignore"):
        return weigh(dots)


def _by_tensor(walk: TensorPass, weigh: Callable[[Matrix], Weights], deltas: bool, sources: int) -> Combine:
    """Write the weighted sum of the sources, on top of the base if they are deltas."""
    weights = _weighed(weigh, _gram(walk, sources))
    active = [float(weights[i]) for i in walk.active]

    def combine(block: Block, out: Any, key: int) -> Outcome:
        return walk.ops.blend(block, out, 1.0 if deltas else 0.0, active, key, deltas)

    return combine


def _by_row(walk: TensorPass, weigh: Callable[[Matrix], Weights], deltas: bool, sources: int, row: int) -> Combine:
    """Write every row with its own weights, which each block computes, as it holds whole rows."""

    def combine(block: Block, out: Any, key: int) -> Outcome:
        weights = _weighed(weigh, _full(walk, sources, walk.ops.gram_rows(block, row)))[:, list(walk.active)]
        merged = walk.ops.mix(block, weights.T, row, across=False)
        return write_merged(walk.ops, block, merged, out, key, deltas)

    return combine


def _by_column(walk: TensorPass, weigh: Callable[[Matrix], Weights], deltas: bool, row: int) -> Combine:
    """Write every column with its own weights; `row`: entries from one element of a column to the next."""
    dots = np.zeros((*[len(walk.active)] * 2, row))
    for first in range(0, walk.each.tiles, COLUMN_TILES):
        tiles = range(first, min(first + COLUMN_TILES, walk.each.tiles))
        for part in walk.each(lambda block: walk.ops.gram_columns(block, row), tiles=tiles):
            dots += part
    weights = _weighed(weigh, _full(walk, 2, np.moveaxis(dots, -1, 0)))[:, list(walk.active)].T

    def combine(block: Block, out: Any, key: int) -> Outcome:
        merged = walk.ops.mix(block, weights, row, across=True)
        return write_merged(walk.ops, block, merged, out, key, deltas)

    return combine
