"""Sparse deltas, which `output: {kind: delta}` writes: the entries of a merged delta that are not zero, for any tensor.

The folder has the files of an adapter, so that everything that reads adapters reads it. A changed tensor NAME of the base,
of shape `[*R, I]`, is stored in the smaller of two forms:

| tensors | content |
|---|---|
| `NAME.mask` | uint8 `[*R, ceil(I / 8)]`: bit `i % 8` of byte `i // 8` of a row is set where its entry `i` is not zero |
| `NAME.values` | `[K]`: the entries that are not zero, in C order |
| `NAME.delta` | `[*R, I]`: all entries, in place of the two |

Rows of the mask begin with a byte of their own, as in the bitmask format of compressed-tensors, so that any rows can be read
alone. N = rows, I = entries of a row, M = bytes of a row's mask, K = entries that are not zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from paft_merge.errors import AdapterError, Problems
from paft_merge.inputs.adapters.binding import OTHER_BASE, Binding, PeftType
from paft_merge.inputs.adapters.config import INERT, Settings, check_kinds, refuse_unknown
from paft_merge.inputs.adapters.deltas import AdapterDelta, Lazy
from paft_merge.inputs.adapters.keys import Keys, Module, TensorNames
from paft_merge.inputs.adapters.rows import Array, Rows
from paft_merge.inputs.architecture import StoredParameter
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.dtypes import DTYPES
from paft_merge.inputs.safetensors_header import join_first, quote

NAME = "SPARSE_DELTA"
"""The `peft_type` in adapter_config.json; PEFT does not know it, and refuses the folder."""

FORMAT = 1
"""`delta_format` in adapter_config.json: the version of the layout above."""

PARTS = ("mask", "values", "delta")
"""Ends of the names of the stored tensors."""

_FIELDS = INERT | {"delta_format", "base_layout", "unties", "dtype", "entries", "kept", "sources"}
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.int64)
"""The number of set bits of every byte."""

_LOST = "it is damaged: write it again"


def row_of(shape: tuple[int, ...]) -> int:
    """I: entries of a row, which is the last dimension; 1 for a scalar."""
    return max(shape[-1], 1) if shape else 1


def mask_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the mask of a tensor of `shape`."""
    return (*shape[:-1], -(-row_of(shape) // 8))


def pack(filled: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The mask `[N, M]` of rows `[N, I]` whose stored entries are marked."""
    return np.packbits(filled, axis=1, bitorder="little")


def layout_of(base: Checkpoint) -> str:
    """A digest of the shapes of all tensors of a base, whatever their names, types and files."""
    shapes = sorted(list(info.shape) for info in base.tensors.values())
    return xxhash.xxh3_128_hexdigest(json.dumps(shapes).encode())


class SparseDelta(AdapterDelta):
    """A delta of which a file holds the entries that are not zero; they are read row by row.

    Args:
        shape: that of the base's tensor.
        mask: rows `[N, M]` uint8.
        values: the entries, one a row, `[K, 1]`.
    """

    def __init__(self, shape: tuple[int, ...], mask: Rows, values: Rows, stored_as: str | None = None) -> None:
        super().__init__(shape, row_of(shape), "sparse", stored_as)
        self._mask, self._values = mask, values
        self._starts = Lazy(self._count)

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        starts, filled = self._starts.get(), self._filled(start, stop)
        places = np.flatnonzero(np.unpackbits(filled, axis=1, count=self.row_size, bitorder="little"))
        out[:] = 0
        out.reshape(-1)[places] = self._values.read(int(starts[start]), int(starts[stop])).reshape(-1)

    def release(self) -> None:
        self._starts.release()

    def _filled(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows `[start, stop)` of the mask, `[N, M]`."""
        held = np.empty((stop - start, self._mask.row_size), np.uint8)
        self._mask.file.read_into(self._mask.name, start * self._mask.row_size, held)
        return held

    def _count(self) -> NDArray[np.int64]:
        """The place of each row's first entry, and after the last row K: `[N + 1]`.

        Raises:
            AdapterError: ADAPTER_SHAPE, the mask does not fit the entries.
        """
        starts = np.zeros(self._mask.count + 1, np.int64)
        unused = 0xFF << (self.row_size - 1) % 8 + 1 & 0xFF
        for start, stop in self._mask.blocks():
            filled = self._filled(start, stop)
            if (filled[:, -1] & unused).any():
                raise self._wrong("has set bits past the end of a row")
            starts[start + 1 : stop + 1] = _BITS[filled].sum(1)
        np.cumsum(starts, out=starts)
        if starts[-1] != self._values.count:
            raise self._wrong(f"has {starts[-1]:,} set bits, and there are {self._values.count:,} values")
        return starts

    def _wrong(self, what: str) -> AdapterError:
        where = self._mask.file.folder / self._mask.file.tensors[self._mask.name].file
        return AdapterError.of("ADAPTER_SHAPE", where, f"tensor {quote(self._mask.name)} {what}", _LOST)


class DenseDelta(AdapterDelta):
    """A delta of which a file holds all entries; they are read row by row."""

    def __init__(self, shape: tuple[int, ...], values: Rows, stored_as: str | None = None) -> None:
        super().__init__(shape, row_of(shape), "sparse", stored_as)
        self._values = values

    def compute(self, start: int, stop: int, weight: Array | None, out: Array) -> None:
        out[:] = self._values.read(start, stop)

    def release(self) -> None:
        """Nothing is cached."""


def sort_sparse(keys: Iterable[str], where: object, problems: Problems) -> Keys:
    """Sort tensor names by the tensor of the base that they change."""
    found, unknown = Keys(), list[str]()
    for key in keys:
        name, _, part = key.rpartition(".")
        if not name or part not in PARTS:
            unknown.append(key)
            continue
        module = found.modules.setdefault((name, 0), Module(NAME, name))
        module.parts[part] = key
    if unknown:
        what = f"has tensors that are not of a sparse delta: {join_first(unknown)}"
        problems.add("ADAPTER_UNUSED", where, what, _LOST)
    return found


def unties_of(settings: Settings) -> dict[str, str]:
    """The tensors that the merge cut from another one, each with the base's tensor to whose value its delta is added."""
    return dict(settings.raw.get("unties") or {})


def _check_config(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    if raw.get("delta_format") != FORMAT:
        what = f"delta_format: this version reads {FORMAT}, got {raw.get('delta_format')!r}"
        problems.add("ADAPTER_UNSUPPORTED", path, what, "update paft-merge, or write the delta again")
        return
    refuse_unknown(path, raw, _FIELDS, "a sparse delta", problems)
    check_kinds(path, raw, {"base_layout": (str,)}, problems)
    unties = raw.get("unties")
    if unties is not None and not (isinstance(unties, dict) and all(isinstance(name, str) for name in unties.values())):
        problems.add("ADAPTER_CONFIG", path, f"unties: must map names of tensors to names, got {unties!r}")


def _bind(binding: Binding, module: Module) -> None:
    """Bind the delta of one tensor, whose full name is the module's path."""
    name, parts = module.path, module.parts
    _check_base(binding)
    if parts.keys() not in ({"mask", "values"}, {"delta"}):
        raise binding.wrong(
            name, f"has {', '.join(sorted(parts))}, and needs mask and values, or delta alone", fix=_LOST
        )
    tied_to = unties_of(binding.settings).get(name, "")
    if name not in binding.base.tensors and tied_to in binding.base.tensors:
        parameter: StoredParameter | None = StoredParameter.whole(name, binding.base.tensors[tied_to].shape, tied_to)
    else:
        parameter = binding.require(name, name)
    if parameter is None:
        return
    builder, infos = binding.builder(parameter), {part: binding.file.tensors[key] for part, key in parts.items()}
    shape = builder.shape
    if len(parameter.pieces) > 1:
        what = "is stored in several tensors of the base, and a sparse delta is of one"
        raise binding.wrong(name, what, "ADAPTER_UNSUPPORTED", "use the base that it was made on")
    if "delta" in infos:
        values = binding.rows(parts["delta"], row_of(shape))
        if infos["delta"].shape != shape:
            raise binding.unlike_base(name, f"has a delta {infos['delta'].shape}, and the base has {shape}")
        builder.make = lambda: DenseDelta(shape, values, builder.stored_as)
        return
    mask, entries = infos["mask"], infos["values"]
    if mask.dtype != "U8" or len(entries.shape) != 1 or not DTYPES[entries.dtype].mergeable:
        what = f"has a mask of {mask.dtype} and values of {entries.dtype} {entries.shape}"
        raise binding.wrong(name, what, fix=_LOST)
    if mask.shape != mask_shape(shape) or entries.numel > math.prod(shape):
        what = f"has a mask {mask.shape} and {entries.numel:,} values, and the base has {shape}"
        raise binding.unlike_base(name, what)
    bits, values = Rows.of(binding.file, parts["mask"], mask.shape[-1]), binding.rows(parts["values"], 1)
    builder.make = lambda: SparseDelta(shape, bits, values, builder.stored_as)


def _check_base(binding: Binding) -> None:
    """Check once that the base has the shapes of the one that the delta was made on."""
    wanted = binding.settings.raw.get("base_layout")
    if "layout" in binding.made or not wanted:
        return
    binding.made["layout"] = layout_of(binding.base)
    if binding.made["layout"] != wanted:
        what = f"was made on a base with tensors of other shapes than {binding.base.folder}"
        fix = f"{OTHER_BASE} If it fits nevertheless, remove base_layout from its adapter_config.json"
        raise AdapterError.of("ADAPTER_TARGET", binding.file.folder, what, fix)


SPARSE_DELTA = PeftType(TensorNames("", PARTS), _check_config, _bind)
