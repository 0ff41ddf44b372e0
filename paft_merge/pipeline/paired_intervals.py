"""95 % intervals of evaluations and of their differences, paired over items and seeds.

B = draws, N = items (rows of an evaluation), S = seeds.

Items are resampled (bootstrap). All models of an evaluation get the same drawn items in a draw, in every seed, so that a
difference is one of pairs. Seeds are few, and resampling two or three of them would call every second or fourth difference
of seeds alone significant; so each draw adds Student's t with S - 1 degrees of freedom times the standard error over
seeds. Resampling of few items is widened in the same way, by t of N - 1 degrees of freedom over that of a normal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95

Floats: TypeAlias = NDArray[np.float64]
_BLOCK = 2_000_000
"""Counts of items that are held at a time."""


@dataclass(frozen=True)
class Sample:
    """One evaluation of one model at one seed."""

    value: float
    stderr: float | None = None
    """Standard error over items, used where there are no values by item."""
    rows: tuple[float, ...] = ()
    """Values by item; of a perplexity, mean losses in nats."""
    tokens: tuple[int, ...] = ()
    """Of a perplexity, the weights of `rows`."""
    perplexity: bool = False

    @property
    def resampled(self) -> bool:
        """Whether there are items to resample: of a single one nothing is known about others."""
        return len(self.rows) > 1


@dataclass(frozen=True)
class Interval:
    """A difference (or a value), and the interval that covers it."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 above zero, -1 below zero, 0 if the interval contains zero."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def draws(samples: Sequence[Sample]) -> Floats:
    """The value of every sample in every draw.

    Args:
        samples: evaluations on the same items; those with another number of items are drawn by themselves.

    Returns:
        `[B, len(samples)]`. A sample without values by item varies by its standard error, independently of the others.
    """
    found = np.empty((DRAWS, len(samples)))
    groups: dict[tuple[int, bool], list[int]] = {}
    for at, sample in enumerate(samples):
        if sample.resampled:
            groups.setdefault((len(sample.rows), sample.perplexity), []).append(at)
        else:
            noise = np.random.default_rng((1, at)).standard_normal(DRAWS)
            found[:, at] = sample.value + (sample.stderr or 0.0) * noise
    for (items, perplexity), columns in groups.items():
        mine = [samples[at] for at in columns]
        rows = np.array([sample.rows for sample in mine]).T
        weights = np.array([sample.tokens or [1] * items for sample in mine], dtype=float).T
        whole = _value(np.ones((1, items)), rows, weights, perplexity)
        drawn = np.concatenate([_value(counts, rows, weights, perplexity) for counts in _counts(items)])
        # A value is the sample's own, also where an older run kept no weights.
        found[:, columns] = np.array([sample.value for sample in mine]) + _widening(items) * (drawn - whole)
    return found


def _value(counts: Floats, rows: Floats, weights: Floats, perplexity: bool) -> Floats:
    """Weighted means of drawn items `[draws, samples]`, of a perplexity their exponentials, from counts `[draws, N]`."""
    means = counts @ (rows * weights) / (counts @ weights)
    return np.exp(np.minimum(means, 700.0)) if perplexity else means


def _counts(items: int) -> Iterator[Floats]:
    """Yield how often each item is drawn, `[draws, N]`, the same for every call."""
    rng, left = np.random.default_rng((0, items)), DRAWS
    while left:
        now = min(left, max(1, _BLOCK // items))
        drawn = rng.integers(items, size=(now, items)) + items * np.arange(now)[:, None]
        yield np.bincount(drawn.ravel(), minlength=now * items).reshape(now, items).astype(float)
        left -= now


def _widening(count: int) -> float:
    """How much wider than resampling `count` items an interval by Student's t is."""
    return float(_t(count - 1, (1 + LEVEL) / 2) / _t(math.inf, (1 + LEVEL) / 2)) * math.sqrt(count / (count - 1))


def _t(freedom: float, share: float | Floats) -> Floats:
    from scipy.special import ndtri, stdtrit

    return np.asarray(ndtri(share) if math.isinf(freedom) else stdtrit(freedom, share))


@cache
def _t_draws(freedom: int) -> Floats:
    """Quantiles of Student's t, as many as draws, in an order of their own."""
    return np.random.default_rng((2, freedom)).permutation(_t(freedom, (np.arange(DRAWS) + 0.5) / DRAWS))


def interval(values: Sequence[float], drawn: Floats) -> Interval:
    """The interval of a mean over seeds.

    Args:
        values: one for each seed.
        drawn: `[B, S]`, the draws of each seed.
    """
    means, seeds = drawn.mean(axis=1), len(values)
    if seeds > 1:
        means = means + _t_draws(seeds - 1) * float(np.std(values, ddof=1)) / math.sqrt(seeds)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.mean(values)), float(low), float(high))


def mcnemar(one: Sequence[float], other: Sequence[float]) -> float | None:
    """The p-value of McNemar's exact test, two-sided: whether two models are right on different numbers of items.

    Args:
        one: 0 or 1 by item.
        other: 0 or 1 by item, of the other model.

    Returns:
        None if the items are not the same number, or not all 0 or 1.
    """
    from scipy.special import bdtr

    if len(one) != len(other) or not one or not {*one, *other} <= {0.0, 1.0}:
        return None
    only_one = sum(a > b for a, b in zip(one, other, strict=True))
    only_other = sum(b > a for a, b in zip(one, other, strict=True))
    return min(1.0, 2 * float(bdtr(min(only_one, only_other), only_one + only_other, 0.5)))
