"""A chat template that passed the checks and misbehaves later, in TRL or a reward model, is one line too."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from toys import train as toys
from toys.merge import python
from toys.run import write_rows

from paft_merge.errors import PaftMergeError, Problem, TrainError
from paft_merge.training import child_process, prepared_rows
from paft_merge.training.generation import token_ids
from paft_merge.training.rendering import bounded_templates
from paft_merge.training.rewards import _joined
from paft_merge.training.row_checks import TokenCounts
from paft_merge.training.run import train_adapter
from paft_merge.training.shown_rows import shown

pytestmark = toys.THEIR_WARNINGS

LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
LATER = f"{{% if messages|length > 2 %}}{LOOP}{{% endif %}}{toys.TEMPLATE}"
"""A template that loops on rows of three turns only."""

USER, SAID = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}
FAST = {**toys.FAST, "max_steps": 1, "max_length": 32}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of a second, and no check of the rows before: as for a template that waits until the checks are over."""
    monkeypatch.setattr(child_process.in_child, "__defaults__", (1.0, 1 << 30))
    monkeypatch.setattr(prepared_rows, "check_tokens", lambda *_, **__: TokenCounts())


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("sft", {}),
        ("dpo", {}),
        ("on_policy", {"reward": {"rule": "short"}, "sampling": {"rounds": 1, "samples_per_round": 2, "completions": 2, "max_new_tokens": 2}}),
    ],
)  # fmt: skip
def test_a_template_that_loops_on_one_row_ends_a_training(
    objective: str, more: dict[str, Any], tmp_path: Path, soon: None
) -> None:
    toys.saved(tmp_path / "base")
    (tmp_path / "late.jinja").write_text(LATER)
    asked = ([USER], [USER, SAID, USER])
    rows = [
        {"messages": [*turns, SAID]} if objective == "sft" else
        {"prompt": turns, **({"chosen": [SAID], "rejected": [USER | {"role": "assistant"}]} if objective == "dpo" else {})}
        for turns in asked
    ]  # fmt: skip
    write_rows(tmp_path / "rows.jsonl", rows)
    section = {
        "objective": objective, "data": str(tmp_path / "rows.jsonl"), "lora": LORA,
        "training": {k: v for k, v in FAST.items() if objective != "on_policy" or k != "max_steps"},
        "chat_template": str(tmp_path / "late.jinja"), **more,
    }  # fmt: skip
    with pytest.raises(
        TrainError, match=r"roles user, assistant, user.*: the chat template takes longer than 1 sec"
    ) as c:
        train_adapter(tmp_path / "base", section, tmp_path / "out")
    assert {(problem.code, problem.fix) for problem in c.value.problems} == {
        ("TEMPLATE", "set chat_template: to one that you trust")
    }
    if objective == "sft":
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"base_model: {tmp_path / 'base'}\nadapters: {{a: {section}}}\n")
        with pytest.raises(TrainError, match="the chat template takes longer"):
            list(shown(recipe, 2))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LATER, "takes longer than 1 second"),
        ("{{ 'a'|center(2000000000) }}", "needs more than 1 GiB of memory"),
        ("{{ 'a' * 3000000 }}", "writes more than 1,000,000 characters"),
    ],
)
def test_rewards_and_prompts_are_rendered_within_limits(template: str, why: str, soon: None) -> None:
    words = toys.tokenizer()
    words.chat_template = template
    with bounded_templates("adapter"):
        for render in (
            lambda: _joined([USER, SAID, USER], [SAID], words),
            lambda: token_ids(words, [USER, SAID, USER]),
        ):
            with pytest.raises(TrainError, match=f"adapter: .*: the chat template {why}"):
                render()
        words.chat_template = toys.TEMPLATE
        assert token_ids(words, [USER])  # a new child


def test_texts_masks_and_errors_are_those_without_a_child() -> None:
    words = toys.tokenizer()

    def made() -> list[Any]:
        turns, how = [USER, SAID], {"return_dict": True, "return_assistant_tokens_mask": True}
        one = words.apply_chat_template(turns, **how)
        many = words.apply_chat_template([turns, [USER]], tokenize=False, add_generation_prompt=True)
        words.chat_template, kept = "{{ raise_exception('only users') }}", words.chat_template
        with pytest.raises(Exception, match="only users") as caught:
            words.apply_chat_template(turns)
        words.chat_template = kept
        large = words.apply_chat_template(
            [{**USER, "content": "w1 " * 200_000}], tokenize=False
        )  # more than a pipe holds
        return [dict(one), many, type(caught.value), large]

    plain = made()
    with bounded_templates("adapter"):
        assert made() == plain
    assert made() == plain


def test_calls_have_one_child_that_ends_with_its_block_and_its_parent() -> None:
    with child_process.calls_in_child(os.getpid) as call:
        child = call()
        assert child == call() != os.getpid()
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        other = context.Process(target=lambda: queue.put((os.getpid(), call())))  # a worker of datasets.map
        other.start()
        parent, grandchild = queue.get()
        other.join()
        assert len({parent, grandchild, child}) == 3
        assert call() == child  # the end of the worker has not ended it
    for ended in (child, grandchild):
        with pytest.raises(ProcessLookupError):
            os.kill(ended, 0)
    code = """if True:
        import os, signal
        from paft_merge.training.child_process import calls_in_child
        with calls_in_child(os.getpid) as call:
            print(call(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert python(code).stdout.strip().isdigit()  # it waits until the child, which has the same stdout, ends


def test_an_error_of_ours_crosses_processes_whole() -> None:
    error = pickle.loads(
        pickle.dumps(TrainError([Problem("A", "b", "c"), Problem("D", "e", "f")], [Problem("W", "", "w")]))
    )
    assert (type(error), str(error), len(error.warnings)) == (TrainError, "b: c\ne: f", 1)
    assert isinstance(error, PaftMergeError)
