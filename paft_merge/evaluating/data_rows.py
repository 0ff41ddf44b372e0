"""Data files of evaluations: rows, or text. They are checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import islice
from pathlib import Path

from paft_merge.errors import EvaluateError, Problems, TrainError, reading
from paft_merge.evaluating.agreement import check_source
from paft_merge.evaluating.schema import Measurement
from paft_merge.inputs.adapters.patterns import PatternError, compile_pattern
from paft_merge.inputs.safetensors_header import read_text
from paft_merge.recipe.sections import beside_recipe, not_found
from paft_merge.training.loaded_sets import LOADERS
from paft_merge.training.rewards import check_function
from paft_merge.training.row_files import MOST_WHOLE, Row, native, suffix_of
from paft_merge.training.row_files import read_rows as rows_of_file
from paft_merge.training.row_forms import ANSWERS, QUESTIONS, TURNS, Kind, columns_of, normalise
from paft_merge.training.row_sources import source_of
from paft_merge.training.schema import DataSpec


def is_file(task: str) -> bool:
    """Whether a task of lm-eval is given as a YAML file."""
    return task.endswith((".yaml", ".yml"))


def read_rows(path: Path, max_rows: int | None = None) -> list[Row]:
    """Read the rows of a .json, .jsonl, .csv or .tsv file, with numbers as Python numbers.

    Raises:
        EvaluateError: EVAL_DATA, when the file is unreadable or empty, or a row is not an object.
    """
    return [native(row) for _, row in _placed(path, max_rows)]


def _placed(path: Path, max_rows: int | None) -> list[tuple[str, Row]]:
    """The rows of a file with their places."""
    try:
        if suffix_of(path) in LOADERS:
            return list(islice(source_of(DataSpec(path=str(path.absolute())), Path()).read(), max_rows))
        return list(islice(rows_of_file(path), max_rows))
    except TrainError as error:
        raise EvaluateError([replace(problem, code="EVAL_DATA") for problem in error.problems]) from error


def rows_for(of: Measurement, path: Path, *, chat: bool) -> list[Row]:
    """The rows of a light evaluation, in the form that training gives them (see `row_forms`).

    Args:
        of: What to measure.
        path: The file.
        chat: The tokenizer has a chat template.

    Returns:
        `exact_match`: `prompt` and `completion`, a text; `preference`: `prompt`, `chosen`, `rejected`; `reward`,
        `self_consistency`, `agreement`: `prompt` and the other columns.

    Raises:
        EvaluateError: EVAL_DATA, with everything that is wrong.
    """
    kinds: dict[str, Kind] = {
        "preference": "preference",
        "exact_match": "text",
        "reward": "prompts",
        "self_consistency": "prompts",
        "agreement": "prompts",
    }
    placed = _placed(path, of.max_rows)
    problems = Problems()
    columns = columns_of(row for _, row in placed)
    for key, name in (("prompt", of.prompt if of.prompt != "prompt" else None), ("answer", of.answer)):
        if name is not None and name not in columns:
            problems.add("EVAL_DATA", path, f"no row has the column {name!r}", f"correct {key}: in the metric")
    problems.raise_as(EvaluateError)
    placed = [(place, _renamed(row, of)) for place, row in placed]
    made = normalise(
        placed, columns_of(row for _, row in placed), kinds[of.kind], chat=chat, selected=True, problems=problems,
        where=str(path), keep_equal=True,
    ).rows  # fmt: skip
    problems.found = [replace(problem, code="EVAL_DATA") for problem in problems.found]
    prompts_only = kinds[of.kind] == "prompts"
    if any(row.get("tools") for row in made if not prompts_only):
        problems.add(
            "EVAL_DATA", path, "rows have tools, which this evaluation cannot give to the model", "remove them"
        )
    problems.raise_as(EvaluateError)
    if prompts_only:
        return [{key: value if key == "prompt" else native(value) for key, value in row.items()} for row in made]
    return [_question_and_answer(row, path, i) for i, row in enumerate(made, 1)] if of.kind == "exact_match" else made


def _renamed(row: Row, of: Measurement) -> Row:
    """A row with the columns `prompt` and `answer` of the section under the names that training uses."""
    if of.prompt != "prompt" and of.prompt in row:
        row = {"prompt": row[of.prompt], **{k: v for k, v in row.items() if k not in (of.prompt, "prompt")}}
    answer = of.answer or ("answer" if "answer" in row and not {*TURNS, *QUESTIONS[1:]} & row.keys() else None)
    if of.kind == "exact_match" and answer in row:
        row = {**{k: v for k, v in row.items() if k != answer and k not in ANSWERS}, "completion": row[answer]}
    return row


def _question_and_answer(row: Row, path: Path, number: int) -> Row:
    """The prompt, and the text of the last answer."""
    if "messages" in row:
        last = max(i for i, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
        if last:
            return {
                "prompt": row["messages"][:last],
                "completion": _text(row["messages"][last : last + 1], path, number),
            }
    if "completion" not in row or not row.get("prompt"):
        what = "has no question with an answer"
        raise EvaluateError.of("EVAL_DATA", f"{path} row {number}", what, "give prompt and answer, or messages")
    answer = row["completion"]
    return {"prompt": row["prompt"], "completion": answer if isinstance(answer, str) else _text(answer, path, number)}


def _text(answer: list[Row], path: Path, number: int) -> str:
    text: str = answer[-1]["content"]
    if not text.strip():
        what = "the last answer is a tool call without text"
        raise EvaluateError.of("EVAL_DATA", f"{path} row {number}", what, "remove such rows")
    return text


def read_lines(path: Path, max_rows: int | None = None) -> list[str]:
    """Read the lines of a text file that are not blank."""
    with reading(path, "EVAL_DATA", EvaluateError, "name an existing text file"):
        text = read_text(path, "EVAL_DATA", MOST_WHOLE)
    lines = [line for line in text.split("\n") if line.strip()][:max_rows]
    if not lines:
        raise EvaluateError.of("EVAL_DATA", path, "is empty", "give a text file")
    return lines


def check_measurement(
    name: str, of: Measurement, folder: Path, *, trust_code: bool = False, models: Collection[str] = ()
) -> None:
    """Check the data, the function (without running its code), the expression and the sources of a light evaluation.

    `models` are names that `with:` may have.

    Raises:
        EvaluateError: EVAL_DATA, REWARD, EXTRACT, SOURCE; every problem at once.
    """
    problems, path = Problems(), beside_recipe(of.data, folder)
    if of.extract is not None:
        try:
            groups = compile_pattern(of.extract).groups
        except PatternError as error:
            problems.add("EXTRACT", name, f"extract {error}", "correct it")
        else:
            if groups < 1:
                problems.add("EXTRACT", name, "extract has no group", "put the answer in parentheses")
    if of.function is not None:
        with problems.catching():
            check_function(of.function, folder, trust_code=trust_code)
    for source in of.sources or ():
        with problems.catching(name):
            check_source(source, folder, models)
    with problems.catching():
        if path.exists() and not path.is_file():
            raise EvaluateError.of("EVAL_DATA", of.data, "is not a file", "name a file of rows or text")
        if not path.exists():
            raise EvaluateError.of("EVAL_DATA", of.data, f"no such file, {not_found(folder)}", "check the path")
        if of.kind == "perplexity":
            read_lines(path, of.max_rows)
        else:
            rows_for(of, path, chat=True)
    problems.raise_as(EvaluateError)
