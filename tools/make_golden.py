"""Make the golden files of tests/golden: tiny inputs, and the exact bytes that each recipe makes of them.

    python tools/make_golden.py           # inputs once, merged files always; a changed file is a change of numerics
    python tools/make_golden.py --check   # compare, write nothing

A change of a merged file has to be told under *Numerics* in the CHANGELOG.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import paft_merge

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
SHAPES = {"model.embed_tokens.weight": (6, 8), "model.layers.0.mlp.up_proj.weight": (12, 8), "model.norm.weight": (8,)}
ADAPTED = "model.layers.0.mlp.up_proj"

SFT = {"weight": 0.6, "density": 0.5}
DPO = {"weight": 0.4, "density": 0.3}
RECIPES = {
    "linear": ("linear", "x", "y", {"weight": 0.6}, {"weight": 0.4}, {}),
    "ties": ("ties", "x", "y", SFT, DPO, {}),
    "ties_global": ("ties", "x", "y", SFT, DPO, {"trim_scope": "global", "elect": "unweighted", "normalize": "count"}),
    "dare_ties": ("dare_ties", "x", "y", SFT, DPO, {}),
    "slerp": ("slerp", "base", "x", {}, {}, {"t": 0.3}),
    "adapters_ties": ("ties", "base+sft", "base+dpo", SFT, DPO, {}),
    "adapters_l1_ties": ("l1_ties", "base+sft", "base+dpo", {"weight": 1.0}, {"weight": 1.0}, {"l1_mass": 0.9}),
    "adapters_stochastic": ("task_arithmetic", "base+sft", "y", {"weight": 1.0}, {"weight": 0.5}, {}),
}
"""Per golden file: method, two sources, their parameters, shared parameters."""


def make_inputs() -> None:
    """Write base, x, y (bfloat16) and the adapters sft, dpo (float32)."""
    made = np.random.default_rng(20241121)

    def draw(*shape: int, size: float) -> torch.Tensor:
        return torch.from_numpy(made.normal(0, size, shape).astype(np.float32))

    base = {name: draw(*shape, size=0.02) for name, shape in SHAPES.items()}
    for folder, size in (("base", 0.0), ("x", 2e-3), ("y", 1e-3)):
        tuned = {name: (weight + draw(*weight.shape, size=size)).bfloat16() for name, weight in base.items()}
        (GOLDEN / folder).mkdir(parents=True, exist_ok=True)
        save_file(tuned, GOLDEN / folder / "model.safetensors", {"format": "pt"})
    for folder, size in (("sft", 0.05), ("dpo", 0.02)):
        factors = {"A": draw(3, 8, size=size), "B": draw(12, 3, size=size)}
        (GOLDEN / folder).mkdir(exist_ok=True)
        named = {f"base_model.model.{ADAPTED}.lora_{part}.weight": factor for part, factor in factors.items()}
        save_file(named, GOLDEN / folder / "adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["up_proj"], "bias": "none"}
        (GOLDEN / folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def recipe(name: str) -> dict[str, object]:
    """The recipe of one golden file."""
    method, one, two, first, second, shared = RECIPES[name]

    models = [{"model": one, "parameters": first}, {"model": two, "parameters": second}]
    base = {} if method == "linear" else {"base_model": "base"}
    rounding = {"rounding": "stochastic", "seed": 3} if name.endswith("stochastic") else {}
    return {"merge_method": method, "models": models, "parameters": shared, **base, **rounding}


def merged(name: str) -> bytes:
    """The bytes that this version makes of a recipe."""
    # References are relative: a random mask belongs to its source's name, and may not know where this clone lies.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(GOLDEN):
        paft_merge.merge(recipe(name), Path(folder) / "out", threads=1)
        return (Path(folder) / "out" / "model.safetensors").read_bytes()


def main() -> None:
    """Make what is missing, or compare."""
    if not (GOLDEN / "base").exists():
        make_inputs()
    different = [n for n in RECIPES if not (p := GOLDEN / f"{n}.safetensors").exists() or p.read_bytes() != merged(n)]
    print("changed:", ", ".join(different) or "nothing")
    if "--check" in sys.argv:
        sys.exit(bool(different))
    for name in different:
        (GOLDEN / f"{name}.safetensors").write_bytes(merged(name))


if __name__ == "__main__":
    main()
