"""Merged deltas, computed block by block as often as they are needed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

import numpy as np

from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.blocks import Ops, Outcome, Tally
from paft_merge.compute.scratch import SCRATCH
from paft_merge.errors import MergeError
from paft_merge.lowrank.factors import Array
from paft_merge.methods.rules.rule import Combine, Rule, TensorPass, WholeRule
from paft_merge.plan.merged_deltas import MergedDelta

T = TypeVar("T")


class StreamedDelta:
    """The rows of a merged delta, computed in every pass: `lowrank.range_finder.Rows`."""

    def __init__(self, delta: MergedDelta, combine: Combine | None, whole: Any, pool: Executor, rows: int) -> None:
        self.delta, self._subtracted, self._pool = delta.tensor, delta.subtracted, pool
        self._combine, self._whole = combine, whole
        self.tally, self._tallied = Tally.empty(rows), False

    @classmethod
    def of(cls, merged: MergedDelta, rule: Rule | WholeRule, pool: Executor, ops: Ops) -> StreamedDelta:
        """Measure a tensor for its rule.

        Args:
            merged: the delta.
            rule: its rule, with weights that are known.
            pool: computes the blocks.
            ops: operations of the device.
        """
        delta = merged.tensor
        rows = len(delta.inputs.active) if delta.inputs.deltas else 0
        if rule.wants == "whole":
            base, sources = delta.inputs.whole(baked=rule.baked)
            whole = rule.merge(base, sources, delta.name).float().reshape(-1).numpy()
            return cls(merged, None, whole, pool, rows)
        walk = TensorPass(delta.numel, BlockWalk([delta], pool), ops, delta.inputs.active, delta.shape)
        return cls(merged, rule.prepare(walk, delta.inputs.deltas), None, pool, rows)

    @property
    def shape(self) -> tuple[int, int]:
        """O, I."""
        return self.delta.shape[0], self.delta.numel // self.delta.shape[0]

    def each(self, work: Callable[[int, Array], T]) -> list[T]:
        """Make one pass; see `Rows`."""
        columns = self.shape[1]

        def on_tile(bounds: tuple[int, int]) -> tuple[T, Outcome]:
            start, stop = bounds
            values, outcome = self._values(start, stop)
            if not np.isfinite(values).all():
                raise not_finite(self.delta.name)
            return work(start // columns, values.reshape(-1, columns)), outcome

        results = list(self._pool.map(on_tile, self.delta.bounds))
        if not self._tallied:
            self._tallied = True
            for _, outcome in results:
                if len(outcome.counts) == len(self.tally.counts):
                    self.tally.add(outcome.counts, outcome.sums)
        return [result for result, _ in results]

    def _values(self, start: int, stop: int) -> tuple[Array, Outcome]:
        """Elements `[start, stop)` of the delta, valid until this thread's next block."""
        out = SCRATCH.array("merged_delta", stop - start, np.float32)
        outcome = Outcome.empty(0)
        if self._combine is None:
            out[:] = self._whole[start:stop]
        else:
            outcome = self._combine(self.delta.block(start, stop), out.view(np.uint32), 0)
        if self._subtracted is not None:
            base = SCRATCH.array("subtracted", stop - start, np.float32)
            self._subtracted.value(start, stop, base)
            out -= base
        return out, outcome


def not_finite(name: str) -> MergeError:
    """The error for a merged delta with NaN or infinite elements."""
    what = "the merged delta has elements that are NaN or infinite, which no low-rank product can hold"
    return MergeError.of("NONFINITE", name, what, "repair the sources")
