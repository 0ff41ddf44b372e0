"""Adapters of every PEFT type have the weights that PEFT's `merge_and_unload` gives the whole model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from toys.adapters import (
    Tensors,
    edit_config,
    edit_tensors,
    error,
    merged_by_peft,
    merged_by_us,
    train,
)
from toys.peft_types import CASES, TypeCase, opt, wide

from paft_merge.errors import AdapterError
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.adapters.peft_types import NO_DELTA, TYPES
from paft_merge.inputs.checkpoint import Checkpoint


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Any:
    return request.param


def trained(case: TypeCase, folder: Path) -> tuple[Path, Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(case.make(), folder, case.config())


def faults(base: Path, adapter: Path) -> list[str]:
    with Checkpoint.open(base) as checkpoint, pytest.raises(AdapterError) as caught:
        Adapter.open(adapter, checkpoint)
    return [f"{problem.code}: {problem.what}" for problem in caught.value.problems]


def test_the_merged_model_is_pefts(case: TypeCase, tmp_path: Path) -> None:
    base, adapter = trained(case, tmp_path)
    torch.manual_seed(7)
    theirs = merged_by_peft(case.make, base, adapter, tmp_path / "theirs")
    torch.manual_seed(8)
    before = torch.get_rng_state()
    assert error(merged_by_us(base, adapter, rows=3), theirs) < 1e-6
    assert torch.equal(torch.get_rng_state(), before)


def test_every_type_of_peft_is_in_a_table() -> None:
    known: set[Any] = {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    assert known - TYPES.keys() - NO_DELTA.keys() == set()
    assert TYPES.keys() & NO_DELTA.keys() == set()


def test_every_type_has_a_case() -> None:
    assert TYPES.keys() - {case.peft_type for case in CASES.values()} == {"LORA", "SHIRA", "BONE"}


@pytest.mark.parametrize("name", ["MISS plain", "MISS remainder"])
def test_bone_is_miss_under_its_old_name(name: str, tmp_path: Path) -> None:
    base, adapter = trained(CASES[name], tmp_path)
    as_miss = merged_by_us(base, adapter)
    edit_config(adapter, peft_type="BONE", mini_r=None, miss_dropout=None)
    edit_tensors(adapter, lambda held: {key.replace("miss_", "bone_"): value for key, value in held.items()})
    assert error(merged_by_us(base, adapter), as_miss) == 0


@pytest.mark.parametrize(
    ("peft_type", "make", "fields"),
    [
        ("IA3", wide, {"feedforward_modules": ["down_proj"], "modules_to_save": ["lm_head", "norm"]}),
        ("VERA", wide, {"r": 4, "modules_to_save": ["embed_tokens"]}),
        ("BOFT", opt, {"boft_block_size": 4, "bias": "boft_only"}),
        ("OFT", opt, {"oft_block_size": 8, "bias": "all"}),
        ("MISS", opt, {"r": 4, "bias": "miss_only", "modules_to_save": ["final_layer_norm"]}),
    ],
)
def test_saved_modules_and_trained_biases_count_beside_them(
    peft_type: str, make: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    base, adapter = trained(TypeCase(peft_type, make, fields), tmp_path)
    theirs = merged_by_peft(make, base, adapter, tmp_path / "theirs")
    assert error(merged_by_us(base, adapter), theirs) < 1e-6


def test_a_multiplied_embedding_that_was_tied_leaves_the_head_as_it_was(tmp_path: Path) -> None:
    def tied() -> Any:
        return wide(tie_word_embeddings=True)

    base, adapter = trained(TypeCase("HIRA", tied, {"r": 4}, ["embed_tokens"]), tmp_path)
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        assert opened.unties == {"lm_head.weight": "model.embed_tokens.weight"}
        embedding = checkpoint.tensor("model.embed_tokens.weight").float()
    merged = merged_by_us(base, adapter)
    assert torch.equal(merged["lm_head.weight"], embedding)
    assert not torch.equal(merged["model.embed_tokens.weight"], embedding)


@pytest.mark.parametrize(
    "name", ["VERA plain", "TINYLORA plain", "BOFT plain", "OFT plain", "LOKR plain", "IA3 biases"]
)
def test_a_released_delta_is_computed_again(name: str, tmp_path: Path) -> None:
    base, adapter = trained(CASES[name], tmp_path)
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        for key, delta in opened.deltas.items():
            rows = torch.Size(delta.shape).numel() // delta.row_size
            weight = checkpoint.tensor(key).float().reshape(rows, -1).numpy()
            one, other = torch.empty(2, rows, delta.row_size)
            delta.compute(0, rows, weight, one.numpy())
            delta.release()
            delta.compute(0, rows, weight, other.numpy())
            assert torch.equal(one, other)


def without(end: str) -> Callable[[Tensors], Tensors]:
    def change(held: Tensors) -> Tensors:
        first = next(key for key in held if key.endswith(end))
        return {key: value for key, value in held.items() if key != first}

    return change


def wider(end: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {k: torch.cat([v, v], -1) if k.endswith(end) else v for k, v in held.items()}


TENSOR_FAULTS = {
    "LOHA plain": (without("hada_w1_b"), "has the tensors w1_a, w2_a, w2_b"),
    "LOKR plain": (without("lokr_w1"), "has the tensors w2"),
    "ADALORA plain": (without("lora_E"), "has the tensors A, B"),
    "HIRA plain": (wider("hira_A"), "which do not fit"),
    "OFT plain": (wider("oft_R.weight"), "which do not fit"),
    "MISS plain": (wider("miss_block"), "which do not fit"),
    "IA3 plain": (lambda held: {key: value[:5] for key, value in held.items()}, "which do not fit"),
    "LN_TUNING plain": (wider("weight"), "has a weight of (64,)"),
    "TRAINABLE_TOKENS plain": (wider("delta"), "values for 3 tokens"),
    "BOFT plain": (without("boft_s"), "needs tensors that the adapter does not have"),
    "HRA plain": (wider("hra_u"), "size mismatch"),
    "C3A plain": (lambda held: {f"{key}_extra": value for key, value in held.items()}, "does not use its tensors"),
    "VERA plain": (without("base_model.vera_A"), "Specified to load vera_A"),
    "VBLORA plain": (without("vector_bank"), "needs tensors that the adapter does not have"),
}


@pytest.mark.parametrize(("name", "change", "expected"), [(n, *rest) for n, rest in TENSOR_FAULTS.items()])
def test_tensors_that_are_missing_or_do_not_fit_are_found_before_a_merge(
    name: str, change: Callable[[Tensors], Tensors], expected: str, tmp_path: Path
) -> None:
    base, adapter = trained(CASES[name], tmp_path)
    edit_tensors(adapter, change)
    found = faults(base, adapter)
    assert any(text.startswith("ADAPTER_SHAPE: ") and expected in text for text in found), found


CONFIG_FAULTS = {
    "BOFT plain": ({"new_field": 3}, "ADAPTER_UNSUPPORTED: new_field: not a field of BOFT"),
    "LOKR plain": ({"new_field": 3}, "ADAPTER_UNSUPPORTED: new_field: not a field of LOKR"),
    "LOHA plain": ({"alpha": 0}, "ADAPTER_CONFIG: alpha: must be a finite number other than 0"),
    "FROD plain": ({"save_projection": False}, "ADAPTER_UNSUPPORTED: save_projection: false leaves out projections"),
    "PVERA plain": ({"sample_at_inference": True}, "ADAPTER_UNSUPPORTED: sample_at_inference: the model draws"),
    "IA3 plain": ({"peft_type": "POLY"}, "ADAPTER_UNSUPPORTED: peft_type: POLY mixes several adapters by the id"),
}


@pytest.mark.parametrize(("name", "changes", "expected"), [(n, *rest) for n, rest in CONFIG_FAULTS.items()])
def test_configurations_without_an_exact_delta(
    name: str, changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    base, adapter = trained(CASES[name], tmp_path)
    edit_config(adapter, **changes)
    assert any(text.startswith(expected) for text in faults(base, adapter))


def test_a_type_that_the_installed_peft_does_not_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = trained(CASES["HRA plain"], tmp_path)
    kind = next(kind for kind in PEFT_TYPE_TO_TUNER_MAPPING if kind.value == "HRA")
    monkeypatch.delitem(__import__("peft").mapping.PEFT_TYPE_TO_CONFIG_MAPPING, kind)
    found = faults(base, adapter)
    assert found == ["ADAPTER_UNSUPPORTED: peft_type: the installed version of peft does not have HRA"]


def test_values_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    base, adapter = trained(CASES["HRA plain"], tmp_path)
    edit_tensors(adapter, lambda held: {key: value * torch.nan for key, value in held.items()})
    assert all(text.startswith("NONFINITE: ") for text in faults(base, adapter))


def test_numbered_layers_need_a_known_architecture(tmp_path: Path) -> None:
    base, adapter = trained(CASES["TINYLORA plain"], tmp_path)
    (base / "config.json").write_text('{"model_type": "nobody_knows"}')
    assert any("numbers the layers of the model" in text for text in faults(base, adapter))


@pytest.mark.parametrize("name", ["UNILORA plain", "VERA plain", "TRAINABLE_TOKENS plain", "LN_TUNING plain"])
def test_nothing_is_said_to_be_missing(name: str, tmp_path: Path) -> None:
    base, adapter = trained(CASES[name], tmp_path)
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        assert opened.warnings == []
