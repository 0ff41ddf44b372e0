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

from paft_merge.compute.kernels.object_cache import Compiled
from paft_merge.compute.scratch import SCRATCH
from paft_merge.errors import CheckpointError

STRIP = 1024
"""Elements of a strip: 4 KiB of float32, so that a handful of strips fill the L1 cache."""

PIECE = 1 << 16
"""Entries of a piece, about; whole strips: with two sources and the output half of a cache of 1 MiB."""

COLUMNS, ROWS = 64, 4
"""Columns of a panel of a product's right factor, which at rank 64 takes half of the L1 cache; rows that are computed at a time."""

_LEAST = 16
"""Rows of a product that a piece has at least: all panels come from a slower cache for every piece."""

ENTRY, READY, STEP, SIZE, KEPT, READS, PRODUCTS, PREAD, ROW, TOTAL, LEFT, HEAD = range(12)
"""Places in `how`: the address of `fill`; entries that are there; entries of a piece, and of the block; whether the arrays hold all of
it, or a piece at a time; how many reads and products follow; the address of the C library's pread; entries of a product's row; addresses of memory for a product. What follows the
head is, of each read, an address, bytes of an entry, a file descriptor and an offset; of each product, an address, the address of
its rows of the left factor, its rank, and the address of the right one's panels."""

FULL = np.empty(0, np.int64)
"""The `how` of a block that is full."""

fill = Compiled("fill_loop.fill", "i8.1 int")
_pread = ctypes.cast(ctypes.CDLL(None).pread, ctypes.c_void_p).value


class BlockSource:
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
        step = math.lcm(ROWS * self.width, STRIP) if self._products else STRIP
        least = _LEAST * self.width if self._products else 1
        return min(max(PIECE // step, -(-least // step)) * step, self.size)

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
            fill.entry, 0, self.piece, self.size, kept, len(reads) // 4, len(products) // 4, _pread, self.width,
            _address(total), _address(rows),
        )  # fmt: skip
        return np.array((*head, *reads, *products), np.int64)

    def fill(self, base: Any, sources: Any) -> None:
        """Fill arrays of the whole block at once.

        Raises:
            PaftMergeError: something cannot be read.
        """
        if fill(self.how(base, sources), self.size) < 0:
            self.explain()

    def explain(self) -> None:
        """Say why something could not be read."""
        self._again()
        raise CheckpointError.of(
            "SHARD_UNREADABLE", "an input", "could not be read for a moment", "go on with --resume"
        )


def packed(right: Any, memory: Callable[[int, Any], Any] = np.empty) -> Any:
    """The panels of a product's right factor `[R, I]`: `[ceil(I / COLUMNS), R, COLUMNS]` float32, filled up with zeros.

    `memory` makes the array for them.
    """
    rank, width = right.shape
    shape = -(-width // COLUMNS), rank, COLUMNS
    raw = memory(math.prod(shape) + COLUMNS, np.float32)
    panels = raw[-raw.ctypes.data % 64 // 4 :][: math.prod(shape)].reshape(shape)  # no vector in two lines of the cache
    whole = width // COLUMNS
    panels[:whole] = right[:, : whole * COLUMNS].reshape(rank, whole, COLUMNS).transpose(1, 0, 2)
    if width % COLUMNS:
        panels[-1] = 0
        panels[-1, :, : width % COLUMNS] = right[:, whole * COLUMNS :]
    return panels


def memory_for(rank: int) -> tuple[Any, Any]:
    """Memory of this thread for a product: `total` `[ROWS, COLUMNS]` and `rows` `[ROWS, rank]`."""
    memory = SCRATCH.array("product", ROWS * (COLUMNS + rank), np.float32)
    return memory[: ROWS * COLUMNS].reshape(ROWS, COLUMNS), memory[ROWS * COLUMNS :].reshape(ROWS, rank)


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])
