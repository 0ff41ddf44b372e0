"""`evaluate: {engine: vllm}` in a run, by a stand-in of vLLM: what its steps say, and what is refused before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from toys import train as train_toys
from toys.run import REWARD, sections, write_rows
from toys.vllm_api import install
from transformers import GenerationConfig

from paft_merge.cli import cli
from paft_merge.errors import RecipeError
from paft_merge.pipeline import plan, run
from paft_merge.pipeline.tuning import tune

pytestmark = train_toys.THEIR_WARNINGS


EXISTING = {"mine": "mine", "other": "other"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter, and data."""
    folder = tmp_path_factory.mktemp("world")
    torch.set_num_threads(1)
    model = train_toys.pretrained(20)
    train_toys.saved(folder / "base", model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "mine")
    adapted.save_pretrained(folder / "other")
    write_rows(folder / "sft.jsonl", [{"text": row["text"]} for row in train_toys.texts(count=4, length=8)])
    write_rows(folder / "pairs.jsonl", list(train_toys.preferences(4)))
    write_rows(folder / "test.jsonl", [{"prompt": f"w{i} w{i + 1}", "answer": f"w{i + 2}"} for i in range(4)])
    (folder / "text.txt").write_text("w1 w2 w3\nw4 w5\n")
    (folder / "reward.py").write_text(REWARD)
    return folder


def recipe_of(world: Path, name: str = "recipe", **changes: Any) -> Path:
    """A recipe with an existing adapter `mine`, whose answers vLLM generates."""
    data = sections() | {"audit": None, "adapters": EXISTING, "compare": {"methods": ["linear"]}}
    data["evaluate"] |= {"engine": "vllm", "max_length": 64}
    data["evaluate"]["metrics"]["like"] = {
        "kind": "agreement",
        "data": "test.jsonl",
        "with": "base",
        "max_new_tokens": 2,
    }
    data["merge"] = {"merge_method": "linear", "models": [{"model": "mine", "parameters": {"weight": 1.0}}]}
    recipe = world / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({k: v for k, v in (data | changes).items() if v is not None}, sort_keys=False))
    return recipe


def test_a_run_generates_with_vllm_and_computes_logits_with_transformers(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = install(monkeypatch)
    recipe = recipe_of(world, compare=None)
    done = run(recipe, tmp_path / "run")
    assert [row.name for row in done.table.rows] == ["merged"]
    names = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "run/evaluations/merged").iterdir()}
    engines = {name: found[name].get("engine") for name, found in names.items()}
    wanted = dict.fromkeys(["skill", "words", "like"], "vllm")
    assert engines == wanted | dict.fromkeys(["pairs", "text", "sparsity"])
    assert [Path(made.model).name for made in llm.made] == ["base", "merged"]
    theirs = run(recipe, tmp_path / "theirs", overrides=["evaluate.engine=transformers"])
    for name, cell in theirs.table.rows[0].cells.items():
        assert done.table.rows[0].cells[name].mean == pytest.approx(cell.mean), name


def test_a_dry_run_names_the_engine_and_runs_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = install(monkeypatch)
    recipe = str(recipe_of(world))
    shown = CliRunner().invoke(cli, ["run", "--dry-run", recipe, str(tmp_path / "new")])
    assert shown.exit_code == 0, shown.output
    assert "evaluate/mine (vLLM)" in shown.output
    found = json.loads(CliRunner().invoke(cli, ["run", "--dry-run", recipe, str(tmp_path / "new"), "--json"]).stdout)
    engines = {step["step"]: step.get("engine") for step in found["steps"]}
    assert engines["evaluate/mine/skill"] == engines["evaluate/answers/base/like"] == "vllm"
    assert engines["evaluate/mine/text"] is engines["merge/merged"] is None
    assert not llm.made


LORA = {"r": 2, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"trim": {"density": 0.5}}, "new: trim writes a sparse adapter"),
        ({"lora": LORA | {"bias": "all"}}, "new: vLLM supports bias: none only"),
        ({"lora": LORA | {"extra": {"rank_pattern": {"q_proj": 4}}}}, "lora.extra"),
    ],
)
def test_an_adapter_that_vllm_will_not_apply_is_refused_before_it_is_trained(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any], said: str
) -> None:
    install(monkeypatch)
    new = {"objective": "sft", "data": "sft.jsonl", "lora": LORA} | adapter
    recipe = recipe_of(world, "new", adapters=EXISTING | {"new": new})
    with pytest.raises(RecipeError) as caught:
        plan(recipe, tmp_path / "run")
    assert said in str(caught.value)


def test_what_vllm_cannot_load_is_refused_before_anything_runs(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(world)
    with pytest.raises(RecipeError, match=r"evaluate: .*vllm is not installed; pip install vllm"):
        plan(recipe, tmp_path / "run")
    install(monkeypatch)
    several = recipe_of(world, "several")
    metric = f"evaluate.metrics.like.with={world / 'base'}+{world / 'mine'}+{world / 'mine'}"
    with pytest.raises(RecipeError, match="vLLM applies one adapter at a time"):
        plan(several, tmp_path / "run", overrides=[metric])
    config = world / "mine" / "adapter_config.json"
    before = config.read_text()
    try:
        config.write_text(json.dumps(json.loads(before) | {"bias": "all"}))
        with pytest.raises(RecipeError, match=r"evaluate\.engine: .*mine: vLLM supports bias: none only"):
            plan(recipe, tmp_path / "run")
    finally:
        config.write_text(before)
    GenerationConfig(no_repeat_ngram_size=2).save_pretrained(world / "base")
    with pytest.raises(RecipeError, match="no_repeat_ngram_size: 2"):
        plan(recipe, tmp_path / "run")
    assert plan(recipe, tmp_path / "run", only="merge").todo
    GenerationConfig(eos_token_id=1).save_pretrained(world / "base")


def test_a_search_keeps_its_model_in_transformers(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    search = {"metric": "skill", "space": {"models[0].parameters.weight": [0.5, 1.0]}, "trials": 2}
    recipe = recipe_of(world, "search", tune=search)
    with pytest.raises(RecipeError, match="tune merges into a model that stays loaded, and vLLM loads a folder"):
        tune(recipe, tmp_path / "run")
