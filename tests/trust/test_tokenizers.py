"""A tokenizer reads no file outside its folder, whatever its settings name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys.vocabulary import ids_of, save_tokenizer

from paft_merge.errors import CheckpointError
from paft_merge.inputs.model_config import refuse_odd_files, refuse_outside_files
from paft_merge.plan.vocabulary.tokenizers import Tokenizer, files_in
from paft_merge.training.base_model import load_tokenizer
from paft_merge.training.schema import read_adapter

ENTRIES: dict[str, Callable[[str], Any]] = {
    "vocab": lambda path: path,
    "vocab_file": lambda path: path,
    "init_inputs": lambda path: [path],
    "fast_tokenizer_files": lambda path: ["tokenizer.json", path],
    "gguf_file": lambda path: path,
    "sp_model_kwargs": lambda path: {"model_file": path},
}
"""How settings may name a path; transformers 5.23 was seen to open all of these for some class, except `sp_model_kwargs`."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a tokenizer in it and another file beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_tokenizer(folder, "base")
    shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer.4.0.0.json")
    monkeypatch.chdir(folder)
    return folder


def named(folder: Path, file: str, **settings: Any) -> None:
    path = folder / file
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, **settings}))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("key", ENTRIES)
def test_a_path_out_of_the_folder_is_refused_by_every_command(
    folder: Path, key: str, absolute: bool, file: str
) -> None:
    outside = folder.parent / "tokenizer.4.0.0.json"
    named(folder, file, **{key: ENTRIES[key](str(outside) if absolute else "../tokenizer.4.0.0.json")})
    spec = read_adapter({"objective": "sft", "data": "rows", "lora": {"r": 2}})
    for load in (
        lambda: refuse_odd_files(folder),  # evaluate
        lambda: Tokenizer.load(files_in(folder), "me"),
        lambda: load_tokenizer(str(folder), spec),
    ):
        with pytest.raises(CheckpointError, match=f"{file}: {key} names a file outside the folder, .*; remove {key}"):
            load()


def test_a_path_from_the_working_directory_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named(folder, "tokenizer_config.json", vocab="tokenizer.4.0.0.json")
    with pytest.raises(CheckpointError, match="names a file outside"):
        refuse_odd_files(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"fast_tokenizer_files": ["tokenizer.json"]},
        {"special_tokens_map_file": "/etc/hostname", "name_or_path": "/etc/hostname"},
        {"chat_template": "../tokenizer.4.0.0.json", "bos_token": "<s>"},
        {"vocab_file": "/nobody/has/this/vocab.json", "padding_side": "left", "odd": ["x" * 5000 + ".a", "\0.a"]},
    ],
)
def test_paths_that_are_not_read_and_texts_are_no_fault(folder: Path, settings: dict[str, Any]) -> None:
    wanted = ids_of(folder)
    named(folder, "tokenizer_config.json", **settings)
    refuse_odd_files(folder)
    assert Tokenizer.load(files_in(folder), "me").ids == wanted


def test_a_link_of_the_hubs_cache_is_a_file_of_its_folder(folder: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "1"
    blob.parent.mkdir()
    (folder / "tokenizer.json").rename(blob)
    (folder / "tokenizer.json").symlink_to(blob)
    named(folder, "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json"])
    refuse_outside_files(folder)
