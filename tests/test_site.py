"""The parts of docs/conf.py that are ours: links to files outside of the site, and nothing loaded from elsewhere."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
CONF = runpy.run_path(str(DOCS / "conf.py"))
BLOB = "https://github.com/paft-merge/paft-merge/blob/main"


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("../CHANGELOG.md", f"{BLOB}/CHANGELOG.md"),
        ("../CHANGELOG.md#numerics", f"{BLOB}/CHANGELOG.md#numerics"),
        ("studies/results", f"{BLOB}/docs/studies/results"),
        ("../recipes/quickstart/reward.py", f"{BLOB}/recipes/quickstart/reward.py"),
        ("run.md#search", "run.md#search"),
        ("#keys", "#keys"),
        ("https://arxiv.org/abs/2406.17923", "https://arxiv.org/abs/2406.17923"),
        ("../no/such/file.md", "../no/such/file.md"),  # so that Sphinx reports it
    ],
)
def test_links_to_files_that_the_site_lacks_lead_to_the_repository(link: str, expected: str) -> None:
    assert CONF["outward"](f"a [b]({link}) c", DOCS / "recipe.md") == f"a [b]({expected}) c"


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
