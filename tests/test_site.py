"""The parts of docs/conf.py that are ours: links to files outside of the site, and nothing loaded from elsewhere."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
CONF = runpy.run_path(str(DOCS / "conf.py"))
BLOB = "https://github.com/paft-merge/paft-merge/blob/main"


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("recipe.md", "../CONTRIBUTING.md", f"{BLOB}/CONTRIBUTING.md"),
        ("recipe.md", "../CONTRIBUTING.md#style", f"{BLOB}/CONTRIBUTING.md#style"),
        ("recipe.md", "studies/results", f"{BLOB}/docs/studies/results"),
        ("recipe.md", "../recipes/quickstart/reward.py", f"{BLOB}/recipes/quickstart/reward.py"),
        ("recipe.md", "../CHANGELOG.md#numerics", "changelog.md#numerics"),
        ("how-to/index.md", "../../recipes/README.md", "../gallery.md"),
        ("how-to/index.md", "publish.md#tags", "publish.md#tags"),
        ("../recipes/README.md", "dare.yaml", "#dareyaml"),
        ("../recipes/README.md", "../docs/recipe.md#keys", "recipe.md#keys"),
        ("../CHANGELOG.md", "docs/run.md", "run.md"),
        ("index.md", "notebooks/paft.ipynb", "notebook.md"),
        ("run.md", "training.md#mixed", "training.md#one-adapter-on-several-objectives"),  # of its <a id>
        ("recipe.md", "#keys", "#keys"),
        ("recipe.md", "https://arxiv.org/abs/2406.17923", "https://arxiv.org/abs/2406.17923"),
        ("recipe.md", "../no/such/file.md", "../no/such/file.md"),  # so that Sphinx reports it
        ("recipe.md", "../" * 20 + "etc/hosts", "../" * 20 + "etc/hosts"),
    ],
)
def test_links_lead_to_a_page_of_the_site_or_to_the_repository(page: str, link: str, expected: str) -> None:
    names = {"../recipes/README.md": "gallery", "../CHANGELOG.md": "changelog"}
    path, name = (DOCS / page).resolve(), names.get(page, page.removesuffix(".md"))
    assert CONF["relinked"](f"a [b]({link}) c", path, name) == f"a [b]({expected}) c"


def test_a_notebook_is_a_page_with_its_outputs() -> None:
    stream = {"output_type": "stream", "text": ["a\n", "b"]}
    table = {"output_type": "execute_result", "data": {"text/html": ["<b>", "x</b>"], "text/plain": "x"}}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "[a](../run.md)"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [stream, table]},
    ]
    page = CONF["notebook_page"]({"cells": cells})
    assert page.split("\n\n") == [
        "# Title\n[a](../run.md)",
        "```python\nprint(1)\n```",
        "```text\na\nb\n```",
        '~~~~{raw} html\n<div class="output"><b>x</b></div>\n~~~~\n',
    ]
    assert CONF["relinked"]("[a](../run.md)", CONF["ELSEWHERE"]["notebook"], "notebook") == "[a](run.md)"


@pytest.mark.parametrize(
    ("tag", "remote"),
    [
        ('<script src="https://unpkg.com/x.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example.com/css">', True),
        ("<img alt=\"\" src='http://example.com/x.png'>", True),
        ('<script src="_static/x.js"></script>', False),
        ('<a href="https://arxiv.org/abs/2406.17923">', False),
        ('<link rel="canonical" href="https://example.com/">', False),
    ],
)
def test_what_a_browser_would_load_from_elsewhere_is_found(tag: str, remote: bool) -> None:
    assert bool(CONF["REMOTE"].search(tag)) is remote
