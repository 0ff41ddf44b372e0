"""The README, the pages of docs/ and the recipes in the tree are true: links, tables, pictures, recipes."""

from __future__ import annotations

import re
from pathlib import Path

import docs_adapters
import docs_methods
import docs_tables
import pytest
import yaml

from paft_merge.methods import METHODS
from paft_merge.recipe import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "AGENTS.md", "CHANGELOG.md", "recipes/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_readme_says_how_to_install_and_what_comes_after_the_quickstart() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install = README.partition("## Install")[2].partition("\n## ")[0]
    assert README.index("## Install") < README.index("\npaft ")
    assert "pip install ." in install
    assert f"pip install {project['name']}" in install
    extras = {extra for names in re.findall(r"\.\[([\w,]+)\]", install) for extra in names.split(",")}
    assert extras
    assert extras <= project["optional-dependencies"].keys()
    for tool in re.findall(r"`(tools/\w+)`", install):
        assert (ROOT / tool).stat().st_mode & 0o111
        assert "next: . $bin/activate && paft --help" in (ROOT / tool).read_text()
    assert "`. .venv/bin/activate` and `paft --help`" in install
    assert re.search(r"Python (3\.\d+)", install)[1] == re.search(r"3\.\d+", project["requires-python"])[0]  # type: ignore[index]


@pytest.mark.parametrize("page", docs_tables.TABLES)
def test_generated_tables_are_up_to_date(page: str) -> None:
    assert docs_tables.with_table(page) == (ROOT / "docs" / page).read_text(), "run python tools/docs_tables.py"


def test_the_table_of_adapters_is_up_to_date() -> None:
    assert docs_adapters.page() == docs_adapters.PAGE.read_text(), "run python tools/docs_adapters.py"


NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.mark.parametrize("name", docs_methods.PICTURES)
def test_the_pictures_of_methods_are_results_of_the_methods(name: str) -> None:
    drawn, kept = docs_methods.picture(name), (docs_methods.FOLDER / f"{name}.svg").read_text()
    assert NUMBER.sub("", drawn) == NUMBER.sub("", kept), "run python tools/docs_methods.py"
    assert [float(one) for one in NUMBER.findall(kept)] == pytest.approx(
        [float(one) for one in NUMBER.findall(drawn)], abs=0.11
    )  # of a pixel: the last digit of another processor


def test_every_method_has_a_picture_and_a_formula() -> None:
    page = (ROOT / "docs" / "methods.md").read_text().partition("## Pictures and formulas")[2]
    names = re.findall(r"!\[[^\]]{40,}\]\(methods/(\w+)\.svg\)", page)
    assert names == list(docs_methods.PICTURES)
    assert {path.stem for path in docs_methods.FOLDER.iterdir()} == set(names)
    shown = "".join((docs_methods.FOLDER / f"{name}.svg").read_text() for name in names)
    for method in METHODS:
        assert f">{method}<" in shown, method
        assert f"\n| `{method}` |" in page or method in ("tsv", "iso_c"), method


def anchors(page: Path) -> set[str]:
    """The anchors of a page: its headings as GitHub names them, and its own `<a id>`."""
    text = page.read_text()
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
    return made | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_package_is_in_the_picture() -> None:
    picture = (ROOT / "docs" / "architecture.md").read_text().split("```\ncli/")[1].split("```")[0]
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
