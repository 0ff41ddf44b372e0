"""Runs the seeds of a study and writes its results, page and plots; a finished seed is not run again.

The output folder holds `seeds/N.json` (one for each seed), `tuned.json` (settings that were chosen before), `results.json`
(all numbers, by row), `NAME.md` (the page) and `*.svg` (the plots).
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from paft_merge.errors import RunError, reading
from paft_merge.inputs.safetensors_header import read_text
from paft_merge.pipeline.state import locked
from paft_merge.studies.frontiers import draw_frontiers
from paft_merge.studies.pages import Results, claims, write_page
from paft_merge.studies.plots import draw
from paft_merge.studies.study import Study, Tables, load_study
from paft_merge.training.adapter_record import versions
from paft_merge.training.run_folder import write_json

FORMAT = 1
_AGAIN = "remove it; that part is then run again"

DIGITS = 5
"""Significant digits of a number in the files."""


class _Tuned(BaseModel):
    """Settings that were chosen before."""

    seconds: FiniteFloat
    settings: dict[str, Any]


class _Seed(BaseModel):
    """The numbers of a seed."""

    seed: int
    seconds: FiniteFloat
    tables: dict[str, dict[str, dict[str, Annotated[FiniteFloat, Field(strict=True)]]]]


@dataclass(frozen=True)
class StudyResult:
    """A finished study."""

    page: Path
    results: Path
    claims: tuple[tuple[str, ...], ...]
    """Each claim, followed by its verdicts."""
    ran: int
    """Seeds that were run; the others were finished before."""


def run_study(
    name: str,
    out: Path | str,
    *,
    data: Path | str | None = None,
    seeds: int | None = None,
    smoke: bool = False,
    overrides: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> StudyResult:
    """Run a study and write its results.

    Args:
        name: A study's name, or the path of its definition.
        out: The folder to write. Seeds that are finished there are kept.
        data: The folder with the data that the definition names; not every study needs one.
        seeds: Number of seeds, counted from 0; by default that of the definition.
        smoke: Run the small form, which tests the study and shows nothing.
        overrides: `key=value`, changes of the parameters.
        progress: Called with a line for each seed.

    Raises:
        RunError: STUDY, there is no such study, or the folder holds results with other parameters; BUSY, another process
            writes the folder. RecipeError: the definition has a fault.
    """
    study, folder = load_study(name, smoke=smoke, seeds=seeds, overrides=overrides), Path(out)
    given = Path(data) if data is not None else None
    expected = {"format": FORMAT, "study": study.name, "parameters": dict(study.expected())}
    if prepare := getattr(study.module, "check", None):
        expected["data"] = prepare(study.parameters, given)
    ran = 0
    with locked(folder), _one_thread(), _each_said_once():
        began = _processor_seconds()
        tuned = _kept(folder / "tuned.json", expected, _Tuned)
        if tuned is None and hasattr(study.module, "tune"):
            progress("choosing settings")
            found = _rounded(dict(study.module.tune(study.parameters)))
            tuned = expected | {"seconds": round(_processor_seconds() - began, 1), "settings": found}
            write_json(folder / "tuned.json", tuned)
        done = list[dict[str, Any]]()
        for seed in range(study.seeds):
            path = folder / "seeds" / f"{seed}.json"
            record = _kept(path, expected, _Seed)
            if record is not None and (other := _odd(record, seed, done)):
                raise RunError.of("STUDY", path, other, _AGAIN)
            if record is None:
                began = _processor_seconds()
                settings = tuned["settings"] if tuned else None
                tables: Tables = study.module.run_seed(study.parameters, seed, given, settings, folder / "work")
                _check_finite(tables, seed)
                record = expected | {
                    "seed": seed,
                    "seconds": round(_processor_seconds() - began, 1),
                    "tables": _rounded(tables),
                }
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, record)
                ran += 1
                progress(f"seed {seed}: {record['seconds']:.1f} s")
            done.append(record)
        results = _together(study, expected, done, tuned)
        _write_results(folder / "results.json", results)
        held = Results(results)
        plots, frontiers = draw(study.definition, held, folder), draw_frontiers(study.definition, held, folder)
        page = folder / f"{study.name}.md"
        write_page(page, study, held, plots, frontiers)
    return StudyResult(page, folder / "results.json", tuple(map(tuple, claims(study.definition, held))), ran)


def _processor_seconds() -> float:
    """Processor time of this process and its finished children."""
    return sum(os.times()[:4])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: sums do not depend on the machine's cores, and small models are not faster on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _New(logging.Filter):
    """Passes what is said of each of many trainings, in every setting and seed, for the first one alone."""

    def __init__(self) -> None:
        super().__init__()
        self._said = set[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is new, but for the name of its adapter."""
        if not record.name.startswith("paft_merge.training") or record.levelno != logging.WARNING:
            return True
        text = record.getMessage().partition(": ")[2]
        known = bool(text) and text in self._said
        self._said.add(text)
        return not known


