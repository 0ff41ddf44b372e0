"""A sample of a tensor's entries: short runs, at positions that depend only on the size of the tensor.

Of every `stride` runs of `RUN` entries one is taken, at a position drawn by a counter. The sample covers rows and columns,
and is the same for any blocks, threads and memory. Small tensors are taken whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from paft_merge.compute.blocks import NOT_PICKED, Block
from paft_merge.compute.kernels import RUN, lines, pick

WHOLE = 1 << 15
"""Least entries of a sample; a smaller tensor is taken whole."""

MOST = 256
"""Largest stride: a sample has at least one entry in 256."""


def stride_of(numel: int) -> int:
    """The stride of a tensor of `numel` entries, a power of two: one run in so many is sampled."""
    return int(min(MOST, 1 << max((numel // WHOLE).bit_length() - 1, 0)))


class Sample:
    """The sampled entries of one tensor, gathered block by block from any thread."""

    def __init__(self, numel: int) -> None:
        self.numel, self.stride = numel, stride_of(numel)
        self._parts: dict[int, Any] = {}

    def offer(self, block: Block) -> None:
        """Make the kernel that writes `block` collect its sample on the way."""
        room = (block.size // (RUN * self.stride) + 2) * RUN
        block.picking = self.stride, np.empty((block.count + 1, room), np.uint32), np.full(1, -1)

    def take(self, block: Block) -> None:
        """Keep the sample of `block`. A second call has no effect."""
        if block.picking is NOT_PICKED:
            self.offer(block)
        stride, held, taken = block.picking
        if taken[0] < 0:
            taken[0] = pick(block.base, block.sources, block.subtract, block.index, stride, held, lines(1))
        self._parts[block.index] = held[:, : taken[0]]

    @property
    def size(self) -> int:
        """K, the number of sampled entries."""
        return sum(part.shape[1] for part in self._parts.values())

    def row(self, i: int) -> Any:
        """`[K]` uint32: the bits of the float32 delta of source `i`; of the base, if `i` is -1."""
        return np.concatenate([np.empty(0, np.uint32), *(part[i] for _, part in sorted(self._parts.items()))])
