"""The folder that a merge writes: `out.part/` until it is complete, then `out/`.

`out.part/` holds the shards at their full size, a lock, and a journal with one line per finished tensor (its digest and
counts). A merge that was killed resumes from the journal; a finished tensor is kept only if its bytes have its digest.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from paft_merge.compute import kernels
from paft_merge.compute.blocks import Counts, Sums
from paft_merge.errors import OutputError, Problems
from paft_merge.inputs.checkpoint import UNFINISHED
from paft_merge.output.direct_io import PageAlignedBuffer
from paft_merge.output.shards import DISK_FULL, START_OVER, Shard, ShardWriter, Slot, index_of, index_text, sync_folder

log = logging.getLogger(__name__)

JOURNAL = UNFINISHED
LOCK = "lock"


@dataclass(frozen=True)
class Finished:
    """One finished tensor of the output."""

    name: str
    digest: str
    """XXH3-128, hex, over the XXH3-128 of each of its blocks in order."""
    active: Sequence[int]
    """Indices of the planned sources, one for each row of `counts` and `sums`."""
    counts: Counts
    sums: Sums
    nonfinite: int = 0
    """Elements that are NaN or infinite, which `allow_nonfinite` permits."""
    noted: Mapping[str, Any] = field(default_factory=dict)
    """Further statistics of its deltas, see `stats.record`."""

    def to_json(self) -> dict[str, Any]:
        """Return one line of the journal; floats are exact."""
        rows = {"active": list(self.active), "counts": self.counts.tolist(), "sums": self.sums.tolist()}
        return {"name": self.name, "digest": self.digest, **rows, "nonfinite": self.nonfinite, "noted": self.noted}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Finished:
        """Read the output of `to_json`; raises ValueError, KeyError or TypeError for anything else."""
        rows = len(line["active"])
        counts = np.array(line["counts"], np.int64).reshape(rows, len(kernels.COUNTS))
        sums = np.array(line["sums"], np.float64).reshape(rows, len(kernels.SUMS))
        return cls(line["name"], line["digest"], line["active"], counts, sums, line["nonfinite"], line["noted"])


def part_of(out: Path) -> Path:
    """The folder of an unfinished merge into `out`."""
    return out.with_name(f"{out.name}.part")


def check_place(out: Path, inputs: Sequence[Path], needed: int, *, overwrite: bool, problems: Problems) -> None:
    """Check that a merge can be written to `out`.

    Args:
        out: the folder to write; must not exist, or be empty, unless `overwrite`.
        inputs: folders that are read; `out` may not be one of them, be inside one, or contain one.
        needed: bytes of the output.
        overwrite: whether an existing `out` may be replaced.
        problems: receives OUTPUT and DISK faults.
    """
    real = out.resolve()
    for folder in dict.fromkeys(path.resolve() for path in inputs):
        if real == folder or folder in real.parents or real in folder.parents:
            what = f"is, contains or is inside the input {folder}"
            problems.add("OUTPUT", out, what, "choose a folder outside the inputs")
    if real.suffix == ".part" or not real.name:
        problems.add("OUTPUT", out, "cannot be the name of a model", "choose a name that does not end in .part")
        return
    if real.exists() and not real.is_dir():
        problems.add("OUTPUT", out, "is a file", "choose another folder")
    elif real.is_dir() and any(real.iterdir()) and not overwrite:
        fix = "choose another folder, or pass overwrite=True to replace it"
        problems.add("OUTPUT", out, "exists and is not empty", fix)
    above = next(p for p in real.parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        what = "cannot be written to" if above.is_dir() else "is a file"
        problems.add("OUTPUT", above, what, "choose another folder, or change its permissions")
        return
    free = shutil.disk_usage(above).free + sum(f.stat().st_blocks * 512 for f in _files(part_of(real)))
    if free < needed:
        fix = "free some space, or choose another folder"
        problems.add("DISK", out, f"{needed:,} bytes are needed and {free:,} are free", fix)


def _files(folder: Path) -> Iterator[Path]:
    return (f for f in folder.iterdir() if f.is_file()) if folder.is_dir() else iter(())


class Output:
    """The unfinished output of one merge: `with Output.open(...) as output: ...; output.complete(...)`.

    Attributes:
        out: the folder that the merge becomes.
        part: the folder until then.
        shards: its files.
        writer: writes them.
        finished: finished tensors by name.
    """

    def __init__(self, out: Path, shards: Sequence[Shard], writer: ShardWriter, finished: dict[str, Finished]) -> None:
        self.out, self.part, self.shards, self.writer = out, part_of(out), shards, writer
        self.finished = finished

    @classmethod
    @contextmanager
    def open(
        cls, out: Path, shards: Sequence[Shard], identity: Mapping[str, Any], tiles: Mapping[str, int], *, resume: bool
    ) -> Iterator[Output]:
        """Create `out.part/`, or resume it, and hold its lock.

        Args:
            out: the folder that the merge becomes.
            shards: its files, from `plan_shards`.
            identity: recipe, inputs and versions of the merge; a resumed merge must have the same.
            tiles: bytes of a block of each tensor, for checking digests.
            resume: keep the finished tensors of an unfinished merge; otherwise start over.

        Raises:
            OutputError: BUSY (another merge holds it), RESUME_STALE (names the changes), DISK, OUTPUT.
        """
        out = out.resolve()  # a symlink stays, and its target is replaced
        _finish_exchange(part_of(out), out)
        with _held(part_of(out)) as part:
            _tidy_replaced(part, out)
            journal = _read_journal(part) if resume else None
            if journal is not None:
                _check_identity(part, journal[0], identity)
            with _writing(part):
                _clear(
                    part, keep={LOCK, JOURNAL, *(shard.file.split("/")[0] for shard in shards)} if journal else {LOCK}
                )
            writer = _open_shards(part, shards, resume=journal is not None)
            try:
                output = cls(out, shards, writer, _verified(part, shards, tiles, journal[1] if journal else {}))
                with output._open_journal(identity):
                    yield output
            finally:
                writer.close()

    def memory(self, memory: PageAlignedBuffer, name: str, start: int, nbytes: int) -> Any:
        """Return `[nbytes]` uint8 of `memory`, aligned for a write at byte `start` of tensor `name`."""
        return memory.array(nbytes, self.writer.offset(name, start))

    def write(self, name: str, start: int, buffer: Any, memory: PageAlignedBuffer | None = None) -> None:
        """Write `buffer` at byte `start` of tensor `name`, from any thread; see `ShardWriter.write`."""
        self.writer.write(name, start, buffer, memory)

    def finish_tensor(self, finished: Finished) -> None:
        """Wait until all bytes of a tensor are written, and add it to the journal."""
        self.writer.settle(finished.name)
        self.finished[finished.name] = finished
        with _writing(self.part):
            self.journal.write(_line(finished.to_json()))

    def complete(self, files: Mapping[str, bytes | Path], *, overwrite: bool) -> None:
        """Write index and side files, make everything durable, and rename the folder to `out`.

        Args:
            files: side files: name to content, or to a file to copy.
            overwrite: replace an existing `out`, which stays complete until then.
        """
        self.writer.finish()
        index = index_of(self.shards)
        with _writing(self.part):
            for name, content in files.items():
                target = self.part / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _write_durably(target, content)
            if index is not None:
                _write_durably(self.part / f"{_stem(self.shards)}.safetensors.index.json", index_text(index).encode())
            sync_folder(self.part)
            self.journal.close()
            (self.part / JOURNAL).unlink()
            _put_in_place(self.part, self.out, overwrite=overwrite)
            (self.out / LOCK).unlink()  # last, because it keeps other merges out of out.part
            sync_folder(self.out.parent)

    @contextmanager
    def _open_journal(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Write a journal with the identity and the verified tensors, and keep it open."""
        lines = [{"identity": identity}, *(f.to_json() for f in self.finished.values())]
        path, made = self.part / JOURNAL, self.part / f"{JOURNAL}.new"
        with _writing(self.part):
            made.write_bytes(b"".join(map(_line, lines)))
            os.replace(made, path)  # atomic: there is always a complete journal
            self.journal = path.open("ab", buffering=0)  # unbuffered, so that closing it cannot fail on a full disk
        with self.journal:
            yield


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def digest_of(folder: Path, slot: Slot, tile_bytes: int) -> str:
    """Compute the digest of a written tensor: XXH3-128 over the XXH3-128 of its blocks of `tile_bytes`."""
    digest = xxhash.xxh3_128()
    with (folder / slot.file).open("rb") as file:
        file.seek(slot.offset)
        for start in range(0, slot.nbytes, tile_bytes):
            digest.update(xxhash.xxh3_128_digest(file.read(min(tile_bytes, slot.nbytes - start))))
    return digest.hexdigest()


