"""Fill a block from stored bytes, codes with scales and low-rank products, piece by piece, just before a kernel reads each piece.

A piece is still in the L2 cache when the kernel reads it, and no thread waits for the interpreter lock between reading and
computing. A kernel that fills its own block takes the array `source_desc` (see `fill_loop.fill`), which is empty for a full block.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from paft_merge.compute.kernels.object_cache import Compiled
from paft_merge.compute.scratch import SCRATCH
from paft_merge.errors import CheckpointError

STRIP = 1024
"""Elements of a strip: 4 KiB of float32, so that a handful of strips fit the L1 cache."""

PIECE = 1 << 16
"""Approximate entries of a piece of up to two sources, a whole number of strips: they and the output take most of a 1 MiB L2 cache. With
more sources a piece is shorter."""

COLUMNS, ROWS = 64, 4
"""Columns of a panel of the right factor, half of the L1 cache at rank 64; and rows of the product computed at a time."""

_LEAST, _LEAST_READ = 16, 8 * STRIP
"""Least rows of a product in a piece, because every piece reads all panels from a slower cache; least entries of a piece that is
read only, because every read is a system call."""

ENTRY, READY, STEP, SIZE, KEPT, READS, PRODUCTS, CODES, PREAD, ROW, TOTAL, LEFT, BYTES, HEAD = range(14)
"""Indices into `source_desc` `[HEAD + 4 * (reads + products) + CODED * codes]` int64.

ENTRY       address of `fill`
READY       entries filled so far; `fill` updates it
STEP, SIZE  entries of a piece, and of the block
KEPT        1 where the arrays hold the whole block, 0 where they hold one piece at a time
READS, PRODUCTS, CODES  how many of each follow the head
PREAD       address of the C library's pread
ROW         entries of a row of the products
TOTAL, LEFT addresses of memory for a product
BYTES       address of memory for the codes of a piece

