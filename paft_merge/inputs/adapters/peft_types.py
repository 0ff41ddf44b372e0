"""The table of supported PEFT types.

A new type is one module, which defines a `PeftType`, and one row of `TYPES`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from paft_merge.errors import AdapterError, Problems
from paft_merge.inputs.adapters.binding import PeftType
from paft_merge.inputs.adapters.config import CONFIG, Settings, read_config
from paft_merge.inputs.adapters.keys import Keys, sort_by_name
from paft_merge.inputs.adapters.lora import LORA
from paft_merge.inputs.adapters.shira import SHIRA

TYPES: dict[str, PeftType] = {"LORA": LORA, "SHIRA": SHIRA}
"""By `peft_type` of adapter_config.json."""

_CONVERT = "merge it with PEFT into a checkpoint, or convert it with peft.convert_to_lora, and merge that"


def read_settings(folder: Path) -> Settings:
    """Read and check `adapter_config.json`.

    Raises:
        AdapterError: with every fault: ADAPTER_CONFIG for missing or malformed fields, ADAPTER_UNSUPPORTED for fields
            or a type that have no exact delta.
    """
    path = folder / CONFIG
    raw, problems = read_config(path), Problems()
    kind = raw.get("peft_type")
    if not isinstance(kind, str):
        problems.add("ADAPTER_CONFIG", path, f"peft_type: must be a string, got {kind!r}")
    elif kind not in TYPES:
        what = f"peft_type: {kind} is not {' or '.join(TYPES)}, and no exact delta is known"
        problems.add("ADAPTER_UNSUPPORTED", path, what, _CONVERT)
    else:
        TYPES[kind].check_config(path, raw, problems)
    problems.raise_as(AdapterError)
    return Settings(raw)


def sort_keys(keys: Iterable[str], where: object, problems: Problems) -> Keys:
    """Sort tensor names, of any supported type; see `sort_by_name`."""
    return sort_by_name(keys, {kind: entry.names for kind, entry in TYPES.items()}, where, problems)
