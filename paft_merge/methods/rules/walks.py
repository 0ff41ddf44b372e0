"""How often a rule walks over a tensor, and what a walk costs: the part of a prediction that depends on the method.

Costs are nanoseconds of one core of the reference machine (a virtual one on an EPYC, with all cores at work), without reading and
without low-rank products. They were fitted to the processor seconds of merges; `tools/bench_prediction.py` compares them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Loop(NamedTuple):
    """The cost of a loop over the entries of a tensor."""

    entry: float
    """Nanoseconds for each entry."""
    source: float
    """Nanoseconds for each entry of each source."""
    pair: float = 0.0
    """Nanoseconds for each entry of each pair of sources, in both orders and with themselves."""

    def cost(self, sources: int) -> float:
        """Nanoseconds for each entry of a tensor with so many sources."""
        return self.entry + self.source * sources + self.pair * sources**2


@dataclass(frozen=True)
class Walks:
    """The walks of a rule over one tensor: those that measure it, then one that merges it."""

    merging: Loop
    measuring: tuple[Loop, ...] = ()
    sampled: bool = False
    """A sample of every tile is read first, to bound thresholds."""
    ties: float = 0
    """Thresholds of each source whose ties are located, on average, which reads one tile again."""
    one_pass: bool = False
    """Where merging while reading is possible, `DEFERRED` replaces all these loops."""
    made: int = 0
    """Rows of float32 that are computed from each block; 0 where the loops fill a block piece by piece."""
    over_model: tuple[Loop, ...] = ()
    """Walks over all tensors of the model before any is merged (`trim_scope: global`)."""
    norms: tuple[Loop, ...] = ()
    """Walks that measure the norms of deltas, except those of low-rank products, before anything else."""
    norms_over_model: bool = False
    """They are over all tensors of the model, as those of `over_model`."""


BLEND = Loop(0.2, 0.03)
"""A weighted sum of values; `TALLIED`, with the statistics of deltas."""
TALLIED = Loop(0.3, 0.1)
ELECT = Loop(0.5, 0.25)
"""Trim, elect and add; `DROP_ELECT`, with random drops; `DEFERRED`, with undecided entries set aside."""
DROP_ELECT = Loop(0.45, 0.25)
DEFERRED = Loop(0.8, 0.4)
COLLECT = Loop(0.15, 0.05)

HISTOGRAM_SUMS = Loop(0.1, 0.68)
DROPS = Loop(0.15, 0.12)
"""Norms before and after random drops."""
GRAM = Loop(0.12, 0.0, 0.025)
TALLY = Loop(0.1, 0.05)
OVERLAPS = Loop(0.3, 0.2)
VARIANCE = Loop(1.5, 0.4)
TRANSFORM = Loop(1.1, 0.65)
"""Compute a row from the deltas, write it on the base, and count the deltas (`NearSwap`, `Overlap`, `Fuse`)."""
SELECTED = Loop(4.0, 1.5)
"""Keep the entries of largest variance, and count them."""
MIXED = Loop(0.8, 0.3)
"""Weights for every row or column."""
PRODUCTS = Loop(0.1, 0.1, 0.09)
"""The extremes of the products of every pair of deltas; `EXPONENTIALS`, sums over their exponentials."""
EXPONENTIALS = Loop(0.7, 0.1, 0.37)
SCORES = Loop(1.5, 0.35, 0.5)
"""Scores of every entry from these products; `COMPETE`, with the merge by them."""
COMPETE = Loop(3.0, 1.1, 0.5)
RANKED = Loop(0.0, 14.0)
"""Sort every row of each source."""
