"""Evaluation of a model, or of adapters on a base in memory: light metrics without further packages, and lm-eval.

| module | contents |
|---|---|
| schema | the section `evaluate:` |
| data_rows | data files, checked before anything is loaded |
| loading | the model in memory |
| vllm_loading | the model in vLLM |
| light | exact match, preference accuracy, mean reward, perplexity, self-consistency, agreement |
| agreement | how often answers agree, and the models of `with:` |
| harness | lm-eval |
| alpaca | answers in AlpacaEval's format |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paft_merge.errors import EvaluateError, Problems
from paft_merge.evaluating.agreement import source_parts
from paft_merge.evaluating.schema import HARNESS, EvaluateSpec, read_evaluate
from paft_merge.inputs.links import following_links
from paft_merge.recipe.yaml_source import Located
from paft_merge.training.engine_schema import ENGINES

if TYPE_CHECKING:
    from paft_merge.evaluating.light import Score
    from paft_merge.evaluating.loading import EvaluatedModel

__all__ = ["HARNESS", "EvaluateProgress", "EvaluateSpec", "check_evaluate", "evaluate", "read_evaluate"]


def check_evaluate(
    spec: EvaluateSpec, folder: Path = Path(), *, trust_code: bool = False, models: Collection[str] = ()
) -> None:
    """Check files, columns, functions, packages and tasks of an evaluation without loading a model or running code.

    `models` are names that `with:` may have.

    Raises:
        EvaluateError: with every problem.
    """
    from paft_merge.evaluating.data_rows import check_measurement

    problems = Problems()
    if spec.engine == "vllm":
        from paft_merge.training.vllm_engine import missing_vllm

        problems.found += missing_vllm("evaluate")
    for name, measurement in spec.metrics.items():
        with problems.catching():
            check_measurement(name, measurement, folder, trust_code=trust_code, models=models)
    if spec.needs_lm_eval:
        from paft_merge.evaluating.harness import check_tasks

        with problems.catching():
            check_tasks(spec, folder, trust_code=trust_code)
    problems.raise_as(EvaluateError)


@dataclass(frozen=True)
class EvaluateProgress:
    """The state of one evaluation: reported when it starts, after every batch, and when it is finished."""

    name: str
    """The metric, or `HARNESS` for all lm-eval tasks together."""
    done: int = 0
    """Rows that are evaluated."""
    rows: int | None = None
    """All rows; None while unknown, and for lm-eval."""
    scores: Mapping[str, Score] | None = None
    """The results, when the evaluation is finished."""
    seconds: float = 0.0


def evaluate(
    model: Path | str | Sequence[str],
    spec: EvaluateSpec | Mapping[str, Any],
    *,
    folder: Path = Path(),
    only: Sequence[str] | None = None,
    models: Mapping[str, Sequence[str]] | None = None,
    progress: Callable[[EvaluateProgress], None] = lambda progress: None,
    trust_code: bool = False,
    follow_links: bool = False,
) -> dict[str, Score]:
    """Evaluate a model, or `base+adapter` without writing the merged model anywhere.

    Args:
        model: A folder or Hub name; `base+adapter`, `base+adapter+adapter`; or a sequence of these parts.
        spec: The section `evaluate:`, read or as plain data.
        folder: Folder where relative paths of the section start.
        only: Names of the light metrics to measure, and `HARNESS` for lm-eval's tasks; None for everything.
        models: The parts of models by the names that `with:` has for them.
        progress: Called when an evaluation starts, after every batch, and when it is finished.
        trust_code: Run code that the section or the model names, also where it does not lie in `folder`: see docs/trust.md.
        follow_links: Follow links of a model's folder to files outside of it.

    Returns:
        A score by name, in the order of the section.

    Raises:
        EvaluateError, RecipeError: before the model is loaded where possible.
    """
    from paft_merge.evaluating.vllm_loading import load_for

    models = models or {}
    spec = spec if isinstance(spec, EvaluateSpec) else read_evaluate(Located.of(spec))
    check_evaluate(spec, folder, trust_code=trust_code, models=models)
    with following_links(follow_links):
        sources = _answers(spec, folder, only, models, trust_code)
    names, scores = _names(spec, only), dict[str, Any]()
    for engine in ENGINES:
        if mine := [name for name in names if spec.engine_of(name) == engine]:
            with following_links(follow_links):
                subject = load_for(engine, model, spec, trust_code=trust_code)
            with closing(subject):
                scores |= evaluate_loaded(subject, spec, folder=folder, only=mine, progress=progress, sources=sources)
    return {name: scores[name] for name in [*spec.metrics, *scores] if name in scores}


def _names(spec: EvaluateSpec, only: Collection[str] | None) -> list[str]:
    """The metrics to measure, in the order of the section, and `HARNESS` last."""
    names = [*spec.metrics, *([HARNESS] if spec.needs_lm_eval else [])]
    return [name for name in names if only is None or name in only]


def _answers(
    spec: EvaluateSpec, folder: Path, only: Sequence[str] | None, models: Mapping[str, Sequence[str]], trust_code: bool
) -> dict[str, list[list[str]]]:
    """The answers of the sources of every `agreement`, by its name; each source is loaded once, one at a time."""
    from paft_merge.evaluating.light import answers_of
    from paft_merge.evaluating.vllm_loading import load_for

    asked = {name: of for name, of in spec.metrics.items() if of.sources and (only is None or name in only)}
    found: dict[str, dict[str, list[str]]] = {name: {} for name in asked}

    def ask(source: str) -> None:
        parts = models.get(source) or source_parts(source, folder)
        with closing(load_for(spec.engine, parts, spec, trust_code=trust_code)) as subject:
            for name, of in asked.items():
                if source in (of.sources or ()):
                    found[name][source] = answers_of(subject, of, folder, spec.batch_size)

    for source in dict.fromkeys(source for of in asked.values() for source in of.sources or ()):
        ask(source)
    return {name: [found[name][source] for source in of.sources or ()] for name, of in asked.items()}


def evaluate_loaded(
    subject: EvaluatedModel,
    spec: EvaluateSpec,
    *,
    folder: Path = Path(),
    only: Sequence[str] | None = None,
    progress: Callable[[EvaluateProgress], None] = lambda progress: None,
    sources: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> dict[str, Score]:
    """Evaluate a model in memory, as `evaluate` does; `spec` is checked already.

    `sources` has the answers of each source of every `agreement`, by the name of the evaluation.
    """
    from paft_merge.evaluating.light import measure

    scores = dict[str, Any]()
    for name in _names(spec, only):
        started = time.monotonic()
        progress(EvaluateProgress(name))
        if name == HARNESS:
            from paft_merge.evaluating.harness import run_tasks

            found = run_tasks(subject, spec, folder)
        else:

            def advance(done: int, rows: int, name: str = name) -> None:
                progress(EvaluateProgress(name, done, rows))

            of = spec.metrics[name]
            theirs = (sources or {}).get(name, ())
            found = {name: measure(subject, of, folder, spec.batch_size, spec.seed, advance, theirs)}
        scores |= found
        progress(EvaluateProgress(name, scores=found, seconds=time.monotonic() - started))
    return scores
