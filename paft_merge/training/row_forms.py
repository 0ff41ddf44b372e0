"""Rows in the forms that people have, turned into the forms that TRL trains on. Every row is checked.

| what a data set has | what it becomes |
|---|---|
| `messages`, or `conversations` with `from` and `value`; with `system`, `tools` | `messages` |
| `instruction`, `input`, `output` (Alpaca), `question` and `answer`, and the like; with `system`, `history` | `prompt`, `completion` |
| `prompt`, `completion`; `text`; `input_ids`, `labels` | the same |
| `chosen`, `rejected` with a prompt under any of these names, as a text, as turns, or in front of both answers | `prompt`, `chosen`, `rejected` |
| transcripts with `Human:` and `Assistant:` (Anthropic's hh-rlhf) | `prompt`, `chosen`, `rejected` as texts |

With a chat template, named columns become conversations; without one they become plain text. `prompt` and `completion` that
are texts stay texts, as in TRL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

from paft_merge.errors import Problems
from paft_merge.training.row_files import Row, native

Turn = dict[str, Any]
Kind = Literal["text", "preference", "prompts"]

ROLES = {
    "system": "system", "developer": "developer",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "ai": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "tool_response": "tool", "ipython": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
"""Roles of turns, in lower case, and the role of a chat template that each means."""

TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")
QUESTIONS = ("prompt", "instruction", "question", "query", "problem")
ANSWERS = ("completion", "output", "response", "answer", "solution")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
PAIRS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("accepted", "rejected"),
    ("preferred", "dispreferred"),
)
"""Names of columns, by what they hold. Of two names for the same thing in one data set, neither is taken."""

MEANINGFUL = {
    *TURNS,
    *QUESTIONS,
    *ANSWERS,
    *CONTEXTS,
    *SYSTEMS,
    "history",
    "tools",
    "chosen",
    "rejected",
    "passage",
    "document",
    "article",
}
"""Names of columns that are never left out without a word from the user."""

ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)
"""The prompt of the Alpaca data set, for instructions on a base without a chat template."""

_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


class RowError(ValueError):
    """What is wrong with one row, and how to fix it."""

    def __init__(self, what: str, fix: str = "correct or remove such rows") -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


@dataclass
class Notes:
    """What a user should know about the rows, besides errors."""

    equal: int = 0
    """Pairs whose answers are equal; they are left out."""
    prefixes: int = 0
    """Pairs of which one answer is the beginning of the other."""
    unused: tuple[str, ...] = ()
    """Columns of text that are not trained on."""

    def lines(self) -> list[str]:
        """A sentence for each."""
        found = []
        if self.equal:
            found.append(f"{self.equal} pairs have equal answers and are left out")
        if self.prefixes:
            found.append(f"in {self.prefixes} pairs one answer is the beginning of the other")
        if self.unused:
            found.append(f"not used: the columns {', '.join(self.unused)}")
        return found


@dataclass(frozen=True)
class Form:
    """How the rows of one data set are read."""

    make: Callable[[Row], Row]
    """A row in TRL's form; raises RowError."""
    used: frozenset[str]
    """The columns that `make` reads."""
    keeps_others: bool = False
    """Other columns stay in the rows (reward functions read them)."""


@dataclass
class Normalised:
    """Rows in TRL's form."""

    rows: list[Row] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)


def normalise(
    rows: Iterable[tuple[str, Row]],
    columns: Mapping[str, str],
    kind: Kind,
    *,
    chat: bool,
    selected: bool,
    problems: Problems,
    where: str = "data",
    keep_equal: bool = False,
) -> Normalised:
    """Bring the rows of one data set into the form that TRL trains on.

    Args:
        rows: every row with its place for messages (`row 7`, `line 12`).
        columns: the columns of the data set and what each holds (see `columns_of`).
        kind: `text` (SFT, IFT), `preference` (DPO, ORPO) or `prompts` (on-policy).
        chat: the tokenizer has a chat template.
        selected: the user listed the columns, so that others are left out on purpose.
        problems: receives everything that is wrong: DATA, one problem per cause, with the first row and the number of rows.
        where: the data set, for messages.
        keep_equal: pairs of equal answers stay.

    Returns:
        The rows without columns that are not used, and notes. Incomplete when `problems` has errors.
    """
    done = Normalised()
    form = choose_form(columns, kind, done.notes, chat=chat, selected=selected, problems=problems, where=where)
    if form is not None:
        done.rows = [row for _, row in converted(rows, form, kind, done.notes, problems, where, keep_equal)]
    return done


