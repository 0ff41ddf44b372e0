"""Routers of mixtures of experts: which tensors they are, and how `router` merges them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, near, save_adapter, save_checkpoint
from toys.merge import on, paft, recipe, same, tensors_of, write_recipe

from paft_merge import merge, merge_state_dicts
from paft_merge.engine.api import open_plan
from paft_merge.errors import PaftMergeError, RecipeError
from paft_merge.methods import METHODS
from paft_merge.plan.explanation import explain
from paft_merge.plan.routers import find_routers

NAMES = {
    "Mixtral": ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.0.w1.weight"),
    "Qwen3": ("mlp.gate.weight", "mlp.experts.0.gate_proj.weight mlp.experts.0.up_proj.weight"),
    "Qwen2 MoE": ("mlp.gate.weight mlp.shared_expert_gate.weight", "mlp.experts.0.gate_proj.weight mlp.shared_expert.gate_proj.weight"),
    "DeepSeek V3": ("mlp.gate.weight mlp.gate.e_score_correction_bias", "mlp.experts.0.gate_proj.weight mlp.shared_experts.gate_proj.weight"),
    "gpt-oss": ("mlp.router.weight mlp.router.bias", "mlp.experts.gate_up_proj mlp.experts.gate_up_proj_bias"),
    "Llama 4": ("feed_forward.router.weight", "feed_forward.experts.gate_up_proj feed_forward.shared_expert.gate_proj.weight"),
    "Granite": ("block_sparse_moe.router.layer.weight", "block_sparse_moe.input_linear.weight"),
    "JetMoE": ("mlp.router.layer.weight self_attention.experts.router.layer.weight", "mlp.input_linear.weight self_attention.experts.input_linear.weight"),
    "Switch": ("mlp.router.classifier.weight", "mlp.experts.expert_0.wi.weight"),
    "MiniMax M2": ("block_sparse_moe.gate.weight block_sparse_moe.e_score_correction_bias", "block_sparse_moe.experts.0.w1.weight"),
    "LFM2": ("feed_forward.gate.weight feed_forward.expert_bias", "feed_forward.experts.0.w1.weight"),
    "Gemma 4": ("router.proj.weight router.scale", "experts.gate_up_proj mlp.gate_proj.weight"),
    "Nemotron H": ("mixer.gate.weight mixer.gate.e_score_correction_bias", "mixer.experts.0.up_proj.weight mixer.norm.weight"),
    "dense": ("", "mlp.gate_proj.weight mlp.gate.weight self_attn.gate.weight self_attn.output_gate.weight router.weight"),
    "gates inside of experts": ("mlp.gate.weight", "mlp.experts.0.gate.weight mlp.experts.router_norm.weight self_attn.gate.weight"),
}  # fmt: skip


@pytest.mark.parametrize("model", NAMES)
def test_routers_are_known_by_their_names_and_the_experts_beside_them(model: str) -> None:
    found, others = ([f"model.layers.3.{name}" for name in names.split()] for names in NAMES[model])
    assert find_routers([*found, *others, "model.embed_tokens.weight", "lm_head.weight"]) == set(found)


# --- merges -----------------------------------------------------------------------------------------------------------

GATES = tuple(f"model.layers.{i}.mlp.gate.weight" for i in range(2))
BIASES = tuple(f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(2))
ROUTERS = (*GATES, *BIASES)


def moe_state(dtype: torch.dtype) -> State:
    made = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (20, 16)}
    for i in range(2):
        shapes |= {f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": (24, 16) for e in range(3)}
        shapes |= {f"model.layers.{i}.self_attn.q_proj.weight": (16, 16), GATES[i]: (3, 16)}
    state = {name: (torch.randn(shape, generator=made) * 0.02).to(dtype) for name, shape in shapes.items()}
    return {**state, **{name: torch.randn(3, generator=made) for name in BIASES}}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], dict[str, Path]]:
    """A mixture of experts, two fine-tunes and an adapter of it that has the routers too."""
    made: dict[torch.dtype, dict[str, Path]] = {}

    def family(dtype: torch.dtype = torch.bfloat16) -> dict[str, Path]:
        if dtype not in made:
            folder, base = tmp_path_factory.mktemp("mixtures"), moe_state(dtype)
            states = {"base": base, "x": near(base, 1, 1e-2), "y": near(base, 2, 1e-2)}
            made[dtype] = {name: save_checkpoint(folder / name, state) for name, state in states.items()}
            made[dtype]["lora"] = save_adapter(
                folder / "lora", {n: t for n, t in base.items() if "layers" in n and t.dim() == 2}, 3
            )
        return made[dtype]

    return family


Mixtures = Callable[..., dict[str, Path]]


def asked(method: str, places: dict[str, Path], **extra: Any) -> dict[str, Any]:
    sources = [places["x"], on(places["base"], places["lora"])][: METHODS[method].max_sources or 2]
    weighted = METHODS[method].parameter("weight") is not None
    models = [(source, {"weight": 0.6 - 0.2 * i} if weighted else {}) for i, source in enumerate(sources)]
    more = {"parameters": {"t": 0.3}} if METHODS[method].parameter("t") else {}
    return recipe(method, None if METHODS[method].base == "ignored" else places["base"], *models, **more, **extra)


def others(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name not in ROUTERS}


@pytest.mark.parametrize("method", ["ties", "linear", "slerp", "dare_ties", "geometric_median"])
def test_other_tensors_keep_their_bits(method: str, mixtures: Mixtures, tmp_path: Path) -> None:
    places = mixtures()
    plain, base = tensors_of(merge(asked(method, places), tmp_path / "plain")), tensors_of(places["base"])
    assert same(plain, tensors_of(merge(asked(method, places, router="merge"), tmp_path / "merge")))
    words = {"average": None} if method == "linear" else {"average": None, "base": base}
    for word, expected in words.items():
        found = tensors_of(merge(asked(method, places, router=word), tmp_path / word))
        assert same(others(found), others(plain))
        for name in ROUTERS:
            assert expected is None or torch.equal(found[name], expected[name])
        assert all(not torch.equal(found[name], plain[name]) for name in GATES) or method in ("linear", "slerp")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_average_has_the_bits_of_linear(dtype: torch.dtype, mixtures: Mixtures, tmp_path: Path) -> None:
    places = mixtures(dtype)
    found = tensors_of(merge(asked("ties", places, router="average"), tmp_path / "found", threads=1))
    linear = tensors_of(merge(asked("linear", places), tmp_path / "linear", threads=3))
    assert all(torch.equal(found[name], linear[name]) for name in ROUTERS)
    sources = [tensors_of(places["x"]), tensors_of(merge(recipe("linear", None, (on(places["base"], places["lora"]), {"weight": 1.0}), dtype="float32"), tmp_path / "lora"))]  # fmt: skip
    for name in GATES:
        mean = 0.6 * sources[0][name].double() + 0.4 * sources[1][name].double()
        torch.testing.assert_close(
            found[name].double(), mean, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-7
        )


def test_methods_of_two_models_average_the_base_too(mixtures: Mixtures, tmp_path: Path) -> None:
    places = mixtures(torch.float32)
    base, x = tensors_of(places["base"]), tensors_of(places["x"])
    for method in ("slerp", "nearswap"):
        found = tensors_of(merge(asked(method, places, router="average"), tmp_path / method))
        for name in GATES:
            torch.testing.assert_close(found[name], (base[name] + x[name]) / 2, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("word", ["base", "average"])
def test_routers_of_state_dicts_are_merged_as_on_disk(word: Any, mixtures: Mixtures, tmp_path: Path) -> None:
    places = mixtures()
    states = {name: tensors_of(places[name]) for name in ("base", "x", "y")}
    models = [(places[name], {"weight": 0.5}) for name in "xy"]
    expected = tensors_of(merge(recipe("ties", places["base"], *models, router=word), tmp_path / "out"))
    given = {"parameters": {"weight": 0.5}, "router": word}
    assert same(merge_state_dicts(states["base"], [states["x"], states["y"]], "ties", **given), expected)


def test_a_base_s_router_is_converted_with_the_others(mixtures: Mixtures, tmp_path: Path) -> None:
    places = mixtures()
    found = tensors_of(merge(asked("ties", places, router="base", dtype="float32"), tmp_path / "out"))
    base = tensors_of(places["base"])
    assert all(torch.equal(found[name], base[name].float()) for name in ROUTERS)


def test_slices_have_the_routers_of_their_own_layers(mixtures: Mixtures, tmp_path: Path) -> None:
    places = mixtures()
    slices = [
        {"sources": [{"model": str(places["base"]), "layer_range": [at, at + 1]}, {"model": str(places["x"]), "layer_range": [0, 1], "parameters": {"weight": 1.0}}]}
        for at in (1, 0)
    ]  # fmt: skip
    asked = {"merge_method": "task_arithmetic", "base_model": str(places["base"]), "slices": slices, "router": "base"}
    with open_plan(asked, allow_crimes=True) as plan:
        read = {t.name: t.inputs.reads[0].name for t in plan.tensors if t.parameters.get("router")}
    assert read[GATES[0]] == GATES[1]
    assert read[GATES[1]] == GATES[0]


def test_plan_manifest_and_explanation_show_the_router(mixtures: Mixtures, tmp_path: Path) -> None:
    places = mixtures()
    for word, method, inputs in (("base", "copy", 0), ("average", "linear", 2)):
        wanted = asked("ties", places, router=word)
        with open_plan(wanted) as plan:
            kinds = {kind.method: kind.parameters for kind, _ in plan.summary() if "router" in kind.parameters}
            assert f"router={word}" in kinds[method]
            (explained,) = explain(plan, GATES[0])
        assert explained.shared["router"].value == word
        assert "router: base" in explained.why or word == "average"
        assert [one.parameters["weight"].value for one in explained.sources if one.parameters] == pytest.approx(
            [0.6, 0.4][:inputs]
        )
        out = merge(wanted, tmp_path / word)
        entry = json.loads((out / "merge_manifest.json").read_text())["tensors"][GATES[0]]
        assert (entry["method"], entry["parameters"]) == (method, {"router": word})
        weights = [one["parameters"]["weight"] for one in entry.get("sources", [])]
        assert weights == pytest.approx([0.6, 0.4][:inputs])
    shown = paft("explain", write_recipe(tmp_path / "r.yaml", wanted), "--tensor", GATES[0]).stdout
    assert "linear" in shown
    assert "average" in shown
    shown = paft("merge", write_recipe(tmp_path / "r.yaml", wanted), "--dry-run").stdout
    assert "router=average" in shown


def test_what_cannot_be_is_refused_and_what_has_no_effect_is_a_warning(
    mixtures: Mixtures, family: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    def warnings(data: dict[str, Any]) -> list[str]:
        with open_plan(data) as plan:
            return [str(one) for one in plan.warnings if one.code == "ROUTER"]

    places = mixtures()
    with pytest.raises(PaftMergeError, match="router: base keeps the base's routers, and the recipe has no base_model"):
        warnings(asked("linear", places, router="base"))
    with pytest.raises(RecipeError, match="router: must be one of base, average, merge, got 'mean'"):
        warnings(asked("ties", places, router="mean"))
    sources = [(places["x"], {"weight": 1.0}), (places["y"], {"weight": -1.0})]
    with pytest.raises(PaftMergeError, match="add up to zero, so their routers have no mean"):
        warnings(recipe("ties", places["base"], *sources, router="average"))
    measured = [(places["x"], {"weight": "equal_norm"}), (places["y"], {"weight": 1.0})]
    with pytest.raises(PaftMergeError, match="a source has weight: equal_norm, so their routers have no mean"):
        warnings(recipe("ties", places["base"], *measured, router="average"))
    assert warnings(recipe("ties", places["base"], *measured, router="base")) == []
    entries = [{"model": str(places[one]), "layer_range": [0, 2], "parameters": {"weight": 1.0}} for one in "xy"]
    unlisted = {"merge_method": "linear", "base_model": str(places["base"]), "slices": [{"sources": entries}]}
    with pytest.raises(PaftMergeError, match="not among the sources of this slice"):
        warnings({**unlisted, "router": "base"})
    assert warnings({**unlisted, "router": "average"}) == []
    dense = family()
    for word, count in (("base", 1), ("average", 1), ("merge", 0)):
        found = warnings(recipe("ties", dense["base"], (dense["x"], {"weight": 1.0}), router=word))
        assert len(found) == count
        assert all(f"so {word} has no effect; remove it" in one for one in found)
