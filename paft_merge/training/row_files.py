"""Rows of local .json, .jsonl, .csv and .tsv files (also gzipped), with every value as the file writes it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from paft_merge.errors import CheckpointError, TrainError
from paft_merge.inputs.safetensors_header import open_regular

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
"""Suffixes that `read_rows` understands, each also with `.gz` behind it."""

MOST_BYTES = 64 * 2**30
"""Size of a file of rows that is read row by row; what it unpacks to, too."""

MOST_WHOLE = 2 * 2**30
"""Bytes of a JSON document or a text that is read at once, and characters that it unpacks to."""

MOST_ROW = 64 * 2**20
"""Characters of a line, and of a field of a table."""

MOST_UNPACKED = 200
"""Times its size that a compressed file may unpack to; rows of text unpack to 3 to 20 times."""

_SMALL = 256 * 2**20
"""Characters that any compressed file may unpack to."""

_WRAPPERS = ("data", "rows", "examples", "train", "instances")
"""Keys under which a .json file may hold its list of rows."""

Row = dict[str, Any]


class Number(str):
    """A number of a JSON file as the file writes it: `1.50` stays `1.50`, and an answer `0` is the text `0`."""


def native(value: Any) -> Any:
    """A JSON value with its numbers as int and float, as `json.loads` gives it."""
    if isinstance(value, Number):
        return float(value) if set(value) & set(".eE") else int(value)
    if isinstance(value, list):
        return [native(one) for one in value]
    return {key: native(one) for key, one in value.items()} if isinstance(value, dict) else value


def suffix_of(path: Path) -> str:
    """The suffix that says how `path` is written, without `.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def most_unpacked(size: int) -> int:
    """How much a compressed file of `size` bytes may unpack to."""
    return max(_SMALL, min(MOST_BYTES, MOST_UNPACKED * size))


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Read the rows of a file, each with its place: `line 12`, or `row 12` of a JSON list.

    A .json file may be a list of objects, one object per line, or an object that holds the list under `data`, `rows`,
    `examples`, `train` or `instances`. Numbers are `Number`; every cell of a .csv or .tsv file is text. A byte order
    mark is skipped.

    Raises:
        TrainError: DATA, the file cannot be read, or a row is not an object; names the line.
    """
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        fix = f"use {', '.join(SUFFIXES)} (each also .gz) or .parquet"
        raise TrainError.of("DATA", path, f"{suffix or 'no suffix'} is not a known format", fix)
    try:
        with _opened(path) as file:
            rows = _table(file, path, suffix) if suffix in (".csv", ".tsv") else _objects(file, path)
            first = True
            for place, row in rows:
                first = False
                yield place, row
    except (OSError, EOFError) as error:
        raise TrainError.of("DATA", path, f"cannot be read: {error}", "name a whole, readable file") from error
    except UnicodeDecodeError as error:
        raise TrainError.of("DATA", path, "is not UTF-8 text", "save it as UTF-8") from error
    if first:
        raise TrainError.of("DATA", path, "the file has no rows", "write one JSON object per line, or use another file")


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A regular file of a limited size as text, unpacked."""
    try:
        fd = open_regular(path)
    except CheckpointError as error:
        raise TrainError.of("DATA", path, error.problems[0].what, "name a whole, readable file") from error
    with os.fdopen(fd, "rb") as raw:
        if (size := os.fstat(fd).st_size) > MOST_BYTES:
            raise TrainError.of("DATA", path, f"is {size:,} bytes long; at most {MOST_BYTES:,} are read", _SPLIT)
        unpacked = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
        yield io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline="")


_SPLIT = "split it into several files, or name a part with data_files"


def _lines(file: TextIO, path: Path, *, cut: bool = False) -> Iterator[str]:
    """The lines from the start; TrainError for a line that is too long (unless it is `cut`), or a file that unpacks to too much."""
    file.seek(0)
    packed = path.suffix.lower() == ".gz"
    left = most_unpacked(path.stat().st_size) if packed else MOST_BYTES
    number = 0
    while line := file.readline(MOST_ROW):
        number, left = number + 1, left - len(line)
        if len(line) == MOST_ROW and not cut:
            fix = "write one row per line, or check that this is a file of rows"
            raise TrainError.of("DATA", f"{path}:{number}", f"the line is longer than {MOST_ROW >> 20} MiB", fix)
        if left < 0:
            fix = "unpack it, if that is right, or check where it comes from"
            what = f"unpacks to more than {MOST_UNPACKED} times its size, or to more than {MOST_BYTES >> 30} GiB"
            raise TrainError.of("DATA", path, what, fix)
        yield line


def _whole(file: TextIO, path: Path) -> str:
    """The text of a file that is read at once."""
    file.seek(0)
    text = file.read(MOST_WHOLE + 1) if path.stat().st_size <= MOST_WHOLE else None
    if text is None or len(text) > MOST_WHOLE:
        fix = "write one object per line (.jsonl), which is read line by line"
        raise TrainError.of("DATA", path, f"is one JSON value of more than {MOST_WHOLE >> 30} GiB", fix)
    return text


def _objects(file: TextIO, path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a .json or .jsonl file."""
    line = next((one for one in _lines(file, path, cut=True) if one.strip()), "")
    is_list = line.lstrip()[:1] == "[" or (suffix_of(path) == ".json" and not _is_whole(line))
    more = not is_list and sum(1 for _ in islice((one for one in _lines(file, path) if one.strip()), 2)) == 2
    if is_list or not more:
        text = _whole(file, path)
        yield from _members(_unwrapped(_parse(text, path, None)) if text.strip() else [], path)
        return
    for number, line in enumerate(_lines(file, path), 1):
        if line.strip():
            yield f"line {number}", _object(_parse(line, path, number), path, f"line {number}")


def _is_whole(line: str) -> bool:
    """Whether a line is a JSON value."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _unwrapped(document: Any) -> Any:
    """The list of rows in a JSON document; one object is one row."""
    if not isinstance(document, dict):
        return document
    for key in _WRAPPERS:
        rows = document.get(key)
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return [row["row"] if isinstance(row.get("row"), dict) else row for row in rows]
    return [document]


def _members(value: Any, path: Path) -> Iterator[tuple[str, Row]]:
    if not isinstance(value, list):
        what = "is not a list of objects"
        raise TrainError.of("DATA", path, what, "write a JSON list of objects, or one object per line")
    for number, row in enumerate(value, 1):
        yield f"row {number}", _object(row, path, f"row {number}")


def _parse(text: str, path: Path, line: int | None) -> Any:
    try:
        return json.loads(
            text, parse_int=Number, parse_float=Number, parse_constant=_nothing, object_pairs_hook=_unique
        )
    except (ValueError, RecursionError) as error:
        where = f"{path}:{line if line is not None else getattr(error, 'lineno', 1)}"
        raise TrainError.of("DATA", where, f"is not JSON: {error}", "write one JSON object per line") from error


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    """An object of JSON; of a key that is there twice, `json` would keep one value silently."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError(
            f"the key {next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))!r} is there twice"
        )
    return made


def _nothing(name: str) -> None:
    """NaN and infinities, which pandas and `json.dumps` write for missing values."""


def _object(value: Any, path: Path, where: str) -> Row:
    if not isinstance(value, dict):
        kind = {"Number": "a number", "str": "a text", "list": "a list", "bool": "a boolean", "NoneType": "null"}
        what = f"{where} is {kind.get(type(value).__name__, type(value).__name__)}, not an object"
        raise TrainError.of("DATA", path, what, 'write rows as {"column": value, ...}')
    return value


def _table(file: TextIO, path: Path, suffix: str) -> Iterator[tuple[str, Row]]:
    """Rows of a .csv or .tsv file. The delimiter of a .csv file is the most frequent of `,`, `;` and tab in its header."""
    header = file.readline(MOST_ROW)
    delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=header.count)
    csv.field_size_limit(MOST_ROW)
    reader = csv.DictReader(_lines(file, path), delimiter=delimiter, strict=True)
    try:
        names = [name for name in reader.fieldnames or () if name.strip()]
        if double := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            what = f"two columns are called {double[0]}"
            raise TrainError.of("DATA", f"{path}:1", what, "give each column a name of its own")
        for row in reader:
            if None in row or None in row.values():
                what = f"has {'more' if None in row else 'fewer'} fields than the header"
                fix = "quote fields that hold the delimiter or line breaks"
                raise TrainError.of("DATA", f"{path}:{reader.line_num}", what, fix)
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise TrainError.of("DATA", f"{path}:{reader.line_num}", f"is not CSV: {error}", "quote its fields") from error
