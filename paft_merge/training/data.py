"""Training data: load data sets in TRL's form, mix them, shorten their prompts, fingerprint them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import xxhash

from paft_merge.errors import Problems, TrainError, first_line
from paft_merge.training.child_process import in_child
from paft_merge.training.rendering import TRUSTED, add_refusals, attempted, within_limits
from paft_merge.training.row_files import Number, Row, native
from paft_merge.training.row_forms import Kind, Notes, choose_form, converted, shape_of
from paft_merge.training.row_sources import Source, Survey, source_of
from paft_merge.training.schema import SAMPLING, AdapterSpec, DataSpec, Objective

_BATCH = 1000
"""Rows that are converted and written at once."""


def kind_of(spec: AdapterSpec) -> Kind:
    """The kind of rows that an adapter trains on: `text`, `preference` or `prompts`."""
    if spec.objective in ("dpo", "orpo") or (spec.objective == "on_policy" and spec.sampling.mixing_ratio > 0):
        return "preference"
    online: tuple[Objective, ...] = (*SAMPLING, "rloo", "grpo")
    return "prompts" if spec.objective in online else "text"


@dataclass
class Loaded:
    """A data set in TRL's form."""

    rows: Any
    """A `datasets.Dataset`; the column `PLACE` names the place of each row for messages."""
    where: str = "data"
    """The data set, for messages."""
    notes: list[str] = field(default_factory=list)
    """What is unusual about the rows, one sentence each."""

    @property
    def plain(self) -> Any:
        """The rows without their places."""
        return self.rows.remove_columns(PLACE)


PLACE = "_place"


def load_rows(
    sources: Sequence[DataSpec] | Sequence[Source],
    spec: AdapterSpec,
    *,
    chat: bool,
    folder: Path = Path(),
    what: str = "data",
) -> Loaded:
    """Load data sets, bring their rows into TRL's form (see `row_forms`) and mix them.

    Args:
        sources: Data sets of a recipe, or sources that are open.
        spec: The adapter's section.
        chat: The tokenizer has a chat template.
        folder: Folder where relative paths start.
        what: `data` or `eval_data`, for messages.

    Raises:
        TrainError: DATA, with everything that is wrong with any of the sources.
    """
    import datasets

    problems, parts = Problems(), list[Source]()
    for source in sources:
        with problems.catching():
            parts.append(source if isinstance(source, Source) else source_of(source, folder))
    problems.raise_as(TrainError)
    way = _Way()
    while True:
        try:
            made, notes = _converted(parts, spec, chat, way)
            break
        except _OtherWayError as other:
            way = other.way
    fractions = [source.fraction for source in sources if isinstance(source, DataSpec)]
    if any(fractions):
        made = _by_fraction(made, fractions)
    joined = made[0] if len(made) == 1 else datasets.concatenate_datasets(made)
    return Loaded(joined, parts[0].name if len(parts) == 1 else what, notes)


@dataclass(frozen=True)
class _Way:
    """How rows are stored, which is known when all of them were seen."""

    json: bool = False
    """Turns as JSON: some carry more than role and content."""
    messages: bool = False
    """Prompts and completions as messages: a mixture has both."""


class _OtherWayError(Exception):
    """Rows that need another way of storing them."""

    def __init__(self, way: _Way) -> None:
        super().__init__()
        self.way = way


def _converted(parts: Sequence[Source], spec: AdapterSpec, chat: bool, way: _Way) -> tuple[list[Any], list[str]]:
    """Every source as a Dataset of one form, and notes."""
    problems, made, notes, shapes = Problems(), [], list[str](), dict[Any, str]()
    kind = kind_of(spec)
    for part in parts:
        mine = Notes()
        with problems.catching():
            survey = part.survey()
            if not survey.rows:
                problems.add("DATA", part.name, "the data set is empty", "check split and max_rows")
                continue
            form = choose_form(
                survey.columns, kind, mine, chat=chat, selected=part.selected, problems=problems, where=part.name,
                keeps_others=spec.objective in SAMPLING, text_column=spec.training.get("dataset_text_field", "text"),
                answers_only=bool(spec.training.get("assistant_only_loss")),
            )  # fmt: skip
            if form is None:
                continue
            rows = converted(part.read(), form, kind, mine, problems, part.name)
            others = _other_features(part, survey, form.used) if form.keeps_others else {}
            named = ((f"{part.name} {place}", row) for place, row in rows) if len(parts) > 1 else rows
            dataset, shape = _written(named, others, way)
            shapes.setdefault(shape, part.name)
            made.append(dataset)
        notes += [f"{part.name}: {line}" if len(parts) > 1 else line for line in mine.lines()]
    if not problems.found and len(shapes) > 1:
        _refuse_mixture(shapes, way, problems)
    problems.raise_as(TrainError)
    if way.messages and not spec.training.get("assistant_only_loss"):
        notes.append(
            "the sets of the mixture are trained as conversations, and every turn has a loss; "
            "set training.assistant_only_loss: true to train on answers only"
        )
    return made, notes


