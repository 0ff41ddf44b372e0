"""Regular expressions of strangers, matched in limited time: Python's `re` may need exponential time for a short one.

`rank_pattern` and `alpha_pattern` of an adapter: plain names are matched by `re`. Every other pattern becomes a
nondeterministic automaton of limited size (Thompson 1968), whose time grows linearly with the text.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from re import _constants as codes  # type: ignore[attr-defined]  # the parser of `re` has no public name
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MOST_CHARACTERS = 10_000
MOST_STATES = 2_000
MOST_WAYS = 100_000
MOST_SECONDS = 5.0
"""Time that all patterns of one config may take."""

_PLAIN = re.compile(r"(?:[\w.\-|]|\\\.)*")


class PatternError(ValueError):
    """A pattern is malformed, uses what an automaton cannot match, or is too large."""


@dataclass
class Budget:
    """The time left for the patterns of one config."""

    left: float = MOST_SECONDS

    def matches(self, key: str, path: str) -> bool:
        """Whether the pattern `key` matches the end of `path`, from its start or after a dot, as PEFT does it.

        Raises:
            PatternError: as for `check_pattern`, or the time is over.
        """
        began = time.perf_counter()
        try:
            if self.left < 0:
                raise PatternError("takes too long to match, with those before it")
            if (plain := _plain(key)) is not None:
                return plain.match(path) is not None
            return _automaton(key).matches(path, began + self.left)
        finally:
            self.left -= time.perf_counter() - began


def check_pattern(key: str) -> None:
    """Raise PatternError for a pattern that cannot be matched."""
    if _plain(key) is None:
        _automaton(key)


def check_pattern_of_re(key: str) -> None:
    """Raise PatternError for a pattern that `re`, which PEFT uses, may try in too many ways."""
    check_pattern(key)
    if _plain(key) is None and _ways(parser.parse(key)) > MOST_WAYS:
        raise PatternError(
            "repeats or chooses too often, so PEFT could take for ever; write names, or a simpler pattern"
        )


def compile_pattern(key: str) -> re.Pattern[str]:
    """Compile a pattern; PatternError if it is malformed or too long."""
    if len(key) > MOST_CHARACTERS:
        raise PatternError(f"is longer than {MOST_CHARACTERS:,} characters")
    try:
        return re.compile(key)
    except (re.error, OverflowError, RecursionError) as error:
        what = str(error) if isinstance(error, re.error) else "is nested too deeply or counts too far"
        raise PatternError(f"is not a regular expression: {what}") from error


def _ways(items: Any) -> float:
    """About how many ways `re` can try to match a name of 100 characters."""
    ways = 1.0
    for op, argument in items:
        if op in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, repeated = argument
            inner = _ways(repeated)
            ways *= min(most - least + 1, 100) * (math.inf if inner > 1 and most > 1 else inner)
        elif op is codes.SUBPATTERN:
            ways *= _ways(argument[3])
        elif op is codes.BRANCH:
            ways *= sum(map(_ways, argument[1]))
    return ways


@dataclass(eq=False)
class _State:
    """One state: a character that `test` accepts, or without a test the states that are reached for free."""

    after: list[_State] = field(default_factory=list)
    test: Callable[[str], bool] | None = None
    where: str = ""
    """Condition of a free step: `start`, `end`, `edge` or `inside` of a word."""


@dataclass
class _Automaton:
    start: _State
    end: _State

    def matches(self, text: str, deadline: float) -> bool:
        """Whether the whole text matches."""
        now = _reached([self.start], text, 0)
        for at, character in enumerate(text):
            if time.perf_counter() > deadline:
                raise PatternError("takes too long to match")
            stepped = [after for state in now if state.test and state.test(character) for after in state.after]
            now = _reached(stepped, text, at + 1)
            if not now:
                return False
        return self.end in now


def _reached(states: Sequence[_State], text: str, at: int) -> dict[_State, None]:
    """The states reached from `states` without reading a character, at a place of the text."""
    found: dict[_State, None] = {}
    todo = list(states)
    while todo:
        state = todo.pop()
        if state not in found and (not state.where or _holds(state.where, text, at)):
            found[state] = None
            if state.test is None:
                todo += state.after
    return found


def _holds(where: str, text: str, at: int) -> bool:
    if where in ("start", "end"):
        return at == (0 if where == "start" else len(text))
    before, after = at > 0 and _is_word(text[at - 1]), at < len(text) and _is_word(text[at])
    return (before != after) == (where == "edge")


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


@lru_cache(4096)
def _plain(key: str) -> re.Pattern[str] | None:
    """The pattern for `re` if it repeats nothing, else None; PatternError if it is too long."""
    if len(key) > MOST_CHARACTERS:
        raise PatternError(f"is longer than {MOST_CHARACTERS:,} characters")
    return re.compile(rf"(.*\.)?({key})$") if _PLAIN.fullmatch(key) else None


@lru_cache(512)
def _automaton(key: str) -> _Automaton:
    """The automaton of `(.*\\.)?(key)`; PatternError if there is none."""
    compile_pattern(key)  # an error names the key, without what is added to it
    try:
        tree = parser.parse(rf"(.*\.)?({key})")
        if tree.state.flags & ~re.UNICODE:
            raise PatternError("sets flags, which are not supported here")
        builder = _Builder()
        end = builder.add()
        return _Automaton(builder.sequence(tree, end), end)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError("is not a regular expression after a prefix, or is nested too deeply") from error


_AT = {
    codes.AT_BEGINNING: "start", codes.AT_BEGINNING_STRING: "start", codes.AT_END: "end", codes.AT_END_STRING: "end",
    codes.AT_BOUNDARY: "edge", codes.AT_NON_BOUNDARY: "inside",
}  # fmt: skip
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: str.isdecimal, codes.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    codes.CATEGORY_SPACE: str.isspace, codes.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    codes.CATEGORY_WORD: _is_word, codes.CATEGORY_NOT_WORD: lambda c: not _is_word(c),
}  # fmt: skip


class _Builder:
    """Builds states from the parsed pattern, from its end to its start."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, *after: _State, test: Callable[[str], bool] | None = None, where: str = "") -> _State:
        """A further state."""
        self.count += 1
        if self.count > MOST_STATES:
            raise PatternError(f"needs more than {MOST_STATES:,} states")
        return _State(list(after), test, where)

    def sequence(self, items: Any, after: _State) -> _State:
        """The first state of a sequence whose last state leads to `after`."""
        for op, argument in reversed(list(items)):
            after = self.item(op, argument, after)
        return after

    def item(self, op: Any, argument: Any, after: _State) -> _State:
        """The first state of one item."""
        if op is codes.SUBPATTERN and not argument[1] and not argument[2]:
            return self.sequence(argument[3], after)
        if op is codes.BRANCH:
            return self.add(*(self.sequence(branch, after) for branch in argument[1]))
        if op in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            least, most, items = argument
            return self.repeat(least, most, items, after)
        if op is codes.AT and argument in _AT:
            return self.add(after, where=_AT[argument])
        return self.add(after, test=_test(op, argument))

    def repeat(self, least: int, most: int, items: Any, after: _State) -> _State:
        """The first state of a repetition."""
        if most is codes.MAXREPEAT:
            first = self.add(after)
            first.after.append(self.sequence(items, first))
        else:
            first = after
            for _ in range(most - least):
                first = self.add(self.sequence(items, first), after)
        for _ in range(least):
            before, first = first, self.sequence(items, first)
            if first is before:  # an empty item
                break
        return first


def _test(op: Any, argument: Any) -> Callable[[str], bool]:
    """The test of one character."""
    if op is codes.ANY:
        return lambda c: c != "\n"
    if op is codes.LITERAL:
        return lambda c: ord(c) == argument
    if op is codes.NOT_LITERAL:
        return lambda c: ord(c) != argument
    if op is codes.RANGE:
        return lambda c: argument[0] <= ord(c) <= argument[1]
    if op is codes.CATEGORY and argument in _CATEGORIES:
        return _CATEGORIES[argument]
    if op is codes.IN:
        negated = argument[0][0] is codes.NEGATE
        tests = [_test(*part) for part in argument[negated:]]
        return lambda c: any(test(c) for test in tests) != negated
    raise PatternError(f"uses {str(op).lower().replace('_', ' ')}, which cannot be matched in bounded time")
