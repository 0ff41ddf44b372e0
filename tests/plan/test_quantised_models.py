"""Quantised checkpoints: refused with their format, or copied bit for bit where nothing changes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import near, random_state, save_checkpoint
from safetensors.torch import load_file, save_file

from paft_merge import merge, open_plan
from paft_merge.errors import PaftMergeError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.quantized.recognition import quantised

State = dict[str, torch.Tensor]
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def codes(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    made = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randint(0, 100, shape, generator=made).to(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(7)) + 0.01).to(dtype)


FORMATS: dict[str, tuple[Callable[[str], State], dict[str, Any], str]] = {
    "gptq": (
        lambda p: {f"{p}.qweight": codes(3, 24), f"{p}.qzeros": codes(1, 3), f"{p}.scales": scales(1, 24), f"{p}.g_idx": codes(24)},
        {"quant_method": "gptq", "bits": 4}, "GPTQ, 4 bits",
    ),
    "awq": (
        lambda p: {f"{p}.qweight": codes(24, 3), f"{p}.qzeros": codes(1, 3), f"{p}.scales": scales(1, 24)},
        {"quant_method": "awq", "bits": 4}, "AWQ, 4 bits",
    ),
    "nf4": (
        lambda p: {
            f"{p}.weight": codes(288, 1, dtype=torch.uint8), f"{p}.weight.absmax": codes(9, dtype=torch.uint8),
            f"{p}.weight.quant_map": scales(16, dtype=torch.float32), f"{p}.weight.nested_absmax": scales(1, dtype=torch.float32),
            f"{p}.weight.nested_quant_map": scales(256, dtype=torch.float32),
            f"{p}.weight.quant_state.bitsandbytes__nf4": codes(80, dtype=torch.uint8),
        },
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes, nf4",
    ),
    "fp4": (
        lambda p: {
            f"{p}.weight": codes(288, 1, dtype=torch.uint8), f"{p}.weight.absmax": scales(9, dtype=torch.float32),
            f"{p}.weight.quant_state.bitsandbytes__fp4": codes(80, dtype=torch.uint8),
        },
        {}, "bitsandbytes, fp4",
    ),
    "int8": (
        lambda p: {f"{p}.weight": codes(24, 24, dtype=torch.int8), f"{p}.SCB": scales(24, dtype=torch.float32)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, int8",
    ),
    "compressed-tensors": (
        lambda p: {
            f"{p}.weight_packed": codes(24, 3), f"{p}.weight_scale": scales(24, 1, dtype=torch.bfloat16),
            f"{p}.weight_shape": codes(2, dtype=torch.int64), f"{p}.weight_zero_point": codes(3, 1),
        },
        {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors, pack-quantized",
    ),
    "w8a8": (
        lambda p: {
            f"{p}.weight": codes(24, 24, dtype=torch.int8), f"{p}.weight_scale": scales(24, 1),
            f"{p}.input_scale": scales(1), f"{p}.input_zero_point": codes(1, dtype=torch.int8),
        },
        {"quant_method": "compressed-tensors", "format": "int-quantized"}, "compressed-tensors, int-quantized",
    ),
    "nvfp4": (
        lambda p: {
            f"{p}.weight": codes(24, 12, dtype=torch.uint8), f"{p}.weight_scale": scales(24, 2, dtype=torch.float32).to(torch.float8_e4m3fn),
            f"{p}.weight_scale_2": scales(1, dtype=torch.float32), f"{p}.input_scale": scales(1, dtype=torch.float32),
        },
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt, NVFP4",
    ),
    "torchao": (
        lambda p: {f"{p}._weight_qdata": codes(24, 24, dtype=torch.int8), f"{p}._weight_scale": scales(24, 1)},
        {"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao, int8_weight_only",
    ),
    "eetq": (
        lambda p: {f"{p}.weight": codes(24, 24, dtype=torch.int8), f"{p}.weight_scales": scales(24)},
        {"quant_method": "eetq"}, "EETQ",
    ),
    "aqlm": (
        lambda p: {f"{p}.codes": codes(24, 3, 1, dtype=torch.int8), f"{p}.codebooks": scales(1, 8, 1, 8), f"{p}.scales": scales(24, 1)},
        {"quant_method": "aqlm"}, "AQLM",
    ),
    "a format by its tensors alone": (
        lambda p: {f"{p}.W_q": codes(12, 24, dtype=torch.uint8), f"{p}.scale": scales(24, 1), f"{p}.zero": scales(24, 1)}, {}, "HQQ",
    ),
}  # fmt: skip

UNREAD = ("torchao", "eetq", "aqlm", "a format by its tensors alone")
"""The kinds whose values are not read; those of the others are in tests/inputs/test_quantized.py."""


def model(folder: Path, kind: str, seed: int = 0, *, keep: tuple[str, ...] = (), change: float = 0) -> Path:
    """A model whose q_proj are quantised; `keep`: modules that are not, `change`: added to every scale and float code."""
    make, config, _ = FORMATS[kind]
    state: State = {}
    for name, tensor in near(random_state(0, torch.bfloat16), seed).items():
        stem = name.removesuffix(".weight")
        state |= make(stem) if stem.endswith("q_proj") and stem not in keep else {name: tensor}
    if change:
        state = {n: t + change if t.dtype in (torch.float16, torch.float32) else t for n, t in state.items()}
    fields = {"quantization_config": config} if config else {}
    return save_checkpoint(folder, state, config=fields)


def lora(folder: Path, *stems: str, width: int = 24) -> Path:
    folder.mkdir()
    made = torch.Generator().manual_seed(3)
    factors: State = {}
    for stem in stems:
        rows = 2 * width if "up_proj" in stem else width
        factors[f"base_model.model.{stem}.lora_A.weight"] = torch.randn(4, width, generator=made) * 0.1
        factors[f"base_model.model.{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=made) * 0.1
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def asked(base: Path, source: object, **more: Any) -> dict[str, Any]:
    models = [{"model": str(source), "parameters": {"weight": 1.0}}]
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, **more}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_format_is_named(kind: str, tmp_path: Path) -> None:
    with Checkpoint.open(model(tmp_path / "q", kind)) as checkpoint:
        found = quantised(checkpoint)
    assert found.how == FORMATS[kind][2]
    assert set(found.parts) == {name for i in range(3) for name in FORMATS[kind][0](Q.replace("0", str(i)))}
    assert set(found.parts.values()) == {f"{Q.replace('0', str(i))}.weight" for i in range(3)}


@pytest.mark.parametrize("kind", UNREAD)
def test_an_adapter_on_quantised_weights_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    base, adapter = model(tmp_path / "q", kind), lora(tmp_path / "ad", Q, Q.replace("0", "1"), UP)
    with pytest.raises(PaftMergeError) as caught:
        merge(asked(base, f"{base}+{adapter}"), tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.code == "DTYPE_UNSUPPORTED"
    assert f"is quantised ({FORMATS[kind][2]};" in problem.what
    assert f"2 modules of the adapter {adapter}" in problem.what


@pytest.mark.parametrize("dtype", ["float32", None])
@pytest.mark.parametrize("kind", UNREAD)
def test_weights_that_no_source_changes_are_copied_bit_for_bit(kind: str, dtype: str | None, tmp_path: Path) -> None:
    base, adapter = model(tmp_path / "q", kind), lora(tmp_path / "ad", UP)
    merge(asked(base, f"{base}+{adapter}", **({"dtype": dtype} if dtype else {})), tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name in (name for i in range(3) for name in FORMATS[kind][0](Q.replace("0", str(i)))):
        assert (before[name].dtype, raw(before[name])) == (after[name].dtype, raw(after[name])), name
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{UP}.lora_{x}.weight"].double() for x in "AB")
    wanted = before[f"{UP}.weight"].double() + 2 * b @ a
    bound = 1e-6 if dtype else 2**-8 * float(wanted.abs().max())
    assert float((after[f"{UP}.weight"].double() - wanted).abs().max()) < bound
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("quantization_config", {}) == FORMATS[kind][1]


@pytest.mark.parametrize("kind", UNREAD)
def test_a_quantised_model_and_a_plain_one_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    plain = save_checkpoint(tmp_path / "plain", random_state(0, torch.bfloat16))
    coded = model(tmp_path / "q", kind)
    for base, source in ((plain, coded), (coded, plain)):
        with pytest.raises(PaftMergeError) as caught:
            merge(asked(base, source), tmp_path / "out")
        assert [(one.code, one.where) for one in caught.value.problems] == [("DTYPE_UNSUPPORTED", str(coded))]


@pytest.mark.parametrize("kind", UNREAD)
def test_two_models_of_other_codes_are_refused_in_one_line_and_of_equal_codes_merged(kind: str, tmp_path: Path) -> None:
    base, same = model(tmp_path / "q", kind), model(tmp_path / "same", kind, seed=1)
    other = model(tmp_path / "other", kind, change=0.5)
    merge(asked(base, same, dtype="float32"), tmp_path / "out")
    with pytest.raises(PaftMergeError) as caught:
        merge(asked(base, other), tmp_path / "out2")
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("DTYPE_UNSUPPORTED", str(other))


def test_models_quantised_in_two_ways_are_refused_with_both(tmp_path: Path) -> None:
    with pytest.raises(PaftMergeError) as caught:
        merge(asked(model(tmp_path / "a", "torchao"), model(tmp_path / "b", "aqlm")), tmp_path / "out")
    (problem,) = caught.value.problems
    assert "torchao, int8_weight_only" in problem.what
    assert "AQLM" in problem.what


def test_a_config_that_claims_what_no_tensor_shows_is_a_warning(tmp_path: Path) -> None:
    state = random_state(0)
    base = save_checkpoint(
        tmp_path / "base", state, config={"quantization_config": {"quant_method": "gptq", "bits": 4}}
    )
    x = save_checkpoint(tmp_path / "x", near(state, 1))
    with open_plan(asked(base, x)) as plan:
        assert ["GPTQ, 4 bits" in one.what for one in plan.warnings if one.code == "QUANTISED"] == [True]


def test_codes_in_a_form_that_no_table_knows(tmp_path: Path) -> None:
    """Where the config says that the model is quantised, every module with integers is: its tensors go together."""
    state = random_state(0)
    weight = f"{UP}.weight"
    coded = {f"{UP}.lut": codes(24, 4, dtype=torch.uint8), f"{UP}.levels": scales(24), f"{UP}.inner.zero": scales(3)}
    config = {"quantization_config": {"quant_method": "newquant", "bits": 3}}
    more = {"model.position_ids": torch.arange(4)}
    base = save_checkpoint(tmp_path / "base", {**state, **coded, **more}, config=config)
    with Checkpoint.open(base) as checkpoint:
        found = quantised(checkpoint)
    assert (found.how, found.parts) == ("newquant, 3 bits", dict.fromkeys([*coded, weight], weight))
    known = save_checkpoint(tmp_path / "known", {**state, **coded, **FORMATS["gptq"][0](Q)}, config=config)
    with Checkpoint.open(known) as checkpoint:
        assert set(quantised(checkpoint).parts) == {*coded, weight, *FORMATS["gptq"][0](Q)}
    tuned = near(state, 1) | {weight: state[weight]}
    same = save_checkpoint(tmp_path / "x", {**tuned, **coded, **more}, config=config)
    merge({**asked(base, same), "dtype": "float16"}, tmp_path / "out")
    got = load_file(tmp_path / "out/model.safetensors")
    assert all(raw(got[name]) == raw(tensor) for name, tensor in {**coded, weight: state[weight]}.items())
    other = save_checkpoint(
        tmp_path / "y", {**tuned, **coded, **more, f"{UP}.lut": codes(24, 4, dtype=torch.uint8) + 1}, config=config
    )
    with pytest.raises(PaftMergeError) as caught:
        merge(asked(base, other), tmp_path / "refused")
    assert ["newquant, 3 bits" in str(one) for one in caught.value.problems] == [True]


def test_names_that_only_look_like_scales_are_not_quantised(tmp_path: Path) -> None:
    state = random_state(0) | {
        "logit_scale": torch.ones(()), "model.layers.0.layer_scale": torch.ones(24), "model.blocks.0.scales": torch.ones(3),
        "model.residual_blocks": torch.ones(2), "model.ids": torch.arange(3), "model.layers.0.norm.weight_scale": torch.ones(3),
    }  # fmt: skip
    with Checkpoint.open(save_checkpoint(tmp_path / "m", state)) as checkpoint:
        assert not quantised(checkpoint)
