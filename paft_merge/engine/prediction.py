"""The cost of a merge: seconds, bytes, memory and scratch of each worker, from file headers alone.

`work_of` counts the work of a tensor, and `seconds` turns work into time by the rates of a machine. Both are plain arithmetic
without measurements of this machine, so that all workers of a merge compute the same costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from paft_merge.compute.kernels.block_source import piece_entries
from paft_merge.engine.balancing import by_file, shares
from paft_merge.engine.intermediate import Intermediate
from paft_merge.engine.machine import REFERENCE, Rates
from paft_merge.engine.streaming import FACTOR_BYTES, HELD_BYTES, may_be_held
from paft_merge.inputs.tensor_inputs import RAW, Inputs, Read
from paft_merge.methods.rules.rule import MEASURED_AT_ONCE
from paft_merge.methods.rules.walks import DEFERRED
from paft_merge.plan import COPY, MergePlan, PlannedTensor
from paft_merge.plan.merged_deltas import is_sum_of_products
from paft_merge.plan.planned import Factor

_START, _PLANNED = 0.35, 90e-6
"""Seconds of processor to start a process, and to plan a tensor."""

_TENSOR, _SOURCE, _NOTED, _FACTORS = 120e-6, 60e-6, 400e-6, 300e-6
"""Seconds of processor, beside those for entries, for a tensor, for a source of it, for the statistics of a delta, and for those of
low-rank factors."""

_LISTED, _LISTED_DELTA = 80e-6, 150e-6
"""Seconds of processor for a tensor and for a delta in the manifest, which one process writes at the end."""

_WIDEN, _CAST, _ADD, _WRITE = 0.15, 1.6, 0.2, 0.15
"""Nanoseconds for an entry that is converted to float32, or from it to another type than bfloat16, for an addition to an entry, and
for a byte that is written."""

_PRODUCT = 0.26
"""Nanoseconds for an entry of a low-rank product, beside its floating point operations."""

_FIRST, _AGAIN = 2.5, 1.3
"""Cost of a byte that is read for the first time, and of one that was read a short time ago, relative to a plain copy of it."""

_WHOLE = 8.0
"""Nanoseconds for an entry of a source of a method that merges whole tensors."""

_SAMPLED, _SAMPLED_ENTRIES = 1 / 16, 1 / 32
"""Share of a tensor that a sample reads, by rows or by entries (see `blocks.sample_end`)."""

_TIED = 0.4
"""Thresholds of float32 deltas at which entries are tied; of the differences of stored values nearly all are."""

_PASSES, _OVERSAMPLED = 2, 8
"""Passes over a delta that is approximated, and columns of its sketch beside the rank (see `lowrank.range_finder`)."""

_UNDECIDED, _MOST_COPIED, _MOST_UNDECIDED = 0.012, 2.0, 128 << 20
"""Share of the entries of a source that a merge in one pass sets aside, most numbers that they take for each entry of the tensor, and
most bytes (see `rules.one_pass`)."""

_BALANCED_THREADS = 8
"""Threads of the machine for which files are balanced among workers."""

_WAITING = 0.15
"""Share of the time of computing, reading and writing that does not overlap with the slowest of them."""

_UNEVEN = 1.25
"""Ratio of the time of the slowest worker to the mean from which other sizes of files are suggested."""

_IN_CACHE = 0.7
"""Share of the memory that the page cache is expected to fill with inputs."""


class Work(NamedTuple):
    """What a merge, or a part of it, has to do."""

    read: float = 0
    """Bytes read from files, by all walks over tensors."""
    first: float = 0
    """Those of them that are read for the first time; the page cache holds the others, if it is large enough."""
    again: float = 0
    """Bytes that walks over the whole model read again, long after the first time."""
    written: float = 0
    """Bytes of weights in the output."""
    products: float = 0
    """Floating point operations of low-rank products."""
    loops: float = 0
    """Nanoseconds of loops over entries, on one core of the reference machine."""
    fixed: float = 0
    """Seconds of processor beside those for entries."""

    @classmethod
    def total(cls, parts: Iterable[Work]) -> Work:
        """The sum of `parts`."""
        return cls(*map(math.fsum, zip(*parts, strict=True)))

    def times(self, factor: float) -> Work:
        """This work, `factor` times."""
        return Work(*(factor * value for value in self))


@dataclass(frozen=True)
class WorkerCost:
    """The predicted cost of one worker's share."""

    worker: int
    files: int
    seconds: float
    """With inputs on the disk."""
    seconds_cached: float
    """With inputs in the page cache."""
    processor_seconds: float
    bytes_read: int
    bytes_from_disk: int
    """Part of `bytes_read` that the page cache cannot give."""
    bytes_written: int
    peak_bytes: int
    """Memory of the process, without the page cache."""
    scratch_bytes: int
    """Bytes on disk beside the output: inputs that are downloaded from the Hub."""


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of a merge by one or several workers."""

    workers: tuple[WorkerCost, ...]
    threads: int
    rates: Rates

    @property
    def idle(self) -> list[int]:
        """The workers without a file."""
        return [one.worker for one in self.workers if not one.files]

    @property
    def uneven(self) -> bool:
        """Whether the slowest worker takes much longer than with equal shares, or others have none."""
        return bool(self.idle) or self.slowest.seconds > _UNEVEN * sum(one.seconds for one in self.workers) / len(
            self.workers
        )

    @property
    def slowest(self) -> WorkerCost:
        """The worker that ends last."""
        return max(self.workers, key=lambda one: one.seconds)

    def to_json(self) -> dict[str, Any]:
        """Return the prediction as plain data."""
        return {
            "seconds": self.slowest.seconds, "seconds_cached": max(one.seconds_cached for one in self.workers),
            "slowest": self.slowest.worker, "idle": self.idle, "threads": self.threads, "rates": self.rates.model_dump(),
            "workers": [asdict(one) for one in self.workers],
        }  # fmt: skip


def predict(
    plan: MergePlan, *, workers: int, threads: int, rates: Rates, scratch: int = 0, hold: int = HELD_BYTES
) -> Prediction:
    """Predict the cost of a merge.

    Args:
        plan: the whole merge.
        workers: number of processes that write the output.
        threads: blocks that each of them computes at a time.
        rates: the rates of each one's machine.
        scratch: bytes that each worker with files downloads.
        hold: as for `merge_checkpoint`.
    """
    files = by_file(plan)
    works, peaks = [work_of(file) for file in files], [predicted_peak(file, threads, hold) for file in files]
    before = Work(fixed=_START + _PLANNED * len(plan.tensors))
    # One of them, which nobody knows before, writes the manifest of all tensors.
    deltas = sum(map(_deltas, plan.tensors))
    after, costs = (_LISTED * len(plan.tensors) + _LISTED_DELTA * deltas) / rates.loops, list[WorkerCost]()
    for number, share in enumerate(shares([_balanced(work) for work in works], workers)):
        work = Work.total([before, *(works[i] for i in share)])
        costs.append(WorkerCost(
            number, len(share), round(seconds(work, threads, rates) + after, 2),
            round(seconds(work, threads, rates, cached=True) + after, 2), round(processor(work, rates) + after, 2),
            round(work.read), round(_from_disk(work, rates)), round(work.written),
            max((peaks[i] for i in share), default=_INTERPRETER), scratch if share else 0,
        ))  # fmt: skip
    return Prediction(tuple(costs), threads, rates)


def costs(plan: MergePlan) -> list[float]:
    """The seconds by which the files of a merge are balanced among its workers, one a file: the same for all workers."""
    return [_balanced(work_of(file)) for file in by_file(plan)]


def _balanced(work: Work) -> float:
    return seconds(work, _BALANCED_THREADS, REFERENCE)


def processor(work: Work, rates: Rates) -> float:
    """Seconds of processor, of all cores together."""
    loops = (work.loops * 1e-9 + work.fixed) / rates.loops
    copied = _FIRST * work.first + _AGAIN * (work.read - work.first)
    return loops + work.products / (rates.gflops * 1e9) + copied / (rates.cached_gbps * 1e9)


def seconds(work: Work, threads: int, rates: Rates, *, cached: bool = False) -> float:
    """Seconds of a process with `threads` threads, each on a core.

    Args:
        work: what it has to do.
        threads: blocks that it computes at a time.
        rates: the rates of its machine.
        cached: the inputs are in the page cache.
    """
    fixed = work.fixed / rates.loops
    busy = (processor(work, rates) - fixed) / threads + fixed
    disk = 0.0 if cached else _from_disk(work, rates) / (rates.read_gbps * 1e9)
    together = busy, disk, work.written / (rates.write_gbps * 1e9)
    return max(together) + _WAITING * (sum(together) - max(together))


def _from_disk(work: Work, rates: Rates) -> float:
    fits = work.first <= _IN_CACHE * rates.memory_gb * 1e9
    return work.first + (0 if fits else work.again)


def work_of(plan: MergePlan) -> Work:
    """The work for the tensors of a plan, without the start and the end of a process."""
    stored = _factor_bytes(plan)
    if plan.recipe.output.kind == "delta":
        return Work.total([Work(), *(_counted(tensor, stored) for tensor in plan.tensors)])
    return Work.total([Work(), *(_tensor(tensor, stored) for tensor in plan.tensors)])


def _counted(tensor: PlannedTensor, stored: Mapping[str, float]) -> Work:
    """The work for a delta with all its entries, which is merged twice: first to count the entries that are not zero."""
    if tensor.sparse and tensor.sparse.part == "indices":
        return Work(written=tensor.nbytes)
    once = _tensor(tensor.merged, stored)
    return once.times(2)._replace(first=once.first, written=tensor.nbytes)


def _deltas(tensor: PlannedTensor) -> int:
    """The number of deltas of a tensor that have statistics."""
    first_half = tensor.factor is not None and tensor.factor.part == "A"  # the statistics are those of B
    return 0 if tensor.method == COPY or first_half or not tensor.inputs.deltas else len(tensor.inputs.active)


def _factor_bytes(plan: MergePlan) -> Mapping[str, float]:
    """Bytes of an entry of the factors of each model's adapter, on average over its file."""
    found = {}
    for model in plan.models:
        if model.adapter:
            sizes = [file.size for part in model.adapter.parts for file in part.file.files]
            entries = sum(delta.entries for delta in model.adapter.deltas.values())
            found[model.ref] = sum(sizes) / entries if entries else 0.0
    return found


