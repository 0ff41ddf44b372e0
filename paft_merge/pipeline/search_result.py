"""The result of a search: its trials, the front of several objectives, the best trial, and the files that show them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paft_merge.errors import RecipeError, RunError
from paft_merge.evaluating.schema import LOWER_IS_BETTER
from paft_merge.pipeline.schema import RunRecipe
from paft_merge.pipeline.search_space import SearchSpace
from paft_merge.recipe.yaml_source import did_you_mean, dump_yaml

BEST, PLOT, TRIALS, FRONT = "best.yaml", "tune.png", "trials.csv", "front"


@dataclass(frozen=True)
class Trial:
    """One merge that was evaluated."""

    number: int
    """From 1, in the order in which trials were finished."""
    value: float
    """Of the first objective; more is better."""
    parameters: Mapping[str, Any]
    """By name in the space; None where the recipe as it is leaves a parameter out."""
    scores: Mapping[str, float]
    is_recipe: bool = False
    """The recipe as it is."""
    more: tuple[float, ...] = ()
    """Values of the other objectives; more is better."""
    noise: tuple[float, ...] = ()
    """Standard error of the value of each objective, over the rows of its evaluations; 0 where it is unknown."""

    @property
    def values(self) -> tuple[float, ...]:
        """The value of each objective; more is better."""
        return (self.value, *self.more)


@dataclass(frozen=True)
class TuneResult:
    """The result of a search."""

    best: Trial
    """The best trial by the rule of `chosen`, or the one that was picked."""
    trials: tuple[Trial, ...] = field(repr=False)
    recipe: Path
    """The file of the best recipe."""
    front: tuple[Trial, ...] = field(default=(), repr=False)
    """The trials that no other one beats in every objective, the best in the first objective first."""

    def to_json(self) -> dict[str, Any]:
        """The result as plain data; values that are not finite are None."""
        return {
            "recipe": str(self.recipe),
            "best": self.best.number,
            "front": [trial.number for trial in self.front],
            "trials": [
                {
                    "trial": one.number, "is_recipe": one.is_recipe, "parameters": dict(one.parameters),
                    "values": [value if math.isfinite(value) else None for value in one.values],
                    "scores": dict(one.scores),
                }
                for one in self.trials
            ],
        }  # fmt: skip


def objectives(metric: str | Sequence[str]) -> tuple[str, ...]:
    """The objectives of `tune: {metric: ...}`, each a sum of evaluations."""
    return (metric,) if isinstance(metric, str) else tuple(metric)


def terms(objective: str) -> dict[str, float]:
    """`skill + 0.1 * happy` as weights by name.

    Raises:
        RecipeError: TUNE, it is not a sum of evaluations.
    """
    found: dict[str, float] = {}
    for part in objective.replace("-", "+-").split("+"):
        if not part.strip():
            continue
        factor, star, name = part.rpartition("*")
        sign = 1.0
        if not star and name.strip().startswith("-"):
            sign, name = -1.0, name.strip()[1:]
        try:
            weight = sign * (float(factor.replace(" ", "")) if star else 1.0)
        except ValueError:
            fix = "write for example skill, or skill + 0.1 * happy"
            raise RecipeError.of("TUNE", "tune.metric", f"{objective!r} is not a sum of evaluations", fix) from None
        if name.strip() in found:
            what = f"{objective!r} has {name.strip()!r} twice"
            raise RecipeError.of("TUNE", "tune.metric", what, "write it once, with the sum of its weights")
        found[name.strip()] = weight
    return found


def less_is_better(recipe: RunRecipe, name: str) -> bool:
    """Whether lower scores of an evaluation are better."""
    known = recipe.evaluate.metrics if recipe.evaluate else {}
    return (known[name].kind if name in known else name) in LOWER_IS_BETTER


def value_of(recipe: RunRecipe, objective: str, scores: Mapping[str, float]) -> float:
    """The value of an objective, of which more is better.

    Raises:
        RunError: TUNE, a score is missing.
    """
    weights = terms(objective)
    missing = [name for name in weights if name not in scores]
    if missing:
        fix = did_you_mean(missing[0], scores) or f"evaluations are {', '.join(scores)}"
        raise RunError.of("TUNE", recipe.where("tune", "metric"), f"there is no evaluation {missing[0]!r}", fix)
    signed = {name: -scores[name] if less_is_better(recipe, name) else scores[name] for name in weights}
    return sum(weight * signed[name] for name, weight in weights.items())


def noise_of(objective: str, scores: Mapping[str, tuple[float, float | None]]) -> float:
    """The standard error of an objective from those of its evaluations, taken as independent; 0 for those without one."""
    return math.hypot(*(weight * (scores[name][1] or 0.0) for name, weight in terms(objective).items()))


def front_of(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The Pareto front: the trials that no other one equals in every objective and beats in one.

    Of trials with equal values the recipe as it is counts, else the first.
    """
    alone: dict[tuple[float, ...], Trial] = {}
    for trial in sorted(trials, key=lambda t: not t.is_recipe):
        alone.setdefault(trial.values, trial)
    found = [
        t for v, t in alone.items() if not any(o != v and all(a >= b for a, b in zip(o, v, strict=True)) for o in alone)
    ]
    return tuple(sorted(found, key=lambda t: t.values, reverse=True))


