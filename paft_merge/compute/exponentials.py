"""The exponential function on [0, 1] by a polynomial, so that it has the same bits on every processor and device.

`exponential` is the reference. The compiled kernels and the torch operations repeat its steps on their own types.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

CENTRE = 0.5
COEFFICIENTS = tuple(1 / math.factorial(k) for k in range(13, -1, -1))
"""Of Taylor's polynomial around `CENTRE`, the highest power first."""


def exponential(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(value - `CENTRE`) of values in [0, 1], with a relative error of less than 2e-15."""
    found = np.full_like(values, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        found = found * (values - CENTRE) + coefficient
    return found