def choose_form(
    columns: Mapping[str, str],
    kind: Kind,
    notes: Notes,
    *,
    chat: bool,
    selected: bool,
    problems: Problems,
    where: str,
    keeps_others: bool = False,
    text_column: str = "text",
) -> Form | None:
    """The form of a data set, or None with a problem; see `normalise`.

    Args:
        columns: the columns of the data set and what each holds.
        kind: the kind of rows that are wanted.
        notes: receives the columns that are not used.
        chat: the tokenizer has a chat template.
        selected: the user listed the columns.
        problems: receives what is wrong.
        where: the data set, for messages.
        keeps_others: the rows keep the columns that are not used.
        text_column: TRL's `dataset_text_field`.
    """
    try:
        form = form_of(columns, kind, chat, text_column)
        form = replace(form, keeps_others=form.keeps_others or keeps_others)
        _check_unused(columns, form, kind, selected, notes)
    except RowError as error:
        problems.add("DATA", where, error.what, error.fix)
        return None
    return form


def converted(
    rows: Iterable[tuple[str, Row]],
    form: Form,
    kind: Kind,
    notes: Notes,
    problems: Problems,
    where: str,
    keep_equal: bool = False,
) -> Iterator[tuple[str, Row]]:
    """Convert rows one at a time, each with its place; problems are added after the last row.

    Pairs of equal answers (unless `keep_equal`), rows that are wrong, and rows of another form than the first are left out.
    """
    faults: dict[tuple[str, str], list[str]] = {}
    shape: tuple[tuple[str, bool], ...] | None = None
    first = other = ""
    some = False
    for place, row in rows:
        try:
            made = form.make(row)
        except RowError as error:
            faults.setdefault((error.what, error.fix), []).append(place)
            continue
        if kind == "preference" and not keep_equal and not _keep_pair(made, notes):
            continue
        mine = shape_of(made)
        if shape is None:
            shape, first = mine, place
        if mine != shape:
            other = other or place
            continue
        if row.get("tools") and "tools" in form.used:
            made["tools"] = row["tools"] if isinstance(row["tools"], str) else json.dumps(native(row["tools"]))
        if form.keeps_others:
            made = {**{key: value for key, value in row.items() if key not in form.used}, **made}
        some = True
        yield place, made
    for (what, fix), places in faults.items():
        more = f" (and {len(places) - 1} more rows)" if len(places) > 1 else ""
        problems.add("DATA", where, f"{places[0]}{more}: {what}", fix)
    if other and not faults:
        what = f"{first} and {other} differ: in one a column is text, in the other turns"
        problems.add("DATA", where, what, "write all rows in one form")
    if not some and not faults:
        left = "all pairs have equal answers" if notes.equal else "the data set is empty"
        problems.add("DATA", where, left, "check split and max_rows")


def shape_of(row: Row) -> tuple[tuple[str, bool], ...]:
    """The columns of a converted row that are trained on, and whether each is a text."""
    return tuple((key, isinstance(row[key], str)) for key in sorted(row) if key in _TYPED)


_TYPED = ("messages", "prompt", "completion", "chosen", "rejected", "text")


def kind_of_value(value: Any) -> str | None:
    """`text`, `turns`, `scalar` (a number or boolean) or `other`; None for null, which fits any of them."""
    if value is None:
        return None
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | float):
        return "scalar"
    first = value[0] if isinstance(value, list) and value else value
    is_turn = isinstance(first, dict) and bool({"role", "from"} & first.keys())
    return "turns" if is_turn else "other"


def columns_of(rows: Iterable[Row]) -> dict[str, str]:
    """The columns of rows and what each holds, from all of them; of several kinds the last of other, scalar, turns, text."""
    found: dict[str, str] = {}
    order = {"other": 0, "scalar": 1, "turns": 2, "text": 3}
    for row in rows:
        for name, value in row.items():
            kind = kind_of_value(value)
            if kind is None:
                found.setdefault(name, "other")
            elif order[kind] >= order[found.get(name, "other")]:
                found[name] = kind
    return found


# --- which form a data set has -------------------------------------------------------------------------------------------


def form_of(columns: Mapping[str, str], kind: Kind, chat: bool, text_column: str = "text") -> Form:
    """The form of a data set with these columns; raises RowError when it has none that `kind` can use."""
    if kind == "preference":
        return _pairs(columns, chat)
    if kind == "prompts":
        return _prompts(columns, chat)
    return _texts(columns, chat, text_column)


