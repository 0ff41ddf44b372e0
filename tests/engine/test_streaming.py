"""Whole merges: streamed is in memory, nothing but the recipe changes a bit, every form of checkpoint, and the manifest."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import dense_deltas, near, random_state, save_adapter, save_checkpoint
from safetensors.torch import save_file
from toys.merge import (
    WEIGHT_SPACE,
    State,
    bits_equal,
    files_of,
    manifest_of,
    on,
    recipe,
    recipe_for,
    same,
    tensors_of,
    write_recipe,
)

from paft_merge import merge, open_plan
from paft_merge.compute import blocks
from paft_merge.compute.block_walk import ArrayTensor, BlockWalk
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.engine.api import threads_within
from paft_merge.engine.streaming import Progress
from paft_merge.errors import MergeError, Problems
from paft_merge.inputs.dtypes import stored_bytes
from paft_merge.methods.mergekit_methods import WholeTensor
from paft_merge.methods.rules.rule import TensorPass
from paft_merge.plan import COPY, PlannedTensor
from paft_merge.recipe import load_recipe

LARGE = "model.layers.1.self_attn.q_proj.weight"
"""The one tensor of the large family that takes more than one tile."""


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE", 1 << 14)


def large_state(dtype: torch.dtype) -> State:
    state = random_state(0, dtype, layers=2)
    state[LARGE] = (torch.randn(150, 256, generator=torch.Generator().manual_seed(9)) * 0.02).to(dtype)
    return state


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base with a tensor of several tiles, a fine-tune and an adapter of it, and an adapter of the fine-tune."""
    root, base = tmp_path_factory.mktemp("large"), large_state(request.param)
    return {
        "base": save_checkpoint(root / "base", base, shards=2),
        "x": save_checkpoint(root / "x", near(base, 1)),
        "sft": save_adapter(root / "sft", base, 3),
        "dpo": save_adapter(root / "dpo", base, 4, rank=2),
        "out": root,
    }


@pytest.fixture(params=WEIGHT_SPACE, ids=str)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def any_recipe(method: str, large: Mapping[str, Path]) -> dict[str, Any]:
    return recipe_for(method, large["base"], large["x"], on(large["base"], large["sft"]))


# --- the same bits, however it is run ---------------------------------------------------------------------------------


def in_memory(tensor: PlannedTensor) -> torch.Tensor:
    """One planned tensor merged at once, from its whole inputs."""
    shape, inputs = tensor.shape, tensor.inputs
    if isinstance(tensor.rule, WholeTensor):
        base, sources = inputs.whole(baked=tensor.rule.baked)
        values = tensor.rule.merge(base, sources, tensor.name).reshape(-1)
    else:
        reads = [inputs.sources[i] for i in inputs.active]
        base_f = np.zeros(tensor.numel if inputs.base else 0, np.float32)
        if inputs.base:
            inputs.base.value(0, tensor.numel, base_f)
        rows = np.empty((len(reads), tensor.numel), np.float32)
        for read, row in zip(reads, rows, strict=True):
            if inputs.deltas and inputs.base and read.same_weight(inputs.base):
                read.compute_delta(0, tensor.numel, row)
            else:
                read.value(0, tensor.numel, row)
                if inputs.deltas:
                    row -= base_f
        each = BlockWalk([ArrayTensor(base_f.view(np.uint32), rows.view(np.uint32), tensor.row)])
        combine = tensor.rule.prepare(TensorPass(tensor.numel, each, CpuOps(), inputs.active, shape), inputs.deltas)
        out = np.empty(tensor.numel, np.uint32)
        each(lambda block: combine(block, out[block.index : block.index + block.sources.shape[1]], 0))
        values = torch.from_numpy(out.view(np.float32))
    kind = getattr(torch, {"BF16": "bfloat16", "F32": "float32"}[tensor.dtype])
    return torch.from_numpy(stored_bytes(values, tensor.dtype, 0, 0)).view(kind).reshape(shape)


