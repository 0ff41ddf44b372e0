"""What fills a block: stored bytes and low-rank products, put in place piece by piece, each just before a loop comes to it.

A piece is still in the second cache when the loop takes it up, and no thread waits for Python's lock between reading and
computing. A loop that feeds itself takes the array `how` (see `filling.fill`), empty where the block is full.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from paft_merge.errors import CheckpointError
from paft_merge.loops.compiled import Compiled
from paft_merge.scratch import SCRATCH

PIECE = 1 << 16
"""Entries of a piece, about: with two sources and the output half of a cache of 1 MiB."""

COLUMNS, STRIDE, SHIFT = 512, 768, 128
"""Columns of a panel of a product's right factor; floats from a row to the next; floats by which memory for totals lies off a
page. Four rows of a panel and four of totals are 16 KiB and stay in the L1 cache, and lie 512 bytes apart in every page (see
`loops.LINE`)."""

ENTRY, READY, STEP, SIZE, READS, PRODUCTS, PREAD, ROW, TOTAL, ROWS, HEAD = range(11)
"""Places in `how`: the address of `fill`; entries that are there; entries of a piece, and of the block; how many reads and products
follow; the address of the C library's pread; entries of a product's row; addresses of memory for a product. What follows the
head is, of each read, an address, bytes of an entry, a file descriptor and an offset; of each product, an address, the address of
its rows of the left factor, its rank, and the address of the right one's panels."""

FULL = np.empty(0, np.int64)
"""The `how` of a block that is full."""

_fill = Compiled("filling.fill")
_pread = ctypes.cast(ctypes.CDLL(None).pread, ctypes.c_void_p).value


class Feed:
    """What the arrays of one block are to be filled with; of the thread that made it.

    Args:
        size: entries of the block.
        row: entries of a row of the products; `size` is a number of rows.
        again: called when something cannot be read; raises what is wrong.
    """

    def __init__(self, size: int, row: int, again: Callable[[], None]) -> None:
        self.row = row
        self._size, self._again = size, again
        self._reads: list[int] = []
        self._products: list[int] = []
        self._held: list[Any] = []
        self._rank = 0

    def __bool__(self) -> bool:
        return bool(self._reads or self._products)

    def read(self, out: Any, fd: int, offset: int) -> None:
        """Fill `out` `[size]` with what a file holds from byte `offset` on."""
        self._reads += (_address(out), out.itemsize, fd, offset)

    def multiply(self, out: Any, left: Any, panels: Any) -> None:
        """Fill `out` `[size]` float32 with the product of `left` `[size / row, R]` and a factor's `panels` (see `packed`)."""
        left = np.ascontiguousarray(left)
        self._held += (left, panels)
        self._rank = max(self._rank, panels.shape[1])
        self._products += (_address(out), _address(left), left.shape[1], _address(panels))

    @property
    def how(self) -> Any:
        """What a loop takes, for one walk over the block."""
        total, rows = memory_for(self._rank) if self._products else (FULL, FULL)
        step = max(PIECE // self.row // 4 * 4, 4) * self.row if self._products else PIECE
        head = (
            _fill.entry(FULL, 0), 0, step, self._size, len(self._reads) // 4, len(self._products) // 4, _pread, self.row,
            _address(total), _address(rows),
        )  # fmt: skip
        return np.array((*head, *self._reads, *self._products), np.int64)

    def all(self) -> None:
        """Fill the arrays at once.

        Raises:
            PaftMergeError: something cannot be read.
        """
        if _fill(self.how, self._size) < 0:
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
