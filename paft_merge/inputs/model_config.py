"""The `config.json` of a model as plain data."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paft_merge.errors import CheckpointError
from paft_merge.inputs.links import refuse_links_out
from paft_merge.inputs.safetensors_header import MAX_JSON_BYTES, quote, read_text

_MOST_COUNT = 2_000_000
"""More layers, labels, heads or the like than any model has; classes of transformers make lists and modules of that length."""

_COUNTS = re.compile("layer|label|block|depth|head|expert")


_TEXT = (".json", ".jinja", ".txt", ".model")


OF_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json")
"""The files whose values transformers passes to the class of a tokenizer, which opens some of them as paths."""
_NO_PATH = re.compile("chat_template|name_or_path|auto_map|special_tokens_map_file|.*_tokens?|added_tokens_.*")
"""Keys of these files whose values are never opened."""


def refuse_outside_files(folder: Path) -> None:
    """Refuse a tokenizer whose settings name files outside its folder (`vocab: /home/...`), which transformers would read.

    Raises:
        CheckpointError: CONFIG_INVALID.
    """
    for path in (folder / name for name in OF_TOKENIZERS):
        try:
            settings = json.loads(read_text(path, "CONFIG_INVALID")) if path.exists() else {}
        except (ValueError, RecursionError):
            continue  # transformers does not read it either
        for key, value in settings.items() if isinstance(settings, dict) else ():
            for text in () if _NO_PATH.fullmatch(key) else _texts(value):
                if _is_outside(text, folder):
                    what, fix = f"{key} names a file outside the folder, {quote(text)}", f"remove {key}"
                    raise CheckpointError.of("CONFIG_INVALID", path, what, fix)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def _is_outside(text: str, folder: Path) -> bool:
    """Whether a text is the path of a file that is not in the folder: absolute, from the folder, or from the working directory."""
    if not ("/" in text or os.sep in text or Path(text).suffix):
        return False
    named = (folder / text, Path(text))
    return any(_is_file(path) and not _is_below(path, folder) for path in named)


def _is_file(path: Path) -> bool:
    """Whether something that can be opened is there."""
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def _is_below(path: Path, folder: Path) -> bool:
    """Whether a path leads into a folder. Links are not followed: the Hub's cache has its files behind links."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def refuse_odd_files(folder: Path) -> None:
    """Refuse what transformers or PEFT would read without an end (pipes, devices, large small files), or outside the folder.

    Raises:
        CheckpointError: CONFIG_INVALID, LINK_OUTSIDE.
    """
    refuse_links_out(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.exists() and not path.is_dir():
            if not path.is_file():
                raise CheckpointError.of("CONFIG_INVALID", path, "is not a regular file", "remove it")
            if path.suffix in _TEXT and path.stat().st_size > MAX_JSON_BYTES:
                what = f"is larger than {MAX_JSON_BYTES >> 20} MiB"
                raise CheckpointError.of("CONFIG_INVALID", path, what, "download it again, or remove it")
    refuse_outside_files(folder)


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
