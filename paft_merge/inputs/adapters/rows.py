"""A tensor of a checkpoint as float32 rows, read on demand."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paft_merge.errors import AdapterError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.dtypes import DTYPES, widen
from paft_merge.inputs.safetensors_header import quote, row_size_of

Array = NDArray[np.float32]

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Rows:
    """Rows `[first, first + count)` of tensor `name` of `file`, of `row_size` elements each. Reads are thread-safe."""

    file: Checkpoint
    name: str
    row_size: int
    first: int
    count: int

    @classmethod
    def of(cls, file: Checkpoint, name: str, row_size: int | None = None) -> Rows:
        """All rows of one tensor; `row_size` defaults to the product of all dimensions but the first."""
        info = file.tensors[name]
        row_size = row_size or row_size_of(info.shape)
        return cls(file, name, row_size, 0, info.numel // row_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole stored tensor."""
        return self.file.tensors[self.name].shape

    def part(self, first: int, count: int) -> Rows:
        """Rows `[first, first + count)` of these rows."""
        return Rows(self.file, self.name, self.row_size, self.first + first, count)

    def read(self, start: int, stop: int) -> Array:
        """Read rows `[start, stop)` into fresh memory: `[stop - start, row_size]` float32.

        Raises:
            AdapterError: NONFINITE, naming the tensor.
            CheckpointError: the file changed or cannot be read.
        """
        info = self.file.tensors[self.name]
        size = DTYPES[info.dtype].bits // 8
        raw = np.empty((stop - start) * self.row_size * size, np.uint8)
        self.file.read_into(self.name, (self.first + start) * self.row_size * size, raw)
        values = np.empty((stop - start, self.row_size), np.float32)
        widen(raw, info.dtype, values.reshape(-1))
        _check_finite(values, self)
        return values

    def load(self) -> Array:
        """Read all rows: `[count, row_size]` float32."""
        return self.read(0, self.count)

    def blocks(self) -> list[tuple[int, int]]:
        """Split the rows into ranges of about a megabyte, which depend on the shape alone."""
        step = max(1, _BLOCK_BYTES // (4 * self.row_size))
        return [(start, min(start + step, self.count)) for start in range(0, self.count, step)]

    def same(self, other: Rows) -> bool:
        """Whether both hold the same float32 values; reads both block by block up to the first difference."""
        if (self.row_size, self.count) != (other.row_size, other.count):
            return False
        return all(np.array_equal(self.read(*block), other.read(*block)) for block in self.blocks())


def _check_finite(values: Array, source: Rows) -> None:
    # A sum costs a third of isfinite. Finite values may overflow it, so isfinite decides then.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        where = (
            f"{os.path.join(source.file.folder, source.file.tensors[source.name].file)}: tensor {quote(source.name)}"
        )
        what = f"{len(bad):,} of the {values.size:,} values read are NaN or infinite, the first at {int(bad[0]):,}"
        raise AdapterError.of("NONFINITE", where, what, "train again, or use an earlier save")
