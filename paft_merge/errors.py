"""The errors that a user can cause, and the warning about deprecated names.

    PaftMergeError
    |- RecipeError        a recipe is invalid
    |- CheckpointError    a checkpoint is broken or incomplete
    |- AdapterError       an adapter has no exact delta on its base
    |- MergeError         a merge cannot continue
    |- OutputError        the output cannot be written
    |- TrainError         a training run cannot start or continue
    |- AuditError         an audit has no answer, or a requirement failed
    |- EvaluateError      an evaluation cannot be done
    |- RunError           a pipeline run cannot start or continue
    |- HubError           the Hub refused a request or cannot be reached
    `- StoreError         an object store refused a request or cannot be reached

An error carries one `Problem` or more: all problems that can be found together are reported together. Bugs raise
`ValueError`, `TypeError` and the like, with a traceback.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

HOME = "https://github.com/paft-merge/paft-merge"
DOCS = f"{HOME}/blob/main/docs"
"""Address of the documentation, for messages: an installed package has no docs/."""

E = TypeVar("E", bound="PaftMergeError")


@dataclass(frozen=True)
class Problem:
    """One problem: a `code` for programs, where it is, what is wrong, and how to fix it."""

    code: str
    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return escape(f"{text}; {self.fix}" if self.fix else text)


class PaftMergeError(Exception):
    """An error that the user can fix; `str()` is one line per problem.

    Attributes:
        problems: at least one.
        warnings: what was unusual but possible before the error; a mistyped key is often its cause.
    """

    def __init__(self, problems: Sequence[Problem], warnings: Sequence[Problem] = ()) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems, self.warnings = tuple(problems), tuple(warnings)

    def __reduce__(self) -> tuple[type[PaftMergeError], tuple[Sequence[Problem], Sequence[Problem]]]:
        return type(self), (self.problems, self.warnings)  # an error of a child process arrives whole

    @classmethod
    def of(cls: type[E], code: str, where: object, what: str, fix: str = "") -> E:
        """Return an error with one problem."""
        return cls([Problem(code, str(where), what, fix)])


class RecipeError(PaftMergeError):
    """A recipe is invalid."""


class CheckpointError(PaftMergeError):
    """A checkpoint is broken or incomplete."""


class AdapterError(PaftMergeError):
    """An adapter has no exact delta on its base."""


class MergeError(PaftMergeError):
    """A merge cannot continue."""


class OutputError(PaftMergeError):
    """The output cannot be written."""


class TrainError(PaftMergeError):
    """A training run cannot start or continue."""


class AuditError(PaftMergeError):
    """An audit has no answer, or a requirement failed."""


class EvaluateError(PaftMergeError):
    """An evaluation cannot be done."""


class RunError(PaftMergeError):
    """A pipeline run cannot start or continue."""


class HubError(PaftMergeError):
    """The Hub refused a request or cannot be reached."""


class StoreError(PaftMergeError):
    """An object store refused a request or cannot be reached."""


class Problems:
    """Collects problems, to raise them together with `raise_as`."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, code: str, where: object, what: str, fix: str = "") -> None:
        """Add one problem."""
        self.found.append(Problem(code, str(where), what, fix))

    @contextmanager
    def catching(self, spot: str = "") -> Iterator[None]:
        """Add the problems of a `PaftMergeError` that the block raises, placed at `spot`, and suppress the error."""
        try:
            yield
        except PaftMergeError as error:
            for problem in error.problems:
                self.found.append(replace(problem, where=": ".join(filter(None, (spot, problem.where)))))

    def raise_as(self, kind: type[PaftMergeError]) -> None:
        """Raise one `kind` with all problems, if there are any."""
        if self.found:
            raise kind(self.found)


@contextmanager
def reading(path: object, code: str, kind: type[PaftMergeError], fix: str = "") -> Iterator[None]:
    """Turn every error of a block that reads and parses a file into one `kind`, because parsers raise anything.

    Args:
        path: the file, for the message.
        code: the code of the problem.
        kind: class of the error that is raised.
        fix: what the user can do.
    """
    try:
        yield
    except PaftMergeError:
        raise
    except Exception as error:
        raise kind.of(code, path, cause_of(error), fix) from error


def cause_of(error: BaseException) -> str:
    """Why a file cannot be read, from the error of a parser, of the system or of memory."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 text at byte {error.start}"
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    said = first_line(error)
    return f"cannot be read: {type(error).__name__}{f': {said}' if said != type(error).__name__ else ''}"


def first_line(error: BaseException) -> str:
    """The first line of the message of an error of another library, at most 300 characters; the error's class without a message."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def escape(text: str, *, lines: bool = False) -> str:
    """Return `text` with control characters escaped, so that a name cannot control a terminal.

    Escaped are also line breaks (unless `lines`), characters that reorder or hide text (bidi, zero width), and surrogates. One line
    is cut to 2,000 characters.
    """
    if text.isprintable():
        shown = text
    else:
        kept = "\n" if lines else ""
        shown = "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
    return shown if lines or len(shown) <= 2000 else shown[:1990] + "..."


class _EscapedRecord(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 (logging's name)
        return escape(_COLOURS.sub("", super().getMessage()), lines=True)


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
"""Sequences that set colours: transformers puts them around words of its reports."""


def escape_logs() -> None:
    """Escape control characters in the log records and warnings of all libraries, as they quote names and texts from files."""
    logging.setLogRecordFactory(_EscapedRecord)
    plain = warnings.formatwarning
    if plain.__module__ == warnings.__name__:  # else this was done before
        warnings.formatwarning = lambda *given, **named: escape(plain(*given, **named), lines=True)


def deprecated(name: str, use: str, *, since: str, stacklevel: int = 3) -> None:
    """Warn about a deprecated name; it keeps working in two releases after the one that deprecated it.

    Args:
        name: what is deprecated, with its kind (`"the option 'remote'"`).
        use: what to write instead (`"use 'stream_from_hub'"`).
        since: version that deprecated it.
        stacklevel: as for `warnings.warn`; 3 is the caller of the function that calls this one.
    """
    text = f"{name} is deprecated since paft-merge {since}, and two releases later it will be removed; {use}"
    warnings.warn(text, FutureWarning, stacklevel=stacklevel)
