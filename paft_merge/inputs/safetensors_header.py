"""Parses and checks the header of a safetensors file: names, dtypes, shapes, offsets; and quotes names for messages."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import xxhash

from paft_merge.compute.scratch import uncollected
from paft_merge.errors import CheckpointError, Problem
from paft_merge.inputs.dtypes import DTYPES

if TYPE_CHECKING:
    import numpy.typing as npt

ByteBuffer: TypeAlias = "memoryview | bytearray | bytes | npt.NDArray[Any]"
"""A C-contiguous buffer; writable if bytes are read into it."""

ReadAt: TypeAlias = "Callable[[memoryview, int], int]"
"""Fills a view from an offset of a file, and returns the number of bytes, fewer only at the end of the file."""

MAX_JSON_BYTES = 100_000_000
"""Limit of the size of a header, index or config: that of safetensors for a header."""

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_MAX_INT = 2**63 - 1
_MAX_RANK = 64
_MAX_FAULTS = 20
_LENGTH_BYTES = 8
_PEEK_BYTES = 512


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Location of one tensor: `nbytes` bytes at `offset` of `file` (relative to the checkpoint's folder), in C order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)


def row_size_of(shape: tuple[int, ...]) -> int:
    """Elements per row of a tensor: the product of all dimensions but the first."""
    return max(1, prod(shape[1:]))


@dataclass(frozen=True, slots=True)
class Header:
    """Header of one file: tensors ordered by offset, the `__metadata__`, and xxh3_128 of length and JSON in hex."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    digest: str


def open_regular(path: Path) -> int:
    """Open a regular file, or a symlink to one, for reading.

    Raises:
        CheckpointError: SHARD_MISSING; SHARD_UNREADABLE, also for a FIFO or device, which is not opened.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError.of("SHARD_UNREADABLE", path, "is not a regular file")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        what = f"symlink to {os.readlink(path)}, which does not exist" if path.is_symlink() else "no such file"
        raise CheckpointError.of("SHARD_MISSING", path, what, "download it again") from None
    except OSError as error:
        fix = "raise the limit of open files (ulimit -n)" if error.errno == errno.EMFILE else ""
        raise CheckpointError.of("SHARD_UNREADABLE", path, f"cannot be opened: {error.strerror}", fix) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError of a read into a `CheckpointError` that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError.of("SHARD_UNREADABLE", path, f"cannot be read: {error.strerror}") from error


def fill(fd: int, view: memoryview, offset: int) -> int:
    """Read into `view` (bytes) from `offset` until it is full or the file ends; return the number of bytes."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def as_bytes(buffer: ByteBuffer) -> memoryview:
    """The bytes of a C-contiguous buffer of any element type, without a copy."""
    view = memoryview(buffer)  # type: ignore[arg-type]  # before Python 3.12, numpy's arrays are not typed as buffers
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def read_text(path: Path, code: str, limit: int = MAX_JSON_BYTES) -> str:
    """Read a small UTF-8 file (an index, a config), as `read_bytes` does.

    Raises:
        CheckpointError: with `code`; LFS_POINTER, SHARD_MISSING, SHARD_UNREADABLE.
    """
    try:
        return read_bytes(path, code, limit).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError.of(code, path, f"is not UTF-8 at byte {error.start}") from error


def read_bytes(path: Path, code: str, limit: int = MAX_JSON_BYTES) -> bytearray:
    """Read a small file, which must be a regular file of at most `limit` bytes, and neither a web page nor of another known format.

    Raises:
        CheckpointError: with `code`; LFS_POINTER, SHARD_MISSING, SHARD_UNREADABLE.
    """
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise CheckpointError.of(code, path, f"is {size:,} bytes long; at most {limit:,} are read")
        with reading(path):
            raw = _read(_reader(fd), size)
    finally:
        os.close(fd)
    if other := _other_kind(raw[:_PEEK_BYTES]):
        kind, what, fix = other
        raise CheckpointError.of("LFS_POINTER" if kind == "LFS_POINTER" else code, path, what, fix)
    return raw


def scan(fd: int, path: Path) -> Header:
    """Parse and check the header of the open file `fd`; see `parse`."""
    return parse(_reader(fd), os.fstat(fd).st_size, path)


