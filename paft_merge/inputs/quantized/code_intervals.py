"""The values that a quantised weight rounds to the codes it has: a change within these intervals is lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
OfCodes = Callable[[Values], Values]
"""Computes a table of codes from the table of their values."""


def as_values(table: Values) -> Values:
    """The value of each code: the table itself."""
    return table


def low_end(table: Values) -> Values:
    """The smallest value that is rounded to each code of a table, with the scale 1."""
    return _ends(table.tobytes())[0].reshape(table.shape)


def high_end(table: Values) -> Values:
    """The largest value that is rounded to each code of a table, with the scale 1."""
    return _ends(table.tobytes())[1].reshape(table.shape)


def unmoved(values: Values, low: Values, high: Values) -> int:
    """Count the values that are rounded to the codes that an entry has.

    Args:
        values: `[E]`.
        low, high: `[E]`, the ends of the interval of each code times its scale, which may be negative. Equal ends belong
            to a scale of zero, which no value leaves.
    """
    below, above = (values < low) & (values < high), (values > low) & (values > high)
    return int(values.size - np.count_nonzero((below | above) & (low != high)))


@lru_cache(64)
def _ends(table: bytes) -> tuple[Values, Values]:
    """The ends of all intervals. Values halfway between two codes are rounded to the even one, counted from zero."""
    held = np.frombuffer(table, np.float32)
    levels = np.unique(held[np.isfinite(held)])
    middles = (levels[1:] + levels[:-1]) / np.float32(2)
    odd, most = (np.arange(levels.size) - np.searchsorted(levels, 0)) % 2 == 1, np.float32(np.inf)
    low = np.append(-most, np.where(odd[1:], np.nextafter(middles, most), middles))
    high = np.append(np.where(odd[:-1], np.nextafter(middles, -most), middles), most)
    at = np.searchsorted(levels, held).clip(max=levels.size - 1)
    none = np.float32(np.nan)
    return np.where(np.isfinite(held), low[at], none), np.where(np.isfinite(held), high[at], none)
