"""Walks the blocks of one tensor several times, computing its deltas once where memory holds them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from paft_merge.auditing.opening import AuditedTensor
from paft_merge.compute.blocks import Block, sample_end
from paft_merge.stats.spectrum import on_one_core

T = TypeVar("T")


class Arena:
    """Memory for the deltas of one tensor after the other, taken once: fresh memory costs more than the arithmetic."""

    def __init__(self, subjects: Sequence[AuditedTensor], limit_bytes: int) -> None:
        sizes = [len(s.inputs.active) * s.numel * 4 for s in subjects]
        self._held = np.empty(max((s for s in sizes if s <= limit_bytes), default=0) // 4, np.uint32)

    def hold(self, subject: AuditedTensor) -> Any:
        """`[n * numel]` uint32 for the deltas of `subject`, or None when they do not fit."""
        size = len(subject.inputs.active) * subject.numel
        return self._held[:size] if size <= self._held.size else None


class BlockWalk:
    """Runs a function on every block of one tensor on a pool, results in tile order (`blocks.Each`).

    The first walk, `first`, sees the base's weights; later ones see zeros in their place, so that what is merged there is
    the delta alone. Tiles depend on the tensor's shape alone.
    """

    def __init__(self, subject: AuditedTensor, pool: ThreadPoolExecutor, arena: Arena) -> None:
        self.subject, self.pool, self._held = subject, pool, arena.hold(subject)
        self._n = len(subject.inputs.active)
        self._zeros = np.zeros(max((stop - start for start, stop in subject.bounds), default=0), np.uint32)

    @property
    def tiles(self) -> int:
        return len(self.subject.bounds)

    def first(self, work: Callable[[Block], T]) -> list[T]:
        """Compute every block, hold its deltas where they fit, and run `work` on it."""

        def run(bounds: tuple[int, int]) -> T:
            block = self.subject.inputs.block(*bounds)
            if self._held is not None:
                self._tile(*bounds)[:] = block.sources
            return work(block)

        return list(self.pool.map(run, self.subject.bounds))

    def __call__(
        self, work: Callable[[Block], T], *, sample: bool = False, tiles: Sequence[int] | None = None
    ) -> list[T]:
        """As `first`, from what it held. `sample`: on some of each tile's rows. `tiles`: on these only."""
        bounds = self.subject.bounds if tiles is None else [self.subject.bounds[i] for i in tiles]
        return list(self.pool.map(lambda b: work(self._block(b[0], b[1], sample)), bounds))

    def _block(self, start: int, stop: int, sample: bool) -> Block:
        end = sample_end(start, stop, self.subject.row) if sample else stop
        zeros = self._zeros[: end - start]
        if self._held is None:
            return Block(start, zeros, self.subject.inputs.block(start, end).sources, subtract=False)
        sources = self._tile(start, stop)
        return Block(
            start, zeros, np.ascontiguousarray(sources[:, : end - start]) if sample else sources, subtract=False
        )

    def _tile(self, start: int, stop: int) -> Any:
        return self._held[start * self._n : stop * self._n].reshape(self._n, stop - start)


class ModelWalk:
    """Walks the blocks of many tensors, every source in each (`blocks.Each`): for thresholds over a whole model."""

    def __init__(self, subjects: Sequence[AuditedTensor], pool: ThreadPoolExecutor) -> None:
        self._subjects, self._pool = subjects, pool

    @property
    def tiles(self) -> int:
        return sum(len(subject.bounds) for subject in self._subjects)

    def __call__(
        self, work: Callable[[Block], T], *, sample: bool = False, tiles: Sequence[int] | None = None
    ) -> list[T]:
        """Run `work` on every block; neither a sample nor some tiles are asked of a whole model."""
        assert not sample
        assert tiles is None
        found: list[T] = []
        for subject in self._subjects:

            def run(bounds: tuple[int, int], subject: AuditedTensor = subject) -> T:
                return work(subject.inputs.block(*bounds, all_sources=True))

            found += self._pool.map(run, subject.bounds)
            subject.release()
        return found


@contextmanager
def working_pool(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool of `threads` (all cores by default), with one core to each of torch's products."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with on_one_core(), ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