@uncollected()
def parse(read: ReadAt, size: int, path: Path) -> Header:
    """Parse and check the header of a file of `size` bytes; `TensorInfo.file` is the name of `path`.

    Raises:
        CheckpointError: with every fault of the header.
    """
    raw = _header_bytes(read, size, path)
    document, twice = _header_json(raw, path)
    faults = [Problem("SHARD_HEADER", str(path), f"name {quote(name)} occurs more than once") for name in twice]
    metadata = _metadata(document.pop("__metadata__", None), path, faults)
    spans = []
    for name, entry in document.items():
        if fault := _entry_fault(name, entry):
            faults.append(Problem(fault[0], str(path), f"tensor {quote(name)}: {fault[1]}"))
        else:
            spans.append(_Span(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]))
    spans.sort(key=lambda span: (span.begin, span.end))
    if not faults:
        _check_layout(spans, size - len(raw), path, faults)
    if faults:
        raise CheckpointError(truncate(faults, path))
    tensors = {s.name: TensorInfo(s.name, s.dtype, s.shape, path.name, len(raw) + s.begin, s.size) for s in spans}
    return Header(tensors, metadata, xxhash.xxh3_128_hexdigest(raw))


def truncate(faults: Sequence[Problem], where: object) -> list[Problem]:
    """The first twenty faults and a count of the rest, so that a malicious file cannot flood the terminal."""
    rest = len(faults) - _MAX_FAULTS
    if rest <= 0:
        return list(faults)
    return [*faults[:_MAX_FAULTS], Problem(faults[0].code, str(where), f"and {rest:,} more faults")]


def without_wrappers(name: str) -> str:
    """A tensor name without the segments that `torch.compile`, FSDP, activation checkpointing and Fabric put into it."""
    return _WRAPPERS.sub("", name)


def quote(name: str) -> str:
    """A name for messages: quoted, escaped, and truncated to 200 characters."""
    return repr(name) if len(name) <= 200 else f"{name[:200]!r}... ({len(name):,} characters)"


def join_first(names: Sequence[str], most: int = 5) -> str:
    """The first `most` names for messages, and a count of the rest."""
    return ", ".join(map(quote, names[:most])) + (f" and {len(names) - most:,} more" if len(names) > most else "")


class _NotWhole(str):
    """A JSON number that is not an unsigned integer of ordinary length, as written."""


def strict_json(text: str) -> tuple[Any, list[str]]:
    """Parse JSON; also return the keys that occur more than once in one object.

    Numbers that are not unsigned integers (negative, fractions, NaN) are returned as instances of a subclass of `str`,
    so that they fail the check `type(x) is int`.

    Raises:
        ValueError: `text` is not JSON, or is nested too deep for a header.
    """
    twice: list[str] = []

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return found

    if text.count("[") + text.count("{") > 100 + len(text) // 10:  # a bracket takes twenty times its size in memory
        raise ValueError("it has more brackets than tensors need")
    try:
        document = json.loads(
            text, object_pairs_hook=as_dict, parse_int=_whole, parse_float=_NotWhole, parse_constant=_NotWhole
        )
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None
    except json.JSONDecodeError as error:
        at = len(text[: error.pos].encode("utf-8", "surrogatepass"))
        raise ValueError(f"not JSON at byte {at}: {error.msg}") from None
    return document, twice


def _whole(digits: str) -> int | _NotWhole:
    return int(digits) if len(digits) <= 19 and digits[0] != "-" else _NotWhole(digits)


def _reader(fd: int) -> ReadAt:
    return lambda view, offset: fill(fd, view, offset)


def _read(read: ReadAt, count: int) -> bytearray:
    raw = bytearray(count)
    with memoryview(raw) as view:
        done = read(view, 0)
    del raw[done:]
    return raw


