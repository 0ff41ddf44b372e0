"""The place of an output: where a merge works, what it leaves there, and how the finished folder gets its name.

A merge into `out` works in `out.part`, which is then renamed to `out`. A mount point (the volume of a container) cannot be
replaced, and a folder whose parent cannot be written has no neighbour: there a merge works in `out/.paft.part`, and its
files are moved up. Nothing is deleted or replaced unless a file of a merge marks it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from paft_merge.errors import OutputError, Problem, Problems
from paft_merge.inputs.weight_files import INSIDE, PLACING, UNFINISHED
from paft_merge.output.shards import DISK_FULL, sync_folder

JOURNAL = UNFINISHED
LOCK = "lock"
"""Holds `paft_merge` and a process number; in a complete output its journal (it is sealed)."""

WORKERS = ".workers"
"""Folder of an unfinished output for what several workers share, see `shared`."""

_MARK, _SEAL = b"paft_merge ", b'{"identity": '
_REPLACED_MARK = ".paft_replaced"
"""Marks a replaced model, which the next merge may remove."""
_OLD = "replaced"
"""Folder of `out/.paft.part` for the files that a merge replaces."""
_NO_FILES = (INSIDE, "lost+found")
"""Entries of a mount point that belong to no model."""
_MODEL = (
    "merge_manifest.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*.gguf", "adapter_config.json",
    "model_index.json",
)  # fmt: skip
_LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of a file system without locks."""

_CONFIG_LAST = ("config.json", "model_index.json")


def part_of(out: Path) -> Path:
    """The folder of an unfinished merge into `out`."""
    inside = out / INSIDE
    if out.is_dir() and (inside.is_dir() or is_mount(out) or not _is_writable(out.parent)):
        return inside
    return out.with_name(f"{out.name}.part")


def is_mount(folder: Path) -> bool:
    """Whether a file system is mounted at `folder`; a bind mount of the same file system counts too (Linux)."""
    return os.path.ismount(folder) or os.fspath(folder) in _mounts()


