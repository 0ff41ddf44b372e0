"""The package and its documentation are written in plain English: words and phrases that the style guide rules out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path
    for pattern in ("paft_merge/**/*.py", "docs/**/*.md", "recipes/**/*.yaml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
    for path in ROOT.glob(pattern)
)  # fmt: skip

RULED_OUT = {
    r"(?<!\bthere )\bis no (?!longer\b)": "is not a",
    r"\b(is|are|was|were|be) told\b|\btells?\b(?!\()": "reports, warns, says",
    r"\banew\b": "again",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bbeneath\b": "below, in",
    r"\blet go of\b": "free, release",
    r"\b(it|that|which|they) (lies|lie|stands|stand)\b": "is, are",
    r"\bgoes? on from\b": "resumes, continues",
    r"(^|[.:;] )What (is|was|lies|stands|remains)\b": "a noun",
    r"\bthis room\b|\bthe rooms?\b(?! for)": "this package, this module",
}
"""Patterns, each with the words to use instead."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_words(path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}; write {instead}"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for pattern, instead in RULED_OUT.items()
        for match in re.finditer(pattern, line)
    ]
    assert found == []
