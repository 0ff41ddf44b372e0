"""adapter_config.json, judged: what can be applied exactly, with which scale, and what must be refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paft_merge.errors import AdapterError, CheckpointError, Problems
from paft_merge.inputs.safetensors_header import read_text

CONFIG = "adapter_config.json"

_NO_DELTA = {
    "alora_invocation_tokens": "aLoRA acts only behind its invocation tokens",
    "arrow_config": "Arrow routes every token to experts of its own",
    "use_qalora": "QALoRA pools the inputs of quantised layers",
    "kasa_config": "KaSA trains on a truncated base",
    "layer_replication": "its layers are numbered in a stack of replicated layers",
}
"""Fields of a LoRA without a delta on the base as it stands."""

_RANDOM_START = {
    "corda": "from covariances of data",
    "loftq": "by quantising the base",
    "lora_ga": "from gradients",
}
"""Values of `init_lora_weights` that change the base in a way that the adapter's files do not tell."""

_PLAIN_START = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
"""Values of `init_lora_weights` that leave the base as it was."""

_INERT = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "megatron_config", "megatron_core", "runtime_config", "qalora_group_size"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config"),
        *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "model_name", "library_name"),  # of other trainers
    )
)
_USED = frozenset(
    (
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias"),
        *("init_lora_weights", "target_parameters", "trainable_token_indices", "modules_to_save"),
        *("ensure_weight_tying", "fan_in_fan_out", "use_bdlora", "lora_B_layout"),
    )
)
_SPARSE_FIELDS = _INERT | {"r", "mask_type", "random_seed", "fan_in_fan_out", "init_weights", "modules_to_save"}
"""Fields of SHiRA. Its mask is in the file, and PEFT reads it from there; `fan_in_fan_out` it overrules."""
_FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")
_CONVERT = "merge it with PEFT into a checkpoint, or convert it with peft.convert_to_lora, and merge that"


