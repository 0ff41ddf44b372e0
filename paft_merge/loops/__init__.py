"""The fused loops that a merge and an audit spend their time in: one block of a tensor at a time, no lock held.

| part | what it holds |
|---|---|
| compiled | their machine code, kept on disk |
| strips | the steps that they are made of |
| kernels | from a block to the merged elements |
| mixing | from one block to another, for the rarer methods |
| products | the low-rank product |
| feed, filling | what fills a block piece by piece, just before a loop comes to it |
| audits | counts and sums over deltas |

A block is a run of consecutive elements of one tensor, as bits: `uint16` holds bfloat16, `uint32` holds float32. Callers know the
loops by the names below and never import numba; only the parts do, and only to compile. `lines` `[K, LINE]` float32 is
memory for a loop's strips, with as many of them as it says.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from paft_merge.loops.compiled import Compiled
from paft_merge.loops.feed import STRIP as STRIP
from paft_merge.loops.feed import memory_for, packed
from paft_merge.scratch import SCRATCH

LINE = STRIP + 144
"""Elements from a strip to the next. Strips a multiple of 4 KiB apart share their sets of the L1 cache, and a load is held up by
a store that has the same last 12 bits of address: a loop over such strips takes up to three times as long."""

BINS = 1 << 15
"""Bins of a histogram of magnitudes: the upper 15 bits of a float32 without its sign (8 of exponent, 7 of mantissa)."""

ELECT = {"none": 0, "weighted": 1, "unweighted": 2, "count": 3}
"""How the sign of an entry is elected; see `methods.Consensus`."""

NORMALIZE = {"none": 0, "weights": 1, "count": 2}
"""What the kept entries are divided by; see `methods.Consensus`."""

COUNTS = ("zeros", "below_1e-06", "below_1e-05", "below_1e-04", "below_1e-03", "kept", "elected", "max_bits")
"""The integer columns of a tally, one row a source."""

SUMS = ("abs", "square", "kept_square", "elected_square")
"""The float64 columns of a tally, one row a source: what the delta holds, and what trimming and election leave of it."""

MAGNITUDE = 0x7FFFFFFF
"""Bits of a float32 but its sign."""

INFINITY = 0x7F800000
"""Bits of infinity: every finite magnitude is below."""

COUNT_SHIFT = 40
"""Bits of a packed bin of `measure` that hold the sum; 2**23 entries are the most that fit, see `MOST`."""

MOST = 1 << 22
"""Entries that may be counted into one packed histogram."""

RUN = 64
"""Entries of a sample that lie together: two cache lines of bfloat16."""

_OF_SOURCES = 0, 1  # of most loops, the first arguments are base and sources
histogram = Compiled("kernels.histogram", _OF_SOURCES)
collect = Compiled("kernels.collect", _OF_SOURCES)
locate = Compiled("kernels.locate", _OF_SOURCES)
dropped_l1 = Compiled("kernels.dropped_l1", _OF_SOURCES)
gram = Compiled("kernels.gram", _OF_SOURCES)
blend = Compiled("kernels.blend", (0, 1, 2))
consensus = Compiled("kernels.consensus", (0, 1, 2))
pick = Compiled("kernels.pick", _OF_SOURCES)

tally = Compiled("mixing.tally", _OF_SOURCES)
variance = Compiled("mixing.variance", _OF_SOURCES)
select = Compiled("mixing.select", _OF_SOURCES)
swap = Compiled("mixing.swap", _OF_SOURCES)
overlaps = Compiled("mixing.overlaps", _OF_SOURCES)
share = Compiled("mixing.share", _OF_SOURCES)
fuse = Compiled("mixing.fuse", _OF_SOURCES)
keep_ranked = Compiled("mixing.keep_ranked")
gram_rows = Compiled("mixing.gram_rows", _OF_SOURCES)
gram_columns = Compiled("mixing.gram_columns", _OF_SOURCES)
mix = Compiled("mixing.mix", _OF_SOURCES)

measure = Compiled("audits.measure")
erased = Compiled("audits.erased", (1,))
compare = Compiled("audits.compare")
shared_support = Compiled("audits.shared_support")
add_squares = Compiled("audits.add_squares")

_multiply = Compiled("products.multiply")


def lines(count: int, *, of: Any = np.float32) -> Any:
    """Memory of this thread for `count` strips: `[count, LINE]`, 64-byte aligned."""
    return SCRATCH.array(f"lines of {np.dtype(of).name}", (count, LINE), of)


def product(left: Any, right: Any, out: Any) -> None:
    """Low-rank product `out [N, I] = left [N, R] @ right [R, I]` in float32 (see `products.multiply`)."""
    multiply(left, packed(right, lambda size, dtype: SCRATCH.array("packed", size, dtype)), out)


def multiply(left: Any, panels: Any, out: Any) -> None:
    """`product` with the right factor as `packed` gives it."""
    _multiply(np.ascontiguousarray(left), panels, out, *memory_for(panels.shape[1]))
