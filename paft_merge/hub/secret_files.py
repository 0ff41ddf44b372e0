"""Secrets in the files of a folder, whatever their names and encodings."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from paft_merge.errors import Problem
from paft_merge.recipe.secrets import LONGEST, find_secrets

_PIECE = 1 << 20
_SNIFFED = 1 << 13
_CONTEXT = 4
"""Characters before a secret that its pattern looks at, at most."""
_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PICKLED_ARGUMENTS = "training_args"
"""transformers pickles all arguments of a trainer, with `hub_token`, into `training_args.bin`."""


class Place(NamedTuple):
    """A secret in a file: its kind, and its line (from 1; 0 in a file that is not text)."""

    kind: str
    line: int


def secrets_in_file(path: Path, own: str = "") -> Iterator[Place]:
    """Find secrets in a text file of any size, in pieces; other files have none, except pickled training arguments.

    Args:
        path: the file.
        own: this login's token, found in any form.
    """
    with path.open("rb") as file:
        encoding = _encoding(file.read(_SNIFFED))
        file.seek(0)
        if encoding is not None:
            yield from _in_text(file, encoding, own)
        elif path.name.startswith(_PICKLED_ARGUMENTS):
            yield from (Place(kind, 0) for kind, _ in _in_text(file, "latin-1", own))


def _encoding(head: bytes) -> str | None:
    """The encoding of a file that begins with `head`; None if it is not text."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if not even + odd:
        return "utf-8"
    many, few, name = (odd, even, "utf-16-le") if odd > even else (even, odd, "utf-16-be")
    return name if many * 5 > len(head) * 2 and few * 50 < len(head) else None


def _in_text(file: BinaryIO, encoding: str, own: str) -> Iterator[Place]:
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
    text, first, line, final = "", 0, 1, False
    while not final:
        piece = file.read(_PIECE)
        final = not piece
        text += decoder.decode(piece, final)
        # A secret that begins before `cut` ends in this text; one that begins after it is found with the next piece.
        cut = len(text) if final else max(first, len(text) - LONGEST)
        counted = first
        for found in sorted(find_secrets(text, first, own), key=lambda one: one.start):
            if found.start < cut:
                line += text.count("\n", counted, found.start)
                counted = found.start
                yield Place(found.kind, line)
        line += text.count("\n", counted, cut)
        kept = max(cut - _CONTEXT, 0)
        text, first = text[kept:], cut - kept


def refuse_secrets(files: dict[str, Path], own: str) -> list[Problem]:
    """One problem for each file and kind of secret, at the first line that has it; the secret is not shown."""
    problems = []
    for path in files.values():
        lines: dict[str, list[int]] = {}
        for kind, line in secrets_in_file(path, own):
            lines.setdefault(kind, []).append(line)
        for kind, found in lines.items():
            where = f"{path}:{found[0]}" if found[0] else str(path)
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            fix = "take it out, and revoke it if it was ever shown"
            problems.append(Problem("PUSH_SECRET", where, f"holds what looks like {kind}{more}", fix))
    return problems
