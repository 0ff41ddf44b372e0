"""Small adapters of every kind that programs read in different ways, and their deltas by definition."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
Q, V = (f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj"))
PREFIX = "base_model.model."


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


def plain(*paths: str, rank: int = 4) -> State:
    """Factors as PEFT names them."""
    found = {}
    for path in paths or (Q, V):
        found[f"{PREFIX}{path}.lora_A.weight"] = draw(rank, 24)
        found[f"{PREFIX}{path}.lora_B.weight"] = draw(24, rank)
    return found


def write(folder: Path, tensors: State, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in fields.items() if v != "absent"}))
    return folder


def base_state(width: int = 24) -> State:
    """A base that has the modules of `plain`."""
    return {f"{name}.weight": draw(width, width) for name in (Q, V, "model.embed_tokens")}


def renamed(old: str, new: str) -> State:
    return {name.replace(old, new): tensor for name, tensor in plain().items()}


MADE: dict[str, Callable[[Path], Path]] = {
    "plain": lambda at: write(at, plain()),
    "bare names": lambda at: write(at, renamed(PREFIX, "")),
    "rsLoRA": lambda at: write(at, plain(), use_rslora=True),
    "alpha pattern": lambda at: write(at, plain(), alpha_pattern={"q_proj": 3}),
    "alpha pattern of the same value": lambda at: write(at, plain(), alpha_pattern={"q_proj": 8}),
    "rank pattern": lambda at: write(at, plain(Q) | plain(V, rank=6), rank_pattern={"v_proj": 6}),
    "both patterns, one scale": lambda at: write(
        at, plain(Q) | plain(V, rank=6), rank_pattern={"v_proj": 6}, alpha_pattern={"v_proj": 12}
    ),
    "DoRA": lambda at: write(at, plain() | {f"{PREFIX}{p}.lora_magnitude_vector": draw(24) for p in (Q, V)}, use_dora=True),
    "norms": lambda at: write(
        at, plain() | {f"{PREFIX}model.norm.weight": draw(24)}, modules_to_save=["norm"]
    ),
    "norms of layers": lambda at: write(
        at, plain() | {f"{PREFIX}model.layers.0.input_layernorm.weight": draw(24)}, modules_to_save=["input_layernorm"]
    ),
    "head": lambda at: write(at, plain() | {f"{PREFIX}lm_head.weight": draw(32, 24)}, modules_to_save=["lm_head"]),
    "bias": lambda at: write(at, plain() | {f"{PREFIX}{Q}.bias": draw(24)}, bias="all"),
    "adapter's name": lambda at: write(at, renamed(".weight", ".default.weight")),
    "wrapped twice": lambda at: write(at, renamed(PREFIX, PREFIX * 2)),
    "half": lambda at: write(at, dict(list(plain().items())[:3])),
    "pattern of targets": lambda at: write(at, plain(), target_modules=r".*\.(q|v)_proj"),
    "no targets": lambda at: write(at, plain(), target_modules="absent"),
    "null targets": lambda at: write(at, plain(), target_modules=None),
    "k alone": lambda at: write(at, plain("model.layers.0.self_attn.k_proj"), target_modules=["k_proj"]),
    "gpt2": lambda at: write(at, plain("transformer.h.0.mlp.c_fc"), target_modules=["c_fc"]),
    "fused experts": lambda at: write(
        at, plain() | plain("model.layers.0.mlp.experts", "model.layers.0.mlp.experts.base_layer", rank=8),
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "experts": lambda at: write(
        at, plain(*(f"model.layers.0.mlp.experts.{i}.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down"))),
        target_modules=["gate_proj", "up_proj", "down_proj"],
    ),
    "head and embeddings": lambda at: write(
        at, plain("lm_head") | {f"{PREFIX}model.embed_tokens.lora_embedding_A": draw(4, 32), f"{PREFIX}model.embed_tokens.lora_embedding_B": draw(24, 4)},
        target_modules=["lm_head", "embed_tokens"],
    ),
    "untargeted head": lambda at: write(at, plain("lm_head")),
}  # fmt: skip


def wanted(folder: Path) -> dict[str, torch.Tensor]:
    """The deltas of an adapter of `MADE`, from the definition of LoRA, without fused experts."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {n: t.double() for n, t in load_file(folder / "adapter_model.safetensors").items()}
    found = {}
    for name, a in tensors.items():
        if ".lora_A" in name or ".lora_embedding_A" in name:
            other = name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
            path = name.replace(PREFIX, "").partition(".lora_")[0]
            alpha = next(
                (v for k, v in config.get("alpha_pattern", {}).items() if path.endswith(k)), config["lora_alpha"]
            )
            scale = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
            if other in tensors:
                product = tensors[other] @ a * scale
                found[path] = product.T if "embed" in path else product
    return found


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.allclose(ours[n], theirs[n], rtol=1e-9, atol=0) for n in ours)
