"""Files on the Hub and in object stores that are read by ranges and never stored.

Those of the Hub are pinned to a commit, and retried where a connection broke.

Reads are served from windows of the file, which a few connections fetch ahead and which are dropped when others need
the memory. `RemoteFile` has the interface of a local file of a checkpoint.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from paft_merge.errors import HubError
from paft_merge.hub.faults import problem_of, retry_after, transport_error
from paft_merge.hub.wanted_files import ResolvedRepo
from paft_merge.stores import CONNECTIONS, RangedFile, Store, StoreFile, Windows, pause
from paft_merge.stores.windows import ROOM_BYTES, WINDOW_BYTES

_ATTEMPTS = 8
_AGAIN = (408, 429, 500, 502, 503, 504)
_EXPIRED = (400, 401, 403)
_TIMEOUT_S = 30.0


@dataclass
class RemoteFile(RangedFile):
    """One file of one commit of a repository; its etag is sha256, or git's id of the blob."""

    url: str
    commit: str
    headers: Mapping[str, str] = field(repr=False)
    """Headers of every request; may contain a token, so they are never shown."""
    _direct: tuple[str, Mapping[str, str], str | None] | None = field(default=None, repr=False)
    """Target of the last redirect, the headers for it, and the file's etag there."""

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
    """Weights that are only on the Hub or in an object store, as files read over the network."""

    def __init__(self) -> None:
        self.windows = Windows(ROOM_BYTES, WINDOW_BYTES)
        self._files: dict[str, dict[str, RangedFile]] = {}

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

    def files(self, repo: ResolvedRepo) -> dict[str, RangedFile]:
        """The missing files of a repository, by their names in its folder."""
        inside = f"{repo.subfolder}/" if repo.subfolder else ""
        return {file.name.removeprefix(inside): self._files[repo.key][file.name] for file in repo.missing}

    def _add(self, repos: Sequence[ResolvedRepo]) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not marked as exported

        headers = build_hf_headers()
        for repo in repos:
            if repo.store is not None:
                self._add_stored(repo, repo.store)
                continue
            for file in repo.missing:
                if file.name not in self._files.setdefault(repo.key, {}):
                    where, url = (
                        f"{repo.where}: {file.name}",
                        hf_hub_url(str(repo.repo_id), file.name, revision=repo.commit),
                    )
                    self._files[repo.key][file.name] = RemoteFile(
                        where, file.name, file.size, file.etag, self.windows, url, str(repo.commit), headers
                    )
        every = [file for files in self._files.values() for file in files.values()]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(RangedFile.read_head, every))

    def _add_stored(self, repo: ResolvedRepo, store: Store) -> None:
        for file in repo.missing:
            where = f"{store.url}/{file.name}"
            one = StoreFile(where, file.name, file.size, file.etag, self.windows, store, file.version)
            self._files.setdefault(repo.key, {})[file.name] = one


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
