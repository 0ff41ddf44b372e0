"""The fields of the TRL configs that are installed, read from their source: importing TRL takes seconds."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paft_merge.training.schema import OURS, Objective

CONFIG_OF: Mapping[Objective, str] = {
    "sft": "SFTConfig",
    "ift": "SFTConfig",
    "best_of_n": "SFTConfig",
    "rwr": "SFTConfig",
    "dpo": "DPOConfig",
    "orpo": "DPOConfig",
    "on_policy": "DPOConfig",
    "rloo": "RLOOConfig",
    "grpo": "GRPOConfig",
}
"""The name of the TRL config whose fields `training:` takes, by objective."""
BASE = "_BaseConfig"
"""The fields of all TRL configs."""


@dataclass(frozen=True)
class ConfigField:
    """A field of a TRL config."""

    types: tuple[str, ...]
    """Names in its annotation without their arguments: `float`, `dict`, `None`, or a class."""
    default: Any
    """A number, text, list or mapping; None also where the source has an expression."""
    text: str
    """Its help text."""


def config_fields(name: str) -> Mapping[str, ConfigField]:
    """The fields of a TRL config that `training:` may set, without those of `OURS`; empty if this TRL does not have the config.

    Args:
        name: a value of CONFIG_OF, or BASE.
    """
    trainers, transformers = _folder("trl", "trainer"), _folder("transformers")
    if trainers is None or transformers is None:
        return {}
    files = [(transformers / "training_args.py", "TrainingArguments"), (trainers / "base_config.py", BASE)]
    if name != BASE:
        files.append((trainers / f"{name.removesuffix('Config').lower()}_config.py", name))
    if not all(file.is_file() for file, _ in files):
        return {}
    found = {key: field for file, config in files for key, field in _fields(file, config).items()}
    return {key: field for key, field in found.items() if key not in OURS}


def _folder(package: str, *parts: str) -> Path | None:
    """A folder of an installed package, which is not imported."""
    spec = find_spec(package)
    return Path(spec.origin).parent.joinpath(*parts) if spec and spec.origin else None


@cache
def _fields(file: Path, config: str) -> dict[str, ConfigField]:
    """The fields that a dataclass defines itself."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == config), [])
    found = {}
    for node in body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=ast.expr() as value) if (
                "ClassVar" not in ast.unparse(kind)
            ):
                given = {"default": value}
                if isinstance(value, ast.Call):
                    given = {one.arg: one.value for one in value.keywords if one.arg}
                if "init" in given:
                    continue
                meta = _literal(given.get("metadata"))
                text = meta.get("help", "") if isinstance(meta, dict) else ""
                text = " ".join(str(text).replace("%%", "%").split())
                found[name] = ConfigField(tuple(_types(kind)), _literal(given.get("default")), text)
    return found


def _types(kind: ast.expr) -> list[str]:
    match kind:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return [*_types(left), *_types(right)]
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return [*_types(inner), "None"]
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=inner)):
            return [name for one in inner for name in _types(one)]
        case ast.Subscript(value=value):
            return _types(value)
    return [ast.unparse(kind)]


def _literal(value: ast.expr | None) -> Any:
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None
