"""Writing past the page cache: whole pages go from aligned memory straight to the disk, while the merge goes on.

A merge does not read again what it writes. Through the page cache all of it would take fresh memory (dear where a host
lends it), push the inputs out of it, and be waited for at the end all the same, when the files are made durable. Where a
system or a file system does not offer this, and for pieces that are small, writes go through the page cache.
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np

_PAGE = 4096
"""What offset, length and memory are multiples of; every disk's block size divides it."""

_PIECE = 1 << 20
"""Bytes of one write, and of one buffer."""

_LEAST = 1 << 17
"""Fewer bytes than these are not worth a buffer."""

_WRITERS, _BUFFERS = 2, 6
"""Writes under way at a time, and copied pieces that may wait for them."""


def open_direct(path: Path) -> int | None:
    """A second descriptor of a file, for writing past the page cache; None where that cannot be."""
    flag = getattr(os, "O_DIRECT", None)  # macOS has none
    if flag is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flag)
    except OSError:
        return None


class PageAlignedBuffer:
    """Memory that is written as it lies there, without a copy, and used again once it is."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._writes: list[Future[None]] = []

    def array(self, nbytes: int, offset: int) -> Any:
        """`[nbytes]` uint8, undefined, that lies to a page as byte `offset` of a file does; waits while the last one is written."""
        wait(self._writes)
        self._writes.clear()
        if len(self._memory) < nbytes + _PAGE:
            self._memory = np.frombuffer(mmap.mmap(-1, nbytes + _PAGE), np.uint8)
        shift = 0 if offset % 4 else offset % _PAGE  # an element lies in memory at a multiple of its size
        return self._memory[shift : shift + nbytes]

    def keeps(self, write: Future[None]) -> None:
        """`write` reads from here."""
        self._writes.append(write)


class Background:
    """Writes whole pages from threads of its own; `close` waits for what is under way."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_WRITERS, "write")
        self._free: SimpleQueue[mmap.mmap | None] = SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(None)  # made at its first use

    def write(self, cached: int, direct: int, view: memoryview, offset: int) -> Future[None]:
        """Write pages from memory that is a page's too and stays as it is until then."""
        return self._pool.submit(_write, cached, direct, view, offset)

    def write_copy(self, cached: int, direct: int, view: memoryview, offset: int) -> Future[None]:
        """Write pages, `_PIECE` bytes at most, of any memory, which may be changed at once; waits while too much is waiting."""
        buffer = self._free.get() or mmap.mmap(-1, _PIECE)
        np.copyto(np.frombuffer(buffer, np.uint8)[: len(view)], np.frombuffer(view, np.uint8))  # frees the GIL
        write = self._pool.submit(_write, cached, direct, memoryview(buffer)[: len(view)], offset)
        write.add_done_callback(lambda _: self._free.put(buffer))
        return write

    def close(self) -> None:
        """Wait until nothing is being written."""
        self._pool.shutdown(cancel_futures=True)


class Writes:
    """What is being written of one tensor, from any thread, to descriptors of its file as usual and past the page cache.

    A page that several writes share waits for all of them: through the page cache, each would wait for every write past it.
    """

    def __init__(self, background: Background, cached: int, direct: int) -> None:
        self._background, self._cached, self._direct = background, cached, direct
        self._under_way: list[Future[None]] = []
        self._shared: dict[int, tuple[mmap.mmap, Any]] = {}
        """By its offset, a page that is not whole yet, and `[_PAGE]` bool, which of its bytes are there."""
        self._lock = Lock()

    def write(self, view: memoryview, offset: int, room: PageAlignedBuffer | None = None) -> None:
        """Write `view` at `offset`: the pages in it soon, a page that it begins or ends in when that is whole, or at the end.

        Args:
            view: bytes; may be changed as soon as this returns, unless they are those of `room`.
            offset: in bytes from the beginning of the file.
            room: where `view` lies, if it lies in one.
        """
        first = min(-offset % _PAGE, len(view))
        last = first + (len(view) - first) // _PAGE * _PAGE
        self._share(view[:first], offset)
        self._share(view[last:], offset + last)
        if last - first < _LEAST:
            write_all(self._cached, view[first:last], offset + first)
        elif room and (np.frombuffer(view, np.uint8).ctypes.data - offset) % _PAGE == 0:
            self._begun(self._background.write(self._cached, self._direct, view[first:last], offset + first), room)
        else:
            for at in range(first, last, _PIECE):
                piece = view[at : min(at + _PIECE, last)]
                self._begun(self._background.write_copy(self._cached, self._direct, piece, offset + at))

    def finish(self) -> None:
        """Wait until all of it is in the file; OSError when something cannot be."""
        for write in self._under_way:
            write.result()
        self._under_way.clear()
        for page, (held, there) in self._shared.items():
            edges = np.flatnonzero(np.diff(there, prepend=False, append=False))
            for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                write_all(self._cached, memoryview(held)[start:stop], page + start)
        self._shared.clear()

    def _share(self, part: memoryview, offset: int) -> None:
        """Put bytes into the page that they are a part of."""
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
                self._begun(self._background.write(self._cached, self._direct, memoryview(held), page))

    def _begun(self, write: Future[None], room: PageAlignedBuffer | None = None) -> None:
        self._under_way.append(write)
        if room:
            room.keeps(write)


def _write(cached: int, direct: int, view: memoryview, offset: int) -> None:
    try:
        done = os.pwrite(direct, view, offset)
    except OSError:
        done = 0  # a file system that wants another alignment; a real fault shows again here
    write_all(cached, view[done:], offset + done)


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write every byte of `view` at `offset`, in as many calls as it takes; OSError when one fails."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
