"""Reads `adapter_config.json`, and holds the fields that the arithmetic needs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from paft_merge.errors import AdapterError, CheckpointError, Problems
from paft_merge.inputs.adapters.patterns import Budget, PatternError, check_pattern
from paft_merge.inputs.safetensors_header import quote, read_text

CONFIG = "adapter_config.json"

INERT = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("runtime_config", "model_name", "library_name"),  # other trainers write the last two
    )
)
"""Fields of every type that do not change the delta: the tensors say which modules are adapted."""


@dataclass(frozen=True)
class Settings:
    """The fields of `adapter_config.json` that the arithmetic needs; `raw` is the whole file."""

    raw: Mapping[str, Any]

    @cached_property
    def budget(self) -> Budget:
        """The time that the patterns may take."""
        return Budget()

    @property
    def peft_type(self) -> str:
        """The type of the adapter, as PEFT writes it, e.g. `LORA`."""
        return str(self.raw["peft_type"])

    @property
    def rank(self) -> int:
        """`r`, the rank of modules that `rank_pattern` does not name."""
        return int(self.raw["r"])

    def rank_of(self, path: str) -> int:
        """The rank of the module (or parameter) at `path`."""
        return int(self.number("r", "rank_pattern", path))

    def number(self, field: str, pattern: str, path: str) -> float:
        """`field` for the module at `path`: that of the first key of `pattern` that matches it, else the default."""
        return float(_by_pattern(self.raw.get(pattern), path, self.raw[field], self.budget))

    def scale(self, path: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        return self.number("lora_alpha", "alpha_pattern", path) / (math.sqrt(rank) if self.flag("use_rslora") else rank)

    def flag(self, name: str) -> bool:
        """A boolean field; false if absent."""
        return bool(self.raw.get(name))

    def names(self, name: str) -> tuple[str, ...]:
        """A field that lists names; empty if absent."""
        return tuple(self.raw.get(name) or ())

    @property
    def decomposition(self) -> str:
        """`pissa` or `olora` if training started from a decomposition of the base; else empty."""
        start = str(self.raw.get("init_lora_weights", True)).lower()
        return start if start in ("pissa", "olora") else ""

    @property
    def reads_experts_out_in(self) -> bool:
        """Whether the PEFT that wrote the adapter (0.19.1 or later) reads `[experts, out, in]` in that order."""
        version = re.match(r"(\d+)\.(\d+)\.(\d+)(?!\.?(dev|rc))", str(self.raw.get("peft_version") or ""))
        return version is not None and tuple(map(int, version.groups()[:3])) >= (0, 19, 1)

    @property
    def packing(self) -> str:
        """How lora_B of fused experts is packed: `rank_major` (PEFT), `grouped_by_expert` (old Unsloth) or `unknown`.

        Unsloth used another order of the experts until 2026-09-17, and has recorded the order as `lora_B_layout` since
        (unslothai/unsloth-zoo#1232, #1269). Without that record, an adapter made with Unsloth can have either order.
        """
        if layout := self.raw.get("lora_B_layout"):
            return str(layout)
        is_unsloth = str(self.raw.get("base_model_name_or_path")).startswith("unsloth/")
        return "unknown" if is_unsloth or "unsloth" in str(self.raw.get("auto_mapping")) else "rank_major"

    def tokens_of(self, path: str) -> list[int] | None:
        """The rows that the trained values of the module at `path` are for, in the order of the values."""
        indices = self.raw.get("trainable_token_indices") or self.raw.get("token_indices")
        if isinstance(indices, dict):
            indices = next((rows for key, rows in indices.items() if f".{path}".endswith(f".{key}")), None)
        return indices if isinstance(indices, list) and all(type(i) is int for i in indices) else None

    def is_saved_module(self, path: str) -> bool:
        """Whether `modules_to_save` names the module at `path` or one around it; as in PEFT, by the end of the name."""
        parts = path.split(".")
        around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(name.endswith(target) for target in self.names("modules_to_save") for name in around)


def read_config(path: Path) -> dict[str, Any]:
    """Parse `adapter_config.json`.

    Raises:
        AdapterError: ADAPTER_CONFIG, it is missing or is not a JSON object.
    """
    if not path.exists():
        fix = "give the folder that PEFT's save_pretrained wrote"
        raise AdapterError.of("ADAPTER_CONFIG", path, "no such file, so the folder is not an adapter", fix)
    try:
        raw = json.loads(read_text(path, "ADAPTER_CONFIG"))
    except CheckpointError as error:
        raise AdapterError(error.problems) from error
    except (ValueError, RecursionError) as error:
        raise AdapterError.of("ADAPTER_CONFIG", path, f"is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise AdapterError.of("ADAPTER_CONFIG", path, "does not hold a JSON object")
    return raw


def refuse_unknown(path: Path, raw: Mapping[str, Any], known: Iterable[str], kind: str, problems: Problems) -> None:
    """Note every field that is set and not in `known`: it may change the weights."""
    for field in sorted(raw.keys() - set(known)):
        if raw[field] and not field.endswith("_version"):
            what = f"{field}: not a field of {kind} that this version knows, so its effect on the weights is unknown"
            problems.add("ADAPTER_UNSUPPORTED", path, what, "remove it from the file if it has none")


def check_kinds(path: Path, raw: Mapping[str, Any], wanted: Mapping[str, tuple[type, ...]], problems: Problems) -> None:
    """Note every field that is neither null nor of one of the types in `wanted`."""
    for field, kinds in wanted.items():
        if not isinstance(raw.get(field), (*kinds, type(None))):
            names = " or ".join(kind.__name__ for kind in kinds)
            problems.add("ADAPTER_CONFIG", path, f"{field}: must be a {names}, got {raw[field]!r}")


def check_numbers(
    path: Path, raw: Mapping[str, Any], whole: Iterable[str], real: Iterable[str], problems: Problems
) -> None:
    """Note fields that must be set to a number and are not: `whole` above 0, `real` finite and not 0."""
    for field in whole:
        check_positive(path, field, raw.get(field), problems)
    for field in real:
        check_real(path, field, raw.get(field), problems)


def check_patterns(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    """Note entries of `rank_pattern` and `alpha_pattern` that are not a regular expression and a number."""
    for field, check in (("rank_pattern", check_positive), ("alpha_pattern", check_real)):
        entries = raw.get(field)
        if entries is not None and not isinstance(entries, dict):
            problems.add("ADAPTER_CONFIG", path, f"{field}: must be a dict, got {entries!r}")
            continue
        for key, value in (entries or {}).items():
            check(path, f"{field}[{key!r}]", value, problems)
            try:
                check_pattern(key)
            except PatternError as error:
                problems.add("ADAPTER_CONFIG", path, f"{field}[{quote(key)}]: {error}")


def check_real(path: Path, field: str, value: object, problems: Problems) -> None:
    """Note a `value` that is not a finite number other than 0."""
    if not (type(value) in (int, float) and math.isfinite(float(str(value))) and value):
        problems.add("ADAPTER_CONFIG", path, f"{field}: must be a finite number other than 0, got {value!r}")


def check_positive(path: Path, field: str, value: object, problems: Problems) -> None:
    """Note a `value` that is not a whole number above 0."""
    if not (type(value) is int and value > 0):
        problems.add("ADAPTER_CONFIG", path, f"{field}: must be a whole number above 0, got {value!r}")


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any, budget: Budget) -> Any:
    """The value of the first pattern that matches the end of `path`, else of `path` itself, as PEFT does it."""
    patterns = patterns or {}
    for key in patterns:
        try:
            if budget.matches(key, path):
                return patterns[key]
        except PatternError as error:
            fix = "write the names of the modules, or a simpler pattern"
            raise AdapterError.of("ADAPTER_CONFIG", CONFIG, f"the pattern {quote(key)} {error}", fix) from error
    return patterns.get(path, default)