def _mounts() -> list[str]:
    """The folders at which file systems are mounted; none where the system does not list them."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return []
    octal = re.compile(rb"\\([0-7]{3})")
    return [os.fsdecode(octal.sub(lambda found: bytes([int(found[1], 8)]), line.split(b" ")[4])) for line in lines]


def check_place(
    out: Path, inputs: Sequence[Path], needed: int, *, overwrite: bool, problems: Problems, force: bool | None = None
) -> None:
    """Check that a merge can be written to `out`.

    Args:
        out: the folder to write; must not exist, or be empty, unless `overwrite`.
        inputs: folders and files that are read; `out` may not be one of them, be inside one, or contain one.
        needed: bytes of the output.
        overwrite: whether an existing model in `out` may be replaced.
        problems: receives OUTPUT and DISK faults.
        force: whether an existing folder that is not a model may be replaced too; None: never, and no message offers it.
    """
    real = out.resolve()
    for folder in dict.fromkeys(path.resolve() for path in inputs):
        if real == folder or folder in real.parents or real in folder.parents:
            what = f"is, contains or is inside the input {folder}"
            problems.add("OUTPUT", out, what, "choose a folder outside the inputs")
    if real.suffix == ".part" or not real.name:
        problems.add("OUTPUT", out, "cannot be the name of a model", "choose a name that does not end in .part")
        return
    part = part_of(real)
    if real.exists() and not real.is_dir():
        problems.add("OUTPUT", out, "is a file", "choose another folder")
    elif entries := _content(part, real):
        if not overwrite:
            fix = "choose another folder, or pass overwrite=True to replace it"
            problems.add("OUTPUT", out, "exists and is not empty", fix)
        elif not force and not any(fnmatch(name, pattern) for name in entries for pattern in _MODEL):
            what = f"holds {', '.join(entries[:3])}{', ...' if len(entries) > 3 else ''}, and no weights of a model"
            more = "" if force is None else ", or pass force=True too to delete all of it"
            problems.add("OUTPUT", out, what, f"choose another folder{more}")
        elif mount := next((place for place in _mounts() if real in Path(place).parents), None):
            problems.add("OUTPUT", out, f"contains the mount point {mount}", "choose another folder, or unmount it")
        elif _is_foreign_replaced(part, real):
            what = "exists, and no merge left it; a replaced model would be moved there"
            problems.add("OUTPUT", _replaced(part), what, "move it away")
    if part.is_dir() and not is_left_by_merge(part):
        problems.found.append(_not_ours(part))
    above = real if part.parent == real else next(p for p in real.parents if p.exists())
    if not above.is_dir() or not _is_writable(above):
        what = "cannot be written to" if above.is_dir() else "is a file"
        problems.add("OUTPUT", above, what, "choose another folder, or change its permissions")
        return
    free = shutil.disk_usage(above).free + _allocated(part)
    if free < needed:
        fix = "free some space, or choose another folder"
        problems.add("DISK", out, f"{needed:,} bytes are needed and {free:,} are free", fix)


def _not_ours(part: Path) -> Problem:
    fix = "move it away, or choose another folder"
    return Problem("OUTPUT", str(part), "exists, and is not the unfinished output of a merge", fix)


def _content(part: Path, out: Path) -> list[str]:
    """The entries of `out` that are not from an unfinished merge, also those that it had moved away."""
    if not out.is_dir():
        return []
    passed = _NO_FILES if part.parent == out else ()
    moved = os.listdir(part / _OLD) if (part / _OLD).is_dir() else []
    return sorted({*os.listdir(out)} - {*passed, *_placed(part)} | {*moved})


def _allocated(folder: Path) -> int:
    """Bytes of disk that the files below a folder take; other workers may remove some of them."""
    blocks = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                blocks += os.lstat(Path(at, name)).st_blocks
    return blocks * 512


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


# --- the work folder --------------------------------------------------------------------------------------------------


def is_left_by_merge(part: Path) -> bool:
    """Whether a folder is empty, or its lock or journal shows that a merge made it."""
    try:
        entries = os.listdir(part)
        # The size comes first: another worker may write its mark at this moment.
        if not entries or (entries == [LOCK] and not (part / LOCK).is_symlink() and not (part / LOCK).stat().st_size):
            return True
        return _starts(part / LOCK, _MARK, _SEAL) or _starts(part / JOURNAL, _SEAL)
    except FileNotFoundError:  # a worker has just completed it
        return True


def is_sealed(folder: Path) -> bool:
    """Whether a folder is a complete output whose lock is still there."""
    return _starts(folder / LOCK, _SEAL)


def _starts(path: Path, *beginnings: bytes) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(64).startswith(beginnings)


@contextmanager
def held(part: Path, out: Path, *, shared: bool = False) -> Iterator[Path]:
    """Create the work folder and hold its lock; first undo or finish what a killed merge began.

    Args:
        part: the work folder.
        out: the folder that it becomes.
        shared: it is that of workers, one of whom completes it.

    Raises:
        OutputError: BUSY, another merge holds it; OUTPUT, a folder of that name is not from a merge.
    """
    _finish_exchange(part, out)
    with _locked(part, shared=shared) as lock:
        with writing(part):
            if (part / WORKERS).is_dir() and not shared:
                fix = f"start its workers again, or finish it with finalize=True; to start over, delete {part}"
                raise OutputError.of("BUSY", part, "is the unfinished merge of several workers", fix)
            lock.seek(0)
            sealed = lock.read()
            if sealed.startswith(_SEAL) and not (part / JOURNAL).exists():
                write_durably(part / f"{JOURNAL}.new", sealed)
                os.replace(part / f"{JOURNAL}.new", part / JOURNAL)
            _tidy_replaced(part, out)
            lock.seek(0)
            lock.truncate(lock.write(_MARK + f"{os.getpid()}\n".encode()))
            _move_back(part, out)
        yield part


def is_shared(out: Path) -> bool:
    """Whether workers have begun to write `out`, and have not completed it."""
    return (part_of(out.resolve()) / WORKERS).is_dir()


def shared(part: Path) -> Path:
    """Create the work folder of a merge by several workers, or join it; return the folder that they share in it.

    No process keeps a lock of it: workers have leases.

    Raises:
        OutputError: BUSY or OUTPUT, the folder belongs to a merge by one process, or to no merge.
    """
    if not (part / WORKERS).is_dir():
        with _locked(part, fcntl.LOCK_SH, shared=True) as lock, writing(part):
            if (part / JOURNAL).exists() or is_sealed(part):
                fix = f"continue it with resume=True and without workers; to start over, delete {part}"
                raise OutputError.of("OUTPUT", part, "is the unfinished merge of one process", fix)
            if not lock.read(1):
                lock.write(_MARK + b"\n")
            (part / WORKERS).mkdir(exist_ok=True)
    return part / WORKERS


@contextmanager
def _locked(part: Path, kind: int = fcntl.LOCK_EX, *, shared: bool) -> Iterator[Any]:
    """Create the work folder, and hold its lock."""
    with writing(part):
        if part.is_dir() and not is_left_by_merge(part):
            raise OutputError([_not_ours(part)])
        part.mkdir(parents=True, exist_ok=True)
        file = _open_lock(part)
    with file:
        with writing(part):
            _take(file, part, kind, shared=shared)
        yield file


def lock(file: Any, kind: int = fcntl.LOCK_EX, *, shared: bool) -> None:
    """Lock a file; raises BlockingIOError if another process has. `shared` needs no lock if the file system has none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if not shared or error.errno not in _LOCKLESS:
            raise


