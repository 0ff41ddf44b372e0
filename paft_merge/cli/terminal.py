"""Shared parts of the commands: sizes, error and warning lines, and how SIGTERM ends a command."""

from __future__ import annotations

import gc
import json
import logging
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from paft_merge.engine.options import MergeOptions, parse_size
from paft_merge.errors import Problem, escape
from paft_merge.stores import has_scheme

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from rich.console import Console


@contextmanager
def importing() -> Iterator[None]:
    """Import packages without searching for reference cycles: a tenth of the start of a command, which finds nothing to free."""
    was_enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()  # later searches leave out what was imported
        if was_enabled:
            gc.enable()


COMMAND = "paft_merge.command"
"""Key of `click.Context.meta` for the command line as it was given, quoted for a shell."""


AS_JSON = "paft_merge.json"
"""Key of `click.Context.meta`: whether stdout is to have a JSON document and has none yet."""


NOTE = "paft_merge.note"
"""Key of `click.Context.meta`: the function that writes to the file of `paft --log-file`."""


def _note(level: int, problems: Sequence[Problem]) -> None:
    """Write problems to the file of `paft --log-file`, if there is one."""
    context = click.get_current_context(silent=True)
    if context is None or NOTE not in context.meta:
        return
    for problem in problems:
        context.meta[NOTE](level, f"{problem.code}: {as_flags(str(problem))}")


def json_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--json`, which `text` describes; see `print_json`."""
    return click.option("--json", "as_json", is_flag=True, help=text)


def print_json(value: Any) -> None:
    """Print the result of a command with `--json`, the only document on stdout. Numbers that are not finite become null."""
    from paft_merge.stats.json_numbers import finite

    print_document(json.dumps(finite(value), indent=2) + "\n")


def print_document(text: str) -> None:
    """Print a result that is JSON already."""
    click.get_current_context().meta[AS_JSON] = False
    sys.stdout.write(text)


def print_errors(problems: Sequence[Problem], shown: Callable[[str], str] = str) -> None:
    """Print errors on stderr, a line for each; with `--json` also on stdout, unless the result is there.

    Args:
        problems: at least one; the first is `error` in the document, and all of them are `errors`.
        shown: changes the lines.
    """
    for problem in problems:
        click.echo(shown(line("error", problem)), err=True)
    _note(logging.ERROR, problems)
    print_error_document(problems)


def print_error_document(problems: Sequence[Problem]) -> None:
    """Print errors on stdout if a document is wanted there and none was printed."""
    if click.get_current_context().meta.get(AS_JSON):
        errors = [
            {**asdict(problem), "what": as_flags(problem.what), "fix": as_flags(problem.fix)} for problem in problems
        ]
        print_json({"error": errors[0], "errors": errors})


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """Bytes as text, see `parse_size`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        try:
            return value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Rate(click.FloatRange):
    """A number that is positive and finite."""

    name = "rate"

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number; click's range lets NaN and infinity pass."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a positive number.", param, ctx)
        return number


def complete_files(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete a text as the name of a file or folder: most texts are a model, an adapter or a recipe."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def recipe_place(text: str) -> Path | str:
    """Return the path of a recipe, or its address on the Hub (`hf://...`) or in an object store."""
    return text if has_scheme(text) else Path(text)


def command_line() -> str:
    """The command line as it was given, quoted for a shell."""
    return str(click.get_current_context().meta[COMMAND])


