"""Evaluation with lm-eval (EleutherAI's harness): suites, tasks by name, and task files."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paft_merge.errors import EvaluateError, Problems, reading
from paft_merge.evaluating.data_rows import is_file
from paft_merge.evaluating.light import Score
from paft_merge.evaluating.loading import EvaluatedModel
from paft_merge.evaluating.schema import EvaluateSpec
from paft_merge.inputs.safetensors_header import read_text
from paft_merge.recipe.sections import beside_recipe
from paft_merge.recipe.trust import announce, needs_trust
from paft_merge.recipe.yaml_source import MAX_BYTES, did_you_mean, text_at

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A task, its number of shots (None: the task's), and its metric (None: the first of `_PREFERRED`)."""

    name: str
    shots: int | None = None
    metric: str | None = None
    parts: bool = False
    """For a group: take the plain mean over its parts, which lm-eval weights by their numbers of rows."""


SUITES: Mapping[str, tuple[Task, ...]] = {
    "open-llm-v1": (
        Task("arc_challenge", 25, "acc_norm,none"),
        Task("hellaswag", 10, "acc_norm,none"),
        Task("mmlu", 5, "acc,none", parts=True),
        Task("truthfulqa_mc2", 0, "acc,none"),
        Task("winogrande", 5, "acc,none"),
        Task("gsm8k", 5, "exact_match,strict-match"),
    )
}
"""Suites by name. `open-llm-v1` is the first Open LLM Leaderboard, whose mean PAFT reports; its MMLU is the mean over 57
subjects."""

_PREFERRED = ("acc_norm", "acc", "exact_match", "pass@1", "f1", "bits_per_byte", "word_perplexity")
"""Order of preference among the metrics of a task that reports several."""


def tasks_of(spec: EvaluateSpec, folder: Path) -> list[Task]:
    """List the tasks of a section. A file is named by its `task` key; a suite's task of the same name keeps its settings."""
    found = {task.name: task for task in (SUITES[spec.suite] if spec.suite else ())}
    for task in spec.tasks:
        name = _name_of(beside_recipe(task, folder)) if is_file(task) else task
        found.setdefault(name, Task(name, spec.num_fewshot))
    return list(found.values())


def check_tasks(spec: EvaluateSpec, folder: Path, *, trust_code: bool = False) -> None:
    """Check that lm-eval is installed, task files are valid and may run code, and names are known.

    A task file is code: its templates are not sandboxed, and `!function` imports a module. Checks run none of it.

    Raises:
        EvaluateError: MISSING, TASK; every problem at once.
    """
    if not spec.needs_lm_eval:
        return
    missing = [package for package in ("lm_eval", "requests") if find_spec(package) is None]
    if missing:
        fix = "pip install 'paft-merge[eval]', or use evaluate: {metrics: ...}, which needs no further packages"
        raise EvaluateError.of("MISSING", "lm-eval's tasks", f"{' and '.join(missing)} not installed", fix)
    problems = Problems()
    for task in filter(is_file, spec.tasks):
        with problems.catching():
            path = beside_recipe(task, folder)
            if not trust_code and (problem := needs_trust(task, path, folder)):
                problems.found.append(problem)
            _name_of(path)
    problems.raise_as(EvaluateError)
    known = _manager(spec, folder).all_tasks
    for name in dict.fromkeys(task.name for task in tasks_of(spec, folder)):
        if name not in known:
            fix = did_you_mean(name, known) or "`lm-eval ls tasks` lists the names; give your own task as a .yaml file"
            problems.add("TASK", "evaluate", f"lm-eval has no task {name!r}", fix)
    named = {task: _name_of(beside_recipe(task, folder)) if is_file(task) else task for task in spec.tasks}
    for name, count in Counter(named.values()).items():
        if count > 1:
            problems.add("TASK", "evaluate", f"{count} of the tasks have the name {name!r}", "give each its own")
    for name in dict.fromkeys((*named.values(), *filter(None, [spec.suite]))):
        if name in spec.metrics:
            what = f"a metric and lm-eval's tasks have the same name {name!r}"
            problems.add("TASK", "evaluate", what, "rename the metric")
    problems.raise_as(EvaluateError)


def check_data(spec: EvaluateSpec, folder: Path, *, run_files: bool = False) -> None:
    """Load the data of every task, so that missing data is reported before training.

    `run_files`: of task files too, which runs their code.

    Raises:
        EvaluateError: LM_EVAL, as in `run_tasks`.
    """
    if not run_files:
        spec = spec.model_copy(update={"tasks": [task for task in spec.tasks if not is_file(task)]})
    if spec.needs_lm_eval:
        names = [task.name for task in tasks_of(spec, folder)]
        with _errors_of("evaluate", names):
            _manager(spec, folder).load(names)


def _name_of(file: Path) -> str:
    """The name of the task in a file; EvaluateError TASK if it cannot be read or has none."""
    with reading(file, "TASK", EvaluateError, "give a task of lm-eval as YAML"):
        name = text_at(read_text(file, "TASK", MAX_BYTES), "task")
    if not name:
        raise EvaluateError.of("TASK", file, "not a task of lm-eval", "name it with task:")
    return name


def _manager(spec: EvaluateSpec, folder: Path) -> Any:
    own = sorted({str(beside_recipe(task, folder).resolve().parent) for task in spec.tasks if is_file(task)})
    return _index(tuple(own), spec.suite is not None or not all(map(is_file, spec.tasks)))


