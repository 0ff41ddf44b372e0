"""No two scores have one name, and no name of a metric leads out of the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from toys.run import write_rows

from paft_merge.cli import cli
from paft_merge.cli.evaluating import _named
from paft_merge.errors import EvaluateError, RecipeError
from paft_merge.evaluating import harness, read_evaluate
from paft_merge.evaluating.schema import EvaluateSpec
from paft_merge.pipeline.schema import load_run
from paft_merge.recipe.yaml_source import Located


def kind(name: str, data: str, **more: str) -> dict[str, str]:
    return {"kind": name, "data": data, **more}


def test_files_with_one_stem_have_names_of_their_own() -> None:
    asked = [
        ("test", kind("exact_match", "a/test.jsonl")),
        ("test", kind("exact_match", "b/test.jsonl")),
        ("other", kind("exact_match", "b/other.jsonl")),
        ("test", kind("preference", "a/test.jsonl")),
        ("f", kind("reward", "a/test.jsonl", function="rewards.py:f")),
        ("f", kind("reward", "b/test.jsonl", function="rewards.py:f")),
        ("perplexity", kind("perplexity", "t.txt")),
    ]
    names = [
        "exact_match on a/test.jsonl", "exact_match on b/test.jsonl", "other", "preference on a/test.jsonl",
        "rewards.py:f on a/test.jsonl", "rewards.py:f on b/test.jsonl", "perplexity",
    ]  # fmt: skip
    assert _named(asked) == dict(zip(names, (metric for _, metric in asked), strict=True))


def test_one_metric_that_is_asked_twice_is_refused() -> None:
    with pytest.raises(click.UsageError, match=r"exact_match on a\.jsonl is asked twice"):
        _named([("a", kind("exact_match", "a.jsonl"))] * 2)


def test_a_metric_of_the_recipe_and_an_option_do_not_share_a_name(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    recipe = "base_model: x\nevaluate: {metrics: {exact_match: {kind: exact_match, data: rows.jsonl}}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    args = ["evaluate", "m", "--recipe", f"{tmp_path / 'recipe.yaml'}", "--exact-match", f"{tmp_path / 'rows.jsonl'}"]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 2
    assert "exact_match: a metric of" in done.stderr


@pytest.mark.parametrize("name", ["lm-eval", "sparsity"])
def test_names_of_other_columns_are_reserved(name: str) -> None:
    with pytest.raises(RecipeError, match=f"'{name}' is the name of"):
        read_evaluate(Located({"metrics": {name: kind("perplexity", "t.txt")}}))


def with_metric(folder: Path, name: str) -> Path:
    """The recipe of a run with one metric."""
    recipe = {"base_model": "x", "evaluate": {"metrics": {name: kind("perplexity", "t.txt")}}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "a\\b", "", ".", ".x", "x" * 101, "a\x1b[2J", "a\nb"])
def test_a_name_that_is_not_one_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be the name of a metric"):
        load_run(with_metric(tmp_path, name))


@pytest.mark.parametrize("name", ["a b", "happy-2", "überall", "x.y"])
def test_other_names_are_allowed(name: str, tmp_path: Path) -> None:
    found = load_run(with_metric(tmp_path, name)).evaluate
    assert found is not None
    assert [*found.metrics] == [name]


def test_tasks_and_metrics_do_not_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: name)
    monkeypatch.setattr(harness, "_manager", lambda *_: SimpleNamespace(all_tasks=["arc", "mine"]))
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("task: mine\n")
    metrics: dict[str, Any] = {"arc": kind("perplexity", "t.txt"), "text": kind("perplexity", "t.txt")}
    spec = EvaluateSpec.model_validate({"metrics": metrics, "tasks": ["arc", "a.yaml", "b.yaml"]})
    with pytest.raises(EvaluateError) as caught:
        harness.check_tasks(spec, tmp_path, trust_code=True)
    said = [problem.what for problem in caught.value.problems]
    assert said == ["2 of the tasks have the name 'mine'", "a metric and lm-eval's tasks have the same name 'arc'"]
