"""Checks of rows with the tokenizer, before training: every row is rendered and tokenised as TRL will do it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paft_merge.errors import Problems, TrainError
from paft_merge.training.child_process import in_child
from paft_merge.training.data import PLACE, Loaded, has_turns, kind_of
from paft_merge.training.rendering import LONG, TRUSTED, add_refusals, attempted, within_limits
from paft_merge.training.row_files import Row
from paft_merge.training.schema import AdapterSpec

_BATCH = 500
"""Rows that are tokenised at once."""


@dataclass
class TokenCounts:
    """What a data set is in tokens."""

    facts: dict[str, int] = field(default_factory=dict)
    """`rows_looked_at`, `rows_cut`, `longest_tokens`, `max_length` and `rows_without_answer`; empty without a limit."""
    labels: NDArray[np.bool_] | None = None
    """The token ids that have a label in any row."""
    notes: list[str] = field(default_factory=list)
    """What is unusual, one sentence each."""


class _Sequence(NamedTuple):
    """One sequence of a row, as text."""

    prompt: str | None
    """The text in front of the first answer; None where every token has a label."""
    whole: str
    chat: bool
    """The chat template has written the special tokens."""


_Rendered = tuple[str, list[_Sequence], str]
"""The place of a row, its sequences, and why the chat template refuses it (empty if it does not)."""


def check_tokens(
    loaded: Loaded, spec: AdapterSpec, tokenizer: Any, arguments: Any, problems: Problems, what: str = "data"
) -> TokenCounts:
    """Tokenise every row.

    Args:
        loaded: The rows.
        spec: The adapter's section.
        tokenizer: The base's, with the adapter's chat template.
        arguments: The TRL config.
        problems: Receives what is wrong: TEMPLATE for rows that the chat template refuses, DATA for answers whose first
            token begins in the prompt, and when no answer is left within `max_length`.
        what: Name of the data set in messages.
    """
    if not _can_start(loaded, spec, tokenizer, problems, what):
        return TokenCounts()
    if "input_ids" in loaded.rows.column_names:
        return _given_ids(loaded, tokenizer, arguments)
    found, refused, joined = _Found(arguments, len(tokenizer)), dict[str, list[str]](), list[tuple[str, str, str]]()
    with problems.catching():
        for batch in rendered(loaded, spec, tokenizer):
            for place, _, why in batch:
                if why:
                    refused.setdefault(why, []).append(place)
            _tokenise(batch, tokenizer, found, joined)
    add_refusals(refused, loaded.where, problems)
    if joined:
        place, end, token = joined[0]
        more = f" (and {len(joined) - 1} more rows)" if len(joined) > 1 else ""
        fix = "begin the answers with a space or newline, or end the prompts with a newline"
        text = f"{place}{more}: the prompt's end {end!r} and the answer's beginning are one token {token!r}"
        problems.add("DATA", loaded.where, text, fix)
    if found.rows and found.empty == found.rows and found.limit:
        fix = "raise training.max_length, or set max_prompt_tokens"
        problems.add("DATA", what, f"no row has a token of an answer within max_length {found.limit}", fix)
    return found.counts(what)


def _can_start(loaded: Loaded, spec: AdapterSpec, tokenizer: Any, problems: Problems, what: str) -> bool:
    """Check what holds for all rows alike."""
    before, names = len(problems.found), loaded.rows.column_names
    first = loaded.rows[0]
    turns = has_turns(first)
    if turns and not tokenizer.chat_template:
        problems.add(
            "TEMPLATE", what, "the rows are conversations, but the tokenizer has no chat template",
            "set chat_template: to a name such as chatml, a Jinja file, or a model whose template fits",
        )  # fmt: skip
    if spec.training.get("assistant_only_loss") and not turns:
        problems.add("DATA", what, "training.assistant_only_loss needs conversations", "drop it, or use messages")
    if spec.objective == "ift" and spec.training.get("packing"):
        problems.add(
            "DATA", what, "ift weights tokens per sequence and does not support packing", "drop training.packing"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        problems.add("TEMPLATE", "tokenizer", "has neither a pad nor an eos token", "use a tokenizer that has one")
    elif tokenizer.eos_token is None and not turns and "input_ids" not in names and kind_of(spec) != "prompts":
        what = "has no eos token, which ends texts and answers"
        problems.add("TEMPLATE", "tokenizer", what, "use a tokenizer that has one")
    return len(problems.found) == before


class _Found:
    """Sums over rows."""

    def __init__(self, arguments: Any, vocabulary: int) -> None:
        uncut = getattr(arguments, "packing", False) and arguments.packing_strategy != "bfd"  # bfd cuts
        self.limit = None if uncut else getattr(arguments, "max_length", None)
        self.from_end = getattr(arguments, "truncation_mode", "keep_start") == "keep_end"
        self.labels = np.zeros(vocabulary, dtype=bool)
        self.rows = self.cut = self.empty = self.longest = self.spaces = self.other_prompt = 0

    def add(self, sequences: Sequence[tuple[int, list[int]]]) -> None:
        """Count one row, given where the answer of each sequence begins and its token ids."""
        lengths = [len(ids) for _, ids in sequences]
        self.rows += 1
        self.longest = max([self.longest, *lengths])
        self.cut += self.limit is not None and any(length > self.limit for length in lengths)
        left = 0
        for start, ids in sequences:
            skipped = max(0, len(ids) - self.limit) if self.limit and self.from_end else 0
            kept = np.asarray(ids[max(start, skipped) : None if self.from_end else self.limit], dtype=np.int64)
            left += len(kept)
            if len(kept) and kept.max() >= len(self.labels):
                self.labels = np.concatenate([self.labels, np.zeros(int(kept.max()) + 1 - len(self.labels), bool)])
            self.labels[kept] = True
        self.empty += not left

    def counts(self, what: str) -> TokenCounts:
        """The sums as facts and sentences."""
        done, of = TokenCounts(labels=self.labels), "" if what == "data" else f"{what}: "
        if self.limit is not None:
            done.facts = {
                "rows_looked_at": self.rows,
                "rows_cut": self.cut,
                "longest_tokens": self.longest,
                "max_length": self.limit,
                "rows_without_answer": self.empty,
            }
        if self.limit is not None and self.cut:
            done.notes.append(
                f"{of}{self.cut} of {self.rows} rows looked at are longer than max_length {self.limit} and will be cut "
                f"(the longest has {self.longest} tokens)"
            )
        if self.empty:
            done.notes.append(
                f"{of}{self.empty} of {self.rows} rows have no token of an answer within max_length and are left out"
            )
        if self.spaces:
            done.notes.append(
                f"{of}in {self.spaces} rows the space at the end of the prompt becomes a part of the answer's first token; "
                "generate with prompts that do not end with a space, or move it to the beginning of the answers"
            )
        if self.other_prompt:
            done.notes.append(
                f"{of}in {self.other_prompt} rows the chat template writes the end of the prompt in another way when an "
                "answer follows; the answer is trained from where they differ"
            )
        return done


def _given_ids(loaded: Loaded, tokenizer: Any, arguments: Any) -> TokenCounts:
    """Counts of rows that are token ids already."""
    found = _Found(arguments, len(tokenizer))
    for batch in loaded.rows.iter(batch_size=_BATCH):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            start = next((i for i, label in enumerate(labels) if label != -100), len(ids))
            found.add([(start, ids)])
    return found.counts("data")


def rendered(loaded: Loaded, spec: AdapterSpec, tokenizer: Any) -> Iterator[list[_Rendered]]:
    """The rows as text, in batches.

    Conversations are rendered in a child process, because the base's chat template may run forever or fill the memory.

    Raises:
        TrainError: TEMPLATE, the template takes too long or too much memory.
    """
    rows, current = loaded.rows, mmap(-1, 8)  # a child process shares this memory
    if not has_turns(rows[0]):
        yield from _batches(rows, spec, tokenizer, current)
        return
    with within_limits(TrainError, loaded.where, lambda: rows[int.from_bytes(current[:], "little")][PLACE], TRUSTED):
        yield from in_child(lambda: _batches(rows, spec, tokenizer, current))


def _batches(rows: Any, spec: AdapterSpec, tokenizer: Any, current: mmap) -> Iterator[list[_Rendered]]:
    """Batches of at most `_BATCH` rows and about `LONG` characters, or of the rows of a second.

    `current` receives the number of the row that is rendered, from 0.
    """
    found, size, due, number = list[_Rendered](), 0, time.monotonic() + 1, 0
    for batch in rows.iter(batch_size=_BATCH):
        for values in zip(*batch.values(), strict=True):
            current[:] = number.to_bytes(8, "little")
            number += 1
            found.append(_sequences_of(dict(zip(batch, values, strict=True)), spec, tokenizer))
            size += sum(len(one.whole) for one in found[-1][1])
            if len(found) == _BATCH or size > LONG or time.monotonic() > due:
                yield found
                found, size, due = [], 0, time.monotonic() + 1
    if found:
        yield found


def _sequences_of(row: Row, spec: AdapterSpec, tokenizer: Any) -> _Rendered:
    """A row as text, or why the template refuses it."""
    made, why = attempted(lambda: list(_sequences(row, spec, tokenizer)), row, _longest)
    return row[PLACE], made or [], why


def _longest(sequences: list[_Sequence]) -> int:
    return max(len(one.whole) for one in sequences)


def _sequences(row: Row, spec: AdapterSpec, tokenizer: Any) -> Iterator[_Sequence]:
    """The sequences that TRL makes of a row, as text."""
    end = tokenizer.eos_token

    def ended(text: str) -> str:
        return text if text.endswith(end) else text + end

    more = json.loads(row["tools"]) if row.get("tools") else None

    def render(turns: Any, answer_next: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(
            [{k: v for k, v in turn.items() if v is not None} for turn in turns],
            tools=more, tokenize=False, add_generation_prompt=answer_next,
        )  # fmt: skip
        return text

    if "messages" in row:
        before = None
        if spec.training.get("assistant_only_loss"):
            first = next(i for i, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
            before = render(row["messages"][:first], answer_next=True) if first else ""
        yield _Sequence(before, render(row["messages"]), chat=True)
        return
    answers = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    asked = row.get("prompt")
    if asked is None:
        text = row[spec.training.get("dataset_text_field", "text")]
        yield _Sequence(None, ended(text), chat=False)
        return
    if isinstance(asked, str):
        if not answers:
            yield _Sequence(None, asked, chat=False)
        for answer in answers:
            yield _Sequence(asked, asked + ended(answer), chat=False)
        return
    prompt = render(asked, answer_next=True)
    if not answers:
        yield _Sequence(None, prompt, chat=True)
    for answer in answers:
        yield _Sequence(prompt, render([*asked, *answer]), chat=True)


def _tokenise(rows: Sequence[_Rendered], tokenizer: Any, found: _Found, joined: list[tuple[str, str, str]]) -> None:
    """Tokenise the sequences of some rows and count them."""
    ids: dict[tuple[str, bool], list[int]] = {}
    for chat in (False, True):
        mine = [one for _, sequences, _ in rows for one in sequences if one.chat is chat]
        texts = list({text: None for one in mine for text in (one.prompt, one.whole) if text})
        ids |= {(text, chat): of for text, of in zip(texts, _encoded(tokenizer, texts, not chat), strict=True)}
    for place, sequences, why in rows:
        if why:
            continue
        counted = []
        spaces = other = False
        for one in sequences:
            asked, whole = ids.get((one.prompt or "", one.chat), []), ids.get((one.whole, one.chat), [])
            start = _common(asked, whole)
            counted.append((start, whole))
            if start == len(asked):
                continue
            if one.chat:
                other = True
                continue
            left = tokenizer.decode(asked[start:])
            if left.strip():
                joined.append((place, left, tokenizer.decode(whole[start : start + 1])))
                break
            spaces = True
        found.spaces += spaces
        found.other_prompt += other
        found.add(counted)


def _common(first: list[int], second: list[int]) -> int:
    """The number of equal ids at the beginning."""
    if second[: len(first)] == first:
        return len(first)
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))


def _encoded(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    """Token ids of texts."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=special)["input_ids"]
        return ids
    core = tokenizer.backend_tokenizer
    core.no_truncation()
    core.no_padding()
    return [one.ids for one in core.encode_batch_fast(texts, add_special_tokens=special)]
