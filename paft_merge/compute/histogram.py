"""Magnitudes as bits and as values, and norms from a histogram of them."""

from __future__ import annotations

import math

import numpy as np

from paft_merge.compute.blocks import Counts, Sums
from paft_merge.compute.kernels import BINS, MIDDLE


def bits_of(value: float) -> int:
    """The float32 bits of `value`."""
    return int(np.float32(value).view(np.uint32))


def value_of(bits: int) -> float:
    """The value of float32 bits."""
    return float(np.uint32(bits).view(np.float32))


def l1_of_bins(counts: Counts, lows: Counts) -> Sums:
    """The L1 norm of each bin, computed in exact integers and rounded once to float64.

    Every magnitude of bin `b` is `(lead(b) + low) * 2**exponent(b)`, so the count and the sum of the lower bits suffice.

    Args:
        counts: `[BINS]`, from `Ops.histogram`.
        lows: `[BINS]`, the sums of the lower 16 bits.
    """
    bins = np.arange(BINS, dtype=np.int64)
    exponent, high = bins >> 7, (bins & 0x7F) << 16
    lead = np.where(exponent > 0, high | 0x800000, high)
    mantissas = counts * lead + lows
    norms: Sums = np.ldexp(mantissas.astype(np.float64), np.maximum(exponent, 1).astype(np.int32) - 150)
    return norms


def squares_of_bins(counts: Counts, sums: Counts, less: float = 0.0) -> Sums:
    """The sum of the squares of the magnitudes of each bin, in float64, from exact integers.

    Args:
        counts: `[BINS]`, from `Ops.histogram`.
        sums: `[2 * BINS]`, its sums of the lower 16 bits and of their squared distances from `MIDDLE`.
        less: taken off each magnitude before it is squared.
    """
    bins = np.arange(BINS, dtype=np.int64)
    exponent, high = np.maximum(bins >> 7, 1), (bins & 0x7F) << 16
    unit = np.ldexp(1.0, exponent.astype(np.int32) - 150)
    centre = np.where(bins >> 7 > 0, high | 0x800000, high) + MIDDLE - less / unit
    apart, squared = sums[:BINS] - MIDDLE * counts, sums[BINS:]
    squares: Sums = (centre * centre * counts + 2 * centre * apart + squared) * unit * unit
    return np.where(counts > 0, squares, 0.0)


def exact_sum(norms: Sums) -> float:
    """The sum of norms of bins, most of which are zero, rounded once to float64."""
    return math.fsum(norms[norms != 0.0].tolist())
