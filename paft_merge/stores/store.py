"""One folder of an object store: its files listed, read by ranges, written whole, and deleted."""

from __future__ import annotations

import hashlib
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from paft_merge.errors import CheckpointError, StoreError
from paft_merge.stores.client_errors import is_of_store, is_passing, problem_of
from paft_merge.stores.urls import SCHEMES, checked
from paft_merge.stores.windows import RangedFile, pause

log = logging.getLogger(__name__)

T = TypeVar("T")

_ATTEMPTS = 5
_REPEATING = {"gs": 2, "az": 2}
"""Attempts where the client itself repeats a request for half a minute (gcsfs) or a whole one (Azure's)."""
_PIECE_BYTES = 32 * 2**20
_PART_BYTES = 16 * 2**20
"""Size of a part of an upload; the MD5 of an upload depends on it."""
_PARTS = 9_000
"""S3 takes 10,000 parts of an object."""
_TIMEOUT_S = 120.0
"""Seconds without an answer of S3; s3fs waits 15, in which a slow line may not have sent a part."""
_AT_ONCE = 4
"""Parts that are sent at a time; each is in memory."""
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created", "generation", "VersionId", "version_id")
_ETAGS = ("ETag", "etag", "md5Hash", "content_md5")
_AGAIN = "run again when no other process writes to it"


@dataclass(frozen=True)
class Found:
    """A file as the store lists it."""

    name: str
    """Relative to the folder."""
    size: int
    etag: str
    """The store's checksum or tag of the content; empty if it has none."""
    version: str
    """Time of the last change, and the number of the version if there is one."""


