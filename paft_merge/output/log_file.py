"""The log file of a command: the records of this package and of the training libraries, beside what the command writes."""

from __future__ import annotations

import io
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from paft_merge.errors import PaftMergeError, Problem, cause_of
from paft_merge.output.versions import version_of
from paft_merge.recipe.secrets import find_secrets

Note = Callable[[int, str], None]
"""Write a line with a level of `logging` to the log file alone."""

_LIBRARIES = ("transformers", "trl", "peft", "datasets")


def log_beside(out: Path, worker: str | None = None) -> Path:
    """The log of what writes the folder `out`: `out.log` beside it, and of one of several workers `out.worker-0.log`.

    It is not in the folder, which is compared with its manifest, replaced and pushed as a whole.
    """
    place = Path(os.path.abspath(out))
    return place.parent / f"{place.name or 'root'}{'' if worker is None else f'.worker-{worker}'}.log"


@contextmanager
def logged(path: Path, command: str = "") -> Iterator[Note]:
    """Append log records (INFO and above) to a file, and an error that ends the block.

    Args:
        path: the file. If it cannot be written, a warning says so.
        command: the command line. If it is given, the file begins with it, and is made with the first record and not before.
    """
    handler = _LogFile(path, command)
    if not command:
        handler.stream = handler._open()
    ours = logging.getLogger("paft_merge")
    level, shown = ours.level, ours.getEffectiveLevel()
    loggers = [ours, *map(logging.getLogger, _LIBRARIES)]
    for one in loggers:
        one.addHandler(handler)
    if not ours.isEnabledFor(logging.INFO):
        ours.setLevel(logging.INFO)

    def as_before(record: logging.LogRecord) -> bool:
        """Whether the terminal shows a record: it keeps its level, while the file gets INFO records."""
        return record.levelno >= shown or _has_level(record.name)

    terminal = list(logging.getLogger().handlers)
    for one_handler in terminal:
        one_handler.addFilter(as_before)

    def note(level: int, text: str) -> None:
        handler.handle(logging.getLogRecordFactory()("paft_merge", level, "", 0, "%s", (text,), None))

    try:
        yield note
    except BaseException as error:
        if handler.stream is not None:  # else it was refused before there was anything to log
            note(logging.ERROR, str(error) if isinstance(error, PaftMergeError) else f"{type(error).__name__} {error}")
        raise
    finally:
        for one_handler in terminal:
            one_handler.removeFilter(as_before)
        ours.setLevel(level)
        for one in loggers:
            one.removeHandler(handler)
        handler.close()


def _has_level(name: str) -> bool:
    """Whether a logger of another package, or a module of this one, has a level that was set for it."""
    package, _, module = name.partition(".")
    return package != "paft_merge" or bool(module and logging.getLogger(name).level)


class _LogFile(logging.FileHandler):
    """A log file whose faults never stop the work; secrets are left out of it."""

    def __init__(self, path: Path, command: str) -> None:
        super().__init__(path, encoding="utf-8", delay=True, errors="backslashreplace")
        self.command = command
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def format(self, record: logging.LogRecord) -> str:
        return _without_secrets(super().format(record))

    def _open(self) -> io.TextIOWrapper:
        try:
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            # A pipe without a reader is an error with O_NONBLOCK, not a wait.
            fd = os.open(
                self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666
            )
            stream = open(fd, "a", encoding="utf-8", errors=self.errors)  # noqa: SIM115 (the handler closes it)
            if _is_standard_stream(fd):  # `paft merge r.yaml out > out.log`
                stream.close()
                return _nowhere()
            if self.command:
                versions = f"paft-merge {version_of('paft-merge')}, Python {platform.python_version()}"
                stream.write(f"{versions}: {_without_secrets(self.command)}\n")
                stream.flush()
        except OSError as error:
            self._give_up(error)
            return _nowhere()
        return stream

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        self._give_up(sys.exc_info()[1] or OSError())
        self.stream = _nowhere()

    def _give_up(self, error: BaseException) -> None:
        what = cause_of(error).replace("cannot be read", "cannot be written")
        problem = Problem("LOG", self.baseFilename, what, "the work goes on without this log")
        logging.getLogger().warning("%s", problem)  # not the logger of this handler


def _nowhere() -> io.TextIOWrapper:
    return open(os.devnull, "w", encoding="utf-8")


def _is_standard_stream(fd: int) -> bool:
    for stream in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.fstat(fd), os.fstat(stream)) and not os.isatty(fd):
                return True
    return False


def _without_secrets(text: str) -> str:
    for found in reversed(list(find_secrets(text))):
        text = f"{text[: found.start]}({found.kind}){text[found.stop :]}"
    return text
