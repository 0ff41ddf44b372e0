"""Small quantised models, and adapters on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def coded(state: State) -> tuple[State, State]:
    """The state with FP8 matrices in blocks of 16 x 16 (cut at 24), and the values that they stand for."""
    stored, values = dict(state), dict(state)
    for name, tensor in state.items():
        if "_proj" in name:
            scale = torch.rand(-(-tensor.shape[0] // 16), 2, generator=torch.Generator().manual_seed(3)) / 100 + 1e-3
            spread = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)[: len(tensor), : tensor.shape[1]]
            stored[name] = (tensor.float() / spread).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            values[name] = stored[name].float() * spread
    return stored, values


def lora(folder: Path, base: State, seed: int, size: float = 1.0) -> tuple[Path, State]:
    """An adapter on two modules, and its deltas, which `size` multiplies."""
    folder.mkdir()
    made, factors, deltas = torch.Generator().manual_seed(seed), dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for stem in (Q, UP):
        rows, columns = base[f"{stem}.weight"].shape
        a, b = torch.randn(4, columns, generator=made) * 0.1, torch.randn(rows, 4, generator=made) * (0.1 * size)
        factors |= {f"base_model.model.{stem}.lora_A.weight": a, f"base_model.model.{stem}.lora_B.weight": b}
        deltas[f"{stem}.weight"] = 2 * b @ a
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, deltas


def asked(base: Path, *sources: object, **more: Any) -> dict[str, Any]:
    models = [{"model": str(source), "parameters": {"weight": 0.5}} for source in sources]
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, **more}


def mxfp4_experts(state: State) -> tuple[State, State, dict[str, Any]]:
    """gpt-oss with its experts as MXFP4, and as the values that transformers reads."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, values, made = dict(state), dict(state), torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith("_proj") and tensor.ndim == 3:
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=made, dtype=torch.uint8)
            scales = torch.randint(118, 124, blocks.shape[:-1], generator=made, dtype=torch.uint8)
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            values[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return stored, values, {"quant_method": "mxfp4"}
