"""Tiny random checkpoints and adapters, made afresh in `tmp_path`; no network, no GPU."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes of pytest-xdist use the cores; more threads wait for them
os.environ.pop("COLUMNS", None)  # set by pytest-xdist; the width of tables must not depend on it

import pytest
import torch
from safetensors.torch import save_file

from paft_merge.compute.kernels import object_cache

State = dict[str, torch.Tensor]

object_cache._COMPILER.announced = True  # tests compare what commands print, whether or not the cache is cold


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: tests of workers, leases and signals wait for most of their time."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave ten thousand tests and the imported libraries out of every later garbage collection, a fifth of all time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def random_state(seed: int, dtype: torch.dtype = torch.float32, layers: int = 3, width: int = 24) -> State:
    """A few layers of matrices and vectors, an embedding and a norm, as a small language model names them."""
    made = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=made) * 0.02).to(dtype)

    state = {
        "model.embed_tokens.weight": draw(40, width),
        "model.norm.weight": draw(width),
        "lm_head.weight": draw(40, width),
    }
    for i in range(layers):
        state[f"model.layers.{i}.self_attn.q_proj.weight"] = draw(width, width)
        state[f"model.layers.{i}.mlp.up_proj.weight"] = draw(2 * width, width)
        state[f"model.layers.{i}.input_layernorm.weight"] = draw(width)
    return state


def near(state: Mapping[str, torch.Tensor], seed: int, size: float = 1e-3) -> State:
    """A fine-tune of `state`: every element moved by a Gaussian of standard deviation `size`."""
    made = torch.Generator().manual_seed(seed)
    return {n: (t.float() + size * torch.randn(t.shape, generator=made)).to(t.dtype) for n, t in state.items()}


def save_checkpoint(
    folder: Path, state: Mapping[str, torch.Tensor], shards: int = 1, config: Mapping[str, object] | None = None
) -> Path:
    """Write a checkpoint folder, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(state)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "tie_word_embeddings": False, **(config or {})})
    )
    if shards == 1:
        save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: state[n] for n in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_adapter(
    folder: Path, base: Mapping[str, torch.Tensor], seed: int, rank: int = 4, alpha: int = 8, size: float = 1e-2
) -> Path:
    """Write a LoRA adapter, as PEFT lays it out, on every matrix of the layers of `base`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = torch.Generator().manual_seed(seed)
    factors = {}
    for name, weight in base.items():
        if ".layers." in name and weight.ndim == 2:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{stem}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=made) * size
            factors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=made) * size
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj", "up_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def dense_deltas(folder: Path, base: Mapping[str, torch.Tensor]) -> State:
    """The deltas of an adapter of `save_adapter`, in float64, straight from the definition."""
    from safetensors.torch import load_file

    factors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    scale = config["lora_alpha"] / config["r"]
    deltas = {}
    for name in base:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in factors:
            deltas[name] = scale * factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
    return deltas


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """Makes a base, two fine-tunes and two adapters of it: `family(dtype=..., shards=...)` gives their folders by name."""

    def make(dtype: torch.dtype = torch.float32, shards: int = 1) -> dict[str, Path]:
        base = random_state(0, dtype)
        return {
            "base": save_checkpoint(tmp_path / "base", base, shards),
            "x": save_checkpoint(tmp_path / "x", near(base, 1), shards),
            "y": save_checkpoint(tmp_path / "y", near(base, 2, 2e-3), shards),
            "sft": save_adapter(tmp_path / "sft", base, 3),
            "dpo": save_adapter(tmp_path / "dpo", base, 4, rank=2, size=5e-3),
        }

    return make
