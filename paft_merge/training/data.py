"""Training data: load and mix data sets, check them against the objective, count cut rows, fingerprint them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from paft_merge.errors import Problems, TrainError
from paft_merge.recipe.sections import suggestion
from paft_merge.training.schema import SAMPLING, AdapterSpec, DataSpec, Objective

log = logging.getLogger(__name__)

LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

COUNTED_ROWS = 20_000
"""Rows that are tokenised to count those longer than the limit; of larger data sets an even sample."""

WANTED: dict[str, tuple[frozenset[str], ...]] = {
    "text": (
        frozenset({"messages"}),
        frozenset({"conversations"}),
        frozenset({"prompt", "completion"}),
        frozenset({"text"}),
        frozenset({"input_ids", "labels"}),
    ),
    "preference": (frozenset({"chosen", "rejected"}),),
    "prompts": (frozenset({"prompt"}),),
}
"""Columns of each kind of data set; one of the alternatives is enough."""


def kind_of(spec: AdapterSpec) -> str:
    """The kind of rows that an adapter trains on: `text`, `preference` or `prompts`."""
    if spec.objective in ("dpo", "orpo") or (spec.objective == "on_policy" and spec.sampling.mixing_ratio > 0):
        return "preference"
    online: tuple[Objective, ...] = (*SAMPLING, "rloo", "grpo")
    return "prompts" if spec.objective in online else "text"


def load_rows(sources: Sequence[DataSpec], folder: Path = Path()) -> Any:
    """Load and mix data sets: a `datasets.Dataset`. Relative files are looked for under `folder` first.

    Raises:
        TrainError: DATA, with every source that could not be read.
    """
    import datasets

    problems, parts = Problems(), []
    for source in sources:
        with problems.catching():
            parts.append(_load(source, folder))
    problems.raise_as(TrainError)
    fractions = [source.fraction for source in sources]
    if any(fractions):
        parts = _by_fraction(parts, fractions)
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _load(source: DataSpec, folder: Path) -> Any:
    import datasets

    local = next((p for p in (folder / source.path, Path(source.path)) if p.exists()), None)
    if local is None and Path(source.path).suffix in LOADERS:
        what = (
            f"no such file, neither beside the recipe ({folder.resolve()}) nor in the working directory ({Path.cwd()})"
        )
        raise TrainError.of("DATA", source.path, what, "check the path")
    try:
        if local is not None and (local / "dataset_info.json").exists():
            rows = datasets.load_from_disk(str(local))
        elif local is not None and local.is_file():
            rows = _load_file(local, source)
        else:
            rows = datasets.load_dataset(
                str(local or source.path),
                source.name,
                data_dir=source.data_dir,
                data_files=source.data_files,
                split=source.split,
                revision=source.revision,
            )
    except TrainError:
        raise
    except Exception as error:  # loaders raise errors of many types; all mean that the source cannot be read
        what = f"cannot be loaded: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        fix = "check data.path, name and split; a local file must exist and end in .json, .jsonl, .parquet or .csv"
        raise TrainError.of("DATA", source.path, what, fix) from error
    return _shaped(rows, source)


def _load_file(path: Path, source: DataSpec) -> Any:
    import datasets

    loader = LOADERS.get(path.suffix)
    if loader is None:
        raise TrainError.of(
            "DATA", path, f"{path.suffix or 'no suffix'} is not a known format", f"use {', '.join(LOADERS)}"
        )
    if not path.stat().st_size:
        raise TrainError.of("DATA", path, "the file is empty", "write one row per line, or use another file")
    split = source.split if source.split.startswith("train") else "train"
    return datasets.load_dataset(loader, data_files=str(path), split=split)


def _shaped(rows: Any, source: DataSpec) -> Any:
    missing = [name for name in (*source.rename, *(source.columns or ())) if name not in _after(rows, source)]
    if missing:
        fix = "; ".join(suggestion(name, list(rows.column_names)) for name in missing)
        raise TrainError.of("DATA", source.path, f"no column {', '.join(map(repr, missing))}", fix)
    if source.rename:
        clash = [new for old, new in source.rename.items() if new in rows.column_names and new not in source.rename]
        rows = rows.remove_columns(clash).rename_columns(source.rename)
    if source.columns:
        rows = rows.select_columns(source.columns)
    return rows.select(range(min(source.max_rows, len(rows)))) if source.max_rows else rows


def _after(rows: Any, source: DataSpec) -> set[str]:
    return {*rows.column_names, *source.rename.values()}


def _by_fraction(parts: list[Any], fractions: Sequence[float | None]) -> list[Any]:
    """Cut every set to its share of the mixture without repeating rows (TRL's rule)."""
    if not all(fractions):
        fix = "give fraction to every set or to none"
        raise TrainError.of("DATA", "data", "some sets of the mixture have a fraction, others do not", fix)
    weights = [float(f or 0) / sum(f or 0 for f in fractions) for f in fractions]
    total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    return [part.select(range(round(weight * total))) for part, weight in zip(parts, weights, strict=True)]


def check_rows(rows: Any, spec: AdapterSpec, tokenizer: Any, what: str = "data") -> None:
    """Check a data set against the objective and the tokenizer.

    Args:
        rows: A `datasets.Dataset`.
        spec: The adapter's section.
        tokenizer: The base's, with the adapter's chat template.
        what: Name of the data set in messages.

    Raises:
        TrainError: DATA, TEMPLATE; every problem at once.
    """
    problems = Problems()
    kind = kind_of(spec)
    if len(rows) == 0:
        problems.add("DATA", what, "the data set is empty", "check split and max_rows")
        problems.raise_as(TrainError)
    columns = set(rows.column_names)
    if not any(wanted <= columns for wanted in WANTED[kind]):
        needed = " or ".join("+".join(sorted(wanted)) for wanted in WANTED[kind])
        problems.add(
            "DATA", what, f"objective {spec.objective} needs {needed}, the columns are {', '.join(sorted(columns))}",
            "rename columns with data.rename: {old: new}",
        )  # fmt: skip
    else:
        _check_values(rows, spec, kind, tokenizer, problems, what)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        problems.add("TEMPLATE", "tokenizer", "has neither a pad nor an eos token", "use a tokenizer that has one")
    problems.raise_as(TrainError)


def _check_values(rows: Any, spec: AdapterSpec, kind: str, tokenizer: Any, problems: Problems, what: str) -> None:
    first = rows[0]
    used = [
        name
        for name in ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "text")
        if name in first
    ]
    for name in used:
        empty = [index for index in _probe(len(rows)) if not rows[index][name]]
        if empty:
            fix = "remove such rows"
            problems.add("DATA", f"{what}[{empty[0]}].{name}", f"is empty (in {len(empty)} of the rows looked at)", fix)
    conversational = any(isinstance(first[name], list) and first[name] for name in used)
    if conversational and not tokenizer.chat_template:
        problems.add(
            "TEMPLATE", what, "the rows are conversations, but the tokenizer has no chat template",
            "set chat_template: to a name such as chatml, a Jinja file, or a model whose template fits",
        )  # fmt: skip
    if spec.training.get("assistant_only_loss") and not conversational:
        problems.add("DATA", what, "training.assistant_only_loss needs conversations", "drop it, or use messages")
    if kind == "text" and spec.objective == "ift" and spec.training.get("packing"):
        problems.add(
            "DATA", what, "ift weights tokens per sequence and does not support packing", "drop training.packing"
        )


