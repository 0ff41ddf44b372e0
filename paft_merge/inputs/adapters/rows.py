"""A tensor of a checkpoint as float32 rows, read when they are wanted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from paft_merge.errors import AdapterError
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint
from paft_merge.inputs.dtypes import widen
from paft_merge.inputs.safetensors_header import quote

Array = NDArray[np.float32]

_BLOCK_BYTES = 1 << 20


def row_of(shape: tuple[int, ...], experts: bool = False) -> int:
    """Elements per row: everything behind the first dimension, or (fused experts) the last dimension alone."""
    return max(1, shape[-1] if experts else prod(shape[1:]))


@dataclass(frozen=True)
class Rows:
    """Rows `[first, first + count)` of tensor `name` of `file`, `row` elements each. Reads are thread-safe."""

    file: Checkpoint
    name: str
    row: int
    first: int
    count: int

    @classmethod
    def of(cls, file: Checkpoint, name: str, row: int | None = None) -> Rows:
        """All rows of one tensor; `row` defaults to everything behind its first dimension."""
        info = file.tensors[name]
        row = row or row_of(info.shape)
        return cls(file, name, row, 0, info.numel // row)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor as it is stored."""
        return self.file.tensors[self.name].shape

    def part(self, first: int, count: int) -> Rows:
        """The rows `[first, first + count)` of these."""
        return Rows(self.file, self.name, self.row, self.first + first, count)

    def read(self, start: int, stop: int) -> Array:
        """Read rows `[start, stop)` of these: `[stop - start, row]` float32, fresh memory.

        Raises:
            AdapterError: NONFINITE, naming the tensor.
            CheckpointError: the file changed or cannot be read.
        """
        info = self.file.tensors[self.name]
        size = DTYPES[info.dtype].bits // 8
        raw = np.empty((stop - start) * self.row * size, np.uint8)
        self.file.read_into(self.name, (self.first + start) * self.row * size, raw)
        values = np.empty((stop - start, self.row), np.float32)
        widen(raw, info.dtype, values.reshape(-1))
        check_finite(values, self)
        return values

    def load(self) -> Array:
        """Read all rows: `[count, row]` float32."""
        return self.read(0, self.count)

    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of rows of about a megabyte, always the same, that cover all of them."""
        step = max(1, _BLOCK_BYTES // (4 * self.row))
        return [(start, min(start + step, self.count)) for start in range(0, self.count, step)]

    def same(self, other: Rows) -> bool:
        """Do both hold the same float32 values? Reads both, a block at a time, until they differ."""
        if (self.row, self.count) != (other.row, other.count):
            return False
        return all(np.array_equal(self.read(*block), other.read(*block)) for block in self.blocks())

    @property
    def where(self) -> str:
        """The file and the tensor, for messages."""
        return f"{os.path.join(self.file.folder, self.file.tensors[self.name].file)}: tensor {quote(self.name)}"


def check_finite(values: Array, source: Rows) -> None:
    """Refuse NaN and infinity.

    Raises:
        AdapterError: NONFINITE with how many there are and the flat index of the first.
    """
    # A sum is a third of the cost of isfinite, and finite values may overflow it: then the slow look decides.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        what = f"{len(bad):,} of the {values.size:,} values read are NaN or infinite, the first at {int(bad[0]):,}"
        raise AdapterError.of("NONFINITE", source.where, what, "train again, or take an earlier save")
