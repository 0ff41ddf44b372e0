"""Adapters that were trained with another tokenizer, chat template or end of sequence than their base has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_adapter
from safetensors.torch import load_file, save_file
from toys.merge import on, recipe, tensors_of
from toys.mergekit import HIDDEN, llama_state
from toys.vocabulary import save_llama, save_tokenizer, with_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import paft_merge
from paft_merge.engine.api import open_plan
from paft_merge.errors import Problem

CHATML = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
MARKS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base whose tokenizer has as many tokens as its embeddings have rows, and no chat template."""
    rows = save_tokenizer(tmp_path / "base", "base")
    return save_llama(tmp_path / "base", with_rows(llama_state(0, torch.float32), rows, 10), rows)


def adapter(
    base: Path,
    name: str,
    marks: Sequence[str] = (),
    *,
    template: str | None = None,
    end: str | None = None,
    grow: int | None = None,
) -> Path:
    """An adapter whose folder has its tokenizer: the base's, with more tokens, a template and another end."""
    folder = save_adapter(base.with_name(name), tensors_of(base), len(name))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(marks), special_tokens=True)
    tokenizer.chat_template = template
    if end:
        tokenizer.eos_token = end
    tokenizer.save_pretrained(folder)
    if grow:
        state = load_file(folder / "adapter_model.safetensors")
        for place in ("model.embed_tokens", "lm_head"):
            state[f"base_model.model.{place}.weight"] = torch.randn(grow, HIDDEN)
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def merged(out: Path, base: Path, *adapters: Path, **keys: Any) -> list[Problem]:
    told: list[Problem] = []
    sources = [(on(base, one), {"weight": 0.5}) for one in adapters]
    paft_merge.merge(recipe("task_arithmetic", base, *sources, **keys), out, warn=told.extend)
    return [problem for problem in told if problem.code in ("TOKENIZER", "CHAT_TEMPLATE")]


def test_a_lost_template_and_end_are_reported_once_and_auto_takes_both(base: Path, tmp_path: Path) -> None:
    first, second = (adapter(base, name, template=CHATML, end="<pad>") for name in ("one", "two"))
    (told,) = merged(tmp_path / "plain", base, first, second)
    assert told.where == f"{on(base, first)}, {on(base, second)}"
    assert told.what == "trained with what the output lacks: eos_token '<pad>' (the output has '</s>'); a chat template"
    assert "chat_template: auto" in told.fix
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template is None
    with open_plan(recipe("task_arithmetic", base, (on(base, first), {"weight": 1.0}))) as plan:
        assert [p.code for p in plan.warnings] == ["TOKENIZER"]  # what a dry run and `explain` show

    assert merged(tmp_path / "auto", base, first, second, chat_template="auto") == []
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "auto")
    end = tokenizer.convert_tokens_to_ids("<pad>")
    assert (tokenizer.chat_template, tokenizer.eos_token) == (CHATML, "<pad>")
    assert GenerationConfig.from_pretrained(tmp_path / "auto").eos_token_id == [end, 1]
    assert json.loads((tmp_path / "auto/config.json").read_text())["eos_token_id"] == end
    assert tensors_of(tmp_path / "auto").keys() == tensors_of(base).keys()


