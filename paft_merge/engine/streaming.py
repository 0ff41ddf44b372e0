"""The main path: read -> delta -> method -> write, tensor by tensor, one block at a time."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Condition
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import xxhash

from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.blocks import TILE, Block, Ops, Outcome, Tally, Undecided
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.magnitudes import INFINITY
from paft_merge.engine.factors import Factorization
from paft_merge.engine.spaces import Coordinates
from paft_merge.errors import MergeError
from paft_merge.inputs.checkpoint import DTYPES
from paft_merge.inputs.dtypes import cast, count_nonfinite, stored_bytes
from paft_merge.inputs.tensor_inputs import RAW
from paft_merge.methods.rules.measured_weights import MeasuredWeights
from paft_merge.methods.rules.model_wide import measure_over_model
from paft_merge.methods.rules.rule import Rule, TensorPass, WholeRule
from paft_merge.methods.rules.thresholds import AddUp, count_all
from paft_merge.output.direct_io import PageAlignedBuffer
from paft_merge.output.folder import Finished, Output, compact
from paft_merge.plan import COPY, MergePlan, PlannedTensor
from paft_merge.plan.adapter_output import with_ranks
from paft_merge.stats.record import MOST_PAIRED, note
from paft_merge.stats.sample import Sample
from paft_merge.stats.spectrum import on_one_core

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S")
T = TypeVar("T")
Written = tuple[bytes, Outcome]
"""A block's digest, and the outcome of merging it."""

HELD_BYTES = 256 << 20
"""Most bytes of merged tiles, of all tensors together, that wait in memory for their thresholds."""

FACTOR_BYTES = 64 << 20
"""Most bytes of factors of the tensors that are merged at a time; one whose factors take more is merged alone."""

_ASIDE = 4 * TILE
"""Bytes reserved per tile for undecided entries. Untouched pages are never committed."""


@dataclass(frozen=True)
class Progress:
    """Progress of a merge; tensors that a resumed merge found in the output count as done."""

    tensors: int
    tensors_total: int
    bytes_done: int
    """Bytes of finished tensors in the output."""
    bytes_total: int
    name: str
    """The last finished tensor."""


