"""Local files give their rows with every value as the file writes it, or an error that names the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from paft_merge.errors import TrainError
from paft_merge.training.row_files import read_rows

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
LINES = "\n".join(map(json.dumps, ROWS)) + "\n"

SHAPES = {
    "lines.jsonl": LINES.encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "blank.jsonl": b"\n" + LINES.replace("\n", "\n\n").encode(),
    "lines.json": LINES.encode(),
    "list.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=1).encode(),
    "list.jsonl": json.dumps(ROWS).encode(),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "wrapped-pretty.json": json.dumps({"data": ROWS}, indent=2).encode(),
    "viewer.json": json.dumps({"rows": [{"row_idx": i, "row": row} for i, row in enumerate(ROWS)]}).encode(),
    "lines.jsonl.gz": gzip.compress(LINES.encode()),
    "table.csv": b"prompt,completion\na,b\nc,d\n",
    "excel.csv": b"\xef\xbb\xbfprompt;completion\r\na;b\r\nc;d\r\n",
    "table.tsv": b"prompt\tcompletion\na\tb\nc\td\n",
}


@pytest.mark.parametrize("name", SHAPES)
def test_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(SHAPES[name])
    assert [row for _, row in read_rows(path)] == ROWS


def test_values_stay_as_they_are_written(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text('zip,day,none,yes,text\n00501,2024-01-02,None,True,"a\nb, c"\n')
    assert [row for _, row in read_rows(table)] == [
        {"zip": "00501", "day": "2024-01-02", "none": "None", "yes": "True", "text": "a\nb, c"}
    ]
    lines = tmp_path / "n.jsonl"
    lines.write_text('{"a": 0, "b": 1.50, "c": 1e3, "d": true, "e": null, "f": NaN}\n')
    assert [row for _, row in read_rows(lines)] == [
        {"a": "0", "b": "1.50", "c": "1e3", "d": True, "e": None, "f": None}
    ]


def test_one_object_alone_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}, indent=2))
    assert [row for _, row in read_rows(path)] == [{"messages": [{"role": "user", "content": "a"}]}]


WRONG = {
    "torn.jsonl": (LINES.encode() + b'{"prompt": "e", "comp', r"torn\.jsonl:3"),
    "torn.json": (json.dumps(ROWS)[:-4].encode(), r"torn\.json:1"),
    "numbers.jsonl": (b"[1, 2]\n", "row 1 is a number, not an object"),
    "text.jsonl": (b'"abc"\n"def"\n', "line 1 is a text, not an object"),
    "empty.jsonl": (b"", "has no rows|not a list"),
    "blank.json": (b"\n \n", "has no rows|not a list"),
    "latin.jsonl": ('{"a": "\xe4"}\n'.encode("latin-1"), "not UTF-8"),
    "utf16.jsonl": (LINES.encode("utf-16"), "not UTF-8"),
    "half.jsonl.gz": (gzip.compress(LINES.encode())[:-12], "cannot be read"),
    "short.csv": (b"a,b\n1\n", r"short\.csv:2.*fewer fields"),
    "long.csv": (b"a,b\n1,2,3\n", r"long\.csv:2.*more fields"),
    "rows.xlsx": (b"x", r"\.xlsx is not a known format"),
    "deep.jsonl": (b"[" * 100_000, "is not JSON"),
    "twice.jsonl": (
        b'{"prompt": "a", "completion": "b", "completion": "c"}\n' * 2,
        "twice.jsonl:1: .*'completion' is there twice",
    ),
    "twice.csv": (b"prompt,completion,completion\na,b,c\n", "twice.csv:1: two columns are called completion"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_rows_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    content, wanted = WRONG[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TrainError, match=wanted):
        list(read_rows(path))
