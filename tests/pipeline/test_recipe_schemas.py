"""The JSON Schema of recipes: it accepts what the parser accepts, refuses what it refuses, and describes every key."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from paft_merge.cli import cli
from paft_merge.errors import DOCS, PaftMergeError, RecipeError
from paft_merge.methods import METHODS, REQUIRED
from paft_merge.pipeline.recipe_schemas import KINDS, schema_of
from paft_merge.pipeline.schema import RunLanguage, read_run
from paft_merge.recipe import load_documents, load_recipe
from paft_merge.recipe.json_schema import definitions, merge_schema
from paft_merge.recipe.yaml_source import dump_yaml, load_yaml

ROOT = Path(__file__).parents[2]
SCHEMAS = {kind: Draft202012Validator(schema_of(kind)) for kind in (*KINDS, None)}

MERGE = """
merge_method: ties
base_model: b
models:
  - {model: x, parameters: {weight: 1, density: [0.2, 0.4]}}
  - model: {model: {path: y, revision: main}, lora: [l, m]}
    parameters: {weight: [{filter: mlp, value: [0.1, 0.5]}, {value: equal_norm}]}
parameters: {normalize: true, lambda: {value: 0.5}}
dtype: torch.bfloat16
chat_template: auto
tokenizer: {source: union, tokens: {"<|x|>": {source: {kind: model_token, model: x, token: y}}}}
"""
RUN = """
base_model: b
adapters:
  sft: {objective: sft, data: rows.jsonl, l1: {strength: 1.0e-4}}
  dpo: {objective: dpo, data: [{path: org/pairs, take: 10}, more.jsonl]}
  both: {objective: mixed, parts: [sft, dpo], ratio: 2}
  old: {path: folder}
  older: folder
