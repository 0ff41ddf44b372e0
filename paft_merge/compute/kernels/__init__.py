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

from paft_merge.compute.kernels.block_source import STRIP as STRIP
from paft_merge.compute.kernels.block_source import fill as fill
from paft_merge.compute.kernels.block_source import memory_for, packed
from paft_merge.compute.kernels.object_cache import Compiled
from paft_merge.compute.scratch import SCRATCH

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

histogram = Compiled("thresholds.histogram", "bits.1 bits.2 bool i8.1 i8.2 i8.2 f4.2")
collect = Compiled("thresholds.collect", "bits.1 bits.2 bool i8.1 u4.1 u4.1 u4.2 i8.2 f4.2")
locate = Compiled("thresholds.locate", "bits.1 bits.2 bool i8.1 int uint32 int f4.2")
dropped_l1 = Compiled("thresholds.dropped_l1", "bits.1 bits.2 bool i8.1 int u8.1 u8.1 f8.2 f4.2 f8.2")
gram = Compiled("merging.gram", "bits.1 bits.2 bool i8.1 f8.2 f4.2 f8.2")
blend = Compiled(
    "merging.blend", "bits.1 bits.1 bits.2 bool i8.1 int float f4.1 uint64 bool i8.2 f8.2 int u4.2 i8.1 f4.2"
)
consensus = Compiled(
    "merging.consensus",
    "bits.1 bits.1 bits.2 bool i8.1 int f4.1 f4.1 u4.1 i8.1 u4.1 i8.1 f4.1 u8.1 u8.1 int bool int float uint64 i8.2 f8.2 u4.1 u4.1 i4.1 f4.2 u4.2 i8.2 int u4.2 i8.1 u1.1 f4.2",
)
pick = Compiled("merging.pick", "bits.1 bits.2 bool int int u4.2 f4.2")

tally = Compiled("block_transforms.tally", "bits.1 bits.2 bool i8.2 f8.2 f4.2")
variance = Compiled("block_transforms.variance", "bits.1 bits.2 bool int f4.1 f4.2 f8.2")
select = Compiled("block_transforms.select", "bits.1 bits.2 bool int u4.1 uint32 int f4.2 f4.2")
swap = Compiled("block_transforms.swap", "bits.1 bits.2 bool float f4.1 f4.2")
overlaps = Compiled("block_transforms.overlaps", "bits.1 bits.2 bool float i8.2 f8.1 f4.2 f8.2")
share = Compiled("block_transforms.share", "bits.1 bits.2 bool float f4.1 f4.1 f4.2")
fuse = Compiled("block_transforms.fuse", "bits.1 bits.2 bool f4.1 f4.1 i8.1 f8.1 f4.2 f8.2")
keep_ranked = Compiled("block_transforms.keep_ranked", "f4.1 u8.2 int int u8.1 uint64 f4.1")
gram_rows = Compiled("block_transforms.gram_rows", "bits.1 bits.2 bool int f8.3 f4.2 f8.2")
gram_columns = Compiled("block_transforms.gram_columns", "bits.1 bits.2 bool int f8.3 f4.2")
mix = Compiled("block_transforms.mix", "bits.1 bits.2 bool int bool f4.2 f4.1 f4.2")

measure = Compiled("statistics.measure", "u4.1 u4.1 i8.1 i8.1 f8.1")
erased = Compiled("statistics.erased", "u4.1 bits.1 f8.1 f4.2")
compare = Compiled("statistics.compare", "u4.1 u4.1 uint32 i8.1 f8.1 f4.2")
shared_support = Compiled("statistics.shared_support", "u4.1 u4.1 int u4.1 i8.1 i8.1")
add_squares = Compiled("statistics.add_squares", "u4.1 f8.1")

_multiply = Compiled("low_rank.multiply", "f4.2 f4.3 f4.2 f4.2 f4.2")


def prepare() -> None:
    """Compile every loop, or see that it is there: for an image of a machine that could not keep what it compiles."""
    for loop in tuple(globals().values()):  # compiling imports parts of this room, whose names appear here
        if isinstance(loop, Compiled):
            loop.prepare()


def lines(count: int, *, of: Any = np.float32) -> Any:
    """Memory of this thread for `count` strips: `[count, LINE]`, 64-byte aligned."""
    return SCRATCH.array(f"lines of {np.dtype(of).name}", (count, LINE), of)


def product(left: Any, right: Any, out: Any) -> None:
    """Low-rank product `out [N, I] = left [N, R] @ right [R, I]` in float32 (see `products.multiply`)."""
    multiply(left, packed(right, lambda size, dtype: SCRATCH.array("packed", size, dtype)), out)


def multiply(left: Any, panels: Any, out: Any) -> None:
    """`product` with the right factor as `packed` gives it."""
    _multiply(np.ascontiguousarray(left), panels, out, *memory_for(panels.shape[1]))
