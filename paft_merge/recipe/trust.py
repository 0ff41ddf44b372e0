"""Consent to run code that a recipe names: `trust_code=True`, or a file beside the recipe and is named first.

A recipe is data. Checks and plans run none of its code; docs/trust.md lists what a command may run.
"""

from __future__ import annotations

import ast
import logging
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from paft_merge.errors import Problem
from paft_merge.recipe.sections import beside_recipe
from paft_merge.recipe.yaml_source import MAX_BYTES

log = logging.getLogger(__name__)

_TRUST = "read it, then pass trust_code=True"


def refused(where: str, what: str) -> Problem:
    """The problem of code that needs `trust_code`."""
    return Problem("TRUST", where, what, _TRUST)


def needs_trust(name: str, file: Path | None, folder: Path, does: str = "runs Python code of") -> Problem | None:
    """Why code needs `trust_code`; None for a file in the recipe's folder or below, where no link leads out of it.

    Args:
        name: the code, as the recipe names it.
        file: its file; None if unknown.
        folder: the recipe's folder.
        does: what it does, for the message, before the file.
    """
    if file is not None and file.resolve().is_relative_to(folder.resolve()):
        return None
    what = f"{does} {file}" if file else "runs Python code"
    return refused(name, f"{what}, which does not lie beside the recipe")


_NAMED: set[tuple[str, Path | None]] = set()


def announce(name: str, file: Path | None) -> None:
    """Log that code of a recipe will run, once in a process."""
    if (name, file) not in _NAMED:
        _NAMED.add((name, file))
        log.warning("%s", Problem("TRUST", "", f"runs {name}{f' ({file.resolve()})' if file else ''}"))


def file_of(name: str, folder: Path) -> Path | None:
    """The file that defines `rewards.py:f` or `package.module:f`; no module is imported to find it.

    None if a module is not found, or has no file of Python code.
    """
    source = name.rpartition(":")[0]
    if source.endswith(".py"):
        return beside_recipe(source, folder)
    path: list[str] | None = [str(Path.cwd()), *sys.path]
    spec = None
    for depth, _ in enumerate(parts := source.split("."), 1):
        spec = PathFinder.find_spec(".".join(parts[:depth]), path) if path is not None else None
        if spec is None:
            return None
        path = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else None
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


def functions_in(file: Path) -> set[str] | None:
    """The names that a Python file defines at its top level, found without running it; None if only running it shows them.

    Raises:
        OSError, SyntaxError, ValueError, RecursionError: the file cannot be read or parsed.
    """
    if file.exists() and not file.is_file():
        raise OSError("is not a regular file")
    if file.stat().st_size > MAX_BYTES:
        raise OSError(f"is larger than {MAX_BYTES >> 20} MiB")
    names: set[str] = set()
    for node in _statements(ast.parse(file.read_bytes()).body):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        else:
            names |= {
                part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            }
    return None if names & {"*", "__getattr__"} else names


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements, with those inside `if`, `try`, `with` and loops."""
    found: list[ast.stmt] = []
    for node in body:
        found.append(node)
        for inner in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found += _statements(getattr(node, inner, []))
        for handler in getattr(node, "handlers", []):
            found += _statements(handler.body)
    return found
