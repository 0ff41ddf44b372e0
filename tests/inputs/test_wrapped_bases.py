"""An adapter on a base whose tensor names a wrapper changed: merged as PEFT merges it into the model without the wrapper."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from toys.adapters import error, gpt2, llama, merged_by_peft, merged_by_us, mixtral, train
from toys.merge import on, recipe

from paft_merge import audit, merge
from paft_merge.errors import AdapterError
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.checkpoint import Checkpoint

WRAPPERS = {
    "DDP": (r"^", "module."),
    "DeepSpeed, compiled": (r"^", "module._orig_mod."),
    "PEFT": (r"^", "base_model.model."),
    "an attribute": (r"^", "student."),
    "FSDP": (r"\.(\d+)\.", r".\1._fsdp_wrapped_module."),
}
LINEAR = ["q_proj", "down_proj"]
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "LoRA": (llama, {"target_modules": LINEAR}),
    "DoRA": (llama, {"target_modules": LINEAR, "use_dora": True}),
    "PiSSA": (llama, {"target_modules": LINEAR, "init_lora_weights": "pissa"}),
    "saved embeddings": (llama, {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}),
    "a tied head": (partial(llama, tie_word_embeddings=True), {"target_modules": ["q_proj", "lm_head"]}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "fused experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
}


def wrapped(base: Path, folder: Path, wrapper: tuple[str, str]) -> Path:
    """A base under the names that a wrapper gives its tensors."""
    shutil.copytree(base, folder)
    state = load_file(base / "model.safetensors")
    save_file({re.sub(*wrapper, name): tensor for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_it_is_merged_as_peft_merges_it_into_the_model_itself(case: str, tmp_path: Path) -> None:
    make, settings = CASES[case]
    base, adapter = train(make(), tmp_path, LoraConfig(r=2, lora_alpha=4, **settings))
    plain = merged_by_us(base, adapter)
    if case != "a tied head":  # which PEFT saves tied again, see test_adapters
        assert error(plain, merged_by_peft(make, base, adapter, tmp_path / "peft")) < 1e-5
    for name, wrapper in WRAPPERS.items():
        ours = merged_by_us(wrapped(base, tmp_path / name, wrapper), adapter)
        assert ours.keys() == {re.sub(*wrapper, known) for known in plain}
        assert all(torch.equal(ours[re.sub(*wrapper, known)], tensor) for known, tensor in plain.items()), name


@pytest.mark.parametrize("case", ["LoRA", "DoRA", "a tied head"])
def test_a_merge_and_an_audit_take_it(case: str, tmp_path: Path) -> None:
    make, settings = CASES[case]
    base, adapter = train(make(), tmp_path, LoraConfig(r=2, **settings))
    folder = wrapped(base, tmp_path / "wrapped", WRAPPERS["DDP"])
    done = merge(recipe("task_arithmetic", folder, (on(folder, adapter), {"weight": 1.0})), tmp_path / "out")
    assert "NAMES" in {warning.code for warning in done.warnings}, "the output keeps the names of the base"
    merge(recipe("task_arithmetic", base, (on(base, adapter), {"weight": 1.0})), tmp_path / "plain")
    ours, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert ours.keys() == {f"module.{name}" for name in plain}
    assert all(torch.equal(ours[f"module.{name}"], tensor) for name, tensor in plain.items())
    found, wanted = (audit(adapter, base=one).sources[0].total.measure.norm for one in (folder, base))
    assert found == wanted


def test_an_adapter_of_another_base_is_refused_with_the_names_of_the_wrapped_one(tmp_path: Path) -> None:
    base, adapter = train(llama(), tmp_path, LoraConfig(r=2, target_modules=LINEAR))
    folder = wrapped(base, tmp_path / "wrapped", WRAPPERS["DDP"])
    state = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in state.items() if "q_proj" not in name}, folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint, pytest.raises(AdapterError) as caught:
        Adapter.open(adapter, checkpoint)
    assert [problem.code for problem in caught.value.problems] == ["ADAPTER_TARGET"]
    assert json.dumps(str(caught.value)).count("was this adapter trained on another base?") == 1
