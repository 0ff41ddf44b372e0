"""The model card of a merge, generated from its manifest.

| module | content |
|---|---|
| metadata | metadata for the Hub: base models, licence, tags, data sets, results |
| markdown | the text: sources with their revisions, statistics, the recipe, how to reproduce the merge |
| verified | what `paft verify` found |
| plot | a picture of the sparsity of each source by layer |

A card ends with its digest, so that an edited card is recognised and not overwritten without permission.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from paft_merge.errors import OutputError, Problem
from paft_merge.inputs.safetensors_header import read_text
from paft_merge.output.card.markdown import page
from paft_merge.output.card.metadata import about, licence, scores_in
from paft_merge.output.card.plot import PICTURE, draw
from paft_merge.output.card.verified import verified_in
from paft_merge.output.manifest import MANIFEST, read_manifest

__all__ = ["about", "licence", "model_card", "write_card"]

CARD = "README.md"
_MARK = re.compile(r"\n<!-- paft_merge: ([0-9a-f]{32}) -->\n$")


def model_card(manifest: Mapping[str, Any], folder: Path | None = None) -> str:
    """Return the README.md of a merge.

    Args:
        manifest: the manifest of the merge.
        folder: the folder of its evaluation results, its verification and its picture, if any.
    """
    picture = folder is not None and (folder / PICTURE).is_file()
    scores, verified = (scores_in(folder), verified_in(folder)) if folder else ([], {})
    text = page(manifest, scores, PICTURE if picture else None, verified)
    return f"{text}\n<!-- paft_merge: {_digest(text)} -->\n"


def write_card(folder: Path, *, overwrite: bool = False) -> list[Problem]:
    """Write the card of a finished merge, with its picture if matplotlib is installed.

    Args:
        folder: the output of `paft merge`, perhaps with evaluation results as `evaluation.json` or `results*.json`.
        overwrite: replace a card that was edited.

    Returns:
        Warnings: licences that differ.

    Raises:
        OutputError: CARD_EDITED, the card was edited.
        AuditError: MANIFEST, the manifest is missing or cannot be read.
        CheckpointError: CARD, the card that is there is too large, or is not UTF-8 text.
    """
    manifest, card = read_manifest(folder / MANIFEST), folder / CARD
    if card.is_file() and not overwrite and is_edited(read_text(card, "CARD")):
        what = "was edited since it was written"
        raise OutputError.of("CARD_EDITED", card, what, "pass overwrite=True to replace it")
    made = card.with_name(f"{CARD}.tmp")
    try:
        draw(manifest, folder)
        made.write_text(model_card(manifest, folder), encoding="utf-8")
        os.replace(made, card)
    except OSError as error:
        raise OutputError.of("OUTPUT", card, f"cannot be written: {error.strerror}") from error
    return licence(manifest)[1]


def is_edited(text: str) -> bool:
    """Whether a card differs from the output of `model_card` when it was written."""
    mark = _MARK.search(text)
    return mark is None or mark[1] != _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
