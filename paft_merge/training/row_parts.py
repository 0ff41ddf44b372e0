"""The parts of a row: texts, turns, system prompts, contexts and histories, each checked as it is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from paft_merge.training.row_files import Row, native

Turn = dict[str, Any]

ROLES = {
    "system": "system", "developer": "developer",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "ai": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "tool_response": "tool", "ipython": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
"""Roles of turns, in lower case, and the role of a chat template that each means."""

ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)
"""The prompt of the Alpaca data set, for instructions on a base without a chat template."""


class RowError(ValueError):
    """What is wrong with one row, and how to fix it."""

    def __init__(self, what: str, fix: str = "correct or remove such rows") -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def text_in(row: Mapping[str, Any], name: str) -> str:
    """The text in a column; raises RowError when it is missing, blank or not a text."""
    value = row.get(name)
    if value is None:
        raise RowError(f"{name} is {'null' if name in row else 'missing'}")
    text = content_of(value, name)
    if not text.strip():
        raise RowError(f"{name} is blank")
    return text


def content_of(value: Any, what: str) -> str:
    """The text of a value: itself, a number as written, or the text parts of a list of parts."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise RowError(f"{what} has half of a surrogate pair, which is not a character", "write it as UTF-8 text")
        return str(value)
    if isinstance(value, bool):
        raise RowError(f"{what} is the boolean {str(value).lower()}", 'write the text that is meant, for example "yes"')
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        other = next((part["type"] for part in value if part["type"] != "text"), None)
        if other is not None:
            raise RowError(f"{what} has a part of type {other!r}; only text can be trained on")
        return "".join(str(part.get("text") or "") for part in value)
    raise RowError(f"{what} is {_named(value)}, not a text")


def _named(value: Any) -> str:
    return {"NoneType": "null", "dict": "an object", "list": "a list"}.get(type(value).__name__, type(value).__name__)


def turn_of(role: str, content: str) -> Turn:
    """A turn of a conversation."""
    return {"role": role, "content": content}


def turns_in(row: Mapping[str, Any], name: str) -> list[Turn]:
    """The turns in a column: roles and contents under the names of chat templates."""
    return [_one_turn(turn, f"{name}[{i}]") for i, turn in enumerate(_given_turns(row, name))]


