"""The recipes that come with the package: `paft init --quickstart`, and what a wheel installs."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import paft_merge
from paft_merge.cli import cli
from paft_merge.errors import RunError
from paft_merge.pipeline import load_run
from paft_merge.pipeline.shipped_recipes import copy_quickstart

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


def init(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["init", *map(str, words)])
    return done.exit_code, done.output


def test_the_quickstart_is_copied_and_its_paths_hold(tmp_path: Path) -> None:
    recipe = tmp_path / "new" / "q.yaml"
    code, text = init("--quickstart", recipe)
    assert code == 0, text
    assert recipe.read_text().startswith("# yaml-language-server: ")
    assert "#   paft run q.yaml runs/quickstart\n" in recipe.read_text()
    copied = {path.relative_to(recipe.parent) for path in recipe.parent.rglob("*") if path.is_file()}
    source = {path.relative_to(RECIPES) for path in (RECIPES / "quickstart").rglob("*") if path.is_file()}
    assert copied - {Path("q.yaml"), Path("paft.schema.json")} == {p for p in source if p.suffix != ".pyc"}
    assert load_run(recipe).base == str(recipe.parent / "quickstart" / "base")


@pytest.mark.parametrize("there", ["q.yaml", "quickstart"])
def test_nothing_is_overwritten(there: str, tmp_path: Path) -> None:
    (tmp_path / there).mkdir()
    code, text = init("--quickstart", tmp_path / "q.yaml")
    assert code != 0
    assert "exists" in text or "is a directory" in text
    assert [path.name for path in tmp_path.iterdir()] == [there]


def test_init_without_words_names_the_ways_to_call_it() -> None:
    code, text = init()
    assert code == 2
    assert "Missing option '--base'. Give --base and --data" in text
    assert "--quickstart" in text


@pytest.mark.parametrize("words", [(), ("q.yaml", "--base", "b"), ("q.yaml", "--gpus", 1)])
def test_the_quickstart_has_no_other_options(words: tuple[object, ...]) -> None:
    assert init("--quickstart", *words)[0] == 2


def test_a_package_installed_with_target_finds_its_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paft_merge, "__file__", str(tmp_path / "paft_merge" / "__init__.py"))
    with pytest.raises(RunError, match="not part of this installation"):
        copy_quickstart(tmp_path / "q.yaml")
    (tmp_path / "share" / "paft-merge" / "quickstart").mkdir(parents=True)
    (tmp_path / "share" / "paft-merge" / "quickstart.yaml").write_text("base_model: b\n")
    copy_quickstart(tmp_path / "q.yaml")
    assert (tmp_path / "q.yaml").read_text().endswith("base_model: b\n")


def test_a_wheel_has_every_recipe_where_it_is_looked_for() -> None:
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    placed = {
        (Path(folder) / path.name, path)
        for folder, patterns in files.items()
        for one in patterns
        for path in ROOT.glob(one)
    }
    wanted = (
        path
        for path in RECIPES.rglob("*")
        if path.is_file() and path.suffix in (".yaml", ".py", ".jsonl", ".json", ".txt", ".safetensors")
    )
    share = Path("share", "paft-merge")
    assert {(share / path.relative_to(RECIPES), path) for path in wanted} == placed
