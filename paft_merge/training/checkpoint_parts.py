"""Whether a checkpoint of transformers' trainer is whole: a torn or missing part would change a resumed run."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt, ValidationError

from paft_merge.inputs.safetensors_header import read_text

_STATE = "trainer_state.json"
_WEIGHTS = "adapter_model.safetensors"
_LAST = 8
"""Bytes of the length of a safetensors header."""


class _TrainerState(BaseModel):
    """The fields of `trainer_state.json` that transformers and our callbacks use, as far as a file has them."""

    global_step: NonNegativeInt = 0
    train_batch_size: int = 0
    logging_steps: float = 0
    save_steps: float = 0
    eval_steps: float | None = None
    total_flos: float = 0
    log_history: list[dict[str, Any]] = []
    best_model_checkpoint: str | None = None
    stateful_callbacks: dict[str, Any] = {}


def missing_part(checkpoint: Path, others: Iterable[Path], processes: int = 1) -> str:
    """What a checkpoint lacks, or which of its files is damaged; empty if it is whole.

    Args:
        checkpoint: A folder `checkpoint-N`.
        others: Checkpoints of the same run: each of their files must be here too (such as the scaler of fp16).
        processes: Number of processes, each with a state of its random numbers.
    """
    try:
        names = {*os.listdir(checkpoint)}
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
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    if checkpoint.name != f"checkpoint-{state.get('global_step')}" or not isinstance(
        state.get("train_batch_size"), int
    ):
        return f"{_STATE} is not the state of its step"
    for file in (file for folder in checkpoint.iterdir() if folder.is_dir() for file in folder.rglob("*")):
        if file.is_file() and not file.stat().st_size:
            return f"{file.relative_to(checkpoint)} is empty"
    return ""


def _files(checkpoint: Path) -> list[Path]:
    """The files that a resumed run reads."""
    suffixes = (".pt", ".pth", ".safetensors", ".bin")
    return sorted(f for f in checkpoint.glob("*") if f.suffix in suffixes or f.name == _STATE)


def file_fault(file: Path) -> str:
    """What is wrong with one file: missing, empty, torn or with other bytes than were written; empty if nothing is."""
    try:
        size = file.stat().st_size
        if not file.is_file():
            return f"{file.name} is not a file"
        if not size:
            return f"{file.name} is empty"
        if file.suffix == ".json":
            data = json.loads(read_text(file, "RESUME"))
            if not isinstance(data, dict):
                return f"{file.name} is not a mapping"
            return _state_fault(data) if file.name == _STATE else ""
        if file.suffix == ".safetensors":
            return _safetensors_fault(file)
        with zipfile.ZipFile(file) as archive:  # the format of torch.save, with a checksum of every record
            whole = not archive.testzip() and any(name.endswith("/data.pkl") for name in archive.namelist())
        return "" if whole else f"{file.name} is damaged"
    except OSError as error:
        return f"{file.name} is missing" if isinstance(error, FileNotFoundError) else f"{file.name} cannot be read"
    except Exception:  # parsers raise anything
        return f"{file.name} is damaged"


def _state_fault(state: dict[str, Any]) -> str:
    try:
        _TrainerState.model_validate(state)
    except ValidationError as error:
        return f"{_STATE} has a wrong value of {error.errors()[0]['loc'][0]}"
    return ""


def _safetensors_fault(file: Path) -> str:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_LAST), "little")
        size = file.stat().st_size
        header = json.loads(opened.read(length)) if 0 < length <= size - _LAST else None
    if not isinstance(header, dict):
        return f"{file.name} is damaged"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return "" if max(ends, default=0) == size - _LAST - length else f"{file.name} is cut short"
