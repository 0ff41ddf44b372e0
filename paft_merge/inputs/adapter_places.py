"""Where the adapter of a training run is: at the top of its folder, or in its `checkpoint-N` folders."""

from __future__ import annotations

import json
import re
from pathlib import Path

from paft_merge.errors import CheckpointError
from paft_merge.inputs.safetensors_header import read_text

PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
MLX_FILE = "adapters.safetensors"
CONFIG = "adapter_config.json"


def adapters_below(folder: Path) -> list[Path]:
    """The folders directly in `folder` that hold an adapter's tensors; the last checkpoint of a training run is last."""

    def step(path: Path) -> tuple[int, str]:
        found = re.search(r"(\d+)$", path.name)
        return (int(found[1]) if found else -1, path.name)

    try:
        inner = [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []
    held = [path for path in inner if any((path / name).is_file() for name in (*PEFT_FILES, MLX_FILE))]
    return sorted(held, key=step)


def hint(folder: Path, base: str = "") -> str:
    """What to write for a folder whose adapter is in folders below it; empty if there is none."""
    found = adapters_below(folder)
    if not found:
        return ""
    names = ", ".join(path.name for path in found[:-1][-4:])
    numbered = all(path.name[-1:].isdigit() for path in found)
    others = f" (or {'an earlier' if numbered else 'another'} one: {names})" if names else ""
    return f"write {f'{base}+' if base else ''}{found[-1]}{others}"


def base_of(folder: Path, otherwise: str = "BASE") -> str:
    """The base that an adapter in `folder`, or in the last folder below it, names; `otherwise` if none does."""
    for place in (folder, *reversed(adapters_below(folder))):
        try:
            raw = json.loads(read_text(place / CONFIG, "ADAPTER_CONFIG"))
        except (CheckpointError, ValueError, RecursionError):
            continue
        name = raw.get("base_model_name_or_path") or raw.get("model") if isinstance(raw, dict) else None
        if isinstance(name, str) and name:
            return name
    return otherwise
