"""A further PEFT type needs one `PeftType` and one row of the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from torch import ones

from paft_merge.errors import AdapterError
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.adapters.binding import Binding, PeftType
from paft_merge.inputs.adapters.deltas import Lazy, LowRank
from paft_merge.inputs.adapters.keys import Module, TensorNames
from paft_merge.inputs.adapters.peft_types import TYPES
from paft_merge.inputs.checkpoint import Checkpoint


def bind(binding: Binding, module: Module) -> None:
    """The outer product of two vectors."""
    parameter = binding.require(module.path, f"{module.path}.weight")
    if parameter is not None:
        builder = binding.builder(parameter)
        left, right = (binding.values(module.parts[part]) for part in ("u", "v"))
        pair = Lazy(lambda: (left[:, None], right[None]))
        builder.make = lambda: LowRank(builder.shape, builder.row_size, pair, "outer")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setitem(TYPES, "OUTER", PeftType(TensorNames("outer_", ("u", "v")), lambda *_: None, bind))
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file({"layer.weight": ones(3, 2)}, base / "model.safetensors")
    save_file({"layer.outer_u": 2 * ones(3), "layer.outer_v": 5 * ones(2)}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "OUTER"}))
    return base, adapter


def test_an_adapter_of_a_new_type_has_the_deltas_of_its_row(folders: tuple[Path, Path]) -> None:
    with Checkpoint.open(folders[0]) as base, Adapter.open(folders[1], base) as adapter:
        out = np.empty((3, 2), np.float32)
        adapter.deltas["layer.weight"].compute(0, 3, None, out)
        assert (adapter.deltas["layer.weight"].kind, out.tolist()) == ("outer", [[10, 10]] * 3)


def test_tensors_of_another_type_are_refused(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "adapter_model.safetensors"
    save_file({"layer.lora_A.weight": ones(1, 2), "layer.lora_B.weight": ones(3, 1)}, path)
    with (
        Checkpoint.open(folders[0]) as base,
        pytest.raises(AdapterError, match="has LORA tensors, but peft_type is OUTER"),
    ):
        Adapter.open(folders[1], base)


def test_a_delta_and_new_rows_of_one_tensor_are_refused(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "adapter_model.safetensors"
    tokens = {"layer.token_adapter.trainable_tokens_delta": ones(1, 2)}
    save_file({"layer.outer_u": ones(3), "layer.outer_v": ones(2), **tokens}, path)
    (folders[1] / "adapter_config.json").write_text('{"peft_type": "OUTER", "trainable_token_indices": [1]}')
    with Checkpoint.open(folders[0]) as base, pytest.raises(AdapterError, match="by a delta and also replaces values"):
        Adapter.open(folders[1], base)