audit:
merge: {merge_method: ties, models: [{model: sft, parameters: {weight: 1}}, {model: dpo, parameters: {weight: 1}}]}
evaluate: {metrics: {skill: {kind: exact_match, data: test.jsonl}}, tasks: arc}
compare: {arms: parallel, methods: [ties, {merge_method: linear, sweep: {weight: [0.5, 1.0]}}], polish: {share: 0.2}}
push: false
seeds: [0, 1]
tune: {metric: skill, space: {parameters.density: [0.2, 1.0]}}
"""


def is_parsed(data: dict[str, Any], folder: Path) -> bool:
    """Whether the parser accepts a merge recipe or a run recipe without a warning."""
    try:
        if "merge_method" in data:
            load_recipe(data, strict=True)
            return True
        file = folder / "recipe.yaml"
        file.write_text(dump_yaml(data), encoding="utf-8")
        return not read_run(file)[1].found
    except PaftMergeError:
        return False


def faults(data: object, kind: str | None = None) -> list[str]:
    return [f"{list(one.absolute_path)}: {one.message}" for one in SCHEMAS[kind].iter_errors(data)]


def texts() -> Iterator[tuple[str, str]]:
    """Every recipe in the tree as text: files, snippets of the documentation, strings of tests."""
    for file in (*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "quickstart").glob("*.yaml")):
        yield file.name, file.read_text()
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        yield from ((page.name, found) for found in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL))
    for room in ("recipe", "pipeline", "plan", "training"):
        for file in (ROOT / "tests" / room).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield file.name, node.value


def test_the_schema_of_all_recipes_is_a_schema() -> None:
    Draft202012Validator.check_schema(schema_of())


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_references_lead_to_definitions(kind: Any) -> None:
    schema = schema_of(kind)
    assert set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(schema))) == schema["$defs"].keys()


def test_every_key_has_a_description_and_a_default_or_is_required() -> None:
    run, defs = definitions(RunLanguage)
    merge, more = merge_schema(METHODS)
    for name, section in {"run": run, "merge": merge, **defs, **more}.items():
        assert "." in name or section["description"]
        for key, one in section.get("properties", {}).items():
            if name.endswith((".parameters", ".source")):
                assert "$ref" in one or "description" in one
                continue
            assert "default" in one or key in section["required"] or key == "data", (name, key)
            assert re.search(r"[.)]$", one["description"]), (name, key)


def test_descriptions_say_the_default_once() -> None:
    for kind in (*KINDS, None):
        text = json.dumps(schema_of(kind))
        assert not re.search(r"Default: [^ ]+ Default:", text)
        assert "in each tensor. Default: 1.0." in text  # density
    assert "Default" not in schema_of("merge")["properties"]["name"]["description"]


def test_links_of_descriptions_are_whole() -> None:
    found = re.findall(r"\]\((.*?)\)", json.dumps(schema_of()))
    assert len(found) > 5
    for link in found:
        if not link.startswith(DOCS.partition("/blob/")[0]):  # of TRL's help texts
            assert link.startswith("https://")
            continue
        _, _, page = link.partition("/blob/main/")
        assert (ROOT / page.partition("#")[0]).is_file(), link


def test_it_accepts_every_recipe_in_the_tree_that_the_parser_accepts(tmp_path: Path) -> None:
    accepted = 0
    for name, text in texts():
        if not re.search(r"^(merge_method|base_model):", text, re.MULTILINE) or "{line}" in text:  # a template
            continue
        try:
            documents = [one.data for one in load_documents(text)]
        except RecipeError:
            continue
        for data in documents:
            if isinstance(data, dict) and is_parsed(data, tmp_path):
                assert faults(data) == [], (name, text)
                accepted += 1
    assert accepted >= 15


@pytest.mark.parametrize("text", [MERGE, RUN])
def test_both_examples_are_right(text: str, tmp_path: Path) -> None:
    data = load_yaml(text).data
    assert is_parsed(data, tmp_path)
    assert faults(data) == faults(data, "merge" if text is MERGE else "run") == []


def put(data: Any, path: str, value: Any) -> Any:
    """Set a value in data; `None` as the value removes the key."""
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in steps:
        data = data[step]
    if value is None:
        del data[last]
    else:
        data[last] = value
    return data


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        (MERGE, "merge_method", "tise"),
        (MERGE, "merge_method", None),
        (MERGE, "base_model", None),
        (MERGE, "paramters", {}),
        (MERGE, "models", []),
        (MERGE, "models.0.paramters", {}),
        (MERGE, "models.0.model", ""),
        (MERGE, "models.0.model", {"lora": "x"}),
        (MERGE, "models.0.parameters.density", 1.5),
        (MERGE, "models.0.parameters.density", [0.2, 2]),
        (MERGE, "models.0.parameters.density", {"value": 2}),
        (MERGE, "models.0.parameters.density", {"valu": 1}),
        (MERGE, "models.0.parameters.weight", "equal"),
        (MERGE, "models.0.parameters.normalize", False),
        (MERGE, "parameters.gamma", 1),
        (MERGE, "parameters.normalize", "maybe"),
        (MERGE, "parameters.trim", {"density": 0.5, "l1_mass": 0.5}),
        (MERGE, "parameters.trim", {"top": 0.5}),
        (MERGE, "dtype", "bf16"),
        (MERGE, "chat_template", "chatml2"),
        (MERGE, "seed", -1),
        (MERGE, "output", "adapter"),
        (MERGE, "output", {"rank": 0}),
        (MERGE, "slices", [{"sources": [{"model": "x", "layer_range": [0, 2]}]}]),
        (MERGE, "tokenizer.tokens.<|x|>.source", {"kind": "model_token", "model": "x"}),
        (RUN, "base_model", None),
        (RUN, "mrege", {}),
        (RUN, "adapters.sft.objective", "sftt"),
        (RUN, "adapters.sft.data", None),
        (RUN, "adapters.sft.parts", ["a", "b"]),
        (RUN, "adapters.sft.lora", {"rank": 8}),
        (RUN, "adapters.sft.l1.strength", 0),
        (RUN, "adapters.both.data", "rows.jsonl"),
        (RUN, "adapters.both.parts", None),
        (RUN, "adapters.old.rev", "x"),
        (RUN, "audit", {"epsilon": 0}),
        (RUN, "evaluate.metrics.skill.kind", "exact"),
        (RUN, "compare.arms", "paralell"),
        (RUN, "compare.methods", ["ties", {"sweep": {"weight": [1]}}]),
        (RUN, "push", {"repo_id": "noslash"}),
        (RUN, "seeds", []),
        (RUN, "tune.trials", 0),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else None,
)
def test_it_refuses_what_the_parser_refuses(text: str, path: str, value: Any, tmp_path: Path) -> None:
    data = load_yaml(text).data
    put(data, path, value)
    assert faults(data)
    assert not is_parsed(data, tmp_path)


def test_the_merge_of_a_run_is_checked_by_its_method() -> None:
    data = load_yaml(RUN).data
    put(data, "merge.models.0.parameters.densty", 0.5)
    put(data, "compare.methods.0", "tise")
    assert len(faults(data, "run")) == 2


@pytest.mark.parametrize("name", METHODS)
def test_parameters_have_the_types_bounds_and_words_of_the_table(name: str) -> None:
    schema = schema_of("merge")
    defs = {"$defs": schema["$defs"]}
    for scope in ("source", "parameters"):
        check = Draft202012Validator({**defs, "$ref": f"#/$defs/{name}.{scope}"})
        for one in METHODS[name].parameters:
            if scope == "source" and one.scope == "shared":
                assert not check.is_valid({one.name: one.default})
                continue
            good = [*one.choices, *one.words, *([] if one.default in (REQUIRED, None) else [one.default])]
            bad: list[object] = [{"x": 1}, "?" if one.type is not str or one.choices else 3]
            for bound, beyond in ((one.low, -1), (one.high, 1)):
                if math.isfinite(bound):
                    good.append(bound)
                    bad.append(bound + beyond)
            for value in good:
                for form in (value, [value], {"value": value}, [{"value": [value], "filter": "mlp"}]):
                    assert check.is_valid({one.name: form}), (one.name, form)
            for value in bad:
                assert not check.is_valid({one.name: value}), (one.name, value)
                assert not check.is_valid({one.name: [{"value": value}]})
        assert not check.is_valid({"no_such": 1})


@pytest.mark.parametrize(
    ("objective", "training", "known"),
    [
        ("sft", {"learning_rate": 1e-4, "packing": True, "report_to": ["none"], "max_length": None}, True),
        ("ift", {"learning_rat": 1e-4}, False),
        ("sft", {"learning_rate": "high"}, False),
        ("sft", {"beta": 0.1}, False),  # of DPO
        ("dpo", {"beta": 0.1, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, True),
        ("dpo", {"num_generations": 8}, False),
        ("grpo", {"num_generations": 8, "beta": 0.0}, True),
        ("sft", {"output_dir": "x"}, False),  # may not be set
    ],
)
def test_training_has_the_fields_of_the_objectives_config(
    objective: str, training: dict[str, Any], known: bool
) -> None:
    adapter = {"objective": objective, "data": "rows.jsonl", "training": training}
    found = faults({"base_model": "b", "adapters": {"a": adapter}}, "train")
    assert (not found) is known, found


def test_fields_of_training_have_a_description_and_a_default() -> None:
    defs = schema_of("train")["$defs"]
    field = defs[defs["SFTConfig"]["properties"]["warmup_steps"]["$ref"].removeprefix("#/$defs/")]
    assert field["type"] == ["number"]
    assert field["default"] == 0
    assert field["description"].startswith("Number of steps for a linear warmup")
    assert field["description"].endswith(" Default: 0.")
    assert "warmup_steps" in defs["MixedSpec"]["properties"]["training"]["properties"]


def test_without_trl_training_is_any_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paft_merge.training.trl_configs.find_spec", lambda name: None)
    adapter = {"objective": "sft", "data": "x", "training": {"anything": 1}}
    assert Draft202012Validator(schema_of("train")).is_valid({"base_model": "b", "adapters": {"a": adapter}})


def test_a_former_key_is_marked() -> None:
    take = schema_of("run")["$defs"]["DataSpec"]["properties"]["take"]
    assert take["deprecated"] is True
    assert take["description"] == "Former name of `max_rows`."


def test_init_names_the_schema_that_it_writes_beside_the_recipe(tmp_path: Path) -> None:
    args = ["init", "--base", "org/base", "--data", "org/rows"]
    made = CliRunner().invoke(cli, [*args, str(tmp_path / "r.yaml")])
    assert made.stdout == f"{tmp_path / 'r.yaml'}\n"
    text = (tmp_path / "r.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=paft.schema.json\n# A PAFT run")
    written = json.loads((tmp_path / "paft.schema.json").read_text())
    assert written == schema_of()
    assert Draft202012Validator(written).is_valid(load_yaml(text).data)
    assert CliRunner().invoke(cli, [*args, str(tmp_path / "again.yaml")]).exit_code == 0


def test_init_leaves_a_file_of_that_name_alone(tmp_path: Path) -> None:
    (tmp_path / "paft.schema.json").write_text("mine")
    CliRunner().invoke(cli, ["init", "--base", "org/base", str(tmp_path / "r.yaml")])
    assert (tmp_path / "r.yaml").read_text().startswith("# A PAFT run")
    assert (tmp_path / "paft.schema.json").read_text() == "mine"


class TestCommand:
    def test_it_prints_or_writes_the_schema(self, tmp_path: Path) -> None:
        printed = CliRunner().invoke(cli, ["schema", "merge"])
        assert json.loads(printed.stdout) == schema_of("merge")
        written = CliRunner().invoke(cli, ["schema", "-o", str(tmp_path / "new" / "all.json")])
        assert written.stdout == f"{tmp_path / 'new' / 'all.json'}\n"
        assert json.loads((tmp_path / "new" / "all.json").read_text()) == schema_of()

    def test_methods_of_a_module_are_in_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        known = {"mine": METHODS["linear"]}
        assert schema_of("merge", known)["properties"]["merge_method"]["enum"] == ["mine"]