def _tensor(tensor: PlannedTensor, stored: Mapping[str, float]) -> Work:
    """The work for one tensor."""
    if tensor.method == COPY:
        nbytes = tensor.nbytes
        return Work(nbytes, nbytes, 0, nbytes, 0, _WRITE * nbytes, _TENSOR)
    if tensor.factor:
        return _factor(tensor, tensor.factor, stored)
    inputs, numel, active = tensor.inputs, tensor.numel, tensor.inputs.active
    deltas = {id(read.delta): (read, read.delta) for read in inputs.reads if read.delta}
    factors = sum(stored.get(read.source, 4.0) * delta.entries for read, delta in deltas.values())
    distinct = {read.stored_at: read for read in inputs.stored}
    first = factors + sum(read.checkpoint.bytes_read(read.name) for read in distinct.values())
    low_rank = sum(bool(delta.rank) for _, delta in deltas.values())
    written = tensor.nbytes
    ends = Work(
        factors, first, 0, written, 0, _WRITE * written + (0 if tensor.dtype in RAW else _CAST * numel),
        _TENSOR + _SOURCE * len(active) + _NOTED * _deltas(tensor) + _FACTORS * low_rank,
    )  # fmt: skip
    rule = tensor.rule
    if rule.wants == "whole":
        return Work.total([ends, _walk(inputs, numel), Work(loops=_WHOLE * numel * len(inputs.reads))])
    walk, walks, tiles = _walk(inputs, numel), rule.walks(numel, active), len(tensor.bounds)
    parts = [ends, walk]
    if walks.norms:  # those of low-rank deltas follow from their factors
        parts.append(Work(factors))
        if low_rank < len(active):
            loops = sum(loop.cost(len(active)) for loop in walks.norms) * numel
            parts += [walk, Work(loops=loops, again=first if walks.norms_over_model else 0)]
    if walks.one_pass and _in_one_pass(tensor, len(active)):
        if tiles > 2 and low_rank < len(active):
            parts.append(walk.times(_SAMPLED))
        parts.append(Work(loops=DEFERRED.cost(len(active)) * numel))
    else:
        parts += [walk] * (len(walks.measuring) + len(walks.over_model))
        parts.append(Work(factors * len(walks.over_model)))  # each of these walks releases them
        if walks.sampled and tiles > 2:
            parts.append(walk.times(_SAMPLED if tensor.row > 1 else _SAMPLED_ENTRIES))
        if walks.ties and tiles and active:
            ties = walks.ties * (1.0 if inputs.form == "raw" else _TIED)
            parts.append(walk.times(2 * ties * len(active) / (1 + len(active)) * tensor.bounds[0][1] / numel))
        loops = sum(loop.cost(len(active)) for loop in (walks.merging, *walks.measuring, *walks.over_model))
        parts.append(Work(loops=loops * numel, again=first * len(walks.over_model)))
    return Work.total(parts)


