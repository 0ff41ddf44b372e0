"""Bootstrap intervals of a mean over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

DRAWS = 10_000
LEAST = 5
"""Fewer seeds have no interval: a bootstrap of two or three values is far too narrow."""

Verdict = Literal["holds", "the opposite holds", "no difference is shown"]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % bootstrap interval, whose ends are infinite for fewer than `LEAST` seeds."""

    mean: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there are enough seeds."""
        return math.isfinite(self.low)

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2

    def verdict(self, better: str) -> Verdict:
        """Whether this is the interval of a difference on the better side of zero, on the other side, or around zero."""
        if self.low <= 0 <= self.high:
            return "no difference is shown"
        return "holds" if (self.low > 0) == (better != "lower") else "the opposite holds"


def interval_of(values: Sequence[float]) -> Interval:
    """The mean of a value per seed and the percentile bootstrap interval of that mean, over seeds.

    For a paired comparison, the values are the differences within a seed. The draws are fixed, so that equal values give an
    equal interval.
    """
    given = np.asarray(values, dtype=np.float64)
    if len(given) < LEAST:
        return Interval(float(given.mean()), -math.inf, math.inf)
    low, high = np.quantile(_shares(len(given)) @ given, (0.025, 0.975))
    return Interval(float(given.mean()), float(low), float(high))


@cache
def _shares(count: int) -> npt.NDArray[np.float64]:
    """The share of each value in each bootstrap sample, `[DRAWS, count]`."""
    chosen = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    return np.array([np.bincount(row, minlength=count) for row in chosen], dtype=np.float64) / count
