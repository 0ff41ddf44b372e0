"""Checks of a GGUF file that a converter wrote: complete, and with the layers, entries and template of the model."""

from __future__ import annotations

from collections.abc import Set
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from paft_merge.errors import OutputError, Problem

_MAGIC = b"GGUF"
_LOST = 0.02
"""Share of entries that a converter may leave out or add: masks, frequencies of RoPE, a tied head, padding of the vocabulary."""


class Expected(NamedTuple):
    """What a file must hold.

    Attributes:
        entries: numbers of entries that its tensors may have: those of the model, with and without the copy of a tied head.
        layers: its number of layers, if its config states one.
        template: its chat template.
    """

    entries: Set[int]
    layers: int | None
    template: str | None


def check(path: Path, expected: Expected) -> list[Problem]:
    """Check a file of a model, and return warnings.

    Raises:
        OutputError: EXPORT_CHECK, it is not GGUF, it is cut, or something is missing in it.
    """
    entries, layers, template = expected
    if (reader := _opened(path)) is None:
        what = "was checked for its first bytes alone: the package gguf is not installed"
        return [Problem("EXPORT_CHECK", str(path), what, "pip install 'paft-merge[gguf]'")]
    fields = reader.fields
    kind = text_of(fields.get("general.architecture"))
    if not kind:
        raise _wrong(path, "names no architecture")
    blocks = fields.get(f"{kind}.block_count")
    if layers is not None and blocks is not None and int(blocks.contents()) < layers:
        raise _wrong(path, f"has {int(blocks.contents())} layers, and the model has {layers}")
    found = sum(int(tensor.n_elements) for tensor in reader.tensors)
    if all(abs(found - wanted) > _LOST * wanted for wanted in entries):
        raise _wrong(path, f"has {found:,} entries in its tensors, and the model has {max(entries):,}")
    held = text_of(fields.get("tokenizer.chat_template")) or ""
    if (template or "").strip() != held.strip():
        what = "has another chat template than the model" if held else "has no chat template, and the model has one"
        return [Problem("EXPORT_CHECK", str(path), what, "compare what both make of a prompt before you publish it")]
    return []


def check_adapter(path: Path, modules: int) -> list[Problem]:
    """Check a file of a LoRA: it has both factors of every module. `modules`: how many the adapter has."""
    if (reader := _opened(path)) is None:
        what = "was checked for its first bytes alone: the package gguf is not installed"
        return [Problem("EXPORT_CHECK", str(path), what, "pip install 'paft-merge[gguf]'")]
    if text_of(reader.fields.get("adapter.type")) != "lora":
        raise _wrong(path, "is not a LoRA")
    names = [tensor.name for tensor in reader.tensors]
    pairs = [sum(name.endswith(end) for name in names) for end in (".lora_a", ".lora_b")]
    if pairs != [modules, modules]:
        raise _wrong(path, f"has factors of {min(pairs)} modules, and the adapter has {modules}")
    return []


def _opened(path: Path) -> Any:
    """A reader of the package gguf; None without it."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        raise _wrong(path, "was not written, although the converter ended without an error") from None
    if start != _MAGIC:
        raise _wrong(path, "is not a GGUF file")
    if not find_spec("gguf"):
        return None
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # numpy and the reader raise anything on a file that is cut
        raise _wrong(path, f"cannot be read by the package gguf: {type(error).__name__}: {str(error)[:200]}") from error


def text_of(field: Any) -> str | None:
    """The text of a field; None without one."""
    value = field.contents() if field is not None else None
    return value if isinstance(value, str) else None


def _wrong(path: Path, what: str) -> OutputError:
    return OutputError.of("EXPORT_CHECK", path.name, what, "update llama.cpp, and run it again")
