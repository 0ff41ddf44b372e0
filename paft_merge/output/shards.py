"""Safetensors files written header first: any tensor, in any order, from any thread."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

from paft_merge.errors import OutputError
from paft_merge.inputs.dtypes import DTYPES
from paft_merge.inputs.safetensors_header import MAX_JSON_BYTES, ByteBuffer, as_bytes, fill
from paft_merge.output.direct_io import Background, PageAlignedBuffer, Writes, open_direct, write_all

if TYPE_CHECKING:
    from collections.abc import Iterator

Planned: TypeAlias = "tuple[str, str, tuple[int, ...]]"
"""A tensor to write: name, safetensors' dtype name, shape."""

_DIRECT_FROM = 64 << 20
"""File size from which writes are direct; smaller files are often read soon after."""

START_OVER = "run without resume=True to start over"
"""The fix for RESUME_STALE."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, a quota, and the limit of file sizes."""

_FORMAT = {"format": "pt"}  # transformers refuses a file without it
_UNRESERVABLE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


@dataclass(frozen=True, slots=True)
class Slot:
    """Position of one tensor: `nbytes` bytes at `offset` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One file to write: `header` is its first bytes, `slots` follow without gaps, `size` is the size of the file."""

    file: str
    header: bytes
    slots: tuple[Slot, ...]
    size: int


# --- planning ---------------------------------------------------------------------------------------------------------


def split(tensors: Sequence[Planned], max_bytes: int | None = None, *, stem: str = "model") -> dict[str, list[Planned]]:
    """Divide tensors into files as transformers' `save_pretrained` does, keeping their order.

    A file ends if the next tensor would make it larger than `max_bytes`. A tensor larger than that gets a separate
    file, before the one being filled.

    Args:
        tensors: in the order of the checkpoint.
        max_bytes: limit of the bytes of tensors in a file; None puts all tensors into one file.
        stem: start of the file names.

    Returns:
        `{stem}.safetensors`, or `{stem}-00001-of-0000N.safetensors` and so on, each with its tensors.
    """
    groups: list[list[Planned]] = []
    filling: list[Planned] = []
    filled = 0
    for tensor in tensors:
        size = _nbytes(*tensor)
        if max_bytes is not None and size > max_bytes:
            groups.append([tensor])
            continue
        if max_bytes is not None and filled + size > max_bytes:
            groups.append(filling)
            filling, filled = [], 0
        filling.append(tensor)
        filled += size
    if filling or not groups:
        groups.append(filling)
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def plan_shards(
    files: Mapping[str, Sequence[Planned]], metadata: Mapping[str, Mapping[str, str]] | None = None
) -> tuple[Shard, ...]:
    """Compute the headers, and with them the position of every tensor.

    The bytes equal those of `safetensors.torch.save_file` if a file's tensors are in its order (by descending alignment
    of dtype, then by name), except that metadata is sorted; `save_file` writes it in random order.

    Args:
        files: by file name the tensors, in the order in which they are stored. A file in a folder stores names without
            that folder: `2_Dense/model.safetensors` stores `2_Dense/linear.weight` as `linear.weight`.
        metadata: by file name the `__metadata__`; default `{"format": "pt"}`; an empty map writes none.

    Raises:
        OutputError: OUTPUT if a header would be longer than readers accept (100 MB).
    """
    names = [name for tensors in files.values() for name, _, _ in tensors]
    if len(set(names)) < len(names) or "__metadata__" in names:
        raise ValueError("two tensors have the same name, or one is called __metadata__")
    given = metadata or {}
    return tuple(_shard(file, tensors, given.get(file, _FORMAT)) for file, tensors in files.items())


def _shard(file: str, tensors: Sequence[Planned], metadata: Mapping[str, str]) -> Shard:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    reached, begins, prefix = 0, [], file[: file.rfind("/") + 1]
    for name, dtype, shape in tensors:
        begins.append(reached)
        reached += _nbytes(name, dtype, shape)
        header[name.removeprefix(prefix)] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [begins[-1], reached],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_JSON_BYTES:
        what = f"its header would take {len(text):,} bytes; readers accept {MAX_JSON_BYTES:,}"
        raise OutputError.of("OUTPUT", file, what, "write smaller shards")
    start = 8 + len(text)
    slots = tuple(
        Slot(name, dtype, tuple(shape), file, start + begin, _nbytes(name, dtype, shape))
        for (name, dtype, shape), begin in zip(tensors, begins, strict=True)
    )
    return Shard(file, len(text).to_bytes(8, "little") + text, slots, start + reached)


