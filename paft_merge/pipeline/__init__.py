"""A run: one recipe from data to a merged model, in stages of steps, each done once.

`run` checks the whole recipe, plans its steps with a fingerprint of everything that a result depends on, and executes
those that are not finished. `plan` stops before the execution.

schema             the recipe as frozen models
overrides          `--set key=value`
sweeps             values of parameters that a comparison tries one by one
arms               variants of adapters, and the merges of a comparison
adapter_sections   sections of the adapters that are trained
named_models       merge recipes in which names of adapters are models
steps              steps, their fingerprints, and the arms of the table
fingerprints       digests of files
preflight          checks before anything is run
state              `run.json` and the lock
execution          running the steps
ray_steps          running them on a Ray cluster
paired_intervals   95 % intervals, paired over items and seeds
comparisons        the numbers of the table, and sentences about them
results_page       the table as HTML, and the picture of its frontiers
results_table      the table at the end
tuning             `paft tune`
search_space       what a search varies
trials             one merge of a search, and its evaluation in memory
trial_processes    trials at a time on this machine
search_result      the best trial, the front, and their files
search_plot        the plot of a search
starter_recipe     `paft init`
shipped_recipes    the recipes that come with the package
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from paft_merge.engine.ray_cluster import Cluster, uses_ray
from paft_merge.errors import RecipeError, RunError, escape
from paft_merge.evaluating import HARNESS
from paft_merge.evaluating.data_rows import is_file
from paft_merge.hub import download
from paft_merge.inputs.links import following_links
from paft_merge.output.card.markdown import escape_markdown
from paft_merge.pipeline.engines import check_engine, engine_of
from paft_merge.pipeline.execution import Event, Executor, OnEvent
from paft_merge.pipeline.preflight import check_adapters, check_run, check_task_data, check_training
from paft_merge.pipeline.results_table import Table
from paft_merge.pipeline.schema import STAGES, RunRecipe, Stage, load_run, read_run
from paft_merge.pipeline.state import State, locked
from paft_merge.pipeline.steps import Evaluate, Planner, Step, Train
from paft_merge.recipe.sections import beside_recipe
from paft_merge.recipe.trust import announce, file_of
from paft_merge.recipe.yaml_source import dump_yaml
from paft_merge.training.engine_schema import Engine

__all__ = ["STAGES", "Event", "Planned", "Run", "Stage", "load_run", "plan", "run"]


@dataclass(frozen=True, repr=False)
class Planned:
    """A checked recipe, its steps, and which of them are to do."""

    recipe: RunRecipe
    planner: Planner
    state: State
    todo: tuple[Step, ...]
    """Steps to do, in order."""

    def __repr__(self) -> str:
        return f"Planned({str(self.recipe.file)!r}, {len(self.todo)} of {len(self.steps)} steps to do)"

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in the order of the stages."""
        return self.planner.ordered

    def why(self, step: Step) -> str:
        """Why a step is to do; empty if it is not."""
        return (self.state.why(step) or "asked for") if step in self.todo else ""

    def engine_of(self, step: Step) -> Engine:
        """What generates text in a step."""
        return engine_of(self.recipe, step)

    def to_json(self) -> dict[str, Any]:
        """The steps as plain data: why each runs (empty: it does not), what it writes, and what generates text, if vLLM."""
        steps = [
            {
                "step": one.name, "stage": one.stage, "why": self.why(one), "out": str(one.out) if one.out else None,
                **({"engine": "vllm"} if self.engine_of(one) == "vllm" else {}),
            }
            for one in self.steps
        ]  # fmt: skip
        return {"steps": steps, "to_do": len(self.todo)}


