"""Data files of evaluations: rows of a .jsonl file, or text. They are checked before a model is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paft_merge.errors import EvaluateError, Problems
from paft_merge.evaluating.schema import Measurement
from paft_merge.recipe.sections import beside_recipe
from paft_merge.recipe.yaml_source import did_you_mean, show
from paft_merge.training.rewards import check_function

Row = dict[str, Any]


def is_file(task: str) -> bool:
    """Whether a task of lm-eval is given as a YAML file."""
    return task.endswith((".yaml", ".yml"))


def read_rows(path: Path, max_rows: int | None = None) -> list[Row]:
    """Read rows of a .jsonl file.

    Raises:
        EvaluateError: EVAL_DATA, with every line that is not a JSON object, or when the file is unreadable or empty.
    """
    rows, problems = list[Row](), Problems()
    for number, line in _lines(path):
        if max_rows is not None and len(rows) == max_rows:
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.add("EVAL_DATA", f"{path}:{number}", f"not JSON: {error}", "write one JSON object per line")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            problems.add("EVAL_DATA", f"{path}:{number}", f"is {show(row)}", "write one JSON object per line")
    if not rows and not problems.found:
        problems.add("EVAL_DATA", path, "has no rows", "give a file with at least one JSON object")
    problems.raise_as(EvaluateError)
    return rows


def read_lines(path: Path, max_rows: int | None = None) -> list[str]:
    """Read the lines of a text file that are not blank."""
    lines = [line for _, line in _lines(path)][:max_rows]
    if not lines:
        raise EvaluateError.of("EVAL_DATA", path, "is empty", "give a text file")
    return lines


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise EvaluateError.of("EVAL_DATA", path, f"cannot be read: {what}", "name an existing text file") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def answer_column(of: Measurement, row: Row) -> str:
    """Name of the column with the right answer."""
    return of.answer or ("answer" if "answer" in row else "completion")


def check_measurement(name: str, of: Measurement, folder: Path, *, trust_code: bool = False) -> None:
    """Check the data, the function (without running its code) and the expression of a light evaluation.

    Raises:
        EvaluateError: EVAL_DATA, REWARD, EXTRACT; every problem at once.
    """
    problems, path = Problems(), beside_recipe(of.data, folder)
    if of.extract is not None:
        try:
            groups = re.compile(of.extract).groups
        except re.error as error:
            problems.add("EXTRACT", name, f"extract is not a regular expression: {error}", "fix it")
        else:
            if groups < 1:
                problems.add("EXTRACT", name, "extract has no group", "put the answer in parentheses")
    if of.function is not None:
        with problems.catching():
            check_function(of.function, folder, trust_code=trust_code)
    with problems.catching():
        if of.kind == "perplexity":
            read_lines(path, of.max_rows)
        else:
            _check_columns(name, of, path, read_rows(path, of.max_rows), problems)
    problems.raise_as(EvaluateError)


def _check_columns(name: str, of: Measurement, path: Path, rows: Sequence[Row], problems: Problems) -> None:
    wanted = [of.prompt]
    if of.kind == "exact_match":
        wanted.append(answer_column(of, rows[0]))
    if of.kind == "preference":
        wanted += ["chosen", "rejected"]
    for column in wanted:
        lacking = next((number for number, row in enumerate(rows, 1) if not row.get(column)), None)
        if lacking is not None:
            hint = did_you_mean(column, rows[0])
            fix = hint or f"the first row has {', '.join(sorted(rows[0]))}"
            problems.add("EVAL_DATA", f"{path} row {lacking}", f"{name} needs the column {column!r}", fix)