def _open_lock(folder: Path) -> Any:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(folder / LOCK, flags, 0o666), "r+b", buffering=0)


def _take(file: Any, folder: Path, kind: int = fcntl.LOCK_EX, *, shared: bool = False) -> None:
    """Take the lock, or raise BUSY. A lock file that was renamed in between belongs to a merge that just ended."""
    try:
        lock(file, kind, shared=shared)
    except BlockingIOError:
        taken = True
    else:
        path = folder / LOCK
        taken = not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    if taken:
        found = re.match(re.escape(_MARK) + rb"(\d+)", file.read(64))
        what = f"process {found[1].decode()} is writing here" if found else "another process is writing here"
        raise OutputError.of("BUSY", folder, what, "wait for it, or choose another folder")


# --- the finished folder ----------------------------------------------------------------------------------------------


def put_in_place(part: Path, out: Path, *, overwrite: bool) -> None:
    """Make the work folder, which is complete and whose lock is sealed, the folder `out`.

    A replaced model stays complete until then. If a rename fails, everything is still in `part`, and a resumed merge comes
    here without merging again.
    """
    if part.parent == out:
        _move_up(part, out, overwrite=overwrite)
        return
    try:
        replaced = _rename(part, out, overwrite=overwrite)
    except OSError as error:  # a mount point, or a folder in a lower layer of a container's file system
        if error.errno not in (errno.EBUSY, errno.EXDEV) or not out.is_dir():
            raise
        os.rename(part, out / INSIDE)
        _move_up(out / INSIDE, out, overwrite=overwrite)
        return
    if replaced:
        _remove_replaced(replaced)
    _unlock(out)
    sync_folder(out.parent)


def _unlock(folder: Path) -> None:
    """Remove what only an unfinished output has; the lock last, because it keeps other merges out."""
    shutil.rmtree(folder / WORKERS, ignore_errors=True)  # a worker may still write there that it is alive
    (folder / LOCK).unlink()


def _rename(part: Path, out: Path, *, overwrite: bool) -> Path | None:
    """Rename `part` to `out`; return the folder of what was replaced."""
    if not (overwrite and out.is_dir()):
        os.rename(part, out)  # fails if the folder is not empty
        return None
    replaced = _replaced(part)
    if _exchange(part, out):
        (part / _REPLACED_MARK).touch()
        os.rename(part, replaced)
        return replaced
    os.rename(out, replaced)
    try:
        os.rename(part, out)
    except OSError:
        os.rename(replaced, out)
        raise
    (replaced / _REPLACED_MARK).touch()
    return replaced


def _replaced(part: Path) -> Path:
    return part.with_name(f"{part.name}.replaced")


def _is_foreign_replaced(part: Path, out: Path) -> bool:
    replaced = _replaced(part)
    if part.parent == out or not replaced.is_dir() or not any(replaced.iterdir()):
        return False
    return not ((replaced / _REPLACED_MARK).is_file() or is_sealed(out) or (is_sealed(part) and not out.exists()))


def _remove_replaced(replaced: Path) -> None:
    """Remove a replaced model, and its mark last."""
    remove_entries(replaced, keep=(_REPLACED_MARK,))
    (replaced / _REPLACED_MARK).unlink(missing_ok=True)
    replaced.rmdir()


def _tidy_replaced(part: Path, out: Path) -> None:
    """Finish the replacement of `out` by a merge that was killed in it."""
    replaced = _replaced(part)
    if part.parent == out or not replaced.is_dir():
        return
    if not out.exists() and (is_sealed(part) or (replaced / _REPLACED_MARK).is_file()):
        os.rename(replaced, out)
        (out / _REPLACED_MARK).unlink(missing_ok=True)
    elif out.exists() and ((replaced / _REPLACED_MARK).is_file() or is_sealed(out)):
        _remove_replaced(replaced)


