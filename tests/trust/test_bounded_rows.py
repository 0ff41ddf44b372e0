"""Data files, recipes, functions and templates are regular files of a limited size, packed and unpacked."""

from __future__ import annotations

import gzip
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from toys.merge import paft, python
from toys.train import saved

from paft_merge.errors import PaftMergeError, TrainError
from paft_merge.evaluating import EvaluateSpec, check_evaluate
from paft_merge.inputs.adapter_places import base_of
from paft_merge.recipe.yaml_source import MAX_BYTES, load_yaml
from paft_merge.training import row_files
from paft_merge.training.base_model import load_tokenizer
from paft_merge.training.rewards import check_function, model_reward
from paft_merge.training.row_files import MOST_BYTES, read_rows
from paft_merge.training.row_sources import source_of
from paft_merge.training.schema import DataSpec, read_adapter


def rows_of(path: Path) -> list[object]:
    return list(source_of(DataSpec(path=str(path)), path.parent).read())


def fifo(path: Path) -> None:
    os.mkfifo(path)


def in_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [fifo, in_socket, device])
@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz", "rows.parquet", "rows.arrow", "rows"]
)
def test_rows_are_read_from_regular_files_only(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    began = time.monotonic()
    for pattern in (name, f"{name[:-1]}*"):
        with pytest.raises(TrainError, match="is not a regular file"):
            rows_of(tmp_path / pattern)
    with pytest.raises(TrainError):
        list(read_rows(tmp_path / name))
    if "." in name:
        spec = EvaluateSpec.model_validate({"metrics": {"m": {"kind": "exact_match", "data": name}}})
        with pytest.raises(PaftMergeError, match="is not a file"):
            check_evaluate(spec, tmp_path)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("make", [fifo, in_socket, device])
def test_recipes_functions_templates_and_configs_are_regular_files(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    for name in ("recipe.yaml", "reward.py", "late.jinja", "adapter_config.json"):
        make(tmp_path / name)
    spec = read_adapter({"objective": "sft", "data": "rows", "chat_template": "late.jinja", "lora": {"r": 2}})
    saved(tmp_path / "base")
    for refused in (
        lambda: load_yaml(tmp_path / "recipe.yaml"),
        lambda: check_function("reward.py:f", tmp_path),
        lambda: load_tokenizer(str(tmp_path / "base"), spec, tmp_path),
    ):
        with pytest.raises(PaftMergeError, match="is not a regular file"):
            refused()
    assert base_of(tmp_path, "") == ""
    with pytest.raises(PaftMergeError, match="is not a regular file"):
        model_reward(str(tmp_path))
    for command in (
        ("run", tmp_path / "recipe.yaml", tmp_path / "o"),
        ("merge", tmp_path / "recipe.yaml", tmp_path / "o"),
    ):
        done = paft(*command)
        assert (done.exit_code, done.output.count("\n")) == (1, 1), done.output


def test_a_recipe_may_come_from_a_pipe_of_the_shell() -> None:
    read, write = os.pipe()
    os.write(write, b"base_model: me/x\n")
    os.close(write)
    assert load_yaml(Path(f"/dev/fd/{read}")).data == {"base_model": "me/x"}
    os.close(read)


def test_a_large_function_file_is_not_parsed(tmp_path: Path) -> None:
    with (tmp_path / "reward.py").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(TrainError, match=r"cannot be imported: OSError: is larger than 4 MiB"):
        check_function("reward.py:f", tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz", "rows.parquet"])
def test_a_file_of_rows_has_a_largest_size(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:  # sparse: no disk is filled
        file.write(b"PAR1")
        file.truncate(MOST_BYTES + 1)
    began = time.monotonic()
    with pytest.raises(TrainError, match="at most 68,719,476,736 are read"):
        rows_of(tmp_path / name)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "' + "a" * 2000 + '"}\n', r"a\.jsonl:2: the line is longer than"),
        ("a.jsonl", " " * 2000, r"a\.jsonl:1: the line is longer than"),
        ("a.ndjson", "\n\n" + "a" * 2000, r"a\.ndjson:3: the line is longer than"),
        ("a.csv", "text\na\n" + "a" * 2000, r"a\.csv:3: the line is longer than"),
        ("a.csv", "t" * 2000, r"a\.csv:1: the line is longer than"),
        ("a.tsv", 'text\n"' + "a\n" * 2000 + '"\n', r"a\.tsv:\d+: is not CSV: field larger than field limit"),
        ("a.json", json.dumps([{"text": "a" * 40}] * 200), "is one JSON value of more than"),
        ("a.json", json.dumps([{"text": "a" * 40}] * 200, indent=1), "is one JSON value of more than"),
        ("a.json", json.dumps({"data": [{"text": "a" * 40}] * 200}), "is one JSON value of more than"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_row_and_a_document_have_a_largest_size(
    name: str, text: str, why: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "MOST_ROW", 1000)
    monkeypatch.setattr(row_files, "MOST_WHOLE", 5000)
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.raises(TrainError, match=why.replace(r":", r"(?:\.gz)?:", 1) if packed and ":" in why[:12] else why):
        rows_of(path)


def test_a_json_list_in_one_long_line_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "MOST_ROW", 1000)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a" * 40}] * 200))
    assert len(rows_of(tmp_path / "a.json")) == 200


@pytest.mark.parametrize("line", [b"\n", b'{"text": "a"}\n', b"a,b\n"])
def test_a_compression_bomb_is_refused_on_its_unpacked_side(
    line: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "_SMALL", 10_000)
    path = tmp_path / ("a.csv.gz" if b"," in line else "a.jsonl.gz")
    path.write_bytes(gzip.compress(line * (400_000 // len(line))))
    with pytest.raises(TrainError, match="unpacks to more than 200 times its size"):
        rows_of(path)
    monkeypatch.setattr(row_files, "_SMALL", 10**8)
    if line != b"\n":
        assert sum(1 for _ in source_of(DataSpec(path=str(path)), tmp_path).read()) > 20_000


def test_a_bomb_in_one_line_takes_bounded_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(b"a" * 2**20)
    code = f"""if True:
        import resource
        from pathlib import Path
        from paft_merge.errors import TrainError
        from paft_merge.training.row_files import read_rows
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            list(read_rows(Path({str(tmp_path / "a.jsonl.gz")!r})))
        except TrainError as error:
            print(error, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    *said, grown = python(code).stdout.split()
    assert "the line is longer than 64 MiB" in " ".join(said)
    assert int(grown) < 250


def test_a_text_for_perplexity_has_a_largest_size(tmp_path: Path) -> None:
    with (tmp_path / "text.txt").open("wb") as file:
        file.truncate(row_files.MOST_WHOLE + 1)
    spec = EvaluateSpec.model_validate({"metrics": {"p": {"kind": "perplexity", "data": "text.txt"}}})
    with pytest.raises(PaftMergeError, match=r"text\.txt: is 2,147,483,649 bytes long; at most 2,147,483,648 are read"):
        check_evaluate(spec, tmp_path)