class Store:
    """A folder at a URL. Its methods may be called from any thread.

    A request that failed on the server's side, or whose connection broke, is repeated with growing pauses.

    Attributes:
        url: the folder, in one spelling.
    """

    def __init__(self, url: str) -> None:
        """Connect to the store.

        Raises:
            StoreError: STORE_URL or SECRET, the URL is invalid; STORE_PACKAGE, a package is missing; and why the store
                cannot be reached.
        """
        self.url = checked(url)
        scheme = self.url.partition(":")[0]
        self._extra = SCHEMES[scheme]
        self._is_s3 = self._has_md5 = self._extra == "s3"
        self._fs, self._path = self._asked(self.url, self._connect)
        self._lock = threading.Lock()
        self._listed: Mapping[str, Found] = {}
        self._listed_at, self._read_at = -1.0, 0.0

    def _connect(self) -> tuple[Any, str]:
        from fsspec.config import conf
        from fsspec.core import url_to_fs

        timeouts = {"config_kwargs": {"read_timeout": _TIMEOUT_S, **conf.get("s3", {}).get("config_kwargs", {})}}
        try:
            fs, path = url_to_fs(self.url, use_listings_cache=False, **(timeouts if self._is_s3 else {}))
        except ValueError as error:  # fsspec knows some schemes only when the package that reads them is installed
            if "Protocol not known" not in str(error):
                raise
            raise ImportError(str(error)) from error
        return fs, path.rstrip("/")

    def list(self) -> dict[str, Found]:
        """Every file in the folder and below it, by its relative name; empty if there is none.

        Raises:
            StoreError: the bucket does not exist, or cannot be listed.
        """
        began = time.monotonic()
        entries = self._asked(self.url, lambda: self._fs.find(self._path, detail=True))
        found = dict[str, Found]()
        for path, entry in entries.items():
            name = path.removeprefix(self._path).lstrip("/")
            if path.startswith(f"{self._path}/") and name and not name.endswith("/") and entry.get("type") == "file":
                found[name] = _found(name, entry)
        self._listed, self._listed_at = found, began
        return dict(found)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of a file, by default all.

        Raises:
            StoreError: STORE_NOT_FOUND, the file does not exist; STORE_RANGE, it ends before `start`; and others.
        """
        place = self._at(name)
        held = self._asked(f"{self.url}/{name}", lambda: self._fs.cat_file(place, start=start, end=stop))
        self._read_at = time.monotonic()
        return bytes(held)

    def fetch(self, name: str, target: Path, size: int) -> None:
        """Download a file.

        Raises:
            CheckpointError: INPUT_CHANGED, it does not have the listed size.
            StoreError: it cannot be read; DISK, the disk is full.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_name(f"{target.name}.{threading.get_ident()}.new")
        self._asked(f"{self.url}/{name}", lambda: self._fs.get_file(self._at(name), str(made)))
        if made.stat().st_size != size:
            raise _changed(
                f"{self.url}/{name}", f"was {size:,} bytes when it was listed and is {made.stat().st_size:,} now"
            )
        made.replace(target)

    def write(self, name: str, content: bytes, *, exclusive: bool = False) -> None:
        """Write a small file.

        Args:
            name: relative to the folder.
            content: all of it.
            exclusive: raise STORE_EXISTS if there is one, where the store can do so in one step.
        """
        where, place = f"{self.url}/{name}", self._at(name)
        if exclusive:
            try:
                self._asked(where, lambda: self._fs.pipe_file(place, content, mode="create"))
                return
            except StoreError as error:
                if error.problems[0].code != "STORE_UNSUPPORTED":
                    raise
        self._asked(where, lambda: self._fs.pipe_file(place, content))

    def upload(self, name: str, file: Path) -> Found:
        """Upload a local file in parts, and check that the store has what was sent.

        Raises:
            StoreError: STORE_CORRUPT, the store has another size or checksum, also after further attempts.
        """
        where, size = f"{self.url}/{name}", file.stat().st_size
        part = max(_PART_BYTES, -(-size // _PARTS))
        given = {"chunksize": part, "max_concurrency": _AT_ONCE} if self._is_s3 else {}
        for attempt in range(_ATTEMPTS):
            self._asked(where, lambda: self._fs.put_file(str(file), self._at(name), **given))
            found = self.info(name)
            fault = _fault(found, size)
            if found is not None and not fault and self._has_md5 and _differs(found.etag, file, part):
                # A tag of 32 digits is not the MD5 where a bucket encrypts with a key of its own (SSE-KMS).
                fault = "" if self._holds(name, file) else "the store has other bytes than were sent"
                self._has_md5 = bool(fault)
            if found is not None and not fault:
                return found
            log.info("%s: %s", where, fault)
            time.sleep(pause(attempt))
        raise StoreError.of("STORE_CORRUPT", where, fault, "try again later, or through another network")

    def _holds(self, name: str, file: Path) -> bool:
        """Whether the store has the bytes of a local file, which are read back."""
        with file.open("rb") as held:
            pieces = iter(lambda: held.read(_PIECE_BYTES), b"")
            starts = range(0, file.stat().st_size, _PIECE_BYTES)
            return all(self.read(name, at, at + len(piece)) == piece for at, piece in zip(starts, pieces, strict=True))

    def info(self, name: str) -> Found | None:
        """A file as the store has it now; None if there is none."""
        try:
            entry = self._asked(f"{self.url}/{name}", lambda: self._fs.info(self._at(name)))
        except StoreError as error:
            if error.problems[0].code == "STORE_NOT_FOUND":
                return None
            raise
        return _found(name, entry) if entry.get("type") == "file" else None

    def delete(self, names: Iterable[str]) -> None:
        """Delete files one after the other; those that do not exist are skipped."""
        for name in names:
            try:
                self._asked(f"{self.url}/{name}", lambda name=name: self._fs.rm_file(self._at(name)))  # type: ignore[misc]
            except StoreError as error:
                if error.problems[0].code != "STORE_NOT_FOUND":
                    raise

    def changed(self, name: str, size: int, etag: str, version: str) -> str:
        """How a file differs from what was listed, by a listing that is newer than the last read; empty if it does not."""
        with self._lock:
            if self._listed_at <= self._read_at:
                self.list()
            now = self._listed.get(name)
        if now is None:
            return "was deleted since it was opened"
        if now.size != size:
            return f"was {size:,} bytes when it was opened and is {now.size:,} now"
        return "was written to since it was opened" if (now.etag, now.version) != (etag, version) else ""

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _asked(self, where: str, call: Callable[[], T]) -> T:
        """Make a request, again after passing failures, with errors as `StoreError`."""
        attempts = _REPEATING.get(self._extra, _ATTEMPTS)
        for attempt in range(attempts):
            try:
                return call()
            except Exception as error:
                if not is_of_store(error):
                    raise
                problem = problem_of(error, where, self._extra)
                if attempt == attempts - 1 or not is_passing(error):
                    raise problem from error
                log.info("%s", problem)
            time.sleep(pause(attempt) * random.uniform(0.75, 1.25))
        raise AssertionError


@dataclass
class StoreFile(RangedFile):
    """One file of a store, with the size, tag and version that were listed."""

    store: Store = field(repr=False)
    version: str

    def changed(self) -> str:
        """Describe how the file differs from when it was listed; empty if it does not."""
        return self.store.changed(self.name, self.size, self.etag, self.version)

    def fetch(self, view: memoryview, offset: int) -> None:
        """Fill `view` from byte `offset` on without the window cache.

        Raises:
            CheckpointError: INPUT_CHANGED, the file was deleted or has become shorter.
            StoreError: why it cannot be read.
        """
        for start in range(0, len(view), _PIECE_BYTES):
            stop = min(start + _PIECE_BYTES, len(view))
            try:
                held = self.store.read(self.name, offset + start, offset + stop)
            except StoreError as error:
                if error.problems[0].code in ("STORE_NOT_FOUND", "STORE_RANGE"):
                    gone = error.problems[0].code == "STORE_NOT_FOUND"
                    raise _changed(
                        self.where, "was deleted since it was opened" if gone else "has become shorter"
                    ) from error
                raise
            if len(held) != stop - start:
                raise _changed(
                    self.where, f"ends at byte {offset + start + len(held):,}, and was longer when it was opened"
                )
            view[start:stop] = held


def _changed(where: str, what: str) -> CheckpointError:
    return CheckpointError.of("INPUT_CHANGED", where, what, _AGAIN)


def _found(name: str, entry: Mapping[str, Any]) -> Found:
    etag = next((str(entry[key]) for key in _ETAGS if entry.get(key)), "")
    times = (entry.get(key) for key in _TIMES)
    version = ",".join(
        str(t.timestamp() if hasattr(t, "timestamp") else t) for t in times if t not in (None, "", "null")
    )
    return Found(name, int(entry.get("size") or 0), etag.removeprefix("W/").strip('"'), version)


def _fault(found: Found | None, size: int) -> str:
    """How an uploaded file differs from one of `size` bytes; empty if it does not."""
    if found is None:
        return "the store does not have the file that was uploaded"
    return "" if found.size == size else f"the store has {found.size:,} bytes, and {size:,} were sent"


def _differs(tag: str, file: Path, part: int) -> bool:
    """Whether the tag of an object in S3 has the form of an MD5, and is not that of the file, sent in parts of this size."""
    digest, dash, _ = tag.partition("-")
    return re.fullmatch(r"[0-9a-f]{32}", digest) is not None and tag != _tag_of(file, part if dash else None)


def _tag_of(file: Path, part: int | None) -> str:
    """S3's tag of a file: its MD5, or that of the MD5s of its parts and their number."""
    digests = list[bytes]()
    with file.open("rb") as held:
        if part is None:
            return hashlib.file_digest(held, "md5").hexdigest()
        while block := held.read(part):
            digests.append(hashlib.md5(block, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
