"""Rows in every form that people have become what a person would mean by them, or are refused with their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from paft_merge.errors import Problems
from paft_merge.training.row_files import Number
from paft_merge.training.row_forms import Kind, Normalised, columns_of, normalise

Row = dict[str, Any]


def normalised(
    rows: Sequence[Row], kind: Kind, *, chat: bool = True, selected: bool = False
) -> tuple[Normalised, list[str]]:
    problems = Problems()
    placed = [(f"row {i}", row) for i, row in enumerate(rows, 1)]
    done = normalise(placed, columns_of(rows), kind, chat=chat, selected=selected, problems=problems)
    return done, [str(problem) for problem in problems.found]


def only(row: Row, kind: Kind, *, chat: bool = True) -> Row:
    done, wrong = normalised([row], kind, chat=chat)
    assert wrong == []
    (made,) = done.rows
    return made


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def said(text: str) -> Row:
    return {"role": "assistant", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


PAIR = {"prompt": [user("Q?")], "chosen": [said("good")], "rejected": [said("bad")]}

PREFERENCES = {
    "plain texts": ({"prompt": "Q", "chosen": " good", "rejected": " bad"}, {"prompt": "Q", "chosen": " good", "rejected": " bad"}),
    "turns": ({"prompt": [user("Q?")], "chosen": [said("good")], "rejected": [said("bad")]}, PAIR),
    "ultrafeedback": (
        {"prompt": "Q?", "prompt_id": "a", "chosen": [user("Q?"), said("good")], "rejected": [user("Q?"), said("bad")],
         "messages": [user("Q?"), said("good")], "score_chosen": 8.0},
        PAIR,
    ),
    "a text prompt beside lone answers": ({"prompt": "Q?", "chosen": [said("good")], "rejected": [said("bad")]}, PAIR),
    "no prompt column": ({"chosen": [user("Q?"), said("good")], "rejected": [user("Q?"), said("bad")]}, PAIR),
    "alpaca": ({"instruction": "Q?", "input": "", "chosen": "good", "rejected": "bad"}, PAIR),
    "alpaca with an input": (
        {"instruction": "Add", "input": "1 2", "chosen": "3", "rejected": "4"},
        {"prompt": [user("Add\n\n1 2")], "chosen": [said("3")], "rejected": [said("4")]},
    ),
    "orca": (
        {"system": "Be brief.", "question": "Q?", "chosen": "good", "rejected": "bad"},
        {**PAIR, "prompt": [system("Be brief."), user("Q?")]},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Q?"}], "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
        PAIR,
    ),
    "a conversation and text answers": ({"messages": [user("Q?")], "chosen": "good", "rejected": "bad"}, PAIR),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: Q?\n\nAssistant: good", "rejected": "\n\nHuman: Q?\n\nAssistant: bad"},
        {"prompt": "\n\nHuman: Q?\n\nAssistant:", "chosen": " good", "rejected": " bad"},
    ),
    "several turns": (
        {"chosen": [user("a"), said("b"), user("c"), said("good")], "rejected": [user("a"), said("b"), user("c"), said("bad")]},
        {**PAIR, "prompt": [user("a"), said("b"), user("c")]},
    ),
    "parts": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Q?"}]}], "chosen": [said("good")], "rejected": [said("bad")]},
        PAIR,
    ),
    "a conversation that goes on after the prompt": (
        {"prompt": [user("a")], "chosen": [said("b"), user("c"), said("good")], "rejected": [said("b"), user("c"), said("bad")]},
        {**PAIR, "prompt": [user("a"), said("b"), user("c")]},
    ),
    "another name": ({"prompt": "Q", "chosen_response": " a", "rejected_response": " b"}, {"prompt": "Q", "chosen": " a", "rejected": " b"}),
    "the prompt in front of both texts": ({"prompt": "Q:", "chosen": "Q: a", "rejected": "Q: b"}, {"prompt": "Q:", "chosen": " a", "rejected": " b"}),
    "answers that share a beginning": ({"chosen": "Is it? Yes", "rejected": "Is it? Yesterday"}, {"prompt": "Is it?", "chosen": " Yes", "rejected": " Yesterday"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name: str) -> None:
    row, wanted = PREFERENCES[name]
    assert only(row, "preference") == wanted


TEXTS = {
    "messages": ({"messages": [user("Q?"), said("A")]}, {"messages": [user("Q?"), said("A")]}),
    "sharegpt": (
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A", "weight": 1}]},
        {"messages": [system("S"), user("Q?"), said("A")]},
    ),
    "a system column": ({"system": "S", "messages": [user("Q?"), said("A")]}, {"messages": [system("S"), user("Q?"), said("A")]}),
    "ultrachat": ({"prompt": "Q?", "prompt_id": "i", "messages": [user("Q?"), said("A")]}, {"messages": [user("Q?"), said("A")]}),
    "alpaca": (
        {"instruction": "Add", "input": "1 2", "output": "3", "text": "rendered"},
        {"prompt": [user("Add\n\n1 2")], "completion": [said("3")]},
    ),
    "history": (
        {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "S"},
        {"prompt": [system("S"), user("a"), said("b"), user("c")], "completion": [said("d")]},
    ),
    "dolly": (
        {"instruction": "When?", "context": "In 1999.", "response": "1999", "category": "closed_qa"},
        {"prompt": [user("In 1999.\n\nWhen?")], "completion": [said("1999")]},
    ),
    "gsm8k": ({"question": "1+1?", "answer": "2"}, {"prompt": [user("1+1?")], "completion": [said("2")]}),
    "an answer that is a number": ({"question": "1-1?", "answer": 0}, {"prompt": [user("1-1?")], "completion": [said("0")]}),
    "prompt and completion stay texts": ({"prompt": "a = ", "completion": "b"}, {"prompt": "a = ", "completion": "b"}),
    "turns in prompt and completion": (
        {"prompt": [user("Q?")], "completion": [said("A")]}, {"prompt": [user("Q?")], "completion": [said("A")]},
    ),
    "turns and a text answer": ({"prompt": [user("Q?")], "completion": "A"}, {"prompt": [user("Q?")], "completion": [said("A")]}),
    "text": ({"text": "abc", "url": "x"}, {"text": "abc"}),
    "turns as JSON": ({"messages": '[{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}]'}, {"messages": [user("Q?"), said("A")]}),
    "token ids": ({"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1, 2], "labels": [-100, 2]}),
    "tools": (
        {"messages": [user("Q?"), {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
                      {"role": "tool", "content": "7"}, said("A")], "tools": [{"name": "f"}]},
        {"messages": [user("Q?"), {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
                      {"role": "tool", "content": "7"}, said("A")], "tools": '[{"name": "f"}]'},
    ),
    "function calls of sharegpt": (
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                           {"from": "observation", "value": "7"}, {"from": "gpt", "value": "A"}]},
        {"messages": [user("Q?"), {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
                      {"role": "tool", "content": "7"}, said("A")]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str) -> None:
    row, wanted = TEXTS[name]
    assert only(row, "text") == wanted


def test_without_a_chat_template_named_columns_become_text() -> None:
    alpaca = only({"instruction": "Add", "input": "1 2", "output": "3"}, "text", chat=False)
    assert alpaca["prompt"].endswith("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n")
    assert alpaca["completion"] == "3"
    assert only({"question": "1+1?", "answer": "2"}, "text", chat=False) == {"prompt": "1+1?\n", "completion": "2"}
    plain = only(
        {"chosen": "\n\nHuman: Q?\n\nAssistant: a", "rejected": "\n\nHuman: Q?\n\nAssistant: b"},
        "preference",
        chat=False,
    )
    assert plain == {"prompt": "\n\nHuman: Q?\n\nAssistant:", "chosen": " a", "rejected": " b"}


def test_prompts_keep_the_columns_that_rewards_read() -> None:
    assert only({"prompt": "Q", "solution": "4", "level": 3}, "prompts") == {"prompt": "Q", "solution": "4", "level": 3}
    assert only({"messages": [user("Q?"), said("A")], "answer": "4"}, "prompts") == {
        "prompt": [user("Q?")],
        "answer": "4",
    }


GOOD = {"messages": [user("Q?"), said("A")]}
WRONG = {
    "a user answers": ("preference", [{"chosen": [user("Q?"), user("good")], "rejected": [user("Q?"), user("bad")]}], "ends with a turn of the user"),
    "conversations that part early": (
        "preference",
        [{"chosen": [user("a"), said("b"), user("c"), said("d")], "rejected": [user("a"), said("x"), user("c"), said("e")]}],
        "differ before the last answer",
    ),
    "no prompt anywhere": ("preference", [{"chosen": "good", "rejected": "bad"}], "row 1: .*no common beginning, so there is no prompt"),
    "answers that are dates": ("text", [{"prompt": "a", "completion": {"day": 1}}], "completion holds no text and no turns"),
    "an unused question": ("preference", [{"riddle": "Q?", "chosen": "a", "rejected": "b"}], r"riddle would not be used.*rename: {riddle: prompt}"),
    "an unused input": ("text", [{"prompt": "Q", "completion": "A", "passage": "long"}], "passage would not be used"),
    "two answers": ("text", [{"problem": "p", "solution": "s", "answer": "a"}], "solution and answer may each be|answer and solution may each be"),
    "kto": ("text", [{"prompt": "p", "completion": "c", "label": True}], "KTO rows"),
    "kto pairs": ("preference", [{"prompt": "p", "completion": "c", "label": True}], "KTO rows"),
    "blank": ("text", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "  "}], "row 2: completion is blank"),
    "null": ("text", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], "row 2: completion is null"),
    "missing": ("text", [*[{"prompt": "a", "completion": "b"}] * 1500, {"prompt": "a"}, *[{"prompt": "a", "completion": "b"}] * 1500], "row 1501: completion is missing"),
    "half a character": ("text", [{"prompt": "a", "completion": "\ud800"}], "row 1: completion has half of a surrogate pair"),
    "a boolean": ("text", [{"prompt": "a", "completion": True}], "the boolean true"),
    "a role": ("text", [GOOD, {"messages": [user("Q?"), {"role": "wizard", "content": "A"}]}], "row 2: .*the role 'wizard'"),
    "no answer": ("text", [GOOD, {"messages": [user("Q?")]}], "row 2: .*no answer of an assistant"),
    "a blank answer": ("text", [GOOD, {"messages": [user("Q?"), said(" ")]}], r"row 2: the answer in messages\[1\] is blank"),
    "an image": ("text", [{"messages": [{"role": "user", "content": [{"type": "image"}]}, said("A")]}], "a part of type 'image'"),
    "turns not to be trained on": ("text", [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "weight": 0}]}], "marked not to be trained on"),
    "an answer of weight 0.0, as a file writes it": ("text", [{"messages": [user("Q"), {**said("A"), "weight": Number("0.0")}]}], "marked not to be trained on"),
    "a weight between": ("text", [{"messages": [user("Q"), {**said("A"), "weight": Number("0.5")}]}], "weight 0.5; only 0 and 1"),
    "questions not to be trained on": ("text", [{"messages": [{**user("Q"), "weight": 0}, said("A")]}], "row 1: turns that are not answers.*assistant_only_loss: true"),
    "pictures": ("text", [{**GOOD, "images": []}, {**GOOD, "images": ["a.png"]}], "row 2: images would not be used"),
    "pictures of a pair": ("preference", [{"prompt": "Q", "chosen": "a", "rejected": "b", "images": ["a.png"]}], "row 1: images would not be used"),
    "tools beside a question": ("text", [{"question": "Q", "answer": "A", "tools": [{"type": "function"}]}], "row 1: tools would not be used"),
    "tools that are not JSON": ("text", [{**GOOD, "tools": "f"}], "row 1: tools is not JSON"),
    "tools that are not objects": ("text", [{**GOOD, "tools": "[1]"}], "row 1: tools is not a list of objects"),
    "a user inside the answer": ("text", [{"prompt": [user("Q")], "completion": [said("A"), user("Q2"), said("B")]}], "row 1: completion has a turn of the user"),
    "two forms": ("text", [{"prompt": "a", "completion": "b"}, {"prompt": [user("a")], "completion": [said("b")]}], "row 1 and row 2 differ"),
    "nothing": ("text", [{"foo": "a"}], "needs messages, or a question and an answer, or text; the columns are foo"),
    "many at once": ("text", [{"prompt": "a", "completion": ""}] * 3 + [{"prompt": "a"}], r"row 1 \(and 2 more rows\): completion is blank(.|\n)*row 4: completion is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_refused_with_its_place(name: str) -> None:
    kind, rows, wanted = WRONG[name]
    _, wrong = normalised(rows, kind)
    import re

    assert re.search(wanted, "\n".join(wrong)), wrong


def test_selecting_columns_leaves_others_out() -> None:
    done, wrong = normalised([{"riddle": "Q?", "chosen": "a b", "rejected": "a c"}], "preference", selected=True)
    assert wrong == []
    assert done.rows == [{"prompt": "a", "chosen": " b", "rejected": " c"}]


def test_pairs_without_a_difference_are_counted_and_left_out() -> None:
    rows = [
        {"prompt": "Q", "chosen": "same", "rejected": "same"},
        {"prompt": "Q", "chosen": "blue", "rejected": "blue and vast"},
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
    ]
    done, wrong = normalised(rows, "preference")
    assert wrong == []
    assert len(done.rows) == 2
    assert done.notes.lines() == [
        "1 pairs have equal answers and are left out",
        "in 1 pairs one answer is the beginning of the other",
    ]
    _, wrong = normalised(rows[:1], "preference")
    assert "all pairs have equal answers" in wrong[0]


def test_a_turn_after_the_last_answer_is_left_out_and_counted() -> None:
    ends = [user("Q"), said("A"), user("Q2")]
    done, wrong = normalised([{"messages": ends[:2]}, {"messages": ends}, {"messages": ends}], "text")
    assert not wrong
    assert done.rows == [{"messages": ends[:2]}] * 3
    assert done.notes.lines() == ["row 2 and 1 more rows end with a turn that has no answer; such turns are left out"]
    _, wrong = normalised([{"messages": ends[:2]}, {"messages": [*ends, user("Q3")]}], "text")
    assert wrong == ["data: row 2: 2 turns follow the last answer; correct or remove such rows"]


def test_only_a_turn_that_begins_with_assistant_begins_an_answer() -> None:
    row = {"chosen": "\n\nHuman: Q\n\nAssistant: say Assistant: hi", "rejected": "\n\nHuman: Q\n\nAssistant: no"}
    assert only(row, "preference") == {
        "prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " say Assistant: hi", "rejected": " no",
    }  # fmt: skip


def test_numbers_beside_pairs_are_not_taken_for_questions() -> None:
    row = {"chosen": [user("Q?"), said("good")], "rejected": [user("Q?"), said("bad")], "chosen_rating": Number("5")}
    assert only(row, "preference") == PAIR


def test_turns_in_one_object_and_questions_in_front_of_the_answer() -> None:
    wanted = {"prompt": [user("Q")], "completion": [said("A")]}
    assert only({"prompt": user("Q"), "completion": said("A")}, "text") == wanted
    assert only({"prompt": [user("Q")], "completion": [user("Q2"), said("A")]}, "text") == {
        **wanted, "prompt": [user("Q"), user("Q2")],
    }  # fmt: skip


def test_a_function_call_of_the_old_form_is_a_tool_call() -> None:
    call = {"name": "f", "arguments": "{}"}
    row = {"messages": [user("Q"), {"role": "assistant", "content": None, "function_call": call}]}
    assert only(row, "text")["messages"][1]["tool_calls"] == [{"type": "function", "function": call}]
