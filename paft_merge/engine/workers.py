"""Merges by several workers: each writes some files of the output, and one of them completes it.

Workers choose files, and nothing else: `merge_checkpoint` writes a file as it writes a whole output. A worker begins with its
share, which balances predicted cost, and then helps with files that no worker has begun or whose worker died. So a merge
ends whatever number of its workers run, at the same time or one after the other.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from paft_merge.engine.balancing import by_file, shares, spreading_size
from paft_merge.engine.finished import is_finished
from paft_merge.engine.options import MergeOptions, size_text
from paft_merge.engine.prediction import costs
from paft_merge.engine.process_group import ProcessGroup
from paft_merge.engine.sidefiles import identity, without_times
from paft_merge.engine.streaming import Progress, measured_over_model
from paft_merge.errors import OutputError, Problem, Problems
from paft_merge.output.leases import Holder
from paft_merge.output.placing import is_shared, part_of, writing
from paft_merge.output.shared import Counted, SharedOutput, counts
from paft_merge.plan import MergePlan

if TYPE_CHECKING:
    from paft_merge.compute.block_walk import BlockWalk, TiledTensor
    from paft_merge.compute.blocks import Ops
    from paft_merge.engine.worker_number import WorkerNumber
    from paft_merge.methods.rules.measured_weights import SourcedTensor
    from paft_merge.output.folder import Output

log = logging.getLogger(__name__)

_SAY_AGAIN = 300.0
"""Seconds after which a worker says again what it waits for."""

_COMPLETE = "complete"
"""The right to complete the output."""

MergeInto = Callable[["Output", MergePlan, Callable[[Progress], None]], None]


def merge_shared(
    plan: MergePlan,
    out: Path,
    worker: WorkerNumber | None,
    options: MergeOptions,
    *,
    merge_into: MergeInto,
    threads: int,
    ops: Ops,
    complete: Callable[[Output], None],
    warn: Callable[[Sequence[Problem]], None],
) -> None:
    """Do a worker's part of a merge, and wait until the output is complete.

    Args:
        plan: the whole merge.
        out: its output folder.
        worker: this worker; None completes the output and merges nothing.
        options: see `MergeOptions`.
        merge_into: merges a plan, of one file, into an output.
        threads, ops: as for `merge_checkpoint`.
        complete: completes the output, whose files are all there; only one worker calls it.
        warn: receives warnings.

    Raises:
        OutputError: BUSY, a live process uses the number of this worker; INCOMPLETE, files are missing without workers to write
            them; RESUME_STALE, the other workers have another recipe, input, version or option.
        PaftMergeError: as for `merge_checkpoint`.
    """

    def work(shared: SharedOutput) -> None:
        if worker is not None:
            _Member(plan, worker, shared, options, warn).merge(merge_into, threads, ops)
        elif missing := [plan.shards[i].file for i in sorted({*range(len(plan.shards))} - shared.files())]:
            named = ", ".join(missing[:5]) + (", ..." if missing[5:] else "")
            what = f"{len(missing)} of {len(plan.shards)} files are missing: {named}"
            raise OutputError.of("INCOMPLETE", shared.part, what, "start its workers again")

    if worker is None and not is_shared(out):
        if is_finished(plan, out, replace(options, overwrite=True), Problems()):
            return
        raise OutputError.of("INCOMPLETE", out, "no worker has begun to write it", "start its workers")
    about = str(worker) if worker else "a process that completes the output"
    work_together(plan, out, about, options, work=work, complete=complete)


def work_together(
    plan: MergePlan,
    out: Path,
    about: str,
    options: MergeOptions,
    *,
    work: Callable[[SharedOutput], None],
    complete: Callable[[Output], None],
) -> None:
    """Join the processes that write an output, write files, and wait until the output is complete.

    Args:
        plan: the whole merge.
        out: its output folder.
        about: describes this process, in the messages of others.
        options: see `MergeOptions`.
        work: called with the shared work folder; afterwards every file must be complete.
        complete: as for `merge_shared`.
    """

    def is_done() -> bool:
        return is_finished(plan, out, replace(options, overwrite=True), Problems())

    try:
        with SharedOutput.join(out, plan.shards, identity_of(plan, options), about, options.lease_seconds) as shared:
            if is_done():  # since this process looked: then it has made a new work folder
                shutil.rmtree(shared.part, ignore_errors=True)
                return
            work(shared)
            _complete(shared, complete, about)
    except (OutputError, OSError) as error:
        # Another worker can complete the output, and so remove the work folder, at any time.
        if not is_done():
            if isinstance(error, FileNotFoundError) and not is_shared(out):
                fix = "start the workers again"
                raise OutputError.of("OUTPUT", part_of(out), "was deleted while a worker used it", fix) from error
            with writing(part_of(out)):
                raise


def remove_late_folder(plan: MergePlan, out: Path, options: MergeOptions) -> None:
    """Remove the work folder of a worker of this merge that began when the output was just complete, and was killed."""
    if is_shared(out):
        with (
            suppress(OutputError, OSError),  # it is that of another merge, or another worker has just removed it
            SharedOutput.join(
                out, plan.shards, identity_of(plan, options), "a worker", options.lease_seconds
            ) as shared,
        ):
            shutil.rmtree(shared.part, ignore_errors=True)


def identity_of(plan: MergePlan, options: MergeOptions) -> dict[str, Any]:
    """Everything that must be the same for all workers. The times of files differ between copies on several machines."""
    found = without_times(identity(plan, options.device))
    given = {**options.recorded(), "device": found["device"], "write_model_card": options.write_model_card}
    return {**found, "options": given}


def _complete(shared: SharedOutput, complete: Callable[[Output], None], about: str) -> None:
    """Complete the output, unless another worker does; then wait until it has."""
    pause, waits_for = 0.0, ""
    while True:
        if shared.leases.take(_COMPLETE):
            try:
                with shared.gathered() as output:
                    complete(output)
                    return
            except (OutputError, OSError) as error:
                # BUSY: a worker that was taken for dead is still at it. Without the right, it is this one that was taken for dead.
                busy = isinstance(error, OutputError) and error.problems[0].code == "BUSY"
                if not busy and shared.leases.holds(_COMPLETE):
                    raise
        holder = shared.leases.holder(_COMPLETE)
        if holder and holder.who != waits_for:
            waits_for = holder.who
            log.info("%s: waits for %s, which completes the output", about, waits_for)
        pause = shared.pause(pause)


class FileWriter:
    """A process that writes files of a merge, and helps to count what thresholds over the whole model need.

    Attributes:
        plan: the whole merge.
        about: describes this process, in messages.
        shared: the work folder of the merge.
        warn: receives warnings.
        files: the plan of each file.
        counts: the file with which each merged tensor is counted, by its name; the first that it is written to.
        share: the files that it begins with.
        order: all files, in the order in which it tries to write or to count them.
        group: adds up counts in place of the folder.
    """

    def __init__(
        self,
        plan: MergePlan,
        about: str,
        shared: SharedOutput,
        first: Sequence[int],
        warn: Callable[[Sequence[Problem]], None],
    ) -> None:
        self.plan, self.about, self.shared, self.warn = plan, about, shared, warn
        self.files = by_file(plan)
        self.counts = dict[str, int]()
        for number, file in enumerate(self.files):
            for tensor in file.tensors:
                self.counts.setdefault(tensor.merged.name, number)
        self.order = [*first, *sorted({*range(len(self.files))} - {*first})]
        self.share = [*first]
        self.group: ProcessGroup | None = None
        self._said: tuple[str, float] = "", 0.0
        self._sums = 0

    def measured(self, threads: int, ops: Ops) -> list[MergePlan]:
        """Return the plan of each file, with what its rules need to know about all tensors, which all processes measure together."""
        return by_file(measured_over_model(self.plan, threads=threads, ops=ops, add_up=self._add_up))

    def write(
        self,
        order: Sequence[int],
        measured: Sequence[MergePlan],
        merge_into: MergeInto,
        progress: Callable[[Collection[int], Progress], None],
    ) -> None:
        """Write files until all of `order` are complete, by this process or by others.

        Args:
            order: the files.
            measured: the plan of each file of the output, from `measured`.
            merge_into: merges a plan, of one file, into an output.
            progress: called with the files that are complete and the progress of one more file.
        """
        for number in self._each("file", order, self.shared.files):
            try:
                with self.shared.file(number) as output:
                    merge_into(output, measured[number], partial(progress, self.shared.files()))
            except (OutputError, OSError):
                if self.shared.holds("file", number):
                    raise
                log.info("%s: was taken for dead, and another one writes %s", self.about, self.plan.shards[number].file)

    def check(self) -> None:
        """Called repeatedly; may raise an error to stop this process."""

    def _each(self, kind: str, order: Sequence[int], done: Callable[[], Container[int]]) -> Iterator[int]:
        return self.shared.each(kind, order, done, takes_over=self._take_over, waits=self._wait)

    def _take_over(self, number: int, holder: Holder) -> None:
        self.shared.discard(number, holder)
        since = f"was silent for {self.shared.leases.seconds:g} s" if holder.state == "silent" else "has ended"
        what = f"takes over {self.plan.shards[number].file}: {holder.who} {since}"
        self.warn([Problem("WORKERS", self.about, what)])

    def _wait(self, others: Mapping[int, Holder]) -> None:
        self.check()
        held = [f"{self.plan.shards[number].file} ({holder.who})" for number, holder in others.items()]
        text = ", ".join(held[:3]) + (", ..." if held[3:] else "")
        if text != self._said[0] or monotonic() - self._said[1] > _SAY_AGAIN:
            self._said = text, monotonic()
            log.info("%s: waits for %s", self.about, text)

    def _add_up(self, walk: BlockWalk, count: Callable[[BlockWalk], Counted]) -> Counted:
        """Add up counts over all tensors, which the workers count file by file: in the folder, or in their process group."""
        self._sums += 1
        tensors: dict[int, list[TiledTensor]] = {}
        for tensor in cast("Sequence[SourcedTensor]", walk.tensors):
            tensors.setdefault(self.counts[tensor.name], []).append(tensor)
        if self.group:
            own = [tensor for number in self.share for tensor in tensors.get(number, [])]
            return self.group.add_up(count(replace(walk, tensors=own)))
        order = [number for number in self.order if number in tensors]
        for number in self._each(f"sum{self._sums}", order, lambda: self.shared.counted(self._sums)):
            self.shared.add_counts(self._sums, number, count(replace(walk, tensors=tensors[number])))
            self.check()
        every = [counts(file) for file in self.shared.counted(self._sums).values()]
        return tuple(np.sum(arrays, axis=0) for arrays in zip(*every, strict=True))


class _Member(FileWriter):
    """One worker of a merge, which has a number."""

    def __init__(
        self, plan: MergePlan, worker: WorkerNumber, shared: SharedOutput, options: MergeOptions,
        warn: Callable[[Sequence[Problem]], None],
    ) -> None:  # fmt: skip
        super().__init__(plan, str(worker), shared, shares(costs(plan), worker.count)[worker.index], warn)
        self.worker = worker
        self.progress = options.progress or (lambda _: None)
        self.sizes = [sum(tensor.nbytes for tensor in file.tensors) for file in self.files]
        self._checked = 0.0
        self.group = ProcessGroup(worker, shared) if ProcessGroup.fits(worker) else None

    def merge(self, merge_into: MergeInto, threads: int, ops: Ops) -> None:
        """Write files until all are complete."""
        self._take_number()
        count, of = len(self.share), len(self.files)
        log.info("%s: writes %d of %d files, and helps with others", self.worker, count, of)
        if not count:
            what = f"has no file to write: the output has {of} file{'s' * (of != 1)} and {self.worker.count} workers"
            size = spreading_size(self.plan, self.worker.count)
            fix = f"out_shard_bytes='{size_text(size)}' makes more files" if size else "start fewer workers"
            self.warn([Problem("WORKERS", str(self.worker), what, fix)])
        self.write(self.order, self.measured(threads, ops), merge_into, self._advance)

    def _take_number(self) -> None:
        def wait(holder: Holder) -> None:
            log.info("%s: waits to see whether %s is alive", self.worker, holder.who)

        if not self.shared.leases.wait_for(self._right, wait):
            holder = self.shared.leases.holder(self._right)
            what = f"{holder.who if holder else self.worker} is at work already"
            raise OutputError.of("BUSY", self.shared.part, what, "give each worker another number")

    @property
    def _right(self) -> str:
        return f"worker-{self.worker.name}"

    def _advance(self, complete: Collection[int], done: Progress) -> None:
        """Report the progress of the whole merge, from that of one file and the files that are complete."""
        self.check()
        tensors = done.tensors + sum(len(self.files[number].tensors) for number in complete)
        nbytes = done.bytes_done + sum(self.sizes[number] for number in complete)
        self.progress(Progress(tensors, len(self.plan.tensors), nbytes, sum(self.sizes), done.name))

    def check(self) -> None:
        """Stop if this worker was taken for dead, and a process with its number was started."""
        if monotonic() - self._checked > self.shared.leases.seconds / 6:
            self._checked = monotonic()
            holder = self.shared.leases.holder(self._right)
            if holder is not None and holder.state != "here":
                what = (
                    f"{self.worker} was silent for {self.shared.leases.seconds:g} s, and {holder.who} took its number"
                )
                raise OutputError.of("BUSY", self.shared.part, what, "nothing is lost: the others write its files")
