"""A folder of tensors: their names, dtypes and shapes from headers alone, their bytes on demand."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from paft_merge.errors import CheckpointError, Problem, Problems
from paft_merge.inputs.dtypes import DTYPES, Dtype
from paft_merge.inputs.safetensors_header import (
    ByteBuffer,
    Header,
    TensorInfo,
    as_bytes,
    fill,
    join_first,
    open_regular,
    parse,
    quote,
    read_text,
    reading,
    scan,
    strict_json,
    truncate,
)

if TYPE_CHECKING:
    import torch

    from paft_merge.inputs.torch_pickle import Stored

__all__ = ["DTYPES", "UNFINISHED", "Checkpoint", "CheckpointFile", "Dtype", "TensorInfo"]

UNFINISHED = "merge_state.json"
"""The journal of a merge under way. A folder that holds one, or is called `*.part`, is not opened: the files inside
have their full size from the start and would look complete."""

_STEMS = ("model", "diffusion_pytorch_model")
_INDEX = ".index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LAZY = "lazy_unpickle=True"
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class CheckpointFile:
    """One file that holds tensors, as it was when it was opened; `digest` is xxh3_128 of its header, in hex."""

    name: str
    size: int
    mtime_ns: int
    metadata: Mapping[str, str]
    digest: str


class FarFile(Protocol):
    """A file that lies elsewhere, and is read as if it were here."""

    size: int
    etag: str
    """Tells its content from any other."""

    def read(self, view: memoryview, offset: int) -> int:
        """Fill `view` from byte `offset` on; fewer bytes only where the file ends."""

    def changed(self) -> str:
        """What differs from when it was opened, in words; empty when nothing does."""


class Checkpoint:
    """The tensors of a folder (or of one file), for reading from any number of threads; a context manager.

    Reads are `preadv` on one descriptor per file: a file that shrinks under us is an error, not a SIGBUS. Files that are
    not in the folder may lie elsewhere (`far`).

    Attributes:
        folder: where the files lie.
        tensors: by name, in the order of the sorted files and then of offsets.
        files: the files that hold tensors, sorted by name.
        config: `config.json` parsed; empty when there is none.
        file: the one file that was asked for, when it was no folder.
        tokenizer_files: of its tokenizer, by name, where they are not the folder's (a merge that is never written).
    """

    tokenizer_files: Mapping[str, bytes | Path] | None = None

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
        self._strided = strided
        self._packed: dict[str, memoryview] = {}
        self._packing = Lock()
        self._sampled: str | None = None

    @classmethod
    def open(cls, folder: Path, *, unpickle: bool = False, far: Mapping[str, FarFile] | None = None) -> Checkpoint:
        """Open a folder of `model.safetensors`, of shards with their index, or one `.safetensors` file by its path.

        Names as diffusers writes them, and a single file of any other name, are found too.

        Args:
            folder: the checkpoint, on this machine.
            unpickle: read `pytorch_model*.bin` when there is nothing else, through mergekit's restricted unpickler.
            far: files of the folder that lie elsewhere, by their names; one that is in the folder is read from there.

        Raises:
            CheckpointError: with all the faults that headers, index and config show.
        """
        asked = folder = Path(folder)
        problems, opened = Problems(), list[_Opened]()
        try:
            with problems.catching():
                folder, names, weight_map, pickled = _locate(folder, unpickle, tuple(far or ()))
                for name in names:
                    with problems.catching():
                        elsewhere = (far or {}).get(name) if not (folder / name).exists() else None
                        opened.append(_Opened.of(folder / name, pickled, elsewhere))
                if weight_map is not None:
                    problems.found.extend(_compare(weight_map, opened, folder))
            config: dict[str, Any] = {}
            with problems.catching():
                config = _read_config(folder)
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
            buffer: writable and C-contiguous (a numpy array, a memoryview); `start` plus its bytes must lie within
                the tensor.

        Raises:
            CheckpointError: INPUT_CHANGED when the file has become shorter, SHARD_UNREADABLE when the disk fails.
        """
        view = as_bytes(buffer)
        info = self._holding(name, start, len(view))
        if name in self._strided:
            view[:] = self._pack(name)[start : start + len(view)]
        else:
            self._read(info.file, info.offset + start, view)

    def lies_at(self, name: str, start: int, nbytes: int) -> tuple[int, int] | None:
        """Where bytes of tensor `name` lie: a descriptor and the offset of byte `start`; None where no file holds them as they are."""
        info = self._holding(name, start, nbytes)
        fd = None if name in self._strided else self._fds.get(info.file)
        return None if fd is None else (fd, info.offset + start)

    def _holding(self, name: str, start: int, nbytes: int) -> TensorInfo:
        info = self.tensors[name]
        if not 0 <= start <= info.nbytes - nbytes:
            raise ValueError(f"bytes {start} to {start + nbytes} of {name!r}, which has {info.nbytes}")
        return info

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor whole, into fresh memory, in its storage dtype.

        Raises:
            CheckpointError: DTYPE_UNSUPPORTED when torch has no such dtype (F4, F6), and as `read_into`.
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

    # --- what a checkpoint that is computed does otherwise (see `graph.Intermediate`) --------------------------------------

    computed = False
    """Whether its tensors are merged while they are read."""

    @property
    def place(self) -> Hashable:
        """What tells its tensors from those of other checkpoints."""
        return self.folder, self.file

    @property
    def folders(self) -> list[Path]:
        """Every folder, or lone file, that is read."""
        return [self.folder / self.file if self.file else self.folder]

    def written_dtype(self, name: str) -> str:
        """The type of tensor `name` as the checkpoint means it; what is read may be wider."""
        return self.tensors[name].dtype

    def bytes_behind(self, name: str) -> int:
        """Stored bytes that a pass over tensor `name` reads."""
        return self.tensors[name].nbytes

    def working_bytes(self, name: str) -> int:
        """Memory that reading a block of tensor `name` takes beside the block."""
        return 0

    def release(self, name: str) -> None:
        """Let go of what is held for tensor `name`."""

    def sample(self) -> str:
        """XXH3-128 of the first 4 KiB of every tensor: headers of fine-tunes are equal, their first weights hardly ever are.

        Read once: `check_unchanged` tells of files that are not what they were.
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

    def fingerprint(self) -> dict[str, dict[str, int | str]]:
        """What tells these files from others without reading their data: per file size, mtime_ns and header digest.

        A file that lies elsewhere has an etag, which stands for all of its bytes.
        """
        etags = {name: {"etag": file.etag} for name, file in self._far.items()}
        return {
            f.name: {"size": f.size, "mtime_ns": f.mtime_ns, "header": f.digest, **etags.get(f.name, {})}
            for f in self.files
        }

    @property
    def far(self) -> dict[str, int]:
        """The size of every file of it that lies elsewhere."""
        return {name: file.size for name, file in self._far.items()}

    def check_unchanged(self) -> None:
        """Compare each file's size and time of change with those at opening.

        Raises:
            CheckpointError: INPUT_CHANGED, naming every file that differs or is gone.
        """
        problems = Problems()
        for file in self.files:
            if file.name in self._far:
                if what := self._far[file.name].changed():
                    fix = "run again, so that all of it is of one version"
                    problems.add("INPUT_CHANGED", self.folder / file.name, what, fix)
                continue
            try:
                now = os.stat(self.folder / file.name)
            except OSError as error:
                problems.add("INPUT_CHANGED", self.folder / file.name, f"cannot be found any more: {error.strerror}")
                continue
            if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
                what = f"was {file.size:,} bytes when opened and is {now.st_size:,} now, or was written to since"
                problems.add("INPUT_CHANGED", self.folder / file.name, what, "run again when nothing writes to it")
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
            raise CheckpointError.of("INPUT_CHANGED", self.folder / file, what, "run again when nothing writes to it")

    def _pack(self, name: str) -> memoryview:
        """The bytes in C order of a tensor of a .bin that lies there transposed or sliced; the last one is kept."""
        import torch

        with self._packing:
            if name not in self._packed:
                stored = self._strided[name]
                raw = torch.empty(stored.extent, dtype=torch.uint8)
                self._read(self.tensors[name].file, stored.offset, as_bytes(raw.numpy()))
                packed = raw.view(stored.dtype).as_strided(stored.shape, stored.stride).contiguous()
                self._packed = {name: as_bytes(packed.view(-1).view(torch.uint8).numpy())}
            return self._packed[name]


@dataclass(frozen=True)
class _Opened:
    """A file with its descriptor, and what of a .bin needs packing before it can be read."""

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
        file = CheckpointFile(path.name, seen.st_size, seen.st_mtime_ns, header.metadata, header.digest)
        return cls(fd, file, header.tensors, strided)


def _scan_bin(fd: int, path: Path) -> tuple[Header, tuple[Stored, ...]]:
    from paft_merge.inputs.torch_pickle import read_bin

    with os.fdopen(os.dup(fd), "rb") as archive:
        stored, pickled = read_bin(path, archive)
    names = {f"torch.{dtype.torch}": dtype for dtype in DTYPES.values()}
    tensors = {}
    for one in sorted(stored, key=lambda one: one.offset):
        dtype = names[str(one.dtype)]
        nbytes = prod(one.shape) * dtype.bits // 8
        tensors[one.name] = TensorInfo(one.name, dtype.name, one.shape, path.name, one.offset, nbytes)
    digest = xxhash.xxh3_128_hexdigest(pickled)
    return Header(tensors, {}, digest), tuple(one for one in stored if not one.contiguous)


# --- which files a folder means ---------------------------------------------------------------------------------------


def _locate(path: Path, unpickle: bool, far: Sequence[str] = ()) -> tuple[Path, list[str], dict[str, str] | None, bool]:
    """The folder, its files sorted by name, the index's weight_map if there is an index, and if they are pickles."""
    if path.suffix == ".safetensors" and not path.is_dir():
        return path.parent, [path.name], None, False
    if path.suffix in _PICKLES and path.is_file():
        if not unpickle:
            fix = f"convert it to safetensors, or read it through mergekit's restricted unpickler with {_LAZY}"
            raise CheckpointError.of("PICKLE_REFUSED", path, "is a pickle, which can run code when it is loaded", fix)
        return path.parent, [path.name], None, True
    try:
        present = sorted({*os.listdir(path), *far})
    except OSError as error:
        raise CheckpointError.of("CHECKPOINT_MISSING", path, f"cannot be opened: {error.strerror}") from None
    if path.name.endswith(".part") or UNFINISHED in present:
        what = "is the output of a merge that did not finish"
        raise CheckpointError.of("CHECKPOINT_UNFINISHED", path, what, "finish it with resume=True")
    chosen = _choose(path, present, unpickle)
    pickled = chosen.startswith("pytorch_model.bin")
    if not chosen.endswith(_INDEX):
        return path, [chosen], None, pickled
    weight_map = _read_index(path / chosen)
    return path, sorted(set(weight_map.values())), weight_map, pickled


