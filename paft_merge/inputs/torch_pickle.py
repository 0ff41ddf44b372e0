"""Locates the tensors of a PyTorch .bin file with mergekit's restricted unpickler, which runs no code of the file."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from paft_merge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_PICKLE_BYTES = 100_000_000

_patching = Lock()  # mergekit's loader patches modules of Python and torch while it reads a pickle


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a .bin: `dtype` is torch's, `offset` is absolute in the file, `extent` is the bytes that it spans."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    extent: int

    @property
    def contiguous(self) -> bool:
        """Whether its elements are stored in C order without gaps."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


def read_bin(path: Path, archive_bytes: io.BufferedReader) -> tuple[list[Stored], bytes]:
    """Find the tensors of a file that `torch.save` wrote (PyTorch 1.6 or newer).

    Returns:
        The tensors in the order of the state dict, and the bytes of its pickle, for a digest.

    Raises:
        CheckpointError: PICKLE_REFUSED if the pickle needs anything but tensors; PICKLE_UNREADABLE if it is damaged or
            is not a state dict.
    """
    try:
        with zipfile.ZipFile(archive_bytes) as archive:
            members = {member.filename: member for member in archive.infolist()}
            root = next(name.removesuffix("data.pkl") for name in members if _is_state(name))
            pickled = _member_bytes(archive, members[f"{root}data.pkl"])
            if members.get(f"{root}byteorder") and archive.read(f"{root}byteorder") != b"little":
                raise ValueError("it was written on a big-endian machine")
        entries = _unpickle(pickled, path)
        return [_stored(name, entry, members, root, archive_bytes) for name, entry in entries.items()], pickled
    except StopIteration:
        raise _unreadable(path, "no data.pkl inside") from None
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        raise _unreadable(path, str(error) or type(error).__name__) from error


def _unreadable(path: Path, why: str) -> CheckpointError:
    fix = "load it with a current PyTorch where you trust it, and save it as safetensors"
    return CheckpointError.of("PICKLE_UNREADABLE", path, f"is not a state dict that torch.save wrote: {why}", fix)


def _is_state(member: str) -> bool:
    return member.endswith("/data.pkl") and member.count("/") == 1


def _member_bytes(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"{member.filename} is compressed, or longer than {MAX_PICKLE_BYTES:,} bytes")
    return archive.read(member)


@contextmanager
def _restricted() -> Iterator[Any]:
    """mergekit's unpickler class, patched so that it returns `DeferredLoad`s instead of tensors."""
    import torch

    with _patching, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports and torch's typed storages are deprecated
        from mergekit.io.lazy_unpickle import LazyTorchUnpickler, torch_lazy_load

        with torch_lazy_load():
            torch._utils._rebuild_tensor = (
                _record_location  # mergekit's version fails on bool; the context restores torch's
            )
            yield LazyTorchUnpickler


def _record_location(storage: Any, offset: int, shape: Any, stride: Any) -> Any:
    """Record offset, shape and stride on the deferred storage; replaces torch's function that makes a tensor."""
    storage.file_offset, storage.shape, storage.stride = offset * storage.dtype.itemsize, shape, stride
    return storage


def _unpickle(pickled: bytes, path: Path) -> dict[str, Any]:
    try:
        with _restricted() as unpickler:
            state = unpickler(io.BytesIO(pickled)).load()
    except Exception as error:  # a malicious pickle can make the unpickler raise any error
        what = f"its pickle needs more than tensors, or is damaged: {error}"
        fix = "convert it to safetensors where you trust it"
        raise CheckpointError.of("PICKLE_REFUSED", path, what, fix) from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError("not a map of names to tensors")
    return state


def _stored(
    name: str, entry: Any, members: dict[str, zipfile.ZipInfo], root: str, archive_bytes: io.BufferedReader
) -> Stored:
    """Check one deferred tensor against the archive member that holds it."""
    import torch

    shape, stride = getattr(entry, "shape", None), getattr(entry, "stride", None)
    if not isinstance(shape, (tuple, torch.Size)) or not isinstance(stride, tuple):
        raise ValueError(f"{name!r} is a {type(entry).__name__}, not a tensor")
    sizes = [*shape, *stride, entry.file_offset]
    if len(shape) != len(stride) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{name!r} has an impossible shape or stride")
    member = members[f"{root}data/{entry.name}"]
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    extent = 0 if 0 in shape else (last + 1) * entry.dtype.itemsize
    if member.compress_type != zipfile.ZIP_STORED or entry.file_offset + extent > member.file_size:
        raise ValueError(f"{name!r} reaches beyond its storage, or is compressed")
    start = _data_start(archive_bytes, member) + entry.file_offset
    return Stored(name, entry.dtype, tuple(shape), tuple(stride), start, extent)


def _data_start(archive_bytes: io.BufferedReader, member: zipfile.ZipInfo) -> int:
    """Offset of a member's bytes: after its local header, whose name and extra field vary in length."""
    archive_bytes.seek(member.header_offset)
    local = archive_bytes.read(30)
    return member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
