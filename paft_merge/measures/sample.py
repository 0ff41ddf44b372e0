"""The entries of a tensor that a merge looks at more closely: short runs at places that its size alone decides.

Of every `stride` runs of `RUN` entries one is taken, drawn by a counter; so the sample is spread over rows and columns,
and is the same for any blocks, threads and memory. Small tensors are taken whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from paft_merge.blocks import Block
from paft_merge.kernels import _hash, _load, _load_delta, jit

RUN = 64
"""Entries that lie together: two cache lines of bfloat16."""

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

    def take(self, block: Block) -> None:
        """Keep what is sampled of `block`; taken twice it is the same."""
        room = (block.sources.shape[1] // (RUN * self.stride) + 2) * RUN
        held = np.empty((len(block.sources) + 1, room), np.uint32)
        count = pick(block.base, block.sources, block.subtract, block.index, self.stride, held)
        self._parts[block.index] = held[:, :count]

    @property
    def rows(self) -> Any:
        """`[n + 1, K]` uint32: the bits of every source's float32 delta and, last, of the base."""
        parts = [part for _, part in sorted(self._parts.items())]
        return np.concatenate(parts, axis=1) if parts else np.empty((1, 0), np.uint32)


@jit
def pick(base: Any, sources: Any, subtract: bool, index: int, stride: int, out: Any) -> int:
    """Put the sampled entries of a block into `out`.

    Args:
        base, sources, subtract: as in `kernels.histogram`.
        index: flat index of the block's first element in its tensor.
        stride: one run of so many is taken.
        out: `[n + 1, K]` uint32, receives the deltas and, last, the base; K must do.

    Returns:
        How many entries were taken.
    """
    n, size = sources.shape
    span, at = RUN * stride, 0
    below = np.empty(RUN, np.uint32)
    bits = np.empty(RUN, np.uint32)
    below_f, values = below.view(np.float32), bits.view(np.float32)
    for number in range(index // span, (index + size + span - 1) // span):
        first = number * span + RUN * np.int64(_hash(np.uint64(0), number) % np.uint64(stride)) - index
        start, stop = max(first, 0), min(first + RUN, size)
        m = stop - start
        if m <= 0:
            continue
        _load(base[start:stop], below)
        for j in range(m):
            out[n, at + j] = below[j]
        for i in range(n):
            _load_delta(sources[i, start:stop], below_f, subtract, bits, values)
            for j in range(m):
                out[i, at + j] = bits[j]
        at += m
    return at
