"""Writing past the page cache: whole pages go from aligned memory straight to the disk, while the merge goes on.

A merge does not read again what it writes. Through the page cache all of it would take fresh memory (dear where a host
lends it), push the inputs out of it, and be waited for at the end all the same, when the files are made durable. Where a
system or a file system does not offer this, and for pieces that are small, writes go through the page cache.
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np

_PAGE = 4096
"""What offset, length and memory are multiples of; every disk's block size divides it."""

_PIECE = 1 << 20
"""Bytes of one write, and of one buffer."""

_LEAST = 1 << 17
"""Fewer bytes than these are not worth a buffer."""

_WRITERS, _BUFFERS = 2, 6
"""Writes under way at a time, and pieces that may wait for them."""


def open_direct(path: Path) -> int | None:
    """A second descriptor of a file, for writing past the page cache; None where that cannot be."""
    flag = getattr(os, "O_DIRECT", None)  # macOS has none
    if flag is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flag)
    except OSError:
        return None


class Background:
    """Writes whole pages from threads of its own; `close` waits for what is under way."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_WRITERS, "write")
        self._free: SimpleQueue[mmap.mmap | None] = SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(None)  # made at its first use

    def write(self, cached: int, direct: int, view: memoryview, offset: int) -> list[Future[None]]:
        """Write `view` at `offset`: part of it now, the pages in between soon; waits while too much is waiting.

        Args:
            cached, direct: descriptors of the same file, as usual and past the page cache.
            view: bytes; may be changed as soon as this returns.
            offset: in bytes from the beginning of the file.

        Returns:
            What will have failed with an OSError if a page cannot be written.
        """
        first = -offset % _PAGE
        last = first + (len(view) - first) // _PAGE * _PAGE
        if last - first < _LEAST:
            write_all(cached, view, offset)
            return []
        write_all(cached, view[:first], offset)
        write_all(cached, view[last:], offset + last)
        return [
            self._later(cached, direct, view[at : min(at + _PIECE, last)], offset + at)
            for at in range(first, last, _PIECE)
        ]

    def close(self) -> None:
        """Wait until nothing is being written."""
        self._pool.shutdown(cancel_futures=True)

    def _later(self, cached: int, direct: int, view: memoryview, offset: int) -> Future[None]:
        buffer = self._free.get() or mmap.mmap(-1, _PIECE)
        np.copyto(np.frombuffer(buffer, np.uint8)[: len(view)], np.frombuffer(view, np.uint8))  # frees the GIL
        return self._pool.submit(self._write, cached, direct, buffer, len(view), offset)

    def _write(self, cached: int, direct: int, buffer: mmap.mmap, size: int, offset: int) -> None:
        try:
            view = memoryview(buffer)[:size]
            try:
                done = os.pwrite(direct, view, offset)
            except OSError:
                done = 0  # a file system that wants another alignment; a real fault shows again here
            write_all(cached, view[done:], offset + done)
        finally:
            self._free.put(buffer)


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write every byte of `view` at `offset`, in as many calls as it takes; OSError when one fails."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