@cache
def _index(own: tuple[str, ...], defaults: bool) -> Any:
    """lm-eval's index of tasks, cached because it reads more than ten thousand files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(own) or None, include_defaults=defaults)


def run_tasks(subject: EvaluatedModel, spec: EvaluateSpec, folder: Path) -> dict[str, Score]:
    """Run a section's lm-eval tasks on a model in memory; a suite's mean is added under its name.

    Raises:
        EvaluateError: LM_EVAL, when a task cannot be run (most often because its data is missing).
    """
    from lm_eval.models.huggingface import HFLM

    tasks = tasks_of(spec, folder)
    for task in filter(is_file, spec.tasks):
        announce(task, beside_recipe(task, folder))
    with _quiet_log(subject, tasks):
        asked = HFLM(
            pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=spec.batch_size,
            max_length=subject.max_length,
        )  # fmt: skip
    found: dict[str, Score] = {}
    for shots in dict.fromkeys(task.shots for task in tasks):
        mine = [task for task in tasks if task.shots == shots]
        with _errors_of(subject.name, [task.name for task in mine]), _quiet_log(subject, mine):
            results = _evaluate(asked, [task.name for task in mine], shots, spec, folder)
        found |= {task.name: _score(results, task) for task in mine}
    ordered = {task.name: found[task.name] for task in tasks}
    if spec.suite:
        parts = [ordered[task.name].value for task in SUITES[spec.suite]]
        ordered[spec.suite] = Score(sum(parts) / len(parts), None, ())
    return ordered


def _evaluate(model: Any, names: list[str], shots: int | None, spec: EvaluateSpec, folder: Path) -> Any:
    import lm_eval

    limit = int(spec.limit) if spec.limit and spec.limit >= 1 else spec.limit
    return lm_eval.simple_evaluate(
        model=model, tasks=names, num_fewshot=shots, limit=limit, task_manager=_manager(spec, folder),
        random_seed=spec.seed, numpy_random_seed=spec.seed, torch_random_seed=spec.seed,
        fewshot_random_seed=spec.seed, bootstrap_iters=200, log_samples=False,
    )  # fmt: skip


@contextmanager
def _errors_of(where: str, names: Sequence[str]) -> Iterator[None]:
    """Convert every exception of lm-eval to EvaluateError LM_EVAL."""
    try:
        yield
    except Exception as error:  # tasks raise errors of any type
        what = f"{', '.join(names)}: {type(error).__name__}: {str(error).strip()[:300]}"
        fix = "remove the task, or run it with lm-eval for details"
        if isinstance(error, OSError):  # includes errors of datasets and of the Hub
            fix = "its data must be loadable here: with HF_HUB_OFFLINE only the cache is used"
        raise EvaluateError.of("LM_EVAL", where, what, fix) from error


class _LogFilter(logging.Handler):
    """Passes lm-eval's messages to our log, mostly as INFO, and records whether prompts were truncated."""

    cut = False

    def emit(self, record: logging.LogRecord) -> None:
        if "Truncating" in record.getMessage():
            self.cut = True
        else:
            log.log(record.levelno if record.levelno > logging.WARNING else logging.INFO, "%s", record.getMessage())


@contextmanager
def _quiet_log(subject: EvaluatedModel, tasks: Sequence[Task]) -> Iterator[None]:
    """Redirect lm-eval's log, and warn once if prompts were truncated."""
    theirs, handler = logging.getLogger("lm_eval"), _LogFilter()
    before = theirs.propagate
    theirs.addHandler(handler)
    theirs.propagate = False
    try:
        yield
    finally:
        theirs.removeHandler(handler)
        theirs.propagate = before
    if handler.cut:
        log.warning(
            "%s: there are prompts longer than the %d tokens of %s's context; their beginning (few-shot examples first) "
            "was cut, so the scores are not comparable",
            ", ".join(task.name for task in tasks), subject.max_length, subject.name,
        )  # fmt: skip


def _score(found: Mapping[str, Any], task: Task) -> Score:
    if task.parts:
        parts = [_score(found, Task(name, task.shots, task.metric)) for name in _parts(found, task.name)]
        errors = [part.stderr for part in parts if part.stderr is not None]
        spread = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
        return Score(sum(part.value for part in parts) / len(parts), spread, ())
    results: Mapping[str, Any] = found["results"][task.name]
    numbers = {k: v for k, v in results.items() if isinstance(v, int | float) and "_stderr," not in k}
    chosen = task.metric or _chosen(numbers)
    if chosen not in numbers:
        what = f"{task.name} does not report {chosen}"
        raise EvaluateError.of("LM_EVAL", "evaluate", what, f"it has {', '.join(numbers)}")
    metric, _, rest = chosen.partition(",")
    error = results.get(f"{metric}_stderr,{rest}")
    return Score(float(numbers[chosen]), float(error) if isinstance(error, int | float) else None, ())


def _parts(found: Mapping[str, Any], name: str) -> list[str]:
    """The tasks of a group, including those of nested groups."""
    below = found["group_subtasks"].get(name)
    return [part for inner in below for part in _parts(found, inner)] if below else [name]


def _chosen(numbers: Mapping[str, Any]) -> str:
    metrics = [key for key in numbers if "," in key]
    for wanted in _PREFERRED:
        for key in metrics:
            if key.split(",")[0] == wanted:
                return key
    return metrics[0]