def test_streamed_is_in_memory_bit_for_bit(method: str, large: dict[str, Path], tmp_path: Path) -> None:
    written = tensors_of(merge(any_recipe(method, large), tmp_path / "out"))
    with open_plan(any_recipe(method, large)) as planned:
        assert [t.name for t in planned.tensors if len(t.bounds) > 1] == [LARGE]
        for tensor in planned.tensors:
            copied = tensor.method == COPY
            expected = planned.config_source.checkpoint.tensor(tensor.name) if copied else in_memory(tensor)
            assert bits_equal(written[tensor.name], expected), tensor.name


def test_threads_memory_and_shards_change_no_bit(method: str, large: dict[str, Path], tmp_path: Path) -> None:
    asked = any_recipe(method, large)
    with open_plan(asked) as planned:
        least = max(tensor.block_bytes for tensor in planned.tensors)
    first = tensors_of(merge(asked, tmp_path / "one", threads=1))
    for number, ways in enumerate([{"threads": 3}, {"memory": least}, {"out_shard_bytes": 8_000, "threads": 2}]):
        assert same(tensors_of(merge(asked, tmp_path / str(number), **ways)), first), ways
    assert len(list((tmp_path / "2").glob("model-*.safetensors"))) > 2


def test_memory_bounds_how_many_blocks_are_computed_at_a_time(large: dict[str, Path]) -> None:
    with open_plan(any_recipe("ties", large)) as planned:
        block = max(tensor.block_bytes for tensor in planned.tensors)
        for memory, threads in ((None, 4), (block, 1), (2 * block + 1, 2), (100 * block, 4)):
            problems = Problems()
            assert threads_within(planned, 4, memory, problems) == threads
            assert not problems.found


def test_the_same_merge_gives_the_same_files(large: dict[str, Path], tmp_path: Path) -> None:
    asked = any_recipe("dare_ties", large)
    first = files_of(merge(asked, tmp_path / "one"))
    assert files_of(merge(asked, tmp_path / "two", threads=2)) == first
    assert {"README.md", "config.json", "merge_manifest.json", "model.safetensors.index.json"} < first.keys()


def test_a_seed_changes_random_methods_and_no_others(method: str, large: dict[str, Path], tmp_path: Path) -> None:
    asked = any_recipe(method, large)
    one = merge({**asked, "seed": 1}, tmp_path / "one")
    two = merge({**asked, "seed": 2}, tmp_path / "two")
    is_random = method in ("dare_linear", "dare_ties", "della", "della_linear")
    assert same(tensors_of(one), tensors_of(two)) != is_random


def test_a_mask_depends_on_seed_source_tensor_and_element_alone(large: dict[str, Path], tmp_path: Path) -> None:
    base, x, other = large["base"], large["x"], on(large["base"], large["sft"])
    kept, nothing = {"weight": 1.0, "density": 0.5}, {"weight": 0.0, "density": 0.5}
    alone = merge(recipe("dare_linear", base, (x, kept)), tmp_path / "alone")
    among = merge(recipe("dare_linear", base, (other, nothing), (x, kept)), tmp_path / "among", out_shard_bytes=50_000)
    assert same(tensors_of(alone), tensors_of(among))
    deltas = (
        tensors_of(alone)["model.layers.0.mlp.up_proj.weight"] - tensors_of(base)["model.layers.0.mlp.up_proj.weight"]
    )
    assert 0.3 < (deltas == 0).float().mean() < 0.7


# --- against a float64 reference --------------------------------------------------------------------------------------


