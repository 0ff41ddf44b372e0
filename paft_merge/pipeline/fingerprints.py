"""Digests (xxh3-128) of the files and data that a step depends on, so that an unchanged step is not repeated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from paft_merge.hub import SIDE_FILES

_CHUNK = 8 << 20
_NO_PART = (".part", ".lock", ".tmp")


def key_of(**parts: Any) -> str:
    """Digest of plain data, independent of the order of keys."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode())


def file_print(path: Path) -> str:
    """Digest of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class Prints:
    """Digests of files and folders, each read once in a run."""

    def __init__(self) -> None:
        self.known: dict[Path, str] = {}

    def of(self, path: Path | str) -> str:
        """Digest of a file, or of the names and bytes in a folder; of anything else, its name."""
        place = Path(path).expanduser()
        if not place.exists():
            return f"name:{path}"
        real = place.resolve()
        if real not in self.known:
            self.known[real] = file_print(real) if real.is_file() else key_of(files=dict(self._below(real)))
        return self.known[real]

    def of_adapter(self, folder: Path) -> str:
        """Digest of an adapter's own files: its config, weights and tokenizer, without checkpoints and optimizer states."""
        files = {p for pattern in ("adapter_*", *SIDE_FILES) for p in folder.glob(pattern) if p.is_file()}
        return key_of(files={p.name: self.of(p) for p in files})

    def _below(self, folder: Path) -> Iterable[tuple[str, str]]:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            hidden = any(part.startswith((".", "__pycache__")) for part in name.parts)
            if path.is_file() and not hidden and path.suffix not in _NO_PART:
                yield name.as_posix(), self.of(path)

    def all_of(self, paths: Mapping[str, Path | str]) -> dict[str, str]:
        """Digests by name."""
        return {name: self.of(path) for name, path in paths.items()}


def sizes_below(out: Path) -> dict[str, int]:
    """The files of an output and their sizes, for `still_there`."""
    if out.is_file():
        return {"": out.stat().st_size}
    return {p.relative_to(out).as_posix(): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}


def still_there(out: Path, sizes: Mapping[str, int]) -> bool:
    """Whether every file of an output still has its size."""
    return bool(sizes) and all(
        (out / name).is_file() and (out / name).stat().st_size == size for name, size in sizes.items()
    )
