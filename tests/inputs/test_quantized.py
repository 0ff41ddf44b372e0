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
from safetensors.torch import save_file
from toys.quantized import GOLDEN, four_bit_layer, golden_layer, gptq_layer, random

from paft_merge.errors import CheckpointError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.quantized import dequantized
from paft_merge.inputs.quantized.dequantized import Dequantized
from paft_merge.inputs.quantized.rounding import Rounding
from paft_merge.inputs.quantized.weights import byte_values

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
    return Sample(*golden_layer(case))


def ordered_groups() -> Sample:
    """Packed INT4 with activation order: `weight_g_idx` has the group of each column."""
    sample = golden("int4_group")
    groups = torch.randint(0, 3, (96,), generator=torch.Generator().manual_seed(0))
    scale = sample.stored[f"{STEM}.weight_scale"]
    codes = sample.values / scale.repeat_interleave(32, 1)
    more = {f"{STEM}.weight_g_idx": groups.int()}
    return replace(sample, stored={**sample.stored, **more}, values=codes.round() * scale[:, groups])


def gptq(bits: int, *, ordered: bool, form: str = "gptq", awq: bool = False) -> Sample:
    return Sample(*gptq_layer(STEM, bits, ordered=ordered, form=form, awq=awq))


def four_bits(kind: str, shape: tuple[int, int], *, nested: bool) -> Sample:
    return Sample(*four_bit_layer(STEM, kind, shape, nested=nested))


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
        ("int4_channel", {}, {f"{STEM}.weight_shape": torch.tensor([16, 3])}, "says [16, 3]"),
        ("int4_group", {}, {f"{STEM}.weight_shape": torch.tensor([15, 96])}, "says [15, 96]"),
        ("int4_group", {}, {WEIGHT: torch.ones(16, 96)}, "twice"),
        ("nvfp4", {}, {f"{STEM}.weight_packed": torch.ones(16, dtype=torch.uint8)}, "is U8"),
        ("fp8 blocks", {"weight_block_size": [128]}, {}, "weight_block_size: [128]"),
        ("fp8 blocks", {"weight_block_size": "128x128"}, {}, "weight_block_size: '128x128'"),
        ("fp8 blocks", {"weight_block_size": [True, 128]}, {}, "weight_block_size: [True, 128]"),
        ("fp8 blocks, bfloat16 scales", {}, {SCALES: torch.ones(1, 2)}, "is [1, 2], and"),
        ("fp8 blocks", {}, {WEIGHT: torch.ones(256).to(E4M3)}, "is [256], and"),
        ("fp8 rows", {}, {f"{STEM}.weight_scale": torch.ones(1, 16)}, "is [1, 16], and"),
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


def test_an_offset_of_nested_scales_without_a_value_is_refused(tmp_path: Path) -> None:
    sample = SAMPLES["nf4 nested"]()
    held = json.loads(bytes(sample.stored[STATE].tolist()))
    for offset in (float("nan"), float("inf"), 10**400):
        state = torch.tensor(list(json.dumps({**held, "nested_offset": offset}).encode()), dtype=torch.uint8)
        assert "has no valid state" in refused(sample.save(tmp_path / str(offset)[:4], **{STATE: state}))


def test_an_order_of_columns_that_was_never_set_is_that_of_the_columns(tmp_path: Path) -> None:
    sample = SAMPLES["int4_group"]()
    unset = torch.full((sample.values.shape[1],), -1, dtype=torch.int32)
    with opened(sample.save(tmp_path / "m", **{GROUPS: unset})) as checkpoint:
        assert torch.equal(checkpoint.tensor(WEIGHT), sample.values)


@pytest.mark.parametrize(("kind", "part"), [("nvfp4", "weight_global_scale"), ("modelopt", "weight_scale_2")])
def test_a_scale_of_the_tensor_that_leaves_no_value_is_named(kind: str, part: str, tmp_path: Path) -> None:
    sample, name = SAMPLES[kind](), f"{STEM}.{part}"
    value = torch.full_like(sample.stored[name], 0.0 if kind == "nvfp4" else 3e38)
    with opened(sample.save(tmp_path / "m", **{name: value})) as checkpoint:
        with pytest.raises(CheckpointError, match=f"scale '{name}' makes scales"):
            checkpoint.tensor(WEIGHT)