def _stem(shards: Sequence[Shard]) -> str:
    """Start of the name of the index, by which readers find it; shards can have any name."""
    diffusers = "diffusion_pytorch_model"
    return diffusers if all(s.file.startswith(diffusers) for s in shards if "/" not in s.file) else "model"


# --- the unfinished folder -----------------------------------------------------------------------------------------------


@contextmanager
def _held(part: Path) -> Iterator[Path]:
    """Create `part` and hold its lock; a folder of that name that is not from a merge is an error."""
    with _writing(part):
        if part.is_dir() and any(part.iterdir()) and not (part / LOCK).is_file():
            fix = "move it away, or choose another folder"
            raise OutputError.of("OUTPUT", part, "exists, and is not the unfinished output of a merge", fix)
        part.mkdir(parents=True, exist_ok=True)
        lock = (part / LOCK).open("a+")
    with lock:
        with _writing(part):
            _take(lock, part)
        yield part


def _take(lock: Any, part: Path) -> None:
    """Take the lock, or raise BUSY. A lock file that was renamed in between belongs to a merge that just ended."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        taken = True
    else:
        taken = not os.path.exists(part / LOCK) or not os.path.samestat(os.fstat(lock.fileno()), os.stat(part / LOCK))
    if taken:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        what, fix = f"process {holder} is writing here", "wait for it, or choose another folder"
        raise OutputError.of("BUSY", part, what, fix)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _read_journal(part: Path) -> tuple[Mapping[str, Any], dict[str, Finished]] | None:
    """The identity and the finished tensors of an unfinished merge; None if there is no readable journal.

    A line that cannot be read, e.g. because it is incomplete, is skipped: its tensor is merged again.
    """
    try:
        first, *rest = (part / JOURNAL).read_text(encoding="utf-8", errors="replace").split("\n")
        identity = json.loads(first)["identity"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        log.warning("%s cannot be read, so the merge starts over", part / JOURNAL)
        return None
    finished = {}
    for line in rest:
        try:
            one = Finished.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue
        finished[one.name] = one
    return identity, finished


def _check_identity(part: Path, begun: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(identity))
    changed = sorted(key for key in {*begun, *now} if begun.get(key) != now.get(key))
    if changed:
        details = ", ".join(_what_changed(key, begun.get(key), now.get(key)) for key in changed)
        what = f"was started with another {details}"
        raise OutputError.of("RESUME_STALE", part, what, START_OVER)


def _what_changed(key: str, before: Any, now: Any) -> str:
    """`key`, and the names of its parts that differ, if it has parts."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return key
    parts = [part for part in {**before, **now} if before.get(part) != now.get(part)]
    return f"{key} ({', '.join(parts[:3])}{'...' if len(parts) > 3 else ''})"


