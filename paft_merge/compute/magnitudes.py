"""Constants for the magnitude of a float32: bit masks, and the thresholds that every merge and audit counts.

The magnitude of a float32 is its bits without the sign; as integers, magnitudes sort as the absolute values do.
This module imports nothing, because the command line reads it before NumPy is imported.
"""

MAGNITUDE = 0x7FFFFFFF
"""Mask of the magnitude: every bit of a float32 except the sign."""

INFINITY = 0x7F800000
"""Magnitude of infinity. Finite magnitudes are smaller, and those of NaN are larger."""

EPSILON = 1e-5
"""Default threshold of sparsity: |delta| < EPSILON counts as zero (PAFT, arXiv:2406.17923, fig. 2; arXiv:2505.11711)."""

EPSILONS = (1e-6, EPSILON, 1e-4, 1e-3)
"""Thresholds that are always counted, compared in float32. Column names spell them `below_1e-06` and so on."""
