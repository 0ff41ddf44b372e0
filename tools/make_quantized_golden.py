"""Write tests/golden/quantized/: small weights that compressed-tensors quantised, with the values that it reads back.

pip install compressed-tensors==0.20.1; python tools/make_quantized_golden.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

FOLDER = Path(__file__).parent.parent / "tests" / "golden" / "quantized"
STEM = "model.layers.0.mlp.down_proj"
INT4 = {"num_bits": 4, "type": "int"}
FP8 = {"num_bits": 8, "type": "float"}
FP4 = {"num_bits": 4, "type": "float"}

CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "int4_group": ("pack-quantized", {**INT4, "strategy": "group", "group_size": 32, "symmetric": True}, (24, 96)),
    "int4_group_zeros": ("pack-quantized", {**INT4, "strategy": "group", "group_size": 32, "symmetric": False}, (20, 64)),
    "int4_channel": ("pack-quantized", {**INT4, "strategy": "channel", "symmetric": True}, (16, 52)),
    "int8_channel_zeros": (
        "pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}, (18, 33),
    ),
    "int8_w8a8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}, (16, 40)),
    "fp8_tensor": ("float-quantized", {**FP8, "strategy": "tensor", "symmetric": True}, (16, 40)),
    "fp8_channel": ("float-quantized", {**FP8, "strategy": "channel", "symmetric": True}, (16, 40)),
    "fp8_block": (
        "float-quantized", {**FP8, "strategy": "block", "block_structure": [16, 16], "symmetric": True}, (32, 48),
    ),
    "nvfp4": ("nvfp4-pack-quantized", {**FP4, "strategy": "tensor_group", "group_size": 16, "symmetric": True}, (16, 64)),
    "mxfp4": ("mxfp4-pack-quantized", {**FP4, "strategy": "group", "group_size": 32, "symmetric": True}, (16, 64)),
}  # fmt: skip


def _limits(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest entry of each block."""
    rows, columns = weight.shape
    if args.strategy == "block":
        tall, wide = args.block_structure
        blocks = weight.reshape(rows // tall, tall, columns // wide, wide)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    width = args.group_size if args.group_size and args.group_size > 0 else columns
    groups = weight.reshape(rows, columns // width, width)
    return groups.amin(-1), groups.amax(-1)


def _made(
    number: int, form: str, weights: dict[str, Any], shape: tuple[int, int]
) -> tuple[dict[str, torch.Tensor], Any]:
    args = QuantizationArgs(**weights)
    acts = QuantizationArgs(num_bits=8, type=args.type) if form in ("int-quantized", "float-quantized") else None
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=acts, format=form)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 0.05
    low, high = _limits(weight, args)
    state: dict[str, torch.Tensor] = {"weight": weight}
    if form.startswith("nvfp4"):
        state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
    scale, zeros = calculate_qparams(low, high, args, state.get("weight_global_scale"))
    state |= {"weight_scale": scale, "weight_zero_point": zeros}
    compressor = BaseCompressor.load_from_registry(form)
    kind = compressor if isinstance(compressor, type) else type(compressor)
    stored = kind.compress(state, scheme)
    read = dict(stored)
    if form.startswith("nvfp4"):  # its decompressor rounds to bfloat16
        codes = unpack_fp4_from_uint8(read["weight_packed"], *shape, dtype=torch.float32)
        scales = read["weight_scale"].float()
        values = dequantize(codes, scales, args=args, global_scale=read["weight_global_scale"], dtype=torch.float32)
    else:
        values = kind.decompress(read, scheme)["weight"].float()
    tensors = {f"{STEM}.{name}": tensor.detach().contiguous() for name, tensor in stored.items()}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return {**tensors, "values": values.contiguous()}, config


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, (name, case) in enumerate(CASES.items()):
        tensors, config = _made(number, *case)
        save_file(tensors, FOLDER / f"{name}.safetensors", metadata={"config": json.dumps(config)})


if __name__ == "__main__":
    main()
