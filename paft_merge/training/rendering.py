"""Limits of a chat template, which a stranger may have written: its errors, its length, its time and its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from paft_merge.errors import PaftMergeError, Problems, TrainError, first_line
from paft_merge.training.child_process import LimitError, calls_in_child
from paft_merge.training.row_parts import roles_of

T = TypeVar("T")

LONG = 1_000_000
"""Characters that a template may write whatever the row holds."""


def attempted(render: Callable[[], T], row: Any, characters: Callable[[Any], int]) -> tuple[T | None, str]:
    """Render a row, and return the result, or None and why the chat template refuses the row.

    Args:
        render: Renders the row.
        row: The row, or its turns.
        characters: The length of a result. One of more than `LONG` characters and ten times those of the row is refused.
    """
    try:
        made = render()
    except MemoryError:
        raise
    except Exception as error:  # templates raise errors of any type
        turns = row if isinstance(row, list) else row.get("messages") or row.get("prompt")
        of = f" (roles: {roles_of(turns)})" if isinstance(turns, list) else ""
        return None, f"{first_line(error)}{of}"
    if _is_long(characters(made), row):
        return None, f"it {_TOO_LONG}"
    return made, ""


_TOO_LONG = f"writes more than {LONG:,} characters, and more than ten times those of the row"


def _is_long(length: int, row: Any) -> bool:
    return length > LONG and length > 10 * len(str(row))


TRUSTED = "set chat_template: to one that you trust"
"""The fix for an adapter whose template takes too long or too much memory."""


def add_refusals(refused: Mapping[str, Sequence[str]], where: str, problems: Problems) -> None:
    """Add the places of the refused rows by reason."""
    for why, places in refused.items():
        more = f" (and {len(places) - 1} more rows)" if len(places) > 1 else ""
        fix = "correct or remove such rows, or set chat_template: to one that takes them"
        problems.add("TEMPLATE", where, f"{places[0]}{more}: the chat template refuses the row: {why}", fix)


@contextmanager
def within_limits(kind: type[PaftMergeError], where: str, place: Callable[[], str], fix: str) -> Iterator[None]:
    """Turn a `LimitError` of the block into a `kind` with the code TEMPLATE; `place` names the row that is rendered."""
    try:
        yield
    except LimitError as error:
        raise kind.of("TEMPLATE", where, f"{place()}: the chat template {error}", fix) from error


@contextmanager
def bounded_templates(where: str) -> Iterator[None]:
    """Within the block, transformers renders every chat template in a child process, whoever asks for it (TRL, a reward model).

    Raises:
        TrainError: TEMPLATE, a template takes too long or too much memory, or writes too much.
    """
    from transformers import tokenization_utils_base as base

    plain = base.render_jinja_template

    def short(conversations: Any, *given: Any, **named: Any) -> Any:
        texts, indices = plain(conversations, *given, **named)
        if any(_is_long(len(text), turns) for text, turns in zip(texts, conversations, strict=True)):
            raise LimitError(_TOO_LONG)
        return texts, indices

    with calls_in_child(short) as call:

        def render(conversations: Any, *given: Any, **named: Any) -> Any:
            rows = f"a row with the roles {roles_of(conversations[0])}" if len(conversations) == 1 else "rows"
            with within_limits(TrainError, where, lambda: rows, TRUSTED):
                return call(conversations, *given, **named)

        base.render_jinja_template = render
        try:
            yield
        finally:
            base.render_jinja_template = plain
