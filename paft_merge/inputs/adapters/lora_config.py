"""Which fields of a LoRA's `adapter_config.json` have an exact delta, and which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paft_merge.errors import Problems
from paft_merge.inputs.adapters.config import (
    INERT,
    check_kinds,
    check_numbers,
    check_patterns,
    check_positive,
    refuse_unknown,
)

_UNUSED = INERT | {
    *("lora_dropout", "megatron_config", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config"),
    *("merge_weights", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),  # other trainers write these
}
"""Fields that do not change the delta."""

_NO_DELTA = {
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
    "arrow_config": "Arrow routes each token to its own experts",
    "use_qalora": "QALoRA pools the inputs of quantised layers",
    "kasa_config": "KaSA trains on a truncated base",
    "enable_lora": "it adapts parts of a fused layer through a grouped convolution, as PEFT before 0.3 did",
    "layer_replication": "its layers are numbered in a stack of replicated layers",
}
"""Fields of LoRA variants that have no delta on the given base."""

_RANDOM_START = {
    "corda": "from covariances of data",
    "loftq": "by quantising the base",
    "lora_ga": "from gradients",
}
"""Values of `init_lora_weights` that change the base in a way that the adapter's files do not record."""

_KNOWN_STARTS = ("pissa", "olora", "gaussian", "eva", "orthogonal", "mica", "true", "false")
"""Values of `init_lora_weights` that leave the base unchanged, or change it in a way that can be repeated."""

_FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")
_USED = frozenset(
    (
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "target_parameters"),
        *("trainable_token_indices", "modules_to_save", "use_bdlora", "lora_B_layout", *_FLAGS),
    )
)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_FLAGS, (bool,)),
    **{"target_parameters": (list,), "trainable_token_indices": (list, dict)},
    "use_bdlora": (dict,),
}


def check_config(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    """Note every field that is malformed (ADAPTER_CONFIG) or has no exact delta (ADAPTER_UNSUPPORTED)."""
    for field, reason in _NO_DELTA.items():
        if raw.get(field) not in (None, False):
            problems.add("ADAPTER_UNSUPPORTED", path, f"{field}: {reason}, so there is no delta to merge")
    refuse_unknown(path, raw, _UNUSED | _USED | _NO_DELTA.keys(), "LoRA", problems)
    _check_start(path, raw.get("init_lora_weights", True), problems)
    check_kinds(path, raw, _KINDS, problems)
    _check_values(path, raw, problems)
    _check_numbers(path, raw, problems)


def _check_start(path: Path, start: object, problems: Problems) -> None:
    name = str(start).lower()
    if reason := _RANDOM_START.get(name) or ("by a randomised SVD" if name.startswith("pissa_niter_") else None):
        what = f"init_lora_weights: {start} changed the base {reason}, which cannot be repeated from these files"
        fix = "save it again with PEFT's path_initial_model_for_weight_conversion"
        problems.add("ADAPTER_UNSUPPORTED", path, what, fix)
    elif name not in _KNOWN_STARTS:
        problems.add("ADAPTER_UNSUPPORTED", path, f"init_lora_weights: {start!r} is not known")


def _check_values(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    parameters = raw.get("target_parameters")
    if isinstance(parameters, list) and not all(isinstance(name, str) for name in parameters):
        problems.add("ADAPTER_CONFIG", path, f"target_parameters: must be a list of strings, got {parameters!r}")
    if raw.get("bias", "none") not in ("none", "all", "lora_only", None):
        problems.add("ADAPTER_CONFIG", path, f"bias: must be none, all or lora_only, got {raw['bias']!r}")
    if raw.get("lora_B_layout") not in (None, "rank_major", "grouped_by_expert"):
        what = f"lora_B_layout: must be rank_major or grouped_by_expert, got {raw['lora_B_layout']!r}"
        problems.add("ADAPTER_CONFIG", path, what)


def _check_numbers(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    if isinstance(raw.get("use_bdlora"), dict):
        check_positive(path, "use_bdlora.nblocks", raw["use_bdlora"].get("nblocks", 1), problems)
    for field in ("r", "lora_alpha"):
        if field not in raw:
            problems.add("ADAPTER_CONFIG", path, f"{field}: is missing; set it, as PEFT's default of 8 may be wrong")
    check_numbers(path, raw, {"r"} & raw.keys(), {"lora_alpha"} & raw.keys(), problems)
    check_patterns(path, raw, problems)
