"""Locates the tensors of a file that `torch.save` wrote; no code of the file runs, and no tensor is loaded.

A pickle is a program. The interpreter here knows the few operations that a state dict takes, and gives every name in the
pickle a meaning of its own: a tensor becomes a record of its storage, offset, shape and stride. It reads the tensors
that `torch.load(weights_only=True)` reads, in the zip format of PyTorch 1.6 and in the older one.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from paft_merge.errors import CheckpointError
from paft_merge.inputs.dtypes import DTYPES, Dtype

MAX_PICKLE_BYTES = 100_000_000
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""The first two pickles of the older format; then come the machine, the state dict, and the keys of the storages."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a .bin: `offset` is absolute in the file, `extent` is the bytes that it spans."""

    name: str
    dtype: Dtype
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


def read_bin(path: Path, file: io.BufferedReader) -> tuple[list[Stored], bytes]:
    """Find the tensors of a file that `torch.save` wrote.

    Returns:
        The tensors in the order of the state dict (that of the model, in what a trainer saved), and the bytes of the
        pickle, for a digest.

    Raises:
        CheckpointError: PICKLE_REFUSED if the pickle needs anything but tensors, or a tensor has no plain values;
            PICKLE_UNREADABLE if it is damaged or is not a state dict.
    """
    try:
        head = file.read(4)
        file.seek(0)
        entries, storages, pickled = _read_zip(path, file) if head[:2] == b"PK" else _read_legacy(path, file)
        entries = _of_model(entries)
        if not all(isinstance(name, str) for name in entries):
            raise ValueError("not a map of names to tensors")
        return [_stored(path, name, entry, storages) for name, entry in entries.items()], pickled
    except StopIteration:
        raise _unreadable(path, "no data.pkl inside") from None
    except (zipfile.BadZipFile, LookupError, ValueError, TypeError, AttributeError, OSError, struct.error) as error:
        raise _unreadable(path, str(error) or type(error).__name__) from error


_OF_MODEL = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which trainers (Lightning, fairseq, DeepSpeed) save a model's state dict beside their own values."""


def _of_model(entries: dict[str, Any]) -> dict[str, Any]:
    """The state dict of the model in what a trainer saved; `entries` if it is one already, or has several."""
    found = [entries[key] for key in _OF_MODEL if isinstance(entries.get(key), dict)]
    alone = len(found) == 1 and not any(isinstance(value, _View) for value in entries.values())
    return found[0] if alone else entries


def _unreadable(path: Path, why: str) -> CheckpointError:
    fix = "load it with a current PyTorch where you trust it, and save it as safetensors"
    return CheckpointError.of("PICKLE_UNREADABLE", path, f"is not a state dict that torch.save wrote: {why}", fix)


# --- the two formats ------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where the bytes of a storage are in the file."""

    start: int
    nbytes: int


_Storages = Mapping[str, _Place]


def _read_zip(path: Path, file: io.BufferedReader) -> tuple[dict[str, Any], _Storages, bytes]:
    """The entries of the state dict, the places of the storages by key, and the pickle."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        root = next(name.removesuffix("data.pkl") for name in members if _is_state(name))
        pickled = _member_bytes(archive, members[f"{root}data.pkl"])
        if members.get(f"{root}byteorder") and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
    return _state_dict(_unpickle(io.BytesIO(pickled), path)), _ZipStorages(members, f"{root}data/", file), pickled


def _is_state(member: str) -> bool:
    return member.endswith("/data.pkl") and member.count("/") == 1


def _member_bytes(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"{member.filename} is compressed, or longer than {MAX_PICKLE_BYTES:,} bytes")
    return archive.read(member)


class _ZipStorages(dict[str, _Place]):
    """The storages of an archive, each located on first use."""

    def __init__(self, members: Mapping[str, zipfile.ZipInfo], folder: str, file: io.BufferedReader) -> None:
        super().__init__()
        self.members, self.folder, self.file = members, folder, file

    def __missing__(self, key: str) -> _Place:
        member = self.members[f"{self.folder}{key}"]
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"storage {key!r} is compressed")
        self[key] = place = _Place(_data_start(self.file, member), member.file_size)
        return place


def _data_start(file: io.BufferedReader, member: zipfile.ZipInfo) -> int:
    """Offset of a member's bytes: after its local header, whose name and extra field vary in length."""
    file.seek(member.header_offset)
    local = file.read(30)
    return member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")


