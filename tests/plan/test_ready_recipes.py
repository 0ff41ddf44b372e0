"""Every merge recipe of `recipes/` is planned against checkpoints and adapters of its models' shapes, of which only headers exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from make_layout import FP8, LAYOUTS, Llama, hollow, hollow_adapter, rows, shortened
from make_tiny import byte_tokenizer

import paft_merge

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(path for path in RECIPES.glob("*.yaml") if "merge_method" in yaml.safe_load(path.read_text()))
LIST = (RECIPES / "README.md").read_text()

SEVEN_B = Llama(4096, 14336, 32, 32, 8, 32000)
DEEPSEEK = shortened(LAYOUTS["deepseek-v3"], 4)
LAYOUT_OF = {"fp8-base": DEEPSEEK, "moe-experts": DEEPSEEK}

WARNINGS = {
    "fp8-base": {"QUANTISED"},
    "long-to-short": {"VOCABULARY"},
    "safety-repair": {"VOCABULARY"},
    "vocabulary-union": {"VOCABULARY"},
}
"""What a plan warns of: codes of FP8 are rounded again; toy tokenizers have fewer tokens than the layout has rows."""


def references(recipe: Any) -> Iterator[str]:
    """Every model that a recipe names."""
    for key, value in recipe.items() if isinstance(recipe, dict) else enumerate(recipe):
        if key in ("model", "base_model", "tokenizer_source") and value not in ("base", "union"):
            yield value
        elif isinstance(value, dict | list):
            yield from references(value)


def lay_out(name: str, recipe: dict[str, Any]) -> None:
    """Write a checkpoint of headers, with a tokenizer, for each base of a recipe and an adapter for each of its adapters."""
    layout, fp8 = LAYOUT_OF.get(name, SEVEN_B), name == "fp8-base"
    config = {**layout.config(), **({"quantization_config": FP8} if fp8 else {})}
    for reference in sorted(set(references(recipe))):
        base, _, adapter = reference.partition("+")
        for folder in [base.replace("*", str(step)) for step in range(6)] if "*" in base else [base]:
            if not Path(folder).exists():
                tokenizer = byte_tokenizer()
                tokenizer.add_tokens([f"<{folder}>"] if "vocabulary" in name else [])
                tokenizer.chat_template = "{{ messages }}"
                tokenizer.save_pretrained(hollow(Path(folder), rows(layout, fp8=fp8), config))
        if adapter and not Path(adapter).exists():
            hollow_adapter(Path(adapter), layout, rank=16)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_ready_recipe_is_planned(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = yaml.safe_load(path.read_text())
    assert paft_merge.load_recipe(path, strict=True).merge_method == recipe["merge_method"]
    if path.stem == "s3-to-s3":  # a plan reads headers, and a bucket has none without a server
        return
    monkeypatch.chdir(tmp_path)
    lay_out(path.stem, recipe)
    with paft_merge.open_plan(path, strict=True) as plan:
        assert plan.to_json()["tensors"]
        assert {problem.code for problem in plan.warnings} <= WARNINGS.get(path.stem, set())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_ready_recipe_says_what_it_is_for(path: Path) -> None:
    head = re.match(r"(?:#.*\n)+", path.read_text())
    assert head
    assert re.search(rf"^#   paft \w+ (?:--[\w-]+ )*recipes/{path.name}", head[0], re.MULTILINE), "the command"
    assert f"]({path.name})" in LIST, "recipes/README.md lists it"
