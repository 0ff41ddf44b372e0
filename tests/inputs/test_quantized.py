"""Quantised checkpoints read as float32: the values of the reference, bit for bit, however they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

from paft_merge.errors import CheckpointError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.quantized import dequantized
from paft_merge.inputs.quantized.dequantized import Dequantized
from paft_merge.inputs.quantized.rounding import Rounding
from paft_merge.inputs.quantized.weights import byte_values

State = dict[str, torch.Tensor]
STEM = "model.layers.0.mlp.down_proj"
GOLDEN = Path(__file__).parents[1] / "golden" / "quantized"
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


def gpt_oss() -> Sample:
    """Experts of gpt-oss, with the values of transformers: blocks of 16 bytes along the inputs, experts transposed."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    name, made = "model.layers.0.mlp.experts.gate_up_proj", torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), generator=made, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 10, 4), generator=made, dtype=torch.uint8)
    values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return Sample({f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"}, values, name)


def golden(case: str) -> Sample:
    """What compressed-tensors stored and read back (see tools/make_quantized_golden.py)."""
    path = GOLDEN / f"{case}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    stored = load_file(path)
    return Sample(stored, config, stored.pop("values"))


def ordered_groups() -> Sample:
    """Packed INT4 with activation order: `weight_g_idx` has the group of each column."""
    sample = golden("int4_group")
    groups = torch.randint(0, 3, (96,), generator=torch.Generator().manual_seed(0))
    scale = sample.stored[f"{STEM}.weight_scale"]
    codes = sample.values / scale.repeat_interleave(32, 1)
    more = {f"{STEM}.weight_g_idx": groups.int()}
    return replace(sample, stored={**sample.stored, **more}, values=codes.round() * scale[:, groups])


def words(codes: torch.Tensor, bits: int, order: tuple[int, ...]) -> torch.Tensor:
    """Pack codes along the last dimension into words of 32 bits: code `i` of a word has the place `order[i]`."""
    held = codes.reshape(*codes.shape[:-1], -1, 32 // bits).to(torch.int64)
    packed = sum(held[..., i] << (bits * place) for i, place in enumerate(order))
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def gptq(bits: int, *, ordered: bool, form: str = "gptq", awq: bool = False) -> Sample:
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
    return Sample({f"{STEM}.{part}": tensor for part, tensor in stored.items()}, config, values)


def four_bits(kind: str, shape: tuple[int, int], *, nested: bool) -> Sample:
    """What bitsandbytes stored and read back, by its implementation for every device: that of the CPU is wrong (0.50.2)
    where a row is longer than a block and not a multiple of it."""
    from bitsandbytes import functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    weight = random(*shape) * 0.05
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    stored = {WEIGHT: codes, **{f"{WEIGHT}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    values = _dequantize_4bit_compute(codes.reshape(-1), absmax, state.code, 64, shape, torch.float32)
    if shape[1] % 64 == 0:
        assert torch.equal(values, functional.dequantize_4bit(codes, state))
    return Sample(stored, config, values)


def int8() -> Sample:
    """What bitsandbytes stored and read back on the CPU."""
    from bitsandbytes import functional

    codes, scale, _ = functional.int8_vectorwise_quant((random(20, 48) * 0.05).half())
    stored = {WEIGHT: codes, f"{STEM}.SCB": scale, f"{STEM}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return Sample(stored, config, functional.int8_vectorwise_dequant(codes, scale))


def modelopt() -> Sample:
    """NVFP4 of ModelOpt: 4-bit floats times a scale for 16 of them, which is FP8 times one for the tensor."""
    sample = golden("nvfp4")
    codes, scale = (sample.stored[f"{STEM}.weight_{part}"] for part in ("packed", "scale"))
    of_all = torch.tensor(0.0037)
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat([magnitudes, -magnitudes])
    values = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], -1).flatten(1)
    values *= (scale.float() * of_all).repeat_interleave(16, 1)
    stored = {WEIGHT: codes, f"{STEM}.weight_scale": scale, f"{STEM}.weight_scale_2": of_all}
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    return Sample({**stored, f"{STEM}.input_scale": torch.ones(())}, config, values)


SAMPLES: dict[str, Callable[[], Sample]] = {
    "fp8 blocks": lambda: fp8((256, 384), positive(2, 3), "weight_scale_inv", BLOCKS, E4M3),
    "fp8 blocks, bfloat16 scales": lambda: fp8((256, 128), positive(2, 1).bfloat16(), "weight_scale_inv", BLOCKS, E4M3),
    "fp8 cut blocks": cut_blocks,
    "fp8 experts": stacked_experts,
    "fp8 e5m2 tensor": lambda: fp8((16, 24), positive(1), "weight_scale_inv", TENSOR, E5M2),
    "fp8 scalar": lambda: fp8((16, 24), positive(1)[0], "weight_scale_inv", TENSOR, E4M3),
    "gpt-oss": gpt_oss,
    **{path.stem: partial(golden, path.stem) for path in sorted(GOLDEN.iterdir())},
    "gptq": lambda: gptq(4, ordered=False),
    "gptq with groups in another order": lambda: gptq(4, ordered=True),
    "gptq 8 bits": lambda: gptq(8, ordered=False),
    "gptq v2": lambda: gptq(4, ordered=False, form="gptq_v2"),
    "awq": lambda: gptq(4, ordered=False, awq=True),
    "nf4": lambda: four_bits("nf4", (24, 40), nested=False),
    "nf4 nested": lambda: four_bits("nf4", (130, 160), nested=True),
    "fp4 nested": lambda: four_bits("fp4", (33, 64), nested=True),
    "int8": int8,
    "modelopt": modelopt,
    "int4 with groups in another order": ordered_groups,
    "fp8 rows": lambda: fp8((16, 24), positive(16, 1), "weight_scale", {"quant_method": "fbgemm_fp8"}, E4M3),
}


@pytest.mark.parametrize("kind", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"])
def test_the_values_of_every_float8_are_those_of_torch(kind: str) -> None:
    wanted = torch.arange(256, dtype=torch.uint8).view(getattr(torch, f"float8_{kind}")).float().numpy()
    got = byte_values({"float8_e4m3fn": "F8_E4M3"}.get(f"float8_{kind}", f"F8_{kind.upper()}"))
    assert np.array_equal(got, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(wanted[~np.isnan(wanted)]))


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


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_value_within_the_interval_of_a_code_is_nearest_to_it(kind: str, tmp_path: Path) -> None:
    sample = SAMPLES[kind]()
    with opened(sample.save(tmp_path / "m")) as checkpoint:
        assert isinstance(checkpoint, Dequantized)
        weight, width = checkpoint.weights[sample.name], sample.values.shape[-1]
        low, high = (ends.reshape(2, width) for ends in checkpoint.intervals(sample.name, 0, 2 * width))
        values = sample.values.reshape(-1, width)[:2].numpy()

        def every(level: float, table: Any) -> Any:
            return np.full_like(table, level)

        tables: list[Any] = []
        weight.decode(checkpoint.parts, 0, 2, np.empty((2, width), np.float32), lambda t: tables.append(t) or t)
        held = np.unique(tables[0][np.isfinite(tables[0])])
        levels = np.empty((len(held), 2, width), np.float32)
        for level, out in zip(held, levels, strict=True):
            weight.decode(checkpoint.parts, 0, 2, out, partial(every, level))
        step = np.abs(np.diff(levels, axis=0)).min(0)
        probes = values + random(2, width).numpy() * (0.1 * np.abs(values) + 0.5 * step)
        nearest = np.take_along_axis(levels, np.abs(levels - probes).argmin(0)[None], 0)[0]
        inside = (low <= probes) & (probes <= high)
        assert np.array_equal(inside, nearest == values)
        assert 0 < inside.sum() < inside.size


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
        ({WEIGHT: None}, "without"),
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


GROUPS = f"{STEM}.weight_g_idx"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("kind", "config", "changed", "said"),
    [
        ("int4_group", {"config_groups": [1]}, {}, "no group of quantization_config"),
        ("int4_group", {"config_groups": {"g": {"targets": 8, "weights": {"num_bits": 4}}}}, {}, "no group"),
        ("int4_group", {"config_groups": {"g": {"targets": ["Linear"], "weights": "x"}}}, {}, "no group"),
        ("int4_group", {"ignore": ["re:.*down_proj"]}, {}, "are not quantised, and they are stored as codes"),
        ("int4_group", {"transform_config": {"config_groups": {}}}, {}, "rotated"),
        ("int4_group", {"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "sparse"),
        ("int4_channel", {}, {f"{STEM}.weight_shape": torch.tensor([16, 3])}, "says 3 columns"),
        ("int8_channel_zeros", {}, {f"{STEM}.weight_zero_point": None}, "zero points"),
        ("nvfp4", {}, {f"{STEM}.weight_scale": torch.ones(16, 4, dtype=torch.uint8)}, "is U8"),
        ("nvfp4", {}, {f"{STEM}.weight_global_scale": None}, "without weight_global_scale"),
        ("modelopt", {"quant_algo": "W4A16_AWQ"}, {}, "W4A16_AWQ"),
        ("modelopt", {}, {f"{STEM}.pre_quant_scale": torch.ones(64)}, "pre_quant_scale"),
        ("modelopt", {}, {f"{STEM}.weight_scale": None}, "without scales"),
        ("gpt-oss", {}, {"model.layers.0.mlp.experts.gate_up_proj_scales": None}, "without scales"),
        ("gptq", {"bits": 3}, {}, "GPTQ, 3 bits"),
        ("gptq", {"checkpoint_format": "marlin"}, {}, "marlin"),
        ("gptq with groups in another order", {}, {f"{STEM}.g_idx": None}, "desc_act"),
        ("awq", {"version": "gemv"}, {}, "gemv"),
        ("awq", {}, {f"{STEM}.qzeros": None}, "qzeros"),
        ("nf4", {"load_in_4bit": False}, {}, "does not say load_in_4bit"),
        ("nf4", {}, {STATE: torch.ones(9, dtype=torch.uint8)}, "is not the JSON of a state"),
        ("nf4", {}, {f"{WEIGHT}.absmax": torch.ones(3)}, "is [3], and"),
        ("int8", {}, {f"{STEM}.SCB": None}, "without scales"),
        ("fp8 blocks", {}, {WEIGHT: torch.ones(0, 384).to(E4M3), SCALES: torch.ones(0, 3)}, "has no entries"),
    ],
)
def test_every_format_refuses_parts_and_configs_that_do_not_agree(
    kind: str, config: dict[str, Any], changed: dict[str, torch.Tensor | None], said: str, tmp_path: Path
) -> None:
    sample = SAMPLES[kind]()
    assert said in refused(replace(sample, config={**sample.config, **config}).save(tmp_path / "m", **changed))


@pytest.mark.parametrize(("kind", "name"), [("int4 with groups in another order", GROUPS), ("gptq", f"{STEM}.g_idx")])
def test_a_column_of_a_group_that_does_not_exist_is_an_error(kind: str, name: str, tmp_path: Path) -> None:
    sample = SAMPLES[kind]()
    groups = sample.stored[name].clone()
    groups[5] = 9
    with opened(sample.save(tmp_path / "m", **{name: groups})) as checkpoint:
        with pytest.raises(CheckpointError, match=name):
            checkpoint.tensor(WEIGHT)


def test_a_method_that_is_not_read_stays_as_it_is(tmp_path: Path) -> None:
    sample = SAMPLES["fp8 blocks"]()
    for config in ({**BLOCKS, "quant_method": "other"}, {**BLOCKS, "quant_method": 3}):
        with opened(replace(sample, config=config).save(tmp_path / "m")) as checkpoint:
            assert checkpoint.tensors.keys() == {*PLAIN, *sample.stored}
    older = four_bits("nf4", (8, 64), nested=False)
    del older.config["quant_method"]
    with opened(older.save(tmp_path / "old")) as checkpoint:
        assert checkpoint.stored_format(WEIGHT) == "NF4"


WRITTEN = [kind for kind in SAMPLES if kind.startswith(("fp8", "gpt-oss", "mxfp4"))]


@pytest.mark.parametrize("how", [Rounding(), Rounding(refit=False), Rounding(key=7)], ids=["refit", "keep", "random"])
@pytest.mark.parametrize("kind", WRITTEN)
def test_values_of_codes_are_written_as_the_same_bytes(kind: str, how: Rounding, tmp_path: Path) -> None:
    """Values that the codes have are rounded to these codes, in any blocks of rows."""
    sample = SAMPLES[kind]()
    with opened(sample.save(tmp_path / "m")) as checkpoint:
        assert isinstance(checkpoint, Dequantized)
        weight, values = checkpoint.weights[sample.name], sample.values.flatten(0, -2).numpy()
        assert weight.unit
        written = {part: np.zeros(checkpoint.inner.tensors[part].nbytes, np.uint8) for part in weight.parts[:2]}
        for row in range(0, len(values), weight.unit):
            pieces, decoded = weight.encode(checkpoint.parts, row, values[row : row + weight.unit], how)
            assert np.array_equal(decoded, values[row : row + weight.unit])
            for piece in pieces:
                for run, data in enumerate(piece.data):
                    at = piece.start + run * piece.stride
                    written[piece.part][at : at + len(data)] = data
        for part, data in written.items():
            wanted = sample.stored[part].reshape(-1).view(torch.uint8).numpy()
            assert np.array_equal(data, wanted)


def test_other_formats_are_not_written(tmp_path: Path) -> None:
    for kind in ("int4_group", "nvfp4", "gptq", "awq", "nf4", "int8", "modelopt", "int8_w8a8"):
        sample = SAMPLES[kind]()
        with opened(sample.save(tmp_path / kind)) as checkpoint:
            assert isinstance(checkpoint, Dequantized)
            assert checkpoint.weights[sample.name].unit == 0