def test_codes_and_scales_in_different_files_and_scales_of_zero_or_below_are_read(tmp_path: Path) -> None:
    sample = SAMPLES["fp8 blocks"]()
    folder = sample.save(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    scale = sample.stored[SCALES] * torch.tensor([1.0, 0.0, -1.0])
    files = {"a": {**PLAIN, WEIGHT: sample.stored[WEIGHT]}, "b": {SCALES: scale}}
    for file, held in files.items():
        save_file(held, folder / f"{file}.safetensors")
    where = {name: f"{file}.safetensors" for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with opened(folder) as checkpoint:
        signs = torch.tensor([1.0, 0.0, -1.0]).repeat_interleave(128)
        assert torch.equal(checkpoint.tensor(WEIGHT), sample.values * signs)


def test_a_method_that_is_not_read_stays_as_it_is(tmp_path: Path) -> None:
    sample = SAMPLES["fp8 blocks"]()
    for config in ({**BLOCKS, "quant_method": "other"}, {**BLOCKS, "quant_method": 3}):
        with opened(replace(sample, config=config).save(tmp_path / "m")) as checkpoint:
            assert checkpoint.tensors.keys() == {*PLAIN, *sample.stored}
    older = four_bits("nf4", (8, 64), nested=False)
    del older.config["quant_method"]
    with opened(older.save(tmp_path / "old")) as checkpoint:
        assert checkpoint.stored_format(WEIGHT) == "NF4"


@pytest.mark.parametrize("how", [Rounding(), Rounding(refit=False), Rounding(key=7)], ids=["refit", "keep", "random"])
@pytest.mark.parametrize("kind", SAMPLES)
def test_values_of_codes_are_written_as_the_same_bytes(kind: str, how: Rounding, tmp_path: Path) -> None:
    """Values that the codes have are rounded to these codes, in any blocks of rows."""
    sample = SAMPLES[kind]()
    with opened(sample.save(tmp_path / "m")) as checkpoint:
        assert isinstance(checkpoint, Dequantized)
        weight, values = checkpoint.weights[sample.name], sample.values.flatten(0, -2).numpy()
        assert weight.unit
        for row in range(0, len(values), weight.unit):
            some = values[row : row + weight.unit]
            assert np.array_equal(weight.encode(checkpoint.parts, row, some, how)[1], some)
        for part, data in written(checkpoint, sample, values, how).items():
            wanted = sample.stored[part].reshape(-1).view(torch.uint8).numpy()
            assert np.array_equal(data, wanted)


def written(
    checkpoint: Dequantized, sample: Sample, values: np.ndarray[Any, Any], how: Rounding
) -> dict[str, np.ndarray[Any, Any]]:
    """The stored tensors of a weight that gets other values, as bytes."""
    weight = checkpoint.weights[sample.name]
    found = {part: np.zeros(checkpoint.inner.tensors[part].nbytes, np.uint8) for part in weight.computed}
    for row in range(0, len(values), weight.unit):
        for piece in weight.encode(checkpoint.parts, row, values[row : row + weight.unit], how)[0]:
            for run, data in enumerate(piece.data):
                at = piece.start + run * piece.stride
                found[piece.part][at : at + len(data)] = data
    return found


NUMBERS = {
    "int4_group": 0,
    "int4_group_zeros": 1,
    "int4_channel": 2,
    "int8_channel_zeros": 3,
    "int8_w8a8": 4,
    "nvfp4": 8,
}
"""Cases of tools/make_quantized_golden.py, with their seeds."""


@pytest.mark.parametrize("kind", NUMBERS)
def test_new_scales_zero_points_and_codes_are_those_of_compressed_tensors(kind: str, tmp_path: Path) -> None:
    """A checkpoint with scales that are far too small gets what compressed-tensors stored for the same weight."""
    sample = golden(kind)
    weight = torch.randn(sample.values.shape, generator=torch.Generator().manual_seed(NUMBERS[kind])) * 0.05
    scale = f"{STEM}.weight_scale"
    narrow = (sample.stored[scale].float() / 20).to(sample.stored[scale].dtype)
    with opened(sample.save(tmp_path / "m", **{scale: narrow})) as checkpoint:
        assert isinstance(checkpoint, Dequantized)
        found = written(checkpoint, sample, weight.numpy(), Rounding())
    if kind == "nvfp4":  # its codes there are those of scales that were not rounded yet
        scales = sample.stored[scale].double() / sample.stored[f"{STEM}.weight_global_scale"]
        levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
        codes = ((weight.double() / scales.repeat_interleave(16, 1))[..., None] - levels).abs().argmin(-1)
        nearest = levels[codes].unflatten(1, (-1, 2))
        pairs = torch.from_numpy(found.pop(f"{STEM}.weight_packed")).reshape(16, 32)
        assert torch.equal(levels[torch.stack([pairs & 15, pairs >> 4], -1).long()], nearest)
    for part, data in found.items():
        assert np.array_equal(data, sample.stored[part].reshape(-1).view(torch.uint8).numpy()), part


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_new_scales_and_codes_are_those_of_bitsandbytes(kind: str, tmp_path: Path) -> None:
    from bitsandbytes import functional

    sample = int8() if kind == "int8" else four_bits(kind, (24, 40), nested=False)
    weight = random(*sample.values.shape, seed=9).half().float()
    if kind == "int8":
        codes, scale, _ = functional.int8_vectorwise_quant(weight)
        wanted, part = {WEIGHT: codes, f"{STEM}.SCB": scale}, f"{STEM}.SCB"
    else:
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
        wanted, part = {WEIGHT: codes, f"{WEIGHT}.absmax": state.absmax}, f"{WEIGHT}.absmax"
    with opened(sample.save(tmp_path / "m", **{part: sample.stored[part] / 20})) as checkpoint:
        assert isinstance(checkpoint, Dequantized)
        found = written(checkpoint, sample, weight.numpy(), Rounding())
    for name, tensor in wanted.items():
        assert np.array_equal(found[name], tensor.reshape(-1).view(torch.uint8).numpy()), name


def test_scales_that_are_quantised_get_the_nearest_code(tmp_path: Path) -> None:
    sample = four_bits("nf4", (130, 160), nested=True)
    values = sample.values.reshape(-1, 64) * 1.5
    with opened(sample.save(tmp_path / "m")) as checkpoint:
        assert isinstance(checkpoint, Dequantized)
        weight = checkpoint.weights[sample.name]
        found = written(checkpoint, sample, values.reshape(130, 160).numpy(), Rounding())
        nested = getattr(weight, "nested")  # noqa: B009
    levels, outer = (sample.stored[f"{WEIGHT}.nested_{part}"].double() for part in ("quant_map", "absmax"))
    blocks = torch.arange(len(values)) // nested.size
    reached = levels * outer[blocks, None] + nested.offset
    nearest = (reached - values.abs().amax(1, keepdim=True).double()).abs().argmin(1)
    got = torch.from_numpy(found[f"{WEIGHT}.absmax"]).long()
    assert (got == nearest).double().mean() > 0.9  # others keep their scale, whose error is smaller
    kept = got != nearest
    assert torch.equal(got[kept], sample.stored[f"{WEIGHT}.absmax"].long()[kept])


@pytest.mark.parametrize("kind", ["gptq", "gptq with groups in another order", "gptq 8 bits", "gptq zeros", "awq"])
def test_new_scales_and_zero_points_are_those_of_gptq_and_awq(kind: str, tmp_path: Path) -> None:
    """scale = (max - min) / most, zero = round(-min / scale), code = clamp(round(w / scale) + zero, 0, most)."""
    symmetric = kind not in ("awq", "gptq zeros")
    sample = gptq(8 if "8" in kind else 4, ordered="order" in kind, awq=kind == "awq")
    sample.config["sym"] = symmetric
    weight, most = random(*sample.values.shape, seed=5).double(), 255 if "8" in kind else 15
    groups = sample.stored.get(f"{STEM}.g_idx", torch.arange(64) // 16).long()
    held = torch.stack([weight[:, groups == one] for one in range(4)], 1)
    if symmetric:
        scale = held.abs().amax(-1) * 2 / most
    else:
        scale = (held.amax(-1).clamp(min=0) - held.amin(-1).clamp(max=0)) / most
    scale = scale.half()
    with opened(sample.save(tmp_path / "m", **{f"{STEM}.scales": sample.stored[f"{STEM}.scales"] / 16})) as checkpoint:
        assert isinstance(checkpoint, Dequantized)
        coded = checkpoint.weights[sample.name]
        zeros = torch.from_numpy(getattr(coded, "_zeros")(checkpoint.parts, 0, 40)).double()  # noqa: B009
        found = written(checkpoint, sample, weight.float().numpy(), Rounding())
        if not symmetric:
            zeros = (-held.amin(-1).clamp(max=0) / scale.double()).round().clamp(kind != "awq", most)
        codes = ((weight / scale.double()[:, groups]).round() + zeros[:, groups]).clamp(0, most)
        again = {name: torch.from_numpy(data).view(sample.stored[name].dtype).reshape(sample.stored[name].shape)
                 for name, data in found.items()}  # fmt: skip
    with opened(sample.save(tmp_path / "again", **again)) as checkpoint:
        got = checkpoint.tensor(sample.name)
    assert torch.equal(again[f"{STEM}.scales"], scale.T.contiguous())
    assert torch.equal(got, (scale.float()[:, groups] * (codes - zeros[:, groups]).float()))
