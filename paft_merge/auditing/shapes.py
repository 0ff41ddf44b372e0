"""A base of which only names and shapes are known, so that an adapter can be audited from its own files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

from paft_merge.adapters.config import CONFIG
from paft_merge.adapters.keys import Keys, sort_keys
from paft_merge.checkpoint import Checkpoint, TensorInfo
from paft_merge.errors import AuditError, Problems
from paft_merge.headers import ByteBuffer, as_bytes

NO_BASE = Path("(no base)")
"""Where such a base says it lies."""

Shapes = dict[str, tuple[int, ...]]


class ShapesOnly(Checkpoint):
    """A base without weights: every tensor reads as zeros, which is right for all that only looks at a LoRA's delta."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(NO_BASE, (), {}, {})
        names = sorted(shapes, key=natural)
        self.tensors = {n: TensorInfo(n, "F32", shapes[n], "", 0, prod(shapes[n]) * 4) for n in names}

    def read_into(self, name: str, start: int, buffer: ByteBuffer) -> None:
        """Fill `buffer` with zeros."""
        as_bytes(buffer)[:] = bytes(len(as_bytes(buffer)))


def shapes_of(folder: Path, tokens: Iterable[int] = ()) -> Shapes:
    """Name and shape of every tensor that the adapter in `folder` changes, as far as its own header tells.

    Args:
        folder: holds `adapter_model.safetensors`.
        tokens: rows that the adapter replaces one by one; the embedding has at least as many.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise AuditError.of("ADAPTER_CONFIG", path, "no such file", f"give a folder that holds it beside {CONFIG}")
    with Checkpoint.open(path) as file:
        keys = sort_keys(file.tensors, folder, Problems())
        held = {name: info.shape for name, info in file.tensors.items()}
    return {**_of_factors(keys, held), **_of_rows(keys, held, max(tokens, default=-1) + 1), **_of_whole(keys, held)}


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 10 behind layer 9."""
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


def _of_rows(keys: Keys, held: Shapes, rows: int) -> Shapes:
    return {f"{path}.weight": (rows, held[key][-1]) for path, key in keys.tokens.items()}


def _of_whole(keys: Keys, held: Shapes) -> Shapes:
    return {saved.names[0]: held[saved.key] for saved in keys.saved}
