"""What is written beside an adapter: `paft_train.json`, the model card, and the trimmed delta as a SHiRA adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from paft_merge.errors import TrainError
from paft_merge.training.place import DONE_FILE, write_json
from paft_merge.training.sparsity import Factors, Stats, trimmed
from paft_merge.training.spec import AdapterSpec

FORMAT = 1
PACKAGES = ("paft-merge", "torch", "transformers", "trl", "peft", "datasets", "accelerate")


def versions() -> dict[str, str]:
    """Versions of the packages that make an adapter."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_record(
    folder: Path, spec: AdapterSpec, stats: Stats, *, base: dict[str, Any], data: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any]:
    """Write `paft_train.json` and return it: what made the adapter, and how large and sparse its delta is.

    Keys: `format`, `objective`, `base` (name, digest), `spec` (the section with defaults), `data` (fingerprint, rows,
    counts of cut rows), `delta` (norm, relative_norm and the sparsities, in all and by matrix), `run` (steps, losses,
    strength, warnings), `versions`.
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
        f"A {record['objective'].upper()} adapter for `{record['base']['name']}`, trained with paft_merge ({how}).", "",
        "| the delta | |", "|---|---|",
        f"| norm | {delta['norm']:.4g} |",
        f"| norm relative to the weights beneath | {relative} |",
        f"| entries below 1e-5 (PAFT's sparsity) | {delta['below_epsilon']:.1%} |",
        f"| entries below a tenth of the rms | {delta['below_tenth_rms']:.1%} |",
        f"| exact zeros | {delta['exact_zero']:.1%} |",
        f"| energy in the top 10 % of entries | {delta['energy_top_10']:.1%} |",
        f"| effective rank (mean) | {rank} |", "",
        f"Data: {record['data']['rows']} rows, fingerprint `{record['data']['fingerprint']}`. "
        f"Steps: {run['steps']}. All settings are in `{DONE_FILE}`.", "",
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


@torch.no_grad()
def write_trimmed(folder: Path, factors: Sequence[Factors], density: float, base: str) -> float:
    """Write the magnitude-pruned delta as a SHiRA adapter, PEFT's format for sparse updates of full rank.

    SHiRA stores the same r * (out + in) entries for every matrix, so r is the smallest that holds the densest one and
    the others are padded with explicit zeros.

    Returns:
        The density that was written, over all entries.

    Raises:
        TrainError: TRIM, when a matrix is too small for the format.
    """
    from safetensors.torch import save_file

    kept = {f.name: max(1, math.floor(density * f.numel)) for f in factors}
    rank = max(-(-kept[f.name] // _side(f)) for f in factors)
    tensors, names = {}, []
    for f in factors:
        slots = rank * _side(f)
        if slots > f.numel:
            fix = "leave trim out and trim in the merge (trim: {density: ...}), or use a smaller density"
            raise TrainError.of("TRIM", f.name, f"a SHiRA adapter of rank {rank} has more entries than the matrix", fix)
        delta = trimmed(f, density).cpu()
        flat = delta.flatten()
        chosen = torch.zeros(flat.numel(), dtype=torch.bool)
        chosen[flat != 0] = True
        spare = slots - int(chosen.sum())
        chosen[(~chosen).nonzero().flatten()[:spare]] = True
        where = chosen.nonzero().flatten()
        tensors[f"base_model.model.{f.name}.shira_weight"] = flat[where].contiguous()
        rows_cols = torch.stack([where // delta.shape[1], where % delta.shape[1]])
        tensors[f"base_model.model.{f.name}.shira_indices"] = rows_cols.to(torch.int32).contiguous()
        names.append(f.name)
    config = {
        "peft_type": "SHIRA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "random_seed": 0,
        "mask_type": "random", "target_modules": names, "inference_mode": True, "fan_in_fan_out": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", config)
    return sum(kept.values()) / sum(f.numel for f in factors)


def _side(f: Factors) -> int:
    return f.b_OR.shape[0] + f.a_RI.shape[1]