def _nbytes(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    bits = prod(shape) * DTYPES[dtype].bits
    if bits % 8:
        raise ValueError(f"{name!r}: {dtype} {shape} does not fill whole bytes")
    return bits // 8


def index_of(shards: Sequence[Shard]) -> dict[str, Any] | None:
    """Content of `model.safetensors.index.json`, as transformers writes it; None if there is one file without a number.

    `total_parameters` counts the elements of all tensors. transformers does not count buffers, and writes a smaller
    number for checkpoints that have them.
    """
    shards = [shard for shard in shards if "/" not in shard.file]  # an index is about the files beside it
    if not shards or (len(shards) == 1 and not re.search(r"-\d+-of-\d+\.safetensors$", shards[0].file)):
        return None
    slots = [slot for shard in shards for slot in shard.slots]
    totals = {
        "total_parameters": sum(prod(slot.shape) for slot in slots),
        "total_size": sum(slot.nbytes for slot in slots),
    }
    return {"metadata": totals, "weight_map": {slot.name: slot.file for slot in slots}}


def index_text(index: Mapping[str, Any]) -> str:
    """The text of an index file, formatted as transformers does."""
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


# --- writing ----------------------------------------------------------------------------------------------------------


class ShardWriter:
    """The planned files, open for writes at any position from any number of threads; a context manager.

    Every file gets its final size and its header before any tensor is written. Disk space is reserved where the file
    system can do so, so that a full disk is an error at the start. A file gets its name only with its header: after a
    crash, each file is either absent or resumable.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], *, resume: bool = False) -> None:
        """Create the files in an existing folder.

        Args:
            folder: the folder.
            shards: from `plan_shards`.
            resume: keep existing files that have the planned size and header.

        Raises:
            OutputError: DISK if there is too little space (created files are removed), OUTPUT if a file already exists
                or the folder cannot be written, RESUME_STALE if an existing file is not the planned one.
        """
        self.folder = folder
        self._slots = {slot.name: slot for shard in shards for slot in shard.slots}
        self._shards = {shard.file: shard for shard in shards}
        self._fds: dict[str, int] = {}
        self._direct: dict[str, int | None] = {}
        self._unsettled = {shard.file: {slot.name for slot in shard.slots} for shard in shards}
        self._background, self._pending, self._opening = Background(), dict[str, Writes](), Lock()
        made = list[str]()
        try:
            kept = {shard.file for shard in shards if resume and os.path.lexists(folder / shard.file)}
            self._check_space(sum(shard.size for shard in shards if shard.file not in kept))
            for shard in shards:
                if shard.file in kept:
                    self._reopen(shard)
                else:
                    self._create(shard)
                    made.append(shard.file)
        except BaseException:
            self.close()
            for file in made:
                os.unlink(folder / file)
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def offset(self, name: str, start: int) -> int:
        """The position of byte `start` of tensor `name` in its file, for `PageAlignedBuffer.array`."""
        return self._slots[name].offset + start

    def write(self, name: str, start: int, buffer: ByteBuffer, memory: PageAlignedBuffer | None = None) -> None:
        """Write bytes of tensor `name`; in a large file asynchronously (see `settle`).

        Args:
            name: a tensor of the plan.
            start: in bytes from the beginning of the tensor, not negative.
            buffer: C-contiguous; must fit into the tensor at `start`. It may be changed as soon as this returns, unless
                it is in `memory`.
            memory: the `PageAlignedBuffer`, aligned to `offset(name, start)`, that holds `buffer`, if any; then no copy
                is made.

        Raises:
            OutputError: DISK if the disk, a quota or the limit of file sizes is reached; OUTPUT for other failures.
        """
        slot, view = self._within(name, start, buffer)
        with self._naming_file(slot.file):
            writes = self._direct_writes(slot)
            if writes is None:
                write_all(self._fds[slot.file], view, slot.offset + start)
            else:
                writes.write(view, slot.offset + start, memory)

    def settle(self, name: str) -> None:
        """Wait until all written bytes of tensor `name` are in its file; raises as `write` does."""
        file = self._slots[name].file
        with self._naming_file(file):
            if name in self._pending:
                self._pending.pop(name).finish()
        self._unsettled[file].discard(name)
        if not self._unsettled[file]:
            _close(self._direct.pop(file, None))

    def finish(self) -> None:
        """Make every file, and then the folder, durable."""
        for name in list(self._pending):
            self.settle(name)
        for file, fd in self._fds.items():
            with self._naming_file(file):
                os.fsync(fd)
        for folder in {(self.folder / file).parent for file in self._fds} | {self.folder}:
            sync_folder(folder)

    def close(self) -> None:
        """Close every file; a second call does nothing."""
        self._background.close()
        for fds in (self._direct, self._fds):
            while fds:
                _close(fds.popitem()[1])

    def _direct_writes(self, slot: Slot) -> Writes | None:
        """The direct writes of a tensor; None if its file is small or does not support them.

        A file's second descriptor is open only from its first write to its last, because models have many files.
        """
        file = slot.file
        if self._shards[file].size < _DIRECT_FROM:
            return None
        with self._opening:
            if file not in self._direct:
                self._direct[file] = open_direct(self.folder / file)
            direct = self._direct[file]
            if direct is not None and slot.name not in self._pending:
                self._pending[slot.name] = Writes(self._background, self._fds[file], direct)
            return self._pending.get(slot.name)

    def _within(self, name: str, start: int, buffer: ByteBuffer) -> tuple[Slot, memoryview]:
        slot, view = self._slots[name], as_bytes(buffer)
        if not 0 <= start <= slot.nbytes - len(view):
            raise ValueError(f"bytes {start} to {start + len(view)} of {name!r}, which has {slot.nbytes}")
        return slot, view

    def _create(self, shard: Shard) -> None:
        """Create the file under a temporary name, and rename it when it has its size and header."""
        path, made = self.folder / shard.file, self.folder / f"{shard.file}.new"
        with self._naming_file(shard.file):
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, "exists already", str(path))
            fd = os.open(made, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                _reserve(fd, shard.size)
                write_all(fd, memoryview(shard.header), 0)
                os.rename(made, path)
            except BaseException:
                os.close(fd)
                os.unlink(made)
                raise
        self._fds[shard.file] = fd

    def _reopen(self, shard: Shard) -> None:
        path = self.folder / shard.file
        with self._naming_file(shard.file):
            self._fds[shard.file] = fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            header = bytearray(len(shard.header))
            fill(fd, memoryview(header), 0)
            if os.fstat(fd).st_size != shard.size or header != shard.header:
                what = "is not the file that this merge would write"
                raise OutputError.of("RESUME_STALE", path, what, START_OVER)

    def _check_space(self, needed: int) -> None:
        try:
            free = _free_bytes(self.folder)
        except OSError as error:
            raise OutputError.of("OUTPUT", self.folder, f"cannot be written: {error.strerror}") from error
        if needed > free:
            raise self._full("the disk has too little space", needed, free)

    def _full(self, what: str, needed: int, free: int) -> OutputError:
        text = f"{what}: {needed:,} bytes needed, {free:,} free"
        return OutputError.of("DISK", self.folder, text, "free some space, or write elsewhere")

    @contextmanager
    def _naming_file(self, file: str) -> Iterator[None]:
        """Turn an OSError into an `OutputError` that names the file, or the missing space."""
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL:
                what = f"cannot be written: {error.strerror}"
                raise OutputError.of("OUTPUT", self.folder / file, what) from error
            needed = self._shards[file].size
            raise self._full(f"{file}: {error.strerror}", needed, _free_bytes(self.folder)) from error


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _free_bytes(folder: Path) -> int:
    seen = os.statvfs(folder)
    return seen.f_bavail * seen.f_frsize


def _reserve(fd: int, size: int) -> None:
    """Set a file's size and, if the file system can, allocate its blocks.

    Allocated blocks make later writes twice as fast on ext4 (measured), and show a full disk immediately. This calls
    `fallocate(2)`, because `os.posix_fallocate` writes into every block on file systems that cannot allocate.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None or size == 0:  # macOS has no fallocate
        return os.ftruncate(fd, size)
    while fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code in _UNRESERVABLE:
            return os.ftruncate(fd, size)
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return None


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
