"""The search for a merge's parameters with Optuna: each trial merges into a scratch folder and evaluates the result.

The adapters are trained once, as `paft run` does. The first trial is the recipe as it is. The storage file (`tune.db`)
makes a search resumable: started again in the same folder, it continues with the trials it has.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paft_merge.auditing.report.figures import abridged
from paft_merge.engine.api import available_cores
from paft_merge.engine.ray_cluster import Cluster, Needs, TaskPool, uses_ray
from paft_merge.errors import Problems, RecipeError, RunError, escape
from paft_merge.evaluating.schema import LOWER_IS_BETTER
from paft_merge.inputs.links import following_links
from paft_merge.output.log_file import logged
from paft_merge.pipeline import plan, run
from paft_merge.pipeline.arms import Variant
from paft_merge.pipeline.execution import Event, OnEvent
from paft_merge.pipeline.fingerprints import key_of
from paft_merge.pipeline.named_models import resolved_merge
from paft_merge.pipeline.overrides import parse_key_path, put
from paft_merge.pipeline.preflight import check_merge
from paft_merge.pipeline.ray_steps import Origin
from paft_merge.pipeline.schema import RunRecipe, TuneSpec, load_run
from paft_merge.pipeline.state import locked
from paft_merge.recipe.yaml_source import did_you_mean, dotted, dump_yaml

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

STORAGE, BEST, PLOT, TRIALS = "tune.db", "best.yaml", "tune.png", "trials.csv"


@dataclass(frozen=True)
class Trial:
    """One merge that was evaluated."""

    number: int
    """From 1, in the order in which trials were finished."""
    value: float
    parameters: Mapping[str, Any]
    """By key of the space; None where the recipe as it is leaves a parameter out."""
    scores: Mapping[str, float]
    is_recipe: bool = False
    """The recipe as it is."""


@dataclass(frozen=True)
class TuneResult:
    """The result of a search."""

    best: Trial
    """The trial with the highest value; the earlier one of two equal ones."""
    trials: tuple[Trial, ...] = field(repr=False)
    recipe: Path
    """The file of the best recipe."""


def tune(
    recipe: Path | str,
    folder: Path | str,
    *,
    overrides: tuple[str, ...] = (),
    trials: int | None = None,
    progress: Callable[[Trial, int, int], None] = lambda trial, done, total: None,
    on_event: OnEvent = lambda event: None,
    trust_code: bool = False,
    follow_links: bool = False,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    parallel: int | None = None,
) -> TuneResult:
    """Search the space of a recipe's `tune:` for the merge with the highest metric.

    Args:
        recipe: A run's recipe with `merge:`, `evaluate:` and `tune:`.
        folder: A run folder; adapters that are not trained there yet are trained first.
        overrides: `key=value`, as for `run`.
        trials: Trials in all, including the recipe as it is and those of earlier searches in this folder;
            `tune: {trials: ...}` by default.
        progress: Called after each trial with the trial, the number of trials so far, and the number in all.
        on_event: As for `run`: called for the steps of training, and when a trial starts.
        trust_code, follow_links: As for `run`.
        engine, ray_address: As for `run`; with `ray`, trials run side by side.
        parallel: Trials at a time on Ray. None: one for each GPU, or for each machine without GPUs.

    Returns:
        The best trial, all trials, and the file of the best recipe, beside which are `tune.png`, `trials.csv` and `logs/tune.log`.

    Raises:
        RecipeError: TUNE, every problem of the section. RunError: MISSING, optuna is not installed.
    """
    if find_spec("optuna") is None:
        raise RunError.of("MISSING", "tune", "optuna not installed", "pip install 'paft-merge[tune]'")
    alone = (*overrides, "compare=false", "push=false")
    loaded, out = load_run(recipe, alone), Path(folder)
    spec = _checked(loaded)
    uses_ray(engine)
    if loaded.adapters:  # existing ones need no training
        run(
            recipe, folder, overrides=alone, only="train", on_event=on_event, trust_code=trust_code, follow_links=follow_links,
            engine=engine, ray_address=ray_address, parallel=parallel,
        )  # fmt: skip
    planner = plan(recipe, folder, overrides=alone, trust_code=trust_code, follow_links=follow_links).planner
    seed = loaded.seeds[0]
    paths = {name: planner.lora(seed, Variant(name)) for name in loaded.names}
    # The name of the study is a digest of everything besides its parameters that a trial's value depends on.
    trained = sorted(step.key for step in planner.steps.values() if step.stage == "train")
    judged = sorted(s.key for s in planner.steps.values() if s.stage == "evaluate" and "/merged/" in s.name)
    name = key_of(metric=spec.metric, space=spec.space, trained=trained, judged=judged, seed=spec.seed)
    total = trials or spec.trials
    with (
        following_links(follow_links),
        locked(out),
        logged(out / "logs" / "tune.log"),
        _pool(engine, ray_address, parallel) as (pool, at_once, needs),
    ):
        study, scratch = _study(out, name, spec, side_by_side=at_once > 1), out.resolve() / "scratch"
        found = _finished(study)
        left, has_recipe = max(total - len(found), int(not found)), any(trial.is_recipe for trial in found)
        begun: dict[str, optuna.Trial | None] = {}
        origin = Origin.here(out.resolve())
        try:
            while left or pool.running:
                while left and len(pool.running) < at_once:
                    asked = study.ask(_distributions(spec)) if has_recipe else None  # None: the recipe as it is
                    left, has_recipe, label = left - 1, True, f"trial-{len(begun) + 1}"
                    begun[label] = asked
                    on_event(Event(f"trial {total - left}/{total}", "start"))
                    data = merge_with(loaded, asked.params if asked else {})
                    given = (loaded, spec, data, paths, scratch / label, trust_code)
                    pool.start(label, _try, (*given, int(needs.cpus), origin), needs)
                for label, (value, scores) in pool.ended():
                    asked = begun[label]
                    if asked is None:
                        _add_recipe(study, spec, _as_it_is(loaded, spec), value, scores)
                    else:
                        asked.set_user_attr("scores", scores)
                        asked.set_user_attr("parameters", asked.params)
                        study.tell(asked, value)
                    found = _finished(study)
                    log.info("trial %d of %d: %.4f, %s", len(found), total, found[-1].value, found[-1].parameters)
                    progress(found[-1], len(found), total)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        best = max(found, key=lambda trial: (trial.value, trial.is_recipe, -trial.number))
        _write(loaded, load_run(recipe, overrides).located.data, best, found, spec, out)
    return TuneResult(best, tuple(found), out / BEST)


class _Here:
    """Runs tasks in this process, one when its result is asked for. `TaskPool` does the same on Ray."""

    def __init__(self) -> None:
        self.running = dict[str, Callable[[], Any]]()

    def start(self, name: str, do: Callable[..., Any], arguments: tuple[Any, ...], needs: Needs) -> None:
        self.running[name] = partial(do, *arguments)

    def ended(self) -> Iterator[tuple[str, Any]]:
        name, do = self.running.popitem()
        yield name, do()


@contextmanager
def _pool(engine: str, address: str | None, parallel: int | None) -> Iterator[tuple[_Here | TaskPool, int, Needs]]:
    """What runs trials, how many at a time, and the resources of each."""
    if engine != "ray":
        yield _Here(), 1, Needs(available_cores())
        return
    with Cluster.connect(address) as cluster:
        at_once, needs = cluster.share(parallel)
        cluster.check(needs)
        with TaskPool.open(cluster) as pool:
            yield pool, at_once, needs


def _checked(recipe: RunRecipe) -> TuneSpec:
    """The section `tune:`, checked against the recipe; raises RecipeError with every problem."""
    problems = Problems()
    if recipe.tune is None or recipe.merge is None or recipe.evaluate is None:
        fix = "add tune: {metric: ..., space: {...}}"
        raise RecipeError.of("TUNE", recipe.where(), "has no section tune", fix)
    known = [*recipe.evaluate.metrics]
    for name, weight in _terms(recipe.tune.metric).items():
        if weight < 0 and _less_is_better(recipe, name):
            what = f"less of {name} counts as better already, so {recipe.tune.metric!r} would seek more of it"
            problems.add("TUNE", recipe.where("tune", "metric"), what, f"add it: + {-weight:g} * {name}")
        if name not in known and not recipe.evaluate.needs_lm_eval:
            fix = did_you_mean(name, known) or f"evaluations are {', '.join(known)}"
            problems.add("TUNE", recipe.where("tune", "metric"), f"there is no evaluation {name!r}", fix)
    check_merge(recipe, recipe.merge.data, ("merge",), problems)
    alone = set(problems.found)
    for key, choices in recipe.tune.space.items():
        where = recipe.where("tune", "space", key)
        if not choices:
            problems.add("TUNE", where, "has nothing to choose from", "write [low, high], or a list of choices")
        elif key.startswith("merge."):
            problems.add("TUNE", where, "a key is a path inside merge:", f"write {key.removeprefix('merge.')}")
        elif _is_range(choices) and choices[0] >= choices[1]:
            problems.add("TUNE", where, f"{choices[0]} is not below {choices[1]}", "write [low, high]")
        elif _is_range(choices) and len(choices) == 3 and choices[0] <= 0:
            problems.add("TUNE", where, "a logarithmic range starts above 0", "raise the lower end")
        else:
            for end in choices[:2] if _is_range(choices) else choices:
                data, found = copy.deepcopy(recipe.merge.data), Problems()
                with problems.catching(where):
                    put(data, parse_key_path(key), end)
                    check_merge(recipe, data, ("merge",), found)
                problems.found += [replace(one, where=where) for one in found.found if one not in alone]
    problems.found = list(dict.fromkeys(problems.found))
    problems.raise_as(RecipeError)
    return recipe.tune


def _terms(metric: str) -> dict[str, float]:
    """`skill + 0.1 * happy` as weights by name.

    Raises:
        RecipeError: TUNE, it is not a sum of evaluations.
    """
    terms: dict[str, float] = {}
    for part in metric.replace("-", "+-").split("+"):
        if not part.strip():
            continue
        factor, star, name = part.rpartition("*")
        sign = 1.0
        if not star and name.strip().startswith("-"):
            sign, name = -1.0, name.strip()[1:]
        try:
            terms[name.strip()] = sign * (float(factor.replace(" ", "")) if star else 1.0)
        except ValueError:
            fix = "write for example skill, or skill + 0.1 * happy"
            raise RecipeError.of("TUNE", "tune.metric", f"{metric!r} is not a sum of evaluations", fix) from None
    return terms


def _is_range(choices: list[Any]) -> bool:
    numbers = [isinstance(one, int | float) and not isinstance(one, bool) for one in choices]
    return (len(choices) == 2 and all(numbers)) or (len(choices) == 3 and all(numbers[:2]) and choices[2] == "log")


def _study(folder: Path, name: str, spec: TuneSpec, *, side_by_side: bool) -> optuna.Study:
    import optuna

    def sampler(seed: int) -> optuna.samplers.TPESampler:
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
            # constant_liar: a trial stays away from those that run beside it
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=spec.startup_trials, constant_liar=side_by_side
            )

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{folder / STORAGE}"
    # The seed depends on the number of trials, so that a resumed search does not repeat its first ones.
    study = optuna.create_study(
        storage=storage, study_name=name, direction="maximize", load_if_exists=True, sampler=sampler(spec.seed)
    )
    study.sampler = sampler(spec.seed + len(study.trials))
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # left by a search that was killed
    return study


def _finished(study: optuna.Study) -> list[Trial]:
    import optuna

    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    done.sort(key=lambda trial: trial.datetime_complete or datetime.max)
    return [
        Trial(number, t.value or 0.0, t.user_attrs["parameters"], t.user_attrs["scores"], "recipe" in t.user_attrs)
        for number, t in enumerate(done, start=1)
    ]


def _as_it_is(recipe: RunRecipe, spec: TuneSpec) -> dict[str, Any]:
    """The values that the recipe has for the keys of the space; None where it leaves one out."""

    def value_at(steps: Iterable[str | int]) -> Any:
        data: Any = recipe.merge.data if recipe.merge else None
        for step in steps:
            inside = step in data if isinstance(data, dict) else isinstance(data, list) and isinstance(step, int)
            data = data[step] if inside else None
        return data

    return {key: value_at(parse_key_path(key)) for key in spec.space}


def _add_recipe(
    study: optuna.Study, spec: TuneSpec, values: Mapping[str, Any], value: float, scores: Mapping[str, float]
) -> None:
    """Add the recipe as it is as a finished trial; the sampler learns from the values that are in the space."""
    import optuna

    space = _distributions(spec)
    known = {}
    for key, given in values.items():
        with suppress(ValueError, TypeError):
            if space[key]._contains(space[key].to_internal_repr(given)):
                known[key] = given
    study.add_trial(
        optuna.trial.create_trial(
            value=value, params=known, distributions={key: space[key] for key in known},
            user_attrs={"recipe": True, "parameters": dict(values), "scores": dict(scores)},
        )
    )  # fmt: skip


def _try(
    recipe: RunRecipe,
    spec: TuneSpec,
    data: Mapping[str, Any],
    paths: Mapping[str, Mapping[str, str]],
    scratch: Path,
    trust_code: bool,
    threads: int,
    origin: Origin,
) -> tuple[float, dict[str, float]]:
    """Merge a recipe and evaluate the result: the value of the metric, and every score."""
    from paft_merge.engine.api import merge
    from paft_merge.evaluating import evaluate

    assert recipe.evaluate is not None
    origin.check()
    try:
        merge(
            resolved_merge(data, paths, recipe, recipe.seeds[0]),
            scratch,
            overwrite=True,
            write_model_card=False,
            threads=threads,
            warn=_log,
        )
        found = evaluate(scratch, recipe.evaluate, folder=recipe.folder, trust_code=trust_code)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    scores = {name: score.value for name, score in found.items()}
    missing = [name for name in _terms(spec.metric) if name not in scores]
    if missing:
        fix = did_you_mean(missing[0], scores) or f"evaluations are {', '.join(scores)}"
        raise RunError.of("TUNE", recipe.where("tune", "metric"), f"there is no evaluation {missing[0]!r}", fix)
    value = sum(weight * _upwards(recipe, name, scores[name]) for name, weight in _terms(spec.metric).items())
    return value, scores


def _upwards(recipe: RunRecipe, name: str, value: float) -> float:
    """A score with the sign that makes more better."""
    return -value if _less_is_better(recipe, name) else value


def _less_is_better(recipe: RunRecipe, name: str) -> bool:
    known = recipe.evaluate.metrics if recipe.evaluate else {}
    return (known[name].kind if name in known else name) in LOWER_IS_BETTER


def _log(problems: Any) -> None:
    for problem in problems:
        log.info("%s", problem)


def _distributions(spec: TuneSpec) -> dict[str, optuna.distributions.BaseDistribution]:
    """The space as Optuna's distributions."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, optuna.distributions.BaseDistribution] = {}
    for key, choices in spec.space.items():
        low, high = choices[0], choices[-1] if len(choices) == 2 else choices[min(1, len(choices) - 1)]
        if not _is_range(choices):
            found[key] = CategoricalDistribution(choices)
        elif isinstance(low, int) and isinstance(high, int) and len(choices) == 2:
            found[key] = IntDistribution(low, high)
        else:
            found[key] = FloatDistribution(float(low), float(high), log=len(choices) == 3)
    return found


