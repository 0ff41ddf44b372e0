"""A merge into a folder of an object store: file by file, each uploaded while the next one is merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from paft_merge.engine.balancing import by_file
from paft_merge.engine.options import MergeOptions
from paft_merge.engine.sidefiles import identity, origins
from paft_merge.engine.streaming import Progress, measured_over_model
from paft_merge.engine.workers import MergeInto
from paft_merge.errors import Problems
from paft_merge.methods.rules.thresholds import count_all
from paft_merge.output.stored import StoredOutput, check_stored, default_scratch
from paft_merge.plan import MergePlan
from paft_merge.stores import Store, folder_of, is_url, joined, shown

if TYPE_CHECKING:
    from paft_merge.compute.blocks import Ops


def merge_into_store(
    plan: MergePlan,
    store: Store,
    options: MergeOptions,
    *,
    merge_into: MergeInto,
    threads: int,
    ops: Ops,
    complete: Callable[[StoredOutput], None],
) -> None:
    """Merge into a folder of a store.

    Args:
        plan: the whole merge.
        store: the output folder; `check_output_at` has found no fault.
        options: see `MergeOptions`.
        merge_into: merges a plan, of one file, into an output.
        threads, ops: as for `merge_checkpoint`.
        complete: completes the output, whose files are all uploaded.

    Raises:
        PaftMergeError: as for `StoredOutput` and `merge_checkpoint`.
    """
    about, scratch = identity(plan, options.device), scratch_of(options)
    with StoredOutput.open(
        store, plan.shards, about, scratch=scratch, resume=options.resume, force=options.overwrite and options.force
    ) as output:
        if missing := output.missing:
            whole = measured_over_model(plan, threads=threads, ops=ops, add_up=count_all)
            parts, sizes = by_file(whole), [sum(t.nbytes for t in part.tensors) for part in by_file(plan)]
            for at, number in enumerate(missing):
                rest = missing[at:]
                with output.file(number) as local:
                    merge_into(local, parts[number], partial(_advance, options, parts, sizes, rest))
            output.wait()
        complete(output)


def _advance(
    options: MergeOptions, parts: Sequence[MergePlan], sizes: Sequence[int], rest: Sequence[int], done: Progress
) -> None:
    """Report the progress of the whole merge, from that of the first file of `rest`; the other files are finished."""
    if options.progress:
        total, tensors = sum(sizes), sum(len(part.tensors) for part in parts)
        before = total - sum(sizes[number] for number in rest)
        counted = tensors - sum(len(parts[number].tensors) for number in rest)
        options.progress(Progress(counted + done.tensors, tensors, before + done.bytes_done, total, done.name))


def scratch_of(options: MergeOptions) -> Path:
    """The folder of scratch: the option, else that of temporary files."""
    return Path(options.scratch) if options.scratch is not None else default_scratch()


def check_output_at(plan: MergePlan | None, out: str, options: MergeOptions, problems: Problems) -> None:
    """Add to `problems` every reason why a merge cannot be written to the URL `out`; see `check_stored`.

    `plan`: the merge; None to check the folder alone.
    """
    if options.shared:
        what = "is in an object store, and workers share a folder of a file system, with leases in it"
        problems.add("OUTPUT", shown(out), what, "merge with one process, or let the workers write to a shared folder")
        return
    inputs: list[str] = []
    if plan is not None:
        file = plan.recipe.located.file
        beside = str(folder_of(file)) if is_url(file) else ""
        paths = [str(source["path"]) for source in origins(plan)]
        inputs = [at for path in paths if is_url(at := joined(beside, path) if beside else path)]
        inputs += [file] if is_url(file) else []
    needed = max((shard.size for shard in plan.shards), default=0) if plan else 0
    with problems.catching():
        check_stored(
            Store(out), inputs, needed, scratch=scratch_of(options), overwrite=options.overwrite, force=options.force,
            problems=problems,
        )  # fmt: skip
