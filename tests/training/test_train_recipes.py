"""The ready recipes: every one that trains is read, and every field of it is one that TRL, PEFT and we know."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from paft_merge.errors import PaftMergeError, TrainError
from paft_merge.recipe import load_yaml
from paft_merge.training import train
from paft_merge.training.arguments import lora_config, training_arguments
from paft_merge.training.schema import Objective, read_adapter, read_adapters

FILES = [p for p in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")) if "\nadapters:" in p.read_text()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_that_trains_is_known_to_the_last_field(path, tmp_path):
    for name, spec in read_adapters(yaml.safe_load(path.read_text())).items():
        arguments = training_arguments(spec, tmp_path / name, name)
        assert arguments.learning_rate == spec.training["learning_rate"]
        assert lora_config(spec).r == spec.lora.r


def test_the_zephyr_settings_are_there_for_both_bases_with_the_source_of_every_number():
    assert {path.stem for path in FILES} >= {"train-mistral-7b-zephyr", "train-llama-3-8b-zephyr"}
    for path in (path for path in FILES if "zephyr" in path.stem):
        lines = path.read_text().splitlines()
        body = lines[lines.index("adapters:") :]
        for line in body:
            value = line.split("#")[0].rstrip()
            if value and not value.endswith(":") and "objective:" not in value and any(c.isdigit() for c in value):
                assert "# [" in line, f"{path.name}: no source for {line.strip()}"
        recipe = yaml.safe_load(path.read_text())
        assert {"sft", "dpo", "orpo"} <= recipe["adapters"].keys()
        assert recipe["adapters"]["dpo"]["training"]["beta"] == 0.01


def test_the_documentation_has_an_example_of_every_objective_that_reads_without_an_error():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    examples = [load_yaml(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    found = {spec.objective for example in examples for spec in read_adapters(example).values()}
    assert found == set(get_args(Objective))


@pytest.mark.parametrize(
    ("training", "why"),
    [
        ({"learning_rate": "abc"}, "training.learning_rate: must be a number, got 'abc'"),
        ({"learning_rate": float("nan")}, "training.learning_rate: must be a number, got nan"),
        ({"max_length": "long"}, "training.max_length: must be a whole number, got 'long'"),
        ({"max_length": 1.5}, "training.max_length: must be a whole number"),
        ({"max_length": 0}, "training.max_length: must be at least 1, got 0"),
        ({"max_steps": -2}, "training.max_steps: must be at least -1, got -2"),
        ({"dataloader_num_workers": -1}, "training.dataloader_num_workers: must be at least 0, got -1"),
        ({"packing": "x"}, "training.packing: must be true or false, got 'x'"),
        ({"deepspeed": "none.json"}, "training: "),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_before_anything_is_loaded(training, why, tmp_path):
    spec = read_adapter({"objective": "sft", "data": "x", "training": training})
    with pytest.raises(TrainError, match=why):
        training_arguments(spec, tmp_path, "a")


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path):
    spec = read_adapter({"objective": "sft", "data": "x", "training": {"learning_rate": "2e-4", "max_length": 64.0}})
    arguments = training_arguments(spec, tmp_path, "a")
    assert (arguments.learning_rate, arguments.max_length) == (2e-4, 64)
    assert isinstance(arguments.max_length, int)


def test_what_peft_refuses_is_one_line():
    spec = read_adapter({"objective": "sft", "data": "x", "lora": {"extra": {"layers_to_transform": [0]}}})
    with pytest.raises(TrainError, match=r"lora: .layers_to_transform. cannot be used"):
        lora_config(spec.model_copy(update={"lora": spec.lora.model_copy(update={"target_modules": "all-linear"})}))


@pytest.mark.parametrize(
    ("base", "why"),
    [
        ("../bsae", r"recipe.yaml:2: adapters.sft: ../bsae: neither a local folder nor .*; did you mean 'base'\?"),
        ("nobody/nothing", r"adapters.sft: nobody/nothing: neither a local folder nor a repository in the Hub's cache"),
    ],
)
def test_a_base_that_is_not_there_is_named_before_training(base, why, tmp_path, monkeypatch):
    for name in ("base", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here/sft.jsonl").write_text('{"text": "a b"}\n')
    recipe = tmp_path / "here/recipe.yaml"
    recipe.write_text(f"base_model: {base}\nadapters: {{sft: {{objective: sft, data: sft.jsonl}}}}\n")
    with pytest.raises(PaftMergeError, match=why):
        train(recipe, tmp_path / "out")
