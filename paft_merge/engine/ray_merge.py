"""Merges on a Ray cluster: a task for each file of the output, which does what a worker does.

The process that calls `merge` plans, submits the tasks, and completes the output. A task makes the same plan, once in each
process, and writes one file into the folder that all machines share. Tensors do not pass through Ray.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from paft_merge.engine.balancing import by_file, shares
from paft_merge.engine.coded_weights import write_codes, writes_codes
from paft_merge.engine.options import MergeOptions
from paft_merge.engine.prediction import costs, predicted_peak
from paft_merge.engine.ray_cluster import Cluster, Needs, until_seen
from paft_merge.engine.streaming import Progress, merge_checkpoint
from paft_merge.engine.workers import FileWriter, identity_of, work_together
from paft_merge.errors import OutputError, PaftMergeError, Problem
from paft_merge.output.shared import SharedOutput
from paft_merge.plan import MergePlan

if TYPE_CHECKING:
    from paft_merge.output.folder import Output

_DRIVER = "driver"
"""The right to submit the tasks of a merge."""

_RAY_BYTES = 150 << 20
"""Memory of a process of Ray beside that of a merge."""

OpenPlan = Callable[[], AbstractContextManager[MergePlan]]
"""Plans the merge, in any process."""


@dataclass(frozen=True)
class Job:
    """Everything that the tasks of a merge have in common."""

    open_plan: OpenPlan
    out: Path
    options: MergeOptions
    threads: int
    hold: int
    driver: str
    """Id of the process that submits the tasks, among those that share the work folder."""


def merge_on_ray(
    plan: MergePlan,
    open_plan: OpenPlan,
    out: Path,
    options: MergeOptions,
    *,
    cluster: Cluster,
    threads: int,
    hold: int,
    complete: Callable[[Output], None],
    warn: Callable[[Sequence[Problem]], None],
) -> int:
    """Write every file of a merge in a task of Ray, and complete the output.

    Args:
        plan: the whole merge.
        open_plan: makes the same plan in a task; must be picklable.
        out: its output folder, on a file system that all machines share.
        options: see `MergeOptions`.
        cluster: runs the tasks.
        threads, hold: as for `merge_checkpoint`.
        complete: completes the output, whose files are all there.
        warn: receives warnings.

    Returns:
        The number of bytes of tensors that the tasks wrote.

    Raises:
        OutputError: BUSY, another process submits the tasks of this merge; RESUME_STALE, a machine has another version or input.
        PaftMergeError: as for `merge_checkpoint`.
    """
    peak = max((predicted_peak(file, threads, hold) for file in by_file(plan)), default=0)
    needs = Needs(threads, int(options.device != "cpu"), _RAY_BYTES + peak)
    written = 0

    def work(shared: SharedOutput) -> None:
        nonlocal written
        if not shared.leases.wait_for(_DRIVER, lambda _: None):
            holder = shared.leases.holder(_DRIVER)
            what = f"{holder.who if holder else 'another process'} merges this on Ray already"
            raise OutputError.of("BUSY", shared.part, what, "wait for it, or stop it")
        plain = replace(options, progress=None, warn=None)
        job = Job(open_plan, shared.out, plain, threads, hold, shared.leases.id)
        done = shared.files()
        order = [number for number in shares(costs(plan), 1)[0] if number not in done]
        cluster.check(needs)
        report = _Reported(plan, shared, options)
        for _, (nbytes, warnings) in cluster.each(write_file, [(job, n) for n in order], needs, waits=report):
            written += nbytes
            if warnings:
                warn(warnings)
        _wait_for_files(shared, options.lease_seconds)
        report()

    work_together(plan, out, "the driver of Ray's tasks", options, work=work, complete=complete)
    return written


def _wait_for_files(shared: SharedOutput, seconds: float) -> None:
    """Wait until this machine sees the files of all others, which NFS may show late."""
    pause, began = 0.0, monotonic()
    while missing := {*range(len(shared.shards))} - shared.files():
        if monotonic() - began > seconds:
            named = ", ".join(shared.shards[number].file for number in sorted(missing)[:5])
            what = f"{len(missing)} files that tasks have written are not there: {named}"
            raise OutputError.of("INCOMPLETE", shared.part, what, "use a file system that all machines share")
        pause = shared.pause(pause)


class _Reported:
    """Reports the progress of all tasks, from what the shared folder holds."""

    def __init__(self, plan: MergePlan, shared: SharedOutput, options: MergeOptions) -> None:
        self.shared, self.progress = shared, options.progress
        self.sizes = {tensor.name: tensor.nbytes for tensor in plan.tensors}
        self.files = [[slot.name for slot in shard.slots] for shard in plan.shards]
        self.done: set[str] = set()

    def __call__(self) -> None:
        if self.progress is None:
            return
        complete = [name for number in self.shared.files() for name in self.files[number]]
        found = {*complete, *self.shared.journalled()}
        if new := found - self.done:
            self.done = found
            nbytes, total = sum(self.sizes[name] for name in found), sum(self.sizes.values())
            self.progress(Progress(len(found), len(self.sizes), nbytes, total, sorted(new)[-1]))


# --- in the tasks -----------------------------------------------------------------------------------------------------


class _Opened:
    """The plan of a merge in a process that runs its tasks, one after the other."""

    def __init__(self) -> None:
        self._job, self._inputs = "", ExitStack()
        self.plan: MergePlan
        self.measured: list[MergePlan] | None = None

    def open(self, job: Job) -> None:
        """Plan a merge, unless the last task here was of the same one."""
        if self._job != job.driver:
            self._job, self.measured = "", None
            self._inputs.close()
            with _on_this_machine():
                self.plan = self._inputs.enter_context(job.open_plan())
            self._job = job.driver

    def close(self) -> None:
        """Close the inputs; the next task opens them again."""
        self._job = ""
        self._inputs.close()


_OPENED = _Opened()


def write_file(job: Job, number: int) -> tuple[int, list[Problem]]:
    """Write one file of the output, in a task.

    Returns:
        The bytes of the tensors written here, and warnings.
    """
    from paft_merge.compute.devices import ops_for

    warnings: list[Problem] = []
    written = 0

    def merge_into(output: Output, part: MergePlan, progress: Callable[[Progress], None]) -> None:
        nonlocal written
        write = write_codes if writes_codes(part) else merge_checkpoint
        write(part, output, threads=job.threads, ops=ops, hold=job.hold, progress=progress)
        written += part.bytes_written

    until_seen(lambda: SharedOutput.has(job.out, job.driver), job.out, OutputError, job.options.lease_seconds)
    ops = ops_for(job.options.device)
    try:
        _OPENED.open(job)
        plan = _OPENED.plan
        about, seconds = f"the task of {plan.shards[number].file}", job.options.lease_seconds
        with ExitStack() as stack:
            joined = SharedOutput.join(job.out, plan.shards, identity_of(plan, job.options), about, seconds)
            with _on_this_machine():
                shared = stack.enter_context(joined)
            writer = FileWriter(plan, about, shared, [number], warnings.extend)
            if _OPENED.measured is None:
                _OPENED.measured = writer.measured(job.threads, ops)
            writer.write([number], _OPENED.measured, merge_into, lambda *_: None)
    except BaseException:
        _OPENED.close()
        raise
    return written, warnings


@contextmanager
def _on_this_machine() -> Iterator[None]:
    """Name this machine in the problems of the block: the process that submitted the task had none of them."""
    try:
        yield
    except PaftMergeError as error:
        where = f"on machine {platform.node()}"
        problems = [replace(p, where=f"{where}: {p.where}" if p.where else where) for p in error.problems]
        raise type(error)(problems, error.warnings) from error
