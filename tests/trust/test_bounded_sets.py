"""Parquet, Arrow and packed files, saved sets and folders are unpacked within limits, whatever they say of themselves."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet
from toys.merge import HERE
from toys.train import THEIR_WARNINGS

from paft_merge.errors import TrainError
from paft_merge.training import loaded_sets, row_files
from paft_merge.training.row_sources import source_of
from paft_merge.training.schema import DataSpec

pytestmark = THEIR_WARNINGS

TOO_MUCH = "unpacks to more than 200 times its size, or to more than 64 GiB"


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file may unpack to 1 MB, and caches are inside the test's folder."""
    monkeypatch.setattr(row_files, "_SMALL", 10**6)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def rows_of(path: Path) -> list[Any]:
    return [row for _, row in source_of(DataSpec(path=str(path)), path.parent).read()]


def repeated(count: int) -> pa.Table:
    """Rows of 1 kB whose text is stored once."""
    indices = pa.array([0] * count, pa.int32())
    return pa.table({"text": pa.DictionaryArray.from_arrays(indices, pa.array(["a" * 1000]))})


def as_parquet(path: Path, table: pa.Table, **how: Any) -> Path:
    parquet.write_table(table, path, **{"compression": "zstd", "store_schema": False, **how})
    return path


def as_arrow(path: Path, table: pa.Table, new: Callable[..., Any]) -> Path:
    with new(path, table.schema, options=ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(table)
    return path


def folder(path: Path, name: str, packed: bytes) -> Path:
    """A data set as the Hub has it: its card names the file."""
    path.mkdir()
    (path / name).write_bytes(packed)
    (path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n---\n")
    return path


def zipped(text: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a.jsonl", text)
    return file.getvalue()


def test_parquet_is_refused_by_its_own_account_and_by_what_it_unpacks_to(tmp_path: Path) -> None:
    plain = as_parquet(tmp_path / "plain.parquet", pa.table({"text": ["a" * 1000] * 3000}), use_dictionary=False)
    once = as_parquet(tmp_path / "once.parquet", repeated(3000))
    nulls = as_parquet(tmp_path / "nulls.parquet", pa.table({"text": pa.nulls(500_000, pa.string())}))
    for path in (plain, once, nulls):
        assert path.stat().st_size < 10_000
        with pytest.raises(TrainError, match=rf"{path.name}: {TOO_MUCH}"):
            rows_of(path)
    assert len(rows_of(as_parquet(tmp_path / "few.parquet", repeated(900)))) == 900


LOADED = """
import sys
from pathlib import Path
from paft_merge.errors import TrainError
from paft_merge.training import loaded_sets, row_files
from paft_merge.training.row_sources import source_of
from paft_merge.training.schema import DataSpec

row_files._SMALL, loaded_sets.MOST_MEMORY = 10**12, 1 << 27
try:
    source_of(DataSpec(path=sys.argv[1]), Path())
except TrainError as error:
    print(error)
"""


def test_a_page_that_unpacks_to_much_takes_bounded_memory(tmp_path: Path) -> None:
    table = pa.table({"text": ["a" * 150_000_000]})
    path = as_parquet(tmp_path / "a.parquet", table, use_dictionary=False, write_statistics=False)
    assert path.stat().st_size < 20_000
    # A process of its own: one that has freed much memory gives it to its child, where it does not count.
    command = [sys.executable, "-c", LOADED, str(path)]
    said = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": HERE}
    ).stdout
    assert "a.parquet: cannot be loaded: loading it needs more than 0 GiB of memory" in said


@pytest.mark.parametrize("new", [ipc.new_stream, ipc.new_file])
def test_arrow_files_and_saved_sets_with_packed_buffers(new: Callable[..., Any], tmp_path: Path) -> None:
    table = pa.table({"text": ["a" * 1000] * 3000})
    with pytest.raises(TrainError, match=rf"a\.arrow: {TOO_MUCH}"):
        rows_of(as_arrow(tmp_path / "a.arrow", table, new))
    datasets.Dataset.from_dict({"text": ["a"] * 3000}).save_to_disk(tmp_path / "saved")
    assert len(rows_of(tmp_path / "saved")) == 3000
    if new is ipc.new_stream:
        as_arrow(next((tmp_path / "saved").glob("*.arrow")), table, new)
        with pytest.raises(TrainError, match=rf"saved: {TOO_MUCH}"):
            rows_of(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.zip", zipped), ("a.jsonl.bz2", bz2.compress), ("a.jsonl.xz", lzma.compress), ("a.json.gz", gzip.compress)],
)
def test_packed_files_of_a_data_set_with_a_card(name: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    line = json.dumps({"text": "a" * 1000}).encode() + b"\n"
    assert len(rows_of(folder(tmp_path / "few", name, pack(line * 900)))) == 900
    with pytest.raises(TrainError, match=rf"{name}: {TOO_MUCH}"):
        rows_of(folder(tmp_path / "many", name, pack(line * 3000)))


def test_many_columns_and_bytes_that_are_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_parquet(tmp_path / "a.parquet", pa.table({f"c{i}": ["a"] for i in range(20)}))
    assert len(rows_of(path)[0]) == 20
    monkeypatch.setattr(loaded_sets, "MOST_COLUMNS", 19)
    with pytest.raises(TrainError, match=r"a\.parquet: has 20 columns; at most 19 are read"):
        rows_of(path)
    path = as_parquet(tmp_path / "b.parquet", pa.table({"text": ["abc", "what"]}), compression="none")
    path.write_bytes(path.read_bytes().replace(b"what", b"wh\xfft"))
    with pytest.raises(TrainError, match=r"b\.parquet: cannot be loaded: ArrowInvalid: .*UTF8"):
        rows_of(path)


def test_images_that_rows_name_are_not_opened(tmp_path: Path) -> None:
    row = {"one": (named := {"bytes": None, "path": str(tmp_path / "none.png")}), "more": [named]}
    image = datasets.Image()
    features = datasets.Features({"one": image, "more": datasets.List(image)})
    table = pa.Table.from_pylist([row], schema=features.arrow_schema)
    assert rows_of(as_parquet(tmp_path / "a.parquet", table, store_schema=True)) == [row]


def test_loading_has_a_largest_processor_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        while True:
            pass

    monkeypatch.setattr(loaded_sets, "MOST_SECONDS", 1.0)
    monkeypatch.setattr(loaded_sets, "_read", busy)
    path = as_parquet(tmp_path / "a.parquet", repeated(1))
    with pytest.raises(TrainError, match=r"a\.parquet: cannot be loaded: loading it takes too much processor time"):
        rows_of(path)


def test_the_reader_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(TrainError, match="pandas: reads pickles, which can run code"):
        source_of(DataSpec(path="pandas", data_files="a.pkl"), tmp_path)


def test_mutants_are_rows_or_one_line(tmp_path: Path) -> None:
    table = pa.table({"prompt": [f"p{i % 7}" for i in range(200)], "answer": [["c" * i] for i in range(200)]})
    whole = {
        "a.parquet": as_parquet(tmp_path / "a.parquet", table).read_bytes(),
        "a.arrow": as_arrow(tmp_path / "a.arrow", table, ipc.new_stream).read_bytes(),
    }
    chance, refused, began = random.Random(1), list[str](), time.monotonic()
    for number in range(8):
        name = chance.choice(sorted(whole))
        content = bytearray(whole[name])
        for _ in range(chance.choice([1, 3])):
            content[chance.randrange(len(content))] = chance.choice([0, 0x7F, 0xFF])
        (tmp_path / f"{number}-{name}").write_bytes(content)
        try:
            rows_of(tmp_path / f"{number}-{name}")
        except TrainError as error:
            refused.append(str(error))
    assert len(refused) > 2
    assert not any("\n" in line for line in refused)
    assert time.monotonic() - began < 60
