"""Reports and other small files that a command writes where the user says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paft_merge.errors import OutputError


def write_file(place: Path, content: str | bytes) -> None:
    """Write a file, and the folders above it.

    Raises:
        OutputError: OUTPUT, it cannot be written.
    """
    with _writing(place):
        place.write_bytes(content if isinstance(content, bytes) else content.encode())


def check_file(place: Path) -> None:
    """Raise the error of `write_file` before the work that makes the content; a file that exists stays as it is."""
    with _writing(place):
        new = not place.exists()
        place.open("ab").close()
        if new:
            place.unlink()


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        fix = "choose a place that can be written"
        raise OutputError.of("OUTPUT", place, f"cannot be written: {error.strerror or error}", fix) from error