A read is an address, bytes of an entry, a file descriptor and an offset. A product is an address, the address of its rows
of the left factor, the rank, and the address of the right factor's panels. Codes are an address, a file descriptor, an offset,
codes in a byte, the addresses of the table, of the scales and of the zero points (0: none), rows and columns of the scales, and `width`,
`size` and `skip` of `decoding.decode`."""

TURNED = 64
"""Columns that `decoding.decode_turned` writes at a time."""

CODED = 12
"""Numbers of the codes of a row."""

FULL = np.empty(0, np.int64)
"""The `source_desc` of a full block."""

fill = Compiled("fill_loop.fill", "i8.1 int")
_pread = ctypes.cast(ctypes.CDLL(None).pread, ctypes.c_void_p).value


class Codes(NamedTuple):
    """Codes with scales in a file, for the entries of a block; the arrays and numbers are those of `decoding.decode`.

    Attributes:
        fd: file descriptor.
        offset: the byte with the first code.
        table: `[256, P]` float32.
        scales: `[rows, blocks]` float32.
        zeros: of the same shape, or None.
        width, size, skip: of rows, of blocks, and entries before the block in its first row.
    """

    fd: int
    offset: int
    table: Any
    scales: Any
    zeros: Any
    width: int
    size: int
    skip: int


class BlockSource:
    """Reads, codes and products that fill the rows of a block. Row -1 is the base, the others are the sources. For one thread.

    Args:
        size: entries of the block.
        width: entries of a row of the products; divides `size`.
        again: called after a failed read; reads again through Python and raises the error.
    """

    def __init__(self, size: int, width: int, again: Callable[[], None]) -> None:
        self.size, self.width = size, width
        self._again = again
        self._reads: list[tuple[int, int, int]] = []
        self._products: list[tuple[int, Any, Any]] = []
        self._codes: list[tuple[int, Codes]] = []

    @property
    def _rows(self) -> set[int]:
        return {*(one[0] for one in self._reads), *(one[0] for one in self._codes), *(one[0] for one in self._products)}

    @property
    def has_base(self) -> bool:
        """Whether the base is filled too."""
        return -1 in self._rows

    def read(self, row: int, fd: int, offset: int) -> None:
        """Fill a row with the bytes of file descriptor `fd` from `offset` on."""
        self._reads.append((row, fd, offset))

    def decode(self, row: int, codes: Codes) -> None:
        """Fill a row with the values of codes, float32."""
        self._codes.append((row, codes))

    def multiply(self, row: int, left: Any, panels: Any) -> None:
        """Fill a row with the product of `left` `[size / width, R]` float32 and the `panels` of a right factor (see `packed`)."""
        self._products.append((row, np.ascontiguousarray(left), panels))

    @property
    def piece(self) -> int:
        """Entries of arrays that hold one piece at a time."""
        sources = len(self._rows - {-1})
        return piece_entries(self.size, self.width if self._products else 0, sources)

    def descriptor(self, base: Any, sources: Any, only: int | None = None) -> Any:
        """The `source_desc` with which a kernel fills these arrays.

        Args:
            base: `[E]` bits, or `[piece]` where it holds one piece at a time.
            sources: `[n, E]` bits, or `[n, piece]`.
            only: the one source to fill; None fills all.
        """
        rank = max((panels.shape[1] for _, _, panels in self._products), default=0)
        total, rows = memory_for(rank) if self._products else (FULL, FULL)
        kept = sources.shape[1] == self.size
        reads, products, codes = list[int](), list[int](), list[int]()
        for row, fd, offset in self._reads:
            if only in (None, row) or row < 0:
                out = sources[row] if row >= 0 else base
                reads += (_address(out), out.itemsize, fd, offset)
        for row, left, panels in self._products:
            if only in (None, row):
                products += (_address(sources[row]), _address(left), left.shape[1], _address(panels))
        for row, held in self._codes:
            if only in (None, row) or row < 0:
                out, zeros = (sources[row] if row >= 0 else base), 0 if held.zeros is None else _address(held.zeros)
                codes += (_address(out), held.fd, held.offset, held.table.shape[1], _address(held.table))
                codes += (_address(held.scales), zeros, *held.scales.shape, held.width, held.size, held.skip)
        memory = SCRATCH.array("codes of a piece", self.piece if self._codes else 0, np.uint8)
        head = (
            fill.entry, 0, self.piece, self.size, kept, len(reads) // 4, len(products) // 4, len(codes) // CODED, _pread,
            self.width, _address(total), _address(rows), _address(memory),
        )  # fmt: skip
        return np.array((*head, *reads, *products, *codes), np.int64)

    def fill(self, base: Any, sources: Any) -> None:
        """Fill `base` `[E]` and `sources` `[n, E]` at once.

        Raises:
            PaftMergeError: a read failed.
        """
        if fill(self.descriptor(base, sources), self.size) < 0:
            self.explain()

    def pieces(self, base: Any, sources: Any) -> Iterator[tuple[int, Any, Any]]:
        """Fill `base` `[piece]` and `sources` `[n, piece]` again and again: yields the first entry, and what is filled of both.

        Raises:
            PaftMergeError: a read failed.
        """
        desc, start = self.descriptor(base, sources), 0
        while start < self.size:
            stop = fill(desc, start + 1)
            if stop < 0:
                self.explain()
            yield start, base[: stop - start], sources[:, : stop - start]
            start = stop

    def explain(self) -> None:
        """Raise the error behind a failed read."""
        self._again()
        raise CheckpointError.of(
            "SHARD_UNREADABLE", "an input", "a read failed once and then succeeded", "continue with resume=True"
        )


def piece_entries(size: int, width: int, sources: int) -> int:
    """Entries of a piece: whole strips, and whole rows of products.

    Args:
        size: entries of the block.
        width: entries of a row of the products; 0 if there are none.
        sources: rows that are filled beside the base.
    """
    step = math.lcm(ROWS * width, STRIP) if width else STRIP
    least = _LEAST * width if width else min(_LEAST_READ, PIECE)
    return min(max(2 * PIECE // max(sources, 2) // step, -(-least // step)) * step, size)


def packed(right: Any, memory: Callable[[int, Any], Any] = np.empty) -> Any:
    """The right factor `[R, I]` of a product in panels: `[ceil(I / COLUMNS), R, COLUMNS]` float32, padded with zeros.

    Args:
        right: `[R, I]` float32.
        memory: allocates the panels, from a size and a dtype.
    """
    rank, width = right.shape
    shape = -(-width // COLUMNS), rank, COLUMNS
    raw = memory(math.prod(shape) + COLUMNS, np.float32)
    panels = raw[-raw.ctypes.data % 64 // 4 :][: math.prod(shape)].reshape(
        shape
    )  # 64-byte aligned: no vector crosses a cache line
    whole = width // COLUMNS
    panels[:whole] = right[:, : whole * COLUMNS].reshape(rank, whole, COLUMNS).transpose(1, 0, 2)
    if width % COLUMNS:
        panels[-1] = 0
        panels[-1, :, : width % COLUMNS] = right[:, whole * COLUMNS :]
    return panels


def unpacked(panels: Any, width: int) -> Any:
    """The right factor `[R, width]` whose panels are `panels`, contiguous."""
    count, rank, columns = panels.shape
    return np.ascontiguousarray(panels.transpose(1, 0, 2).reshape(rank, count * columns)[:, :width])


def memory_for(rank: int) -> tuple[Any, Any]:
    """This thread's memory for a product: `total` `[ROWS, COLUMNS]` and `rows` `[ROWS, rank]`."""
    memory = SCRATCH.array("product", ROWS * (COLUMNS + rank), np.float32)
    return memory[: ROWS * COLUMNS].reshape(ROWS, COLUMNS), memory[ROWS * COLUMNS :].reshape(ROWS, rank)


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])