@contextmanager
def _each_said_once() -> Iterator[None]:
    """Show what trainings warn of once."""
    filters = [(handler, _New()) for name in ("", "paft_merge") for handler in logging.getLogger(name).handlers]
    for handler, new in filters:
        handler.addFilter(new)
    try:
        yield
    finally:
        for handler, new in filters:
            handler.removeFilter(new)


def _kept(path: Path, expected: Mapping[str, Any], more: type[BaseModel]) -> dict[str, Any] | None:
    """The record of a finished part; None if there is none.

    Args:
        path: its file.
        expected: the keys and values that all records of the study have.
        more: its further keys.

    Raises:
        RunError: STUDY, it was made with other parameters, or is damaged.
    """
    if not path.exists():
        return None
    with reading(path, "STUDY", RunError, _AGAIN):
        found: dict[str, Any] = json.loads(read_text(path, "STUDY"))
        known = {key: found[key] for key in expected}
        try:
            more.model_validate(found)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise RunError.of("STUDY", path, f"is damaged at {where}: {error.errors()[0]['msg']}", _AGAIN) from error
    for key, value in expected.items():
        # Results of before the configs and the tokenizer of a base had digests are continued.
        wanted = {name: value[name] for name in value if name in known[key]} if key == "data" else value
        if known[key] != wanted:
            what = f"has results with {_difference(key, known[key], wanted)}"
            raise RunError.of("STUDY", path.parent, what, "choose another folder for --out")
    return found


def _odd(record: Mapping[str, Any], seed: int, before: Sequence[Mapping[str, Any]]) -> str:
    """Why a finished seed cannot be put together with those before it; empty if it can."""
    if record["seed"] != seed:
        return f"has the numbers of seed {record['seed']}"
    for one in before[:1]:
        cells, its = (
            {(t, row, m) for t, rows in x["tables"].items() for row, of in rows.items() for m in of}
            for x in (one, record)
        )
        if missing := sorted(cells ^ its):
            return f"has {'no' if missing[0] in cells else 'a'} number for {': '.join(missing[0])}, unlike seed {one['seed']}"
    return ""


def _difference(key: str, had: Any, wants: Any) -> str:
    """The first key in which two plain values differ, with both values, as `seeds 3 instead of 4`."""
    if isinstance(had, dict) and isinstance(wants, dict):
        for inner in dict.fromkeys([*wants, *had]):
            if had.get(inner) != wants.get(inner):
                return _difference(f"{key}.{inner}", had.get(inner), wants.get(inner))
    return f"{key} {had!r} instead of {wants!r}"


def _check_finite(tables: Tables, seed: int) -> None:
    """Raise RunError NONFINITE for a number that is not finite: it would make every mean and verdict of its row wrong."""
    for table, rows in tables.items():
        for row, metrics in rows.items():
            for metric, value in metrics.items():
                if not math.isfinite(value):
                    where = f"seed {seed}: {table}: {row}"
                    raise RunError.of("NONFINITE", where, f"{metric} is {value}", "lower the learning rate")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _together(
    study: Study, expected: Mapping[str, Any], done: Sequence[Mapping[str, Any]], tuned: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All numbers by table, row and metric, each a list over the seeds."""
    first: Tables = done[0]["tables"]
    return {
        **expected,
        "smoke": study.smoke,
        "seeds": [one["seed"] for one in done],
        "seconds": round(sum(one["seconds"] for one in (*done, *([tuned] if tuned else []))), 1),
        "versions": {package: versions()[package] for package in ("torch", "transformers")},
        "settings": tuned["settings"] if tuned else {},
        "tables": {
            table: {
                row: {metric: [one["tables"][table][row][metric] for one in done] for metric in metrics}
                for row, metrics in rows.items()
            }
            for table, rows in first.items()
        },
    }


def _write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results, with a line for each row of a table."""
    lines: list[str] = []
    for table, rows in results["tables"].items():
        inner: Iterable[str] = (f"   {json.dumps(row)}: {json.dumps(values)}" for row, values in rows.items())
        lines.append(f"  {json.dumps(table)}: {{\n" + ",\n".join(inner) + "\n  }")
    head = {key: value for key, value in results.items() if key != "tables"}
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    text = "{\n" + ",\n".join([*parts, ' "tables": {\n' + ",\n".join(lines) + "\n }"]) + "\n}\n"
    beside = path.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
