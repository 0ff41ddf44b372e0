"""Layers taken from here and there, and parts of a model merged each in its own way: `slices:` and `modules:`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_state, save_adapter, save_checkpoint
from toys.merge import Ref, bits_equal, manifest_of, on, recipe_for, tensors_of
from toys.mergekit import OURS, llama_family, mergekit_merge

from paft_merge import merge
from paft_merge.engine.api import open_plan
from paft_merge.errors import PaftMergeError
from paft_merge.methods import METHODS

LAYERS = 4


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A four-layer Llama and three fine-tunes of it."""
    return llama_family(tmp_path_factory.mktemp("llamas"), layers=LAYERS)


def source(ref: Ref, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    own = {"parameters": parameters} if parameters else {}
    return {"model": str(ref), "layer_range": [first, end], **own}


def sliced(method: str, *slices: list[dict[str, Any]] | dict[str, Any], **extra: Any) -> dict[str, Any]:
    """A recipe of `slices:`; a slice is a list of sources, or a mapping."""
    return {"merge_method": method, "slices": [s if isinstance(s, dict) else {"sources": s} for s in slices], **extra}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def refusals(recipe: dict[str, Any], **options: Any) -> str:
    with pytest.raises(PaftMergeError) as caught, open_plan(recipe, **options):
        pass
    return str(caught.value)


# --- the same as mergekit ---------------------------------------------------------------------------------------------


def frankenmerges(f: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Recipes of every kind that mergekit takes as they are."""
    base, x, y, z = (f[name] for name in ("base", "x", "y", "z"))
    return {
        "repeated and overlapping layers of several models": sliced(
            "passthrough", [source(base, 0, 3)], [source(x, 1, 4)], [source(x, 1, 2)], [source(y, 0, 4)]
        ),
        "fewer layers, in another order": sliced("passthrough", [source(x, 3, 4)], [source(x, 0, 1)]),
        "a scale on some tensors": sliced(
            "passthrough",
            [source(x, 0, 2, scale=[{"filter": "o_proj", "value": 0.0}, {"value": 1.0}])],
            [source(x, 1, 4, scale=[{"filter": "layers.2.", "value": 0.5}, {"value": 1.0}])],
        ),
        "gradients and filters restart in every slice": sliced(
            "linear",
            [source(base, 0, 2, weight=0.3), source(x, 2, 4, weight=[0.2, 0.9])],
            {
                "sources": [
                    source(y, 1, 4, weight=[{"filter": "layers.2", "value": 0.9}, {"value": [0.1, 0.6, 0.2]}]),
                    source(x, 0, 3, weight=0.4),
                ],
                "parameters": {"normalize": False},
            },
        ),
        "a base for each slice": sliced(
            "ties",
            [source(base, 0, 2), source(x, 2, 4, weight=[0.2, 0.9], density=0.3)],
            {
                "base_model": str(z),
                "sources": [source(y, 1, 4, weight=0.7), source(z, 0, 3)],
                "parameters": {"lambda": [0.5, 0.8]},
            },
            [source(base, 0, 1), source(y, 3, 4, weight=[0.1, 1.0])],
            base_model=str(base),
            parameters={"density": [{"filter": "mlp", "value": 0.5}, {"value": 0.8}]},
        ),
        "slerp with a shared filter on the output's names": sliced(
            "slerp",
            [source(base, 0, 2), source(x, 1, 3)],
            [source(base, 2, 4), source(y, 0, 2)],
            base_model=str(base),
            parameters={"t": [{"filter": "layers.3.", "value": 0.9}, {"filter": "self_attn", "value": [0, 1]}, {"value": 0.4}]},
        ),
        "the only module by its name": {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "modules": {"default": {"slices": [{"sources": [source(base, 1, 3), source(x, 2, 4, weight=0.5)]}]}},
        },
    }  # fmt: skip


KINDS = list(frankenmerges(dict.fromkeys(("base", "x", "y", "z"), Path())))


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_merged_as_mergekit_merges_them(kind: str, llamas: dict[str, Path], tmp_path: Path) -> None:
    recipe = {**frankenmerges(llamas)[kind], "dtype": "float32"}
    theirs = mergekit_merge(recipe, tmp_path / "theirs")
    ours = tensors_of(merge(recipe, tmp_path / "ours"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6, msg=name)
    counts = {config_of(tmp_path / who)["num_hidden_layers"] for who in ("theirs", "ours")}
    assert counts == {1 + max(int(n.split(".")[2]) for n in ours if ".layers." in n)}


RANDOM_OR_OURS = {*OURS, "dare_linear", "dare_ties", "della", "della_linear"}


@pytest.mark.parametrize("method", [name for name in METHODS if name not in RANDOM_OR_OURS])
def test_every_method_merges_slices_as_mergekit_does(method: str, llamas: dict[str, Path], tmp_path: Path) -> None:
    plain = recipe_for(method, *(llamas[name] for name in ("base", "x", "y", "z")), dtype="float32")
    base = [{"model": plain["base_model"]}] if "base_model" in plain else []
    slices = []
    for first in (0, 2, 1):
        starts = [(first + i) % 3 for i, _ in enumerate((*base, *plain["models"]))]
        spans = [[start, start + 2] for start in starts]
        slices.append(
            {"sources": [{**m, "layer_range": s} for m, s in zip([*base, *plain["models"]], spans, strict=True)]}
        )
    recipe = {**{k: v for k, v in plain.items() if k != "models"}, "slices": slices}
    theirs = mergekit_merge(recipe, tmp_path / "theirs")
    ours = tensors_of(merge(recipe, tmp_path / "ours"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same in bfloat16 and several files."""
    return llama_family(tmp_path_factory.mktemp("halves"), torch.bfloat16, shards=3, layers=LAYERS)


@pytest.mark.parametrize("kind", KINDS)
def test_with_mergekit_s_arithmetic_slices_have_its_bits(kind: str, halves: dict[str, Path], tmp_path: Path) -> None:
    recipe = frankenmerges(halves)[kind]
    theirs = mergekit_merge(recipe, tmp_path / "theirs")
    ours = tensors_of(merge({**recipe, "arithmetic": "mergekit"}, tmp_path / "ours"))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not bits_equal(ours[name], theirs[name])] == []


def test_the_head_and_the_last_norm_are_the_last_slice_s_and_the_embedding_is_the_first_s(
    llamas: dict[str, Path], tmp_path: Path
) -> None:
    made = tensors_of(
        merge(sliced("passthrough", [source(llamas["x"], 0, 2)], [source(llamas["y"], 2, 4)]), tmp_path / "out")
    )
    x, y = tensors_of(llamas["x"]), tensors_of(llamas["y"])
    assert bits_equal(made["model.embed_tokens.weight"], x["model.embed_tokens.weight"])
    assert bits_equal(made["model.norm.weight"], y["model.norm.weight"])
    assert bits_equal(made["lm_head.weight"], y["lm_head.weight"])


# --- what is ours -----------------------------------------------------------------------------------------------------


def test_a_stack_of_copies_has_their_very_bytes_and_loads(llamas: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    recipe = sliced(
        "passthrough", [source(llamas["x"], 0, 4)], [source(llamas["x"], 2, 4)], [source(llamas["x"], 0, 1)]
    )
    out = merge(recipe, tmp_path / "out").path
    made, x = tensors_of(out), tensors_of(llamas["x"])
    for at, layer in enumerate([0, 1, 2, 3, 2, 3, 0]):
        for name in (n for n in x if f".{layer}." in n):
            assert bits_equal(made[name.replace(f".{layer}.", f".{at}.", 1)], x[name])
    assert {entry["method"] for entry in manifest_of(out)["tensors"].values()} == {"copy"}
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert len(model.model.layers) == 7
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


def test_a_repeated_layer_draws_its_own_mask(llamas: dict[str, Path], tmp_path: Path) -> None:
    pair = [source(llamas["base"], 1, 2), source(llamas["x"], 1, 2, weight=1.0, density=0.5)]
    recipe = sliced("dare_linear", pair, pair, base_model=str(llamas["base"]), parameters={"rescale": False})
    made, base = tensors_of(merge(recipe, tmp_path / "out")), tensors_of(llamas["base"])
    name = "model.layers.{}.mlp.up_proj.weight"
    first, second = ((made[name.format(i)] != base[name.format(1)]) for i in (0, 1))
    assert 0.3 < first.float().mean() < 0.7
    assert 0.3 < (first ^ second).float().mean() < 0.7


def test_one_slice_of_all_layers_is_the_same_merge_as_models(llamas: dict[str, Path], tmp_path: Path) -> None:
    given = {"weight": [0.2, 0.8], "density": 0.5}
    common = {"base_model": str(llamas["base"])}
    models = [{"model": str(llamas["base"])}, {"model": str(llamas["x"]), "parameters": given}]
    whole = merge({"merge_method": "dare_ties", "models": models, **common}, tmp_path / "whole")
    slices = sliced("dare_ties", [source(llamas["base"], 0, 4), source(llamas["x"], 0, 4, **given)], **common)
    one, other = tensors_of(whole), tensors_of(merge(slices, tmp_path / "slices"))
    assert all(bits_equal(one[name], other[name]) for name in one)


def test_adapters_are_read_from_the_layer_that_a_slice_names(tmp_path: Path) -> None:
    state = random_state(0)
    config = {"num_hidden_layers": 3}
    base = save_checkpoint(tmp_path / "base", state, config=config)
    adapter = save_adapter(tmp_path / "lora", state, 3)
    recipe = sliced(
        "task_arithmetic", [source(base, 2, 3), source(on(base, adapter), 0, 1, weight=1.0)],
        [source(base, 0, 1), source(on(base, adapter), 0, 1, weight=0.5)], base_model=str(base),
    )  # fmt: skip
    whole = tensors_of(merge(sliced("passthrough", [source(on(base, adapter), 0, 3)]), tmp_path / "whole"))
    made = tensors_of(merge(recipe, tmp_path / "out"))
    name = "model.layers.{}.mlp.up_proj.weight"
    other = state[name.format(2)] + (whole[name.format(0)] - state[name.format(2)])
    torch.testing.assert_close(made[name.format(0)], other, rtol=0, atol=1e-6)
    half = state[name.format(0)] + 0.5 * (whole[name.format(0)] - state[name.format(0)])
    torch.testing.assert_close(made[name.format(1)], half, rtol=0, atol=1e-6)


def test_adapters_in_slices_are_merged_as_mergekit_merges_them(llamas: dict[str, Path], tmp_path: Path) -> None:
    base = llamas["base"]
    targets = {n: t for n, t in tensors_of(base).items() if "q_proj" in n or "up_proj" in n}
    one, two = (on(base, save_adapter(tmp_path / f"lora{i}", targets, i)) for i in (3, 4))
    recipe = sliced(
        "ties",
        [source(base, 0, 2), source(one, 2, 4, weight=[0.3, 0.9], density=0.5), source(two, 0, 2, weight=0.4)],
        [source(base, 3, 4), source(one, 0, 1, weight=1.0), source(two, 1, 2, weight=0.5)],
        base_model=str(base), dtype="float32",
    )  # fmt: skip
    theirs = mergekit_merge(recipe, tmp_path / "theirs", lora_merge_cache=str(tmp_path / "cache"))
    ours = tensors_of(merge(recipe, tmp_path / "ours"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"n_layer": 3}, {"n_layer": 4}),
        ({"num_hidden_layers": 3, "num_layers": 3}, {"num_hidden_layers": 4, "num_layers": 4}),
        (
            {"num_hidden_layers": 3, "layer_types": ["full", "slide", "slide"]},
            {"num_hidden_layers": 4, "layer_types": ["full", "slide", "slide", "slide"]},
        ),
        ({"num_hidden_layers": 3, "no_rope_layers": [1, 1, 0]}, {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
        ({"num_hidden_layers": 3, "mlp_only_layers": [1]}, {"num_hidden_layers": 4, "mlp_only_layers": [1, 2]}),
        ({"num_hidden_layers": 3, "hybrid_override_pattern": "M*-"}, {"num_hidden_layers": 4, "hybrid_override_pattern": "M**-"}),
        (
            {"text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "hidden_size": 24}},
            {"text_config": {"num_hidden_layers": 4, "layer_types": ["a", "b", "b", "c"], "hidden_size": 24}},
        ),
        ({"text_config": {"hidden_size": 24}}, {"text_config": {"hidden_size": 24, "num_hidden_layers": 4}}),
        ({"hidden_size": 24}, {"hidden_size": 24, "num_hidden_layers": 4}),
        ({"num_hidden_layers": 3, "eos_token_id": [1, 2, 5]}, {"num_hidden_layers": 4, "eos_token_id": [1, 2, 5]}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_the_config_follows_the_layers(config: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "m", random_state(0), config=config)
    out = merge(sliced("passthrough", [source(model, 0, 2)], [source(model, 1, 3)]), tmp_path / "out")
    assert config_of(out) == {**config_of(model), **expected}


def test_a_rule_that_places_kinds_of_layers_is_refused_where_the_order_breaks_it(tmp_path: Path) -> None:
    model = save_checkpoint(
        tmp_path / "m", random_state(0), config={"num_hidden_layers": 3, "sliding_window_pattern": 3}
    )
    broken = sliced("passthrough", [source(model, 0, 2)], [source(model, 1, 3)])
    assert "sliding_window_pattern: 3 sets a layer's kind by its number, and layer 1 becomes layer 2" in refusals(
        broken
    )
    with open_plan(broken, allow_crimes=True) as plan:
        assert [w.code for w in plan.warnings] == ["LAYER_KINDS"]
    with open_plan(sliced("passthrough", [source(model, 0, 3)], [source(model, 0, 3)])) as plan:
        assert not plan.warnings


# --- what is refused --------------------------------------------------------------------------------------------------


def test_ranges_that_hold_no_layer_say_what_was_probably_meant(llamas: dict[str, Path]) -> None:
    text = refusals(sliced("passthrough", [source(llamas["x"], 0, -1)]))
    assert "[0, -1] contains no layer, because a negative end does not count from the end; did you mean [0, N]" in text
    assert "[3, 1] contains no layer" in refusals(sliced("passthrough", [source(llamas["x"], 3, 1)]))


def test_a_layer_beyond_the_model_is_told_with_both_numbers(llamas: dict[str, Path]) -> None:
    text = refusals(sliced("passthrough", [source(llamas["x"], 0, 2)], [source(llamas["x"], 2, 6)]))
    assert re.search(
        r"slices\[1\]\.sources\[0\]\.layer_range: \[2, 6\] goes to layer 5, and \S+ has 4, 0 to 3; .*\[2, 4\]", text
    )


def test_sources_that_do_not_fit_together_are_refused(llamas: dict[str, Path]) -> None:
    base, x, y = (str(llamas[n]) for n in ("base", "x", "y"))
    assert "the layer_range of each source has another length: 2, 3" in refusals(
        sliced("linear", [source(x, 0, 2), source(y, 0, 3)], parameters={"weight": 1})
    )
    assert "is not among the sources of this slice, and ties needs it there" in refusals(
        sliced("ties", [source(x, 0, 2, weight=1)], base_model=base)
    )
    assert "is already listed" in refusals(
        sliced("linear", [source(x, 0, 2), source(x, 2, 4)], parameters={"weight": 1})
    )
    uneven = refusals(sliced("linear", [source(x, 0, 1)], [source(x, 1, 2), source(y, 1, 2)], parameters={"weight": 1}))
    assert "mergekit would make the last norm and the head of" in uneven


def test_several_stacks_need_to_be_told_apart(tmp_path: Path) -> None:
    model = two_towers(tmp_path / "m")
    text = refusals(sliced("passthrough", [source(model, 0, 1)]))
    assert "has several stacks of layers" in text
    assert "write modules: with slices for one of" in text


def test_layers_of_models_of_another_width_are_not_stacked(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 3}
    narrow = save_checkpoint(tmp_path / "narrow", random_state(0), config=config)
    wide = save_checkpoint(tmp_path / "wide", random_state(0, width=32), config=config)
    text = refusals(sliced("passthrough", [source(narrow, 0, 2)], [source(wide, 1, 3)]))
    assert "wide: model.layers.1.mlp.up_proj.weight: is [64, 32], and in" in text
    assert "wide: lm_head.weight: is [40, 32]" in text
    assert "is [64, 32], and" in refusals(
        sliced("linear", [source(narrow, 0, 1, weight=1), source(wide, 0, 1, weight=1)])
    )


def test_a_model_of_another_depth_can_lend_layers(tmp_path: Path) -> None:
    shallow = save_checkpoint(tmp_path / "a", random_state(0), config={"num_hidden_layers": 3})
    deep = save_checkpoint(tmp_path / "b", random_state(1, layers=5), config={"num_hidden_layers": 5})
    recipe = sliced("linear", [source(shallow, 0, 3, weight=0.5), source(deep, 2, 5, weight=0.5)])
    made, a, b = (tensors_of(f) for f in (merge(recipe, tmp_path / "out"), shallow, deep))
    name = "model.layers.{}.mlp.up_proj.weight"
    torch.testing.assert_close(made[name.format(2)], (a[name.format(2)] + b[name.format(4)]) / 2)


def test_a_config_that_counts_otherwise_is_refused(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "m", random_state(0), config={"num_hidden_layers": 2})
    text = refusals(sliced("passthrough", [source(model, 0, 2)]))
    assert "numbers its tensors by model.layers (3), and its config states num_hidden_layers: 2" in text


def test_layers_of_different_kinds_are_not_paired(tmp_path: Path) -> None:
    state = random_state(0)
    odd = {n: t for n, t in state.items() if n != "model.layers.1.mlp.up_proj.weight"}
    config = {"num_hidden_layers": 3}
    a, b = save_checkpoint(tmp_path / "a", state, config=config), save_checkpoint(tmp_path / "b", odd, config=config)
    text = refusals(sliced("linear", [source(a, 0, 2), source(b, 1, 3)], parameters={"weight": 1}))
    assert "layer 1: lacks 'mlp.up_proj.weight', which layer 0 of" in text
    kinds = {"num_hidden_layers": 3, "layer_types": ["full", "slide", "full"]}
    c = save_checkpoint(tmp_path / "c", state, config=kinds)
    recipe = sliced("linear", [source(c, 0, 1, weight=1), source(a, 0, 1, weight=1)])
    with open_plan(recipe):
        pass
    d = save_checkpoint(tmp_path / "d", state, config=kinds)
    recipe = sliced("linear", [source(c, 0, 2, weight=1), source(d, 1, 3, weight=1)])
    assert "the sources' layers are of different kinds: full, slide against slide, full" in refusals(recipe)
    with open_plan(recipe, allow_crimes=True):
        pass


def test_a_tied_head_of_the_first_slice_is_told(tmp_path: Path) -> None:
    state = {n: t for n, t in random_state(0).items() if n != "lm_head.weight"}
    config = {"num_hidden_layers": 3, "tie_word_embeddings": True}
    a, b = (save_checkpoint(tmp_path / n, state, config=config) for n in "ab")
    with open_plan(sliced("passthrough", [source(a, 0, 2)], [source(b, 1, 3)])) as plan:
        assert [w.code for w in plan.warnings] == ["TIED_HEAD"]


# --- modules ----------------------------------------------------------------------------------------------------------


def two_towers(folder: Path, seed: int = 0) -> Path:
    """A vision-language model's names: two stacks, a projector, a head."""
    made = torch.Generator().manual_seed(seed)
    names = [
        "multi_modal_projector.linear_1.weight",
        "language_model.lm_head.weight",
        "language_model.model.norm.weight",
    ]
    names += ["language_model.model.embed_tokens.weight", "vision_tower.embeddings.patch_embedding.weight"]
    names += [f"language_model.model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    names += [f"vision_tower.encoder.layers.{i}.mlp.fc1.weight" for i in range(2)]
    config = {
        "model_type": "llava", "text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 2},
    }  # fmt: skip
    return save_checkpoint(folder, {name: torch.randn(6, 6, generator=made) for name in names}, config=config)


def test_each_module_is_merged_in_its_own_way(tmp_path: Path) -> None:
    a, b = two_towers(tmp_path / "a", 1), two_towers(tmp_path / "b", 2)
    pair = [{"model": str(a), "parameters": {"weight": 0.25}}, {"model": str(b), "parameters": {"weight": 0.75}}]
    recipe = {
        "merge_method": "linear",
        "modules": {
            "text_decoder": {"slices": [{"sources": [source(a, 0, 2)]}, {"sources": [source(b, 1, 3)]}], "parameters": {"weight": 1}},
            "vision_tower": {"models": pair},
            "multi_modal_projector": {"models": pair, "parameters": {"normalize": False}},
        },
    }  # fmt: skip
    out = merge(recipe, tmp_path / "out")
    made, one, two = tensors_of(out), tensors_of(a), tensors_of(b)
    for at, (state, layer) in enumerate([(one, 0), (one, 1), (two, 1), (two, 2)]):
        name = "language_model.model.layers.{}.mlp.up_proj.weight"
        assert bits_equal(made[name.format(at)], state[name.format(layer)])
    for name in (n for n in one if n.startswith(("vision", "multi"))):
        torch.testing.assert_close(made[name], 0.25 * one[name] + 0.75 * two[name])
    assert len(made) == len(one) + 1
    config = config_of(out)
    assert (config["text_config"], config["vision_config"]) == ({"num_hidden_layers": 4}, {"num_hidden_layers": 2})


def test_a_module_that_is_not_listed_is_not_written_and_that_is_told(tmp_path: Path) -> None:
    a = two_towers(tmp_path / "a")
    recipe = {"merge_method": "passthrough", "modules": {"text_decoder": {"models": [{"model": str(a)}]}}}
    with open_plan(recipe) as plan:
        assert {t.name.split(".")[0] for t in plan.tensors} == {"language_model"}
        (warning,) = plan.warnings
    assert warning.code == "MODULE_OMITTED"
    assert warning.what.startswith("4 tensors belong to no module listed here")


def test_an_unknown_module_is_told_with_those_that_are_there(tmp_path: Path) -> None:
    a = two_towers(tmp_path / "a")
    text = refusals({"merge_method": "passthrough", "modules": {"text_decodr": {"models": [{"model": str(a)}]}}})
    assert "has no tensors of a module text_decodr" in text
    assert "it has multi_modal_projector, text_decoder, vision_tower; or name a prefix of its tensors" in text


def test_a_prefix_is_a_module_and_default_is_the_rest(tmp_path: Path) -> None:
    a, b = two_towers(tmp_path / "a", 1), two_towers(tmp_path / "b", 2)
    recipe = {
        "merge_method": "passthrough",
        "modules": {
            "vision_tower.encoder": {"models": [{"model": str(b)}]},
            "default": {"models": [{"model": str(a)}]},
        },
    }  # fmt: skip
    made, one, two = (tensors_of(f) for f in (merge(recipe, tmp_path / "out"), a, b))
    assert made.keys() == one.keys()
    for name in made:
        assert bits_equal(made[name], (two if name.startswith("vision_tower.encoder.") else one)[name])


def test_the_modules_of_t5_are_merged_as_mergekit_merges_them(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    fields = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        T5ForConditionalGeneration(T5Config(feed_forward_proj="gated-gelu", **fields)).save_pretrained(tmp_path / name)
    a, b = tmp_path / "a", tmp_path / "b"
    pair = [{"model": str(a), "parameters": {"weight": [0.3, 0.9]}}, {"model": str(b), "parameters": {"weight": 0.7}}]
    stack = [
        {"sources": [source(a, 0, 2, weight=1), source(b, 0, 2, weight=[0.1, 0.5])]},
        {"sources": [source(b, 1, 2, weight=1), source(a, 0, 1, weight=1)]},
    ]
    modules = {
        "encoder": {"slices": stack},
        "decoder": {"models": pair, "parameters": {"normalize": False}},
        "shared": {"models": pair},
    }
    recipe = {"merge_method": "linear", "dtype": "float32", "modules": modules}
    theirs = mergekit_merge(recipe, tmp_path / "theirs")
    ours = tensors_of(merge(recipe, tmp_path / "ours"))
    # mergekit gives block 2 position biases of its own, which T5 has in the first block alone.
    assert theirs.keys() - ours.keys() == {"encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight"}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=name)
    config = config_of(tmp_path / "ours")
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 2)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_t5_that_says_one_number_for_both_sides_says_two(side: str, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    fields = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **fields)).save_pretrained(tmp_path / "a")
    config = {k: v for k, v in config_of(tmp_path / "a").items() if k != "num_decoder_layers"}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    stack = {"slices": [{"sources": [source(tmp_path / "a", 0, 2)]}, {"sources": [source(tmp_path / "a", 1, 2)]}]}
    others = {n: {"models": [{"model": str(tmp_path / "a")}]} for n in ("encoder", "decoder", "shared") if n != side}
    out = merge({"merge_method": "passthrough", "modules": {side: stack, **others}}, tmp_path / "out")
    _, loading = T5ForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    found = config_of(out)
    assert (found["num_layers"], found["num_decoder_layers"]) == ((3, 2) if side == "encoder" else (2, 3))


def test_the_parts_of_a_model_are_those_that_mergekit_knows() -> None:
    """Every architecture that mergekit describes: embeddings before the layers, norms and heads after, modules by name."""
    from mergekit.architecture.json_definitions import JSON_ARCHITECTURES

    from paft_merge.plan.layer_stacks import is_before_layers, parts

    checked = 0
    for architecture in JSON_ARCHITECTURES:
        modules: dict[str, list[str]] = {}
        for module, definition in architecture.modules.items():
            known = definition.architecture.definition
            prefix = definition.weight_prefix or ""
            if prefix and not prefix.endswith("."):
                prefix += "."  # Whisper's decoder, where mergekit forgot it
            layers = [prefix + w.name.replace("${layer_index}", "0") for w in known.layer_templates.weights]
            before, after = ([prefix + w.name for w in ws] for ws in (known.pre_weights, known.post_weights))
            modules[module] = [*before, *layers, *after]
            if layers and not any("${" in name or "layers.0.wte" in name for name in [*before, *after]):
                wrong = [n for n in before if not is_before_layers(n) and "merger" not in n]
                assert wrong + [n for n in after if is_before_layers(n)] == [], architecture.architectures
                checked += 1
        if len(modules) > 1:
            names = [name for held in modules.values() for name in held]
            found = parts(names, list(modules))
            for module, held in modules.items():
                assert {found[name] for name in held} == {module}, (architecture.architectures, module)
    assert checked > 40


# --- large layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["models", "slices"])
def test_planning_grows_with_the_number_of_tensors_and_no_faster(form: str, tmp_path: Path) -> None:
    """Eight times the tensors, well under sixteen times the work: anything quadratic would take sixty-four."""
    import cProfile
    import pstats

    from bench_plan import hollow, recipe

    calls, planned = [], []
    for tensors in (600, 600, 4_800):  # the first warms up what is imported and made once
        base, tuned = (hollow(tmp_path / f"{n}{tensors}{len(calls)}", tensors) for n in ("base", "tuned"))
        with cProfile.Profile() as profile, open_plan(recipe(base, tuned, sliced=form == "slices")) as plan:
            planned.append(len(plan.tensors))
        calls.append(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]
    assert calls[2] / calls[1] < 1.5 * planned[2] / planned[1]
