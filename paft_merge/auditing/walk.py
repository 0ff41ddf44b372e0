"""Walks over one audited tensor: its deltas are computed once and kept in memory if they fit."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib import import_module
from threading import Lock
from typing import Any

import numpy as np

from paft_merge.auditing.opening import AuditedTensor
from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.blocks import Block
from paft_merge.compute.cores import available_cores
from paft_merge.compute.kernels import BINS
from paft_merge.engine.streaming import FACTOR_BYTES, Budget
from paft_merge.methods.rules.one_pass import OnePass
from paft_merge.stats.spectrum import on_one_core

UNDECIDED_BYTES = 256 << 20
"""Most bytes of undecided entries, of all tensors that are measured at a time."""


class Arena:
    """Memory that the tensors of an audit share. It is allocated once: fresh memory costs more than the arithmetic.

    Args:
        subjects: every tensor.
        limit_bytes: most bytes of stored deltas.
    """

    def __init__(self, subjects: Sequence[AuditedTensor], limit_bytes: int) -> None:
        sizes = [len(s.inputs.active) * s.numel * 4 for s in subjects]
        self._held = np.empty(max((s for s in sizes if s <= limit_bytes), default=0) // 4, np.uint32)
        self._turn, self._undecided = Lock(), Budget(UNDECIDED_BYTES)
        self._inputs = Budget(FACTOR_BYTES)
        self._zeros = np.zeros(0, np.uint32)

    def zeros(self, size: int) -> Any:
        """`[size]` uint32 zeros, which nobody changes."""
        zeros = self._zeros
        if zeros.size < size:
            zeros = self._zeros = np.zeros(size, np.uint32)
        return zeros[:size]

    @contextmanager
    def opened(self, subject: AuditedTensor) -> Iterator[None]:
        """Wait until a tensor's factors and histograms fit in memory, and free the factors at the end of the block."""
        nbytes = subject.inputs.factor_bytes + 2 * 8 * BINS * len(subject.inputs.active)
        with self._inputs.taken(nbytes):
            try:
                yield
            finally:
                subject.release()

    @contextmanager
    def lent(self, subject: AuditedTensor, passes: Iterable[OnePass], *, store: bool) -> Iterator[Any]:
        """Reserve memory for one tensor.

        Args:
            subject: the tensor.
            passes: what sets undecided entries aside.
            store: whether the deltas are stored, which only one tensor at a time can do.

        Yields:
            `[n * numel]` uint32; None if the deltas do not fit or are not stored.
        """
        size = len(subject.inputs.active) * subject.numel
        with (
            self._undecided.taken(sum(one.held_bytes for one in passes)),
            self._turn if store else nullcontext(),
        ):
            yield self._held[:size] if store and size <= self._held.size else None


class HeldDeltas:
    """The deltas of a tensor, as `first` stored them; computed again for each block if they are not stored (`TiledTensor`).

    The base is zero in every block, so that the merged block is the merged delta.
    """

    def __init__(self, subject: AuditedTensor, pool: Executor, arena: Arena) -> None:
        self.subject, self.pool, self.arena = subject, pool, arena
        self._held: Any = None
        self._is_stored = False
        self.bounds, self.row, self.release = subject.bounds, subject.row, subject.release
        self.walk = BlockWalk([self], pool)
        """A walk over the deltas."""

    @contextmanager
    def first(self, passes: Iterable[OnePass], *, store: bool) -> Iterator[BlockWalk]:
        """The first walk, with the base's values. Within the block, `walk` reads the deltas that it stored; see `Arena.lent`."""
        with self.arena.lent(self.subject, passes, store=store) as self._held:
            yield (
                BlockWalk([self.subject], self.pool, self._store)
                if store
                else BlockWalk([self.subject.stored], self.pool)
            )

    def block(self, start: int, stop: int, *, all_sources: bool = False) -> Block:
        """Deltas of the elements `[start, stop)`, which begin a tile."""
        held, zeros = self._tile(start) if self._is_stored else None, self.arena.zeros(stop - start)
        if held is None:
            return Block(start, zeros, self.subject.inputs.block(start, stop).sources, subtract=False)
        return Block(start, zeros, np.ascontiguousarray(held[:, : stop - start]), subtract=False)

    def _store(self, block: Block) -> Block:
        held, self._is_stored = self._tile(block.index), True
        if held is not None:
            held[:] = block.sources
        return block

    def _tile(self, start: int) -> Any:
        """`[n, E]`: where the deltas of the tile that begins at `start` are stored, or None."""
        if self._held is None:
            return None
        n, stop = len(self.subject.inputs.active), min(start + self.bounds[0][1], self.subject.numel)
        return self._held[start * n : stop * n].reshape(n, stop - start)


@contextmanager
def working_pools(
    threads: int | None, *, torch_too: bool = True
) -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """A pool of `threads` (all cores by default) for blocks, and one for the tensors that they are blocks of.

    Each product and decomposition has one core. `torch_too`: import torch for this; it takes as long as auditing a small model.
    """
    torch, count = import_module("torch") if torch_too else sys.modules.get("torch"), threads or available_cores()
    before = torch.get_num_threads() if torch else 0
    with on_one_core(), ThreadPoolExecutor(count) as blocks, ThreadPoolExecutor(count + 1) as tensors:
        try:
            if torch:
                torch.set_num_threads(1)
            yield blocks, tensors
        finally:
            if torch:
                torch.set_num_threads(before)