class Folder(click.Path):
    """A folder on this machine as a path, or the URL of a folder in an object store as text."""

    def __init__(self, *, file_okay: bool = True) -> None:
        super().__init__(file_okay=file_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a `Path`, or a URL."""
        return value if has_scheme(value) else super().convert(value, param, ctx)


def line(kind: str, problem: Problem) -> str:
    """Return a problem as one line, with options as flags: `overwrite=True` becomes `--overwrite`."""
    return f"{kind}[{problem.code}]: {as_flags(str(problem))}"


def as_flags(text: str) -> str:
    """Return text with the options of Python as flags: `overwrite=True` becomes `--overwrite`."""
    return _OPTION.sub(_flag, text)


_OPTION = re.compile(
    rf"\b({'|'.join(['trust_code', 'recipe', 'new_tokens', *(field.name for field in fields(MergeOptions))])})=(?:(True)\b|\[?'([^']*)'\]?|(\d+))"
)


def _flag(found: re.Match[str]) -> str:
    name, _, text, number = found.groups()
    if name == "tensor_names":
        return f"--tensor-{text}"
    flag = {"imports": "--import", "out_shard_bytes": "--out-shard-size"}.get(name, f"--{name.replace('_', '-')}")
    return f"{flag} {text or number}" if text or number else flag


import_option = click.option(
    "--import", "imports", multiple=True, metavar="MODULE", help="Import a module that registers methods with mergekit."
)  # fmt: skip


trust_option = click.option(
    "--trust-code", is_flag=True,
    help="Run code that the recipe or the model's folder names, wherever it is. Read it first; see docs/trust.md.",
)  # fmt: skip


links_option = click.option(
    "--follow-links", is_flag=True,
    help="Follow links of a model's folder to files outside of it (links into the Hub's cache always are).",
)  # fmt: skip


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the commands that can use a Ray cluster."""
    engine = click.option(
        "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
        help="ray: run the parts side by side on a Ray cluster. See docs/scale.md.",
    )  # fmt: skip
    address = click.option(
        "--ray-address", metavar="ADDRESS",
        help="Ray cluster: auto or host:port. Default: RAY_ADDRESS, else this machine.",
    )  # fmt: skip
    return engine(address(command))


parallel_option = click.option(
    "--parallel", type=click.IntRange(1),
    help="With --engine ray: tasks at a time. Default: one for each GPU, or for each machine without GPUs.",
)  # fmt: skip


def check_engine(engine: str, ray_address: str | None, parallel: int | None) -> None:
    """Refuse options of Ray without `--engine ray`."""
    for name, value in (("--ray-address", ray_address), ("--parallel", parallel)):
        if engine != "ray" and value is not None:
            raise click.UsageError(f"{name} needs --engine ray.")


def say(text: object, *, err: bool = True) -> None:
    """Print one line, on stderr by default, with control characters escaped."""
    click.echo(escape(str(text)), err=err)


def plain(text: object) -> str:
    """Text from a file or a recipe for a table or a progress bar of rich: no control characters, no markup."""
    from rich.markup import escape as without_markup

    return without_markup(escape(str(text)))


def console(*, stderr: bool = False, **options: Any) -> Console:
    """A console of rich that escapes control characters in everything that it prints, and pads no line of a file; `options` are rich's."""
    return _console_class()(stderr=stderr, **options)


_PADDING = re.compile(r" +(?=\n)")
"""The blanks at the ends of lines, which a table in a file does not need."""


@cache
def _console_class() -> type[Console]:
    from rich.console import Console
    from rich.segment import Segment

    class Escaping(Console):
        def _render_buffer(self, buffer: Iterable[Segment]) -> str:
            escaped = (s if s.control else Segment(escape(s.text, lines=True), s.style) for s in buffer)
            text = super()._render_buffer(escaped)
            return text if self.is_terminal else _PADDING.sub("", text)

    return Escaping


def warn(problems: Sequence[Problem]) -> None:
    """Print warnings on stderr."""
    for problem in problems:
        click.echo(line("warning", problem), err=True)
    _note(logging.WARNING, problems)


COMPILER = "paft_merge.compute.kernels.object_cache"
"""Name of the logger that announces the compiler, which the commands show."""

WORKERS = "paft_merge.engine.workers"
"""Name of the logger of a merge by several workers, which the commands show."""


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what `sys.stderr` is now: while a progress bar is drawn, rich prints above it.

    A warning that many models or trials of a command give is written once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._warned: set[str] = set()

    def filter(self, record: logging.LogRecord) -> Any:
        """Whether to write a record."""
        if record.levelno == logging.WARNING:
            text = record.getMessage()
            if text in self._warned:
                return False
            self._warned.add(text)
        return super().filter(record)

    @property
    def stream(self) -> Any:
        """The stream."""
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        """Ignore the stream of the base class."""


def clock() -> float:
    """Seconds for rates and times left: the clock stands still while kernels are compiled."""
    from paft_merge.compute.kernels.object_cache import compile_seconds

    return time.monotonic() - compile_seconds()


class LineFormatter(logging.Formatter):
    """Formats log records like `warn` does; the code is that of the record's `Problem`, else names its package."""

    def format(self, record: logging.LogRecord) -> str:
        """`warning[CODE]: message`; `info: message` below that level."""
        kind = record.levelname.lower()
        given = record.args if isinstance(record.args, tuple) else ()
        problem = next((one for one in given if isinstance(one, Problem)), None)
        package = record.name.removeprefix("paft_merge.").partition(".")[0].upper()
        code = "" if record.levelno < logging.WARNING else f"[{problem.code if problem else package}]"
        text = f"{kind}{code}: {escape(record.getMessage())}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C: files are closed and the user learns how to resume."""

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
