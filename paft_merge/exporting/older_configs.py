"""`config.json` with the names of transformers 4 beside those of transformers 5, for readers that know only the older ones.

transformers 5 writes `rope_parameters` where `rope_theta` and `rope_scaling` were, and renamed fields such as `num_experts`. mlx-lm
0.32 reads the older names for most models. For those that it lacks it takes defaults without an error: a Llama 3 then rotates
with 10,000 in place of 500,000.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SECTIONS = ("full_attention", "sliding_attention")


def with_older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, and those nested in it, with the older names added; a name that is there keeps its value."""
    found = {
        key: with_older_names(value) if isinstance(value, Mapping) and key.endswith("_config") else value
        for key, value in config.items()
    }
    return {**_rope(found), **_aliases(found), **found}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `partial_rotary_factor`; for Gemma 3 also `rope_local_base_freq`."""
    held = config.get("rope_parameters")
    if not isinstance(held, Mapping):
        return {}
    full, local = (one if isinstance(one := held.get(name), Mapping) else {} for name in _SECTIONS)
    rope = full or held
    made = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if "rope_theta" in local:
        made["rope_local_base_freq"] = local["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        made["rope_scaling"] = {key: value for key, value in rope.items() if key not in made}
    return made


def _aliases(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by the other names that transformers' config class knows for them."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    names = getattr(CONFIG_MAPPING[kind], "attribute_map", {}) if kind in CONFIG_MAPPING else {}
    return {alias: config[name] for alias, name in names.items() if name in config}


@contextmanager
def readable(model: Path, place: Path) -> Iterator[Path]:
    """A folder in `place` with links to the files of `model`, and its config with the older names; removed afterwards."""
    folder = place / "source"
    folder.mkdir()
    for file in model.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = with_older_names(json.loads((model / "config.json").read_text(encoding="utf-8")))
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        yield folder
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