def _finish_exchange(part: Path, out: Path) -> None:
    """Move the replaced model away if a merge was killed right after the exchange: its lock is in `out` then."""
    if part.parent == out or not is_sealed(out) or not part.is_dir() or (part / LOCK).exists():
        return
    with writing(out), _open_lock(out) as lock:
        _take(lock, out)
        (part / _REPLACED_MARK).touch()
        os.rename(part, _replaced(part))
        _remove_replaced(_replaced(part))
        _unlock(out)


def tidy_finished(out: Path) -> None:
    """Remove what a merge that was killed after its last rename left in and beside its complete output.

    Raises:
        OutputError: BUSY, the merge is still at work; OUTPUT, a file cannot be removed.
    """
    out = out.resolve()
    part = part_of(out)
    _finish_exchange(part, out)
    with writing(out):
        if part.parent == out and part.is_dir() and is_left_by_merge(part):
            with _open_lock(part) as lock:
                _take(lock, part)
                remove_entries(part, keep=())
                part.rmdir()
        if _starts(out / LOCK, _MARK, _SEAL):
            with _open_lock(out) as lock:
                _take(lock, out)
                _tidy_replaced(part, out)
                _unlock(out)
        else:
            _tidy_replaced(part, out)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; False if the system cannot (it can on Linux, on most file systems)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


# --- a folder that cannot be replaced -----------------------------------------------------------------------------------


def _move_up(part: Path, out: Path, *, overwrite: bool) -> None:
    """Move the files of `part` into `out`, those that make it loadable last, and then remove `part`.

    `placing.json` lists them until all are there: readers refuse `out`, and the next merge moves them back.
    """
    old = [name for name in os.listdir(out) if name not in _NO_FILES]
    if old and not overwrite:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(out))
    new = sorted({*os.listdir(part)} - {LOCK, PLACING, _OLD, WORKERS}, key=_placing_order)
    write_durably(part / f"{PLACING}.new", json.dumps(new).encode())
    os.replace(part / f"{PLACING}.new", part / PLACING)
    sync_folder(part)
    try:
        (part / _OLD).mkdir(exist_ok=True)
        for name in old:
            os.rename(out / name, part / _OLD / name)
        for name in new:
            os.rename(part / name, out / name)
        sync_folder(out)
    except OSError:
        _move_back(part, out)
        raise
    (part / PLACING).unlink()
    sync_folder(part)
    shutil.rmtree(part / _OLD)
    _unlock(part)
    part.rmdir()
    sync_folder(out)


def _placing_order(name: str) -> tuple[bool, bool, str]:
    return name in _CONFIG_LAST, name.endswith(".index.json"), name


def _placed(part: Path) -> list[str]:
    """The names that a killed merge was moving from `part` to its output."""
    try:
        return [name for name in json.loads((part / PLACING).read_text()) if not os.path.lexists(part / name)]
    except (OSError, ValueError, TypeError):
        return []


def _move_back(part: Path, out: Path) -> None:
    """Undo the moves of a merge that was killed in `_move_up`."""
    if not (part / PLACING).is_file():
        return
    for name in _placed(part):
        if os.path.lexists(out / name):
            os.rename(out / name, part / name)
    if (part / _OLD).is_dir():
        for name in os.listdir(part / _OLD):
            os.rename(part / _OLD / name, out / name)
        (part / _OLD).rmdir()
    (part / PLACING).unlink()


# --- files --------------------------------------------------------------------------------------------------------------


def remove_entries(folder: Path, keep: Sequence[str]) -> None:
    """Remove everything in a folder but the names in `keep`."""
    for entry in folder.iterdir():
        if entry.name not in keep:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def write_durably(target: Path, content: bytes | Path) -> None:
    """Write a file, or copy one, and wait until it is on the disk."""
    with target.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError with a fix."""
    try:
        yield
    except OSError as error:
        full = error.errno in DISK_FULL
        fix = "free some space and run again with resume=True" if full else "choose a writable folder"
        if error.errno in (errno.EBUSY, errno.EXDEV):
            fix = "the finished files are kept: make the folder free, and run again with resume=True"
        where, what = error.filename or place, error.strerror or str(error)
        raise OutputError.of("DISK" if full else "OUTPUT", where, what, fix) from error
