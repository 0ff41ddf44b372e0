"""SHiRA, a sparse adapter (Bhardwaj et al. 2024, arXiv:2406.13175): values, and the entries that they are added to.

O = rows, I = columns of the weight, K = values that the adapter holds for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paft_merge.errors import AdapterError, Problems
from paft_merge.inputs.adapters.binding import About, Binding, PeftType
from paft_merge.inputs.adapters.config import INERT, check_kinds, check_positive, refuse_unknown
from paft_merge.inputs.adapters.deltas import AdapterDelta, Lazy
from paft_merge.inputs.adapters.keys import Module, TensorNames
from paft_merge.inputs.adapters.rows import Array, Rows
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.dtypes import DTYPES
from paft_merge.inputs.safetensors_header import quote

Entries = tuple[NDArray[np.int64], Array]
"""Flat indices `[K]` int64, ascending, and values `[K]` float32."""

_INDEX_DTYPES = {"I32": np.int32, "I64": np.int64, "F32": np.float32}
"""How PEFT stores indices; on Windows as floats."""

_FIELDS = INERT | {"r", "mask_type", "random_seed", "fan_in_fan_out", "init_weights", "modules_to_save"}
"""The mask is in the tensors, where PEFT reads it too; PEFT overrules `fan_in_fan_out`."""


class Sparse(AdapterDelta):
    """`weight[rows, columns] += values`: a delta that is zero everywhere else."""

    def __init__(self, shape: tuple[int, ...], entries: Lazy[Entries], stored_as: str | None = None) -> None:
        super().__init__(shape, shape[1], "shira", stored_as)
        self._entries = entries

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        indices, values = self._entries.get()
        first, end = np.searchsorted(indices, [start * self.row_size, stop * self.row_size])
        out[:] = 0
        out.reshape(-1)[indices[first:end] - start * self.row_size] = values[first:end]

    def release(self) -> None:
        self._entries.release()


@dataclass(frozen=True)
class EntryTensors:
    """The two tensors of one module in the adapter's file: `shira_weight` `[K]`, `shira_indices` `[2, K]`."""

    file: Checkpoint
    weight: str
    indices: str

    @property
    def fault(self) -> str:
        """What is wrong with dtypes or shapes; empty if nothing is."""
        weight, indices = self.file.tensors[self.weight], self.file.tensors[self.indices]
        if not DTYPES[weight.dtype].mergeable or indices.dtype not in _INDEX_DTYPES:
            return f"has values of {weight.dtype} and indices of {indices.dtype}"
        if len(weight.shape) != 1 or indices.shape != (2, weight.numel):
            return f"has shira_weight {weight.shape} and shira_indices {indices.shape}"
        return ""

    @property
    def count(self) -> int:
        """K."""
        return self.file.tensors[self.weight].numel

    def corner(self) -> tuple[int, int]:
        """One past the largest row and column index: the weight is at least this large."""
        rows, columns = self._read_indices()
        return int(rows.max()) + 1, int(columns.max()) + 1

    def load(self, shape: tuple[int, ...]) -> Entries:
        """Read the entries of a weight of `shape`.

        Raises:
            AdapterError: NONFINITE; ADAPTER_SHAPE if an index is out of range or occurs twice.
        """
        values = Rows.of(self.file, self.weight).load().flatten()
        rows, columns = self._read_indices()
        outside = (rows < 0) | (rows >= shape[0]) | (columns < 0) | (columns >= shape[1])
        flat = rows * shape[1] + columns
        order = np.argsort(flat, kind="stable")
        flat = flat[order]
        if outside.any():
            raise self._wrong(f"{int(outside.sum()):,} of its indices are out of range for {shape}")
        if repeated := int((flat[1:] == flat[:-1]).sum()):
            raise self._wrong(f"{repeated:,} of its indices occur twice")
        return flat, values[order]

    def _read_indices(self) -> NDArray[np.int64]:
        info = self.file.tensors[self.indices]
        raw = np.empty(info.nbytes, np.uint8)
        self.file.read_into(self.indices, 0, raw)
        return raw.view(_INDEX_DTYPES[info.dtype]).astype(np.int64).reshape(info.shape)

    def _wrong(self, what: str) -> AdapterError:
        where = self.file.folder / self.file.tensors[self.indices].file
        what = f"tensor {quote(self.indices)}: {what}"
        return AdapterError.of("ADAPTER_SHAPE", where, what, "save it again with PEFT")


def _check_config(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    refuse_unknown(path, raw, _FIELDS, "SHiRA", problems)
    check_kinds(path, raw, {"modules_to_save": (list,), "fan_in_fan_out": (bool,)}, problems)
    check_positive(path, "r", raw.get("r"), problems)


def _bind(binding: Binding, module: Module) -> None:
    """Bind the entries that SHiRA adds to a linear layer; it has no scale."""
    path, rank = module.path, binding.settings.rank
    if module.parts.keys() != {"weight", "indices"}:
        raise binding.wrong(path, f"has only shira_{', shira_'.join(module.parts)}")
    tensors = EntryTensors(binding.file, **module.parts)
    if tensors.fault:
        raise binding.wrong(path, tensors.fault)
    parameter = binding.require(path, f"{path}.weight")
    if parameter is None:
        return
    builder, wanted = binding.builder(parameter), rank * sum(parameter.shape)
    shape = builder.shape
    if len(parameter.pieces) > 1 or len(shape) != 2 or builder.new is not None:
        raise binding.wrong(path, "is not a separate linear layer of the base, and SHiRA supports nothing else")
    if tensors.count != wanted:
        what = f"has {tensors.count:,} values, and rank {rank} on the base's {shape} has {wanted:,}"
        raise binding.unlike_base(path, what)
    entries = Lazy(lambda: tensors.load(shape))
    builder.make = lambda: Sparse(shape, entries, builder.stored_as)


_ABOUT = About("SHiRA (arXiv:2406.13175)", "linear", "here", "rows", "W, with values added to some entries")

SHIRA = PeftType(TensorNames("shira_", ("weight", "indices")), _check_config, _bind, _ABOUT)