def test_auto_prefers_the_templates_of_adapters(base: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").write_text("{{ 'of the base' }}")
    one = adapter(base, "one", template=CHATML)
    (told,) = merged(tmp_path / "plain", base, one)
    assert "another chat template" in told.what
    merged(tmp_path / "auto", base, one, chat_template="auto")
    assert AutoTokenizer.from_pretrained(tmp_path / "auto").chat_template == CHATML


def test_a_template_alone_in_an_adapters_folder_counts(base: Path, tmp_path: Path) -> None:
    one = save_adapter(tmp_path / "one", tensors_of(base), 1)
    (one / "chat_template.jinja").write_text(CHATML)
    (told,) = merged(tmp_path / "plain", base, one)
    assert told.what.endswith("lacks: a chat template")
    merged(tmp_path / "taken", base, one, tokenizer_source=on(base, one))
    assert AutoTokenizer.from_pretrained(tmp_path / "taken").chat_template == CHATML


def test_added_tokens_without_rows_are_reported(base: Path, tmp_path: Path) -> None:
    one = adapter(base, "one", MARKS, template=CHATML, end="<|im_end|>")
    (told,) = merged(tmp_path / "out", base, one)
    assert "2 more tokens ('<|im_start|>', '<|im_end|>')" in told.what
    assert f"tokenizer_source: {on(base, one)}" in told.fix


@pytest.mark.parametrize("others", [0, 1])
def test_the_only_tokenizer_of_longer_embeddings_is_taken(base: Path, tmp_path: Path, others: int) -> None:
    rows = len(AutoTokenizer.from_pretrained(base)) + 2
    one = adapter(base, "one", MARKS, template=CHATML, end="<|im_end|>", grow=rows)
    more = [adapter(base, "other")][:others]
    (told,) = merged(tmp_path / "out", base, one, *more)
    assert told.where == on(base, one)
    assert "so the output has its tokenizer, with 2 more tokens" in told.what
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == rows == model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    assert (tokenizer.chat_template, tokenizer.eos_token) == (CHATML, "<|im_end|>")
    assert model.generation_config.eos_token_id == [rows - 1, 1]


def test_longer_embeddings_without_a_tokenizer_that_fits_are_reported(base: Path, tmp_path: Path) -> None:
    rows = len(AutoTokenizer.from_pretrained(base)) + 2
    bare, named = (adapter(base, n, m, grow=rows) for n, m in (("bare", ()), ("named", ["<a>", "<b>"])))
    (told,) = merged(tmp_path / "bare_out", base, bare)
    assert told.what == f"makes the embeddings {rows} rows long, and the output's tokenizer has {rows - 2} tokens"
    told_of_two = merged(tmp_path / "two", base, named, adapter(base, "marks", MARKS, grow=rows))
    assert sum("rows long" in problem.what for problem in told_of_two) == 2  # two tokenizers fit, so none is taken


def test_values_averaged_over_models_that_lack_the_rows_of_added_tokens_are_reported(base: Path) -> None:
    rows = len(AutoTokenizer.from_pretrained(base)) + 2
    one, two = on(base, adapter(base, "one", MARKS, grow=rows)), on(base, adapter(base, "two"))

    def absent(method: str, *sources: str, **keys: Any) -> list[str]:
        with open_plan(
            recipe(
                method,
                base if method == "task_arithmetic" else None,
                *((source, {"weight": 0.5}) for source in sources),
                **keys,
            )
        ) as plan:
            return [str(warning) for warning in plan.warnings if warning.code == "ABSENT_ROWS"]

    (line,) = absent("linear", two, one)
    assert f"has {rows} rows with {one} and {rows - 2} with {two}; linear counts the rows" in line
    assert "tokenizer_source: union" in line
    assert not absent("linear", two, one, tokenizer_source="union")
    assert not absent("linear", one)
    assert not absent("task_arithmetic", two, one)
    paft_merge.merge(
        recipe("linear", None, *((s, {"weight": 0.5}) for s in (two, one)), tokenizer_source="union"),
        base.with_name("out"),
    )
    trained = load_file(base.with_name("one") / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(tensors_of(base.with_name("out"))["lm_head.weight"][-2:], trained[-2:])


def test_equal_tokenizers_and_padding_alone_are_no_reason_to_warn(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<pad>"}))
    one = adapter(base, "one")
    config = json.loads((one / "tokenizer_config.json").read_text())
    (one / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "</s>"}))
    assert merged(tmp_path / "out", base, one) == []


def test_a_broken_tokenizer_of_an_adapter_does_not_stop_a_merge(base: Path, tmp_path: Path) -> None:
    one = adapter(base, "one")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (one / name).write_text("[" * 5000)
    assert merged(tmp_path / "out", base, one) == []
