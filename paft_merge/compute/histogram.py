"""L1 norms from a histogram of magnitudes, without rounding errors."""

from __future__ import annotations

import numpy as np

from paft_merge.compute.blocks import Counts, Sums
from paft_merge.compute.kernels import BINS


def l1_of_bins(counts: Counts, lows: Counts) -> Sums:
    """The L1 norm of each bin of a histogram with `lows`: exact integers, rounded once to float64.

    Every magnitude of bin `b` is `(lead(b) + low) * 2**exponent(b)`, so their sum needs the count and the sum of lows only.
    """
    bins = np.arange(BINS, dtype=np.int64)
    exponent, high = bins >> 7, (bins & 0x7F) << 16
    lead = np.where(exponent > 0, high | 0x800000, high)
    mantissas = counts * lead + lows
    norms: Sums = np.ldexp(mantissas.astype(np.float64), np.maximum(exponent, 1).astype(np.int32) - 150)
    return norms