@dataclass(frozen=True)
class Settings:
    """The fields of adapter_config.json that the arithmetic needs; `raw` is all of it."""

    raw: Mapping[str, Any]
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, path: str) -> int:
        """The rank that the configuration gives the module (or parameter) at `path`."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, path), self.rank)

    def scale(self, path: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, path), self.alpha)
        return alpha / (math.sqrt(rank) if self.flag("use_rslora") else rank)

    def flag(self, name: str) -> bool:
        """A boolean field; false when absent."""
        return bool(self.raw.get(name))

    def names(self, name: str) -> tuple[str, ...]:
        """A field that lists names; empty when absent."""
        return tuple(self.raw.get(name) or ())

    @property
    def sparse(self) -> bool:
        """Is it SHiRA, which holds single entries of the delta, and not LoRA?"""
        return self.raw.get("peft_type") == "SHIRA"

    @property
    def start(self) -> str:
        """`pissa` or `olora` when training began from a decomposition of the base; else empty."""
        start = str(self.raw.get("init_lora_weights", True)).lower()
        return start if start in ("pissa", "olora") else ""

    @property
    def swaps_experts(self) -> bool:
        """Was the adapter surely written by a PEFT (0.19.1 on) that reads `[experts, out, in]` as such?"""
        version = re.match(r"(\d+)\.(\d+)\.(\d+)(?!\.?(dev|rc))", str(self.raw.get("peft_version") or ""))
        return version is not None and tuple(map(int, version.groups()[:3])) >= (0, 19, 1)

    @property
    def packing(self) -> str:
        """How lora_B of fused experts is packed: `rank_major` (PEFT), `grouped_by_expert` (old Unsloth), `unknown`.

        Unsloth packed the experts in another order until 2026-09-17, and records the order as `lora_B_layout` since
        (unslothai/unsloth-zoo#1232, #1269). Without that record an adapter of Unsloth's could be either.
        """
        if layout := self.raw.get("lora_B_layout"):
            return str(layout)
        theirs = str(self.raw.get("base_model_name_or_path")).startswith("unsloth/")
        return "unknown" if theirs or "unsloth" in str(self.raw.get("auto_mapping")) else "rank_major"

    def tokens_of(self, path: str) -> list[int] | None:
        """The rows that `trainable_token_indices` names for the module at `path`, in the order of their values."""
        indices = self.raw.get("trainable_token_indices")
        if isinstance(indices, dict):
            indices = next((rows for key, rows in indices.items() if f".{path}".endswith(f".{key}")), None)
        return indices if isinstance(indices, list) and all(type(i) is int for i in indices) else None

    def is_saved_module(self, path: str) -> bool:
        """Does `modules_to_save` name the module at `path` or one around it? PEFT compares the ends of names."""
        parts = path.split(".")
        around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(name.endswith(target) for target in self.names("modules_to_save") for name in around)


def read_settings(folder: Path) -> Settings:
    """Read and judge `adapter_config.json`.

    Raises:
        AdapterError: ADAPTER_CONFIG for what is missing or malformed, ADAPTER_UNSUPPORTED for what has no exact delta;
            all of them at once.
    """
    path = folder / CONFIG
    raw = _read(path)
    problems = Problems()
    if raw.get("peft_type") == "SHIRA":
        _check_sparse(path, raw, problems)
    elif raw.get("peft_type") != "LORA":
        _refuse_type(path, raw.get("peft_type"), problems)
    else:
        _refuse_fields(path, raw, problems)
        _refuse_start(path, raw.get("init_lora_weights", True), problems)
        _check_types(path, raw, problems)
        _check_numbers(path, raw, problems)
    problems.raise_as(AdapterError)
    alpha = raw["r"] if raw["peft_type"] == "SHIRA" else raw["lora_alpha"]
    return Settings(raw, raw["r"], alpha, raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {})


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        fix = "give the folder that PEFT's save_pretrained wrote"
        raise AdapterError.of("ADAPTER_CONFIG", path, "no such file, so this is no adapter", fix)
    try:
        raw = json.loads(read_text(path, "ADAPTER_CONFIG"))
    except CheckpointError as error:
        raise AdapterError(error.problems) from error
    except (ValueError, RecursionError) as error:
        raise AdapterError.of("ADAPTER_CONFIG", path, f"is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise AdapterError.of("ADAPTER_CONFIG", path, "does not hold a JSON object")
    return raw


def _refuse_type(path: Path, kind: object, problems: Problems) -> None:
    if isinstance(kind, str):
        problems.add(
            "ADAPTER_UNSUPPORTED",
            path,
            f"peft_type: {kind} is not LORA or SHIRA, and no exact delta is known",
            _CONVERT,
        )
    else:
        problems.add("ADAPTER_CONFIG", path, f"peft_type: must be a text, got {kind!r}")


def _check_sparse(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    _refuse_unknown(path, raw, _SPARSE_FIELDS, "SHiRA", problems)
    _check_types(path, raw, problems)
    if not (type(raw.get("r")) is int and raw["r"] > 0):
        problems.add("ADAPTER_CONFIG", path, f"r: must be a whole number above 0, got {raw.get('r')!r}")


def _refuse_fields(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    for field, reason in _NO_DELTA.items():
        if raw.get(field) not in (None, False):
            problems.add("ADAPTER_UNSUPPORTED", path, f"{field}: {reason}, so there is no delta to merge")
    _refuse_unknown(path, raw, _INERT | _USED | _NO_DELTA.keys(), "LoRA", problems)


def _refuse_unknown(path: Path, raw: Mapping[str, Any], known: frozenset[str], kind: str, problems: Problems) -> None:
    for field in sorted(raw.keys() - known):
        if raw[field]:
            what = f"{field}: not a field of {kind} that this version knows, so its effect on the weights is unknown"
            problems.add("ADAPTER_UNSUPPORTED", path, what, "remove it from the file if it has none")


def _refuse_start(path: Path, start: object, problems: Problems) -> None:
    name = str(start).lower()
    if name in ("pissa", "olora") or name in _PLAIN_START:
        return
    if reason := _RANDOM_START.get(name) or ("by a randomised SVD" if name.startswith("pissa_niter_") else None):
        what = f"init_lora_weights: {start} changed the base {reason}, which cannot be repeated from these files"
        fix = "save it again with PEFT's path_initial_model_for_weight_conversion"
        problems.add("ADAPTER_UNSUPPORTED", path, what, fix)
    else:
        problems.add("ADAPTER_UNSUPPORTED", path, f"init_lora_weights: {start!r} is not known")


def _check_types(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    wanted: dict[str, tuple[type, ...]] = dict.fromkeys(_FLAGS, (bool,))
    wanted |= {"modules_to_save": (list,), "target_parameters": (list,), "trainable_token_indices": (list, dict)}
    wanted |= {"rank_pattern": (dict,), "alpha_pattern": (dict,), "use_bdlora": (dict,)}
    for field, kinds in wanted.items():
        if not isinstance(raw.get(field), (*kinds, type(None))):
            names = " or ".join(kind.__name__ for kind in kinds)
            problems.add("ADAPTER_CONFIG", path, f"{field}: must be a {names}, got {raw[field]!r}")
    for field in ("modules_to_save", "target_parameters"):
        if isinstance(raw.get(field), list) and not all(isinstance(name, str) for name in raw[field]):
            problems.add("ADAPTER_CONFIG", path, f"{field}: must list texts, got {raw[field]!r}")
    if raw.get("bias", "none") not in ("none", "all", "lora_only", None):
        problems.add("ADAPTER_CONFIG", path, f"bias: must be none, all or lora_only, got {raw['bias']!r}")
    if raw.get("lora_B_layout") not in (None, "rank_major", "grouped_by_expert"):
        what = f"lora_B_layout: must be rank_major or grouped_by_expert, got {raw['lora_B_layout']!r}"
        problems.add("ADAPTER_CONFIG", path, what)


def _check_numbers(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    def check(field: str, value: object, whole: bool) -> None:
        if whole and not (type(value) is int and value > 0):
            problems.add("ADAPTER_CONFIG", path, f"{field}: must be a whole number above 0, got {value!r}")
        elif not whole and not (type(value) in (int, float) and math.isfinite(float(str(value))) and value):
            problems.add("ADAPTER_CONFIG", path, f"{field}: must be a finite number other than 0, got {value!r}")

    if isinstance(raw.get("use_bdlora"), dict):
        check("use_bdlora.nblocks", raw["use_bdlora"].get("nblocks", 1), True)
    for field, pattern, whole in (("r", "rank_pattern", True), ("lora_alpha", "alpha_pattern", False)):
        if field not in raw:
            problems.add("ADAPTER_CONFIG", path, f"{field}: is missing, and PEFT's default of 8 would be a guess")
        else:
            check(field, raw[field], whole)
        entries = raw.get(pattern)
        for key, value in entries.items() if isinstance(entries, dict) else ():
            check(f"{pattern}[{key!r}]", value, whole)
            try:
                re.compile(key)
            except re.error as error:
                problems.add("ADAPTER_CONFIG", path, f"{pattern}[{key!r}]: is not a regular expression: {error}")


def _pattern(patterns: Mapping[str, object], path: str) -> str:
    """The first key that matches the end of `path`, as PEFT looks it up; `path` when none does."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), path)
