"""Finds the adapter and the base that a command names: a folder, a file, a repository of the Hub, or a URL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paft_merge.hub import Remote, download, resolve
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.quantized import dequantized
from paft_merge.recipe import ModelRef


def adapter_at(name: str, *, unpickle: bool = False) -> Path:
    """The folder, or the file, of an adapter; one of the Hub is downloaded.

    Raises:
        HubError: it is nowhere.
    """
    ref = _reference(name)
    return download([resolve(ref.path, ref.revision, unpickle=unpickle)])[0]


@contextmanager
def base_at(name: str | None) -> Iterator[Checkpoint | None]:
    """Open a base until the end of the block, without downloading its weights; None without a name.

    Raises:
        HubError: it is nowhere.
        CheckpointError: a file of it is malformed.
    """
    if name is None:
        yield None
        return
    ref = _reference(name)
    found = resolve(ref.path, ref.revision)
    with Remote.open([found]) as remote, Checkpoint.open(found.folder, far=remote.files(found)) as base:
        yield dequantized(base)


def _reference(name: str) -> ModelRef:
    return ModelRef(name) if Path(name).exists() else ModelRef.parse(name)
