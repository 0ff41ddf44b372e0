"""Copies between the memory of the host and a GPU: through pinned buffers, on a stream beside the arithmetic."""

from __future__ import annotations

import math
import threading
from collections import deque
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGN = 64


class _Buffer:
    """Pinned memory, and the event that marks the end of its last copy."""

    def __init__(self, on_gpu: bool) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def part(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a tensor, from byte `start` on."""
        return self.memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class Staging(threading.local):
    """The copies of one thread to and from `device`.

    The arithmetic of all threads is queued on one stream, the copies of each thread on a stream of that thread. So the device
    copies the block of one thread while it computes the block of another. Two buffers take turns: the second is filled while
    the first is copied. On the CPU the buffers are ordinary memory, and nothing is asynchronous.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._on_gpu = device, device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._buffers = deque(_Buffer(self._on_gpu) for _ in range(2))

    def to_device(self, values: Any) -> Tensor:
        """Copy an array of a type that torch has; `values` may change as soon as this returns."""
        given = torch.from_numpy(values)
        buffer = self._next(given.nbytes)
        held = buffer.part(0, given.shape, given.dtype)
        np.copyto(held.numpy(), values)  # frees the GIL
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            made = held.to(self.device, non_blocking=True, copy=True)
        if self._stream and buffer.copied:
            buffer.copied.record(self._stream)
            arithmetic = torch.cuda.current_stream(self.device)
            arithmetic.wait_event(buffer.copied)
            made.record_stream(arithmetic)
        return made

    def to_host(self, *tensors: Tensor) -> list[Any]:
        """Copy tensors of the device, and wait for them; the arrays are valid until the next copy but one of this thread."""
        starts = np.cumsum([0, *(-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in tensors)]).tolist()
        buffer = self._next(starts.pop())
        held = [buffer.part(at, t.shape, t.dtype) for at, t in zip(starts, tensors, strict=True)]
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            for to, tensor in zip(held, tensors, strict=True):
                to.copy_(tensor, non_blocking=True)
                if self._stream:
                    tensor.record_stream(self._stream)
        if self._stream and buffer.copied:
            buffer.copied.record(self._stream)
            buffer.copied.synchronize()
        return [part.numpy() for part in held]

    def _next(self, nbytes: int) -> _Buffer:
        """The buffer whose turn it is, when its last copy has ended."""
        self._buffers.rotate()
        buffer = self._buffers[0]
        if buffer.copied:
            buffer.copied.synchronize()
        if buffer.memory.nbytes < nbytes:
            buffer.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._on_gpu)
        return buffer
