"""Buffers that a thread uses again: fresh memory costs more here than the arithmetic done on it."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

_ALIGN = 64


class Scratch(threading.local):
    """Named arrays of one thread. An array is valid until its thread asks for the same name again."""

    def __init__(self) -> None:
        self.held: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}

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
