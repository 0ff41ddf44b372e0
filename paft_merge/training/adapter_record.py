"""Files of an adapter's folder: `paft_train.json`, the model card, and a trimmed delta as a SHiRA adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paft_merge.errors import Problems, TrainError
from paft_merge.training.delta_stats import Stats, trimmed
from paft_merge.training.factors import Factors
from paft_merge.training.run_folder import DONE_FILE, write_json
from paft_merge.training.schema import AdapterSpec

FORMAT = 1
PACKAGES = ("paft-merge", "torch", "transformers", "trl", "peft", "datasets", "accelerate")


def versions() -> dict[str, str]:
    """Installed versions of the packages that train an adapter."""
    return {package: _installed(package) for package in PACKAGES}


@cache
def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write_record(
    folder: Path, spec: AdapterSpec, stats: Stats, *, base: dict[str, Any], data: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any]:
    """Write `paft_train.json` and return it.

    Keys: `format`, `objective`, `base` (name, digest), `spec` (the section with defaults), `data` (fingerprint, rows,
    counts of cut rows), `delta` (`Stats.record`), `run` (steps, losses, strength, warnings, log), `versions`.
    """
    record = {
        "format": FORMAT,
        "objective": spec.objective,
        "base": base,
        "spec": spec.model_dump(mode="json", by_alias=True),
        "data": data,
        "delta": stats.record(),
        "run": run,
        "versions": versions(),
    }
    write_json(folder / DONE_FILE, record)
    return record


def write_card(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Write the adapter's model card."""
    delta, spec, run = record["delta"], record["spec"], record["run"]
    l1 = spec["l1"]
    how = f"L1 on the {run['l1_on']} ({l1['mode']}), strength {run['l1_strength']:.3g}" if l1 else "no L1"
    relative = "unknown (quantised base)" if delta["relative_norm"] is None else f"{delta['relative_norm']:.3e}"
    rank = "not measured (trimmed)" if delta["effective_rank"] is None else f"{delta['effective_rank']:.1f}"
    lines = [
        "---", "library_name: peft", f"base_model: {json.dumps(record['base']['name'])}",
        "tags: [paft-merge, lora, " + record["objective"] + "]", "---", "",
        f"# {name}", "",
        f"{_kind(record)} adapter for `{record['base']['name']}`, trained with paft_merge ({how}).", "",
        "| the delta | |", "|---|---|",
        f"| norm | {delta['norm']:.4g} |",
        f"| norm relative to the frozen weights | {relative} |",
        f"| entries below 1e-5 (PAFT's sparsity) | {delta['below_epsilon']:.1%} |",
        f"| entries below a tenth of the rms | {delta['below_tenth_rms']:.1%} |",
        f"| exact zeros | {delta['exact_zero']:.1%} |",
        f"| energy in the top 10 % of entries | {delta['energy_top_10']:.1%} |",
        f"| effective rank (mean) | {rank} |", "",
        f"Data: {record['data']['rows']} rows, fingerprint `{record['data']['fingerprint']}`. "
        f"Steps: {run['steps']}. All settings are in `{DONE_FILE}`.", "",
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _kind(record: dict[str, Any]) -> str:
    """The objective with its article: `An` before letters that are spoken with a vowel (SFT, ORPO, RWR)."""
    objective = record["objective"]
    if objective == "mixed":
        return f"A mixed ({', '.join(part['objective'].upper() for part in record['spec']['parts'].values())})"
    return f"{'An' if objective[0] in 'aefhilmnorsx' else 'A'} {objective.upper()}"


def check_trim(factors: Sequence[Factors], density: float) -> None:
    """Raise TrainError TRIM with every matrix whose pruned delta SHiRA cannot hold."""
    problems, rank = Problems(), _rank(factors, density)
    for f in factors:
        if not f.linear:
            fix = "remove it from lora.target_modules, or remove trim and trim in the merge"
            problems.add(
                "TRIM", f.name, "is not a linear layer, and PEFT's sparse format (SHiRA) supports only those", fix
            )
        elif rank * _side(f) > f.numel:
            fix = "remove trim and trim in the merge (trim: {density: ...}), or use a smaller density"
            problems.add("TRIM", f.name, f"a SHiRA adapter of rank {rank} has more entries than the matrix", fix)
    problems.raise_as(TrainError)


@torch.no_grad()
def write_trimmed(folder: Path, factors: Sequence[Factors], density: float, base: str) -> float:
    """Write the magnitude-pruned delta as a SHiRA adapter, PEFT's format for sparse updates of full rank.

    SHiRA stores the same r * (out + in) entries for every matrix, so r is the smallest that holds the densest one and
    the others are padded with explicit zeros. Fully trained modules (`modules_to_save`) are copied from `untrimmed/`.

    Returns:
        The density of the written delta over all entries.
    """
    rank, kept = _rank(factors, density), 0
    tensors, whole = _trained_whole(folder / "untrimmed")
    for f in factors:
        values, indices, count = _entries(trimmed(f, density).cpu(), rank * _side(f))
        tensors[f"base_model.model.{f.name}.shira_weight"] = values
        tensors[f"base_model.model.{f.name}.shira_indices"] = indices
        kept += count
    config = {
        "peft_type": "SHIRA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "random_seed": 0,
        "mask_type": "random", "target_modules": [f.name for f in factors], "inference_mode": True,
        "fan_in_fan_out": False, "modules_to_save": whole,
    }  # fmt: skip
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)
    return kept / sum(f.numel for f in factors)


def _entries(delta: Tensor, slots: int) -> tuple[Tensor, Tensor, int]:
    """Pick `slots` entries of a sparse matrix; returns values, indices `[2, slots]`, and the number of nonzero values.

    Zeros are taken from the end of the matrix, so that the indices reach the last row and column and define its shape.
    """
    flat = delta.flatten()
    chosen = flat != 0
    count = int(chosen.sum())
    last = len(flat) - slots  # the tail from here holds enough zeros
    spare = last + (~chosen[last:]).nonzero().flatten()
    chosen[spare[len(spare) - (slots - count) :]] = True
    where = chosen.nonzero().flatten()
    indices = torch.stack([where // delta.shape[1], where % delta.shape[1]]).to(torch.int32)
    return flat[where].contiguous(), indices.contiguous(), count


def _trained_whole(untrimmed: Path) -> tuple[dict[str, Tensor], list[str] | None]:
    """The tensors of the LoRA's file other than factors, and its `modules_to_save`."""
    held = load_file(str(untrimmed / "adapter_model.safetensors"))
    config = json.loads((untrimmed / "adapter_config.json").read_text(encoding="utf-8"))
    return {key: tensor for key, tensor in held.items() if ".lora_" not in key}, config.get("modules_to_save")


def _rank(factors: Sequence[Factors], density: float) -> int:
    """The smallest SHiRA r: a matrix stores r * (out + in) entries."""
    return max(-(-max(1, math.floor(density * f.numel)) // _side(f)) for f in factors)


def _side(f: Factors) -> int:
    return f.b_OR.shape[0] + f.a_RI.shape[1]