def _one_of(columns: Mapping[str, str], names: Iterable[str], what: str) -> str | None:
    """The only column of `columns` among `names`."""
    held = [name for name in names if columns.get(name, "other") != "other"]
    if len(held) > 1:
        fix = f"keep one: columns: [{held[0]}, ...], or rename: {{{held[0]}: ...}}"
        raise RowError(f"the columns {' and '.join(held)} may each be the {what}", fix)
    return held[0] if held else None


def _texts(columns: Mapping[str, str], chat: bool, text_column: str) -> Form:
    if "input_ids" in columns:
        used = {"input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks"}
        return Form(_token_ids, frozenset(used))
    if text_column != "text" and text_column in columns:
        return Form(lambda row: {text_column: _text(row, text_column)}, frozenset({text_column}))
    label = columns.get("label")
    if label is not None and "completion" in columns:
        fix = "keep rows with label true, then columns: [prompt, completion]; or make pairs of chosen and rejected"
        raise RowError("a column label beside completion: these are KTO rows, some of them bad answers", fix)
    system = _one_of(columns, SYSTEMS, "system prompt")
    turns = _one_of(columns, TURNS, "conversation")
    if turns and columns[turns] != "scalar":
        used = {turns, *([system] if system else []), *({"tools", "prompt"} & columns.keys())}
        return Form(
            lambda row: _conversation(row, turns, system), frozenset(used)
        )  # ultrachat's prompt is its first turn
    question, answer = _one_of(columns, QUESTIONS, "question"), _one_of(columns, ANSWERS, "answer")
    if question and answer:
        return _asked(columns, question, answer, system, chat)
    if "text" in columns:
        return Form(lambda row: {"text": _text(row, "text")}, frozenset({"text"}))
    have = ", ".join(columns) or "none"
    fix = f"{_near(columns)}name them with rename: {{old: new}}, for example rename: {{question: prompt, reply: completion}}"
    raise RowError(f"needs messages, or a question and an answer, or text; the columns are {have}", fix)


def _near(columns: Iterable[str]) -> str:
    """A question about columns whose names are nearly known ones."""
    known = [*TURNS, *QUESTIONS, *ANSWERS, "chosen", "rejected", "text"]
    near = [(one, name) for name in columns if name not in known for one in get_close_matches(name, known, 1, 0.8)]
    return "did you mean " + " and ".join(f"{one} by {name}" for one, name in near) + "? Or " if near else ""


def _asked(columns: Mapping[str, str], question: str, answer: str, system: str | None, chat: bool) -> Form:
    """A question and its answer in two columns."""
    context = _one_of(columns, CONTEXTS, "context")
    history = "history" if "history" in columns else None
    used = frozenset(name for name in (question, answer, system, context, history) if name)
    plain = question == "prompt" and answer in ("completion", "answer") and not (system or context or history)

    def make(row: Row) -> Row:
        if isinstance(row.get(question), list) or isinstance(row.get(answer), list):
            prompt, completion = _turns(row, question), _turns(row, answer)
            return {"prompt": _with_system(prompt, row, system), "completion": completion}
        asked, said = _text(row, question), _text(row, answer)
        if plain:
            return {"prompt": asked, "completion": said}
        if not chat:
            return {"prompt": _plain_prompt(row, asked, question, context, system, history), "completion": said}
        prompt = [*_history(row, history), _turn("user", _with_context(row, asked, context))]
        return {"prompt": _with_system(prompt, row, system), "completion": [_turn("assistant", said)]}

    return Form(make, used)


