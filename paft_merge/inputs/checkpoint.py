"""A checkpoint's folder: names, dtypes and shapes of its tensors from headers alone, their bytes on demand."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import xxhash

from paft_merge.compute.kernels.block_source import BlockSource
from paft_merge.errors import CheckpointError, Problem, Problems
from paft_merge.inputs.dtypes import DTYPES, Dtype
from paft_merge.inputs.model_config import read_model_config
from paft_merge.inputs.safetensors_header import (
    ByteBuffer,
    Header,
    TensorInfo,
    as_bytes,
    fill,
    open_regular,
    parse,
    quote,
    reading,
    scan,
    truncate,
)
from paft_merge.inputs.weight_files import LAZY, locate, module_files

if TYPE_CHECKING:
    import torch

    from paft_merge.inputs.torch_pickle import Stored

__all__ = ["DTYPES", "Checkpoint", "CheckpointFile", "Dtype", "TensorInfo"]

_SAMPLE_BYTES = 4096
_SAMPLES = 16
_COMPARED_BYTES = 1 << 24


@dataclass(frozen=True)
class CheckpointFile:
    """One file of tensors at the time it was opened; `digest` is xxh3_128 of its header, in hex."""

    name: str
    size: int
    mtime_ns: int
    metadata: Mapping[str, str]
    digest: str
    ctime_ns: int = 0
    """Time of the last change of content or attributes; no program can set it back."""
    inode: int = 0


class FarFile(Protocol):
    """A remote file, read like a local one."""

    size: int
    etag: str
    """Identifies the content."""

    def read(self, view: memoryview, offset: int) -> int:
        """Fill `view` from byte `offset` on; return the number of bytes, fewer than asked only at the end of the file."""

    def changed(self) -> str:
        """Describe how the file differs from when it was opened; empty if it does not."""


class Checkpoint:
    """The tensors of a folder (or of one file), for reading from any number of threads; a context manager.

    Reads are `preadv` on one descriptor per file, so that a file that becomes shorter is an error and not a SIGBUS.
    Files that are not in the folder may be remote (`far`).

    Attributes:
        folder: the folder of the files.
        tensors: by name, ordered by file and then by offset.
        files: the files that hold tensors, sorted by name.
        config: `config.json` parsed; empty if there is none.
        file: the name of the file, if a file was opened and not a folder.
        listing: sizes of the files of the Hub repository by name; empty for any other folder.
        tokenizer_files: tokenizer files by name, for an intermediate merge, which has no folder; else None.
        named_like: the checkpoint whose tensor names this one has (see `equivalent_names`); None: the names of its files.
        warnings: of what is unusual and was read nevertheless.
    """

    tokenizer_files: Mapping[str, bytes | Path] | None = None
    named_like: Checkpoint | None = None
    warnings: tuple[Problem, ...] = ()

    def __init__(
        self, folder: Path, opened: Sequence[_Opened], config: Mapping[str, Any], strided: Mapping[str, Stored]
    ) -> None:
        self.folder = folder
        self.files = tuple(one.file for one in opened)
        self.tensors = {name: info for one in opened for name, info in one.tensors.items()}
        self.config = dict(config)
        self._fds = {one.file.name: one.fd for one in opened if one.fd is not None}
        self._far = {one.file.name: one.far for one in opened if one.far is not None}
        self.file: str | None = None
        self.listing: Mapping[str, int] = {}
        self._strided = strided
        self._packed: dict[str, memoryview] = {}
        self._packing = Lock()
        self._sampled: str | None = None

    @classmethod
    def open(cls, folder: Path, *, unpickle: bool = False, far: Mapping[str, FarFile] | None = None) -> Checkpoint:
        """Open a folder of `model.safetensors`, of shards with their index, or one `.safetensors` file by its path.

        File names of diffusers, and a single file of any other name, are found too. The tensors of a module of
        sentence-transformers that has weights of its own are called `2_Dense/linear.weight`.

        Args:
            folder: the checkpoint, on this machine.
            unpickle: read `pytorch_model*.bin` if there is nothing else, through a reader that runs no code of them.
            far: remote files of the folder by name; a file that is also in the folder is read from the folder.

        Raises:
            CheckpointError: with all faults of headers, index and config.
        """
        asked = folder = Path(folder)
        problems, opened = Problems(), list[_Opened]()
        try:
            with problems.catching():
                folder, names, weight_map, pickled = locate(folder, unpickle, tuple(far or ()))
                for name in names:
                    with problems.catching():
                        elsewhere = (far or {}).get(name) if not (folder / name).exists() else None
                        opened.append(_Opened.of(folder / name, pickled, elsewhere))
                if weight_map is not None:
                    problems.found.extend(_compare(weight_map, opened, folder))
                for name in module_files(folder, far or ()) if asked.is_dir() else ():
                    with problems.catching():
                        opened.append(_open_module(folder, name, unpickle, far or {}))
            config: dict[str, Any] = {}
            with problems.catching():
                config = read_model_config(folder)
            if not problems.found and not any(one.tensors for one in opened):
                problems.add("CHECKPOINT_MISSING", asked, "holds no tensors", "download it again, or check the path")
            problems.raise_as(CheckpointError)
        except BaseException:
            for one in opened:
                if one.fd is not None:
                    os.close(one.fd)
            raise
        found = cls(folder, opened, config, {s.name: s for one in opened for s in one.strided})
        found.file = asked.name if not asked.is_dir() else None
        return found

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; a second call does nothing."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def read_into(self, name: str, start: int, buffer: ByteBuffer) -> None:
        """Fill `buffer` with the bytes of tensor `name` from its byte `start` on.

        Args:
            name: a key of `tensors`.
            start: in bytes from the beginning of the tensor, not negative.
            buffer: writable and C-contiguous (a numpy array, a memoryview); must not reach past the tensor's end.

        Raises:
            CheckpointError: INPUT_CHANGED if the file has become shorter, SHARD_UNREADABLE if the disk fails.
        """
        view = as_bytes(buffer)
        info = self._info_within(name, start, len(view))
        if name in self._strided:
            view[:] = self._pack(name)[start : start + len(view)]
        else:
            self._read(info.file, info.offset + start, view)

    def location(self, name: str, start: int, nbytes: int) -> tuple[int, int] | None:
        """File descriptor and offset of byte `start` of tensor `name`; None if no local file holds it contiguously.

        Args:
            name: a key of `tensors`.
            start: in bytes from the beginning of the tensor.
            nbytes: number of bytes that will be read; must not reach past the tensor's end.
        """
        info = self._info_within(name, start, nbytes)
        fd = None if name in self._strided else self._fds.get(info.file)
        return None if fd is None else (fd, info.offset + start)

    def _info_within(self, name: str, start: int, nbytes: int) -> TensorInfo:
        info = self.tensors[name]
        if not 0 <= start <= info.nbytes - nbytes:
            raise ValueError(f"bytes {start} to {start + nbytes} of {name!r}, which has {info.nbytes}")
        return info

    def tensor(self, name: str) -> torch.Tensor:
        """Read one whole tensor in its storage dtype.

        Raises:
            CheckpointError: DTYPE_UNSUPPORTED if torch has no such dtype (F4, F6); otherwise as `read_into`.
        """
        import torch

        info = self.tensors[name]
        dtype = getattr(torch, DTYPES[info.dtype].torch or "", None)
        if not isinstance(dtype, torch.dtype):
            what = f"tensor {quote(name)} is {info.dtype}, for which this torch has no dtype"
            raise CheckpointError.of("DTYPE_UNSUPPORTED", self.folder / info.file, what)
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        self.read_into(name, 0, raw.numpy())
        return raw.view(dtype).reshape(info.shape)

    # --- overridden by computed checkpoints (`engine.intermediate`) and by those under other names (`equivalent_names`) ---

    computed = False
    """Whether reading a tensor computes it."""

    @property
    def identity(self) -> Hashable:
        """Distinguishes its tensors from those of other checkpoints."""
        return self.folder, self.file

    @property
    def folders(self) -> list[Path]:
        """Every folder, or separate file, that is read."""
        return [self.folder / self.file if self.file else self.folder]

    def stored_at(self, name: str) -> Hashable:
        """Identify the stored tensor that `name` is; equal for the same tensor of the same checkpoint."""
        return self.identity, name

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The names in its files of the tensors that `name` is made of."""
        return (name,)

    def is_derived(self, name: str) -> bool:
        """Whether the model computes the values of tensor `name` itself, so that this checkpoint does not store it."""
        return False

    def add_to(self, feed: BlockSource, name: str, start: int, row: int) -> bool:
        """Add the read of the entries of tensor `name` from `start` on to a row of `feed`; False if they cannot be read from a file."""
        width = DTYPES[self.tensors[name].dtype].bits // 8
        location = self.location(name, start * width, feed.size * width)
        if location:
            feed.read(row, *location)
        return location is not None

    def stored_format(self, name: str) -> str:
        """The format in which tensor `name` is stored quantised; empty if it is not."""
        return ""

    def written_dtype(self, name: str) -> str:
        """Storage type of tensor `name`; a computed checkpoint may deliver a wider one."""
        return self.tensors[name].dtype

    def bytes_read(self, name: str) -> int:
        """Stored bytes that one pass over tensor `name` reads."""
        return self.tensors[name].nbytes

    def working_bytes(self, name: str) -> int:
        """Bytes of memory that reading a block of tensor `name` needs besides the block."""
        return 0

    def release(self, name: str) -> None:
        """Free memory held for tensor `name`."""

    def sample(self) -> str:
        """XXH3-128 of the first 4 KiB of every tensor, to distinguish fine-tunes, whose headers are equal.

        Computed once: `check_unchanged` reports files that have changed since.
        """
        if self._sampled is None:
            digest = xxhash.xxh3_128()
            for name, info in self.tensors.items():
                held = bytearray(min(info.nbytes, _SAMPLE_BYTES))
                self.read_into(name, 0, held)
                digest.update(held)
            self._sampled = digest.hexdigest()
        return self._sampled

    # ----------------------------------------------------------------------------------------------------------------------

    def same_bytes(self, name: str, other: Checkpoint, other_name: str, *, sampled: bool = False) -> bool:
        """Whether its tensor `name` has the dtype, shape and bytes of a tensor of `other`.

        Args:
            name: a key of `tensors`.
            other: a checkpoint; may be this one.
            other_name: a key of `other.tensors`.
            sampled: of a large tensor, compare only 16 samples of 4 KiB.
        """
        info, theirs = self.tensors[name], other.tensors[other_name]
        if (info.dtype, info.shape) != (theirs.dtype, theirs.shape):
            return False
        step = size = _COMPARED_BYTES
        if sampled and info.nbytes > _SAMPLES * _SAMPLE_BYTES:
            step, size = info.nbytes // _SAMPLES, _SAMPLE_BYTES
        for start in range(0, info.nbytes, step):
            held = [bytearray(min(size, info.nbytes - start)) for _ in range(2)]
            self.read_into(name, start, held[0])
            other.read_into(other_name, start, held[1])
            if held[0] != held[1]:
                return False
        return True

    def fingerprint(self) -> dict[str, dict[str, int | str]]:
        """Identify the files without reading their data: by file name size, mtime_ns and header digest.

        A remote file also has an etag, which identifies all of its bytes.
        """
        etags = {name: {"etag": file.etag} for name, file in self._far.items()}
        return {
            f.name: {
                "size": f.size,
                "mtime_ns": f.mtime_ns,
                "header": f.digest,
                **etags.get(f.name, {}),
            }
            for f in self.files
        }

    @property
    def far(self) -> dict[str, int]:
        """The size of every remote file."""
        return {name: file.size for name, file in self._far.items()}

    def check_unchanged(self) -> None:
        """Compare each file's size, times and inode with those at opening.

        Modification times can be set back (`touch -r`, `rsync -t`), but not the other time.

        Raises:
            CheckpointError: INPUT_CHANGED, naming every file that differs or is missing.
        """
        problems = Problems()
        for file in self.files:
            if file.name in self._far:
                if what := self._far[file.name].changed():
                    fix = "run again, so that all of it has one version"
                    problems.add("INPUT_CHANGED", self.folder / file.name, what, fix)
                continue
            try:
                now = os.stat(self.folder / file.name)
            except OSError as error:
                problems.add("INPUT_CHANGED", self.folder / file.name, f"is missing: {error.strerror}")
                continue
            seen = file.size, file.mtime_ns, file.ctime_ns, file.inode
            if (now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino) != seen:
                what = f"was {file.size:,} bytes when opened and is {now.st_size:,} now, or was written to since"
                problems.add(
                    "INPUT_CHANGED", self.folder / file.name, what, "run again when no other process writes to it"
                )
        problems.raise_as(CheckpointError)

    def _read(self, file: str, offset: int, view: memoryview) -> None:
        try:
            far = self._far.get(file)
            done = far.read(view, offset) if far is not None else fill(self._fds[file], view, offset)
        except OSError as error:
            what = f"cannot be read at byte {offset:,}: {error.strerror}"
            raise CheckpointError.of("SHARD_UNREADABLE", self.folder / file, what) from error
        if done < len(view):
            what = f"ends at byte {offset + done:,}, and was longer when it was opened"
            raise CheckpointError.of(
                "INPUT_CHANGED", self.folder / file, what, "run again when no other process writes to it"
            )

    def _pack(self, name: str) -> memoryview:
        """The bytes in C order of a tensor that a .bin stores transposed or sliced; the last one is cached."""
        with self._packing:
            if name not in self._packed:
                stored = self._strided[name]
                raw = np.empty(stored.extent, np.uint8)
                self._read(self.tensors[name].file, stored.offset, as_bytes(raw))
                width = stored.dtype.bits // 8
                strides = [step * width for step in stored.stride]
                view = np.lib.stride_tricks.as_strided(raw.view(f"u{width}"), stored.shape, strides)
                self._packed = {name: as_bytes(np.ascontiguousarray(view).reshape(-1))}
            return self._packed[name]


