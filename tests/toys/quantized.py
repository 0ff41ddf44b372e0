"""Small quantised models, and adapters on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
GOLDEN = Path(__file__).parents[1] / "golden" / "quantized"
Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def coded(state: State) -> tuple[State, State]:
    """The state with FP8 matrices in blocks of 16 x 16, cut at their ends, and the values that they stand for."""
    stored, values = dict(state), dict(state)
    for name, tensor in state.items():
        if "_proj" in name:
            blocks, made = [-(-n // 16) for n in tensor.shape], torch.Generator().manual_seed(3)
            scale = torch.rand(*blocks, generator=made) / 100 + 1e-3
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


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def golden_layer(case: str) -> tuple[State, dict[str, Any], torch.Tensor]:
    """What compressed-tensors stored and read back (see tools/make_quantized_golden.py)."""
    path = GOLDEN / f"{case}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    stored = load_file(path)
    values = stored.pop("values")
    return stored, config, values


def words(codes: torch.Tensor, bits: int, order: tuple[int, ...]) -> torch.Tensor:
    """Pack codes along the last dimension into words of 32 bits: code `i` of a word has the place `order[i]`."""
    held = codes.reshape(*codes.shape[:-1], -1, 32 // bits).to(torch.int64)
    packed = sum(held[..., i] << (bits * place) for i, place in enumerate(order))
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def gptq_layer(
    stem: str, bits: int, *, ordered: bool, form: str = "gptq", awq: bool = False
) -> tuple[State, dict[str, Any], torch.Tensor]:
    """GPTQ (packed along the inputs) and AWQ (along the outputs, interleaved), by the definition of the formats.

    weight[out, in] = scales[group of in, out] * (code - zero point); GPTQ stores zero points less one.
    """
    inputs, outputs, size = 64, 40, 16
    made = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (inputs, outputs), generator=made)
    zeros = torch.randint(1, 1 << bits, (inputs // size, outputs), generator=made)
    scales = (torch.rand(inputs // size, outputs, generator=made) / 100 + 1e-3).half()
    groups = torch.arange(inputs) // size
    groups = groups[torch.randperm(inputs, generator=made)] if ordered else groups
    values = (scales.float()[groups] * (codes - zeros[groups]).float()).T.contiguous()
    straight = tuple(range(32 // bits))
    if awq:
        order = (0, 4, 1, 5, 2, 6, 3, 7)
        stored = {"qweight": words(codes, 4, order), "qzeros": words(zeros, 4, order), "scales": scales}
        config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}
    else:
        less = zeros - 1 if form == "gptq" else zeros
        packed = words(codes.T.contiguous(), bits, straight).T.contiguous()
        stored = {"qweight": packed, "qzeros": words(less, bits, straight), "scales": scales, "g_idx": groups.int()}
        config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": size,
            "checkpoint_format": form,
            "desc_act": ordered,
        }
    return {f"{stem}.{part}": tensor for part, tensor in stored.items()}, config, values


def four_bit_layer(
    stem: str, kind: str, shape: tuple[int, int], *, nested: bool
) -> tuple[State, dict[str, Any], torch.Tensor]:
    """What bitsandbytes stored and read back, by its implementation for every device: that of the CPU is wrong (0.50.2)
    where a row is longer than a block and not a multiple of it."""
    from bitsandbytes import functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    weight = random(*shape) * 0.05
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    stored = {
        f"{stem}.weight": codes,
        **{f"{stem}.weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()},
    }
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    values = _dequantize_4bit_compute(codes.reshape(-1), absmax, state.code, 64, shape, torch.float32)
    if shape[1] % 64 == 0:
        assert torch.equal(values, functional.dequantize_4bit(codes, state))
    return stored, config, values
