"""Reports and other small files that a command writes where the user says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paft_merge.errors import OutputError


def write_file(place: Path, content: str | bytes) -> None:
    """Write a file, and the folders above it.

    Raises:
        OutputError: OUTPUT, it cannot be written.
    """
    with _writing(place), open(place, "wb", opener=_at_once) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def check_file(place: Path) -> None:
    """Raise the error of `write_file` before the work that makes the content; a file that exists stays as it is."""
    with _writing(place):
        new = not place.exists()
        open(place, "ab", opener=_at_once).close()
        if new:
            place.unlink()


def _at_once(place: str, flags: int) -> int:
    """Open a file for writing; a FIFO that nobody reads is an OSError instead of waiting."""
    fd = os.open(place, flags | os.O_NONBLOCK, 0o666)
    os.set_blocking(fd, True)
    return fd


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        fix = "choose a place that can be written"
        raise OutputError.of("OUTPUT", place, f"cannot be written: {error.strerror or error}", fix) from error
