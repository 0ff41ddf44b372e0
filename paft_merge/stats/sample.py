"""The entries of a tensor that a merge looks at more closely: short runs at places that its size alone decides.

Of every `stride` runs of `RUN` entries one is taken, drawn by a counter; so the sample is spread over rows and columns,
and is the same for any blocks, threads and memory. Small tensors are taken whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from paft_merge.compute.blocks import NOT_PICKED, Block
from paft_merge.compute.kernels import RUN, lines, pick

WHOLE = 1 << 15
"""Entries that a sample has at least, or all there are."""

MOST = 256
"""The largest stride: never less than one entry of 256."""


def stride_of(numel: int) -> int:
    """Which share of a tensor of `numel` entries is sampled: one run of so many; a power of two."""
    return int(min(MOST, 1 << max((numel // WHOLE).bit_length() - 1, 0)))


class Sample:
    """The sampled entries of one tensor, gathered block by block from any thread."""

    def __init__(self, numel: int) -> None:
        self.numel, self.stride = numel, stride_of(numel)
        self._parts: dict[int, Any] = {}

    def offer(self, block: Block) -> None:
        """Let the loop that writes `block` take what is sampled on its way."""
        room = (block.size // (RUN * self.stride) + 2) * RUN
        block.picking = self.stride, np.empty((block.count + 1, room), np.uint32), np.full(1, -1)

    def take(self, block: Block) -> None:
        """Keep what is sampled of `block`; taken twice it is the same."""
        if block.picking is NOT_PICKED:
            self.offer(block)
        stride, held, taken = block.picking
        if taken[0] < 0:
            taken[0] = pick(block.base, block.sources, block.subtract, block.index, stride, held, lines(1))
        self._parts[block.index] = held[:, : taken[0]]

    @property
    def rows(self) -> Any:
        """`[n + 1, K]` uint32: the bits of every source's float32 delta and, last, of the base."""
        parts = [part for _, part in sorted(self._parts.items())]
        return np.concatenate(parts, axis=1) if parts else np.empty((1, 0), np.uint32)
