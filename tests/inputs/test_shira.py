"""SHiRA, PEFT's sparse adapter: applied as PEFT's own merge applies it, refused where PEFT could not have made it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import ShiraConfig
from safetensors.torch import load_file
from toys.adapters import Tensors, edit_config, edit_tensors, error, llama, merged_by_peft, merged_by_us, train

from paft_merge.auditing import audit
from paft_merge.errors import AdapterError, AuditError
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.checkpoint import Checkpoint

# PEFT makes its sparse tensors without saying whether torch is to check them.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

PATH = "base_model.model.model.layers.0.self_attn.q_proj"


def made(folder: Path, make: Callable[[], Any] = llama, **config: Any) -> tuple[Path, Path]:
    return train(
        make(), folder, ShiraConfig(**{"r": 2, "random_seed": 3, "target_modules": ["q_proj", "up_proj"], **config})
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("config", [{}, {"modules_to_save": ["lm_head"]}, {"init_weights": False}], ids=str)
def test_a_sparse_adapter_is_merged_as_peft_merges_it(config: dict[str, Any], rows: int | None, tmp_path: Path) -> None:
    base, adapter = made(tmp_path, **config)
    theirs = merged_by_peft(llama, base, adapter, tmp_path / "merged")
    assert error(merged_by_us(base, adapter, rows), theirs) < 1e-6
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(theirs[name], load_file(base / "model.safetensors")[name])


def test_a_sparse_head_is_cut_from_the_embedding_it_was_tied_to(tmp_path: Path) -> None:
    make = partial(llama, tie_word_embeddings=True)
    base, adapter = made(tmp_path, make, target_modules=["lm_head"])
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        assert opened.unties == {"lm_head.weight": "model.embed_tokens.weight"}
        assert {name: delta.kind for name, delta in opened.deltas.items()} == {"lm_head.weight": "shira"}


def test_an_audit_counts_a_sparse_adapter_with_its_base_and_without(tmp_path: Path) -> None:
    base, adapter = made(tmp_path)
    edit_tensors(adapter, with_corner)
    held = load_file(adapter / "adapter_model.safetensors")
    for source in (audit(adapter, base=base).sources[0], audit(adapter).sources[0]):
        assert source.header.kind == "shira"
        assert {t.name: t.shape for t in source.tensors}["model.layers.0.mlp.up_proj.weight"] == (24, 16)
        filled = sum(int(t.count_nonzero()) for name, t in held.items() if name.endswith("shira_weight"))
        assert source.total.measure.entries - source.total.measure.zeros == filled


def with_corner(held: Tensors) -> Tensors:
    """The same number of entries in other places: the last ones of the weight, so that they tell its shape."""
    for name in list(held):
        if name.endswith("shira_indices"):
            rows, columns = (16, 16) if "q_proj" in name else (24, 16)
            places = torch.arange(rows * columns)[-held[name].shape[1] :]
            held[name] = torch.stack([places // columns, places % columns]).int()
    return held


def test_an_audit_without_a_base_asks_for_it_when_the_entries_do_not_tell_the_shape(tmp_path: Path) -> None:
    _, adapter = made(tmp_path)
    edit_tensors(adapter, lambda held: {n: torch.zeros_like(t) if "indices" in n else t for n, t in held.items()})
    with pytest.raises(AuditError, match="do not determine its shape; pass base="):
        audit(adapter)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda held: held | {f"{PATH}.{name}": change(held[f"{PATH}.{name}"])}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"r": 3}, None, "values, and rank 3 on the base's"),
        ({"r": 0}, None, "r: must be a whole number above 0, got 0"),
        ({"r": None}, None, "r: must be a whole number above 0, got None"),
        ({"mask_strategy": "top"}, None, "mask_strategy: not a field of SHiRA"),
        ({"peft_type": "LORA", "lora_alpha": 8, "init_weights": None, "mask_type": None, "random_seed": None}, None, "peft_type is LORA"),
        ({}, lambda held: {n: t for n, t in held.items() if n != f"{PATH}.shira_indices"}, "has only shira_weight"),
        ({}, changed("shira_weight", lambda t: t[1:]), "has shira_weight"),
        ({}, changed("shira_indices", lambda t: t.to(torch.int8)), "indices of I8"),
        ({}, lambda held: held | {f"{PATH}.lora_A.weight": torch.ones(2, 16), f"{PATH}.lora_B.weight": torch.ones(16, 2)}, "peft_type is SHIRA"),
        ({}, lambda held: held | {f"{PATH}.shira_mask": torch.ones(2)}, "no supported adapter type uses"),
        ({}, lambda held: {n.replace("q_proj", "z_proj"): t for n, t in held.items()}, "not in the base"),
    ],
)  # fmt: skip
def test_what_peft_could_not_have_made_is_refused(config: Any, tensors: Any, message: str, tmp_path: Path) -> None:
    base, adapter = made(tmp_path)
    edit_config(adapter, **config)
    if tensors:
        edit_tensors(adapter, tensors)
    with Checkpoint.open(base) as checkpoint, pytest.raises(AdapterError, match=message):
        Adapter.open(adapter, checkpoint)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("shira_indices", lambda t: torch.full_like(t, 16), "64 of its indices are out of range for"),
        ("shira_indices", lambda t: -1 - t, "64 of its indices are out of range for"),
        ("shira_indices", lambda t: torch.zeros_like(t), "63 of its indices occur twice"),
        ("shira_weight", lambda t: t / 0, "NaN or infinite"),
    ],
)
def test_entries_that_cannot_be_added_are_an_error_when_they_are_read(
    name: str, change: Any, message: str, tmp_path: Path
) -> None:
    base, adapter = made(tmp_path)
    edit_tensors(adapter, changed(name, change))
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        delta = opened.deltas["model.layers.0.self_attn.q_proj.weight"]
        with pytest.raises(AdapterError, match=message):
            delta.compute(0, 16, None, np.empty((16, 16), np.float32))


@pytest.mark.parametrize(
    "change",
    [lambda t: t.float(), lambda t: t.long() if t.ndim == 2 else t, lambda t: t.flip(-1)],
    ids=["F32", "I64", "turned"],
)
def test_indices_of_any_type_and_in_any_order_are_read(change: Any, tmp_path: Path) -> None:
    base, adapter = made(tmp_path)
    plain = merged_by_us(base, adapter)
    edit_tensors(adapter, lambda held: {n: change(t) for n, t in held.items()})
    assert error(merged_by_us(base, adapter), plain) == 0
