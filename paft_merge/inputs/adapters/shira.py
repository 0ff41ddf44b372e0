"""A sparse adapter, PEFT's SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175), as a delta: values, and where they are added.

O = rows, I = columns of the weight, K = values that the adapter holds for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paft_merge.errors import AdapterError
from paft_merge.inputs.adapters.deltas import AdapterDelta, Lazy
from paft_merge.inputs.adapters.rows import Array, Rows
from paft_merge.inputs.checkpoint import DTYPES, Checkpoint
from paft_merge.inputs.safetensors_header import quote

Entries = tuple[NDArray[np.int64], Array]
"""Flat indices `[K]` int64, ascending, and values `[K]` float32."""

_INDEX_TYPES = ("I32", "I64", "F32")
"""How PEFT stores indices; as floats on Windows."""


class Sparse(AdapterDelta):
    """`weight[rows, columns] += values`: a delta that is zero everywhere else."""

    def __init__(self, shape: tuple[int, ...], entries: Lazy[Entries], beneath: str | None = None) -> None:
        super().__init__(shape, shape[1], "shira", beneath)
        self._entries = entries

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        places, values = self._entries.get()
        first, end = np.searchsorted(places, [start * self.row, stop * self.row])
        out[:] = 0
        out.reshape(-1)[places[first:end] - start * self.row] = values[first:end]

    def release(self) -> None:
        self._entries.release()


@dataclass(frozen=True)
class Scattered:
    """The two tensors of one module in the adapter's file: `shira_weight` `[K]`, `shira_indices` `[2, K]`."""

    file: Checkpoint
    weight: str
    indices: str

    @property
    def fault(self) -> str:
        """What their headers show to be wrong; empty when they belong together."""
        weight, indices = self.file.tensors[self.weight], self.file.tensors[self.indices]
        if not DTYPES[weight.dtype].mergeable or indices.dtype not in _INDEX_TYPES:
            return f"has values of {weight.dtype} and indices of {indices.dtype}"
        if len(weight.shape) != 1 or indices.shape != (2, weight.numel):
            return f"has shira_weight {weight.shape} and shira_indices {indices.shape}"
        return ""

    @property
    def count(self) -> int:
        """K."""
        return self.file.tensors[self.weight].numel

    def corner(self) -> tuple[int, int]:
        """One past the last row and the last column that hold a value: the weight is at least as large."""
        rows, columns = self._read()
        return int(rows.max()) + 1, int(columns.max()) + 1

    def load(self, shape: tuple[int, ...]) -> Entries:
        """Read the entries of a weight of `shape`.

        Raises:
            AdapterError: NONFINITE; ADAPTER_SHAPE, an index lies outside, or is there twice.
        """
        values = Rows.of(self.file, self.weight).load().flatten()
        rows, columns = self._read()
        outside = (rows < 0) | (rows >= shape[0]) | (columns < 0) | (columns >= shape[1])
        places = rows * shape[1] + columns
        order = np.argsort(places, kind="stable")
        places = places[order]
        if outside.any():
            raise self._wrong(f"{int(outside.sum()):,} of its indices lie outside of {shape}")
        if twice := int((places[1:] == places[:-1]).sum()):
            raise self._wrong(f"{twice:,} of its indices are there twice")
        return places, values[order]

    def _read(self) -> NDArray[np.int64]:
        info = self.file.tensors[self.indices]
        held = np.empty(info.nbytes, np.uint8)
        self.file.read_into(self.indices, 0, held)
        kinds = {"I32": np.int32, "I64": np.int64, "F32": np.float32}
        return held.view(kinds[info.dtype]).astype(np.int64).reshape(info.shape)

    def _wrong(self, what: str) -> AdapterError:
        where = self.file.folder / self.file.tensors[self.indices].file
        return AdapterError.of(
            "ADAPTER_SHAPE", where, f"tensor {quote(self.indices)}: {what}", "save it again with PEFT"
        )
