"""What fills a block: stored bytes and low-rank products, put in place piece by piece, each just before a loop comes to it.

A piece is still in the second cache when the loop takes it up, and no thread waits for Python's lock between reading and
computing. A loop that feeds itself takes the array `how` (see `filling.fill`), empty where the block is full.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from paft_merge.errors import CheckpointError
from paft_merge.loops.compiled import Compiled
from paft_merge.scratch import SCRATCH

STRIP = 1024
"""Elements of a strip: 4 KiB of float32, so that a handful of strips fill the L1 cache."""

PIECE = 1 << 16
"""Entries of a piece, about; whole strips: with two sources and the output half of a cache of 1 MiB."""

COLUMNS, STRIDE, SHIFT = 512, 768, 128
"""Columns of a panel of a product's right factor; floats from a row to the next; floats by which memory for totals lies off a
page. Four rows of a panel and four of totals are 16 KiB and stay in the L1 cache, and lie 512 bytes apart in every page (see
`loops.LINE`)."""

ENTRY, READY, STEP, SIZE, KEPT, READS, PRODUCTS, PREAD, ROW, TOTAL, ROWS, HEAD = range(12)
"""Places in `how`: the address of `fill`; entries that are there; entries of a piece, and of the block; whether the arrays hold all of
it, or a piece at a time; how many reads and products follow; the address of the C library's pread; entries of a product's row; addresses of memory for a product. What follows the
head is, of each read, an address, bytes of an entry, a file descriptor and an offset; of each product, an address, the address of
its rows of the left factor, its rank, and the address of the right one's panels."""

FULL = np.empty(0, np.int64)
"""The `how` of a block that is full."""

_fill = Compiled("filling.fill")
_pread = ctypes.cast(ctypes.CDLL(None).pread, ctypes.c_void_p).value


class Feed:
    """What the rows of a block are filled with, of the thread that made it. Row -1 is the base, the others are the sources.

    Args:
        size: entries of the block.
        width: entries of a row of the products; `size` is a number of those.
        again: called when something cannot be read; raises what is wrong.
    """

    def __init__(self, size: int, width: int, again: Callable[[], None]) -> None:
        self.size, self.width = size, width
        self._again = again
        self._reads: list[tuple[int, int, int]] = []
        self._products: list[tuple[int, Any, Any]] = []

    @property
    def has_base(self) -> bool:
        """Whether it fills a base."""
        return any(row < 0 for row, _, _ in self._reads)

    def read(self, row: int, fd: int, offset: int) -> None:
        """Fill a row with what a file holds from byte `offset` on."""
        self._reads.append((row, fd, offset))

    def multiply(self, row: int, left: Any, panels: Any) -> None:
        """Fill a row with the product of `left` `[size / width, R]` and a factor's `panels` (see `packed`)."""
        self._products.append((row, np.ascontiguousarray(left), panels))

    @property
    def piece(self) -> int:
        """Entries that arrays need which are used again for every piece: whole strips, and whole rows of products."""
        step = math.lcm(4 * self.width, STRIP) if self._products else STRIP
        return min(max(PIECE // step, 1) * step, self.size)

    def how(self, base: Any, sources: Any, only: int | None = None) -> Any:
        """What a loop takes to fill such arrays in one walk over the block; with fewer entries than it has they hold pieces.

        `only`: the one source that is filled.
        """
        rank = max((panels.shape[1] for _, _, panels in self._products), default=0)
        total, rows = memory_for(rank) if self._products else (FULL, FULL)
        kept = sources.shape[1] == self.size
        reads, products = list[int](), list[int]()
        for row, fd, offset in self._reads:
            if only in (None, row) or row < 0:
                out = sources[row] if row >= 0 else base
                reads += (_address(out), out.itemsize, fd, offset)
        for row, left, panels in self._products:
            if only in (None, row):
                products += (_address(sources[row]), _address(left), left.shape[1], _address(panels))
        head = (
            _fill.entry(FULL, 0), 0, self.piece, self.size, kept, len(reads) // 4, len(products) // 4, _pread, self.width,
            _address(total), _address(rows),
        )  # fmt: skip
        return np.array((*head, *reads, *products), np.int64)

    def fill(self, base: Any, sources: Any) -> None:
        """Fill arrays of the whole block at once.

        Raises:
            PaftMergeError: something cannot be read.
        """
        if _fill(self.how(base, sources), self.size) < 0:
            self.explain()

    def explain(self) -> None:
        """Say why something could not be read."""
        self._again()
        raise CheckpointError.of(
            "SHARD_UNREADABLE", "an input", "could not be read for a moment", "go on with --resume"
        )


def packed(right: Any, memory: Callable[[int, Any], Any] = np.empty) -> Any:
    """The panels of a product's right factor `[R, I]`: `[ceil(I / COLUMNS), P, STRIDE]` float32, P being R rounded up to fours.

    `memory` makes the array for them. What is not of the factor is zero, or undefined where no product looks at it.
    """
    rank, width = right.shape
    panels = _on_a_page(memory, (-(-width // COLUMNS), (rank + 3) // 4 * 4, STRIDE))
    panels[:, rank:] = 0
    for panel, column in zip(panels, range(0, width, COLUMNS), strict=True):
        part = right[:, column : column + COLUMNS]
        panel[:rank, : part.shape[1]] = part
    return panels


def memory_for(padded: int) -> tuple[Any, Any]:
    """Memory of this thread for a product of a rank rounded up to fours: `total` `[4, STRIDE]` and `rows` `[4, padded]`."""

    def raw(size: int, dtype: Any) -> Any:
        return SCRATCH.array("product", size, dtype)

    memory = _on_a_page(raw, (SHIFT + 4 * STRIDE + 4 * padded,))[SHIFT:]
    return memory[: 4 * STRIDE].reshape(4, STRIDE), memory[4 * STRIDE :].reshape(4, padded)


def _on_a_page(make: Callable[[int, Any], Any], shape: tuple[int, ...]) -> Any:
    """Float32 memory that begins with a page."""
    size = int(np.prod(shape))
    raw = make(size + 1024, np.float32)
    skip = -raw.ctypes.data % 4096 // 4
    return raw[skip : skip + size].reshape(shape)


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])