def chosen(trials: Sequence[Trial]) -> Trial:
    """The best trial: of those on the front within one standard error of the best first objective, the one with the best second
    objective, and so on.

    The standard error is that of the trial with the best value. With one objective it is the trial with the highest value;
    of equal ones the recipe as it is, else the first.
    """
    left = list(front_of(trials))
    for place in range(len(left[0].values)):
        top = max(left, key=lambda t: t.values[place])
        last = place == len(top.values) - 1
        within = 0.0 if last or place >= len(top.noise) else top.noise[place]
        left = [trial for trial in left if trial.values[place] >= top.values[place] - within]
    return left[0]


def write_result(space: SearchSpace, whole: Mapping[str, Any], result: TuneResult, folder: Path) -> None:
    """Write the best recipe, those of the front, and every trial.

    Args:
        space: the space of the search.
        whole: the data of the run's recipe, of which the merge is replaced.
        result: what was found.
        folder: the run folder.
    """
    recipe, best = space.recipe, result.best
    assert recipe.tune is not None
    sought = objectives(recipe.tune.metric)
    (folder / BEST).write_text(_recipe(space, whole, best, sought, len(result.trials)), encoding="utf-8")
    front = folder / FRONT
    if front.is_dir():
        for old in front.iterdir():
            if re.fullmatch(r"\d+\.yaml", old.name):
                old.unlink()
    if len(sought) > 1:
        front.mkdir(exist_ok=True)
        for trial in result.front:
            text = _recipe(space, whole, trial, sought, len(result.trials))
            (front / f"{trial.number}.yaml").write_text(text, encoding="utf-8")
    keys, names = [one.name for one in space.dimensions], list(best.scores)
    sums = ["value"] if len(sought) == 1 else [one for one in sought if one not in names]
    mark = ["front"] if len(sought) > 1 else []
    lines = [",".join(map(_cell, ["trial", *mark, *sums, *keys, *names]))]
    on_front = {trial.number for trial in result.front}
    for trial in result.trials:
        values = (
            trial.values if len(sought) == 1 else [v for o, v in zip(sought, trial.values, strict=True) if o in sums]
        )
        marked = [trial.number in on_front] if mark else []
        cells = [
            trial.number,
            *marked,
            *values,
            *(trial.parameters[k] for k in keys),
            *(trial.scores[n] for n in names),
        ]
        lines.append(",".join(json.dumps(cell) for cell in cells))
    (folder / TRIALS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(name: str) -> str:
    return f'"{name}"' if "," in name else name


def _recipe(space: SearchSpace, whole: Mapping[str, Any], trial: Trial, sought: Sequence[str], count: int) -> str:
    """The whole run's recipe with the merge of a trial."""
    data = {key: value for key, value in whole.items() if key != "tune"}
    if not trial.is_recipe:
        data["merge"] = space.merge_with(trial.parameters)
    found = "the recipe as it is, which no trial improves" if trial.is_recipe else "found by paft tune"
    if trial.is_recipe and len(sought) > 1:
        found = "the recipe as it is"
    values = [f"{_shown(space.recipe, one, value, trial):.4f}" for one, value in zip(sought, trial.values, strict=True)]
    scores = f"{'Score' if len(sought) == 1 else 'Scores'} of {', '.join(sought)}: {', '.join(values)}"
    return (
        f"# {scores}, trial {trial.number} of {count}, {found}.\n"
        f"# Copy it beside {space.recipe.file.name}, where its relative paths hold; its adapters are then not trained again.\n"
        + dump_yaml(data)
    )


def _shown(recipe: RunRecipe, objective: str, value: float, trial: Trial) -> float:
    """The value of an objective for readers: of several objectives, one that is an evaluation is shown as its score."""
    alone = objective in trial.scores and recipe.tune is not None and not isinstance(recipe.tune.metric, str)
    return trial.scores[objective] if alone else value


def shown_values(recipe: RunRecipe, trial: Trial) -> dict[str, float]:
    """The values of the objectives for readers, by objective: an evaluation as its score, a sum with more as better."""
    assert recipe.tune is not None
    sought = objectives(recipe.tune.metric)
    return {one: _shown(recipe, one, value, trial) for one, value in zip(sought, trial.values, strict=True)}