def merge_with(recipe: RunRecipe, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The section `merge:` with values put at key paths of it."""
    assert recipe.merge is not None
    data: dict[str, Any] = copy.deepcopy(recipe.merge.data)
    for key, value in chosen.items():
        put(data, parse_key_path(key), value)
    return data


def _write(
    recipe: RunRecipe, whole: Mapping[str, Any], best: Trial, trials: list[Trial], spec: TuneSpec, folder: Path
) -> None:
    """Write the best recipe (the whole run's, with the best merge), every trial, and the plot."""
    data = {key: value for key, value in whole.items() if key != "tune"}
    if not best.is_recipe:
        data["merge"] = merge_with(recipe, best.parameters)
    found = "the recipe as it is, which no trial improves" if best.is_recipe else "found by paft tune"
    head = (
        f"# Score of {spec.metric}: {best.value:.4f}, trial {best.number} of {len(trials)}, {found}.\n"
        f"# Copy it beside {recipe.file.name}, where its relative paths hold; its adapters are then not trained again.\n"
    )
    (folder / BEST).write_text(head + dump_yaml(data), encoding="utf-8")
    keys, names = list(spec.space), list(best.scores)
    lines = [",".join(["trial", "value", *keys, *names])]
    for trial in trials:
        cells = [trial.number, trial.value, *(trial.parameters[k] for k in keys), *(trial.scores[n] for n in names)]
        lines.append(",".join(json.dumps(cell) for cell in cells))
    (folder / TRIALS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(trials, spec, folder / PLOT)


def plot(trials: list[Trial], spec: TuneSpec, path: Path) -> None:
    """Draw the search as a PNG: the value over the trials and over each parameter; skipped without matplotlib.

    The colour of a dot is the number of its trial; a star marks the best trial, a dashed line the recipe as it is.
    """
    if find_spec("matplotlib") is None:
        log.warning("no %s: matplotlib is not installed (pip install 'paft-merge[plots]')", path.name)
        return
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():  # a name may have a `$`
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        _draw(trials, spec, path)


def _draw(trials: list[Trial], spec: TuneSpec, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

    keys = list(spec.space)
    columns = min(len(keys) + 1, 4)
    rows = -(-(len(keys) + 1) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 3.4 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for panel in panels[len(keys) + 1 :]:
        panel.set_axis_off()
    best, own = max(trials, key=lambda t: (t.value, -t.number)), next((t for t in trials if t.is_recipe), None)
    numbers = [t.number for t in trials]
    whole = MaxNLocator(nbins=6, integer=True, min_n_ticks=1)

    def draw(panel: Any, at: Mapping[int, Any], shown: list[Trial]) -> Any:
        style = {"vmin": 1, "vmax": max(2, *numbers), "cmap": "viridis"}
        dots = panel.scatter(
            [at[t.number] for t in shown], [t.value for t in shown], s=16, c=[t.number for t in shown], **style
        )
        if best in shown:
            ring = {"marker": "*", "s": 170, "facecolor": "none", "edgecolor": "#cc3311", "label": "best trial"}
            panel.scatter([at[best.number]], [best.value], **ring)
        if own:
            panel.axhline(own.value, color="#777777", linestyle="--", linewidth=1, label="the recipe as it is")
        panel.grid(alpha=0.3)
        return dots

    dots = draw(panels[0], {number: number for number in numbers}, trials)
    running = [max(t.value for t in trials[: at + 1]) for at in range(len(trials))]
    panels[0].step(numbers, running, where="post", color="#cc3311", linewidth=1, label="best so far")
    panels[0].set_xlabel("trial")
    panels[0].xaxis.set_major_locator(whole)
    figure.supylabel(abridged(escape(spec.metric), 40), fontsize="medium")
    for panel, key in zip(panels[1:], keys, strict=False):
        panel.set_xlabel(abridged(escape(dotted(parse_key_path(key))), 36))
        choices, values = spec.space[key], {t.number: t.parameters[key] for t in trials}
        if _is_range(choices):
            shown = [t for t in trials if values[t.number] is not None]
        else:
            named = list(dict.fromkeys(_name_of(value) for value in (*choices, *values.values())))
            shown, values = trials, {number: named.index(_name_of(value)) for number, value in values.items()}
            panel.set(xlim=(-0.5, len(named) - 0.5))
            ticks = [abridged(escape(name), 18) for name in named]
            slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor", "fontsize": "small"}
            panel.set_xticks(range(len(named)), ticks, **(slant if sum(map(len, ticks)) > 24 else {}))
        draw(panel, values, shown)
        if _is_range(choices) and len(choices) == 3:
            panel.set_xscale("log")
            wide = choices[1] > 100 * choices[0]
            panel.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
            panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            panel.xaxis.set_minor_locator(NullLocator())
        if not shown:
            panel.set_xlim(choices[0], choices[1])
    figure.colorbar(dots, ax=panels, label="trial", pad=0.01).ax.yaxis.set_major_locator(whole)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def _name_of(choice: Any) -> str:
    return "not set" if choice is None else str(choice)