def merge_checkpoint(
    plan: MergePlan,
    output: Output,
    *,
    threads: int,
    ops: Ops | None = None,
    hold: int = HELD_BYTES,
    progress: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Merge every planned tensor into `output`, which must be open: the main path.

    Args:
        plan: every output tensor with its inputs and its rule, in output order.
        output: the folder to write; tensors that it already holds (a resumed merge) are skipped.
        threads: blocks computed at a time, each on one core. Does not change the result.
        ops: operations of the device; those of the CPU by default.
        hold: most bytes of merged tensors that wait in memory for their thresholds. Does not change the result.
        progress: called after every finished tensor, in the calling thread.

    Raises:
        MergeError: an input or a result is not finite; the message names the tensor and the source.
        CheckpointError: an input changed while it was read.
        OutputError: the output cannot be written.
    """
    todo = [tensor for tensor in plan.tensors if tensor.name not in output.finished]
    total, count = sum(t.nbytes for t in plan.tensors), len(plan.tensors)
    done, first = total - sum(t.nbytes for t in todo), count - len(todo) + 1
    with (
        _single_threaded_torch(),
        on_one_core(),
        ThreadPoolExecutor(threads) as blocks,
        ThreadPoolExecutor(threads + 1) as tensors,
    ):
        todo = _measured_over_model(plan, todo, blocks, ops or CpuOps())
        made = Factorization(plan.recipe, blocks, ops or CpuOps(), [tensor for tensor in todo if tensor.factor])
        worker = _Worker(output, blocks, ops or CpuOps(), _Held(hold), Budget(FACTOR_BYTES), plan.allow_nonfinite, made)
        for at, finished in enumerate(_in_order(tensors, worker.merge, todo, ahead=2 * threads + 2), first):
            output.finish_tensor(finished)
            done += todo[at - first].nbytes
            progress(Progress(at, count, done, total, finished.name))
    plan.check_inputs_unchanged()


def measured_over_model(plan: MergePlan, *, threads: int, ops: Ops, add_up: AddUp) -> MergePlan:
    """Return the plan with the thresholds (`trim_scope: global`) and weights (`weight: equal_norm`) that depend on all its tensors.

    Args:
        plan: the whole merge.
        threads, ops: as for `merge_checkpoint`, which does the same for a plan that is not resolved.
        add_up: adds up the counts that several workers make.
    """
    with _single_threaded_torch(), on_one_core(), ThreadPoolExecutor(threads) as blocks:
        return replace(plan, tensors=tuple(_measured_over_model(plan, plan.tensors, blocks, ops, add_up)))


def sized(plan: MergePlan, *, threads: int, ops: Ops) -> MergePlan:
    """Return the plan of an adapter with the ranks that `rank: auto` needs, which takes a pass over its deltas; else the plan itself.

    Args:
        plan: the whole merge.
        threads, ops: as for `merge_checkpoint`.
    """
    if plan.recipe.output.rank != "auto":
        return plan
    with (
        _single_threaded_torch(),
        on_one_core(),
        ThreadPoolExecutor(threads) as blocks,
        ThreadPoolExecutor(threads + 1) as tensors,
    ):
        known = _measured_over_model(plan, plan.tensors, blocks, ops)
        halves = [tensor for tensor in known if tensor.factor and tensor.factor.part == "B"]
        factorization = Factorization(plan.recipe, blocks, ops, halves)
        ranks = list(_in_order(tensors, factorization.rank_needed, halves, ahead=2 * threads + 2))
    return with_ranks(
        replace(plan, tensors=tuple(known)), dict(zip((t.merged.name for t in halves), ranks, strict=True))
    )


def _measured_over_model(
    plan: MergePlan,
    todo: Sequence[PlannedTensor],
    pool: ThreadPoolExecutor,
    ops: Ops,
    add_up: AddUp = count_all,
) -> list[PlannedTensor]:
    """`todo` with what their rules need to know about all tensors of the plan, which takes walks over these."""
    merged = list({tensor.merged.name: tensor for tensor in plan.tensors}.values())
    read = [
        Coordinates.of(tensor, plan.recipe) if tensor.factor and tensor.factor.in_space else tensor.merged
        for tensor in merged
    ]
    found = measure_over_model([tensor.merged.rule for tensor in merged], read, pool, ops, add_up) if todo else {}
    rules = {merged[i].merged.name: rule for i, rule in found.items()}
    return [tensor.with_rule(rules[tensor.merged.name]) if tensor.merged.name in rules else tensor for tensor in todo]


@dataclass(frozen=True)
class _Worker:
    """Merges one tensor at a time; the blocks of several tensors share one pool."""

    output: Output
    pool: ThreadPoolExecutor
    ops: Ops
    held: _Held
    factors: Budget
    allow_nonfinite: bool
    factorization: Factorization

    def merge(self, tensor: PlannedTensor) -> Finished:
        """Read -> delta -> method -> write, for one tensor."""
        if tensor.method == COPY:
            return self._copy(tensor)
        with self.factors.taken(tensor.inputs.factor_bytes):
            if tensor.factor:
                return self._factor(tensor)
            if tensor.rule.wants == "whole":
                return self.pool.submit(self._whole, tensor, tensor.rule).result()
            return self._streamed(tensor, tensor.rule)

    def _streamed(self, tensor: PlannedTensor, rule: Rule) -> Finished:
        """Merge a tensor block by block."""
        tiles, sources = BlockWalk([tensor], self.pool), tensor.inputs.active
        walk, sample = self._pass(tensor, tiles), Sample(tensor.numel)
        weights = tuple[float, ...]()
        if isinstance(rule, MeasuredWeights):
            measured = rule.measured(tensor, tiles, self.ops)
            rule, weights = measured.resolved, measured.known or ()
        written = self._in_one_pass(tensor, rule, walk, sample) or self._measured(tensor, rule, walk, sample)
        tally, digest, nonfinite = Tally.empty(len(sources)), xxhash.xxh3_128(), 0
        for block_digest, outcome in written:
            digest.update(block_digest)
            tally.add(outcome.counts, outcome.sums)
            nonfinite += outcome.bad
        return _finished(tensor, digest.hexdigest(), sources, tally, sample, nonfinite, weights)

    def _pass(self, tensor: PlannedTensor, tiles: BlockWalk) -> TensorPass:
        """The tensor as its rule sees it; `tiles` walks over it."""
        inputs, active = tensor.inputs, tensor.inputs.active

        def among(part: Sequence[int]) -> BlockWalk:
            return BlockWalk([replace(tensor, inputs=inputs.among([active[k] for k in part]))], self.pool)

        return TensorPass(
            tensor.numel, tiles, self.ops, active, tensor.shape, lambda k: inputs.factors(active[k]),
            among if inputs.alike else None,
        )  # fmt: skip

    def _measured(self, tensor: PlannedTensor, rule: Rule, walk: TensorPass, sample: Sample) -> list[Written]:
        """Measure the tensor, then merge it; both steps read every block."""
        combine = rule.prepare(walk, tensor.inputs.deltas)

        def write(block: Block) -> Written:
            buffer, kind = _BUFFERS.next(), np.dtype(RAW.get(tensor.dtype, np.uint32))
            out = self._memory(buffer, tensor, block, kind)
            if tensor.inputs.deltas:
                sample.offer(block)
            outcome = combine(block, out, tensor.rounding_key)
            if tensor.inputs.deltas:
                sample.take(block)
            return self._write(tensor, block.index, out, outcome, buffer)

        return walk.each(write)

    def _in_one_pass(self, tensor: PlannedTensor, rule: Rule, walk: TensorPass, sample: Sample) -> list[Written] | None:
        """Merge while reading, then resolve the entries that the sampled thresholds left undecided.

        Returns None if one pass is impossible or the sample missed a threshold.
        """
        # Decided from the plan alone, not from free memory: one pass adds the statistics in another order.
        pending = None
        if may_be_held(tensor):
            pending = rule.one_pass(walk)
        if pending is None:
            return None
        bounds, kind = tensor.bounds, np.dtype(RAW[tensor.dtype])
        with self.held.tiles(len(bounds), tensor.nbytes + pending.held_bytes) as held:

            def merge(block: Block) -> tuple[Any, Outcome, Undecided, PageAlignedBuffer]:
                buffer, aside = held[block.index // bounds[0][1]] if held else (_BUFFERS.next(), np.empty(0, np.uint8))
                out = self._memory(buffer, tensor, block, kind)
                sample.offer(block)
                merged = pending.merge(block, out, aside)
                sample.take(block)
                return out, *merged, buffer

            first = walk.each(merge)
            starts = [start for start, _ in bounds]
            thresholds = pending.thresholds(starts, [undecided for _, _, undecided, _ in first])
            if thresholds is None:
                return None

            def resolve(start: int, merged: tuple[Any, Outcome, Undecided, PageAlignedBuffer]) -> Written:
                out, outcome, undecided, buffer = merged
                pending.resolve(start, undecided, thresholds, out, outcome)
                return self._write(tensor, start, out, outcome, buffer)

            if held:
                return list(self.pool.map(resolve, starts, first))
            return walk.each(lambda block: resolve(block.index, merge(block)))

    def _copy(self, tensor: PlannedTensor) -> Finished:
        """Copy the bytes of a tensor that no source changes, whatever their dtype."""
        read, step = tensor.inputs.reads[0], tensor.tile_bytes

        def copy(start: int) -> tuple[bytes, int]:
            buffer = _BUFFERS.next()
            held = self.output.memory(buffer, tensor.name, start, min(step, tensor.nbytes - start))
            read.checkpoint.read_into(read.name, start, held)
            bad = count_nonfinite(held, tensor.dtype)
            if bad and not self.allow_nonfinite:
                raise not_finite(tensor)
            self.output.write(tensor.name, start, held, buffer)
            return xxhash.xxh3_128_digest(held), bad

        digest, nonfinite = xxhash.xxh3_128(), 0
        starts = range(0, tensor.nbytes, step)
        for block_digest, bad in self.pool.map(copy, starts):
            digest.update(block_digest)
            nonfinite += bad
        tensor.release()
        nothing = Tally.empty(0)
        return Finished(tensor.name, digest.hexdigest(), [], nothing.counts, nothing.total(), nonfinite)

    def _factor(self, tensor: PlannedTensor) -> Finished:
        """Write one factor of a merged delta. The statistics of the delta are those of its B."""
        stored, made = self.factorization.take(tensor)
        if count_nonfinite(stored, tensor.dtype):
            raise not_finite(tensor, 1)
        digest = xxhash.xxh3_128()
        for start in range(0, tensor.nbytes, tensor.tile_bytes):
            piece = stored[start : start + tensor.tile_bytes]
            self.output.write(tensor.name, start, piece)
            digest.update(xxhash.xxh3_128_digest(piece.data))
        if tensor.factor and tensor.factor.part == "A":
            nothing = Tally.empty(0)
            return Finished(tensor.name, digest.hexdigest(), [], nothing.counts, nothing.total())
        noted = compact({"factors": made.noted()})
        counted = made.tally.counts, made.tally.total()
        return Finished(tensor.name, digest.hexdigest(), made.active, *counted, weights=made.weights, noted=noted)

    def _whole(self, tensor: PlannedTensor, rule: WholeRule) -> Finished:
        """Merge a tensor in one piece, in memory, and write it block by block."""
        base, sources = tensor.inputs.whole(baked=rule.baked)
        merged = rule.merge(base, sources, tensor.name).reshape(-1)
        known = sources if base is not None else []
        tally, digest, nonfinite, sample = Tally.empty(len(known)), xxhash.xxh3_128(), 0, Sample(tensor.numel)
        for start, stop in tensor.bounds:
            stored = stored_bytes(merged[start:stop], tensor.dtype, tensor.rounding_key, start)
            bad = count_nonfinite(stored, tensor.dtype)
            if bad and not self.allow_nonfinite:
                raise not_finite(tensor, bad)
            if base is not None:
                block = _delta_block(base, known, start, stop)
                sample.take(block)
                tally.add(*CpuOps().tally(block))
            self.output.write(tensor.name, start * tensor.width, stored)
            digest.update(xxhash.xxh3_128_digest(stored.data))
            nonfinite += bad
        return _finished(tensor, digest.hexdigest(), range(len(known)), tally, sample, nonfinite)

    def _memory(self, buffer: PageAlignedBuffer, tensor: PlannedTensor, block: Block, kind: np.dtype[Any]) -> Any:
        """Memory for a merged block, `[E]` of `kind`."""
        nbytes = block.size * kind.itemsize
        return self.output.memory(buffer, tensor.name, block.index * tensor.width, nbytes).view(kind)

    def _write(
        self, tensor: PlannedTensor, start: int, out: Any, outcome: Outcome, buffer: PageAlignedBuffer
    ) -> Written:
        """Check one merged block, whose memory is `buffer`, and write it at its place in the file."""
        stored = out
        if tensor.dtype not in RAW:
            stored = cast(out.view(np.float32), tensor.dtype, tensor.rounding_key, start)
            outcome.bad = count_nonfinite(stored, tensor.dtype)
        largest = int(outcome.counts[:, -1].max(initial=0))
        if (outcome.bad or largest >= INFINITY) and not self.allow_nonfinite:
            raise not_finite(tensor, outcome.bad)
        self.output.write(tensor.name, start * tensor.width, stored, buffer if stored is out else None)
        return xxhash.xxh3_128_digest(stored.view(np.uint8)), outcome


def _finished(
    tensor: PlannedTensor,
    digest: str,
    active: Sequence[int],
    tally: Tally,
    sample: Sample,
    nonfinite: int,
    weights: Sequence[float] = (),
) -> Finished:
    """Release a tensor's inputs, and return it with the statistics of its deltas."""
    sums, noted = tally.total(), b"{}"
    if tally.counts.any():
        exact = tensor.rule.wants != "whole"  # else an adapter may have been rounded into its checkpoint
        factors = (tensor.inputs.factors(i) if exact else None for i in active)
        pairs = len(tensor.inputs.sources) <= MOST_PAIRED
        noted = compact(note(sample, [float(square) for square in sums[:, 1]], factors, pairs=pairs))
    tensor.release()
    return Finished(tensor.name, digest, active, tally.counts, sums, nonfinite, weights, noted)


class _Buffers(threading.local):
    """Memory of a thread for merged blocks: two buffers in turn, one is written while the other fills."""

    def __init__(self) -> None:
        self._two = deque((PageAlignedBuffer(), PageAlignedBuffer()))

    def next(self) -> PageAlignedBuffer:
        self._two.rotate()
        return self._two[0]


_BUFFERS = _Buffers()


class Budget:
    """Bytes that several threads share; one that needs more than all of them takes them all, and no other thread any."""

    def __init__(self, nbytes: int) -> None:
        self.most = self._left = nbytes
        self._turn = Condition()

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        """Take `nbytes` as soon as they are left."""
        wanted = min(nbytes, self.most)
        with self._turn:
            self._turn.wait_for(lambda: self._left >= wanted)
            self._left -= wanted
        try:
            yield
        finally:
            with self._turn:
                self._left += wanted
                self._turn.notify_all()


class _Held:
    """Memory for merged tiles that wait for their thresholds. It is reused: fresh memory costs more than the merge."""

    def __init__(self, nbytes: int) -> None:
        self._budget, self._free = Budget(nbytes), deque[tuple[PageAlignedBuffer, Any]]()

    @contextmanager
    def tiles(self, count: int, nbytes: int) -> Iterator[list[tuple[PageAlignedBuffer, Any]]]:
        """Buffers for `count` tiles, each with bytes for undecided entries, as soon as `nbytes` are free; none if they never are."""
        if nbytes > self._budget.most:
            yield []
            return
        with self._budget.taken(nbytes):
            taken = [self._tile() for _ in range(count)]
            try:
                yield taken
            finally:
                self._free += taken

    def _tile(self) -> tuple[PageAlignedBuffer, Any]:
        try:
            return self._free.pop()
        except IndexError:
            return PageAlignedBuffer(), np.empty(_ASIDE, np.uint8)


def may_be_held(tensor: PlannedTensor) -> bool:
    """Whether a tensor's kind and size suit one pass: it fits in memory, and computing its deltas twice costs more."""
    tile = tensor.bounds[0][1] if tensor.bounds else 0
    plain = tensor.inputs.form == "raw" or tensor.dtype not in RAW or tensor.rounding_key
    return not plain and tensor.nbytes <= HELD_BYTES and tile <= TILE


def _delta_block(base: Tensor, sources: Sequence[Tensor], start: int, stop: int) -> Block:
    """A block of whole tensors in memory, for a tally."""
    bits = [tensor.reshape(-1)[start:stop].float().numpy().view(np.uint32) for tensor in (base, *sources)]
    return Block(start, bits[0], np.stack(bits[1:]), subtract=True)


def _in_order(pool: ThreadPoolExecutor, work: Callable[[S], T], items: Iterable[S], ahead: int) -> Iterator[T]:
    """Run `work` on every item in the pool, at most `ahead` at a time, and yield the results in the items' order.

    The first failure cancels the items that have not begun.
    """
    waiting: deque[Future[T]] = deque()
    feed = iter(items)
    try:
        for item in feed:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """One core a block: the pool parallelizes, and the bits of a norm must not depend on torch's threads."""
    if "torch" not in sys.modules:  # a merge of plain checkpoints does not import torch
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def not_finite(tensor: PlannedTensor, overflowed: int = 0) -> MergeError:
    """Return the error that names the input with NaN or infinite elements, their number, and the first one.

    `overflowed`: results of one block that are not finite, reported if every input is finite.
    """
    for read in tensor.inputs.reads:
        count, first = 0, -1
        for start, stop in tensor.bounds:
            values = np.empty(stop - start, np.float32)
            read.value(start, stop, values)
            bad = np.flatnonzero(~np.isfinite(values))
            first = start + int(bad[0]) if bad.size and first < 0 else first
            count += bad.size
        if count:
            what = f"{count:,} of {tensor.numel:,} elements are NaN or infinite, the first at flat index {first:,}"
            fix = "repair the source, or pass allow_nonfinite=True to merge it as it is"
            return MergeError.of("NONFINITE", f"{read.source}: {read.name}", what, fix)
    wide = tensor.dtype in ("F64", *RAW)
    fix = "use smaller weights or lambda" if wide else "write out_dtype: bfloat16 or float32"
    what = f"{overflowed:,} merged values or more are too large for {DTYPES[tensor.dtype].torch}"
    return MergeError.of("OVERFLOW", tensor.name, what, fix)