def _choose(folder: Path, present: Sequence[str], unpickle: bool) -> str:
    """The one file that says what the checkpoint is: a safetensors file, or an index; see `Checkpoint.open`."""
    for stem in _STEMS:
        both = [name for name in (f"{stem}.safetensors", f"{stem}.safetensors{_INDEX}") if name in present]
        if len(both) == 2 and set(_read_index(folder / both[1]).values()) != {both[0]}:
            what = f"holds both {both[0]} and an index of other files"
            raise CheckpointError.of("CHECKPOINT_AMBIGUOUS", folder, what, "remove the one that is not meant")
        if both:
            return both[-1]
    ours = [name for name in present if not name.startswith(("consolidated", "adapter_model", "."))]
    indices = [name for name in ours if name.endswith(f".safetensors{_INDEX}")]
    files = indices or [name for name in ours if name.endswith(".safetensors")]
    if len(files) == 1 and not _is_part_of_many(files[0]):
        return files[0]
    if files:
        what = f"holds {join_first(files)}, and nothing that says how they belong together"
        raise CheckpointError.of("INDEX_MISSING", folder, what, f"download model.safetensors{_INDEX} too")
    return _choose_pickle(folder, present, unpickle)


def _is_part_of_many(name: str) -> bool:
    part = re.search(r"-(\d+)-of-(\d+)\.safetensors$", name)
    return part is not None and int(part[2]) != 1


