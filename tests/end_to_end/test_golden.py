"""The same bytes as ever: merged files that were made once, on tiny inputs that are committed with them."""

from __future__ import annotations

from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"

from make_golden import GOLDEN, RECIPES, merged  # noqa: E402


@pytest.mark.parametrize("name", RECIPES)
def test_merged_bytes_are_those_of_the_golden_file(name: str) -> None:
    assert merged(name) == (GOLDEN / f"{name}.safetensors").read_bytes(), (
        "a change of numerics: see tools/make_golden.py"
    )
