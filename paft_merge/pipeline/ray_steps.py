"""Execution of the steps of a run as tasks of a Ray cluster: each as soon as the steps that it needs are done.

The process that started the run keeps `run.json` and the lock; a task executes steps as `Executor` does, writes a log for
itself, and returns the records of its steps.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paft_merge.engine.ray_cluster import Cluster, Needs, TaskPool, until_seen
from paft_merge.errors import PaftMergeError, RunError
from paft_merge.output.log_file import logged
from paft_merge.pipeline.execution import Event, Executor
from paft_merge.pipeline.schema import RunRecipe, Stage
from paft_merge.pipeline.state import LOCK, State
from paft_merge.pipeline.steps import Answer, Evaluate, Step, Train
from paft_merge.training.adapter_record import versions

_SEEN_WITHIN = 60.0
"""Seconds after which a file must be visible on all machines that share a file system."""


@dataclass(frozen=True)
class Origin:
    """The process that submits tasks, as their machines see it."""

    folder: Path
    """The run folder, which the process has locked."""
    lock: str
    versions: Mapping[str, str]

    @classmethod
    def here(cls, folder: Path) -> Origin:
        """This process, in a folder that it has locked."""
        return cls(folder, _text(folder / LOCK) or "", versions())

    def check(self) -> None:
        """Check, in a task, that this machine shares the folder and has the same packages.

        Raises:
            RunError: OUTPUT or RAY; names the machine.
        """
        until_seen(lambda: _text(self.folder / LOCK) == self.lock, self.folder, RunError, _SEEN_WITHIN)
        mine = versions()
        if other := [name for name in mine if mine[name] != self.versions.get(name)]:
            what = f"machine {platform.node()} has {other[0]} {mine[other[0]]}, and the process that submits tasks "
            fix = "install the same versions on every machine"
            raise RunError.of("RAY", self.folder, f"{what}{self.versions.get(other[0])}", fix)


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


@dataclass(frozen=True)
class Unit:
    """Steps that one task executes, in order."""

    name: str
    stage: Stage
    steps: tuple[Step, ...]
    after: frozenset[str]
    """Names of the steps that must be done before."""

    def needs(self, share: Needs) -> Needs:
        """The resources of the task, from its share of the machines."""
        if self.stage not in ("train", "evaluate"):
            return replace(share, gpus=0)
        job = self.steps[0].job
        processes = job.section.get("processes", 1) if isinstance(job, Train) else 1
        return replace(share, gpus=processes) if share.gpus and processes > 1 else share


@dataclass(frozen=True)
class Outcome:
    """What a task returns."""

    records: dict[str, dict[str, Any]]
    """The records of its steps, for `run.json`."""
    events: tuple[Event, ...]
    error: PaftMergeError | OSError | MemoryError | None


def units_of(todo: Sequence[Step], *, gate: bool) -> list[Unit]:
    """Group steps into units: the metrics of an arm together, so that its model is loaded once; every other step alone.

    Args:
        todo: the steps to do, in the order of the stages. Those to export and push are left out.
        gate: whether the audit has requirements, without which nothing may be merged or evaluated.
    """
    grouped: dict[str, list[Step]] = {}
    for step in todo:
        together = step.name.rpartition("/")[0] if isinstance(step.job, Evaluate | Answer) else step.name
        if step.stage not in ("export", "push"):
            grouped.setdefault(together, []).append(step)
    # Chat templates of evaluations and merges are those of the adapters that are trained.
    before = {
        stage: {s.name for s in todo if s.stage in kinds}
        for stage, kinds in {
            "train": (),
            "audit": ("train",),
            "merge": ("train", "audit") if gate else ("train",),
            "verify": ("train", "audit") if gate else ("train",),
            "evaluate": ("train", "audit") if gate else ("train",),
        }.items()
    }
    waiting = {step.name for step in todo}
    found = []
    for name, steps in grouped.items():
        needed = {need for step in steps for need in step.needs if need in waiting}
        stage = steps[0].stage
        found.append(Unit(name, stage, tuple(steps), frozenset(needed | before[stage])))
    return found


def execute(executor: Executor, todo: Sequence[Step], cluster: Cluster, parallel: int | None) -> None:
    """Execute steps on a cluster, at most `parallel` tasks at a time. If one fails, no further one begins.

    Raises:
        PaftMergeError: the first step that failed; the steps that ran beside it have ended.
    """
    at_once, share = cluster.share(parallel)
    spec = executor.recipe.audit
    waiting, failed = units_of(todo, gate=bool(spec and spec.require)), list[tuple[Unit, Exception]]()
    left = {step.name for unit in waiting for step in unit.steps}
    for needs in dict.fromkeys(unit.needs(share) for unit in waiting):
        cluster.check(needs)
    running: dict[str, Unit] = {}
    origin = Origin.here(executor.folder)
    with TaskPool.open(cluster) as pool:
        while pool.running or (waiting and not failed):
            for unit in _ready(waiting, left) if not failed else ():
                if len(pool.running) >= at_once:
                    break
                waiting.remove(unit)
                running[unit.name] = unit
                for step in unit.steps:
                    executor.state.start(step)
                executor.on_event(Event(unit.name, "start"))
                records = {step.name: executor.state.steps[step.name] for step in unit.steps}
                given = (origin, executor.recipe, records, unit, executor.trust_code, int(share.cpus))
                pool.start(unit.name, do_unit, given, unit.needs(share))
            try:
                for name, outcome in pool.ended():
                    executor.state.steps.update(outcome.records)
                    executor.state.write()
                    _gather_log(executor.folder, running[name])
                    left -= {step for step, record in outcome.records.items() if record["state"] == "done"}
                    for event in outcome.events:
                        executor.on_event(event)
                    if outcome.error is not None:
                        failed.append((running[name], outcome.error))
                    del running[name]
            except Exception as error:  # raised below, when the tasks beside it have ended
                (name,) = running.keys() - {*pool.running.values()}
                unit = running.pop(name)
                executor.state.failed(unit.steps[0], error)
                executor.on_event(Event(unit.name, "failed", str(error).strip().rpartition("\n")[2]))
                failed.append((unit, error))
    if failed:
        unit, first = failed[0]
        raise executor.stopped(unit.stage, first) if isinstance(first, PaftMergeError) else first


def _ready(waiting: Sequence[Unit], left: set[str]) -> Iterator[Unit]:
    """The units whose steps before are done."""
    yield from [unit for unit in waiting if not unit.after & left]


def _log_of(folder: Path, unit: Unit) -> Path:
    return folder / "logs" / f"{unit.name.replace('/', '-')}.log"


def _gather_log(folder: Path, unit: Unit) -> None:
    """Move the log of a task to the end of that of its stage: on several machines they cannot append to one file."""
    own = _log_of(folder, unit)
    with suppress(FileNotFoundError), (folder / "logs" / f"{unit.stage}.log").open("a", encoding="utf-8") as file:
        file.write(own.read_text(encoding="utf-8"))
        own.unlink()


# --- in the tasks -----------------------------------------------------------------------------------------------------


class _Records(State):
    """The state of a task, which the process that started the run writes."""

    def write(self) -> None:
        """Write nothing."""


def do_unit(
    origin: Origin, recipe: RunRecipe, records: dict[str, Any], unit: Unit, trust_code: bool, threads: int
) -> Outcome:
    """Execute steps, in a task.

    Args:
        origin: the process that submits the task.
        recipe: of the run.
        records: of the steps, as they were started.
        unit: the steps.
        trust_code: as for `run`.
        threads: of merges and audits.
    """
    origin.check()
    folder = origin.folder
    events: list[Event] = []
    state = _Records(folder, records)
    executor = Executor(recipe, folder, state, events.append, trust_code, threads)
    error: PaftMergeError | OSError | MemoryError | None = None
    with logged(_log_of(folder, unit)):
        try:
            executor.do(unit.stage, unit.steps)
        except (PaftMergeError, OSError, MemoryError) as found:
            error = found
    ended = [event for event in events if event.what in ("done", "failed")]
    return Outcome(state.steps, tuple(ended), error)