def _read_legacy(path: Path, file: io.BufferedReader) -> tuple[dict[str, Any], _Storages, bytes]:
    """As `_read_zip`, of the format before PyTorch 1.6: five pickles, then each storage after its number of elements."""
    limited = _Limited(file, MAX_PICKLE_BYTES)
    if file.peek(2)[:2] != b"\x80\x02" or _unpickle(limited, path) != _MAGIC or _unpickle(limited, path) != _PROTOCOL:
        raise ValueError("it is neither a zip archive nor the older format")
    if not _unpickle(limited, path).get("little_endian"):
        raise ValueError("it was written on a big-endian machine")
    dtypes: dict[str, Dtype] = {}
    entries, keys = _state_dict(_unpickle(limited, path, dtypes)), _unpickle(limited, path)
    end = at = file.tell()
    places = {}
    for key in keys:
        file.seek(at)
        nbytes = struct.unpack("<q", file.read(8))[0] * dtypes[key].bits // 8
        if nbytes < 0:
            raise ValueError("a storage has a negative size")
        places[key] = _Place(at + 8, nbytes)
        at += 8 + nbytes
    if at > file.seek(0, io.SEEK_END):
        raise ValueError("it ends before its last storage")
    file.seek(0)
    return entries, places, file.read(end)


class _Limited:
    """The pickles at the start of a file, which take at most `left` bytes."""

    def __init__(self, file: io.BufferedReader, left: int) -> None:
        self.file, self.left = file, left

    def read(self, count: int) -> bytes:
        """Read `count` bytes, or fewer at the end."""
        return self._counted(self.file.read(max(0, min(count, self.left + 1))))

    def readline(self) -> bytes:
        """Read up to the end of the line."""
        return self._counted(self.file.readline(self.left + 1))

    def _counted(self, piece: bytes) -> bytes:
        self.left -= len(piece)
        if self.left < 0:
            raise ValueError(f"its pickles are longer than {MAX_PICKLE_BYTES:,} bytes")
        return piece


# --- the interpreter ------------------------------------------------------------------------------------------------------


def _unpickle(file: Any, path: Path, dtypes: dict[str, Dtype] | None = None) -> Any:
    """The value of one pickle; `dtypes` receives the storage types by key."""
    try:
        return _Interpreter(file, {} if dtypes is None else dtypes).load()
    except Exception as error:  # a malicious pickle can make the interpreter raise any error
        what = f"its pickle needs more than tensors, or is damaged: {error}"
        fix = "convert it to safetensors where you trust it"
        raise CheckpointError.of("PICKLE_REFUSED", path, what, fix) from error


def _state_dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not a map of names to tensors")
    return value


class _Named(NamedTuple):
    """A name of the pickle that is not called: a storage class, a dtype, a class of tensors."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: Dtype | None
    """None: bytes, whose type the tensor says."""


class _View(NamedTuple):
    """A tensor: a view of a storage; `offset` and `stride` count elements."""

    storage: _Storage
    dtype: Dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Unusable(NamedTuple):
    """A tensor whose values are not plain numbers in a storage."""

    kind: str


_BY_TORCH: dict[str, Dtype] = {row.torch: row for row in DTYPES.values() if row.torch}
_STORAGES = {
    f"{name}Storage": _BY_TORCH[dtype]
    for name, dtype in (
        *(("Double", "float64"), ("Float", "float32"), ("Half", "float16"), ("BFloat16", "bfloat16")),
        *(("Long", "int64"), ("Int", "int32"), ("Short", "int16"), ("Char", "int8"), ("Byte", "uint8")),
        *(("Bool", "bool"), ("ComplexFloat", "complex64")),
    )
}


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> _View | _Unusable:
    """`_rebuild_tensor` and `_rebuild_tensor_v2`; `more`: requires_grad, hooks, metadata."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor has no storage")
    return _viewed(storage, storage.dtype, (offset, shape, stride), more[2:])