def _clear(part: Path, keep: Container[str]) -> None:
    for entry in part.iterdir():
        if entry.name not in keep:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _open_shards(part: Path, shards: Sequence[Shard], *, resume: bool) -> ShardWriter:
    try:
        return ShardWriter(part, shards, resume=resume)
    except OutputError:
        if not resume:
            shutil.rmtree(part)  # it holds the lock and nothing else
        raise


def _verified(
    part: Path, shards: Sequence[Shard], tiles: Mapping[str, int], finished: Mapping[str, Finished]
) -> dict[str, Finished]:
    """The finished tensors whose bytes have the digest in the journal."""
    slots = {slot.name: slot for shard in shards for slot in shard.slots}
    known = {name: one for name, one in finished.items() if name in slots}
    good = {n: one for n, one in known.items() if digest_of(part, slots[n], tiles[n]) == one.digest}
    if len(good) < len(finished):
        lost = len(finished) - len(good)
        log.warning("%d tensors in %s differ from the journal and are merged again", lost, part)
    return good


# --- the finished folder ----------------------------------------------------------------------------------------------


def _put_in_place(part: Path, out: Path, *, overwrite: bool) -> None:
    """Rename `part` to `out`. A replaced folder stays complete until then, and is removed afterwards."""
    if not (overwrite and out.is_dir()):
        os.rename(part, out)  # fails if the folder is not empty
        return
    replaced = _replaced(part)
    if _exchange(part, out):
        os.rename(part, replaced)
    else:
        os.rename(out, replaced)
        os.rename(part, out)
    shutil.rmtree(replaced)


def _replaced(part: Path) -> Path:
    return part.with_name(f"{part.name}.replaced")


def _tidy_replaced(part: Path, out: Path) -> None:
    """Finish the replacement of `out` by a merge that was killed in it."""
    replaced = _replaced(part)
    with _writing(replaced):
        if replaced.is_dir() and out.exists():
            shutil.rmtree(replaced)
        elif replaced.is_dir():
            os.rename(replaced, out)


def _finish_exchange(part: Path, out: Path) -> None:
    """Move the replaced model away if a merge was killed right after the exchange: its lock is in `out` then."""
    if (out / LOCK).is_file() and part.is_dir() and not (part / LOCK).exists():
        with _writing(out), (out / LOCK).open("a+") as lock:
            _take(lock, out)
            os.rename(part, _replaced(part))
            (out / LOCK).unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically; False if the system cannot (it can on Linux, on most file systems)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _write_durably(target: Path, content: bytes | Path) -> None:
    with target.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError with a fix."""
    try:
        yield
    except OSError as error:
        full = error.errno in DISK_FULL
        fix = "free some space and run again with resume=True" if full else "choose a writable folder"
        where, what = error.filename or place, error.strerror or str(error)
        raise OutputError.of("DISK" if full else "OUTPUT", where, what, fix) from error
