"""Evaluations: light ones that need no package, and those of lm-eval; on a model, or on adapters upon a base in memory.

| room | what it is |
|---|---|
| spec | the section `evaluate:` |
| rows | files and functions it names, checked before anything is loaded |
| models | what is evaluated, in memory |
| light | exact match, preference accuracy, mean reward, perplexity |
| harness | lm-eval |
| alpaca | answers in AlpacaEval's format |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paft_merge.errors import EvaluateError, Problems
from paft_merge.evaluating.schema import EvaluateSpec, read_evaluate
from paft_merge.recipe.yaml_source import Located

if TYPE_CHECKING:
    from paft_merge.evaluating.light import Score

__all__ = ["EvaluateSpec", "check_evaluate", "evaluate", "read_evaluate"]


def check_evaluate(spec: EvaluateSpec, folder: Path = Path()) -> None:
    """Find everything that would stop an evaluation, without a model: files, columns, functions, packages, tasks.

    Raises:
        EvaluateError: with all of it.
    """
    from paft_merge.evaluating.data_rows import check_measurement

    problems = Problems()
    for name, measurement in spec.metrics.items():
        with problems.catching():
            check_measurement(name, measurement, folder)
    if spec.needs_lm_eval:
        from paft_merge.evaluating.harness import check_tasks

        with problems.catching():
            check_tasks(spec, folder)
    problems.raise_as(EvaluateError)


def evaluate(
    model: Path | str | Sequence[str],
    spec: EvaluateSpec | Mapping[str, Any],
    *,
    folder: Path = Path(),
    only: Sequence[str] | None = None,
    progress: Callable[[str, float], None] = lambda name, seconds: None,
) -> dict[str, Score]:
    """Evaluate a model, or `base+adapter` without writing the merged model anywhere.

    Args:
        model: a folder or Hub name; `base+adapter`, `base+adapter+adapter`; or these parts by themselves.
        spec: the section `evaluate:`, read or as plain data.
        folder: where relative paths of the section start.
        only: names of the light metrics to measure; None for all, and lm-eval's tasks too.
        progress: called after each evaluation with its name and its seconds.

    Returns:
        A score by name, in the order of the section.

    Raises:
        EvaluateError, RecipeError: what would stop it, before the model is loaded where that can be known.
    """
    from paft_merge.evaluating.light import measure
    from paft_merge.evaluating.loading import load_subject

    spec = spec if isinstance(spec, EvaluateSpec) else read_evaluate(Located.of(spec))
    check_evaluate(spec, folder)
    subject, scores = load_subject(model, spec), dict[str, Any]()
    for name, measurement in spec.metrics.items():
        if only is None or name in only:
            started = time.monotonic()
            scores[name] = measure(subject, measurement, folder, spec.batch_size, spec.seed)
            progress(name, time.monotonic() - started)
    if spec.needs_lm_eval and (only is None or HARNESS in only):
        from paft_merge.evaluating.harness import run_tasks

        started = time.monotonic()
        scores |= run_tasks(subject, spec, folder)
        progress(HARNESS, time.monotonic() - started)
    return scores


HARNESS = "lm-eval"
"""What all of lm-eval's tasks together are called in `only` and `progress`."""
