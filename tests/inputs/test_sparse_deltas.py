"""Sparse deltas as adapters: any rows are read alone, a merge adds them exactly, damaged files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import State, random_state, save_checkpoint
from safetensors.torch import load_file, save_file
from toys.adapters import edit_config, edit_tensors, patched
from toys.merge import bits_equal, on, recipe, tensors_of

from paft_merge import merge
from paft_merge.auditing import audit
from paft_merge.errors import AdapterError
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.adapters.sparse_delta import layout_of, pack
from paft_merge.inputs.checkpoint import Checkpoint

Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight"


def save_delta(folder: Path, base: Path, deltas: Mapping[str, torch.Tensor], dense: tuple[str, ...] = ()) -> Path:
    """Write a sparse delta bit by bit, as the format describes it."""
    folder.mkdir()
    held: State = {}
    for name, delta in deltas.items():
        if name in dense:
            held[f"{name}.delta"] = delta
            continue
        rows, width = delta.reshape(-1, delta.shape[-1]).ne(0), -(-delta.shape[-1] // 8)
        mask = torch.zeros(len(rows), width, dtype=torch.uint8)
        for row, column in rows.nonzero().tolist():
            mask[row, column // 8] |= 1 << column % 8
        held[f"{name}.mask"] = mask.reshape(*delta.shape[:-1], width)
        held[f"{name}.values"] = delta[delta != 0]
    save_file(held, folder / "adapter_model.safetensors")
    with Checkpoint.open(base) as opened:
        config = {"peft_type": "SPARSE_DELTA", "delta_format": 1, "base_layout": layout_of(opened)}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return folder


def sparse(shape: torch.Size, seed: int, density: float = 0.3) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made).where(torch.rand(shape, generator=made) < density, 0)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, State]:
    """A base, a sparse delta of every tensor of it, one of them stored with all entries, and its values."""
    state = random_state(0, torch.bfloat16, width=20) | {"conv.weight": torch.ones(3, 2, 5, 3).bfloat16()}
    base = save_checkpoint(tmp_path / "base", state)
    deltas = {name: sparse(tensor.shape, seed) for seed, (name, tensor) in enumerate(state.items())}
    return base, save_delta(tmp_path / "delta", base, deltas, dense=("lm_head.weight",)), deltas


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_any_rows_of_a_sparse_delta_are_read(made: tuple[Path, Path, State], rows: int | None) -> None:
    base, folder, deltas = made
    with Checkpoint.open(base) as checkpoint, Adapter.open(folder, checkpoint) as opened:
        assert (opened.deltas.keys(), opened.warnings) == (deltas.keys(), [])
        for name, delta in opened.deltas.items():
            assert bits_equal(patched(torch.zeros(delta.shape), delta, rows), deltas[name]), name
            delta.release()


def test_a_fold_adds_the_delta_and_rounds_once(made: tuple[Path, Path, State], tmp_path: Path) -> None:
    base, folder, deltas = made
    merge(recipe("linear", None, (on(base, folder), {"weight": 1.0})), tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for name, delta in deltas.items():
        assert bits_equal(after[name], (before[name].float() + delta).bfloat16()), name


def test_an_audit_counts_the_entries_of_a_sparse_delta(made: tuple[Path, Path, State]) -> None:
    base, folder, deltas = made
    source = audit(folder, base=base).sources[0]
    measure = source.total.measure
    assert measure.entries - measure.zeros == sum(int(delta.count_nonzero()) for delta in deltas.values())


def test_every_row_of_a_mask_begins_with_a_byte() -> None:
    filled = np.array([[0, 0, 1] * 3, [1, 0, 0] * 3], bool)
    assert pack(filled).tolist() == [[0b00100100, 1], [0b01001001, 0]]


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], State]:
    return lambda held: held | {name: change(held[name])}


REFUSED: dict[str, tuple[dict[str, Any], Callable[[State], State] | None]] = {
    "delta_format: this version reads 1, got 2": ({"delta_format": 2}, None),
    "delta_format: this version reads 1, got None": ({"delta_format": None}, None),
    "scale: not a field of a sparse delta": ({"scale": 2.0}, None),
    "was made on a base with tensors of other shapes than": ({"base_layout": "0"}, None),
    "unties: must map names of tensors to names": ({"unties": {"a": ["b"]}}, None),
    "unties 'other.weight' and has no delta for it": ({"unties": {"other.weight": Q}}, None),
    "base_layout: must be a str": ({"base_layout": 3}, None),
    "has mask, and needs mask and values": ({}, lambda held: {n: t for n, t in held.items() if n != f"{Q}.values"}),
    "has delta, mask, values, and needs": ({}, lambda held: held | {f"{Q}.delta": torch.zeros(20, 20)}),
    "tensors that are not of a sparse delta: '?other": ({}, lambda held: held | {"other": torch.ones(2)}),
    "has a mask .20, 2. and": ({}, with_tensor(f"{Q}.mask", lambda mask: mask[:, :2])),
    "has a mask .3, 20. and": ({}, with_tensor(f"{Q}.mask", lambda mask: mask.T)),
    "has a mask of I8 and values of F32": ({}, with_tensor(f"{Q}.mask", lambda mask: mask.to(torch.int8))),
    "has a mask of U8 and values of I64": ({}, with_tensor(f"{Q}.values", lambda values: values.long())),
    "and 401 values": ({}, with_tensor(f"{Q}.values", lambda values: torch.ones(401))),
    "has a delta .20, 40.": ({}, with_tensor("lm_head.weight.delta", lambda delta: delta.T)),
    "not in the base: '?gone": ({}, lambda held: held | {"gone.weight.delta": torch.ones(2)}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_a_sparse_delta_of_this_base_is_refused(message: str, made: tuple[Path, Path, State]) -> None:
    base, folder, _ = made
    config, tensors = REFUSED[message]
    edit_config(folder, **config)
    if tensors:
        edit_tensors(folder, tensors)
    with Checkpoint.open(base) as checkpoint, pytest.raises(AdapterError, match=message):
        Adapter.open(folder, checkpoint)


DAMAGED: dict[str, Callable[[State], State]] = {
    "has set bits past the end of a row": with_tensor(f"{Q}.mask", lambda mask: mask | torch.tensor([0, 0, 128], dtype=torch.uint8)),
    "has 1[0-9][0-9] set bits, and there are 1[0-9][0-9] values": with_tensor(f"{Q}.values", lambda values: values[1:]),
    "are NaN or infinite": with_tensor(f"{Q}.values", lambda values: values / 0),
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGED)
def test_damage_in_the_bytes_of_a_sparse_delta_is_an_error_when_they_are_read(
    message: str, made: tuple[Path, Path, State]
) -> None:
    base, folder, _ = made
    edit_tensors(folder, DAMAGED[message])
    with Checkpoint.open(base) as checkpoint, Adapter.open(folder, checkpoint) as opened:
        with pytest.raises(AdapterError, match=message):
            opened.deltas[Q].compute(3, 4, None, np.empty((1, 20), np.float32))


def test_a_sparse_delta_is_not_read_on_a_base_with_other_tensors_or_from_a_truncated_file(
    made: tuple[Path, Path, State], tmp_path: Path
) -> None:
    _, folder, _ = made
    other = save_checkpoint(
        tmp_path / "other", random_state(1, layers=4, width=20) | {"conv.weight": torch.ones(3, 2, 5, 3)}
    )
    with Checkpoint.open(other) as checkpoint, pytest.raises(AdapterError, match="remove base_layout"):
        Adapter.open(folder, checkpoint)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with Checkpoint.open(other) as checkpoint, pytest.raises(AdapterError, match="bytes of data"):
        Adapter.open(folder, checkpoint)


def test_a_sparse_delta_of_a_head_that_is_cut_from_its_embedding(tmp_path: Path) -> None:
    state = random_state(0)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    del state[head]
    base = save_checkpoint(tmp_path / "base", state, config={"tie_word_embeddings": True})
    deltas = {head: sparse(state[embedding].shape, 1)}
    folder = save_delta(tmp_path / "delta", base, deltas)
    edit_config(folder, unties={head: embedding})
    merge(recipe("linear", None, (on(base, folder), {"weight": 1.0})), tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert bits_equal(after[head], state[embedding] + deltas[head])
    assert bits_equal(after[embedding], state[embedding])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert load_file(folder / "adapter_model.safetensors").keys() == {f"{head}.mask", f"{head}.values"}
