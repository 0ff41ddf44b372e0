"""Memory: buffers that a thread uses again, as fresh ones cost more than the arithmetic on them; and no search for garbage."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_ALIGN = 64


class Scratch(threading.local):
    """Named arrays of one thread. An array is valid until its thread asks for the same name again."""

    def __init__(self) -> None:
        self.held: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        self.levels = [self.held]
        self.depth = 0

    @contextmanager
    def nested(self) -> Iterator[None]:
        """Inside, names mean other arrays: a merge within a merge leaves the outer one's alone."""
        self.depth += 1
        if self.depth == len(self.levels):
            self.levels.append({})
        self.held = self.levels[self.depth]
        try:
            yield
        finally:
            self.depth -= 1
            self.held = self.levels[self.depth]

    def array(self, name: str, shape: int | tuple[int, ...], dtype: Any) -> Any:
        """An uninitialised `shape` array of `dtype`, 64-byte aligned so that products give the same bits every time."""
        size = math.prod(shape) if isinstance(shape, tuple) else shape
        nbytes = size * np.dtype(dtype).itemsize
        held = self.held.get(name)
        if held is None or held.nbytes < nbytes:
            raw = np.empty(nbytes + _ALIGN, np.uint8)
            held = raw[-raw.ctypes.data % _ALIGN :][: max(nbytes, raw.nbytes - _ALIGN)]
            self.held[name] = held
        return held[:nbytes].view(dtype).reshape(shape)


SCRATCH = Scratch()


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python does not look for cycles of garbage: while a plan of 90,000 tensors grows, that took half of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
