"""A remote file that is read by ranges: windows of it are fetched ahead, and dropped when others need the memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

WINDOW_BYTES = 8 * 2**20
ROOM_BYTES = 256 * 2**20
CONNECTIONS = 8
"""Requests at a time."""
_AHEAD = 1
_HEAD_BYTES = 128 * 1024


def pause(attempt: int) -> float:
    """Seconds to wait before the next attempt: doubled each time, at most 30."""
    return min(0.25 * 2.0**attempt, 30.0)


class Windows:
    """A cache of recently read windows and the next ones, of at most `room_bytes` for all files together.

    Rules with two passes read a tensor twice; dropped windows are then requested again.
    """

    def __init__(self, room_bytes: int, window_bytes: int) -> None:
        self.window_bytes, self.room = window_bytes, max(room_bytes // window_bytes, 2 * CONNECTIONS)
        self._held: OrderedDict[tuple[int, int], Future[memoryview]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="ranges")

    def read(self, file: RangedFile, view: memoryview, offset: int) -> None:
        """Fill `view` from byte `offset` of `file`; the range must be within the file."""
        size, stop = self.window_bytes, offset + len(view)
        if len(view) > self.room * size // 4:  # a large tensor would displace every other window
            file.fetch(view, offset)
            return
        numbers = range(offset // size, (stop - 1) // size + 1)
        waiting = [self._window(file, number) for number in numbers]
        for number in range(numbers.stop, numbers.stop + _AHEAD):
            if number * size < file.size:
                self._window(file, number)
        for number, one in zip(numbers, waiting, strict=True):
            start = number * size
            part = one.result()[max(offset - start, 0) : stop - start]
            at = start + max(offset - start, 0) - offset
            view[at : at + len(part)] = part

    def close(self) -> None:
        """Stop fetching and drop all windows."""
        self._pool.shutdown(cancel_futures=True)
        self._held.clear()

    def _window(self, file: RangedFile, number: int) -> Future[memoryview]:
        key = (id(file), number)
        with self._lock:
            found = self._held.get(key)
            if found is None or (found.done() and (found.cancelled() or found.exception() is not None)):
                found = self._held[key] = self._pool.submit(self._fetch, file, number)
            self._held.move_to_end(key)
            spare = len(self._held) - self.room
            if spare > 0:  # a window that is being fetched has a waiting reader
                for old in [k for k, one in self._held.items() if one.done() and k != key][:spare]:
                    del self._held[old]
            return found

    def _fetch(self, file: RangedFile, number: int) -> memoryview:
        start = number * self.window_bytes
        held = memoryview(bytearray(min(self.window_bytes, file.size - start)))
        file.fetch(held, start)
        return held


@dataclass
class RangedFile:
    """A remote file, read like a local one of a checkpoint (`FarFile`); subclasses fetch its bytes."""

    where: str
    """Place and name, for messages."""
    name: str
    size: int
    etag: str
    """Identifies the content; empty if the store has nothing that does."""
    windows: Windows = field(repr=False)
    _head: bytes = field(default=b"", init=False, repr=False)

    def read(self, view: memoryview, offset: int) -> int:
        """Fill `view` from byte `offset` on; return the number of bytes, which is smaller only at the end of the file."""
        count = max(min(len(view), self.size - offset), 0)
        if offset + count <= len(self._head):
            view[:count] = self._head[offset : offset + count]
        elif count and offset < len(self._head) and offset == 0:  # a header longer than the first piece
            self.fetch(view[:count], 0)
        elif count:
            self.windows.read(self, view[:count], offset)
        return count

    def read_head(self) -> None:
        """Fetch and keep the first piece, into which most headers fit."""
        held = bytearray(min(self.size, _HEAD_BYTES))
        self.fetch(memoryview(held), 0)
        self._head = bytes(held)

    def changed(self) -> str:
        """Describe how the file differs from when it was opened; empty if it does not."""
        raise NotImplementedError

    def fetch(self, view: memoryview, offset: int) -> None:
        """Fill `view` from byte `offset` on without the window cache."""
        raise NotImplementedError