def _given_turns(row: Mapping[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    if value is None or value == []:
        raise RowError(f"{name} is {'empty' if value == [] else 'null' if name in row else 'missing'}")
    if isinstance(value, str):
        value = _parsed(value, name)
    return [value] if isinstance(value, dict) else value


def _parsed(text: str, name: str) -> Any:
    """Turns that are written as JSON in a text, as .csv files hold them."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} is a text, not turns with role and content", "write all rows in one form")
    return value


_MARKS = ("weight", "train", "loss")
"""Keys of a turn that say whether it is trained on."""

_CARRIED = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


def _one_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} is {_named(turn)}, not a turn with role and content")
    given = str(turn.get("role") or turn.get("from") or "").strip()
    role = ROLES.get(given.lower())
    if role is None:
        raise RowError(f"{where} has the role {given!r}", f"use one of {', '.join(dict.fromkeys(ROLES.values()))}")
    for key in _MARKS:
        mark = native(turn.get(key))
        if mark is not None and mark not in (0, 1, "0", "1"):
            raise RowError(f"{where} has {key} {mark}; only 0 and 1 are supported")
        if mark in (0, "0") and role == "assistant":
            fix = "use prompt, which has no loss, and completion"
            raise RowError(f"{where} is an answer that is marked not to be trained on", fix)
    made = {"role": role, **{key: native(turn[key]) for key in _CARRIED if turn.get(key)}}
    content = turn.get("content", turn.get("value"))
    if isinstance(turn.get("function_call"), Mapping):  # of OpenAI's first API for tools
        made["tool_calls"] = _tool_calls(turn["function_call"], where)
    if given.lower() in ("function_call", "tool_call"):
        made["tool_calls"], content = _tool_calls(content, where), None
    if content is None and not made.get("tool_calls"):
        raise RowError(f"the content of {where} is null")
    text = "" if content is None else content_of(content, f"the content of {where}")
    if not text.strip() and role == "assistant" and not made.get("tool_calls"):
        raise RowError(f"the answer in {where} is blank")
    return {"role": made.pop("role"), "content": text, **made}


def _tool_calls(content: Any, where: str) -> list[dict[str, Any]]:
    """The calls in a turn of ShareGPT's role `function_call`: JSON with `name` and `arguments`, or a list of such."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RowError(f"{where} is a function call that is not JSON with name and arguments")
    return [
        {"type": "function", "function": {"name": c["name"], "arguments": native(c.get("arguments", {}))}}
        for c in calls
    ]


def with_system(turns: list[Turn], row: Mapping[str, Any], system: str | None) -> list[Turn]:
    """`turns` behind the text of the column `system`, where the row has one and the turns do not begin with one."""
    text = row.get(system) if system else None
    if text is None or not str(text).strip() or turns[0]["role"] in ("system", "developer"):
        return turns
    return [turn_of("system", content_of(text, str(system))), *turns]


def with_context(row: Mapping[str, Any], asked: str, context: str | None) -> str:
    """A question with the text of the column `context`: `input` follows the question, other contexts precede it."""
    text = row.get(context) if context else None
    if text is None or not str(text).strip():
        return asked
    return (
        f"{asked}\n\n{content_of(text, str(context))}"
        if context == "input"
        else f"{content_of(text, str(context))}\n\n{asked}"
    )


def history_in(row: Mapping[str, Any], history: str | None) -> list[Turn]:
    """Earlier questions and answers, as LLaMA-Factory writes them: a list of pairs."""
    turns: list[Turn] = []
    for i, pair in enumerate(row.get(history) or [] if history else []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history[{i}] is not a pair of a question and an answer")
        turns += [
            turn_of("user", content_of(pair[0], f"history[{i}]")),
            turn_of("assistant", content_of(pair[1], f"history[{i}]")),
        ]
    return turns


def plain_prompt(
    row: Mapping[str, Any], asked: str, question: str, context: str | None, system: str | None, history: str | None
) -> str:
    """A prompt as text, for a tokenizer without a chat template: Alpaca's for an instruction, else the parts in order."""
    if history and row.get(history):
        raise RowError(
            "history needs a chat template", "set chat_template: chatml, or to a template that fits the base"
        )
    before = f"{content_of(row[system], system)}\n\n" if system and str(row.get(system) or "").strip() else ""
    given = str(row.get(context) or "").strip() if context else ""
    if question == "instruction":
        middle = f"### Input:\n{given}\n\n" if given else ""
        kind = ", paired with an input that provides further context" if given else ""
        return before + ALPACA.format(kind, asked, middle)
    return f"{before}{with_context(row, asked, context)}\n"


def token_ids_in(row: Row) -> Row:
    """A row of `input_ids` with `labels`, which the masks of the row make -100."""
    ids = row.get("input_ids")
    labels = ids if row.get("labels") is None else row["labels"]
    if not isinstance(ids, list) or not isinstance(labels, list) or len(ids) != len(labels) or not ids:
        raise RowError("input_ids and labels are not lists of one length")
    masks = [row[name] for name in ("completion_mask", "assistant_masks") if row.get(name) is not None]
    if any(not isinstance(mask, list) or len(mask) != len(ids) for mask in masks):
        raise RowError("input_ids and their masks are not lists of one length")
    try:
        kept = [all(int(mask[i]) for mask in masks) for i in range(len(ids))]
        return {
            "input_ids": [int(i) for i in ids],
            "labels": [int(label) if keep else -100 for label, keep in zip(labels, kept, strict=True)],
        }
    except (TypeError, ValueError):
        raise RowError("input_ids or labels hold something that is not a number") from None


def conversation_in(row: Row, name: str, system: str | None) -> Row:
    """The turns in a column as `messages`, with `ANSWERS_ONLY` if turns of others are marked not to be trained on.

    Raises RowError without an answer.
    """
    turns = with_system(turns_in(row, name), row, system)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowError(f"{name} has no answer of an assistant")
    marked = any(native(turn.get(key)) in (0, "0") for turn in _given_turns(row, name) for key in _MARKS)
    return {"messages": turns, **({ANSWERS_ONLY: True} if marked else {})}


ANSWERS_ONLY = "_answers_only"
"""A key of rows that are trained on answers only."""


def check_tools(row: Mapping[str, Any]) -> str | None:
    """The column `tools` as JSON; raises RowError unless it is a list of objects."""
    given = row.get("tools")
    try:
        tools = json.loads(given) if isinstance(given, str) and given.strip() else native(given) or None
    except ValueError:
        raise RowError("tools is not JSON", "write a JSON list of functions") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("tools is not a list of objects", "write a JSON list of functions")
    return json.dumps(tools) if tools else None


def roles_of(turns: Iterable[Turn]) -> str:
    """The roles of turns in order, for messages: `user, assistant, user`."""
    return ", ".join(turn["role"] for turn in turns)
