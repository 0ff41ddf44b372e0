"""Files on the Hub that are read by ranges and never stored: pinned to a commit, retried where a connection broke.

Reads are served from windows of the file, which a few connections fetch ahead and which are dropped when others need
the memory. `RemoteFile` has the interface of a local file of a checkpoint.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from paft_merge.errors import HubError
from paft_merge.hub.faults import problem_of, retry_after, transport_error
from paft_merge.hub.pulling import CONNECTIONS, ResolvedRepo, pause

WINDOW_BYTES = 8 * 2**20
ROOM_BYTES = 256 * 2**20
_AHEAD = 1
_HEAD_BYTES = 128 * 1024
_ATTEMPTS = 8
_AGAIN = (408, 429, 500, 502, 503, 504)
_EXPIRED = (400, 401, 403)
_TIMEOUT_S = 30.0


class Windows:
    """A cache of recently read windows and the next ones, of at most `room_bytes` for all files together.

    Rules with two passes read a tensor twice; dropped windows are then requested again.
    """

    def __init__(self, room_bytes: int, window_bytes: int) -> None:
        self.window_bytes, self.room = window_bytes, max(room_bytes // window_bytes, 2 * CONNECTIONS)
        self._held: OrderedDict[tuple[int, int], Future[memoryview]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="hub")

    def read(self, file: RemoteFile, view: memoryview, offset: int) -> None:
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

    def _window(self, file: RemoteFile, number: int) -> Future[memoryview]:
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

    def _fetch(self, file: RemoteFile, number: int) -> memoryview:
        start = number * self.window_bytes
        held = memoryview(bytearray(min(self.window_bytes, file.size - start)))
        file.fetch(held, start)
        return held


@dataclass
class RemoteFile:
    """One file of one commit of a repository."""

    where: str
    """Repository, revision and name, for messages."""
    name: str
    size: int
    etag: str
    """The listed id of its content: sha256, or git's id of the blob."""
    url: str
    commit: str
    headers: Mapping[str, str] = field(repr=False)
    """Headers of every request; may contain a token, so they are never shown."""
    windows: Windows = field(repr=False)
    _head: bytes = b""
    _direct: tuple[str, Mapping[str, str], str | None] | None = field(default=None, repr=False)
    """Target of the last redirect, the headers for it, and the file's etag there."""

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
        """What differs from the listing: nothing, since a commit never changes; every answer is checked in `fetch`."""
        return ""

    def fetch(self, view: memoryview, offset: int) -> None:
        """Fill `view` from byte `offset` on without the window cache; resumes at the byte where a connection broke.

        Raises:
            HubError: HUB_CHANGED, it is not the file that was listed; else why it cannot be read.
        """
        done, failures = 0, 0
        while done < len(view):
            before, wait, fault = done, None, None
            try:
                for piece in self._pieces(offset + done, offset + len(view)):
                    view[done : done + len(piece)] = piece
                    done += len(piece)
            except _AgainError as again:
                wait, fault = again.wait, again.problem
            except transport_error() as error:
                fault = problem_of(error, self.where)
            if done == len(view):
                return
            failures = 1 if done > before else failures + 1
            if failures >= _ATTEMPTS:
                cut = HubError.of("HUB_TRUNCATED", self.where, "the answer ends too early", "try again later")
                raise fault or cut
            time.sleep(wait if wait is not None else pause(failures - 1) * random.uniform(0.75, 1.25))

    def _pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) as they arrive."""
        from huggingface_hub import get_session

        direct = self._direct
        url, headers = (direct[0], direct[1]) if direct else (self.url, self.headers)
        asked = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=asked, timeout=_TIMEOUT_S, follow_redirects=True) as response:
            if direct and response.status_code in _EXPIRED:
                self._direct = None  # the address has expired; get another from the Hub
                raise _AgainError(problem_of(_status_error(response), self.where), 0.0)
            self._check(response, start, stop, direct)
            left = stop - start
            for piece in response.iter_bytes():
                if len(piece) > left:
                    raise HubError.of("HUB_CHANGED", self.where, "more bytes arrive than were requested", "try again")
                left -= len(piece)
                yield piece

    def _check(self, response: Any, start: int, stop: int, direct: Any) -> None:
        """Raise `_AgainError` for an answer worth a retry, HubError for one that is not bytes of the listed file."""
        if response.status_code in (_AGAIN + _EXPIRED if response.history else _AGAIN):
            raise _AgainError(problem_of(_status_error(response), self.where), retry_after(response))
        if response.status_code == 416:
            raise self._changed(f"no longer has bytes {start:,} to {stop:,}")
        if response.status_code >= 400:
            raise problem_of(_status_error(response), self.where)
        first = (response.history or [response])[0].headers
        etag = _plain(first.get("X-Linked-Etag") or first.get("ETag"))
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        checks = {
            "commit": (first.get("X-Repo-Commit"), None if direct else self.commit),
            "etag": (etag, direct[2] if direct else self.etag),
            "size": (total if total.isdigit() else None, str(self.size)),
        }
        for what, (now, listed) in checks.items():
            if now and listed and now != listed:
                raise self._changed(f"its {what} is {now} now, and was {listed} when it was listed")
        if response.status_code != 206 and (start, stop) != (0, self.size):
            what = "the server sends whole files only, and tensors are read by ranges"
            raise HubError.of("HUB_RANGES", self.where, what, "merge without stream_from_hub=True")
        if response.history and not direct:
            kept = {k: v for k, v in self.headers.items() if k.lower() != "authorization" or _sent(response, k)}
            self._direct = (str(response.url), kept, _plain(response.headers.get("ETag")))

    def _changed(self, what: str) -> HubError:
        return HubError.of("HUB_CHANGED", self.where, what, "merge again, so that all bytes are of one version")


class _AgainError(Exception):
    """A request that failed and is worth a retry, after `wait` seconds if the server says so."""

    def __init__(self, problem: HubError, wait: float | None) -> None:
        self.problem, self.wait = problem, wait


class Remote:
    """Weights that are only on the Hub, as files read over the network."""

    def __init__(self) -> None:
        self.windows = Windows(ROOM_BYTES, WINDOW_BYTES)
        self._files: dict[str, dict[str, RemoteFile]] = {}

    @classmethod
    @contextmanager
    def open(cls, repos: Sequence[ResolvedRepo]) -> Iterator[Remote]:
        """Open the missing files of resolved repositories; their headers are fetched now, several at a time.

        Raises:
            HubError: a header cannot be read.
        """
        remote = cls()
        try:
            if any(repo.missing for repo in repos):
                remote._add(repos)
            yield remote
        finally:
            remote.windows.close()

    def files(self, repo: ResolvedRepo) -> dict[str, RemoteFile]:
        """The missing files of a repository, by their names in its folder."""
        inside = f"{repo.subfolder}/" if repo.subfolder else ""
        return {file.name.removeprefix(inside): self._files[str(repo.commit)][file.name] for file in repo.missing}

    def _add(self, repos: Sequence[ResolvedRepo]) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not marked as exported

        headers = build_hf_headers()
        for repo in repos:
            for file in repo.missing:
                if file.name not in self._files.setdefault(str(repo.commit), {}):
                    where, url = (
                        f"{repo.where}: {file.name}",
                        hf_hub_url(str(repo.repo_id), file.name, revision=repo.commit),
                    )
                    self._files[str(repo.commit)][file.name] = RemoteFile(
                        where, file.name, file.size, file.etag, url, str(repo.commit), headers, self.windows
                    )
        every = [file for files in self._files.values() for file in files.values()]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(RemoteFile.read_head, every))


def _sent(response: Any, key: str) -> bool:
    """Whether the last request after redirects still had this header: other hosts do not get the token."""
    return key in response.request.headers


def _plain(etag: str | None) -> str | None:
    return etag.removeprefix("W/").strip('"') if etag else None


def _status_error(response: Any) -> Exception:
    """huggingface_hub's error for a response."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # documented as well

    try:
        response.read()
        hf_raise_for_status(response)
    except HfHubHTTPError as error:
        return error
    return HfHubHTTPError(f"status {response.status_code}", response=response)
