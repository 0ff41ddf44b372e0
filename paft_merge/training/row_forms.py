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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

from paft_merge.errors import Problems
from paft_merge.training.row_files import Number, Row
from paft_merge.training.row_parts import (
    ANSWERS_ONLY,
    RowError,
    Turn,
    check_tools,
    content_of,
    conversation_in,
    history_in,
    plain_prompt,
    text_in,
    token_ids_in,
    turn_of,
    turns_in,
    with_context,
    with_system,
)

Kind = Literal["text", "preference", "prompts"]

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

_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


@dataclass
class Notes:
    """What a user should know about the rows, besides errors."""

    equal: int = 0
    """Pairs whose answers are equal; they are left out."""
    prefixes: int = 0
    """Pairs of which one answer is the beginning of the other."""
    unanswered: list[str] = field(default_factory=list)
    """Places of conversations with one turn after their last answer; that turn is left out."""
    unused: tuple[str, ...] = ()
    """Columns of text that are not trained on."""

    def lines(self) -> list[str]:
        """A sentence for each."""
        found = []
        if self.equal:
            found.append(f"{self.equal} pairs have equal answers and are left out")
        if self.prefixes:
            found.append(f"in {self.prefixes} pairs one answer is the beginning of the other")
        if self.unanswered:
            first, more = self.unanswered[0], len(self.unanswered) - 1
            rows = f"{first} and {more} more rows end" if more else f"{first} ends"
            found.append(f"{rows} with a turn that has no answer; such turns are left out")
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
    answers_only: bool = False
    """Only answers have a loss."""


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
    answers_only: bool = False,
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
        answers_only: only answers have a loss (TRL's `assistant_only_loss`).
    """
    try:
        form = form_of(columns, kind, chat, text_column)
        form = replace(form, keeps_others=form.keeps_others or keeps_others, answers_only=answers_only)
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
            _check_left_out(row, form)
            if "tools" in form.used:
                made["tools"] = check_tools(row)
            if made.pop(ANSWERS_ONLY, False) and not form.answers_only:
                fix = "set training: {assistant_only_loss: true}, or use prompt and completion"
                raise RowError("turns that are not answers are marked not to be trained on", fix)
            if _ends_unanswered(made.get("messages", [])):
                made["messages"] = made["messages"][:-1]
                notes.unanswered.append(place)
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
    if isinstance(value, int | float | Number):
        return "scalar"
    if isinstance(value, str):
        return "text"
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
        return Form(token_ids_in, frozenset(used))
    if text_column != "text" and text_column in columns:
        return Form(lambda row: {text_column: text_in(row, text_column)}, frozenset({text_column}))
    label = columns.get("label")
    if label is not None and "completion" in columns:
        fix = "keep rows with label true, then columns: [prompt, completion]; or make pairs of chosen and rejected"
        raise RowError("a column label beside completion: these are KTO rows, some of them bad answers", fix)
    system = _one_of(columns, SYSTEMS, "system prompt")
    turns = _one_of(columns, TURNS, "conversation")
    if turns and columns[turns] != "scalar":
        used = {turns, *([system] if system else []), *({"tools", "prompt"} & columns.keys())}
        return Form(
            lambda row: conversation_in(row, turns, system), frozenset(used)
        )  # ultrachat's prompt is its first turn
    question, answer = _one_of(columns, QUESTIONS, "question"), _one_of(columns, ANSWERS, "answer")
    if question and answer:
        return _asked(columns, question, answer, system, chat)
    if "text" in columns:
        return Form(lambda row: {"text": text_in(row, "text")}, frozenset({"text"}))
    held = [name for name in (*TURNS, *QUESTIONS, *ANSWERS, "text") if columns.get(name) == "other"]
    if held:
        what = f"{' and '.join(held)} {'hold' if len(held) > 1 else 'holds'} no text and no turns in any row"
        raise RowError(what, "write one row per example, with texts")
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
        if _holds_turns(row, question) or _holds_turns(row, answer):
            prompt = (
                turns_in(row, question) if _holds_turns(row, question) else [turn_of("user", text_in(row, question))]
            )
            said = [] if _holds_turns(row, answer) else [turn_of("assistant", text_in(row, answer))]
            completion = said or turns_in(row, answer)
            if completion[-1]["role"] != "assistant":
                raise RowError(f"{answer} ends with a turn of the {completion[-1]['role']}, not with an answer")
            while completion[0]["role"] not in ("assistant", "tool"):
                prompt.append(completion.pop(0))
            if any(turn["role"] == "user" for turn in completion):
                fix = "end prompt with the last question, or use messages with training: {assistant_only_loss: true}"
                raise RowError(f"{answer} has a turn of the user", fix)
            return {"prompt": with_system(prompt, row, system), "completion": completion}
        asked, answered = text_in(row, question), text_in(row, answer)
        if plain:
            return {"prompt": asked, "completion": answered}
        if not chat:
            return {"prompt": plain_prompt(row, asked, question, context, system, history), "completion": answered}
        prompt = [*history_in(row, history), turn_of("user", with_context(row, asked, context))]
        return {"prompt": with_system(prompt, row, system), "completion": [turn_of("assistant", answered)]}

    return Form(make, used)


def _holds_turns(row: Row, name: str) -> bool:
    return isinstance(row.get(name), list | dict)


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
        first, second = text_in(row, chosen), text_in(row, rejected)
        if turns:
            prompt = with_system(turns_in(row, turns), row, system)
            return _pair(prompt, [turn_of("assistant", first)], [turn_of("assistant", second)])
        if question is None:
            before = content_of(row[system], system) if system and str(row.get(system) or "").strip() else ""
            return _pair_of_transcripts(first, second, before)
        if isinstance(row.get(question), list):
            prompt = with_system(turns_in(row, question), row, system)
            return _pair(prompt, [turn_of("assistant", first)], [turn_of("assistant", second)])
        asked = text_in(row, question)
        if first.startswith(asked) and second.startswith(asked):
            first, second = first[len(asked) :], second[len(asked) :]
        if (question == "prompt" and not (system or context)) or not chat:
            plain = question == "prompt" and not (system or context)
            text = asked if plain else plain_prompt(row, asked, question, context, system, None)
            return {"prompt": text, "chosen": first, "rejected": second}
        prompt = with_system([turn_of("user", with_context(row, asked, context))], row, system)
        return _pair(prompt, [turn_of("assistant", first)], [turn_of("assistant", second)])

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
            asked = turns_in(row, name)
            while asked and asked[-1]["role"] == "assistant":
                asked.pop()
            if not asked:
                raise RowError(f"{name} has no question")
            return {"prompt": with_system(asked, row, system)}
        text = text_in(row, name)
        if not chat or (name == "prompt" and system is None):
            return {
                "prompt": text
                if name == "prompt" and system is None
                else plain_prompt(row, text, name, context, system, None)
            }
        return {"prompt": with_system([turn_of("user", with_context(row, text, context))], row, system)}

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
    notes.unused = tuple(name for name in unused if name.strip() and held_text(columns, name))


def _check_left_out(row: Row, form: Form) -> None:
    """Raise RowError when a row has pictures, sounds or tools that its form does not use."""
    for name in ("image", "images", "video", "videos", "audio", "audios", "tools"):
        if row.get(name) and name not in form.used and not form.keeps_others:
            raise RowError(f"{name} would not be used", "remove it, or list the other columns with columns: [...]")


def held_text(columns: Mapping[str, str], name: str) -> bool:
    """Whether a column holds text that may be a question; identifiers and origins are known by their names."""
    plain = re.fullmatch(
        r"(.*_)?(id|uuid|hash|source|origin|dataset|model|lang|language|category|type|split|url|license|date|time|timestamp|topic|tag|tags|name|label)(_.*)?",
        name.lower(),
    )
    return columns[name] == "text" and plain is None


# --- pairs ---------------------------------------------------------------------------------------------------------------


def _pair(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn]) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _pair_of_turns(row: Row, pair: tuple[str, str], asked: str | None, system: str | None, context: str | None) -> Row:
    """Answers as turns, behind their conversation or alone."""
    chosen, rejected = (turns_in(row, name) for name in pair)
    for name, turns in zip(pair, (chosen, rejected), strict=True):
        if turns[-1]["role"] != "assistant":
            raise RowError(f"{name} ends with a turn of the {turns[-1]['role']}, not with an answer")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared]
    if len(chosen) - shared != 1 or len(rejected) - shared != 1:
        raise RowError("chosen and rejected differ before the last answer", "give both the same conversation before it")
    if asked is not None:
        value = row.get(asked)
        given = turns_in(row, asked) if isinstance(value, list | dict) else []
        if given and given[-1]["role"] == "assistant" and not prompt:
            raise RowError(f"{asked} ends with an answer; it should end with the question")
        if not prompt or prompt[0]["role"] == "assistant":  # the answers alone, or what follows the prompt
            prompt = [*(given or [turn_of("user", with_context(row, text_in(row, asked), context))]), *prompt]
        elif given and not _begins(prompt, given):
            raise RowError(f"{asked} is not the conversation that chosen and rejected begin with")
    if not any(turn["role"] == "user" for turn in prompt):
        raise RowError("there is no question before the answers")
    return _pair(with_system(prompt, row, system), chosen[-1:], rejected[-1:])


def _begins(prompt: list[Turn], given: list[Turn]) -> bool:
    """Whether a conversation begins with the given turns, which may lack its system prompt or end with an answer."""
    spoken = [turn for turn in prompt if turn["role"] != "system"]
    return given in (prompt[: len(given)], spoken[: len(given)]) or given[:-1] == prompt


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
        ends = [[*_TRANSCRIPT.finditer(text)][-1].end() for text in (chosen, rejected)]
        return {"prompt": system + chosen[: ends[0]], "chosen": chosen[ends[0] :], "rejected": rejected[ends[1] :]}
    end = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    while end > 0 and not chosen[end - 1].isspace():
        end -= 1  # a word that only begins alike is a part of both answers
    while end > 0 and chosen[end - 1].isspace():
        end -= 1  # and so is the space before it, as tokenizers put it
    if not end:
        fix = "name the column of the prompt with rename: {old: prompt}"
        raise RowError("chosen and rejected have no common beginning, so there is no prompt", fix)
    return {"prompt": system + chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _transcript(text: str) -> list[Turn]:
    """The turns of a transcript with `Human:` and `Assistant:`; empty when the text is not one."""
    if not _TRANSCRIPT.match(text if text.startswith("\n\n") else f"\n\n{text}"):
        return []
    parts = _TRANSCRIPT.split(text if text.startswith("\n\n") else f"\n\n{text}")[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [turn_of(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    if not turns[-1]["content"]:
        raise RowError("a transcript ends with a blank answer")
    return turns


def _ends_unanswered(turns: Sequence[Row]) -> bool:
    """Whether a turn follows the last answer.

    Raises:
        RowError: more than one does, which is a mistake in the data.
    """
    after = next((i for i, turn in enumerate(reversed(turns)) if turn["role"] == "assistant"), 0)
    if after > 1:
        raise RowError(f"{after} turns follow the last answer", "correct or remove such rows")
    return after == 1


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
