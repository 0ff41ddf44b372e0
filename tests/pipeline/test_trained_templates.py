"""The chat template of a run: merged models and evaluations have the one that the adapters are trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toys.run import make_world, sections, write_rows
from toys.train import THEIR_WARNINGS
from transformers import AutoTokenizer

from paft_merge.errors import RecipeError
from paft_merge.pipeline import plan, run
from paft_merge.pipeline.trained_templates import as_trained

pytestmark = THEIR_WARNINGS
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def chats(folder: Path, template: str | None = "chat.jinja", **merge: Any) -> Path:
    """A recipe whose data and metrics are chat turns; the base has no template."""
    made = sections()
    file = make_world(folder)
    (folder / "base/chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat.jinja").write_text(CHAT)
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    write_rows(folder / "chat.jsonl", [{"messages": turns}] * 4)
    write_rows(folder / "test.jsonl", [{"prompt": turns[:1], "answer": "w3"}])
    write_rows(
        folder / "pairs.jsonl",
        [{"prompt": turns[:1], "chosen": turns[1:], "rejected": [{"role": "assistant", "content": "w4"}]}],
    )
    name, adapter = next(iter(made["adapters"].items()))
    adapter = {**adapter, "objective": "sft", "data": "chat.jsonl", **({"chat_template": template} if template else {})}
    adapter.pop("l1", None)
    models = [{"model": name, "parameters": {"weight": 1.0}}]
    data = {
        "base_model": made["base_model"],
        "adapters": {name: adapter},
        "merge": {"merge_method": "task_arithmetic", "models": models, **merge},
        "compare": {"arms": ["base", "individual"]},
        "evaluate": {
            "metrics": {
                "skill": {"kind": "exact_match", "data": "test.jsonl", "max_new_tokens": 2},
                "pairs": {"kind": "preference", "data": "pairs.jsonl"},
            }
        },
    }
    file.write_text(json.dumps(data))
    return file


def test_the_merged_model_and_every_arm_have_the_template_of_training(tmp_path: Path) -> None:
    run(chats(tmp_path / "world"), tmp_path / "run")
    assert AutoTokenizer.from_pretrained(tmp_path / "run/merged").chat_template == CHAT
    measured = {file.parent.name for file in (tmp_path / "run/evaluations").glob("*/pairs.json")}
    assert measured == {"base", "sft", "merged"}


def test_turns_without_any_template_are_refused_before_training(tmp_path: Path) -> None:
    file = chats(tmp_path / "world", template=None)
    with pytest.raises(RecipeError) as caught:
        plan(file, tmp_path / "run")
    lines = [p for p in caught.value.problems if "no model has a template" in p.what]
    assert [(p.code, p.where.rpartition(": ")[2]) for p in lines] == [
        ("TEMPLATE", "evaluate.metrics.skill"),
        ("TEMPLATE", "evaluate.metrics.pairs"),
    ]
    with pytest.raises(RecipeError) as caught:
        plan(file, tmp_path / "run", overrides=["merge.chat_template=chatml"])
    assert not [p for p in caught.value.problems if "no model has a template" in p.what], "only training lacks one now"
    (file.parent / "base/chat_template.jinja").write_text(CHAT)
    plan(file, tmp_path / "run")


def test_a_recipe_that_chooses_or_adapters_that_disagree_are_left_alone(tmp_path: Path) -> None:
    for name, text in (("base", None), ("a", CHAT), ("b", "{{ 'other' }}"), ("c", CHAT + "\n")):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "chat_template.jinja").write_text(text)

    def made(*adapters: str, **keys: Any) -> dict[str, Any]:
        base = str(tmp_path / "base")
        models = [{"model": f"{base}+{tmp_path / one}", "parameters": {"weight": 1.0}} for one in adapters]
        return {"merge_method": "task_arithmetic", "base_model": base, "models": models, **keys}

    assert as_trained(made("a", "c"))["chat_template"] == "auto"
    for recipe in (made("a", "b"), made("a", chat_template="chatml"), made("a", tokenizer_source="base")):
        assert as_trained(recipe) == recipe
    (tmp_path / "base/chat_template.jinja").write_text(CHAT)
    assert as_trained(made("a")) == made("a")
