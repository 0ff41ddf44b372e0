"""The `config.json` of a model as plain data."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from paft_merge.errors import CheckpointError
from paft_merge.inputs.safetensors_header import MAX_JSON_BYTES, read_text

_MOST_COUNT = 2_000_000
"""More layers, labels, heads or the like than any model has; classes of transformers make lists and modules of that length."""

_COUNTS = re.compile("layer|label|block|depth|head|expert")


_TEXT = (".json", ".jinja", ".txt", ".model")


def refuse_odd_files(folder: Path) -> None:
    """Refuse what transformers or PEFT would read from a folder without an end: pipes, devices, and large small files.

    Raises:
        CheckpointError: CONFIG_INVALID.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.exists() and not path.is_dir():
            if not path.is_file():
                raise CheckpointError.of("CONFIG_INVALID", path, "is not a regular file", "remove it")
            if path.suffix in _TEXT and path.stat().st_size > MAX_JSON_BYTES:
                what = f"is larger than {MAX_JSON_BYTES >> 20} MiB"
                raise CheckpointError.of("CONFIG_INVALID", path, what, "download it again, or remove it")


def read_model_config(folder: Path) -> dict[str, Any]:
    """Parse `config.json`; data only, no code that it names is run.

    Raises:
        CheckpointError: CONFIG_INVALID, it is not a JSON object, or counts parts of a model that no computer could build.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        return {}
    try:
        config = json.loads(read_text(path, "CONFIG_INVALID"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError.of("CONFIG_INVALID", path, f"is not JSON: {error}", "download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError.of("CONFIG_INVALID", path, "is not a JSON object")
    if large := _first_large_count(config):
        raise CheckpointError.of("CONFIG_INVALID", path, f"{large} is too large", "download it again")
    return config


def _first_large_count(config: Any) -> str:
    """A count of a config that is too large for a list or modules of that number, as classes of transformers make."""
    pairs = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in pairs:
        if isinstance(value, int) and value > _MOST_COUNT and _COUNTS.search(str(key)):
            return f"{key}: {value}"
        if found := _first_large_count(value):
            return found
    return ""
