"""The README and the ready recipes say what is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from paft_merge.recipe import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_methods_is_that_of_the_code() -> None:
    from readme_methods import with_table

    assert with_table(README) == README, "run python tools/readme_methods.py"


def test_the_table_of_the_language_has_every_key() -> None:
    import readme_language

    assert readme_language.with_table(README) == README, "run python tools/readme_language.py"
    assert list(readme_language.TEXTS) == readme_language.keys()


def test_files_that_the_readme_links_to_are_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_room_is_in_the_picture() -> None:
    picture = README.split("```\ncli/")[1].split("```")[0]
    rooms = {
        p.name + ("/" if p.is_dir() else "")
        for p in (ROOT / "paft_merge").iterdir()
        if not p.name.startswith(("_", "."))
    }
    assert {r for r in rooms - {"py.typed"} if r not in picture} == {"cli/"}


def test_the_recipe_of_the_readme_loads_without_a_warning() -> None:
    (recipe,) = re.findall(r"```yaml\n(# recipe\.yaml.*?)```", README, re.DOTALL)
    assert load_recipe(recipe, strict=True).merge_method == "ties"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_ready_recipes_load_without_a_warning(path: Path) -> None:
    data = yaml.safe_load(path.read_text())
    if "adapters" in data:
        from paft_merge.training.schema import AdapterSpec

        for section in data["adapters"].values():
            AdapterSpec.model_validate(section)
    else:
        load_recipe(path, strict=True)
