"""Memory of a thread that is used again, and a pause of the garbage collector."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import mmap
from typing import Any

import numpy as np

_ALIGN = 64


class Scratch(threading.local):
    """Named arrays of one thread, because fresh memory costs more than the arithmetic on it.

    An array is valid until its thread requests the same name again.
    """

    def __init__(self) -> None:
        self.held: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        self.levels = [self.held]
        self.depth = 0

    @contextmanager
    def nested(self) -> Iterator[None]:
        """Use other arrays for the same names, so that a merge within a merge keeps those of the outer one."""
        self.depth += 1
        if self.depth == len(self.levels):
            self.levels.append({})
        self.held = self.levels[self.depth]
        try:
            yield
        finally:
            self.depth -= 1
            self.held = self.levels[self.depth]

    def array(self, name: str, shape: int | tuple[int, ...], dtype: Any, *, sparse: bool = False) -> Any:
        """An uninitialised array, 64-byte aligned so that BLAS products give the same bits every time.

        `sparse`: only parts of it will be written, so it takes small pages: NumPy's take memory in steps of 2 MiB.
        """
        size = math.prod(shape) if isinstance(shape, tuple) else shape
        nbytes = size * np.dtype(dtype).itemsize
        held = self.held.get(name)
        if held is None or held.nbytes < nbytes:
            raw = np.frombuffer(mmap(-1, nbytes + _ALIGN), np.uint8) if sparse else np.empty(nbytes + _ALIGN, np.uint8)
            held = raw[-raw.ctypes.data % _ALIGN :][: max(nbytes, raw.nbytes - _ALIGN)]
            self.held[name] = held
        return held[:nbytes].view(dtype).reshape(shape)


SCRATCH = Scratch()


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the search for reference cycles, which took half the time of planning 90,000 tensors."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
