"""A recipe that holds an access token is refused before anything is written, and the token is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from paft_merge.errors import RecipeError
from paft_merge.pipeline.overrides import overridden
from paft_merge.recipe import Located, load_documents, load_recipe
from paft_merge.training import train

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz12345678"
RUN = """base_model: base
adapters:
  sft:
    objective: sft
    data: rows.jsonl
    training:
      {line}
"""


def refused(caught: pytest.ExceptionInfo[RecipeError]) -> str:
    (problem,) = caught.value.problems
    assert problem.code == "SECRET"
    assert TOKEN not in str(problem)
    assert "hf auth login" in problem.fix
    return problem.where


@pytest.mark.parametrize(
    "line",
    [
        f"hub_token: {TOKEN}",
        "hub_token: my-own",
        f"run_name: the {TOKEN}",
        f"max_steps: 5  # HF_TOKEN={TOKEN}",
        "hub_token: 1234567890",
        "Hub-Token: my-own",
    ],
)
def test_a_token_in_a_field_or_a_comment_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RUN.replace("{line}", line))
    with pytest.raises(RecipeError) as caught:
        train(path, tmp_path / "out")
    assert refused(caught).startswith(f"{path}:7")
    with pytest.raises(RecipeError) as caught:
        load_documents(path)
    assert not (tmp_path / "out").exists()


def test_a_token_in_data_from_python_is_refused(tmp_path: Path) -> None:
    adapters = {"sft": {"objective": "sft", "data": "rows.jsonl", "training": {"hub_token": TOKEN}}}
    with pytest.raises(RecipeError) as caught:
        train({"base_model": "base", "adapters": adapters}, tmp_path / "out")
    assert refused(caught) == "adapters.sft.training.hub_token"
    with pytest.raises(RecipeError) as caught:
        load_recipe({"merge_method": "linear", "models": [{"model": TOKEN}]})
    assert refused(caught) == "models[0].model"


@pytest.mark.parametrize("override", ["a.hub_token=plain", f"a.run_name={TOKEN}", f"a.run_name=[{TOKEN}"])
def test_a_token_on_the_command_line_is_refused(override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        overridden(Located({"a": {"run_name": "x"}}), [override])
    assert refused(caught) == override.split("=")[0].split(".")[1]


def test_placeholders_and_empty_values_are_kept() -> None:
    text = (
        "a:\n  hub_token:\n  hub_strategy: every_save\n  note: set HF_TOKEN to hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n"
    )
    (document,) = load_documents(text)
    assert document.data["a"]["hub_token"] is None