def _tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> _View | _Unusable:
    """`_rebuild_tensor_v3`; `more`: requires_grad, hooks, dtype, metadata."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor has no storage")
    name = more[2].name
    return _viewed(storage, _BY_TORCH.get(name), (offset, shape, stride), more[3:]) if name else _Unusable("untyped")


def _viewed(storage: _Storage, dtype: Dtype | None, place: tuple[Any, Any, Any], metadata: Any) -> _View | _Unusable:
    if dtype is None:
        return _Unusable("of a type that safetensors does not have")
    if any(metadata):  # torch negates or conjugates such a tensor when it is read
        return _Unusable("a lazily negated or conjugated view")
    return _View(storage, dtype, *place)


def _inner(data: Any, *more: Any) -> Any:
    """`_rebuild_parameter` and its kind: the tensor inside."""
    return data


def _with_attributes(rebuild: Any, kind: Any, args: Any, state: Any) -> Any:
    """`_rebuild_from_type_v2`: a tensor that Python attributes were set on, which are dropped."""
    if rebuild not in _TENSORS or kind not in _CLASSES:
        raise pickle.UnpicklingError("a tensor is rebuilt by something else")
    return rebuild(*args)


def _on_device(data: Any, dtype: Any, *more: Any) -> Any:
    """`_rebuild_device_tensor_from_cpu_tensor`, of an XLA device."""
    same = isinstance(data, _View) and dtype == _Named(str(data.dtype.torch))
    return data if same else _Unusable("converted when it is read")


def _unusable(kind: str) -> Callable[..., _Unusable]:
    return lambda *args: _Unusable(kind)


def _mapping(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        found[_checked(key)] = value
    return found


def _checked(key: Any) -> Any:
    """A key of a mapping; nested tuples, whose hashes can take for ever, are refused."""
    if type(key) not in (str, int, float, bool, type(None)):
        raise pickle.UnpicklingError(f"a key of a mapping is a {type(key).__name__}")
    return key


_CLASSES = (_Named("Tensor"), _Named("Parameter"), _Named("Buffer"))
_TENSORS = (_tensor, _tensor_v3, _inner)
_MEANINGS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _mapping,
    ("torch", "Size"): tuple,
    ("torch", "device"): _unusable("a device"),
    ("torch", "Tensor"): _CLASSES[0],
    ("torch._tensor", "_rebuild_from_type_v2"): _with_attributes,
    ("torch.serialization", "_get_layout"): _unusable("a layout"),
    **{("torch.nn.parameter", one.name): one for one in _CLASSES[1:]},
    **{("torch._utils", name): _tensor for name in ("_rebuild_tensor", "_rebuild_tensor_v2")},
    **{("torch._utils", name): _inner for name in ("_rebuild_parameter", "_rebuild_parameter_with_state")},
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _on_device,
    **{("torch._utils", f"_rebuild_{name}"): _unusable(kind) for name, kind in (
        ("sparse_tensor", "sparse"), ("sparse_csr_tensor", "sparse"), ("qtensor", "quantised"), ("nested_tensor", "nested"),
        ("meta_tensor_no_storage", "on the meta device, without values"), ("wrapper_subclass", "of a class of its own"),
    )},
    **{(module, name): _Named(name) for module in ("torch", "torch.cuda") for name in (*_STORAGES, "ComplexDoubleStorage")},
    **{("torch", f"Q{name}Storage"): _Named(f"Q{name}Storage") for name in ("UInt8", "Int8", "Int32", "UInt4x2", "UInt2x4")},
    **{("torch", f"per_{name}"): _Named(name) for name in ("tensor_affine", "channel_affine", "tensor_symmetric", "channel_symmetric")},
    **{(module, "UntypedStorage"): _Named("UntypedStorage") for module in ("torch", "torch.storage")},
    **{("torch", name): _Named(name) for name in (*_BY_TORCH, "complex128", "complex32", "qint8", "quint8", "qint32")},
}  # fmt: skip
"""What the names in a pickle mean here; any other name is refused. None of the values runs code of the file."""

_OPERATIONS = (
    *("PROTO", "STOP", "FRAME", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID", "NONE", "NEWTRUE"),
    *("NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("SHORT_BINSTRING", "BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND"),
    *("APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MEMOIZE"),
    *("SHORT_BINBYTES", "BINBYTES"),
)
"""The operations of a pickle that a state dict takes."""


class _Operations(dict[int, Any]):
    def __missing__(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError(f"operation {bytes([code])!r} is not one of a state dict")


_Unpickler: Any = pickle._Unpickler  # the one in Python, whose operations can be chosen


class _Interpreter(_Unpickler):  # type: ignore[misc]
    """Python's unpickler with few operations, and without any class or function of the pickle's choice."""

    dispatch = _Operations(
        {getattr(pickle, name)[0]: _Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPERATIONS}
    )

    def __init__(self, file: Any, dtypes: dict[str, Dtype]) -> None:
        super().__init__(file, encoding="utf-8")
        self.dtypes = dtypes

    def find_class(self, module: str, name: str) -> Any:
        """What a name means."""
        if (module, name) not in _MEANINGS:
            raise pickle.UnpicklingError(f"it names {module}.{name}"[:200])
        return _MEANINGS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: `("storage", class, key, device, number of elements)`, and None in the older format."""
        match pid:
            case ("storage", _Named(name), str(key), _, int()) | ("storage", _Named(name), str(key), _, int(), None):
                dtype = _STORAGES.get(name)
                self.dtypes[key] = dtype or DTYPES["U8"]
                return _Storage(key, dtype)
        raise pickle.UnpicklingError("a storage is named in an unknown way")

    def load_build(self) -> None:
        """Drop the attributes of a mapping (`_metadata` of a state dict)."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError("it sets attributes of something that is not a mapping")

    def load_setitem(self) -> None:
        """Set one item of a mapping."""
        value, key = self.stack.pop(), self.stack.pop()
        _state_dict(self.stack[-1])[_checked(key)] = value

    def load_setitems(self) -> None:
        """Set items of a mapping."""
        items = self.pop_mark()
        _state_dict(self.stack[-1]).update(_mapping(zip(items[::2], items[1::2], strict=True)))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _stored(path: Path, name: str, entry: Any, storages: _Storages) -> Stored:
    """Check one tensor against the storage that holds it."""
    if isinstance(entry, _Unusable):
        what = f"tensor {name!r} is {entry.kind}, which no merge reads"
        raise CheckpointError.of("PICKLE_REFUSED", path, what, "save it as a plain tensor")
    if not isinstance(entry, _View):
        raise ValueError(f"{name!r} is a {type(entry).__name__.lstrip('_')}, not a tensor")
    shape, stride, dtype = entry.shape, entry.stride, entry.dtype
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise ValueError(f"{name!r} has an impossible shape or stride")
    if not all(type(size) is int and size >= 0 for size in (*shape, *stride, entry.offset)):
        raise ValueError(f"{name!r} has an impossible shape or stride")
    width, place = dtype.bits // 8, storages[entry.storage.key]
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    extent = 0 if 0 in shape else (last + 1) * width
    if entry.offset * width + extent > place.nbytes:
        raise ValueError(f"{name!r} reaches beyond its storage")
    return Stored(name, dtype, shape, stride, place.start + entry.offset * width, extent)