def test_adapters_fine_tunes_and_adapters_on_fine_tunes_are_added_exactly(
    family: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    paths = family()
    sources = [
        (paths["x"], {"weight": 0.5}),
        (on(paths["base"], paths["sft"]), {"weight": 0.7}),
        (on(paths["y"], paths["dpo"]), {"weight": -0.3}),
    ]
    base, x, y = (tensors_of(paths[name]) for name in ("base", "x", "y"))
    sft, dpo = dense_deltas(paths["sft"], base), dense_deltas(paths["dpo"], y)
    written = tensors_of(merge(recipe("task_arithmetic", paths["base"], *sources), tmp_path / "out"))
    for name, tensor in base.items():
        b = tensor.double()
        expected = (
            b + 0.5 * (x[name].double() - b) + 0.7 * sft.get(name, 0) - 0.3 * (y[name].double() + dpo.get(name, 0) - b)
        )
        torch.testing.assert_close(written[name].double(), expected, rtol=2e-7, atol=1e-8)


def test_ties_is_the_papers_three_steps(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    paths = family()
    weights, densities = (0.6, 0.9), (0.3, 0.5)
    sources = [(paths[n], {"weight": w, "density": d}) for n, w, d in zip("xy", weights, densities, strict=True)]
    written = tensors_of(merge(recipe("ties", paths["base"], *sources, parameters={"lambda": 1.5}), tmp_path / "out"))
    base = tensors_of(paths["base"])
    for name, tensor in base.items():
        deltas = [trimmed(tensors_of(paths[n])[name] - tensor, d) for n, d in zip("xy", densities, strict=True)]
        weighted = np.stack([w * d for w, d in zip(weights, deltas, strict=True)])
        agrees = (np.sign(weighted) == np.where(weighted.sum(0) >= 0, 1, -1)) & (weighted != 0)
        divisor = (agrees * np.array(weights).reshape(-1, *[1] * tensor.ndim)).sum(0)
        merged = (weighted * agrees).sum(0) / np.where(divisor, divisor, 1)
        expected = torch.from_numpy(tensor.double().numpy() + 1.5 * merged)
        torch.testing.assert_close(written[name].double(), expected, rtol=2e-7, atol=1e-9)


def trimmed(delta: torch.Tensor, density: float) -> np.ndarray[Any, Any]:
    flat = delta.reshape(-1).numpy().astype(np.float64)
    kept = np.argsort(-np.abs(flat), kind="stable")[: max(1, int(density * flat.size))]
    result = np.zeros_like(flat)
    result[kept] = flat[kept]
    return result.reshape(delta.shape)


def test_slerp_begins_at_the_base_and_ends_at_the_other(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    paths = family()
    base, x = tensors_of(paths["base"]), tensors_of(paths["x"])
    for t, expected in ((0.0, base), (1.0, x)):
        written = tensors_of(merge(recipe("slerp", paths["base"], paths["x"], parameters={"t": t}), tmp_path / str(t)))
        for name in base:
            torch.testing.assert_close(written[name], expected[name], rtol=1e-6, atol=1e-9)


def test_linear_is_the_mean_with_and_without_a_base(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    paths = family()
    half, base, x = {"weight": 2.0}, tensors_of(paths["base"]), tensors_of(paths["x"])
    written = [
        tensors_of(merge(recipe("linear", None, (paths["base"], half), (paths["x"], half)), tmp_path / "without")),
        tensors_of(
            merge(recipe("linear", paths["base"], (paths["x"], half), (paths["base"], half)), tmp_path / "with")
        ),
    ]
    for state in written:
        for name in base:
            torch.testing.assert_close(
                state[name].double(), (base[name].double() + x[name].double()) / 2, rtol=1e-6, atol=1e-9
            )


# --- forms of checkpoints ---------------------------------------------------------------------------------------------

FORMS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FORMS, ids=str)
def test_every_storage_type_is_computed_in_float32_and_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base = {name: tensor.to(dtype) for name, tensor in random_state(0).items()}
    moved = {name: (tensor.float() * 1.25 + 0.01).to(dtype) for name, tensor in base.items()}
    a, b = save_checkpoint(tmp_path / "a", base), save_checkpoint(tmp_path / "b", moved)
    written = tensors_of(merge(recipe("task_arithmetic", a, (b, {"weight": 0.3})), tmp_path / "out"))
    for name, tensor in base.items():
        expected = tensor.float() + np.float32(0.3).item() * (moved[name].float() - tensor.float())
        assert bits_equal(written[name], expected.to(dtype)), name


@pytest.mark.parametrize("dtype", FORMS, ids=str)
@pytest.mark.parametrize("out", ["float64", "float32", "float16", "bfloat16"])
def test_any_type_is_written_as_any_other(dtype: torch.dtype, out: str, tmp_path: Path) -> None:
    base = {name: tensor.to(dtype) for name, tensor in random_state(0, layers=1).items()}
    a = save_checkpoint(tmp_path / "a", base, config={"torch_dtype": "float32"})
    adapter = save_adapter(tmp_path / "adapter", base, 1)
    asked = recipe("task_arithmetic", a, (on(a, adapter), {"weight": 1.0}), out_dtype=out)
    written = tensors_of(merge(asked, tmp_path / "out"))
    untouched = "model.norm.weight"
    assert bits_equal(
        written[untouched],
        base[untouched] if dtype == getattr(torch, out) else base[untouched].float().to(getattr(torch, out)),
    )
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, out)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == out


def test_shards_on_one_side_and_pickles_on_the_other_give_the_same(tmp_path: Path) -> None:
    base = random_state(0, torch.bfloat16)
    x = near(base, 1)
    plain = [save_checkpoint(tmp_path / "base", base), save_checkpoint(tmp_path / "x", x)]
    sharded = [save_checkpoint(tmp_path / "base3", base, shards=3), save_checkpoint(tmp_path / "x2", x, shards=2)]
    pickled = [tmp_path / "base_bin", tmp_path / "x_bin"]
    for folder, state in zip(pickled, (base, x), strict=True):
        folder.mkdir()
        torch.save(
            {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in state.items()}, folder / "pytorch_model.bin"
        )
    results = [
        tensors_of(
            merge(recipe("ties", a, (b, {"weight": 1, "density": 0.5})), tmp_path / f"out{i}", lazy_unpickle=True)
        )
        for i, (a, b) in enumerate([plain, sharded, pickled, (plain[0], pickled[1])])
    ]
    assert all(same(result, results[0]) for result in results[1:])
    assert sorted(f.name for f in (tmp_path / "out2").glob("*.safetensors*")) == ["model.safetensors"]


def test_scalars_empty_tensors_and_vectors_are_merged(method: str, tmp_path: Path) -> None:
    odd = {
        "a": torch.tensor(2.0),
        "b": torch.zeros(0, 4),
        "c": torch.arange(1.0, 8.0),
        "d": torch.randn(2, 3, 4),
        "e": torch.ones(1, 1),
    }
    base, x, y = (
        save_checkpoint(tmp_path / n, {k: t + i for k, t in odd.items()}) for i, n in enumerate(("base", "x", "y"))
    )
    written = tensors_of(merge(recipe_for(method, base, x, y), tmp_path / "out"))
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in odd.items()
    }
    assert all(torch.isfinite(tensor).all() for tensor in written.values())


# --- what stays as it is ----------------------------------------------------------------------------------------------


def test_untouched_tensors_keep_every_bit_whatever_their_type(tmp_path: Path) -> None:
    odd = {
        "f64": torch.randn(5, dtype=torch.float64),
        "f16": torch.tensor([-0.0, 6e-8, 65504], dtype=torch.float16),
        "f8": torch.randn(7).to(torch.float8_e4m3fn),
        "e8": torch.arange(9, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "i64": torch.tensor([2**53 + 1, -(2**62) - 1]),
        "u8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "complex": torch.tensor([1 + 2j]),
    }  # fmt: skip
    base = {**random_state(0), **odd}
    a, b = save_checkpoint(tmp_path / "a", base), save_checkpoint(tmp_path / "b", {**near(random_state(0), 1), **odd})
    sources = [(b, {"weight": 0.5}), (on(a, save_adapter(tmp_path / "c", base, 2)), {"weight": 1})]
    written = tensors_of(merge(recipe("task_arithmetic", a, *sources), tmp_path / "out"))
    same_in_both = {"f64", "f16", "f8"}
    for name in odd:
        equal = (
            torch.equal(written[name].double(), odd[name].float().double())
            if name in same_in_both
            else bits_equal(written[name], odd[name])
        )
        assert equal, name
    alone = tensors_of(merge(recipe("task_arithmetic", a, sources[1]), tmp_path / "alone"))
    assert all(bits_equal(alone[name], tensor) for name, tensor in odd.items())
    assert bits_equal(alone["model.norm.weight"], base["model.norm.weight"])
    assert not bits_equal(alone["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("shards", [1, 3])
def test_names_order_and_files_are_those_of_the_base(shards: int, tmp_path: Path) -> None:
    base = random_state(0, torch.bfloat16)
    a, b = save_checkpoint(tmp_path / "a", base, shards), save_checkpoint(tmp_path / "b", near(base, 1), 4 - shards)
    out = merge(recipe("linear", a, (b, {"weight": 1}), (a, {"weight": 1})), tmp_path / "out").path
    for file in a.glob("*.safetensors"):
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert (out / file.name).read_bytes()[:header] == file.read_bytes()[:header]
        assert (out / file.name).stat().st_size == file.stat().st_size
    if shards > 1:
        ours, theirs = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (out, a))
        assert ours["weight_map"] == theirs["weight_map"]
        assert ours["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in base.values())
    else:
        assert not list(out.glob("*.index.json"))


def test_a_shard_size_is_an_upper_bound(tmp_path: Path) -> None:
    base = random_state(0)
    a, b = save_checkpoint(tmp_path / "a", base), save_checkpoint(tmp_path / "b", near(base, 1))
    out = merge(
        recipe("linear", None, (a, {"weight": 1}), (b, {"weight": 1})), tmp_path / "out", out_shard_bytes=8_000
    ).path
    sizes = [sum(t.numel() * t.element_size() for t in tensors_of_file(f).values()) for f in out.glob("*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) <= 8_000


def tensors_of_file(file: Path) -> State:
    from safetensors.torch import load_file

    return dict(load_file(file))


def test_an_index_is_called_so_that_readers_find_it(tmp_path: Path) -> None:
    folder, base = tmp_path / "a", random_state(0)
    folder.mkdir()
    names = list(base)
    for file, part in (("one.safetensors", names[:4]), ("two.safetensors", names[4:])):
        save_file({n: base[n] for n in part}, folder / file)
    weight_map = dict.fromkeys(names[:4], "one.safetensors") | dict.fromkeys(names[4:], "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    adapter = save_adapter(tmp_path / "adapter", base, 1)
    out = merge(recipe("task_arithmetic", folder, (on(folder, adapter), {"weight": 1})), tmp_path / "out")
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"] == weight_map


def test_transformers_loads_the_result_and_it_is_the_merge_in_memory(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    base = tensors_of(tmp_path / "base")
    adapters = [save_adapter(tmp_path / name, base, seed, size=0.1) for seed, name in enumerate(("sft", "dpo"))]
    sources = [
        (on(tmp_path / "base", adapter), {"weight": weight})
        for adapter, weight in zip(adapters, (1.0, 0.5), strict=True)
    ]
    merge(recipe("task_arithmetic", tmp_path / "base", *sources), tmp_path / "out")
    deltas = [dense_deltas(adapter, base) for adapter in adapters]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in deltas[0]:
                parameter.copy_((parameter.double() + deltas[0][name] + 0.5 * deltas[1][name]).to(torch.bfloat16))
        tokens = torch.arange(12)[None]
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=2e-2, atol=2e-2)
    different = [(p != q).float().mean().item() for p, q in zip(loaded.parameters(), model.parameters(), strict=True)]
    assert max(different) < 2e-3  # a double rounding here and there
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()


# --- the recipe takes effect ------------------------------------------------------------------------------------------


def test_gradients_run_over_the_layers(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    paths = family()
    base, x = tensors_of(paths["base"]), tensors_of(paths["x"])
    written = tensors_of(
        merge(recipe("task_arithmetic", paths["base"], (paths["x"], {"weight": [0, 1]})), tmp_path / "out")
    )
    for name in base:
        share = {"0": 0.0, "1": 0.5, "2": 1.0}[name.split(".")[2]] if ".layers." in name else 0.0
        torch.testing.assert_close(written[name], base[name] + share * (x[name] - base[name]), rtol=1e-6, atol=1e-9)


def test_filters_choose_tensors_by_name(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    paths = family()
    weight = [{"filter": "q_proj", "value": [0.5, 1]}, {"value": 0}]
    written = tensors_of(
        merge(recipe("task_arithmetic", paths["base"], (paths["x"], {"weight": weight})), tmp_path / "out")
    )
    base, x = tensors_of(paths["base"]), tensors_of(paths["x"])
    for name in base:
        share = {"0": 0.5, "1": 0.75, "2": 1.0}[name.split(".")[2]] if "q_proj" in name else 0.0
        torch.testing.assert_close(written[name], base[name] + share * (x[name] - base[name]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_stochastic_rounding_keeps_updates_on_average_and_repeats_itself(dtype: torch.dtype, tmp_path: Path) -> None:
    base = {"w": torch.ones(64, 1024).to(dtype)}
    step = float(torch.finfo(dtype).eps)
    a = save_checkpoint(tmp_path / "a", base)
    b = save_checkpoint(tmp_path / "b", {"w": torch.full((64, 1024), 1 + step).to(dtype)})

    def run(name: str, **extra: Any) -> torch.Tensor:
        asked = recipe("task_arithmetic", a, (b, {"weight": 0.25}), **extra)
        return tensors_of(merge(asked, tmp_path / name))["w"]

    nearest, one = run("nearest"), run("one", rounding="stochastic", seed=1)
    assert torch.equal(nearest.float(), base["w"].float())  # a quarter of a step is lost
    assert set(one.double().unique().tolist()) == {1.0, 1 + step}
    sigma = (0.25 * 0.75 / one.numel()) ** 0.5
    assert abs((one.double() - 1).mean().item() / step - 0.25) < 4 * sigma
    assert bits_equal(run("again", rounding="stochastic", seed=1), one)
    assert not bits_equal(run("other", rounding="stochastic", seed=2), one)


def test_what_needs_no_rounding_is_not_rounded_stochastically(tmp_path: Path) -> None:
    base = random_state(0)
    a, b = save_checkpoint(tmp_path / "a", base), save_checkpoint(tmp_path / "b", near(base, 1))
    asked = recipe("linear", None, (a, {"weight": 1}), (b, {"weight": 1}))
    exact = tensors_of(merge(asked, tmp_path / "one"))
    assert same(tensors_of(merge({**asked, "rounding": "stochastic"}, tmp_path / "two")), exact)


# --- Python ------------------------------------------------------------------------------------------------------------


def test_a_recipe_is_a_path_a_text_a_mapping_or_a_loaded_one(
    family: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    paths = family()
    data = recipe("ties", paths["base"], (paths["x"], {"weight": 1, "density": 0.5}))
    file = write_recipe(tmp_path / "recipe.yaml", data)
    forms = [data, file, str(file), file.read_text(), load_recipe(data)]
    results = [tensors_of(merge(form, tmp_path / f"out{i}")) for i, form in enumerate(forms)]
    assert all(same(result, results[0]) for result in results)


def test_progress_is_told_after_every_tensor(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    paths, seen = family(), list[Progress]()
    merge(recipe("ties", paths["base"], (paths["x"], {"weight": 1})), tmp_path / "out", progress=seen.append, threads=2)
    names = list(tensors_of(paths["base"]))
    assert [(p.tensors, p.tensors_total) for p in seen] == [(i + 1, len(names)) for i in range(len(names))]
    assert sorted(p.name for p in seen) == sorted(names)
    assert seen[-1].bytes_done == seen[-1].bytes_total == sum(t.nbytes for t in tensors_of(paths["base"]).values())


def test_a_merge_is_quiet_and_leaves_torch_as_it_was(
    family: Callable[..., dict[str, Path]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths, before = family(), torch.get_num_threads()
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])  # a command in this process leaves its own
    with caplog.at_level(logging.INFO):
        merge(recipe("ties", paths["base"], (on(paths["base"], paths["sft"]), {"weight": 1})), tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert [record.message.partition(" ")[0] for record in caplog.records] == ["merging", f"{tmp_path / 'out'}:"]
    assert torch.get_num_threads() == before


def test_files_are_closed_after_a_merge_and_after_a_refused_one(
    family: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    paths = family()
    merge(recipe("ties", paths["base"], (on(paths["x"], paths["sft"]), {"weight": 1})), tmp_path / "warm")
    before = len(os.listdir("/proc/self/fd"))
    merge(recipe("ties", paths["base"], (on(paths["base"], paths["sft"]), {"weight": 1})), tmp_path / "out")
    with pytest.raises(Exception, match="nowhere"):
        merge(
            recipe(
                "ties",
                paths["base"],
                (on(paths["base"], paths["sft"]), {"weight": 1}),
                (tmp_path / "nowhere", {"weight": 1}),
            ),
            tmp_path / "no",
        )
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_device_that_is_not_there_is_named(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    paths = family()
    asked = recipe("ties", paths["base"], (paths["x"], {"weight": 1}))
    for device in ("cuda:99", "meta", "gpu"):
        with pytest.raises(MergeError, match=device) as caught:
            merge(asked, tmp_path / "out", device=device)
        assert caught.value.problems[0].code == "DEVICE"


# --- the manifest and the card -----------------------------------------------------------------------------------------


def counts_of(delta: np.ndarray[Any, Any]) -> dict[str, int]:
    size = np.abs(delta.astype(np.float32))
    return {"zeros": int((size == 0).sum())} | {
        f"below_{e:g}".replace("e-0", "e-0"): int((size < np.float32(e)).sum()) for e in (1e-6, 1e-5, 1e-4, 1e-3)
    }


def test_the_manifest_counts_what_a_float64_reference_counts(
    family: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    paths = family(torch.bfloat16)
    base, x = tensors_of(paths["base"]), tensors_of(paths["x"])
    adapted = on(paths["base"], paths["sft"])
    asked = recipe(
        "ties", paths["base"], (paths["x"], {"weight": 1, "density": 0.25}), (adapted, {"weight": 0.5, "density": 0.5})
    )
    entries = manifest_of(merge(asked, tmp_path / "out"))["tensors"]
    sft = dense_deltas(paths["sft"], base)
    for name, tensor in base.items():
        entry, (ours, theirs) = entries[name], entries[name]["sources"]
        delta = (x[name].double() - tensor.double()).numpy()
        small = {"zeros": 0, "below_1e-06": 1e-6, "below_1e-05": 1e-5, "below_1e-04": 1e-4, "below_1e-03": 1e-3}
        for key, bound in small.items():
            assert ours[key] == ((np.abs(delta) < np.float32(bound)).sum() if bound else (delta == 0).sum()), key
        weight_of = {"x": trimmed(x[name].float() - tensor.float(), 0.25), "sft": np.zeros(tensor.shape)}
        assert ours["kept"] == np.count_nonzero(weight_of["x"])
        assert ours["l1"] == pytest.approx(np.abs(delta).sum(), rel=2e-7)
        assert ours["l2"] == pytest.approx(np.sqrt((delta**2).sum()), rel=2e-7)
        assert ours["max"] == np.abs(delta).max()
        assert ours["kept_energy"] == pytest.approx((weight_of["x"] ** 2).sum() / (delta**2).sum(), rel=2e-7)
        assert (entry["method"], entry["dtype"], entry["shape"]) == ("ties", "BF16", list(tensor.shape))
        assert (ours["source"], ours["delta"], ours["parameters"]["density"]) == (str(paths["x"]), "checkpoint", 0.25)
        if name in sft:
            weight_of["sft"] = trimmed(sft[name].float(), 0.5)
            assert (theirs["delta"], theirs["kept"]) == ("lora", int(0.5 * tensor.numel()))
            assert theirs["l2"] == pytest.approx(float(sft[name].norm()), rel=1e-6)
        else:
            assert theirs == {"source": adapted, "delta": "none", "parameters": {"weight": 0.5, "density": 0.5}}
        votes = np.sign(weight_of["x"] + 0.5 * weight_of["sft"])
        agreeing = [(np.sign(w) == np.where(votes >= 0, 1, -1)).sum() for w in weight_of.values()]
        assert abs(ours["elected"] - agreeing[0]) <= 1
        assert theirs.get("elected", 0) == pytest.approx(agreeing[1], abs=1)


def test_what_is_only_added_up_counts_as_kept_and_elected(
    family: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    paths = family()
    out = merge(
        recipe("task_arithmetic", paths["base"], (on(paths["base"], paths["sft"]), {"weight": 1})), tmp_path / "out"
    )
    (total,) = manifest_of(out)["totals"]
    assert total["kept"] == total["elected"] == total["entries"] - total["zeros"]
    assert total["kept_energy"] == total["elected_energy"] == 1.0
    assert "100.0%" in (out / "README.md").read_text()


def test_totals_add_up_the_tensors(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    paths = family()
    asked = recipe(
        "dare_ties",
        paths["base"],
        (paths["x"], {"weight": 1, "density": 0.5}),
        (on(paths["base"], paths["sft"]), {"weight": 1, "density": 0.5}),
    )
    written = manifest_of(merge(asked, tmp_path / "out"))
    for i, total in enumerate(written["totals"]):
        rows = [
            (e["sources"][i], np.prod(e["shape"]))
            for e in written["tensors"].values()
            if e["sources"][i]["delta"] != "none"
        ]
        assert total["entries"] == sum(size for _, size in rows)
        for key in ("zeros", "kept", "elected", "below_1e-04"):
            assert total[key] == sum(row[key] for row, _ in rows)
        assert total["l2"] == pytest.approx(sum(row["l2"] ** 2 for row, _ in rows) ** 0.5)


def test_the_manifest_says_how_the_bytes_came_to_be(family: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    from importlib.metadata import version

    from paft_merge.output.folder import digest_of

    paths = family()
    asked = recipe("ties", paths["base"], (on(paths["x"], paths["sft"]), {"weight": 1, "density": 0.5}), seed=7)
    written = manifest_of(merge(asked, tmp_path / "out"))
    assert load_recipe(written["recipe"]).resolved() == load_recipe(asked).resolved()
    assert (written["seed"], written["arithmetic"], written["rounding"]) == (7, "float32", "nearest")
    assert written["versions"]["torch"] == version("torch")
    assert set(written["inputs"]) == {str(paths["base"]), on(paths["x"], paths["sft"])}
    with open_plan(asked) as planned:
        for shard in planned.shards:
            for slot in shard.slots:
                entry = written["tensors"][slot.name]
                assert digest_of(tmp_path / "out", slot, entry["block_bytes"]) == entry["digest"]


def test_a_fingerprint_tells_a_fine_tune_from_its_base_and_knows_a_copy_again(
    family: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    import shutil

    paths = family()
    copy = Path(shutil.copytree(paths["x"], tmp_path / "copy", copy_function=shutil.copy))
    prints = []
    for i, folder in enumerate((paths["x"], copy, paths["y"])):
        asked = recipe("ties", paths["base"], (folder, {"weight": 1}))
        prints.append(manifest_of(merge(asked, tmp_path / f"out{i}"))["inputs"][str(folder)])
    assert prints[0] == prints[1] != prints[2]


def test_no_path_of_this_machine_is_told_that_the_recipe_does_not_name(
    family: Callable[..., dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family()
    monkeypatch.chdir(tmp_path)
    out = merge(recipe("ties", "base", ("x", {"weight": 1}), (on("base", "sft"), {"weight": 1})), "out")
    for name, content in files_of(out).items():
        assert str(tmp_path).encode() not in content, name
        assert os.uname().nodename.encode() not in content or len(os.uname().nodename) < 4, name


def test_the_card_has_the_metadata_of_mergekit_and_the_recipe(
    family: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    import yaml

    paths = family()
    text = "# my merge\n" + json.dumps(
        recipe("ties", paths["base"], (on(paths["base"], paths["sft"]), {"weight": 1})), indent=1
    )
    card = (merge(text, tmp_path / "out") / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata == {"library_name": "transformers", "tags": ["mergekit", "merge", "paft"]}
    assert text in card
    assert f"| `{paths['base']}` | base |" in card
    assert not (merge(text, tmp_path / "bare", write_model_card=False) / "README.md").exists()
