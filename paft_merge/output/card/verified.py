"""The section of a card about `paft verify`, from the report in the folder of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paft_merge.errors import CheckpointError
from paft_merge.inputs.safetensors_header import read_text
from paft_merge.output.card.metadata import is_number

REPORT = "verify.json"
FORMAT = "paft_merge.verify/1"
_NAMES = {"recipe": "the recipe in float32", "base": "the base", "adapter": "the adapter, not merged"}


def verified_in(folder: Path) -> dict[str, Any]:
    """The report in a folder; empty without one that can be read."""
    file = folder / REPORT
    if not file.is_file():
        return {}
    try:
        found = json.loads(read_text(file, "CARD"))
    except (CheckpointError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and found.get("schema") == FORMAT else {}


def rows_of(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """For each model that was compared: its name, the mean KL, the share of equal choices, and the largest drift of a layer."""
    behaviour = report.get("behaviour")
    found = []
    for name, shown in _NAMES.items():
        one = behaviour.get(name) if isinstance(behaviour, dict) else None
        if isinstance(one, dict):
            layers = one.get("drift")
            drift = [value for value in layers if is_number(value)] if isinstance(layers, list) else []
            numbers = [one.get("kl"), one.get("top1"), max(drift, default=None)]
            kl, top1, most = (f"{n:.2g}" if is_number(n) else "-" for n in numbers)
            found.append((shown, kl, top1, most))
    return found
