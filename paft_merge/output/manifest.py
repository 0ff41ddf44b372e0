"""Reads `merge_manifest.json`, and compares a finished merge with it byte by byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from paft_merge.errors import AuditError, CheckpointError, Problem, Problems, reading
from paft_merge.inputs.adapter_places import PEFT_FILES
from paft_merge.inputs.checkpoint import Checkpoint, FarFile
from paft_merge.inputs.safetensors_header import read_text
from paft_merge.stores import Store, is_url

MANIFEST = "merge_manifest.json"
FORMAT = "paft_merge.manifest/1"
MOST_BYTES = 4_000_000_000
"""Largest manifest that is read: one row a tensor and source, 2.5 kB each, and one a pair."""


@dataclass(frozen=True)
class ManifestCheck:
    """The comparison of a finished merge with its manifest."""

    folder: Path | str
    manifest: Mapping[str, Any]
    tensors: int
    """Number of tensors whose bytes were compared."""
    nbytes: int
    """Number of bytes compared."""
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is unchanged since the merge."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return the output of `paft audit OUT --json`."""
        return {
            "schema": "paft_merge.audit.manifest/1",
            "folder": str(self.folder),
            "ok": self.ok,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "problems": [str(p) for p in self.problems],
            "totals": self.manifest.get("totals", []),
        }


def is_merged(folder: Path | str) -> bool:
    """Whether a folder, or the folder at a URL, holds the manifest of a finished merge."""
    if is_url(folder):
        return Store(str(folder)).info(MANIFEST) is not None
    return (Path(folder) / MANIFEST).is_file()


def verify(
    folder: Path | str,
    progress: Callable[[int, int, str], None] = lambda *_: None,
    manifest: Mapping[str, Any] | None = None,
    far: Mapping[str, FarFile] | None = None,
    where: str | None = None,
) -> ManifestCheck:
    """Compare a finished merge with its `merge_manifest.json`: names, dtypes, shapes, and the digest of every tensor.

    Args:
        folder: the output of `paft merge`.
        progress: called with bytes done, total bytes, and the name of the compared tensor.
        manifest: the manifest of another merge that should have the same result; default: the one in `folder`.
        far: remote files of the folder, as for `Checkpoint.open`.
        where: the name of the folder in messages; default: its path.

    Raises:
        AuditError: MANIFEST, it is missing or cannot be read.
        CheckpointError: the folder is not a complete checkpoint.
    """
    folder = Path(folder)
    named, where = where or folder, where or str(folder)
    manifest = read_manifest(folder / MANIFEST) if manifest is None else manifest
    problems, planned = Problems(), manifest["tensors"]
    is_adapter = dict(manifest["recipe"].get("output") or {}).get("kind") in ("adapter", "delta")
    with Checkpoint.open(folder / PEFT_FILES[0] if is_adapter else folder, far=far) as checkpoint:
        held, done = checkpoint.tensors, 0
        _compare_names(planned, held, where, problems)
        both = [name for name in planned if name in held]
        total = sum(held[n].nbytes for n in both)
        for name in both:
            entry, info = planned[name], held[name]
            if (entry["dtype"], tuple(entry["shape"])) != (info.dtype, info.shape):
                what = f"is {info.dtype} {list(info.shape)}, but was written as {entry['dtype']} {entry['shape']}"
                problems.add("MANIFEST", f"{where}: {name}", what, "merge again")
            if _digest_of(checkpoint, name, entry["block_bytes"]) != entry["digest"]:
                problems.add(
                    "MANIFEST", f"{where}: {name}", "its bytes differ from those that the merge wrote", "merge again"
                )
            done += info.nbytes
            progress(done, total, name)
    return ManifestCheck(named, manifest, len(both), done, tuple(problems.found))


def _digest_of(checkpoint: Checkpoint, name: str, tile_bytes: int) -> str:
    """The digest of a tensor: XXH3-128 over the XXH3-128 of its blocks of `tile_bytes`."""
    digest, nbytes = xxhash.xxh3_128(), checkpoint.tensors[name].nbytes
    held = memoryview(bytearray(min(tile_bytes, nbytes)))
    for start in range(0, nbytes, tile_bytes):
        block = held[: min(tile_bytes, nbytes - start)]
        checkpoint.read_into(name, start, block)
        digest.update(xxhash.xxh3_128_digest(block))
    return digest.hexdigest()


def _compare_names(planned: Mapping[str, Any], held: Mapping[str, Any], where: str, problems: Problems) -> None:
    for name in planned.keys() - held.keys():
        problems.add("MANIFEST", f"{where}: {name}", "is in the manifest but not in the checkpoint", "merge again")
    for name in held.keys() - planned.keys():
        problems.add("MANIFEST", f"{where}: {name}", "is in the checkpoint but not in the manifest", "merge again")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a finished merge.

    Raises:
        AuditError: MANIFEST, it cannot be read, or has another format.
    """
    fix = "give a folder that paft merge wrote, as it was written"
    try:
        with reading(path, "MANIFEST", AuditError, fix):
            manifest = json.loads(read_text(path, "MANIFEST", MOST_BYTES))
    except CheckpointError as error:
        raise AuditError.of("MANIFEST", path, error.problems[0].what, fix) from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(manifest, dict) or found != FORMAT:
        raise AuditError.of("MANIFEST", path, f"has the format {found!r}, but this version reads {FORMAT!r}")
    from paft_merge.output.manifest_schema import fault_of  # a merge only writes a manifest

    if fault := fault_of(manifest):
        raise AuditError.of("MANIFEST", path, f"is damaged: {fault}", fix)
    return manifest
