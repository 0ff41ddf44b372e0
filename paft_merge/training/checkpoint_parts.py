"""Whether a checkpoint of transformers' trainer is whole: a torn or missing part would change a resumed run."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

_STATE = "trainer_state.json"
_WEIGHTS = "adapter_model.safetensors"
_LAST = 8
"""Bytes of the length of a safetensors header."""


def missing_part(checkpoint: Path, others: Iterable[Path], processes: int = 1) -> str:
    """What a checkpoint lacks, or which of its files is damaged; empty if it is whole.

    Args:
        checkpoint: A folder `checkpoint-N`.
        others: Checkpoints of the same run: each of their files must be here too (such as the scaler of fp16).
        processes: Number of processes, each with a state of its random numbers.
    """
    try:
        names = {entry.name for entry in os.scandir(checkpoint)}
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    sharded = any(name.startswith(("pytorch_model_fsdp", "global_step", "optimizer_")) for name in names)
    rng = [f"rng_state_{i}.pth" for i in range(processes)] if processes > 1 else ["rng_state.pth"]
    wanted = {_STATE, *rng, *([] if sharded else [_WEIGHTS, "optimizer.pt", "scheduler.pt"])}
    wanted |= {file.name for other in others for file in _files(other)}
    for name in sorted(wanted):
        if name not in names:
            return f"{name} is missing"
    for file in _files(checkpoint):
        if fault := file_fault(file):
            return fault
    for file in (file for folder in checkpoint.iterdir() if folder.is_dir() for file in folder.rglob("*")):
        if file.is_file() and not file.stat().st_size:
            return f"{file.relative_to(checkpoint)} is empty"
    return ""


def _files(checkpoint: Path) -> list[Path]:
    """The files that a resumed run reads."""
    suffixes = (".pt", ".pth", ".safetensors", ".bin")
    return sorted(f for f in checkpoint.glob("*") if f.is_file() and (f.suffix in suffixes or f.name == _STATE))


def file_fault(file: Path) -> str:
    """What is wrong with one file: missing, empty, torn or with other bytes than were written; empty if nothing is."""
    try:
        if not file.stat().st_size:
            return f"{file.name} is empty"
        if file.suffix == ".json":
            return (
                ""
                if isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
                else f"{file.name} is not a mapping"
            )
        if file.suffix == ".safetensors":
            return _safetensors_fault(file)
        with zipfile.ZipFile(file) as archive:  # the format of torch.save, with a checksum of every record
            damaged = archive.testzip()
        return f"{file.name} is damaged" if damaged else ""
    except OSError as error:
        return f"{file.name} is missing" if isinstance(error, FileNotFoundError) else f"{file.name} cannot be read"
    except (ValueError, zipfile.BadZipFile, RecursionError, EOFError):
        return f"{file.name} is damaged"


def _safetensors_fault(file: Path) -> str:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_LAST), "little")
        size = file.stat().st_size
        header = json.loads(opened.read(length)) if 0 < length <= size - _LAST else None
    if not isinstance(header, dict):
        return f"{file.name} is damaged"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return "" if max(ends, default=0) == size - _LAST - length else f"{file.name} is cut short"
