"""The model card of a merge, made from its manifest alone, so that it says what is so and can be made again.

| room | what it is |
|---|---|
| metadata | what the Hub's widgets read: base models, licence, tags, data sets, results |
| page | the text: sources with their revisions, what was measured, the recipe, how to reproduce it |
| plot | the sparsity of each source along the layers, as a picture |

A card ends with a digest of itself. One that a person has edited is not overwritten unless they say so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from paft_merge.errors import OutputError, Problem
from paft_merge.output.card.markdown import page
from paft_merge.output.card.metadata import about, licence, scores_in
from paft_merge.output.card.plot import PICTURE, draw
from paft_merge.output.manifest import MANIFEST, read_manifest

__all__ = ["about", "licence", "model_card", "write_card"]

CARD = "README.md"
_MARK = re.compile(r"\n<!-- paft_merge: ([0-9a-f]{32}) -->\n$")


def model_card(manifest: Mapping[str, Any], folder: Path | None = None) -> str:
    """README.md of a merge.

    Args:
        manifest: of the merge.
        folder: where its evaluation results and its picture lie, if it has them.
    """
    picture = folder is not None and (folder / PICTURE).is_file()
    text = page(manifest, scores_in(folder) if folder else [], PICTURE if picture else None)
    return f"{text}\n<!-- paft_merge: {_digest(text)} -->\n"


def write_card(folder: Path, *, overwrite: bool = False) -> list[Problem]:
    """Write the card of a finished merge anew, with its picture where matplotlib is installed.

    Args:
        folder: as `paft merge` wrote it; the results of an evaluation may lie in it as `evaluation.json` or `results*.json`.
        overwrite: replace a card that somebody has edited.

    Returns:
        What a reader of the card should know: licences that differ.

    Raises:
        OutputError: CARD_EDITED, the card is not as it was written. AuditError: MANIFEST, there is none.
    """
    manifest, card = read_manifest(folder / MANIFEST), folder / CARD
    if card.is_file() and not overwrite and is_edited(card.read_text(encoding="utf-8")):
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
    """Whether a card is anything else than what `model_card` once made."""
    mark = _MARK.search(text)
    return mark is None or mark[1] != _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
