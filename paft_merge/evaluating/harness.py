"""lm-eval (EleutherAI's harness) as one more evaluation: suites, its tasks by name, and task files of your own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paft_merge.errors import EvaluateError, Problems
from paft_merge.evaluating.light import Score
from paft_merge.evaluating.models import Subject
from paft_merge.evaluating.rows import is_file, place_of
from paft_merge.evaluating.spec import EvaluateSpec
from paft_merge.recipe.text import did_you_mean, load_yaml

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A task, its number of shots (None: its own), and which of its metrics stands in the table (None: the first known)."""

    name: str
    shots: int | None = None
    metric: str | None = None


SUITES: Mapping[str, tuple[Task, ...]] = {
    "open-llm-v1": (
        Task("arc_challenge", 25, "acc_norm,none"),
        Task("hellaswag", 10, "acc_norm,none"),
        Task("mmlu", 5, "acc,none"),
        Task("truthfulqa_mc2", 0, "acc,none"),
        Task("winogrande", 5, "acc,none"),
        Task("gsm8k", 5, "exact_match,strict-match"),
    ),
}
"""Suites by name. `open-llm-v1` is the Open LLM Leaderboard's first one, whose mean is the number that PAFT reports."""

_PREFERRED = ("acc_norm", "acc", "exact_match", "pass@1", "f1", "bits_per_byte", "word_perplexity")
"""What stands in the table of a task that reports several, in this order."""


def tasks_of(spec: EvaluateSpec, folder: Path) -> list[Task]:
    """Every task of a section; a file is known by the name inside it."""
    found = list(SUITES[spec.suite]) if spec.suite else []
    for task in spec.tasks:
        name = str(load_yaml(place_of(task, folder)).data["task"]) if is_file(task) else task
        found.append(Task(name, spec.num_fewshot))
    return found


def check_tasks(spec: EvaluateSpec, folder: Path) -> None:
    """Find what would stop lm-eval: the package, a task's file, a name it does not know.

    Raises:
        EvaluateError: MISSING, TASK; everything at once.
    """
    if not spec.needs_lm_eval:
        return
    missing = [package for package in ("lm_eval", "requests") if find_spec(package) is None]
    if missing:
        fix = "pip install 'paft-merge[eval]', or use evaluate: {metrics: ...}, which needs no package"
        raise EvaluateError.of("MISSING", "evaluate", f"{' and '.join(missing)} not installed", fix)
    problems = Problems()
    for task in filter(is_file, spec.tasks):
        with problems.catching():
            located = load_yaml(place_of(task, folder))
            if not isinstance(located.data, Mapping) or not located.data.get("task"):
                problems.add("TASK", located.spot(), "is no task of lm-eval", "give it a name with task:")
    problems.raise_as(EvaluateError)
    known = _manager(spec, folder).all_tasks
    for name in dict.fromkeys(task.name for task in tasks_of(spec, folder)):
        if name not in known:
            fix = (
                did_you_mean(name, known)
                or "`lm-eval ls tasks` lists them; a task of your own is named by its .yaml file"
            )
            problems.add("TASK", "evaluate", f"lm-eval has no task {name!r}", fix)
    problems.raise_as(EvaluateError)


def _manager(spec: EvaluateSpec, folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    own = sorted({str(place_of(task, folder).resolve().parent) for task in spec.tasks if is_file(task)})
    defaults = spec.suite is not None or not all(map(is_file, spec.tasks))
    return TaskManager(include_path=own or None, include_defaults=defaults)


def run_tasks(subject: Subject, spec: EvaluateSpec, folder: Path) -> dict[str, Score]:
    """Run a section's lm-eval tasks on a model in memory; a suite's mean is added under its name.

    Raises:
        EvaluateError: LM_EVAL, a task cannot be run (its data is not here, most often).
    """
    tasks = tasks_of(spec, folder)
    found: dict[str, Score] = {}
    for shots in dict.fromkeys(task.shots for task in tasks):
        mine = [task for task in tasks if task.shots == shots]
        results = _evaluate(subject, [task.name for task in mine], shots, spec, folder)
        found |= {task.name: _score(results, task) for task in mine}
    ordered = {task.name: found[task.name] for task in tasks}
    if spec.suite:
        parts = [ordered[task.name].value for task in SUITES[spec.suite]]
        ordered[spec.suite] = Score(sum(parts) / len(parts), None, ())
    return ordered


def _evaluate(subject: Subject, names: Sequence[str], shots: int | None, spec: EvaluateSpec, folder: Path) -> Any:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    asked = HFLM(
        pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=spec.batch_size, max_length=subject.max_length
    )
    limit = int(spec.limit) if spec.limit and spec.limit >= 1 else spec.limit
    try:
        return lm_eval.simple_evaluate(
            model=asked, tasks=list(names), num_fewshot=shots, limit=limit, task_manager=_manager(spec, folder),
            random_seed=spec.seed, numpy_random_seed=spec.seed, torch_random_seed=spec.seed,
            fewshot_random_seed=spec.seed, bootstrap_iters=200, log_samples=False,
        )["results"]  # fmt: skip
    except Exception as error:  # a harness of many authors: a task may fail in any way, and all mean the same here
        what = f"{', '.join(names)}: {type(error).__name__}: {str(error).strip()[:300]}"
        fix = "check that its data can be loaded here (HF_HUB_OFFLINE forbids downloads)"
        raise EvaluateError.of("LM_EVAL", subject.name, what, fix) from error


def _score(results: Mapping[str, Mapping[str, Any]], task: Task) -> Score:
    numbers = {k: v for k, v in results[task.name].items() if isinstance(v, int | float) and "_stderr," not in k}
    chosen = task.metric if task.metric in numbers else _chosen(numbers)
    metric, _, rest = chosen.partition(",")
    error = results[task.name].get(f"{metric}_stderr,{rest}")
    return Score(float(numbers[chosen]), float(error) if isinstance(error, int | float) else None, ())


def _chosen(numbers: Mapping[str, Any]) -> str:
    metrics = [key for key in numbers if "," in key]
    for wanted in _PREFERRED:
        for key in metrics:
            if key.split(",")[0] == wanted:
                return key
    return metrics[0]