@dataclass(frozen=True)
class _Opened:
    """An opened file; `strided` are the tensors of a .bin that are not contiguous in it."""

    fd: int | None
    file: CheckpointFile
    tensors: Mapping[str, TensorInfo]
    strided: tuple[Stored, ...]
    far: FarFile | None = None

    @classmethod
    def of(cls, path: Path, pickled: bool, far: FarFile | None = None) -> _Opened:
        if far is not None:
            header = parse(far.read, far.size, path)
            file = CheckpointFile(path.name, far.size, 0, header.metadata, header.digest)
            return cls(None, file, header.tensors, (), far)
        fd = open_regular(path)
        try:
            with reading(path):
                seen = os.fstat(fd)
                header, strided = _scan_bin(fd, path) if pickled else (scan(fd, path), ())
        except BaseException:
            os.close(fd)
            raise
        file = CheckpointFile(
            path.name, seen.st_size, seen.st_mtime_ns, header.metadata, header.digest, seen.st_ctime_ns, seen.st_ino
        )
        return cls(fd, file, header.tensors, strided)


def _open_module(folder: Path, name: str, unpickle: bool, far: Mapping[str, FarFile]) -> _Opened:
    """Open the file `name`, with `/`, of a module; its folder is put before the names of its tensors."""
    path, pickled = folder / name, not name.endswith(".safetensors")
    if pickled and not unpickle:
        fix = f"convert it to safetensors, or read it through mergekit's restricted unpickler with {LAZY}"
        raise CheckpointError.of("PICKLE_REFUSED", path, "is a pickle, which can run code when it is loaded", fix)
    one, prefix = _Opened.of(path, pickled, None if path.exists() else far.get(name)), f"{name.rpartition('/')[0]}/"
    tensors = {prefix + key: replace(info, name=prefix + key, file=name) for key, info in one.tensors.items()}
    strided = tuple(replace(stored, name=prefix + stored.name) for stored in one.strided)
    return replace(one, file=replace(one.file, name=name), tensors=tensors, strided=strided)


