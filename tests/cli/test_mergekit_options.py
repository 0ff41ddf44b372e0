"""`paft merge` takes the command line of `mergekit-yaml`, and says what of it has no effect here."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import click
import pytest
from toys.merge import files_of, on, paft, recipe, write_recipe

from paft_merge.cli import cli

Family = Callable[..., dict[str, Path]]


@pytest.fixture
def path(family: Family, tmp_path: Path) -> Path:
    f = family()
    data = recipe("task_arithmetic", f["base"], (on(f["base"], f["sft"]), {"weight": 0.5}))
    return write_recipe(tmp_path / "r.json", data)


def spellings(command: click.Command) -> set[str]:
    return {name for p in command.params if isinstance(p, click.Option) for name in [*p.opts, *p.secondary_opts]}


@pytest.mark.parametrize("script", ["run_yaml", "multimerge", "merge_raw_pytorch"])
def test_every_option_of_mergekit_s_commands_is_taken(script: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what mergekit imports
        main = import_module(f"mergekit.scripts.{script}").main
    on_anyway = {"--verbose", "--help", "--no-allow-crimes"}  # what is on by default has no word for that
    assert spellings(main) - spellings(cli.commands["merge"]) - on_anyway == set()


def test_options_that_change_nothing_give_the_same_bytes_and_say_so_in_a_line(path: Path, tmp_path: Path) -> None:
    assert paft("merge", path, tmp_path / "plain", "--quiet").exit_code == 0
    options = [
        "--lora-merge-cache",
        "/nowhere",
        "--random-seed",
        "7",
        "--clone-tensors",
        "--low-cpu-memory",
        "--copy-tokenizer",
    ]
    said = paft("merge", path, tmp_path / "theirs", "--quiet", "-j", "1", *options, "--multi-gpu", "--async-write")
    assert said.exit_code == 0, said.output
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "theirs")
    lines = [line for line in said.stderr.splitlines() if line.startswith("warning[OPTION]")]
    assert [line.split(": ")[1] for line in lines] == [
        "--clone-tensors", "--async-write", "--low-cpu-memory", "--multi-gpu", "--lora-merge-cache", "--random-seed",
    ]  # fmt: skip
    assert lines[-1].endswith("a seed changes the result, so it belongs in the recipe: write seed: 7 there")


def test_cuda_is_a_device_and_a_cache_is_a_place(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", "before")
    for option in ("--cuda", "--gpu-rich"):
        said = paft("merge", path, tmp_path / "out", option)
        assert "error[DEVICE]: cuda" in said.output
    assert paft("merge", path, tmp_path / "out", "--quiet", "--transformers-cache", "elsewhere").exit_code == 0
    assert os.environ["HF_HUB_CACHE"] == "elsewhere"


def test_they_are_not_in_the_help_which_says_that_they_are_taken() -> None:
    text = paft("merge", "--help").output
    assert "--lora-merge-cache" not in text
    assert "The options of mergekit-yaml are accepted too" in text
