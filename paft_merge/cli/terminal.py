"""What the verbs share: sizes, warnings, a progress bar, and an end that lets files be closed."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from paft_merge.errors import Problem

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """Bytes, as `800M`, `5GB` or, in mergekit's spelling, `5B`; decimal units."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        number = value.strip().lower()
        for unit in ("kb", "mb", "gb", "tb"):
            number = number.removesuffix(unit) + unit[0] if number.endswith(unit) else number
        factor = _UNITS.get(number[-1:], 0) if not number[-1:].isdigit() else 1
        try:
            size = int(float(number.rstrip("kmgbt")) * factor)
        except (ValueError, OverflowError):
            size = 0
        if size <= 0:
            self.fail(f"{value!r} is no size; write for example 800M or 5GB", param, ctx)
        return size


def recipe_place(text: str) -> Path | str:
    """A recipe's file, or its address on the Hub (`hf://...`)."""
    return text if text.startswith("hf://") else Path(text)


def line(kind: str, problem: Problem) -> str:
    return f"{kind}[{problem.code}]: {problem}"


import_option = click.option(
    "--import", "imports", multiple=True, metavar="MODULE", help="Import a module that registers methods with mergekit."
)  # fmt: skip


def warn(problems: Sequence[Problem]) -> None:
    for problem in problems:
        click.echo(line("warning", problem), err=True)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that files are closed and the way to resume is told."""

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
