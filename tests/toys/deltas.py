"""Deltas with ties, zeros and rows of unlike size, and a walk over them in tiles of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from paft_merge.compute.blocks import Block

T = TypeVar("T")


class Cut:
    """Walks deltas in tiles of a given size."""

    def __init__(self, deltas: np.ndarray, tile: int) -> None:
        self.bits, self.tile, self.reads = deltas.view(np.uint32), tile, 0

    @property
    def tiles(self) -> int:
        return -(-self.bits.shape[1] // self.tile)

    def __call__(
        self, work: Callable[[Block], T], *, sample: bool = False, tiles: Sequence[int] | None = None
    ) -> list[T]:
        self.reads += tiles is None and not sample
        results = []
        for i in range(self.tiles) if tiles is None else tiles:
            start, stop = i * self.tile, min((i + 1) * self.tile, self.bits.shape[1])
            stop = start + max(1, (stop - start) // 16) if sample else stop
            results.append(
                work(Block(start, np.zeros(0, np.uint32), np.ascontiguousarray(self.bits[:, start:stop]), False))
            )
        return results


def deltas(kind: str, size: int) -> np.ndarray:
    made = np.random.default_rng(0)
    values = made.normal(0, 1e-3, (2, size))
    if kind != "smooth":
        values = (values * 2000).round() / 2000
    if kind == "sparse":
        values *= made.random((2, size)) < 0.3
    if kind == "sorted":  # the worst case for a sample: every row has its own size
        values = np.sort(values, axis=1)
    return values.astype(np.float32)
