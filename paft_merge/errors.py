"""The error tree: what a user can cause, and how to mend it.

    PaftMergeError
    |- RecipeError        a recipe that cannot be run as written
    |- CheckpointError    a checkpoint that is broken, incomplete or not what it says
    |- AdapterError       an adapter that has no exact delta on this base
    |- MergeError         a merge that cannot go on (names the tensor)
    |- OutputError        a place that cannot be written
    |- TrainError         a training run that cannot start or go on
    |- AuditError         an audit that has no answer, or a gate that failed
    |- EvaluateError      an evaluation that cannot be done
    |- RunError           a run of stages that cannot start or go on
    `- HubError           the Hub, or the way to it

An error carries one or more `Problem`s, because faults that can be known at once are told at once. Bugs stay
`ValueError`, `TypeError` and friends, with their traceback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

E = TypeVar("E", bound="PaftMergeError")


@dataclass(frozen=True)
class Problem:
    """One fault: `code` for machines, then where it is, what is wrong, and what mends it."""

    code: str
    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return escape(f"{text}; {self.fix}" if self.fix else text)


class PaftMergeError(Exception):
    """A fault that the user can mend; `str()` is one line per problem.

    `warnings` are what was found odd, and possible, before the fault: a mistyped key is often its cause.
    """

    def __init__(self, problems: Sequence[Problem], warnings: Sequence[Problem] = ()) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems, self.warnings = tuple(problems), tuple(warnings)

    @classmethod
    def of(cls: type[E], code: str, where: object, what: str, fix: str = "") -> E:
        """An error of one problem, ready to raise."""
        return cls([Problem(code, str(where), what, fix)])


class RecipeError(PaftMergeError):
    """A recipe that cannot be run as written."""


class CheckpointError(PaftMergeError):
    """A checkpoint that is broken, incomplete or not what it says."""


class AdapterError(PaftMergeError):
    """An adapter that has no exact delta on this base."""


class MergeError(PaftMergeError):
    """A merge that cannot go on."""


class OutputError(PaftMergeError):
    """A place that cannot be written."""


class TrainError(PaftMergeError):
    """A training run that cannot start or go on."""


class AuditError(PaftMergeError):
    """An audit that has no answer, or a gate that failed."""


class EvaluateError(PaftMergeError):
    """An evaluation that cannot be done."""


class RunError(PaftMergeError):
    """A run of stages that cannot start or go on."""


class HubError(PaftMergeError):
    """The Hub, or the way to it."""


class Problems:
    """Gathers faults so that they are raised together: `with Problems.gather(RecipeError) as problems: ...`."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, code: str, where: object, what: str, fix: str = "") -> None:
        """Note one fault and go on."""
        self.found.append(Problem(code, str(where), what, fix))

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Turn a `PaftMergeError` of the block into noted faults."""
        try:
            yield
        except PaftMergeError as error:
            self.found.extend(error.problems)

    def raise_as(self, kind: type[PaftMergeError]) -> None:
        """Raise everything noted so far as one `kind`; nothing when there is nothing."""
        if self.found:
            raise kind(self.found)


def escape(text: str) -> str:
    """`text` with control characters spelt out, so that a tensor's name cannot drive a terminal; at most 2,000 characters."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= 2000 else shown[:1990] + "..."


def unreachable(value: NoReturn) -> NoReturn:
    """Tell mypy, and a reader of a traceback, that every case was handled."""
    raise AssertionError(f"unhandled case: {value!r}")
