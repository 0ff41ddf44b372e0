"""Dicts of tensors merged in memory have the bits of the same checkpoints merged on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import near, random_state, save_checkpoint
from toys.merge import State, bits_equal, recipe, same, tensors_of

from paft_merge import merge, merge_state_dicts
from paft_merge.compute import blocks
from paft_merge.errors import CheckpointError, MergeError, RecipeError

TRIMMED = [{"weight": 0.6, "density": 0.5}, {"weight": 0.4, "density": 0.3}]
WEIGHTED = [{"weight": 0.6}, {"weight": 0.4}]
METHODS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "linear": (WEIGHTED, {}),
    "task_arithmetic": (WEIGHTED, {"lambda": 0.7}),
    "ties": (TRIMMED, {}),
    "dare_ties": (TRIMMED, {}),
    "slerp": ([{}], {"t": 0.3}),
    "model_stock": ([{}, {}], {}),
    "karcher": ([{}, {}], {}),
}


@pytest.fixture(params=[torch.bfloat16, torch.float32, torch.float16], ids=["bf16", "f32", "f16"])
def states(request: pytest.FixtureRequest) -> dict[str, State]:
    base = random_state(0, request.param)
    return {"base": base, "x": near(base, 1), "y": near(base, 2)}


def on_disk(
    states: Mapping[str, State], method: str, with_base: bool, folder: Path, **extra: Any
) -> tuple[dict[str, State], State]:
    """The sources by the names of their folders, and the merge of those folders."""
    given, shared = METHODS[method]
    places = {name: save_checkpoint(folder / name, state) for name, state in states.items()}
    sources = list(zip([places["x"], places["y"]], given, strict=False))
    data = recipe(method, places["base"] if with_base else None, *sources, parameters=shared, **extra)
    named = {str(place): states[place.name] for place, _ in sources}
    return named, tensors_of(merge(data, folder / "out", warn=lambda _: None))


@pytest.mark.parametrize("method", METHODS)
def test_the_bits_are_those_of_a_merge_on_disk(
    method: str, states: dict[str, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "TILE", 256)  # several blocks a tensor
    with_base = method not in ("linear", "karcher")
    named, expected = on_disk(states, method, with_base, tmp_path, seed=5)
    given, shared = METHODS[method]
    before = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in states.items()}
    base = states["base"] if with_base else None
    made = merge_state_dicts(base, named, method, parameters=shared, source_parameters=given, seed=5)
    assert same(made, expected)
    assert list(made) == sorted(states["base"]) or list(made) == list(states["base"])
    assert all(same(states[name], before[name]) for name in states)
    one = merge_state_dicts(base, named, method, parameters=shared, source_parameters=given, seed=5, threads=1)
    assert same(one, expected)


def test_types_and_rounding_are_those_of_a_merge_on_disk(tmp_path: Path) -> None:
    base = random_state(0)
    states = {"base": base, "x": near(base, 1), "y": near(base, 2)}
    asked = {"rounding": "stochastic", "seed": 3}
    named, expected = on_disk(states, "ties", True, tmp_path, out_dtype="bfloat16", **asked)
    made = merge_state_dicts(base, named, "ties", source_parameters=TRIMMED, dtype="bfloat16", **asked)
    assert same(made, expected)
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}


def test_masks_depend_on_the_name_of_a_source() -> None:
    base = random_state(0)
    x, given = near(base, 1), [{"weight": 1.0, "density": 0.5}]
    listed = merge_state_dicts(base, [x], "dare_linear", source_parameters=given)
    assert same(merge_state_dicts(base, {"0": x}, "dare_linear", source_parameters=given), listed)
    assert not same(merge_state_dicts(base, {"sft": x}, "dare_linear", source_parameters=given), listed)
    assert not same(merge_state_dicts(base, [x], "dare_linear", source_parameters=given, seed=1), listed)


def test_tensors_may_need_gradients_be_views_scalars_or_empty() -> None:
    made = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(6, 4, generator=made), "b": torch.tensor(2.0), "c": torch.zeros(0), "n": torch.arange(3)}
    x = {"a": torch.randn(4, 6, generator=made).T.requires_grad_(), "b": torch.tensor(3.0), "c": torch.zeros(0)}
    x["n"] = torch.arange(3)
    merged = merge_state_dicts(base, [x], "task_arithmetic", source_parameters=[{"weight": 1.0}])
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in base.items()}
    assert torch.allclose(merged["a"], x["a"].detach())
    assert bits_equal(merged["n"], base["n"])
    assert merged["b"] == 3.0
    assert not any(tensor.requires_grad for tensor in merged.values())


def test_a_source_that_is_the_base_leaves_it_bit_for_bit() -> None:
    base = random_state(0, torch.bfloat16)
    base["model.norm.weight"][0] = -0.0
    assert same(merge_state_dicts(base, [base], "task_arithmetic", source_parameters=[{"weight": 0.3}]), base)


def test_all_differences_of_names_and_shapes_are_one_error() -> None:
    base = random_state(0)
    x = {name: tensor for name, tensor in base.items() if name != "lm_head.weight"}
    y = base | {"model.norm.weight": torch.zeros(7), "model.embed_tokens.weight": torch.zeros(3, 5)}
    with pytest.raises(CheckpointError) as caught:
        merge_state_dicts(base, {"one": x, "two": y}, "task_arithmetic", source_parameters=WEIGHTED)
    text = str(caught.value)
    for words in ("one", "lm_head.weight", "two", "model.norm.weight", "[7]", "model.embed_tokens.weight", "[3, 5]"):
        assert words in text, words


def test_what_cannot_be_merged_is_a_clear_error() -> None:
    base = random_state(0)
    x = near(base, 1)
    with pytest.raises(RecipeError, match="did you mean 'dare_ties'"):
        merge_state_dicts(base, [x], "dare_tiess")
    with pytest.raises(RecipeError, match="unknown parameter wieght; did you mean 'weight'"):
        merge_state_dicts(base, [x], "task_arithmetic", source_parameters=[{"weight": 1, "wieght": 1}])
    with pytest.raises(ValueError, match="source_parameters has 2 entries for 1 sources"):
        merge_state_dicts(base, [x], "task_arithmetic", source_parameters=WEIGHTED)
    with pytest.raises(ValueError, match="a source cannot have the name 'base_model'"):
        merge_state_dicts(base, {"base_model": x}, "task_arithmetic")
    odd = x | {"model.norm.weight": torch.zeros(24, dtype=torch.complex128)}
    with pytest.raises(CheckpointError, match=r"0: model.norm.weight: torch.complex128 cannot be merged"):
        merge_state_dicts(base, [odd], "task_arithmetic", source_parameters=[{"weight": 1}])
    x["lm_head.weight"][0, 0] = torch.nan
    with pytest.raises(MergeError, match=r"0: lm_head.weight: 1 of 960 elements are NaN or infinite"):
        merge_state_dicts(base, [x], "task_arithmetic", source_parameters=[{"weight": 1}])
    made = merge_state_dicts(base, [x], "task_arithmetic", source_parameters=[{"weight": 1}], allow_nonfinite=True)
    assert made["lm_head.weight"][0, 0].isnan()
