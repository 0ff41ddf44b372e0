"""The metrics of an audit written out on dense float64 deltas, as a reader of the definitions would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

Dense = NDArray[np.float64]


def plain_metrics(delta: Dense, weight: Dense | None, epsilons: tuple[float, ...]) -> dict[str, Any]:
    """Every metric of one tensor (or of several put end to end) by its definition."""
    d = np.abs(delta.ravel())
    n, l1, square = d.size, d.sum(), (d**2).sum()
    ordered = np.sort(d**2)[::-1]
    curve = np.concatenate([[0.0], np.cumsum(ordered)])
    rms = np.sqrt(square / n)
    found: dict[str, Any] = {
        "sparsity": {e: (d < np.float32(e)).mean() for e in epsilons},
        "zeros": (d == 0).mean(),
        "relative_rms": {t: (d <= t * rms).mean() for t in (0.01, 0.1)},
        "relative_max": {t: (d <= t * d.max()).mean() for t in (0.001, 0.01, 0.1)},
        "hoyer": (np.sqrt(n) - l1 / np.sqrt(square)) / (np.sqrt(n) - 1),
        "participation": square**2 / (n * (d**4).sum()),
        "top_energy": {k: np.interp(k * n, np.arange(n + 1), curve) / square for k in (0.01, 0.05, 0.1, 0.2, 0.5)},
        "density_for": {e: np.interp(e * square, curve, np.arange(n + 1)) / n for e in (0.5, 0.9)},
        "norm": np.sqrt(square),
        "largest": d.max(),
    }
    if weight is not None:
        moved, before = torch.from_numpy(weight + delta).float(), torch.from_numpy(weight).float()
        found["bf16_sparsity"] = float((moved.bfloat16() == before.bfloat16()).double().mean())
        found["relative_norm"] = np.sqrt(square) / np.sqrt((weight**2).sum())
    return found


def plain_pair(one: Dense, other: Dense, epsilon: float, density: float) -> dict[str, float]:
    """Every metric of a pair by its definition."""
    a, b = one.ravel(), other.ravel()
    both = (a != 0) & (b != 0)
    differ = both & (np.sign(a) != np.sign(b))
    above = (np.abs(a) >= epsilon) & (np.abs(b) >= epsilon)
    least = np.minimum(np.abs(a), np.abs(b))
    kept = max(1, int(density * a.size))
    tops = [set(np.argsort(-np.abs(x), kind="stable")[:kept].tolist()) for x in (a, b)]
    chance = kept * kept / a.size
    return {
        "cosine": a @ b / (np.linalg.norm(a) * np.linalg.norm(b)),
        "conflict": differ.sum() / both.sum(),
        "conflict_above": (differ & above).sum() / max(above.sum(), 1),
        "conflict_weighted": least[differ].sum() / least.sum(),
        "overlap": len(tops[0] & tops[1]) / len(tops[0] | tops[1]),
        "overlap_chance": chance / (2 * kept - chance),
        "conflict_energy_left": (a[differ] ** 2).sum() / (a**2).sum(),
    }


def dense_by_definition(base: Path, adapter: Path) -> dict[str, Dense]:
    """The deltas of an adapter that PEFT saved on a Llama: LoRA, rsLoRA, DoRA, embeddings and modules_to_save, in float64."""
    weights = {n: t.double().numpy() for n, t in load_file(base / "model.safetensors").items()}
    held = {
        n.removeprefix("base_model.model."): t.double().numpy()
        for n, t in load_file(adapter / "adapter_model.safetensors").items()
    }
    config = json.loads((adapter / "adapter_config.json").read_text())
    rank = config["r"]
    scale = config["lora_alpha"] / (np.sqrt(rank) if config["use_rslora"] else rank)
    found = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in held:
            delta = scale * held[f"{stem}.lora_B.weight"] @ held[f"{stem}.lora_A.weight"]
            if config["use_dora"]:
                moved = weight + delta
                magnitude = held[f"{stem}.lora_magnitude_vector"]
                delta = magnitude[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True) - weight
            found[name] = delta
        elif f"{stem}.lora_embedding_A" in held:
            found[name] = scale * (held[f"{stem}.lora_embedding_B"] @ held[f"{stem}.lora_embedding_A"]).T
        elif name in held:
            found[name] = held[name] - weight
    return found