def _factor(tensor: PlannedTensor, factor: Factor, stored: Mapping[str, float]) -> Work:
    """The work for one tensor of an adapter: that of the delta counts for its B."""
    own = Work(written=tensor.nbytes, loops=_WRITE * tensor.nbytes, fixed=_TENSOR)
    if factor.part == "A":
        return own
    delta, rank = factor.delta, tensor.shape[1] // factor.experts
    if factor.in_space or is_sum_of_products(delta):
        ranks = sum(read.delta.rank for read in delta.inputs.sources if read.delta)
        sizes = factor.experts * sum(factor.matrix)
        return Work.total(
            [own, Work(_walk_factors(delta, stored), _walk_factors(delta, stored), products=4.0 * sizes * ranks**2)]
        )
    once, held = _tensor(delta, stored), _walk_factors(delta, stored)  # factors are held from pass to pass
    passes = once.times(_PASSES)._replace(
        written=0.0,
        first=once.first,
        again=once.again,
        read=_PASSES * once.read - (_PASSES - 1) * held,
    )
    return Work.total([own, passes, Work(products=4.0 * _PASSES * delta.numel * (rank + _OVERSAMPLED))])


def _walk_factors(delta: PlannedTensor, stored: Mapping[str, float]) -> float:
    """Bytes of the sources' factors of a delta."""
    return sum(stored.get(read.source, 4.0) * read.delta.entries for read in delta.inputs.sources if read.delta)


