"""Links in the folders of models: followed inside the folder and into the Hub's cache; elsewhere only if the user allows it."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from paft_merge.errors import CheckpointError, Problem
from paft_merge.inputs.safetensors_header import truncate
from paft_merge.inputs.weight_files import PICKLES, module_files

FOLLOW = "follow_links=True"
"""The option that follows links to anywhere."""

_ALLOWED: ContextVar[bool] = ContextVar("_ALLOWED", default=False)

_OF_THE_CACHE = re.compile(r"/models--[^/]+/(blobs|snapshots/[^/]+)/.+$")

_READ = (".safetensors", *PICKLES, ".json", ".jinja", ".model", ".spm", ".tiktoken")
_READ_NAMES = ("vocab.txt", "merges.txt", "README.md")
"""Suffixes and names of the files that are read of a model; other files are only copied, and never through such a link."""


@contextmanager
def following_links(allowed: bool) -> Iterator[None]:
    """Within the block, follow links to anywhere if `allowed`, or if a block around this one allows it."""
    before = _ALLOWED.set(allowed or _ALLOWED.get())
    try:
        yield
    finally:
        _ALLOWED.reset(before)


def follows_links() -> bool:
    """Whether a block of `following_links` allows links to anywhere."""
    return _ALLOWED.get()


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is a regular file that no link leads out of a folder, except into a cache of the Hub."""
    try:
        real = path.resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError):  # a link without a target, or to itself
        return False
    return regular and (real.is_relative_to(folder.resolve()) or bool(_OF_THE_CACHE.search(real.as_posix())))


def may_be_read(path: Path, folder: Path) -> bool:
    """Whether a path is a regular file `is_inside` the folder, or anywhere if the user allows it."""
    return is_inside(path, folder) or (_ALLOWED.get() and path.is_file())


def refuse_links_out(folder: Path) -> None:
    """Refuse the folder of a model or an adapter whose weights, configs or tokenizer are links that leave it.

    Raises:
        CheckpointError: LINK_OUTSIDE, for every such link.
    """
    if _ALLOWED.get() or not folder.is_dir():
        return
    names = [name for name in sorted(os.listdir(folder)) if name.endswith((*_READ, *_READ_NAMES))]
    places = [folder / name for name in (*names, *module_files(folder))]
    found = [
        Problem(
            "LINK_OUTSIDE", str(path), f"is a link to {path.resolve()}, outside the folder",
            f"copy the file into the folder, or pass {FOLLOW} if you trust the folder",
        )
        for path in places
        if path.is_file() and not is_inside(path, folder)
    ]  # fmt: skip
    if found:
        raise CheckpointError(truncate(found, folder))
