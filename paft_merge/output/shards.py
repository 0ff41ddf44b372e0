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
"""A tensor to be written: name, safetensors' dtype name, shape."""

_DIRECT_FROM = 64 << 20
"""Files from this size on are written past the page cache; smaller ones are often read right after."""

_FORMAT = {"format": "pt"}  # transformers refuses a file that does not say so
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNRESERVABLE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor goes: `nbytes` bytes from `offset` of `file` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One file to be written: `header` is its first bytes, `slots` follow without a gap, `size` is all of it."""

    file: str
    header: bytes
    slots: tuple[Slot, ...]
    size: int


# --- the plan ---------------------------------------------------------------------------------------------------------


def split(tensors: Sequence[Planned], max_bytes: int | None = None, *, stem: str = "model") -> dict[str, list[Planned]]:
    """Divide tensors into files as transformers' `save_pretrained` does, keeping their order.

    A file is closed when the next tensor would take it past `max_bytes`; a tensor that is larger than that gets a file
    of its own, before the one being filled.

    Args:
        tensors: name, dtype and shape of each, in the order of the checkpoint.
        max_bytes: the most bytes of tensors in a file; None puts everything into one.
        stem: what file names begin with.

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
    """Fix every byte of the headers, and so where each tensor goes.

    The bytes are those of `safetensors.torch.save_file` when a file's tensors are in its order (by falling alignment
    of dtype, then by name); where it orders metadata at random, here they are sorted.

    Args:
        files: per file name the tensors in the order in which they shall lie.
        metadata: per file name the texts of `__metadata__`, `{"format": "pt"}` when absent; an empty map writes none.

    Raises:
        OutputError: OUTPUT when a header would be longer than readers accept (100 MB).
    """
    names = [name for tensors in files.values() for name, _, _ in tensors]
    if len(set(names)) < len(names) or "__metadata__" in names:
        raise ValueError("a tensor stands in the plan twice, or is called __metadata__")
    given = metadata or {}
    return tuple(_shard(file, tensors, given.get(file, _FORMAT)) for file, tensors in files.items())


def _shard(file: str, tensors: Sequence[Planned], metadata: Mapping[str, str]) -> Shard:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    reached, begins = 0, []
    for name, dtype, shape in tensors:
        begins.append(reached)
        reached += _nbytes(name, dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begins[-1], reached]}
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
    """The content of `model.safetensors.index.json`, as transformers fills it; None where one file needs no index.

    `total_parameters` counts the elements of all tensors; where a checkpoint holds buffers too, transformers, which
    knows them apart, writes a smaller number.
    """
    if len(shards) == 1 and not re.search(r"-\d+-of-\d+\.safetensors$", shards[0].file):
        return None
    slots = [slot for shard in shards for slot in shard.slots]
    totals = {
        "total_parameters": sum(prod(slot.shape) for slot in slots),
        "total_size": sum(slot.nbytes for slot in slots),
    }
    return {"metadata": totals, "weight_map": {slot.name: slot.file for slot in slots}}


def index_text(index: Mapping[str, Any]) -> str:
    """An index as transformers writes it to its file."""
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


# --- the writing ------------------------------------------------------------------------------------------------------