_CONVERSATIONS = ((("messages", False),), (("completion", False), ("prompt", False)))
"""Shapes that can be mixed, as messages."""


def _refuse_mixture(shapes: Mapping[Any, str], way: _Way, problems: Problems) -> None:
    """Report sets of different forms, or raise `_OtherWayError` where they have a common one."""
    if set(shapes) <= set(_CONVERSATIONS) and not way.messages:
        raise _OtherWayError(replace(way, messages=True))
    (first, one), (second, other) = list(shapes.items())[:2]
    what = f"{one} has {_in_words(first)}, {other} has {_in_words(second)}; they cannot be mixed"
    fix = "bring them into one form; texts become turns with rename: {prompt: question, completion: answer}"
    problems.add("DATA", "data", what, fix)


def _in_words(shape: Sequence[tuple[str, bool]]) -> str:
    kinds = {text for _, text in shape}
    form = "" if len(kinds) > 1 else " as texts" if True in kinds else " as turns"
    return ", ".join(name for name, _ in shape) + form


def _written(rows: Iterator[tuple[str, Row]], others: Mapping[str, Any], way: _Way) -> tuple[Any, Any]:
    """Write rows to a temporary Arrow file in batches; returns it as a Dataset, and the shape of its rows.

    The file is deleted when the process ends.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter
    from datasets.fingerprint import get_temporary_cache_files_directory

    place, first = next(rows, (None, None))
    if first is None or place is None:
        return datasets.Dataset.from_dict({}), None
    first = _stored(first, way)
    features = datasets.Features({**_features(first, way), **others, PLACE: datasets.Value("string")})
    path = Path(get_temporary_cache_files_directory()) / f"rows-{uuid4().hex}.arrow"
    try:
        with ArrowWriter(path=str(path), features=features) as writer:
            batch: dict[str, list[Any]] = {name: [] for name in features}
            for at, (where, row) in enumerate(chain([(place, first)], rows), 1):
                row = _stored(row, way)
                for name, values in batch.items():
                    values.append(
                        where if name == PLACE else native(row.get(name)) if name in others else row.get(name)
                    )
                if at % _BATCH == 0:
                    writer.write_batch(batch)
                    batch = {name: [] for name in features}
            if batch[PLACE]:
                writer.write_batch(batch)
            writer.finalize()
    except (ValueError, TypeError, OverflowError) as error:
        what = f"a column cannot be stored: {first_line(error)}"
        raise TrainError.of(
            "DATA", place, what, "give it values of one type, or leave it out with columns: [...]"
        ) from error
    return datasets.Dataset.from_file(str(path)), shape_of(first)


def _stored(row: Row, way: _Way) -> Row:
    """A row as it is stored; raises `_OtherWayError` when its turns need JSON."""
    if way.messages and "completion" in row:
        row = {
            **{k: v for k, v in row.items() if k not in ("prompt", "completion")},
            "messages": [*row["prompt"], *row["completion"]],
        }
    if not way.json:
        for value in row.values():
            if isinstance(value, list) and any(isinstance(turn, dict) and len(turn) > 2 for turn in value):
                raise _OtherWayError(replace(way, json=True))
    return row


def _features(row: Row, way: _Way) -> dict[str, Any]:
    """The types of the columns that are trained on."""
    import datasets

    turn = datasets.Json() if way.json else {"role": datasets.Value("string"), "content": datasets.Value("string")}
    found: dict[str, Any] = {}
    for name in ("messages", "prompt", "completion", "chosen", "rejected"):
        if name in row:
            found[name] = datasets.Value("string") if isinstance(row[name], str) else datasets.List(turn)
    if "tools" in row:
        found["tools"] = datasets.Value("string")
    for name in ("input_ids", "labels"):
        if name in row:
            found[name] = datasets.List(datasets.Value("int64"))
    return found or {name: datasets.Value("string") for name in row}


def _other_features(part: Source, survey: Survey, used: Collection[str]) -> dict[str, Any]:
    """The types of columns that are kept for reward functions: as `datasets` knows them, else from all values."""
    import datasets

    plain = {str: "string", bool: "bool", int: "int64", float: "float64"}
    found: dict[str, Any] = {}
    for name, types in survey.types.items():
        if name in used:
            continue
        if part.features is not None:
            found[name] = part.features[name]
        elif types == {Number}:
            found[name] = datasets.Value("float64" if name in survey.fractions else "int64")
        elif len(types) <= 1:
            found[name] = (
                datasets.Value(plain[next(iter(types))]) if types <= plain.keys() and types else datasets.Json()
            )
        else:
            found[name] = datasets.Value("string") if types == {str, Number} else datasets.Json()
    return found


def _by_fraction(parts: list[Any], fractions: Sequence[float | None]) -> list[Any]:
    """Cut every set to its share of the mixture without repeating rows (TRL's rule)."""
    if not all(fractions):
        fix = "give fraction to every set or to none"
        raise TrainError.of("DATA", "data", "some sets of the mixture have a fraction, others do not", fix)
    weights = [float(f or 0) / sum(f or 0 for f in fractions) for f in fractions]
    total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    return [part.select(range(round(weight * total))) for part, weight in zip(parts, weights, strict=True)]


def has_turns(row: Row) -> bool:
    """Whether a row in TRL's form is a conversation."""
    return any(isinstance(row.get(name), list) for name in ("messages", "prompt", "completion", "chosen"))


def shorten_prompts(loaded: Loaded, tokenizer: Any, most: int) -> int:
    """Cut prompts of preference rows from the left to `most` tokens: first whole old turns, then text of the last turn.

    Conversations are cut in a child process, because the chat template renders them.

    Returns:
        The number of cut rows.

    Raises:
        TrainError: TEMPLATE, the template refuses a shorter prompt, or takes too long or too much memory.
    """
    rows, shorter, refused = loaded.rows, list[Any](), dict[str, list[str]]()
    prompts, cut = rows["prompt"], partial(_left_cut, tokenizer=tokenizer, most=most)

    def cut_turns() -> Iterator[tuple[Any, str]]:
        return (attempted(partial(cut, prompt), prompt, len) for prompt in prompts)

    with within_limits(TrainError, loaded.where, lambda: rows[len(shorter)][PLACE], TRUSTED):
        for prompt, why in in_child(cut_turns) if has_turns(rows[0]) else ((cut(prompt), "") for prompt in prompts):
            if why:
                refused.setdefault(why, []).append(rows[len(shorter)][PLACE])
            shorter.append(prompt)
    problems = Problems()
    add_refusals(refused, loaded.where, problems)
    problems.raise_as(TrainError)
    loaded.rows = rows.map(lambda _, at: {"prompt": shorter[at]}, with_indices=True)
    return sum(before != after for before, after in zip(prompts, shorter, strict=True))


def _left_cut(prompt: Any, tokenizer: Any, most: int) -> Any:
    def length(value: Any) -> int:
        if isinstance(value, list):
            encoded = tokenizer.apply_chat_template(value, tokenize=True, return_dict=True, add_generation_prompt=True)
            return len(encoded["input_ids"])
        return len(tokenizer(value)["input_ids"])

    if isinstance(prompt, list):
        system = [turn for turn in prompt[:1] if turn["role"] == "system"]
        turns = prompt[len(system) :]
        while len(turns) > 1 and length(system + turns) > most:
            turns = turns[2:] if len(turns) > 2 else turns[1:]
        if length(system + turns) <= most:
            return system + turns
        last = dict(turns[-1])
        return [
            *system,
            last | {"content": _suffix(last["content"], lambda s: length([*system, last | {"content": s}]), most)},
        ]
    return prompt if length(prompt) <= most else _suffix(prompt, length, most)


def _suffix(text: str, length: Any, most: int) -> str:
    """The longest suffix whose `length` is at most `most`, by bisection over characters."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if length(text[middle:]) <= most else (middle + 1, high)
    return text[low:]


def fingerprint(rows: Any) -> str:
    """Digest of the rows' content (xxh3-128 over Arrow batches of 1,000 rows): the same rows give the same digest."""
    import pyarrow as pa  # type: ignore[import-untyped]

    digest = xxhash.xxh3_128()
    for table in rows.with_format("arrow").iter(batch_size=1000):
        sink = pa.BufferOutputStream()
        # `take` copies the rows to new buffers: slices and joins of the same rows have different ones.
        plain = table.replace_schema_metadata(None).take(pa.array(range(len(table)))).combine_chunks()
        with pa.ipc.new_stream(sink, plain.schema) as stream:
            stream.write_table(plain)
        digest.update(memoryview(sink.getvalue()))
    return digest.hexdigest()
