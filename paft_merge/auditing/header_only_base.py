"""A base whose names and shapes are known but not its weights, so that an adapter can be audited from its own files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from paft_merge.errors import AuditError, Problems
from paft_merge.inputs.adapters import open_weights
from paft_merge.inputs.adapters.keys import Keys
from paft_merge.inputs.adapters.peft_types import sort_keys
from paft_merge.inputs.adapters.shira import EntryTensors
from paft_merge.inputs.checkpoint import Checkpoint, TensorInfo
from paft_merge.inputs.safetensors_header import ByteBuffer, as_bytes

NO_BASE = Path("(no base)")
"""The folder of a base without files, for messages."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Known:
    """Facts about the base from the file of one adapter."""

    shapes: Shapes
    copies: Mapping[str, str]
    """Weights of the base that the file holds a copy of (PEFT saves embeddings so): their name in the base to their key."""


class ShapesOnly(Checkpoint):
    """A base without weights: tensors read as zeros, which is enough for metrics of a LoRA's delta alone.

    Where an adapter holds a copy of the base's weight, that copy is read.

    Args:
        known: facts from each adapter, with its open file.
        headers: the base where it is known; only its names, types and shapes are used.
    """

    def __init__(self, known: Sequence[tuple[Known, Checkpoint]], headers: Checkpoint | None = None) -> None:
        super().__init__(headers.folder if headers else NO_BASE, (), headers.config if headers else {}, {})
        shapes = {name: shape for one, _ in known for name, shape in one.shapes.items()}
        self._copies = {name: (file, key) for one, file in known for name, key in one.copies.items()}
        if headers:
            self.tensors = {name: self._stored(info) for name, info in headers.tensors.items()}
        else:
            self.tensors = {name: self._info(name, shapes[name]) for name in sorted(shapes, key=natural)}

    def read_into(self, name: str, start: int, buffer: ByteBuffer) -> None:
        """Fill `buffer` with zeros, or from the copy."""
        if name in self._copies:
            file, key = self._copies[name]
            file.read_into(key, start, buffer)
        else:
            as_bytes(buffer)[:] = bytes(len(as_bytes(buffer)))

    def _stored(self, info: TensorInfo) -> TensorInfo:
        """The base's tensor, or an adapter's copy of the same shape."""
        copy = self._info(info.name, info.shape) if info.name in self._copies else info
        if copy.shape == info.shape:
            return copy
        del self._copies[info.name]  # with more rows it is a new value, which the adapter replaces
        return info

    def _info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        if name in self._copies:
            file, key = self._copies[name]
            return replace(file.tensors[key], name=name)
        return TensorInfo(name, "F32", shape, "", 0, prod(shape) * 4)


def known_of(folder: Path, tokens: Iterable[int] = (), rank: int = 1, *, unpickle: bool = False) -> Known:
    """Name and shape of every tensor that the adapter in `folder` changes, from its header.

    Args:
        folder: holds `adapter_model.safetensors`, or `adapter_model.bin` with `unpickle`.
        tokens: rows that the adapter replaces one by one; the embedding has at least as many.
        rank: `r` of its configuration, by which SHiRA counts its entries.
        unpickle: as for `Adapter.open`.

    Raises:
        AuditError, CheckpointError: the file is missing or cannot be read, or does not determine a shape (NO_BASE).
    """
    with open_weights(folder, unpickle=unpickle) as file:
        keys = sort_keys(file.tensors, folder, Problems())
        sparse = _of_sparse(keys, file, rank)
        held = {name: info.shape for name, info in file.tensors.items()}
    rows = _of_rows(keys, held, max(tokens, default=-1) + 1)
    copies = {s.names[0]: s.key for s in keys.saved if s.is_base_layer and s.names[0] in _of_factors(keys, held)}
    return Known({**_of_factors(keys, held), **rows, **_of_whole(keys, held), **sparse}, copies)


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _of_factors(keys: Keys, held: Shapes) -> Shapes:
    found: Shapes = {}
    for module in keys.modules.values():
        parts = {part: held[key] for part, key in module.parts.items()}
        if "embedding_A" in parts and "embedding_B" in parts:
            found[f"{module.path}.weight"] = (parts["embedding_A"][-1], parts["embedding_B"][0])
        elif "A" in parts and "B" in parts:
            found[f"{module.path}.weight"] = (parts["B"][0], *parts["A"][1:])
        if "B.bias" in parts:
            found[f"{module.path}.bias"] = parts["B.bias"]
    return found


def _of_sparse(keys: Keys, file: Checkpoint, rank: int) -> Shapes:
    """Shapes of SHiRA weights: of r (rows + columns) entries, where they reach the last row and column."""
    found: Shapes = {}
    for (path, _), module in keys.modules.items():
        if module.parts.keys() != {"weight", "indices"} or (held := EntryTensors(file, **module.parts)).fault:
            continue  # opening the adapter reports it
        rows, columns = held.corner()
        if held.count != rank * (rows + columns):
            what = f"the entries of {path} do not determine its shape"
            raise AuditError.of("NO_BASE", file.folder, what, "pass base=...")
        found[f"{path}.weight"] = rows, columns
    return found


def _of_rows(keys: Keys, held: Shapes, rows: int) -> Shapes:
    return {f"{path}.weight": (rows, held[key][-1]) for path, key in keys.tokens.items()}


def _of_whole(keys: Keys, held: Shapes) -> Shapes:
    return {saved.names[0]: held[saved.key] for saved in keys.saved}
