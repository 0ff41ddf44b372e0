"""The search for a merge's parameters with Optuna: each trial merges in memory and evaluates the result.

The adapters are trained once, as `paft run` does. The first trial is the recipe as it is. The storage file (`tune.db`)
makes a search resumable: started again in the same folder, it continues with the trials it has.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

from paft_merge.engine.ray_cluster import Cluster, Needs, TaskPool, uses_ray
from paft_merge.errors import Problems, RecipeError, RunError
from paft_merge.hub import download
from paft_merge.inputs.links import following_links
from paft_merge.output.log_file import logged
from paft_merge.pipeline import plan, run
from paft_merge.pipeline.arms import Variant
from paft_merge.pipeline.execution import Event, Executor, OnEvent, answers_for
from paft_merge.pipeline.fingerprints import key_of
from paft_merge.pipeline.preflight import check_merge
from paft_merge.pipeline.ray_steps import Origin, execute
from paft_merge.pipeline.schema import RunRecipe, TuneSpec, load_run
from paft_merge.pipeline.search_plot import plot
from paft_merge.pipeline.search_result import (
    BEST,
    PLOT,
    Trial,
    TuneResult,
    chosen,
    front_of,
    less_is_better,
    noise_of,
    objectives,
    terms,
    value_of,
    write_result,
)
from paft_merge.pipeline.search_space import SearchSpace
from paft_merge.pipeline.state import State, locked
from paft_merge.pipeline.steps import Answer, Evaluate, Planner
from paft_merge.pipeline.trial_processes import TrialProcesses, trials_at_once
from paft_merge.pipeline.trials import Scores, Search, forget_model, metrics_of, try_merge
from paft_merge.recipe.yaml_source import did_you_mean

if TYPE_CHECKING:
    import optuna

__all__ = ["Trial", "TuneResult", "tune"]

log = logging.getLogger(__name__)

STORAGE = "tune.db"


def tune(
    recipe: Path | str,
    folder: Path | str,
    *,
    overrides: tuple[str, ...] = (),
    trials: int | None = None,
    pick: int | None = None,
    progress: Callable[[Trial, int, int], None] = lambda trial, done, total: None,
    on_event: OnEvent = lambda event: None,
    trust_code: bool = False,
    follow_links: bool = False,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    parallel: int | None = None,
) -> TuneResult:
    """Search the space of a recipe's `tune:` for the merge with the highest metric, or for the front of several.

    Args:
        recipe: A run's recipe with `merge:`, `evaluate:` and `tune:`.
        folder: A run folder; adapters that are not trained there yet are trained first.
        overrides: `key=value`, as for `run`.
        trials: Trials in all, including the recipe as it is and those of earlier searches in this folder;
            `tune: {trials: ...}` by default.
        pick: The number of the trial that becomes `best.yaml`, instead of the best one.
        progress: Called after each trial with the trial, the number of trials so far, and the number in all.
        on_event: As for `run`: called for the steps of training, and when a trial starts.
        trust_code, follow_links: As for `run`.
        engine, ray_address: As for `run`; with `ray`, trials run side by side on the machines of a cluster.
        parallel: Trials at a time. None: on Ray one for each GPU, or for each machine without GPUs; on this machine four on
            the cores that there are for a base of up to 256 MiB that is evaluated on the CPU, else one.

    Returns:
        The best trial, all trials, the front, and the file of the best recipe, beside which are `tune.png`, `trials.csv`,
        `logs/tune.log` and, for several objectives, the recipes of the front (`front/N.yaml`).

    Raises:
        RecipeError: TUNE, every problem of the section. RunError: MISSING, optuna is not installed; TUNE, there is no
            trial `pick`.
    """
    if find_spec("optuna") is None:
        raise RunError.of("MISSING", "tune", "optuna not installed", "pip install 'paft-merge[tune]'")
    alone = (*overrides, "compare=false", "export=false", "push=false")
    loaded, out = load_run(recipe, alone), Path(folder)
    space = _checked(loaded)
    spec = loaded.tune
    assert spec is not None
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
    total, sought = trials or spec.trials, objectives(spec.metric)
    needed = metrics_of(loaded, [term for one in sought for term in terms(one)])
    with following_links(follow_links), locked(out):
        executor = Executor(loaded, out.resolve(), State.read(out), on_event, trust_code)
        sources = _answers(executor, planner, needed, engine, ray_address, parallel)
    with (
        following_links(follow_links),
        locked(out),
        logged(out / "logs" / "tune.log"),
        _pool(loaded, engine, ray_address, parallel) as (pool, at_once, needs),
    ):
        study, stored = _studies(out, name, spec, side_by_side=at_once > 1)
        scratch = out.resolve() / "scratch"
        search = Search(loaded, paths, needed, out.resolve(), trust_code, uuid4().hex, sources)
        found = _finished(study)
        left, has_recipe = max(total - len(found), int(not found)), any(trial.is_recipe for trial in found)
        begun: dict[str, optuna.Trial | None] = {}
        origin = Origin.here(out.resolve())
        try:
            while left or pool.running:
                room = pool.at_once if isinstance(pool, TrialProcesses) else at_once
                while left and len(pool.running) < room:
                    asked = study.ask(space.distributions()) if has_recipe else None  # None: the recipe as it is
                    left, has_recipe, label = left - 1, True, f"trial-{len(begun) + 1}"
                    begun[label] = asked
                    on_event(Event(f"trial {total - left}/{total}", "start"))
                    data = space.merge_with(asked.params if asked else {})
                    pool.start(label, try_merge, (search, data, scratch / label, int(needs.cpus), origin), needs)
                for label, scores in pool.ended():
                    stored.add_trial(_tell(study, space, begun[label], scores))
                    found = _finished(study)
                    values = ", ".join(f"{value:.4f}" for value in found[-1].values)
                    log.info("trial %d of %d: %s, %s", len(found), total, values, found[-1].parameters)
                    progress(found[-1], len(found), total)
        finally:
            forget_model()
            shutil.rmtree(scratch, ignore_errors=True)
        best = chosen(found) if pick is None else next((trial for trial in found if trial.number == pick), None)
        if best is None:
            raise RunError.of("TUNE", out, f"there is no trial {pick}", f"its trials are 1 to {len(found)}")
        result = TuneResult(best, tuple(found), out / BEST, front_of(found))
        write_result(space, load_run(recipe, overrides).located.data, result, out)
        plot(found, space.dimensions, sought, out / PLOT)
    return result


def _answers(
    executor: Executor,
    planner: Planner,
    needed: Collection[str],
    engine: str,
    address: str | None,
    parallel: int | None,
) -> dict[str, list[list[str]]]:
    """The answers of the sources of every `agreement` that is needed, by its name; those that are missing are made."""
    jobs = [(step.job, step.needs) for step in planner.steps.values() if "/merged/" in step.name]
    mine = [
        (job, needs)
        for job, needs in jobs
        if isinstance(job, Evaluate) and job.metric in needed and job.arm.seed == planner.recipe.seeds[0]
    ]
    asked = {name: planner.steps[name] for _, needs in mine for name in needs}
    todo = [s for s in asked.values() if isinstance(s.job, Answer) and not executor.state.finished(s)]
    if todo:
        download(list(planner.existing.values()))
    if todo and engine == "ray":
        with Cluster.connect(address) as cluster:
            execute(executor, todo, cluster, parallel)
    elif todo:
        executor.stage("evaluate", todo)
    return {job.metric: answers_for(job) for job, _ in mine if job.answers}


@contextmanager
def _pool(
    recipe: RunRecipe, engine: str, address: str | None, parallel: int | None
) -> Iterator[tuple[TrialProcesses | TaskPool, int, Needs]]:
    """What runs trials, how many at a time, and the resources of each."""
    if engine != "ray":
        at_once = trials_at_once(recipe, parallel)
        with TrialProcesses.open(at_once) as processes:
            yield processes, at_once, Needs(processes.threads)
        return
    with Cluster.connect(address) as cluster:
        at_once, needs = cluster.share(parallel)
        cluster.check(needs)
        with TaskPool.open(cluster) as pool:
            yield pool, at_once, needs


def _checked(recipe: RunRecipe) -> SearchSpace:
    """The search space of the section `tune:`, checked against the recipe; raises RecipeError with every problem."""
    problems = Problems()
    if recipe.tune is None or recipe.merge is None or recipe.evaluate is None:
        fix = "add tune: {metric: ..., space: {...}}"
        raise RecipeError.of("TUNE", recipe.where(), "has no section tune", fix)
    known, where = [*recipe.evaluate.metrics], recipe.where("tune", "metric")
    sought = objectives(recipe.tune.metric)
    if len(set(sought)) < len(sought):
        problems.add("TUNE", where, "an objective is written twice", "write each once")
    for objective in sought:
        for name, weight in terms(objective).items():
            if len(sought) > 1 and weight < 0 and objective.replace(" ", "") == f"-{name}":
                fix = f"write {name}"
                problems.add("TUNE", where, f"{objective!r} has a sign, and each objective has its direction", fix)
            elif weight < 0 and less_is_better(recipe, name):
                what = f"less of {name} counts as better already, so {objective!r} would seek more of it"
                problems.add("TUNE", where, what, f"add it: + {-weight:g} * {name}")
            if name not in known and not recipe.evaluate.needs_lm_eval:
                fix = did_you_mean(name, known) or f"evaluations are {', '.join(known)}"
                problems.add("TUNE", where, f"there is no evaluation {name!r}", fix)
    if recipe.evaluate.engine == "vllm":
        what = "tune merges into a model that stays loaded, and vLLM loads a folder"
        problems.add("ENGINE", recipe.where("evaluate", "engine"), what, "--set evaluate.engine=transformers")
    check_merge(recipe, recipe.merge.data, ("merge",), problems)
    space = SearchSpace.of(recipe, problems)
    problems.raise_as(RecipeError)
    return space


def _studies(folder: Path, name: str, spec: TuneSpec, *, side_by_side: bool) -> tuple[optuna.Study, optuna.Study]:
    """The study in memory, which chooses parameters, and the stored one, which receives every trial that has ended.

    Optuna commits each change of a trial to the file by itself; that takes as long as a small merge.
    """
    import optuna

    def sampler(seed: int) -> optuna.samplers.TPESampler:
        with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
            # constant_liar: a trial stays away from those that run beside it
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=spec.startup_trials, constant_liar=side_by_side
            )

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{folder / STORAGE}"
    directions = ["maximize"] * len(objectives(spec.metric))
    stored = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    # The seed depends on the number of trials, so that a resumed search does not repeat its first ones.
    study = optuna.create_study(directions=directions, sampler=sampler(spec.seed + len(stored.trials)))
    study.add_trials(stored.get_trials(states=(optuna.trial.TrialState.COMPLETE,)))
    return study, stored


def _finished(study: optuna.Study) -> list[Trial]:
    import optuna

    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    done.sort(key=lambda trial: trial.datetime_complete or datetime.max)
    found = []
    for number, trial in enumerate(done, start=1):
        value, *more = trial.values
        noted, noise = trial.user_attrs, tuple(trial.user_attrs.get("noise", ()))
        found.append(Trial(number, value, noted["parameters"], noted["scores"], "recipe" in noted, tuple(more), noise))
    return found


def _tell(
    study: optuna.Study, space: SearchSpace, asked: optuna.Trial | None, scores: Scores
) -> optuna.trial.FrozenTrial:
    """Add a trial to the study: one that it asked for, or the recipe as it is (None); returns the trial."""
    import optuna

    recipe, flat = space.recipe, {name: value for name, (value, _) in scores.items()}
    assert recipe.tune is not None
    sought = objectives(recipe.tune.metric)
    values = [value_of(recipe, one, flat) for one in sought]
    parameters = dict(asked.params) if asked else space.as_it_is()
    noted = {"scores": flat, "parameters": parameters, "noise": [noise_of(one, scores) for one in sought]}
    if asked:
        for key, value in noted.items():
            asked.set_user_attr(key, value)
        return study.tell(asked, values)
    known, distributions = {}, space.distributions()
    for key, given in parameters.items():  # the sampler learns from the values that are in the space
        with suppress(ValueError, TypeError):
            if distributions[key]._contains(distributions[key].to_internal_repr(given)):
                known[key] = given
    study.add_trial(
        optuna.trial.create_trial(
            values=values, params=known, distributions={key: distributions[key] for key in known},
            user_attrs={"recipe": True, **noted},
        )
    )  # fmt: skip
    return study.trials[-1]
