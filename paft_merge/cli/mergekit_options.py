"""The options of `mergekit-yaml` on `paft merge`: some have a counterpart, a warning names the others."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from paft_merge.errors import Problem

_ALWAYS = {
    "--clone-tensors": "repeated layers are always written out",
    "--async-write": "writing always overlaps with reading and computing",
    "--low-cpu-memory": "a merge holds only a few blocks in memory; --memory bounds it",
    "--read-to-gpu": "blocks go to the device as they are read",
    "--safe-serialization": "",
    "--copy-tokenizer": "",
    "--no-allow-crimes": "",
    "--no-lazy-unpickle": "",
    "--no-trust-remote-code": "",
    "--no-unsafe-truncate-embeddings": "",
    "--no-quiet": "",
    "--no-cuda": "",
    "--no-read-to-gpu": "",
    "--no-low-cpu-memory": "",
    "--no-clone-tensors": "",
    "--no-async-write": "",
    "--no-multi-gpu": "",
    "--lazy": "documents are merged on the fly; --resume continues an interrupted merge",
    "--no-lazy": "",
}
"""Flags for something that always happens here. The text explains it."""

_NOT_HERE = {
    "--multi-gpu": "one device is used; name it with --device",
    "--no-copy-tokenizer": "the tokenizer's files are always copied; delete them from OUT",
    "--no-safe-serialization": "only safetensors is written",
}
"""Flags that have no counterpart."""

_VALUES = {
    "--lora-merge-cache": "adapters are read on the fly, and nothing is cached",
    "--lora-merge-dtype": "an adapter's delta is float32 and is rounded once, at the end",
    "--write-threads": "writing is done by the threads of --threads",
    "--intermediate-dir": "documents of one file are merged on the fly, and only the result is written",
    "--random-seed": "a seed changes the result, so it belongs in the recipe: write seed: {value} there",
}
"""Options with a value that have no counterpart."""


_SHORT = {"--intermediate-dir": ("-I",)}


def accepts_mergekit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add mergekit's options, hidden, to a command that takes `device`, `threads` and `out`.

    The command also receives `notes`: a warning for every given option that has no effect.
    """

    @wraps(command)
    def run(*arguments: Any, **given: Any) -> Any:
        theirs = {key.removeprefix("mergekit_"): given.pop(key) for key in list(given) if key.startswith("mergekit_")}
        if theirs.pop("cuda") or theirs.pop("gpu_rich", False):
            given["device"] = "cuda" if given["device"] == "cpu" else given["device"]
        given["threads"] = given["threads"] or theirs.pop("num_threads", None)
        given["out"] = given["out"] or theirs.pop("out_path", None)
        if theirs.pop("verbose"):
            logging.getLogger().setLevel(logging.INFO)
        if cache := theirs.pop("transformers_cache"):
            os.environ["HF_HUB_CACHE"] = str(cache)
        return command(*arguments, **given, notes=list(_notes(theirs)))

    flags, count = {**_ALWAYS, **_NOT_HERE}, click.IntRange(1)
    options = [
        click.option("--cuda", _key("--cuda"), is_flag=True, hidden=True, help="--device cuda."),
        click.option("--gpu-rich", _key("--gpu-rich"), is_flag=True, hidden=True, help="--device cuda."),
        click.option("-j", "--num-threads", _key("--num-threads"), type=count, hidden=True, help="--threads."),
        click.option("-v", _key("--verbose"), count=True, hidden=True, help="paft -v."),
        click.option("--out-path", _key("--out-path"), type=click.Path(path_type=Path), hidden=True, help="OUT."),
        click.option("--transformers-cache", _key("--transformers-cache"), hidden=True, help="HF_HUB_CACHE."),
        *(click.option(name, _key(name), is_flag=True, hidden=True, help=_help(what)) for name, what in flags.items()),
        *(
            click.option(name, *_SHORT.get(name, ()), _key(name), hidden=True, help=_help(what))
            for name, what in _VALUES.items()
        ),
    ]
    made: Callable[..., Any] = run
    for option in reversed(options):
        made = option(made)
    return made


def _notes(given: dict[str, Any]) -> list[Problem]:
    found = []
    for name, what in {**_ALWAYS, **_NOT_HERE, **_VALUES}.items():
        value = given.get(_key(name).removeprefix("mergekit_"))
        if value and what:
            found.append(Problem("OPTION", name, "has no effect here", what.replace("{value}", str(value))))
    return found


def _help(what: str) -> str:
    return f"No effect here: {what or 'this is always the case'}."


def _key(name: str) -> str:
    return "mergekit_" + name.strip("-").replace("-", "_")
