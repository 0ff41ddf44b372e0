"""The table of limits in docs/trust.md has every limit with its value."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "trust.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| .* \| ([\d,]+)(?: (\w+))? \| `([\w.]+)\.(\w+)(?:\[\"(\w+)\"\])?` \|$", PAGE, re.MULTILINE)
UNITS = {"KiB": 2**10, "GiB": 2**30, "MiB": 2**20}


@pytest.mark.parametrize(("number", "unit", "module", "name", "key"), ROWS, ids=lambda text: str(text) or "-")
def test_a_limit_on_the_page_is_that_of_the_code(number: str, unit: str, module: str, name: str, key: str) -> None:
    value = getattr(import_module(f"paft_merge.{module}"), name)
    value = value[key] if key else value
    assert value == int(number.replace(",", "")) * UNITS.get(unit, 1)
    assert isinstance(value, float) == (unit == "s")


def test_every_limit_is_on_the_page() -> None:
    named = {(module, name) for _, _, module, name, _ in ROWS}
    assert len(ROWS) == PAGE.partition("## Limits")[2].partition("## What")[0].count("\n| ") - 1
    for module in {module for module, _ in named}:
        for name, value in vars(import_module(f"paft_merge.{module}")).items():
            if re.match(r"_?(MOST|MAX)(_|$)", name) and isinstance(value, int | float | dict):
                own = (module, name) in named or name in ("_MAX_INT", "_MAX_FAULTS")
                imported = any(
                    name == other and getattr(import_module(f"paft_merge.{m}"), name) is value for m, other in named
                )
                assert own or imported, f"{module}.{name}"
    most = import_module("paft_merge.inputs.adapters.peft_types")._MOST
    assert {f"`{field}`" for field in most} <= set(re.findall(r"`\w+`", PAGE))
