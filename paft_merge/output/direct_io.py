"""O_DIRECT writes: background threads write whole pages from aligned memory to disk, without the page cache.

A merge does not read its output again. In the page cache the output would take memory, evict the inputs, and still have
to be waited for when the files are made durable. Small pieces, and file systems without O_DIRECT, use the page cache.
"""

from __future__ import annotations

import logging
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

_PAGE = 4096
"""Alignment of offset, length and memory of a direct write; a multiple of every disk's block size."""

_PIECE = 1 << 20
"""Bytes of one write, and of one copy buffer."""

_MIN_DIRECT = 1 << 17
"""Bytes from which a direct write is worthwhile."""

_WRITERS, _BUFFERS = 2, 6
"""Concurrent writes, and copy buffers."""

_first_fallback = Lock()
"""Held once a direct write has failed."""


def open_direct(path: Path) -> int | None:
    """Open a file for direct writes; None if the system or the file system does not support them."""
    flag = getattr(os, "O_DIRECT", None)  # macOS has none
    if flag is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flag)
    except OSError:
        return None


class PageAlignedBuffer:
    """Memory that is written without a copy, and reused when its writes are done."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._writes: list[Future[None]] = []

    def array(self, nbytes: int, offset: int) -> Any:
        """Return an uninitialised `[nbytes]` uint8 array, aligned to file byte `offset` for O_DIRECT.

        Blocks until the previous array is written.
        """
        wait(self._writes)
        self._writes.clear()
        if len(self._memory) < nbytes + _PAGE:
            self._memory = np.frombuffer(mmap.mmap(-1, nbytes + _PAGE), np.uint8)
        shift = 0 if offset % 4 else offset % _PAGE  # elements must be aligned in memory
        return self._memory[shift : shift + nbytes]

    def hold(self, write: Future[None]) -> None:
        """Keep this memory unchanged until `write` has finished."""
        self._writes.append(write)


class Background:
    """Writes whole pages in background threads."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_WRITERS, "write")
        self._free: SimpleQueue[mmap.mmap | None] = SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(None)  # allocated on first use

    def write(self, cached: int, direct: int, view: memoryview, offset: int) -> Future[None]:
        """Queue a write of pages from page-aligned memory, which must not change until it is done.

        Args:
            cached: descriptor for writes through the page cache.
            direct: descriptor for direct writes.
            view: whole pages.
            offset: in the file, a multiple of the page size.
        """
        return self._pool.submit(_write, cached, direct, view, offset)

    def write_copy(self, cached: int, direct: int, view: memoryview, offset: int) -> Future[None]:
        """Copy at most `_PIECE` bytes and queue their write, as `write`. The source may be reused immediately.

        Blocks while all copy buffers are in use.
        """
        buffer = self._free.get() or mmap.mmap(-1, _PIECE)
        np.copyto(np.frombuffer(buffer, np.uint8)[: len(view)], np.frombuffer(view, np.uint8))  # frees the GIL
        write = self._pool.submit(_write, cached, direct, memoryview(buffer)[: len(view)], offset)
        write.add_done_callback(lambda _: self._free.put(buffer))
        return write

    def close(self) -> None:
        """Wait for running writes, and cancel those that have not begun."""
        self._pool.shutdown(cancel_futures=True)


class Writes:
    """The writes of one tensor, from any thread.

    A page that several writes share is written once all of them have arrived, because a buffered write of a part of it
    would wait for the direct writes of the file.

    Args:
        background: the threads that write.
        cached: descriptor of the file for writes through the page cache.
        direct: descriptor of the file for direct writes.
    """

    def __init__(self, background: Background, cached: int, direct: int) -> None:
        self._background, self._cached, self._direct = background, cached, direct
        self._pending: list[Future[None]] = []
        self._shared: dict[int, tuple[mmap.mmap, Any]] = {}
        """Incomplete pages by offset: the page, and `[_PAGE]` bool, which of its bytes have arrived."""
        self._lock = Lock()

    def write(self, view: memoryview, offset: int, memory: PageAlignedBuffer | None = None) -> None:
        """Queue the write of `view` at `offset`. Its first and last page are written when complete, or by `finish`.

        Args:
            view: bytes; may be changed as soon as this returns, unless they are in `memory`.
            offset: in bytes from the beginning of the file.
            memory: the buffer that holds `view`, if any; then no copy is made.
        """
        first = min(-offset % _PAGE, len(view))
        last = first + (len(view) - first) // _PAGE * _PAGE
        self._share(view[:first], offset)
        self._share(view[last:], offset + last)
        if last - first < _MIN_DIRECT:
            write_all(self._cached, view[first:last], offset + first)
        elif memory and (np.frombuffer(view, np.uint8).ctypes.data - offset) % _PAGE == 0:
            self._track(self._background.write(self._cached, self._direct, view[first:last], offset + first), memory)
        else:
            for at in range(first, last, _PIECE):
                piece = view[at : min(at + _PIECE, last)]
                self._track(self._background.write_copy(self._cached, self._direct, piece, offset + at))

    def finish(self) -> None:
        """Write the incomplete pages and wait until everything is in the file; raises OSError if a write failed."""
        for write in self._pending:
            write.result()
        self._pending.clear()
        for page, (held, there) in self._shared.items():
            edges = np.flatnonzero(np.diff(there, prepend=False, append=False))
            for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                write_all(self._cached, memoryview(held)[start:stop], page + start)
        self._shared.clear()

    def _share(self, part: memoryview, offset: int) -> None:
        """Add bytes to an incomplete page; write it if that completes it."""
        if not part:
            return
        page, at = offset // _PAGE * _PAGE, offset % _PAGE
        with self._lock:
            if page not in self._shared:
                self._shared[page] = mmap.mmap(-1, _PAGE), np.zeros(_PAGE, np.bool_)
            held, there = self._shared[page]
            held[at : at + len(part)] = part
            there[at : at + len(part)] = True
            if there.all():
                del self._shared[page]
                self._track(self._background.write(self._cached, self._direct, memoryview(held), page))

    def _track(self, write: Future[None], memory: PageAlignedBuffer | None = None) -> None:
        self._pending.append(write)
        if memory:
            memory.hold(write)


def _write(cached: int, direct: int, view: memoryview, offset: int) -> None:
    try:
        done = os.pwrite(direct, view, offset)
    except OSError as error:
        done = 0  # the file system may want another alignment; any other fault occurs again below
        if _first_fallback.acquire(blocking=False):
            log.info("a direct write failed (%s), so it is repeated through the page cache; logged once", error)
    write_all(cached, view[done:], offset + done)


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write every byte of `view` at `offset`, in as many calls as needed."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
