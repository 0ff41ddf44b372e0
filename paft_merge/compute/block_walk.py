"""Run a function on every block of a tensor, or of many tensors, and return the results in tile order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np

from paft_merge.compute.blocks import Block, sample_end, tile_bounds

T = TypeVar("T")


class TiledTensor(Protocol):
    """A tensor that is read in blocks."""

    @property
    def bounds(self) -> Sequence[tuple[int, int]]:
        """Flat `[start, stop)` of every tile."""

    @property
    def row(self) -> int:
        """Elements of a row; a tile holds whole rows."""

    def block(self, start: int, stop: int, *, all_sources: bool = False) -> Block:
        """Elements `[start, stop)`, which begin a tile; valid until this thread's next block.

        `all_sources`: one row a source, zeros for a source without a delta; else one row for each active source.
        """

    def release(self) -> None:
        """Free memory that `block` can fill again."""


@dataclass(frozen=True)
class BlockWalk:
    """Runs a function on every block, on a pool or in the calling thread.

    Results come in tile order. The first failure cancels the blocks that have not begun.
    """

    tensors: Sequence[TiledTensor]
    pool: Executor | None = None
    derive: Callable[[Block], Block] | None = None
    """Computes the block that the function gets from the one that was read."""
    all_sources: bool = False
    """See `TiledTensor.block`. For walks over a whole model, which release each tensor after its blocks."""

    @cached_property
    def tiles(self) -> int:
        """Number of tiles of all tensors."""
        return sum(len(tensor.bounds) for tensor in self.tensors)

    @cached_property
    def numel(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.bounds[-1][1] for tensor in self.tensors if tensor.bounds)

    def __call__(
        self, work: Callable[[Block], T], *, sample: bool = False, tiles: Sequence[int] | None = None
    ) -> list[T]:
        """Run `work` on every block.

        Args:
            work: called with each block, several at a time where there is a pool.
            sample: read only a few rows of each tile (see `sample_end`).
            tiles: numbers of the tiles to read in each tensor; all by default.
        """
        run, results = map if self.pool is None else self.pool.map, list[T]()
        for tensor in self.tensors:

            def on_tile(bounds: tuple[int, int], tensor: TiledTensor = tensor) -> T:
                start, stop = bounds
                end = sample_end(start, stop, tensor.row) if sample else stop
                block = tensor.block(start, end, all_sources=self.all_sources)
                return work(block if self.derive is None else self.derive(block))

            bounds = tensor.bounds
            results += run(on_tile, bounds if tiles is None else [bounds[i] for i in tiles])
            if self.all_sources:
                tensor.release()
        return results

    def derived(self, derive: Callable[[Block], Block]) -> BlockWalk:
        """A walk over the blocks that `derive` computes from those of this walk."""
        return replace(self, derive=derive)


@dataclass(frozen=True)
class ArrayTensor:
    """A tensor in memory: `base` `[E]`, or `[0]` without one, and `sources` `[n, E]`, as float32 bits."""

    base: np.ndarray[Any, Any]
    sources: np.ndarray[Any, Any]
    row: int
    """Elements that one block must hold together."""

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Flat `[start, stop)` of every tile."""
        return tile_bounds(self.sources.shape[1], self.row)

    def block(self, start: int, stop: int, *, all_sources: bool = False) -> Block:
        """Elements `[start, stop)`."""
        return Block(start, self.base[start:stop], np.ascontiguousarray(self.sources[:, start:stop]), subtract=False)

    def release(self) -> None:
        """Nothing is cached."""
