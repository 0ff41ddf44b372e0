"""The threshold of the largest entries, exactly, from a histogram that is known already: one walk that gathers one bin.

`sparsify.trim_survivals` finds the same without a histogram; here the first walk of an audit has left one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from paft_merge.auditing.metrics import Histogram
from paft_merge.blocks import CpuOps, Each, Survival
from paft_merge.sparsify import kept_count


def largest_survive(histograms: Sequence[Histogram], numel: int, density: float, each: Each) -> list[Survival]:
    """Keep the `kept_count(numel, density)` largest entries of every source; ties keep the lowest flat indices.

    Args:
        histograms: one a source, of all `numel` entries.
        numel: entries of the tensor.
        density: share that is kept, in (0, 1].
        each: walks the blocks.
    """
    rank = kept_count(numel, density)
    if rank >= numel:
        return [Survival()] * len(histograms)
    ops, brackets = CpuOps(), [_bracket(h, rank) for h in histograms]
    low, width, above = zip(*brackets, strict=True)
    tiles = each(lambda block: ops.collect(block, low, width)[1])
    return [_survival([t[i] for t in tiles], rank - above[i], i, numel, each) for i in range(len(histograms))]


def _bracket(histogram: Histogram, rank: int) -> tuple[int, int, int]:
    """Lowest bits, number of bits, and entries above, of the bin with the `rank`-th largest; without the zero."""
    held = np.cumsum(histogram.count[::-1])
    at = int(np.searchsorted(held, rank))
    index, above = int(histogram.index[::-1][at]), int(held[at - 1]) if at else 0
    return (index << 16, 1 << 16, above) if index else (1, (1 << 16) - 1, above)


def _survival(tiles: Sequence[Any], rank: int, source: int, numel: int, each: Each) -> Survival:
    """From the magnitudes of a bracket, tile by tile, of which the `rank` largest survive."""
    bits = np.concatenate(tiles)
    if rank > bits.size:
        return Survival()  # the rest are zeros
    place = bits.size - rank
    threshold = int(np.partition(bits, place)[place])
    kept = rank - int((bits > threshold).sum())
    ties = np.cumsum([int((tile == threshold).sum()) for tile in tiles])
    if kept == ties[-1]:
        return Survival(threshold, numel)
    at = int(np.searchsorted(ties, kept, side="right"))
    nth, ops = kept - (int(ties[at - 1]) if at else 0), CpuOps()
    return Survival(threshold, each(lambda block: ops.locate(block, source, threshold, nth), tiles=[at])[0])
