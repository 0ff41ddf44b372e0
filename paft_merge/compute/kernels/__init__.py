"""Compiled float32 kernels: fused loops over one block of a tensor, called without the interpreter lock.

| module | contents |
|---|---|
| object_cache | machine code of the kernels, kept on disk |
| processors | processors that kernels are compiled for |
| elf | loads object files |
| primitives | steps on a strip, of which the kernels are made |
| vectors | sums and counts in vector registers, between scalar steps |
| merging | weighted sum, consensus and Gram matrix of a block |
| thresholds | histograms of magnitudes, and entries within an interval |
| block_transforms | from one block to another, for the rarer methods |
| scoring | how entries of deltas compete (PCB-Merging) |
| low_rank | low-rank product |
| decoding | values of codes with scales |
| block_source, fill_loop | fill a block from files, codes and factors, piece by piece |
| statistics | counts and sums over deltas |
| codes | values to codes with scales |

Words:

    block    consecutive elements of one tensor, from the base and from n sources
    bits     stored elements: uint16 holds bfloat16, uint32 holds float32
    piece    part of a block that fits the L2 cache; a block is filled piece by piece
    strip    STRIP elements, a handful of which fit the L1 cache; every step of a kernel is a loop over one
    lanes    [K, LINE] float64 memory, a partial sum per position of a strip
    lines    [K, LINE] float32 memory for K strips

Callers use the names below and never import numba; only the modules do, and only to compile. Most kernels begin with the same
few lines (extent, zeros, the loop over strips with its refill). They stay written out: numba compiles a function of its own or
an inlined one, and either keeps LLVM from making vector loops of some steps, or takes a callback for the body, which it cannot inline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from paft_merge.compute.kernels.block_source import STRIP as STRIP
from paft_merge.compute.kernels.block_source import fill as fill
from paft_merge.compute.kernels.block_source import memory_for, packed
from paft_merge.compute.kernels.object_cache import Compiled
from paft_merge.compute.magnitudes import EPSILONS
from paft_merge.compute.scratch import SCRATCH

LINE = STRIP + 144
"""Elements from one strip to the next. Strips a multiple of 4 KiB apart share their sets of the L1 cache, and a load waits for a store
with the same last 12 address bits: a loop over such strips takes up to three times as long."""

BINS = 1 << 15
"""Bins of a histogram of magnitudes: the upper 15 bits of a float32 without its sign (8 of exponent, 7 of mantissa)."""

MIDDLE = 1 << 15
"""Half the range of the lower 16 bits. Squared distances from it are at most 2**30, so that 2**33 entries of a bin fit an int64 sum."""

ELECT = {"none": 0, "weighted": 1, "unweighted": 2, "count": 3}
"""Codes of the ways to elect the sign of an entry; see `methods.rules.consensus`."""

NORMALIZE = {"none": 0, "weights": 1, "count": 2}
"""Codes of the divisors of the kept entries; see `methods.rules.consensus`."""

COUNTS = ("zeros", *(f"below_{e:.0e}" for e in EPSILONS), "kept", "elected", "max_bits")
"""The integer columns of a tally, one row per source."""

SUMS = ("abs", "square", "kept_square", "elected_square")
"""The float64 columns of a tally, one row per source: sums over the delta, and over the entries that trimming and election keep."""

COUNT_SHIFT = 40
"""An entry adds `1 << COUNT_SHIFT` to its packed bin, more than the sum of the lower bits of at most 2**23 entries; see `MOST`."""

MOST = 1 << 22
"""Largest number of entries in one packed histogram."""

CACHED = 1 << 15
"""Entries that an audit measures at a time: those of several deltas fit the L2 cache."""

RUN = 64
"""Consecutive entries of a sample: two cache lines of bfloat16."""

histogram = Compiled("thresholds.histogram", "bits.1 bits.2 bool i8.1 i8.2 i8.2 f4.2")
collect = Compiled("thresholds.collect", "bits.1 bits.2 bool i8.1 u4.1 u4.1 u4.2 i8.2 f4.2")
locate = Compiled("thresholds.locate", "bits.1 bits.2 bool i8.1 int uint32 int f4.2")
dropped_norms = Compiled("thresholds.dropped_norms", "bits.1 bits.2 bool i8.1 int u8.1 u8.1 bool f8.2 f4.2 f8.2")
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
largest = Compiled("block_transforms.largest", "bits.1 bits.2 bool f4.1 f4.1 i8.1 f8.1 f4.2 f8.2")
keep_ranked = Compiled("block_transforms.keep_ranked", "f4.1 u8.2 int int u8.1 uint64 f4.1")
gram_rows = Compiled("block_transforms.gram_rows", "bits.1 bits.2 bool int f8.3 f4.2 f8.2")
gram_columns = Compiled("block_transforms.gram_columns", "bits.1 bits.2 bool int f8.3 f4.2")
mix = Compiled("block_transforms.mix", "bits.1 bits.2 bool int bool f4.2 f4.1 f4.2")

products = Compiled("scoring.products", "bits.1 bits.2 bool f8.3 f4.2 f8.2")
exponential_sums = Compiled("scoring.exponential_sums", "bits.1 bits.2 bool f8.2 f8.2 f8.2 f4.2 f8.2")
scores = Compiled("scoring.scores", "bits.1 bits.2 bool f8.2 f8.2 f8.2 int f4.2 f4.2 f8.2")
compete = Compiled("scoring.compete", "bits.1 bits.2 bool int u4.2 u4.1 i8.1 f4.1 f4.1 f4.1 i8.1 f8.1 f4.2 f8.2")

measure = Compiled("statistics.measure", "u4.1 bits.1 u4.1 i8.1 i8.1 f8.1 i8.1 f8.1 f4.2")
compare = Compiled("statistics.compare", "u4.1 u4.1 uint32 i8.1 f8.1")
shared_support = Compiled("statistics.shared_support", "u4.1 u4.1 int u4.1 i8.1 i8.1")
survey = Compiled(
    "statistics.survey",
    "bits.1 bits.2 bool i8.1 f4.2 u4.1 i8.2 i8.2 int i8.2 i8.2 u4.1 f8.2 i8.1 f8.1 uint32 i8.2 f8.2 i8.2 u4.2 u4.2 i4.2 f4.3 u4.3 i8.3 f4.1 int bool int float i8.2 f8.2 f8.1 u4.1 u4.1 i8.1 f4.2",
)
unpack = Compiled("statistics.unpack", "i8.2 i8.2 i8.2")
add_squares = Compiled("statistics.add_squares", "u4.1 f8.1")

limits = Compiled("codes.limits", "f4.2 i4.1 int int f4.3 f4.2")
round_codes = Compiled(
    "codes.round_codes",
    "f4.2 i4.1 int int f4.3 f4.3 f4.3 u1.3 bool float i8.1 f4.1 uint64 int u1.2 f4.2 i8.2 f8.2 f4.2 f8.2 f4.2 u1.1",
)
lost = Compiled("codes.lost", "f4.1 f4.1 f4.1 i8.1 f8.1 f8.2")
decode = Compiled("decoding.decode", "u1.1 f4.2 f4.2 f4.2 int int int f4.1")
decode_turned = Compiled("decoding.decode_turned", "u1.2 f4.2 f4.2 int f4.1 f4.2")

_multiply = Compiled("low_rank.multiply", "f4.2 f4.3 f4.2 f4.2 f4.2")


def prepare() -> None:
    """Compile every kernel that is not cached yet, for example into a container image whose file system is read-only later."""
    for kernel in _every():
        kernel.prepare()


def ship(folder: Path) -> None:
    """Compile every kernel for the level that `NUMBA_CPU_NAME` names, into a folder of a wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    for kernel in _every():
        kernel.ship(folder)


def _every() -> list[Compiled]:
    return [value for value in globals().values() if isinstance(value, Compiled)]


def lines(count: int, *, of: Any = np.float32) -> Any:
    """This thread's memory for `count` strips: `[count, LINE]` of dtype `of`, uninitialised, 64-byte aligned."""
    return SCRATCH.array(f"lines of {np.dtype(of).name}", (count, LINE), of)


def product(left: Any, right: Any, out: Any) -> None:
    """Low-rank product `out [N, I] = left [N, R] @ right [R, I]` in float32 (see `low_rank.multiply`)."""
    multiply(left, packed(right, lambda size, dtype: SCRATCH.array("packed", size, dtype)), out)


def multiply(left: Any, panels: Any, out: Any) -> None:
    """`product` with the right factor as the panels that `block_source.packed` returns."""
    _multiply(np.ascontiguousarray(left), panels, out, *memory_for(panels.shape[1]))
