"""Adapters as vLLM, SGLang and llama.cpp read them: the delta of every module, by our own reading of their source.

Each function takes a folder and returns the deltas that the program applies, or raises `RefusedError`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Deltas = dict[str, torch.Tensor]


class RefusedError(Exception):
    """The program stops with an error."""


def _load(folder: Path) -> tuple[dict[str, Any], Deltas]:
    if not (folder / "adapter_model.safetensors").exists():
        raise RefusedError("no adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, {n: t.double() for n, t in load_file(folder / "adapter_model.safetensors").items()}


def _products(pairs: dict[str, Deltas], scale: Callable[[torch.Tensor], float]) -> Deltas:
    found = {}
    for path, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise RefusedError(f"{path} has {sorted(pair)}")
        product = pair["B"] @ pair["A"] * scale(pair["A"])
        found[path] = product.T if "embed" in path else product
    return found


def vllm(folder: Path, fused: bool = False) -> Deltas:
    """As vllm/lora/{peft_helper,lora_model,utils}.py; `fused`: the model's experts are one tensor."""
    config, tensors = _load(folder)
    if not {"r", "lora_alpha", "target_modules"} <= config.keys():
        raise RefusedError("missing fields")
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias", "none") != "none":
        raise RefusedError("modules_to_save, DoRA or bias")
    pairs: dict[str, Deltas] = {}
    for name, tensor in tensors.items():
        if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue
        parts = name.split(".")[2 if name.startswith("base_model.model.") else 0 :]
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            path, part = ".".join(parts[:-2]), parts[-2][-1]
        elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
            path, part = ".".join(parts[:-1]), parts[-1][-1]
        else:
            raise RefusedError(name)
        pairs.setdefault(path, {})[part] = tensor
    used = {p: pair for p, pair in pairs.items() if re.match(r"model\.(layers|embed)|lm_head|transformer", p)}
    used = {p: pair for p, pair in used.items() if fused or "experts" not in p or re.search(r"experts\.\d", p)}
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return _products(used, lambda _: config["lora_alpha"] / root)


def sglang(folder: Path) -> Deltas:
    """As python/sglang/srt/lora/{lora,lora_config,lora_manager,utils}.py."""
    config, tensors = _load(folder)
    if config.get("use_dora") or not isinstance(config.get("target_modules"), list):
        raise RefusedError("DoRA or target_modules")
    pairs: dict[str, Deltas] = {}
    for name, tensor in tensors.items():
        if not re.search(r"layers\.\d+\.", name):
            if not re.search("embed_tokens|lm_head", name):
                continue
            if re.search("embed_tokens|lm_head", name)[0] not in config["target_modules"]:  # type: ignore[index]
                continue
        found = re.search(r"(?:base_model\.model\.)*(.+?)(\.base_layer)?\.lora_(?:embedding_)?([AB])(\.|$)", name)
        if found is None:
            if "base_layer" in name or "layers." not in name:
                continue
            raise RefusedError(name)
        if "experts" in found[1] and not re.search(r"experts\.\d", found[1]):
            continue
        pairs.setdefault(found[1], {})[found[3]] = tensor
    for path in list(pairs):
        stem = re.sub(r"\.[qkv]_proj$", "", path)
        if stem != path and not {f"{stem}.q_proj", f"{stem}.v_proj"} <= pairs.keys():
            raise RefusedError(stem)
    whole = {path: pair for path, pair in pairs.items() if len(pair) == 2}
    return _products(whole, lambda _: config["lora_alpha"] / config["r"])


def llamacpp(folder: Path) -> Deltas:
    """As convert_lora_to_gguf.py, and src/llama-adapter.cpp after it."""
    config, tensors = _load(folder)
    pairs: dict[str, Deltas] = {}
    for name, tensor in tensors.items():
        found = re.search(r"(.*)\.lora_(?:([AB])\.weight|embedding_([AB])$)", name)
        if found is None:
            if ".base_layer.weight" in name or "_layernorm" in name or ".norm" in name:
                continue
            raise RefusedError(name)
        path = found[1].replace("base_model.model.", "")
        if (
            not re.match(r"(model|transformer)\.(layers|h|embed)|lm_head", path)
            or found[1].count("base_model.model.") > 1
        ):
            raise RefusedError(path)
        if "experts" in path and not re.search(r"experts\.\d", path):
            raise RefusedError(path)
        pairs.setdefault(path, {})[found[2] or found[3]] = tensor
    return _products(pairs, lambda a: config["lora_alpha"] / len(a))


READERS: dict[str, Callable[[Path], Deltas]] = {"vllm": vllm, "sglang": sglang, "llamacpp": llamacpp}