def _probe(rows: int, most: int = 1000) -> range:
    return range(0, rows, max(1, rows // most))


def text_of(row: Mapping[str, Any], tokenizer: Any, field: str = "text") -> list[tuple[str, int]]:
    """Token counts of the sequences made from a row, by name: `[("text", 812)]`, or `chosen` and `rejected`."""

    def count(value: Any, prompt: Any = None) -> int:
        if isinstance(value, list):
            turns = [*(prompt or []), *value]
            return len(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])
        return len(tokenizer((prompt or "") + value)["input_ids"])

    if "chosen" in row:
        return [(name, count(row[name], row.get("prompt"))) for name in ("chosen", "rejected")]
    if "completion" in row:
        return [("text", count(row["completion"], row["prompt"]))]
    if "input_ids" in row:
        return [("text", len(row["input_ids"]))]
    value = row.get("messages", row.get(field, row.get("prompt")))
    return [("text", count(value))] if value else []


def count_cut(rows: Any, tokenizer: Any, max_length: int | None, field: str = "text") -> dict[str, int]:
    """Count the rows that are longer than `max_length` tokens, of at most `COUNTED_ROWS` evenly spaced rows.

    Returns:
        `rows_looked_at`, `rows_cut`, `longest_tokens` and `max_length`; empty without a limit.
    """
    if max_length is None or "conversations" in rows.column_names:
        return {}
    looked = cut = longest = 0
    for index in range(0, len(rows), -(-len(rows) // COUNTED_ROWS)):
        lengths = [length for _, length in text_of(rows[index], tokenizer, field)]
        looked, cut = looked + 1, cut + any(length > max_length for length in lengths)
        longest = max([longest, *lengths])
    return {"rows_looked_at": looked, "rows_cut": cut, "longest_tokens": longest, "max_length": max_length}


def shorten_prompts(rows: Any, tokenizer: Any, most: int) -> tuple[Any, int]:
    """Cut prompts of preference rows from the left to `most` tokens: first whole old turns, then text of the last turn.

    Returns:
        The rows, and the number of cut rows.
    """
    from trl import extract_prompt

    if "prompt" not in rows.column_names:
        rows = rows.map(extract_prompt)
    before = len(rows)

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        shorter = _left_cut(row["prompt"], tokenizer, most)
        return {"prompt": shorter, "_cut": shorter != row["prompt"]}

    rows = rows.map(cut)
    changed = sum(rows["_cut"])
    assert len(rows) == before
    return rows.remove_columns("_cut"), int(changed)


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
