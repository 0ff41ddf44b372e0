"""SplitMix64, the counter-based generator of all random drops and of stochastic rounding (Steele, Lea, Flood 2014).

`numbers` is the reference. The compiled kernels and the torch operations repeat its steps on their own types, with these constants.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
"""Increment of the counter: 2**64 divided by the golden ratio, made odd."""

MIX1, MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Multipliers of the two mixing steps (Stafford's variant 13)."""


def numbers(key: int, index: int, count: int) -> NDArray[np.uint64]:
    """`[count]` uint64: the numbers `index`, `index + 1`, ... of the stream that starts at `key`."""
    z = np.arange(index + 1, index + count + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX2)
    return z ^ (z >> np.uint64(31))