@dataclass(frozen=True)
class Run:
    """The result of a run. A notebook shows its table."""

    folder: Path
    table: Table
    done: tuple[str, ...]
    """Names of the steps that this call executed."""

    def _repr_markdown_(self) -> str:
        made = f"{escape_markdown(self.folder)}: {self._made()}"
        return f"{made}\n\n{self.table.to_markdown()}" if self.table.rows else made

    def _repr_html_(self) -> str:
        made = f"<p>{html.escape(escape(str(self.folder)))}: {self._made()}</p>"
        return made + self.table._repr_html_() if self.table.rows else made

    def _made(self) -> str:
        return f"{len(self.done)} step{'s' * (len(self.done) != 1)} done"


def plan(
    recipe: Path | str,
    folder: Path | str,
    *,
    overrides: Sequence[str] = (),
    start: Stage | None = None,
    only: Stage | None = None,
    trust_code: bool = False,
    follow_links: bool = False,
) -> Planned:
    """Check a whole recipe and plan its steps in `folder`, without writing anything.

    Args:
        recipe: the file.
        folder: the run folder; need not exist.
        overrides: `key=value`, as for `load_run`.
        start: repeat this stage and those after it, changed or not.
        only: run this stage alone.
        trust_code: accept code that the recipe names and that does not lie beside it. A plan runs none of it.
        follow_links: follow links of the folders of models to files outside of them.

    Raises:
        RecipeError: every problem of the recipe and of the files that it names.
        RunError: STAGE, `start` or `only` is not in the recipe, or `only` needs a step that is not finished.
    """
    with following_links(follow_links):
        return _plan(recipe, folder, overrides, start, only, trust_code)


def _plan(
    recipe: Path | str,
    folder: Path | str,
    overrides: Sequence[str],
    start: Stage | None,
    only: Stage | None,
    trust_code: bool,
) -> Planned:
    loaded, problems = read_run(recipe, overrides)
    if loaded is not None:
        with problems.catching():
            check_run(loaded, trust_code=trust_code)
        if problems.found:
            with problems.catching():
                check_adapters(loaded, loaded.adapters, base=not any(p.code == "BASE" for p in problems.found))
    problems.raise_as(RecipeError)
    assert loaded is not None
    planner, state = Planner.plan(loaded, Path(folder)), State.read(Path(folder))
    todo = _todo(planner, state, start, only)
    check_training(loaded, todo)
    check_engine(loaded, planner.ordered, todo)
    check_task_data(loaded, todo)
    return Planned(loaded, planner, state, todo)


def _todo(planner: Planner, state: State, start: Stage | None, only: Stage | None) -> tuple[Step, ...]:
    """The steps to do, in order; RunError STAGE when `start` or `only` is not possible."""
    steps = planner.ordered
    there = {step.stage for step in steps}
    for stage in (start, only):
        if stage is not None and stage not in there:
            fix = f"its stages are {', '.join(s for s in STAGES if s in there)}"
            raise RunError.of("STAGE", planner.recipe.file, f"has no stage {stage}", fix)
    again = STAGES[STAGES.index(start) :] if start else ()
    todo = [s for s in steps if s.stage in again or not state.finished(s)]
    if only is not None:
        _check_before(steps, only, state)
    return tuple(step for step in todo if only in (None, step.stage))


def _check_before(steps: Sequence[Step], only: Stage, state: State) -> None:
    """Raise RunError STAGE if a step that a stage needs is not finished."""
    by_name = {step.name: step for step in steps}
    needed = dict.fromkeys(n for s in steps if s.stage == only for n in s.needs if by_name[n].stage != only)
    lacking = [name for name in needed if not state.finished(by_name[name])]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        what = f"stage {only} needs {', '.join(lacking[:3])}{more}, not finished as the recipe is now"
        raise RunError.of("STAGE", state.folder, what, "run without --only")


