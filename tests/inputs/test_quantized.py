"""Quantised checkpoints read as float32: the values of the reference, bit for bit, however they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_checkpoint

from paft_merge.errors import CheckpointError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.quantized import dequantized

State = dict[str, torch.Tensor]
STEM = "model.layers.0.mlp.down_proj"
WEIGHT = f"{STEM}.weight"
PLAIN = {"model.norm.weight": torch.ones(8), "model.embed_tokens.weight": torch.ones(4, 8, dtype=torch.bfloat16)}


@dataclass(frozen=True)
class Sample:
    """One quantised weight: its stored tensors, the config that belongs to them, and the reference's values."""

    stored: State
    config: dict[str, Any]
    values: torch.Tensor
    name: str = WEIGHT
    more: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, **changed: torch.Tensor | None) -> Path:
        """Write it with plain tensors beside it; `changed`: stored tensors to replace, or to leave out (None)."""
        state = {**PLAIN, **self.stored, **changed}
        kept = {name: tensor for name, tensor in state.items() if tensor is not None}
        return save_checkpoint(folder, kept, config={"quantization_config": self.config, **self.more})


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def fp8(shape: tuple[int, ...], scale: torch.Tensor, marker: str, config: dict[str, Any], kind: torch.dtype) -> Sample:
    """FP8 codes with the scales `scale`; the values are those of transformers' own dequantisation."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = (random(*shape) * 8).to(kind)
    values = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    static = {f"{STEM}.input_scale": torch.ones(())} if config.get("activation_scheme") == "static" else {}
    return Sample({WEIGHT: codes, f"{STEM}.{marker}": scale, **static}, config, values)


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}


def positive(*shape: int, seed: int = 1) -> torch.Tensor:
    return random(*shape, seed=seed).abs() * 1e-2 + 1e-4


def cut_blocks() -> Sample:
    """Blocks that are cut at both ends, as in DeepSeek-V3's `kv_a_proj_with_mqa`."""
    codes, scale = (random(130, 200) * 8).to(E4M3), positive(2, 2)
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:130, :200]
    return Sample({WEIGHT: codes, f"{STEM}.weight_scale_inv": scale}, BLOCKS, codes.float() * spread)


def stacked_experts() -> Sample:
    """Fused experts, each with blocks of its own; the scales are powers of two."""
    name, codes = "model.layers.0.mlp.experts.gate_up_proj", (random(3, 256, 128) * 8).to(E4M3)
    scale = torch.tensor([[[0.5], [0.25]], [[2.0], [4.0]], [[8.0], [1.0]]])
    values = codes.float() * scale.repeat_interleave(128, 1)
    return Sample({name: codes, f"{name}_scale_inv": scale.to(torch.float8_e8m0fnu)}, BLOCKS, values, name)


SAMPLES: dict[str, Callable[[], Sample]] = {
    "fp8 blocks": lambda: fp8((256, 384), positive(2, 3), "weight_scale_inv", BLOCKS, E4M3),
    "fp8 blocks, bfloat16 scales": lambda: fp8((256, 128), positive(2, 1).bfloat16(), "weight_scale_inv", BLOCKS, E4M3),
    "fp8 cut blocks": cut_blocks,
    "fp8 experts": stacked_experts,
    "fp8 e5m2 tensor": lambda: fp8((16, 24), positive(1), "weight_scale_inv", TENSOR, E5M2),
    "fp8 scalar": lambda: fp8((16, 24), positive(1)[0], "weight_scale_inv", TENSOR, E4M3),
    "fp8 rows": lambda: fp8((16, 24), positive(16, 1), "weight_scale", {"quant_method": "fbgemm_fp8"}, E4M3),
}


def opened(folder: Path) -> Checkpoint:
    return dequantized(Checkpoint.open(folder))


@pytest.mark.parametrize("kind", SAMPLES)
def test_values_equal_the_reference_bit_for_bit(kind: str, tmp_path: Path) -> None:
    sample = SAMPLES[kind]()
    with opened(sample.save(tmp_path / "m")) as checkpoint:
        assert set(checkpoint.tensors) == {*PLAIN, sample.name}
        assert "quantization_config" not in checkpoint.config
        assert checkpoint.written_dtype(sample.name) == "BF16"
        got = checkpoint.tensor(sample.name)
        assert got.shape == sample.values.shape
        assert torch.equal(got.view(torch.int32), sample.values.view(torch.int32))
        flat, numel = sample.values.flatten().numpy(), got.numel()
        for first, count in ((1, 1), (numel // 3, 40), (numel - 29, 29), (numel // 2 - 5, numel // 2)):
            part = np.empty(count, np.float32)
            checkpoint.read_into(sample.name, 4 * first, part)
            assert np.array_equal(part, flat[first : first + count])
        for name, tensor in PLAIN.items():
            assert torch.equal(checkpoint.tensor(name), tensor)
        parts = (sample.stored[name] for name in sample.stored if "input_scale" not in name)
        assert checkpoint.bytes_read(sample.name) == sum(part.numel() * part.element_size() for part in parts)


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught, opened(folder):
        pass
    return str(caught.value)


SCALES = f"{STEM}.weight_scale_inv"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({SCALES: None}, "without scales"),
        ({SCALES: torch.ones(3, 3)}, "is [3, 3], and"),
        ({SCALES: torch.ones(2, 3, dtype=torch.int32)}, "is I32"),
        ({WEIGHT: None}, "has scales"),
        ({WEIGHT: torch.ones(256, 384, dtype=torch.bfloat16)}, "is BF16"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused_by_name(
    changed: dict[str, torch.Tensor | None], said: str, tmp_path: Path
) -> None:
    message = refused(SAMPLES["fp8 blocks"]().save(tmp_path / "m", **changed))
    assert said in message
    assert STEM in message


def test_a_layer_that_the_config_excludes_and_codes_of_another_format_are_refused(tmp_path: Path) -> None:
    sample = SAMPLES["fp8 blocks"]()
    excluded = replace(sample, config={**BLOCKS, "modules_to_not_convert": ["lm_head", "mlp.down_proj"]})
    assert f"says in config.json that {WEIGHT!r} are not quantised" in refused(excluded.save(tmp_path / "a"))
    other = {"x.qweight": torch.ones(2, 2, dtype=torch.int32), "x.scales": torch.ones(2, 2)}
    assert "x.qweight" in refused(sample.save(tmp_path / "b", **other))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_without_a_value_is_named(value: float, tmp_path: Path) -> None:
    scale = torch.ones(2, 3)
    scale[1, 2] = value
    with opened(SAMPLES["fp8 blocks"]().save(tmp_path / "m", **{SCALES: scale})) as checkpoint:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.tensor(WEIGHT)
    assert [(one.code, f"{SCALES!r} is {value}" in one.what) for one in caught.value.problems] == [("NONFINITE", True)]
