"""Walks over one audited tensor: its deltas are computed once and kept in memory if they fit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from paft_merge.auditing.opening import AuditedTensor
from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.blocks import Block
from paft_merge.stats.spectrum import on_one_core


class Arena:
    """Memory for the deltas of one tensor after the other, allocated once: fresh memory costs more than the arithmetic."""

    def __init__(self, subjects: Sequence[AuditedTensor], limit_bytes: int) -> None:
        sizes = [len(s.inputs.active) * s.numel * 4 for s in subjects]
        self._zeros = np.empty(0, np.uint32)
        self._held = np.empty(max((s for s in sizes if s <= limit_bytes), default=0) // 4, np.uint32)

    def zeros(self, size: int) -> Any:
        """At least `[size]` uint32 zeros, which nobody changes."""
        if self._zeros.size < size:
            self._zeros = np.zeros(size, np.uint32)
        return self._zeros

    def hold(self, subject: AuditedTensor) -> Any:
        """`[n * numel]` uint32 for the deltas of `subject`, or None if they do not fit."""
        size = len(subject.inputs.active) * subject.numel
        return self._held[:size] if size <= self._held.size else None


class HeldDeltas:
    """The deltas of a tensor, as `first` stored them; computed again for each block if they do not fit, or were not stored (`TiledTensor`).

    The base is zero in every block, so that the merged block is the merged delta.
    """

    def __init__(self, subject: AuditedTensor, pool: Executor, arena: Arena) -> None:
        self.subject, self.pool, self._held = subject, pool, arena.hold(subject)
        self._is_stored = False
        self.bounds, self.row, self.release = subject.bounds, subject.row, subject.release
        self.zeros = arena.zeros(max((stop - start for start, stop in subject.bounds), default=0))
        """As many as the largest block has entries."""
        self.first = BlockWalk([subject], pool, self._store)
        """The first walk: its blocks have the base's values, and their deltas are stored."""
        self.walk = BlockWalk([self], pool)
        """A walk over the stored deltas."""

    def block(self, start: int, stop: int, *, all_sources: bool = False) -> Block:
        """Deltas of the elements `[start, stop)`, which begin a tile."""
        held, zeros = self._tile(start) if self._is_stored else None, self.zeros[: stop - start]
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
def working_pool(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool of `threads` (all cores by default), with one core for each of torch's products."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with on_one_core(), ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