def _pairs(columns: Mapping[str, str], chat: bool) -> Form:
    pair = next((names for names in PAIRS if all(name in columns for name in names)), None)
    if pair is None:
        fix = f"{_near(columns)}name them with rename: {{old: new}}, for example rename: {{better: chosen, worse: rejected}}"
        kto = "; these are KTO rows, which hold one answer each" if {"completion", "label"} <= columns.keys() else ""
        raise RowError(f"needs chosen and rejected; the columns are {', '.join(columns)}{kto}", fix)
    chosen, rejected = pair
    system, context = _one_of(columns, SYSTEMS, "system prompt"), _one_of(columns, CONTEXTS, "context")
    question = _one_of(columns, QUESTIONS, "question")
    lists = columns[chosen] == "turns"
    turns = (
        None
        if question or (lists and context is None and _is_whole(columns))
        else _one_of(columns, TURNS, "conversation")
    )
    if question is None and context is not None and turns is None and not lists:
        question, context = context, None
    used = {name for name in (*pair, question, turns, system, context) if name} | {"tools"} & columns.keys()
    if question or turns:
        used |= {name for name in TURNS if name in columns and (lists or name == turns)}  # copies of the chosen answer

    def make(row: Row) -> Row:
        answers = [row.get(chosen), row.get(rejected)]
        if any(isinstance(answer, list | dict) for answer in answers):
            return _pair_of_turns(row, pair, question or turns, system, context)
        first, second = _text(row, chosen), _text(row, rejected)
        if turns:
            prompt = _with_system(_turns(row, turns), row, system)
            return _pair(prompt, [_turn("assistant", first)], [_turn("assistant", second)])
        if question is None:
            before = _content(row[system], system) if system and str(row.get(system) or "").strip() else ""
            return _pair_of_transcripts(first, second, before)
        if isinstance(row.get(question), list):
            prompt = _with_system(_turns(row, question), row, system)
            return _pair(prompt, [_turn("assistant", first)], [_turn("assistant", second)])
        asked = _text(row, question)
        if first.startswith(asked) and second.startswith(asked):
            first, second = first[len(asked) :], second[len(asked) :]
        if (question == "prompt" and not (system or context)) or not chat:
            plain = question == "prompt" and not (system or context)
            text = asked if plain else _plain_prompt(row, asked, question, context, system, None)
            return {"prompt": text, "chosen": first, "rejected": second}
        prompt = _with_system([_turn("user", _with_context(row, asked, context))], row, system)
        return _pair(prompt, [_turn("assistant", first)], [_turn("assistant", second)])

    return Form(make, frozenset(used))


def _is_whole(columns: Mapping[str, str]) -> bool:
    """Whether turns of chosen and rejected may hold the question themselves: no other column holds a conversation."""
    return not any(columns.get(name) == "turns" for name in TURNS)


def _prompts(columns: Mapping[str, str], chat: bool) -> Form:
    question = _one_of(columns, QUESTIONS, "question")
    turns = None if question else _one_of(columns, TURNS, "conversation")
    system = _one_of(columns, SYSTEMS, "system prompt")
    context = _one_of(columns, CONTEXTS, "context") if question != "prompt" else None
    name = question or turns
    if name is None:
        fix = "name it with rename: {old: prompt}"
        raise RowError(f"needs a prompt; the columns are {', '.join(columns)}", fix)

    def make(row: Row) -> Row:
        if isinstance(row.get(name), list):
            asked = _turns(row, name)
            while asked and asked[-1]["role"] == "assistant":
                asked.pop()
            if not asked:
                raise RowError(f"{name} has no question")
            return {"prompt": _with_system(asked, row, system)}
        text = _text(row, name)
        if not chat or (name == "prompt" and system is None):
            return {
                "prompt": text
                if name == "prompt" and system is None
                else _plain_prompt(row, text, name, context, system, None)
            }
        return {"prompt": _with_system([_turn("user", _with_context(row, text, context))], row, system)}

    return Form(make, frozenset(used for used in (name, system, context) if used), keeps_others=True)


def _check_unused(columns: Mapping[str, str], form: Form, kind: Kind, selected: bool, notes: Notes) -> None:
    """Columns of text that are not used: an error where they may hold a part of the lesson, else a note."""
    if form.keeps_others:
        return
    unused = [name for name, held in columns.items() if name not in form.used and held in ("text", "turns")]
    no_question = kind == "preference" and not form.used & {*QUESTIONS, *TURNS}
    wrong = [name for name in unused if name.lower() in MEANINGFUL or (no_question and held_text(columns, name))]
    if wrong and not selected:
        keep = ", ".join(sorted(form.used))
        fix = f"write columns: [{keep}] to leave them out" + (
            f", or rename: {{{wrong[0]}: prompt}} to use it as the question" if no_question else ""
        )
        raise RowError(f"the columns {', '.join(wrong)} would not be used", fix)
    notes.unused = tuple(name for name in unused if held_text(columns, name))


