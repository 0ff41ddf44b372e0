"""The table of supported PEFT types.

A new type is one module, which defines a `PeftType`, and one row of `TYPES`; or one row alone if PEFT computes it.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from paft_merge.errors import AdapterError, Problems
from paft_merge.inputs.adapters.adalora import ADALORA
from paft_merge.inputs.adapters.binding import PeftType
from paft_merge.inputs.adapters.config import CONFIG, Settings, read_config
from paft_merge.inputs.adapters.keys import Keys, sort_by_name
from paft_merge.inputs.adapters.lora import LORA
from paft_merge.inputs.adapters.lycoris import LOHA, LOKR
from paft_merge.inputs.adapters.merged_by_peft import by_peft
from paft_merge.inputs.adapters.miss import BONE, MISS
from paft_merge.inputs.adapters.mlx import MLX, is_mlx, settings_of, sort_mlx
from paft_merge.inputs.adapters.mlx import NAME as MLX_NAME
from paft_merge.inputs.adapters.multiplied import HIRA, IA3
from paft_merge.inputs.adapters.oft import OFT
from paft_merge.inputs.adapters.replaced import LN_TUNING, TRAINABLE_TOKENS
from paft_merge.inputs.adapters.shira import SHIRA
from paft_merge.inputs.adapters.sparse_delta import NAME as SPARSE_NAME
from paft_merge.inputs.adapters.sparse_delta import SPARSE_DELTA, sort_sparse


def _frod(raw: Mapping[str, Any]) -> str:
    what = "save_projection: false leaves out projections that depend on the weights of all layers together"
    return "" if raw.get("save_projection", True) else what


def _pvera(raw: Mapping[str, Any]) -> str:
    what = "sample_at_inference: the model draws its weights at random on every use"
    return what if raw.get("sample_at_inference") else ""


TYPES: dict[str, PeftType] = {
    "LORA": LORA,
    "SHIRA": SHIRA,
    "ADALORA": ADALORA,
    "HIRA": HIRA,
    "IA3": IA3,
    "LN_TUNING": LN_TUNING,
    "LOHA": LOHA,
    "LOKR": LOKR,
    "BONE": BONE,
    "MISS": MISS,
    "OFT": OFT,
    "TRAINABLE_TOKENS": TRAINABLE_TOKENS,
    "ADAMSS": by_peft("ADAMSS", "adamss_", "AdaMSS", bias=True),
    "BEFT": by_peft("BEFT", "beft_", "BEFT (arXiv:2509.15974)", layers="linear with a bias", only_bias=True),
    "BOFT": by_peft("BOFT", "boft_", "BOFT (arXiv:2311.06243)", layers="linear, Conv2d"),
    "C3A": by_peft("C3A", "c3a_", "C3A (arXiv:2407.19342)"),
    "DEFT": by_peft("DEFT", "deft_", "DEFT", layers="linear, Conv1D"),
    "DELORA": by_peft("DELORA", "delora_", "DeLoRA (arXiv:2503.18225)"),
    "FOURIERFT": by_peft("FOURIERFT", "fourierft_", "FourierFT (arXiv:2405.03003)", layers="linear, Conv1D"),
    "FROD": by_peft("FROD", "frod_", "FRoD", layers="linear, Conv1D", refuse=_frod),
    "GLORA": by_peft("GLORA", "glora_", "GLoRA", bias=True),
    "GRALORA": by_peft("GRALORA", "gralora_", "GraLoRA", layers="linear, Conv1D"),
    "HRA": by_peft("HRA", "hra_", "HRA (arXiv:2405.17484)", layers="linear, Conv2d"),
    "OSF": by_peft("OSF", "osf_", "OSF"),
    "PEANUT": by_peft("PEANUT", "peanut_", "PEANuT (arXiv:2410.01870)"),
    "PSOFT": by_peft("PSOFT", "psoft_", "PSOFT"),
    "PVERA": by_peft(
        "PVERA", "pvera_", "PVeRA (arXiv:2512.07703)", layers="linear, Conv1D", scope="shapes", refuse=_pvera
    ),
    "RANDLORA": by_peft(
        "RANDLORA", "randlora_", "RandLoRA (arXiv:2502.00987)", layers="linear, Conv1D", scope="shapes"
    ),
    "ROAD": by_peft("ROAD", "road_", "RoAd (arXiv:2409.00119)", bias=True),
    "SUPERTUNING": by_peft("SUPERTUNING", "supertuning_", "SuperTuning (arXiv:2607.09287)"),
    "TINYLORA": by_peft(
        "TINYLORA", "tinylora_", "TinyLoRA (arXiv:2602.04118)", layers="linear, Conv1D, embedding", scope="numbers"
    ),
    "UNILORA": by_peft("UNILORA", "unilora_", "Uni-LoRA (arXiv:2506.00799)", layers="linear, Conv1D", scope="shapes"),
    "VBLORA": by_peft("VBLORA", "vblora_", "VB-LoRA (arXiv:2405.15179)", layers="linear, Conv1D"),
    "VERA": by_peft("VERA", "vera_", "VeRA (arXiv:2310.11454)", layers="linear, Conv1D", scope="shapes"),
    "WAVEFT": by_peft("WAVEFT", "waveft_", "WaveFT", layers="linear, Conv1D", scope="shapes"),
}
"""By `peft_type` of adapter_config.json."""

_KNOWN = ChainMap(TYPES, {SPARSE_NAME: SPARSE_DELTA})
"""Also the type that PEFT does not have."""

_PROMPT = "prepends trained vectors to the input"
_ROUTED = "mixes several adapters by a router, differently for each token"
NO_DELTA = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "PREFIX_TUNING": "prepends trained keys and values to the attention",
    "CARTRIDGE": "prepends a trained cache of keys and values to the attention",
    "ADAPTION_PROMPT": "adds an attention over trained prompts",
    "XLORA": _ROUTED,
    "LILY": _ROUTED,
    "POLY": "mixes several adapters by the id of the task",
    "SHADOW": "runs a second network beside the model, which depends on the input",
}
"""Types of PEFT that do not change the weights, each with what it does instead."""

_CONVERT = "merge it with PEFT into a checkpoint, or convert it with peft.convert_to_lora, and merge that"


_MOST = {
    **{"num_cayley_neumann_terms": 1000, "depth": 1000, "u": 100_000, "theta_d_length": 10_000_000},
    **dict.fromkeys(("r", "rank_pattern", "init_r", "target_r"), 100_000),
}
"""The largest values of fields that decide how long PEFT computes, or how much memory it takes before it reads a tensor."""


def read_settings(folder: Path) -> Settings:
    """Read and check `adapter_config.json`.

    Raises:
        AdapterError: with every fault: ADAPTER_CONFIG for missing or malformed fields, ADAPTER_UNSUPPORTED for fields
            or a type that have no exact delta.
    """
    path = folder / CONFIG
    raw, problems = read_config(path), Problems()
    if is_mlx(raw, folder):
        settings = settings_of(path, raw, problems)
        problems.raise_as(AdapterError)
        return settings
    if raw.get("peft_type") is None and {"r", "lora_alpha"} <= raw.keys():  # trainers of 2023 left it out
        raw["peft_type"] = "LORA"
    kind = raw.get("peft_type")
    if not isinstance(kind, str):
        problems.add("ADAPTER_CONFIG", path, f"peft_type: must be a string, got {kind!r}")
    elif kind in NO_DELTA:
        what = f"peft_type: {kind} {NO_DELTA[kind]}, so it has no delta that could be merged"
        problems.add("ADAPTER_UNSUPPORTED", path, what, "use it with PEFT, on the model that it was trained on")
    elif kind not in _KNOWN:
        what = f"peft_type: {kind} is not a type that this version knows ({', '.join(sorted(TYPES))})"
        problems.add("ADAPTER_UNSUPPORTED", path, what, _CONVERT)
    else:
        _KNOWN[kind].check_config(path, raw, problems)
        saved = raw.get("modules_to_save")
        if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
            problems.add("ADAPTER_CONFIG", path, f"modules_to_save: must be a list of strings, got {saved!r}")
        check_sizes(path, raw, problems)
    problems.raise_as(AdapterError)
    return Settings(raw)


def check_sizes(path: Path, raw: Mapping[str, Any], problems: Problems) -> None:
    """Note fields that make PEFT compute very long or take very much memory."""
    for field, most in _MOST.items():
        given = raw.get(field)
        for value in given.values() if isinstance(given, dict) else [given]:
            if isinstance(value, int) and value > most:
                problems.add("ADAPTER_CONFIG", path, f"{field}: must be at most {most}, got {value}")


def type_of(settings: Settings) -> PeftType:
    """How an adapter of these settings is read."""
    return MLX if settings.peft_type == MLX_NAME else _KNOWN[settings.peft_type]


def sort_keys(keys: Iterable[str], where: object, problems: Problems, peft_type: str = "") -> Keys:
    """Sort tensor names, of any supported type; see `sort_by_name`.

    Args:
        keys: the tensor names.
        where: the file, for messages.
        problems: receives the faults.
        peft_type: the type of the adapter; a name that several types use is of this one.
    """
    if peft_type == MLX_NAME:
        return sort_mlx(keys)
    if peft_type == SPARSE_NAME:
        return sort_sparse(keys, where, problems)
    kinds = sorted(TYPES, key=lambda kind: kind != peft_type)
    return sort_by_name(keys, {kind: TYPES[kind].names for kind in kinds}, where, problems)
