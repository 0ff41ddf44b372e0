"""A rule applied to whole tensors in memory, block by block, by the code that a merge runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from paft_merge.compute.blocks import Block, sample_end, tile_bounds
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.methods.rules.rule import Rule, TensorPass, row_of

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class InMemory:
    """Walks the blocks of float32 tensors (`base` `[E]` or `[0]`, `sources` `[n, E]`, as bits)."""

    base: np.ndarray
    sources: np.ndarray
    row: int
    """Elements that are not parted."""

    @property
    def bounds(self) -> list[tuple[int, int]]:
        return tile_bounds(self.sources.shape[1], self.row)

    @property
    def tiles(self) -> int:
        return len(self.bounds)

    def __call__(
        self, work: Callable[[Block], T], *, sample: bool = False, tiles: Sequence[int] | None = None
    ) -> list[T]:
        results = []
        for start, stop in self.bounds if tiles is None else [self.bounds[i] for i in tiles]:
            end = sample_end(start, stop, 1) if sample else stop
            sources = np.ascontiguousarray(self.sources[:, start:end])
            results.append(work(Block(start, self.base[start:end], sources, subtract=False)))
        return results


def merge_tensors(rule: Rule, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Apply `rule` to whole tensors.

    Args:
        rule: one that wants deltas gets `tensors` as deltas, every other one as values.
        tensors: each `[*shape]`, any float dtype; not modified. At least one.

    Returns:
        `[*shape]` float32: the merged tensor, or the merged delta.

    Raises:
        ValueError: no tensors, or shapes that differ.
    """
    import torch

    if not tensors or any(t.shape != tensors[0].shape for t in tensors):
        raise ValueError(f"a merge needs tensors of one shape, got {[tuple(t.shape) for t in tensors]}")
    sources = np.stack([t.detach().cpu().to(torch.float32).reshape(-1).numpy().view(np.uint32) for t in tensors])
    deltas = rule.wants == "deltas"
    base = np.zeros(sources.shape[1] if deltas else 0, np.uint32)
    shape = tuple(tensors[0].shape)
    each, ops = InMemory(base, sources, row_of(rule, shape)), CpuOps()
    combine = rule.prepare(TensorPass(sources.shape[1], each, ops, range(len(tensors)), shape), deltas)
    out = torch.empty(sources.shape[1], dtype=torch.float32)
    bits = out.numpy().view(np.uint32)
    each(lambda block: combine(block, bits[block.index : block.index + block.size], 0))
    return out.reshape(tensors[0].shape)