def held_text(columns: Mapping[str, str], name: str) -> bool:
    """Whether a column holds text that may be a question; identifiers and origins are known by their names."""
    plain = re.fullmatch(
        r"(.*_)?(id|uuid|hash|source|origin|dataset|model|lang|language|category|type|split|url|license|date|time|timestamp|topic|tag|tags|name|label)(_.*)?",
        name.lower(),
    )
    return columns[name] == "text" and plain is None


# --- the parts of a row --------------------------------------------------------------------------------------------------


def _text(row: Mapping[str, Any], name: str) -> str:
    """The text in a column; raises RowError when it is missing, blank or not a text."""
    value = row.get(name)
    if value is None:
        raise RowError(f"{name} is {'null' if name in row else 'missing'}")
    text = _content(value, name)
    if not text.strip():
        raise RowError(f"{name} is blank")
    return text


def _content(value: Any, what: str) -> str:
    """The text of a value: itself, a number as written, or the text parts of a list of parts."""
    if isinstance(value, str):
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


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _turns(row: Mapping[str, Any], name: str) -> list[Turn]:
    """The turns in a column: roles and contents under the names of chat templates."""
    value = row.get(name)
    if value is None or value == []:
        raise RowError(f"{name} is {'empty' if value == [] else 'null' if name in row else 'missing'}")
    if isinstance(value, str):
        value = _parsed(value, name)
    return [_one_turn(turn, f"{name}[{i}]") for i, turn in enumerate([value] if isinstance(value, dict) else value)]


def _parsed(text: str, name: str) -> Any:
    """Turns that are written as JSON in a text, as .csv files hold them."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} is a text, not turns with role and content", "write all rows in one form")
    return value


_CARRIED = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


def _one_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} is {_named(turn)}, not a turn with role and content")
    given = str(turn.get("role") or turn.get("from") or "").strip()
    role = ROLES.get(given.lower())
    if role is None:
        raise RowError(f"{where} has the role {given!r}", f"use one of {', '.join(dict.fromkeys(ROLES.values()))}")
    if any(key in turn and turn[key] in (0, False, "0") for key in ("weight", "train", "loss")):
        raise RowError(
            f"{where} is marked not to be trained on", "use prompt and completion, or training.assistant_only_loss"
        )
    made = {"role": role, **{key: native(turn[key]) for key in _CARRIED if turn.get(key)}}
    content = turn.get("content", turn.get("value"))
    if given.lower() in ("function_call", "tool_call"):
        made["tool_calls"], content = _tool_calls(content, where), None
    if content is None and not made.get("tool_calls"):
        raise RowError(f"the content of {where} is null")
    text = "" if content is None else _content(content, f"the content of {where}")
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


def _with_system(turns: list[Turn], row: Mapping[str, Any], system: str | None) -> list[Turn]:
    """`turns` behind the text of the column `system`, where the row has one and the turns do not begin with one."""
    text = row.get(system) if system else None
    if text is None or not str(text).strip() or turns[0]["role"] in ("system", "developer"):
        return turns
    return [_turn("system", _content(text, str(system))), *turns]


def _with_context(row: Mapping[str, Any], asked: str, context: str | None) -> str:
    text = row.get(context) if context else None
    if text is None or not str(text).strip():
        return asked
    return (
        f"{asked}\n\n{_content(text, str(context))}"
        if context == "input"
        else f"{_content(text, str(context))}\n\n{asked}"
    )


def _history(row: Mapping[str, Any], history: str | None) -> list[Turn]:
    """Earlier questions and answers, as LLaMA-Factory writes them: a list of pairs."""
    turns: list[Turn] = []
    for i, pair in enumerate(row.get(history) or [] if history else []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history[{i}] is not a pair of a question and an answer")
        turns += [
            _turn("user", _content(pair[0], f"history[{i}]")),
            _turn("assistant", _content(pair[1], f"history[{i}]")),
        ]
    return turns


def _plain_prompt(
    row: Mapping[str, Any], asked: str, question: str, context: str | None, system: str | None, history: str | None
) -> str:
    """A prompt as text, for a tokenizer without a chat template: Alpaca's for an instruction, else the parts in order."""
    if history and row.get(history):
        raise RowError(
            "history needs a chat template", "set chat_template: chatml, or to a template that fits the base"
        )
    before = f"{_content(row[system], system)}\n\n" if system and str(row.get(system) or "").strip() else ""
    given = str(row.get(context) or "").strip() if context else ""
    if question == "instruction":
        middle = f"### Input:\n{given}\n\n" if given else ""
        kind = ", paired with an input that provides further context" if given else ""
        return before + ALPACA.format(kind, asked, middle)
    return f"{before}{_with_context(row, asked, context)}\n"