def run(
    recipe: Path | str,
    folder: Path | str,
    *,
    overrides: Sequence[str] = (),
    start: Stage | None = None,
    only: Stage | None = None,
    on_event: OnEvent = lambda event: None,
    planned: Callable[[Planned], None] = lambda planned: None,
    trust_code: bool = False,
    follow_links: bool = False,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    parallel: int | None = None,
) -> Run:
    """Train, audit, merge, evaluate and push as a recipe says; finished steps that have not changed are skipped.

    A run that was killed resumes when it is started again in the same folder.

    Args:
        recipe, folder, overrides, start, only: as for `plan`.
        on_event: called when a step starts, makes progress, and ends.
        planned: called once, before the first step.
        trust_code: run code that the recipe names, also where it does not lie beside it: see docs/trust.md.
        follow_links: as for `plan`.
        engine: `ray` executes steps that do not need each other at the same time, as tasks of a Ray cluster whose machines
            share the folder.
        ray_address: `auto` or `host:port`. None: that of `RAY_ADDRESS`, else Ray is started on this machine.
        parallel: tasks at a time on Ray. None: one for each GPU, or for each machine without GPUs.

    Returns:
        The folder, its table, and the names of the executed steps.

    Raises:
        PaftMergeError: before the first step, every problem found; later, the problem of the step that failed, the
            finished stages, and how to resume.
    """
    out = Path(folder)
    if out.exists() and not out.is_dir():
        raise RunError.of("OUTPUT", out, "is a file", "name a folder")
    on_ray = uses_ray(engine)
    ready = plan(
        recipe, folder, overrides=overrides, start=start, only=only, trust_code=trust_code, follow_links=follow_links
    )
    with following_links(follow_links), locked(out):
        state = State.read(out)  # again: another run may have finished between the plan and the lock
        ready = replace(ready, state=state, todo=_todo(ready.planner, state, start, only))
        planned(ready)
        _announce_code(ready)
        check_task_data(ready.recipe, ready.todo, run_files=True)
        download(list(ready.planner.existing.values()))
        (out / "recipe.yaml").write_text(
            ready.recipe.located.text or dump_yaml(ready.recipe.located.data), encoding="utf-8"
        )
        _forget(ready)
        executor = Executor(ready.recipe, out.resolve(), ready.state, on_event, trust_code)
        if on_ray and ready.todo:
            from paft_merge.pipeline.ray_steps import execute

            with Cluster.connect(ray_address) as cluster:
                execute(executor, ready.todo, cluster, parallel)
        for stage in ("export", "push") if on_ray else STAGES:
            steps = [step for step in ready.todo if step.stage == stage]
            if steps:
                executor.stage(stage, steps)
        plotted = ready.recipe.compare.frontier if ready.recipe.compare else None
        made = Table.of(ready.planner.arms, ready.steps, ready.state, ready.recipe.evaluate, plotted)
        made.write(out)
    return Run(out, made, tuple(step.name for step in ready.todo))


def _announce_code(ready: Planned) -> None:
    """Log the names of the functions that the steps to do will run."""
    recipe = ready.recipe
    metrics = recipe.evaluate.metrics if recipe.evaluate else {}
    if recipe.evaluate and any(isinstance(step.job, Evaluate) and step.job.metric == HARNESS for step in ready.todo):
        for task in filter(is_file, recipe.evaluate.tasks):
            announce(task, beside_recipe(task, recipe.folder))
    for step in ready.todo:
        if isinstance(step.job, Train):
            names = [reward.function for name in step.job.named for reward in recipe.adapters[name].reward]
        else:
            names = (
                [metrics[step.job.metric].function]
                if isinstance(step.job, Evaluate) and step.job.metric in metrics
                else []
            )
        for name in filter(None, names):
            announce(name, file_of(name, recipe.folder))


def _forget(ready: Planned) -> None:
    """Drop the records of steps that the recipe no longer has, and mark those to repeat as stale."""
    names = ready.planner.steps.keys()
    for name in [name for name in ready.state.steps if name not in names]:
        del ready.state.steps[name]
    for step in ready.todo:
        record = ready.state.steps.get(step.name)
        if record is not None and record["state"] == "done" and record["key"] == step.key:
            record["state"] = "stale"
    ready.state.write()