def _in_one_pass(tensor: PlannedTensor, sources: int) -> bool:
    """Whether the entries that a merge in one pass sets aside will fit."""
    copied = _UNDECIDED * sources * (sources + 2)
    few = copied <= _MOST_COPIED and copied * tensor.numel * 4 <= _MOST_UNDECIDED
    return few and bool(may_be_held(tensor))


def _walk(inputs: Inputs, numel: int) -> Work:
    """The work to read all inputs of a tensor once, and to compute its deltas."""
    parts = list[Work]()
    base, active = inputs.base, [inputs.sources[i] for i in inputs.active]

    def weight(read: Read, *, bits: bool = False) -> None:
        parts.append(_stored(read))
        if not bits and read.dtype != "F32":
            parts.append(Work(loops=_WIDEN * numel))

    def delta(read: Read) -> None:
        assert read.delta is not None
        entries = math.prod(read.delta.shape)
        parts.append(Work(products=2.0 * read.delta.rank * entries, loops=_PRODUCT * entries))
        if not read.delta.rank or read.delta.needs_weight:
            parts.append(Work(loops=2 * _ADD * numel))

    def value(read: Read) -> None:
        weight(read)
        if read.delta:
            delta(read)
            parts.append(Work(loops=_ADD * numel))

    if inputs.form == "raw":
        for read in inputs.reads if base else active:
            weight(read, bits=True)
    elif inputs.form == "values" or base is None:
        for read in active or inputs.reads:
            value(read)
    else:
        if inputs.without_base:
            pass
        elif base.delta is None:
            weight(base, bits=base.dtype == "BF16")
        else:
            value(base)
        for read in active:
            if read.same_weight(base):
                if read.delta:
                    delta(read)
                    if read.delta.needs_weight:
                        weight(read)
                if base.delta and base.delta is not read.delta:
                    delta(base)
                    parts.append(Work(loops=_ADD * numel))
            else:
                value(read)
                value(base)
                parts.append(Work(loops=_ADD * numel))
    return Work.total([Work(), *parts])


def _stored(read: Read) -> Work:
    """The work to read a checkpoint's tensor once; that of another document is computed."""
    if not isinstance(read.checkpoint, Intermediate):
        return Work(read=read.checkpoint.bytes_read(read.name))
    tensor = read.checkpoint.planned(read.name)
    if tensor.method == COPY:
        return Work(read=tensor.nbytes)
    if tensor.rule.wants == "whole":
        return _walk(tensor.inputs, tensor.numel)._replace(loops=_WHOLE * tensor.numel * len(tensor.inputs.reads))
    # Its statistics are measured once, however often it is read: they count in full here, for want of knowing how often.
    walks = tensor.rule.walks(tensor.numel, tensor.inputs.active)
    loops = sum(loop.cost(len(tensor.inputs.active)) for loop in (walks.merging, *walks.measuring))
    return Work.total(
        [_walk(tensor.inputs, tensor.numel).times(1 + len(walks.measuring)), Work(loops=loops * tensor.numel)]
    )


_INTERPRETER, _TORCH, _TRANSFORMERS, _COPY_BUFFERS = 40_000_000, 200_000_000, 300_000_000, 6 << 20
"""Bytes of a process before its first block, of torch where it is imported, of torch and transformers, which look up an
architecture for an adapter, and of the buffers that writes share."""

_PER_TENSOR, _PER_SOURCE = 4_000, 12_000
"""Bytes of a planned tensor, and of the statistics of one delta."""

_FACTOR_COPIES = 3
"""Bytes of factors in memory, relative to those that are held: A is copied for the statistics, and freed memory is kept."""