def _token_ids(row: Row) -> Row:
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


def _conversation(row: Row, name: str, system: str | None) -> Row:
    turns = _with_system(_turns(row, name), row, system)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowError(f"{name} has no answer of an assistant")
    return {"messages": turns}


# --- pairs ---------------------------------------------------------------------------------------------------------------


def _pair(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn]) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _pair_of_turns(row: Row, pair: tuple[str, str], asked: str | None, system: str | None, context: str | None) -> Row:
    """Answers as turns, behind their conversation or alone."""
    chosen, rejected = (_turns(row, name) for name in pair)
    for name, turns in zip(pair, (chosen, rejected), strict=True):
        if turns[-1]["role"] != "assistant":
            raise RowError(f"{name} ends with a turn of the {turns[-1]['role']}, not with an answer")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared]
    if len(chosen) - shared != 1 or len(rejected) - shared != 1:
        raise RowError("chosen and rejected differ before the last answer", "give both the same conversation before it")
    if asked is not None and not prompt:
        value = row.get(asked)
        if isinstance(value, list | dict):
            prompt = _turns(row, asked)
            if prompt[-1]["role"] == "assistant":
                raise RowError(f"{asked} ends with an answer; it should end with the question")
        else:
            prompt = [_turn("user", _with_context(row, _text(row, asked), context))]
    elif asked is not None and isinstance(row.get(asked), list):
        given = _turns(row, asked)
        if (
            given != prompt[: len(given)]
            and given != [t for t in prompt if t["role"] != "system"]
            and given[:-1] != prompt
        ):
            raise RowError(f"{asked} is not the conversation that chosen and rejected begin with")
    if not any(turn["role"] == "user" for turn in prompt):
        raise RowError("there is no question before the answers")
    return _pair(_with_system(prompt, row, system), chosen[-1:], rejected[-1:])


def _pair_of_transcripts(chosen: str, rejected: str, system: str) -> Row:
    """Answers as texts that begin with their conversation: hh-rlhf's transcripts, or any text that both share."""
    parts = _transcript(chosen), _transcript(rejected)
    if all(parts):
        first, second = parts
        if first[:-1] != second[:-1]:
            raise RowError(
                "chosen and rejected differ before the last answer", "give both the same conversation before it"
            )
        if first[-1]["role"] != "assistant" or second[-1]["role"] != "assistant":
            raise RowError("a transcript does not end with an answer")
        ends = [text.rindex("Assistant:") + len("Assistant:") for text in (chosen, rejected)]
        return {"prompt": system + chosen[: ends[0]], "chosen": chosen[ends[0] :], "rejected": rejected[ends[1] :]}
    end = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    while end > 0 and not chosen[end - 1].isspace():
        end -= 1  # a word that only begins alike is a part of both answers
    while end > 0 and chosen[end - 1].isspace():
        end -= 1  # and so is the space before it, as tokenizers put it
    return {"prompt": system + chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _transcript(text: str) -> list[Turn]:
    """The turns of a transcript with `Human:` and `Assistant:`; empty when the text is not one."""
    if not _TRANSCRIPT.match(text if text.startswith("\n\n") else f"\n\n{text}"):
        return []
    parts = _TRANSCRIPT.split(text if text.startswith("\n\n") else f"\n\n{text}")[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [_turn(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    if not turns[-1]["content"]:
        raise RowError("a transcript ends with a blank answer")
    return turns


def _keep_pair(row: Row, notes: Notes) -> bool:
    """Count pairs without a difference, which are left out, and pairs of which one answer begins the other."""
    first, second = (_said(row[name]) for name in ("chosen", "rejected"))
    if not first.strip() or not second.strip():
        notes.prefixes += first.strip() != second.strip()
        notes.equal += first.strip() == second.strip()
        return first.strip() != second.strip()
    if first.strip() == second.strip():
        notes.equal += 1
        return False
    notes.prefixes += first.startswith(second) or second.startswith(first)
    return True


def _said(answer: Any) -> str:
    return answer if isinstance(answer, str) else json.dumps([dict(turn) for turn in answer])[:-3]


def roles_of(turns: Iterable[Turn]) -> str:
    """The roles of turns in order, for messages: `user, assistant, user`."""
    return ", ".join(turn["role"] for turn in turns)
