"""The space of a search: groups of modules and gradients become conditions, and a fault is refused with its fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from toys import adapters as toys
from toys import train as train_toys
from toys.quantized import CONFIG, coded

from paft_merge.engine.api import open_plan
from paft_merge.errors import Problems, RecipeError
from paft_merge.pipeline.named_models import resolved_merge
from paft_merge.pipeline.schema import load_run
from paft_merge.pipeline.search_space import SearchSpace
from paft_merge.recipe.yaml_source import dump_yaml

WEIGHT = "models[0].parameters.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for name in ("base", "x", "y"):
        train_toys.saved(folder / name, toys.llama(num_hidden_layers=3))
    (folder / "text.txt").write_text("w1 w2 w3")
    return folder


def space_of(world: Path, space: dict[str, Any], weight: Any = 0.5) -> SearchSpace:
    """A search space, of a merge that gives the first model this weight."""
    first = {"model": "x", **({} if weight is None else {"parameters": {"weight": weight}})}
    models = [first, {"model": "y", "parameters": {"weight": 0.5}}]
    recipe = {
        "base_model": "base",
        "merge": {"merge_method": "ties", "models": models},
        "evaluate": {"metrics": {"text": {"kind": "perplexity", "data": "text.txt"}}},
        "tune": {"metric": "text", "space": space},
    }
    (world / "recipe.yaml").write_text(dump_yaml(recipe))
    problems = Problems()
    made = SearchSpace.of(load_run(world / "recipe.yaml"), problems)
    problems.raise_as(RecipeError)
    return made


def weights_of(space: SearchSpace, chosen: dict[str, Any]) -> dict[str, float]:
    """The weight of the first model, by tensor, that a merge with chosen values has."""
    with open_plan(resolved_merge(space.merge_with(chosen), {}, space.recipe)) as plan:
        return {one.name: one.parameters["sources"][0]["weight"] for one in plan.tensors}


def test_a_value_for_each_kind_of_module_reaches_its_tensors(world: Path) -> None:
    space = space_of(world, {WEIGHT: {"attention": [0.2, 1.5], "mlp": [0.2, 1.5]}})
    assert list(space.distributions()) == [f"{WEIGHT}.attention", f"{WEIGHT}.mlp"]
    assert space.as_it_is() == {f"{WEIGHT}.attention": 0.5, f"{WEIGHT}.mlp": 0.5}
    found = weights_of(space, {f"{WEIGHT}.attention": 0.3, f"{WEIGHT}.mlp": 1.1})
    for name, weight in found.items():
        assert weight == (0.3 if ".self_attn." in name else 1.1 if ".mlp." in name else 0.5), name
    written = space.merge_with({f"{WEIGHT}.attention": 0.3, f"{WEIGHT}.mlp": 1.1})["models"][0]["parameters"]["weight"]
    assert written == [{"filter": "self_attn", "value": 0.3}, {"filter": "mlp", "value": 1.1}, {"value": 0.5}]


def test_a_part_of_a_name_and_the_rest_are_groups(world: Path) -> None:
    space = space_of(world, {WEIGHT: {"q_proj": [0.0, 1.0], "rest": [0.1, 0.2], "embeddings": [0.0, 2.0]}}, None)
    found = weights_of(space, {f"{WEIGHT}.q_proj": 0.3, f"{WEIGHT}.rest": 0.15, f"{WEIGHT}.embeddings": 2.0})
    for name, weight in found.items():
        at = 0.3 if "q_proj" in name else 2.0 if "embed" in name or "lm_head" in name else 0.15
        assert weight == at, name
    assert set(space.as_it_is().values()) == {None}


def test_a_part_of_a_name_is_not_hidden_by_a_kind_that_includes_it(world: Path) -> None:
    space = space_of(world, {WEIGHT: {"attention": [0.0, 1.0], "q_proj": [0.0, 1.0]}})
    found = weights_of(space, {f"{WEIGHT}.attention": 0.3, f"{WEIGHT}.q_proj": 0.8})
    assert found["model.layers.0.self_attn.q_proj.weight"] == 0.8
    assert found["model.layers.0.self_attn.k_proj.weight"] == 0.3


def test_layers_are_the_values_of_a_gradient(world: Path) -> None:
    space = space_of(
        world, {WEIGHT: {"range": [0.0, 1.0], "layers": 2}, "parameters.density": {"range": [0.1, 1.0], "layers": 3}}
    )
    names = [f"{WEIGHT}[0]", f"{WEIGHT}[1]", *(f"parameters.density[{i}]" for i in range(3))]
    assert list(space.distributions()) == names
    found = weights_of(space, dict(zip(names, (0.2, 0.6, 0.3, 0.5, 1.0), strict=True)))
    for name, weight in found.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        assert weight == pytest.approx([0.2, 0.4, 0.6][layer]), name
    grouped = space_of(world, {WEIGHT: {"mlp": {"range": [0.0, 1.0], "layers": 2}, "attention": [0.0, 1.0]}})
    chosen = dict(zip(grouped.distributions(), (0.0, 1.0, 0.25), strict=True))
    assert weights_of(grouped, chosen)["model.layers.1.mlp.up_proj.weight"] == 0.5
    assert space_of(world, {WEIGHT: {"range": [0.0, 1.0], "layers": 2}}, [0.3, 0.4]).as_it_is() == {
        f"{WEIGHT}[0]": 0.3, f"{WEIGHT}[1]": 0.4,
    }  # fmt: skip


def test_conditions_of_the_recipe_hold_for_the_other_tensors(world: Path) -> None:
    own = [{"filter": "mlp", "value": 0.9}, {"value": 0.1}]
    space = space_of(world, {WEIGHT: {"attention": [0.2, 1.5]}}, own)
    found = weights_of(space, {f"{WEIGHT}.attention": 0.3})
    for name, weight in found.items():
        assert weight == (0.3 if ".self_attn." in name else 0.9 if ".mlp." in name else 0.1), name


def test_a_quantised_base_has_the_names_of_its_weights(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "world")
    base = tmp_path / "world" / "base"
    stored, _ = coded(load_file(base / "model.safetensors"))
    save_file(stored, base / "model.safetensors")
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**fields, "quantization_config": CONFIG}))
    assert any("scale_inv" in name for name in stored)
    with pytest.raises(RecipeError, match="no tensor of the base belongs to 'scale_inv'"):
        space_of(tmp_path / "world", {WEIGHT: {"scale_inv": [0.0, 1.0]}})
    assert space_of(tmp_path / "world", {WEIGHT: {"up_proj.weight": [0.0, 1.0]}}).dimensions


@pytest.mark.parametrize(
    ("space", "weight", "expected"),
    [
        ({WEIGHT: {"atention": [0, 1]}}, 0.5, "no tensor of the base belongs to 'atention'; did you mean 'attention'?"),
        ({WEIGHT: {"attention": [1, 0]}}, 0.5, "1 is not below 0"),
        ({WEIGHT: {"attention": []}}, 0.5, "has nothing to choose from"),
        ({WEIGHT: {"attention": 0.5}}, 0.5, "must be a range or a list of choices, got 0.5"),
        ({WEIGHT: 0.5}, 0.5, "must be a range or a list of choices, got 0.5"),
        ({WEIGHT: {"range": [0, 1]}}, 0.5, "layers is the number of values of a gradient, got nothing"),
        ({WEIGHT: {"range": [0, 1], "layers": 1}}, 0.5, "layers is the number of values of a gradient, got 1"),
        ({WEIGHT: {"range": [0, 1], "layer": 3}}, 0.5, "unknown key 'layer'; did you mean 'layers'?"),
        ({WEIGHT: {"layers": 3}}, 0.5, "must be a range or a list of choices, got nothing"),
        ({WEIGHT: {"attention": [0, 1]}}, None, "has no value for the other tensors; add rest: [low, high]"),
        ({WEIGHT: {}}, 0.5, "has nothing to choose from"),
        ({"parameters.density": {"mlp": [0.5, 3.0]}}, 0.5, "density"),
        ({"parameters.densty": {"mlp": [0.5, 0.7]}}, 0.5, "unknown parameter densty; did you mean 'density'?"),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_is_refused_with_its_place(
    space: dict[str, Any], weight: Any, expected: str, world: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        space_of(world, space, weight)
    assert expected in str(caught.value)
    assert "tune.space" in str(caught.value)