class ShardWriter:
    """The files of a plan, open for writing at any place from any number of threads; a context manager.

    Every file has its final size and its header before a tensor is written, and disk space is reserved where the file
    system can, so that a full disk shows here and not after an hour. A file appears under its name at once with its
    header: after a crash, each file is either absent or resumable.

    Attributes:
        created: the files that did not exist before; on resume, nothing that a journal says of them is true.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], *, resume: bool = False) -> None:
        """Create the files in an existing folder.

        Args:
            folder: where they go.
            shards: as `plan_shards` made them.
            resume: take files that exist, if they have the size and the header that are planned.

        Raises:
            OutputError: DISK when there is too little space (nothing stays behind of what was created), OUTPUT when a
                file exists already or the folder cannot be written, RESUME_STALE when a file is not the planned one.
        """
        self.folder = folder
        self._slots = {slot.name: slot for shard in shards for slot in shard.slots}
        self._shards = {shard.file: shard for shard in shards}
        self._fds: dict[str, int] = {}
        self._direct: dict[str, int | None] = {}
        self._unsettled = {shard.file: {slot.name for slot in shard.slots} for shard in shards}
        self._background, self._under_way, self._opening = Background(), dict[str, Writes](), Lock()
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
        self.created = frozenset(made)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def offset(self, name: str, start: int) -> int:
        """Where byte `start` of tensor `name` lies in its file, as a `PageAlignedBuffer` wants to know it."""
        return self._slots[name].offset + start

    def write(self, name: str, start: int, buffer: ByteBuffer, room: PageAlignedBuffer | None = None) -> None:
        """Write bytes of tensor `name`, from its byte `start` on; of a large file some time later (see `settle`).

        Args:
            name: a tensor of the plan.
            start: in bytes from the beginning of the tensor, not negative.
            buffer: C-contiguous; its bytes from `start` on must lie within the tensor. It may be changed at once, unless it
                lies in `room`.
            room: memory for `offset(name, start)` that the buffer lies in, if it does: it is written without a copy.

        Raises:
            OutputError: DISK when the disk, a quota or the limit of file sizes is full; OUTPUT when it fails otherwise.
        """
        slot, view = self._within(name, start, buffer)
        with self._telling(slot.file):
            under_way = self._past_the_cache(slot)
            if under_way is None:
                write_all(self._fds[slot.file], view, slot.offset + start)
            else:
                under_way.write(view, slot.offset + start, room)

    def settle(self, name: str) -> None:
        """Wait until all that was written of tensor `name` is in its file; raises as `write` does."""
        file = self._slots[name].file
        with self._telling(file):
            if name in self._under_way:
                self._under_way.pop(name).finish()
        self._unsettled[file].discard(name)
        if not self._unsettled[file]:
            _close(self._direct.pop(file, None))

    def read_into(self, name: str, start: int, buffer: ByteBuffer) -> None:
        """Read back what `write` has written; on resume, to check it against the journal."""
        slot, view = self._within(name, start, buffer)
        with self._telling(slot.file):
            if fill(self._fds[slot.file], view, slot.offset + start) < len(view):
                raise OutputError.of("OUTPUT", self.folder / slot.file, "has become shorter", "start the merge again")

    def finish(self) -> None:
        """Bring every file, and then the names in the folder, safely to disk."""
        for name in list(self._under_way):
            self.settle(name)
        for file, fd in self._fds.items():
            with self._telling(file):
                os.fsync(fd)
        _sync_folder(self.folder)

    def close(self) -> None:
        """Close every file; a second call does nothing."""
        self._background.close()
        for fds in (self._direct, self._fds):
            while fds:
                _close(fds.popitem()[1])

    def _past_the_cache(self, slot: Slot) -> Writes | None:
        """What is being written of a large file's tensor. Its descriptor is open from the first write to the last: models have many files."""
        file = slot.file
        if self._shards[file].size < _DIRECT_FROM:
            return None
        with self._opening:
            if file not in self._direct:
                self._direct[file] = open_direct(self.folder / file)
            direct = self._direct[file]
            if direct is not None and slot.name not in self._under_way:
                self._under_way[slot.name] = Writes(self._background, self._fds[file], direct)
            return self._under_way.get(slot.name)

    def _within(self, name: str, start: int, buffer: ByteBuffer) -> tuple[Slot, memoryview]:
        slot, view = self._slots[name], as_bytes(buffer)
        if not 0 <= start <= slot.nbytes - len(view):
            raise ValueError(f"bytes {start} to {start + len(view)} of {name!r}, which has {slot.nbytes}")
        return slot, view

    def _create(self, shard: Shard) -> None:
        """Make the file under a name that no reader looks for, and rename it when size and header are there."""
        path, made = self.folder / shard.file, self.folder / f"{shard.file}.new"
        with self._telling(shard.file):
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
        with self._telling(shard.file):
            self._fds[shard.file] = fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            header = bytearray(len(shard.header))
            fill(fd, memoryview(header), 0)
            if os.fstat(fd).st_size != shard.size or header != shard.header:
                what = "is not the file that this merge would write"
                raise OutputError.of("RESUME_STALE", path, what, "start again with --overwrite")

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
    def _telling(self, file: str) -> Iterator[None]:
        """Turn what the system refuses into an `OutputError` that names the file, or the space that is missing."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
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
    """Give a file its size and, where the system can, its blocks.

    Reserved blocks make later writes twice as fast on ext4 (measured), and a full disk known at once. This is
    `fallocate(2)` and not `os.posix_fallocate`, which on file systems that cannot reserve writes into every block.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None or size == 0:  # macOS, for one
        return os.ftruncate(fd, size)
    while fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code in _UNRESERVABLE:
            return os.ftruncate(fd, size)
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return None


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