def _header_bytes(read: ReadAt, size: int, path: Path) -> bytearray:
    """The length and the JSON as stored in the file, after a check of the length."""
    if size < _LENGTH_BYTES:
        raise CheckpointError.of("SHARD_TRUNCATED", path, f"is {size} bytes long", "download it again")
    peek = _read(read, min(size, _PEEK_BYTES))
    length = int.from_bytes(peek[:_LENGTH_BYTES], "little")
    if length <= min(MAX_JSON_BYTES, size - _LENGTH_BYTES) and peek[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{":
        return _read(read, _LENGTH_BYTES + length)
    if other := _other_kind(peek):
        kind, what, fix = other
        raise CheckpointError.of(kind, path, what, fix)
    if length > MAX_JSON_BYTES:
        what = f"states a header of {length:,} bytes; at most {MAX_JSON_BYTES:,} are allowed"
    elif length > size - _LENGTH_BYTES:
        what = f"states a header of {length:,} bytes in a file of {size:,}"
    else:
        what = f"its header of {length:,} bytes does not begin with '{{' (at byte {_LENGTH_BYTES})"
    raise CheckpointError.of("SHARD_HEADER", path, what, "download it again, or check that it is a safetensors file")


_MAGIC = (
    (b"\x1f\x8b", "gzip data"),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch pickle"),
    *((bytes((0x80, protocol)), "a Python pickle") for protocol in (2, 3, 4, 5)),
    (b"GGUF", "a GGUF model"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x28\xb5\x2f\xfd", "Zstandard data"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ", "xz data"),
)
_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")


def _other_kind(peek: bytearray) -> tuple[str, str, str] | None:
    """The kind of a file that is not safetensors, from its first bytes, as code, what and fix; None if unknown."""
    if peek.startswith((b"version https://git-lfs", b"version https://hawser")):
        return "LFS_POINTER", "is a Git LFS pointer, not the file itself", "run `git lfs pull`, or download it again"
    again = "download the file again"
    if peek.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGE):
        return "NOT_SAFETENSORS", "is a web page, not the file itself", again
    if kind := next((kind for magic, kind in _MAGIC if peek.startswith(magic)), None):
        return "NOT_SAFETENSORS", f"is {kind}, despite its name", again
    return None


def _header_json(raw: bytearray, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The header as a dict (it begins with a brace) and its duplicate keys."""
    try:
        document, twice = strict_json(raw[_LENGTH_BYTES:].decode())
    except UnicodeDecodeError as error:
        what = f"its header is not UTF-8 at byte {_LENGTH_BYTES + error.start}"
        raise CheckpointError.of("SHARD_HEADER", path, what) from error
    except ValueError as error:
        raise CheckpointError.of("SHARD_HEADER", path, f"its header is wrong: {error}") from None
    assert isinstance(document, dict)
    return document, twice


def _metadata(value: Any, path: Path, faults: list[Problem]) -> dict[str, str]:
    texts = {} if value is None else value
    if isinstance(texts, dict) and all(map(_is_text, texts)) and all(map(_is_text, texts.values())):
        return texts
    faults.append(Problem("SHARD_HEADER", str(path), "its __metadata__ is not a map of strings"))
    return {}


def _is_text(value: Any) -> bool:
    """Whether a value is a string without unpaired surrogates (which JSON can express and UTF-8 cannot)."""
    return type(value) is str and (value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value))


class _Span(NamedTuple):
    """One entry of a header: bytes [begin, end) of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


def _entry_fault(name: str, entry: Any) -> tuple[str, str] | None:
    """The fault of one entry, as code and text; None if it has none."""
    if not _is_text(name):
        return "SHARD_HEADER", "its name is not Unicode text"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "SHARD_HEADER", "its entry is not {dtype, shape, data_offsets}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or not isinstance(shape, list) or not isinstance(offsets, list):
        return "SHARD_HEADER", "its entry is not {dtype: string, shape: list, data_offsets: list}"
    if dtype not in DTYPES:
        return "DTYPE_UNSUPPORTED", f"dtype {quote(dtype)} is not one of {', '.join(DTYPES)}"
    if len(shape) > _MAX_RANK or not all(type(size) is int for size in shape):
        return "SHARD_LAYOUT", f"shape {_listed(shape)} is impossible"
    if prod(size or 1 for size in shape) * DTYPES[dtype].bits > _MAX_INT:
        return "SHARD_LAYOUT", f"shape {_listed(shape)} is too large for any file"
    if len(offsets) != 2 or not all(type(at) is int for at in offsets) or offsets[0] > offsets[1]:
        return "SHARD_LAYOUT", f"data_offsets {_listed(offsets)} are impossible"
    bits, size = prod(shape) * DTYPES[dtype].bits, offsets[1] - offsets[0]
    if bits != size * 8:
        need = f"{bits:,} bits" if bits % 8 else f"{bits // 8:,} bytes"
        return "SHARD_LAYOUT", f"{dtype} {_listed(shape)} takes {need}, its data_offsets span {size:,} bytes"
    return None


def _listed(values: Sequence[Any]) -> str:
    return "[" + ", ".join(str(value)[:24] for value in values[:8]) + (", ...]" if len(values) > 8 else "]")


def _check_layout(spans: Sequence[_Span], data_bytes: int, path: Path, faults: list[Problem]) -> None:
    """Check that the spans, which are sorted, cover the data without overlaps or gaps."""

    def add(what: str, code: str = "SHARD_LAYOUT", fix: str = "") -> None:
        faults.append(Problem(code, str(path), what, fix))

    reached, owner = 0, ""
    for span in spans:
        if span.begin < reached:
            add(f"tensors {quote(owner)} and {quote(span.name)} share bytes from {span.begin:,} on")
        elif span.begin > reached:
            after = f"tensor {quote(owner)}" if owner else "the header"
            add(f"{span.begin - reached:,} bytes between {after} and tensor {quote(span.name)} are unused")
        if span.end >= reached:
            reached, owner = span.end, span.name
    if reached > data_bytes:
        cut = next(span.name for span in spans if span.end > data_bytes)
        what = f"holds {data_bytes:,} of {reached:,} bytes of data; tensor {quote(cut)} is the first that is cut"
        add(what, "SHARD_TRUNCATED", "download it again")
    elif reached < data_bytes:
        add(f"{data_bytes - reached:,} bytes follow the last tensor")
