"""`paft explain`: for any tensor what is read, what is done with it, and which line set every number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import near, random_state, save_adapter, save_checkpoint
from toys.merge import paft

from paft_merge.engine.api import open_plan
from paft_merge.errors import RecipeError
from paft_merge.plan.explanation import alike, explain

RECIPE = """\
merge_method: ties
base_model: BASE
slices:
  - sources:
      - {model: BASE, layer_range: [0, 2]}
      - model: TUNED
        layer_range: [1, 3]
        parameters:
          weight: [0.2, 0.9]
          density:
            - {filter: mlp, value: 0.3}
            - {value: 0.5}
  - sources:
      - {model: BASE, layer_range: [1, 3]}
      - {model: BASE+LORA, layer_range: [0, 2], parameters: {weight: [{filter: layers.0., value: 0.6}, {value: 0.7}]}}
    parameters: {lambda: 0.8}
parameters: {density: 0.4}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """RECIPE as a file, with the models that it names."""
    state, config = random_state(0), {"num_hidden_layers": 3}
    base = save_checkpoint(tmp_path / "base", state, config=config)
    tuned = save_checkpoint(tmp_path / "tuned", near(state, 1), config=config)
    lora = save_adapter(tmp_path / "lora", state, 2)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("BASE", str(base)).replace("TUNED", str(tuned)).replace("LORA", str(lora)))
    return path


def test_every_value_has_the_line_that_set_it(recipe: Path, tmp_path: Path) -> None:
    with open_plan(recipe) as plan:
        (one,) = explain(plan, "model.layers.1.mlp.up_proj.weight")
    (source,) = one.sources
    assert (one.method, one.t, one.dtype, one.shape) == ("ties", 1.0, "float32", (48, 24))
    assert one.base is not None
    assert (one.base.model, one.base.tensor) == (str(tmp_path / "base"), "model.layers.1.mlp.up_proj.weight")
    assert (source.model, source.tensor) == (str(tmp_path / "tuned"), "model.layers.2.mlp.up_proj.weight")
    told = {name: (value.value, value.origin.spot.line) for name, value in source.parameters.items()}
    assert told == {"weight": (0.9, 9), "density": (0.3, 11)}
    assert one.shared["lambda"].origin.level == "default"


def test_levels_and_adapters_of_another_slice(recipe: Path) -> None:
    with open_plan(recipe) as plan:
        (one,) = explain(plan, "model.layers.3.mlp.up_proj.weight")
        (norm,) = explain(plan, "model.layers.3.input_layernorm.weight")
    (source,) = one.sources
    assert (source.tensor, source.delta) == ("model.layers.1.mlp.up_proj.weight", "lora")
    assert {n: (v.value, v.origin.level) for n, v in source.parameters.items()} == {
        "weight": (0.7, "source"), "density": (0.4, "recipe"),
    }  # fmt: skip
    assert (one.shared["lambda"].value, one.shared["lambda"].origin.spot.line) == (0.8, 16)
    assert (norm.method, norm.sources[0].tensor) == ("ties", "model.layers.1.input_layernorm.weight")


def test_a_copy_says_why(recipe: Path) -> None:
    with open_plan(recipe) as plan:
        (head,) = explain(plan, "lm_head.weight")
        assert (head.method, head.why) == ("copy", "every source has the base's own tensor")
        with pytest.raises(RecipeError, match=r"lm_haed\.weight: matches no tensor .*did you mean 'lm_head\.weight'"):
            explain(plan, "lm_haed.weight")


def test_layers_of_which_the_same_can_be_said_are_told_once(recipe: Path) -> None:
    with open_plan(recipe) as plan:
        groups = alike(explain(plan, "*up_proj*"))
    assert [[one.name.split(".")[2] for one in group] for group in groups] == [["0", "1"], ["2"], ["3"]]


def test_the_table_shows_values_lines_and_defaults(recipe: Path) -> None:
    shown = paft("explain", recipe, "--tensor", "*up_proj*")
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert "model.layers.0.mlp.up_proj.weight and 1 alike" in lines
    assert f"weight 0.2 to 0.9 {recipe}:9: slices[0].sources[1].parameters.weight" in lines
    assert f"lambda 0.8 {recipe}:16: slices[1].parameters.lambda" in lines
    assert any(line.startswith("default normalize weights, rescale none, elect weighted") for line in lines)
    after_legend = shown.stdout.partition("\n\n")[2]
    assert max(map(len, after_legend.splitlines())) <= 160


def test_models_have_short_names_with_a_legend(recipe: Path, tmp_path: Path) -> None:
    shown = paft("explain", recipe, "--tensor", "*up_proj*").stdout
    assert shown.count(f"{tmp_path}/base+{tmp_path}/lora") == 1
    lines = shown.splitlines()
    assert lines[:4] == [
        f"base   {tmp_path}/base", f"tuned  {tmp_path}/tuned", f"lora   {tmp_path}/base+{tmp_path}/lora", "",
    ]  # fmt: skip
    assert "  source  lora  model.layers.1.mlp.up_proj.weight  lora" in lines
    assert "  ties  float32  48 x 24  depth 0 to 1" in lines


def test_a_fault_of_a_model_has_the_line_that_names_it(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "lora/adapter_config.json").write_text("{")
    (tmp_path / "tuned/model.safetensors").write_bytes(b"short")
    shown = paft("explain", recipe)
    assert shown.exit_code == 1
    first, second = shown.stderr.splitlines()
    assert first.startswith(f"error[SHARD_TRUNCATED]: {recipe}:6: {tmp_path}/tuned/model.safetensors: ")
    assert second.startswith(f"error[ADAPTER_CONFIG]: {recipe}:15: {tmp_path}/lora/adapter_config.json: ")


def test_what_is_explained_is_what_is_planned(recipe: Path) -> None:
    with open_plan(recipe) as plan:
        for tensor, one in zip(plan.tensors, explain(plan), strict=True):
            if not one.why:
                shared = {name: value.value for name, value in one.shared.items()}
                sources = [{name: value.value for name, value in s.parameters.items()} for s in one.sources]
                assert tensor.parameters == {**shared, "sources": sources}, tensor.name


def test_json_has_every_tensor_by_itself(recipe: Path) -> None:
    found = json.loads(paft("explain", recipe, "--json").stdout)
    with open_plan(recipe) as plan:
        assert [one["name"] for one in found] == [t.name for t in plan.tensors]
    one = next(t for t in found if t["name"] == "model.layers.0.self_attn.q_proj.weight")
    where = f"{recipe}:12: slices[0].sources[1].parameters.density[1]"
    assert one["sources"][0]["parameters"]["density"] == {"value": 0.5, "set_by": "source", "where": where}
    assert one["parameters"]["normalize"] == {"value": "weights", "set_by": "default"}


def test_explaining_reads_headers_alone(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paft_merge.inputs.checkpoint import Checkpoint

    monkeypatch.setattr(Checkpoint, "read_into", lambda *_: pytest.fail("read weights"))
    assert paft("explain", recipe).exit_code == 0