def _choose_pickle(folder: Path, present: Sequence[str], unpickle: bool) -> str:
    pickles = [name for name in present if name.endswith((*_PICKLES, f".bin{_INDEX}"))]
    known = [name for name in (f"pytorch_model.bin{_INDEX}", "pytorch_model.bin") if name in pickles]
    if known and unpickle:
        return known[0]
    if pickles:
        fix = f"convert it to safetensors, or read it through mergekit's restricted unpickler with {_LAZY}"
        what = f"holds only pickles ({join_first(pickles)}), which can run code when they are loaded"
        raise CheckpointError.of("PICKLE_REFUSED", folder, what, fix if known else "convert it to safetensors")
    if "adapter_model.safetensors" in present:
        what, fix = "holds an adapter and no checkpoint", "name it after its base: base+adapter"
    elif consolidated := [name for name in present if name.startswith("consolidated")]:
        what, fix = f"holds only {consolidated[0]}, not in Hugging Face's form", "convert it to model.safetensors"
    else:
        what, fix = "holds no safetensors file", "is it the folder that was meant?"
    raise CheckpointError.of("CHECKPOINT_MISSING", folder, what, fix)


# --- index and config -------------------------------------------------------------------------------------------------


def _read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name to the plain name of a file beside the index."""
    try:
        document, twice = strict_json(read_text(path, "INDEX_INVALID"))
    except ValueError as error:
        raise CheckpointError.of("INDEX_INVALID", path, str(error), "download it again") from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError.of("INDEX_INVALID", path, "has no weight_map of tensor names to files")
    faults = [Problem("INDEX_INVALID", str(path), f"key {quote(key)} stands more than once") for key in twice]
    for name, file in weight_map.items():
        if type(file) is not str:
            faults.append(Problem("INDEX_INVALID", str(path), f"the file of tensor {quote(name)} is not a text"))
    for file in sorted({file for file in weight_map.values() if type(file) is str and not _is_plain(file)}):
        faults.append(Problem("INDEX_PATH", str(path), f"names {quote(file)}, which is not a plain file name"))
    if faults:
        raise CheckpointError(truncate(faults, path))
    return weight_map


def _is_plain(name: str) -> bool:
    """Is this a file name that cannot leave its folder on any system?

    Only the name is judged. Where a symlink leads is no fault: the Hub's cache is made of them.
    """
    return (
        name.isprintable() and name.strip(" .") != "" and not re.search(r"[/\\:]", name) and len(name.encode()) <= 255
    )


def _compare(weight_map: Mapping[str, str], opened: Iterable[_Opened], folder: Path) -> list[Problem]:
    """Index and files must agree on every tensor; files that could not be read have been told already."""
    held = {one.file.name: one.tensors for one in opened}
    faults = list[Problem]()
    for name, file in weight_map.items():
        if file in held and name not in held[file]:
            where = next((f"{other} has it" for other in held if name in held[other]), "no file has it")
            what = f"tensor {quote(name)} is not there though the index says so; {where}"
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


def _read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as transformers reads it: data only, whatever code it names."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        return {}
    try:
        config = json.loads(read_text(path, "CONFIG_INVALID"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError.of("CONFIG_INVALID", path, f"is not JSON: {error}", "download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError.of("CONFIG_INVALID", path, "is not a JSON object")
    return config