_COLLECTED = 0.025
"""Share of a source's entries that are near its threshold, and are kept until it is known."""


def predicted_peak(plan: MergePlan, threads: int, hold: int = HELD_BYTES) -> int:
    """The peak of a process's memory while it merges a plan, for example that of one file, without the page cache.

    Args:
        plan: the tensors to merge.
        threads, hold: as for `merge_checkpoint`.
    """

    def most(count: Callable[[PlannedTensor], int], tensors: int) -> int:
        return _at_a_time(list(map(count, plan.tensors)), tensors, 2 * threads + 2)

    records = sum(_PER_TENSOR + _PER_SOURCE * _deltas(tensor) for tensor in plan.tensors)
    torch = any(t.method != COPY and (t.rule.wants == "whole" or t.dtype not in RAW) for t in plan.tensors)
    imported = _TRANSFORMERS if plan.recipe.output.kind == "adapter" else _TORCH * torch
    held = min(most(_held, threads + 1), hold)
    return (
        _INTERPRETER + imported + _COPY_BUFFERS + records
        + threads * most(_block_bytes, 1) + most(_collected, threads + 1) + held
        + int(_FACTOR_COPIES * min(most(_factors, threads + 1), max(FACTOR_BYTES, most(_factors, 1))))
    )  # fmt: skip


def _at_a_time(sizes: Sequence[int], count: int, near: int) -> int:
    """The largest sum of `count` sizes that are among `near` successive ones, as those of the tensors that are merged at a time are."""
    found = np.asarray(sizes, dtype=np.int64)
    if min(near, len(found)) <= count or not found.any():
        return int(np.sort(found)[-count:].sum())
    return int(np.partition(sliding_window_view(found, min(near, len(found))), -count)[:, -count:].sum(1).max())


def _factors(tensor: PlannedTensor) -> int:
    """Bytes of the factors that are held for a tensor while it is merged."""
    return tensor.inputs.factor_bytes


def _collected(tensor: PlannedTensor) -> int:
    """Bytes of the entries near thresholds that are held for a tensor until these are known."""
    if tensor.factor:
        return 4 * tensor.nbytes
    rule, sources = tensor.rule, len(tensor.inputs.active)
    if tensor.method == COPY or rule.wants == "whole" or not rule.walks(tensor.numel, tensor.inputs.active).ties:
        return 0
    return int(_COLLECTED * min(sources, MEASURED_AT_ONCE) * 4 * tensor.numel) * (not _held(tensor))


def _held(tensor: PlannedTensor) -> int:
    """Bytes of merged tiles that wait for their thresholds."""
    rule, active = tensor.rule, tensor.inputs.active
    if tensor.factor or tensor.method == COPY or rule.wants == "whole" or not rule.walks(tensor.numel, active).one_pass:
        return 0
    if not _in_one_pass(tensor, len(active)):
        return 0
    return tensor.nbytes + int(_UNDECIDED * len(active) * tensor.numel * 4 * (len(active) + 2))


def _block_bytes(tensor: PlannedTensor) -> int:
    """Bytes of a thread for one block."""
    if tensor.factor:
        return _block_bytes(tensor.factor.delta)
    if tensor.method == COPY:
        return min(tensor.block_bytes, 2 * tensor.nbytes)
    if tensor.rule.wants == "whole" or not tensor.bounds:
        return tensor.block_bytes
    inputs, entries = tensor.inputs, tensor.bounds[0][1]
    sources, made = len(inputs.active), tensor.rule.walks(tensor.numel, inputs.active).made
    working = sum(read.checkpoint.working_bytes(read.name) for read in inputs.reads)
    merged = (2 * tensor.width if tensor.dtype in RAW else 12) * entries
    aside = 8 * entries * bool(_held(tensor))  # positions and values of undecided entries
    if inputs.form == "raw":
        rows = (sources + (inputs.base is not None)) * 2 if made else 0
    elif inputs.form == "deltas" and all(_is_product(inputs, i) for i in inputs.active):
        rows = 2 + 4 * sources if made else 0
        merged += 4 * sources * piece_entries(entries, tensor.row, sources)
    else:
        rows = 4 * (sources + (inputs.base is not None)) + 6  # and a delta, and stored values
    return merged + aside + working + entries * (rows + 4 * made)


def _is_product(inputs: Inputs, source: int) -> bool:
    """Whether a loop computes the delta of a source piece by piece."""
    base, read = inputs.base, inputs.sources[source]
    low_rank = read.delta is not None and read.delta.rank and not read.delta.needs_weight
    return bool(base and base.plain and base.dtype == "BF16" and low_rank and read.same_weight(base))
