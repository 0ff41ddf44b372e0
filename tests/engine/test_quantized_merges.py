"""Merges of quantised models: every method sees float32 values, and the output has plain weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import random_state, save_checkpoint
from peft import LoraConfig
from safetensors.torch import load_file
from toys.adapters import gpt_oss, mixtral, train
from toys.quantized import CONFIG, Q, State, asked, coded, lora, mxfp4_experts

from paft_merge import merge, open_plan
from paft_merge.cli import cli
from paft_merge.errors import PaftMergeError


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, State]:
    stored, values = coded(random_state(0, torch.bfloat16))
    return save_checkpoint(tmp_path / "base", stored, config={"quantization_config": CONFIG}), values


def test_adapters_are_added_to_the_values(base: tuple[Path, State], tmp_path: Path) -> None:
    folder, values = base
    (one, d1), (two, d2) = (lora(tmp_path / f"ad{i}", values, i) for i in range(2))
    merge(asked(folder, f"{folder}+{one}", f"{folder}+{two}", out_dtype="float32"), tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == values.keys()
    for name, tensor in values.items():
        wanted = tensor.float() + 0.5 * d1[name] + 0.5 * d2[name] if name in d1 else tensor.float()
        assert torch.allclose(got[name], wanted, atol=1e-7) if name in d1 else torch.equal(got[name], wanted)
    merge(asked(folder, f"{folder}+{one}", f"{folder}+{two}"), tmp_path / "narrow")
    narrow = load_file(tmp_path / "narrow" / "model.safetensors")
    assert all(torch.equal(narrow[name], got[name].bfloat16()) for name in values)
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert "quantization_config" not in config


def test_a_merge_on_the_bfloat16_twin_has_the_same_bits(base: tuple[Path, State], tmp_path: Path) -> None:
    """The blocks are float32 either way, so a twin in float32 gives the same bits; also with trimming and signs."""
    folder, values = base
    twin = save_checkpoint(tmp_path / "twin", {name: tensor.float() for name, tensor in values.items()})
    (one, _), (two, _) = (lora(tmp_path / f"ad{i}", values, i) for i in range(2))
    for number, (method, density) in enumerate((("ties", {"density": 0.5}), ("breadcrumbs", {"density": 0.4}))):
        for at, where in (("q", folder), ("f", twin)):
            models = [{"model": f"{where}+{ad}", "parameters": {"weight": 0.5, **density}} for ad in (one, two)]
            recipe = {"merge_method": method, "base_model": str(where), "models": models, "out_dtype": "bfloat16"}
            merge(recipe, tmp_path / f"{at}{number}")
        got, wanted = (load_file(tmp_path / f"{at}{number}" / "model.safetensors") for at in "qf")
        projections = [name for name in got if "_proj" in name]
        assert projections
        assert all(torch.equal(got[name], wanted[name]) for name in projections)


def test_a_quantised_model_and_a_plain_one_are_refused_in_one_line(base: tuple[Path, State], tmp_path: Path) -> None:
    folder, values = base
    plain = save_checkpoint(tmp_path / "plain", {name: tensor.bfloat16() for name, tensor in values.items()})
    for one, other in ((folder, plain), (plain, folder)):
        with pytest.raises(PaftMergeError) as caught:
            merge(asked(one, other), tmp_path / "out")
        assert [(p.code, p.where) for p in caught.value.problems] == [("DTYPE_UNSUPPORTED", str(folder))]
        assert "is quantised (FP8; for example 'model.layers.0." in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_the_bytes_of_codes_and_is_resumable(base: tuple[Path, State], tmp_path: Path) -> None:
    folder, values = base
    adapter, _ = lora(tmp_path / "ad", values, 1)
    with open_plan(asked(folder, f"{folder}+{adapter}")) as plan:
        stored = load_file(folder / "model.safetensors")
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
        assert plan.bytes_read == nbytes + (adapter / "adapter_model.safetensors").stat().st_size
        assert {t.dtype for t in plan.tensors} == {"BF16"}
        noted = [one.what for one in plan.warnings if one.code == "QUANTISED"]
        assert len(noted) == 1
        assert "6 in FP8" in noted[0]


def test_audit_measures_an_adapter_against_the_values(base: tuple[Path, State], tmp_path: Path) -> None:
    from paft_merge import audit

    folder, values = base
    adapter, _ = lora(tmp_path / "ad", values, 1)
    twin = save_checkpoint(tmp_path / "twin", {name: tensor.float() for name, tensor in values.items()})
    found = [audit(adapter, base=where).sources[0].to_json()["tensors"] for where in (folder, twin)]
    of_grid = [tensor.pop("quantised_sparsity") for tensor in found[0]]
    assert None not in of_grid
    assert {tensor.pop("quantised_sparsity") for tensor in found[1]} == {None}
    assert found[0] == found[1]


def test_dequantize_writes_plain_weights(base: tuple[Path, State], tmp_path: Path) -> None:
    folder, values = base
    (folder / "hf_quant_config.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")
    asked_for = ["dequantize", str(folder), str(tmp_path / "out"), "--quiet"]
    assert CliRunner().invoke(cli, asked_for).exit_code == 0
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in got.items()} == dict.fromkeys(values, torch.bfloat16)
    assert all(torch.equal(got[name], tensor.bfloat16()) for name, tensor in values.items())
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()  # vLLM would take the weights for codes
    assert (tmp_path / "out" / "generation_config.json").exists()
    shown = CliRunner().invoke(cli, ["dequantize", str(folder), "--dry-run", "--out-dtype", "float32", "--json"])
    assert {tensor["dtype"] for tensor in json.loads(shown.stdout)["tensors"]} == {"F32"}


def test_dequantize_refuses_a_plain_model_and_a_format_that_is_not_read(tmp_path: Path) -> None:
    plain = save_checkpoint(tmp_path / "plain", random_state(0))
    codes = {f"{Q}.W_q": torch.ones(4, 4, dtype=torch.uint8), f"{Q}.scale": torch.ones(4), f"{Q}.zero": torch.ones(4)}
    config = {"quantization_config": {"quant_method": "hqq"}}
    other = save_checkpoint(tmp_path / "hqq", {**random_state(0), **codes}, config=config)
    for folder, said in ((plain, "is not quantised"), (other, "is quantised (HQQ")):
        result = CliRunner().invoke(cli, ["dequantize", str(folder), str(tmp_path / "out")])
        assert result.exit_code == 1
        assert said in result.stderr
    assert not (tmp_path / "out").exists()


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def fp8_experts(state: State) -> tuple[State, State, dict[str, Any]]:
    """Mixtral with each expert's matrices as FP8."""
    stored, values = dict(state), dict(state)
    for name, tensor in state.items():
        if ".experts." in name:
            stored[name], scale = (tensor * 40).to(torch.float8_e4m3fn), torch.tensor([[0.025]])
            stored[f"{name}_scale_inv"], values[name] = scale, stored[name].float() * scale
    return stored, values, {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_adapters_on_fused_experts_of_a_quantised_base(kind: str, tmp_path: Path) -> None:
    model, coded_as = (gpt_oss(32, 32), mxfp4_experts) if kind == "mxfp4" else (mixtral(), fp8_experts)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=EXPERTS)
    trained, adapter = train(model, tmp_path, config)
    stored, values, quantization = coded_as(load_file(trained / "model.safetensors"))
    assert len(stored) > len(values)
    fields = json.loads((trained / "config.json").read_text())
    base = save_checkpoint(tmp_path / "coded", stored, config={**fields, "quantization_config": quantization})
    twin = save_checkpoint(tmp_path / "twin", values, config=fields)
    for folder, out in ((base, "a"), (twin, "b")):
        merge(asked(folder, f"{folder}+{adapter}", dtype="float32"), tmp_path / out)
    got, wanted = (load_file(tmp_path / out / "model.safetensors") for out in "ab")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    moved = [name for name in got if not torch.equal(got[name], values[name].float())]
    assert len([name for name in moved if ".experts." in name]) >= 4


def test_workers_and_a_resumed_merge_write_the_same_bits(base: tuple[Path, State], tmp_path: Path) -> None:
    folder, values = base
    adapter, _ = lora(tmp_path / "ad", values, 1)
    recipe, small = asked(folder, f"{folder}+{adapter}"), {"out_shard_bytes": 4000}
    merge(recipe, tmp_path / "whole", **small)
    merge(recipe, tmp_path / "shared", worker="1/2", **small)
    merge(recipe, tmp_path / "shared", worker="0/2", **small)

    def stop(done: Any) -> None:
        if done.tensors == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "again", progress=stop, **small)
    seen: list[int] = []
    merge(recipe, tmp_path / "again", resume=True, progress=lambda done: seen.append(done.tensors), **small)
    files = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(files) > 1
    for name in files:
        assert len({(tmp_path / out / name).read_bytes() for out in ("whole", "shared", "again")}) == 1
