"""Adapters as PEFT wrote them in 2023: `adapter_model.bin`, old configs and names; equal to PEFT's own merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_state, save_adapter, save_checkpoint
from safetensors.torch import load_file

import paft_merge
from paft_merge.errors import PaftMergeError

ALPACA = {
    "base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
    "inference_mode": True, "lora_dropout": 0.05, "merge_weights": False, "modules_to_save": None, "task_type": "CAUSAL_LM",
}  # fmt: skip

Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], tuple[dict[str, Any], dict[str, Any]]]

CHANGES: dict[str, Change] = {
    "as it is": lambda config, state: (config, state),
    "of 2023": lambda config, state: (ALPACA | {k: config[k] for k in ("peft_type", "r", "lora_alpha", "target_modules")}, state),
    "no type": lambda config, state: ({k: v for k, v in config.items() if k != "peft_type"}, state),
    "type null": lambda config, state: (config | {"peft_type": None, "merge_weights": True}, state),
    "targets as text": lambda config, state: (config | {"target_modules": ".*_proj"}, state),
    "no prefix": lambda config, state: (config, {k.removeprefix("base_model.model."): v for k, v in state.items()}),
    "prefix twice": lambda config, state: (config, {f"base_model.model.{k}": v for k, v in state.items()}),
    "adapter's name": lambda config, state: (config, {k.replace(".weight", ".default.weight"): v for k, v in state.items()}),
    "parameters": lambda config, state: (config, {k: torch.nn.Parameter(v) for k, v in state.items()}),
    "transposed views": lambda config, state: (config, {k: v.t().contiguous().t() for k, v in state.items()}),
}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    state = random_state(0)
    return save_checkpoint(tmp_path / "base", state), save_adapter(tmp_path / "ad", state, 1)


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "dtype": "float32"}
    recipe["models"] = [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}]
    return load_file(paft_merge.merge(recipe, out, **options).path / "model.safetensors")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_pickled_adapter_is_read_as_its_safetensors(
    models: tuple[Path, Path], tmp_path: Path, kind: str, legacy: bool
) -> None:
    base, adapter = models
    expected = merged(base, adapter, tmp_path / "expected")
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    settings, state = CHANGES[kind](json.loads(config.read_text()), load_file(weights))
    config.write_text(json.dumps(settings))
    torch.save(state, adapter / "adapter_model.bin", _use_new_zipfile_serialization=not legacy)
    weights.unlink()
    with pytest.raises(PaftMergeError) as caught:
        merged(base, adapter, tmp_path / "refused")
    (problem,) = caught.value.problems
    assert (problem.code, "lazy_unpickle=True" in problem.fix) == ("PICKLE_REFUSED", True)
    got = merged(base, adapter, tmp_path / "out", lazy_unpickle=True)
    assert all(got[name].equal(tensor) for name, tensor in expected.items())


def test_safetensors_are_preferred_to_a_pickle(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = models
    (adapter / "adapter_model.bin").write_bytes(b"anything")
    merged(base, adapter, tmp_path / "out", lazy_unpickle=True)


def test_an_empty_or_a_hostile_pickle_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = models
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")  # what a wrapped state_dict of alpaca-lora's script left
    with pytest.raises(PaftMergeError, match=r"adapter_model.bin: holds no tensors"):
        merged(base, adapter, tmp_path / "out", lazy_unpickle=True)
    torch.save({"w": print}, adapter / "adapter_model.bin")
    with pytest.raises(PaftMergeError, match="its pickle needs more than tensors") as caught:
        merged(base, adapter, tmp_path / "out", lazy_unpickle=True)
    assert caught.value.problems[0].code == "PICKLE_REFUSED"


def test_parts_of_fused_layers_are_refused_with_the_reason(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = models
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"enable_lora": [True, False, True]}))
    with pytest.raises(PaftMergeError, match="enable_lora: it adapts parts of a fused layer"):
        merged(base, adapter, tmp_path / "out")