def _scan_bin(fd: int, path: Path) -> tuple[Header, tuple[Stored, ...]]:
    from paft_merge.inputs.torch_pickle import read_bin

    with os.fdopen(os.dup(fd), "rb") as archive:
        stored, pickled = read_bin(path, archive)
    tensors = {}
    for one in sorted(stored, key=lambda one: one.offset):
        nbytes = prod(one.shape) * one.dtype.bits // 8
        tensors[one.name] = TensorInfo(one.name, one.dtype.name, one.shape, path.name, one.offset, nbytes)
    digest = xxhash.xxh3_128_hexdigest(pickled)
    return Header(tensors, {}, digest), tuple(one for one in stored if not one.contiguous)


def _compare(weight_map: Mapping[str, str], opened: Iterable[_Opened], folder: Path) -> list[Problem]:
    """Compare index and files; files that could not be read have been reported already."""
    held = {one.file.name: one.tensors for one in opened}
    faults = list[Problem]()
    for name, file in weight_map.items():
        if file in held and name not in held[file]:
            where = next((f"{other} has it" for other in held if name in held[other]), "no file has it")
            what = f"tensor {quote(name)} is missing, though the index lists it; {where}"
            faults.append(Problem("INDEX_MISMATCH", str(folder / file), what))
    for file, tensors in held.items():
        for name in tensors:
            if name not in weight_map:
                what = f"tensor {quote(name)} is not in the index"
                faults.append(Problem("INDEX_MISMATCH", str(folder / file), what))
            elif weight_map[name] != file and name in held.get(weight_map[name], {}):
                what = f"tensor {quote(name)} is in {weight_map[name]} too"
                faults.append(Problem("INDEX_MISMATCH", str(folder / file), what))
    return truncate(faults, folder)
