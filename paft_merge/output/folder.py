"""The folder a merge writes: `out.part/` while it grows, `out/` only when it is whole.

`out.part/` holds the shards at their full size, a lock, and a journal with one line per finished tensor (its digest
and tally). A merge that was killed is taken up again from the journal; a tensor counts only if its bytes still have its
digest.
"""

from __future__ import annotations

import ctypes
import errno
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
from paft_merge.output.shards import Shard, ShardWriter, Slot, index_of, index_text

log = logging.getLogger(__name__)

JOURNAL = UNFINISHED
LOCK = "lock"


@dataclass(frozen=True)
class Finished:
    """One tensor that stands in the output."""

    name: str
    digest: str
    """XXH3-128, hex, over the XXH3-128 of each of its blocks in order."""
    active: Sequence[int]
    """Which of the planned sources the rows of `counts` and `sums` are."""
    counts: Counts
    sums: Sums
    nonfinite: int = 0
    """How many of its elements are NaN or infinite, which `allow_nonfinite` lets pass."""
    noted: Mapping[str, Any] = field(default_factory=dict)
    """What else was noted of its deltas, see `measures.record`."""

    def to_json(self) -> dict[str, Any]:
        """One line of the journal; floats keep every bit."""
        rows = {"active": list(self.active), "counts": self.counts.tolist(), "sums": self.sums.tolist()}
        return {"name": self.name, "digest": self.digest, **rows, "nonfinite": self.nonfinite, "noted": self.noted}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Finished:
        """What `to_json` wrote; ValueError, KeyError or TypeError for anything else."""
        rows = len(line["active"])
        counts = np.array(line["counts"], np.int64).reshape(rows, len(kernels.COUNTS))
        sums = np.array(line["sums"], np.float64).reshape(rows, len(kernels.SUMS))
        return cls(line["name"], line["digest"], line["active"], counts, sums, line["nonfinite"], line["noted"])


def part_of(out: Path) -> Path:
    """Where a merge into `out` grows."""
    return out.with_name(f"{out.name}.part")


def check_place(out: Path, inputs: Sequence[Path], needed: int, *, overwrite: bool, problems: Problems) -> None:
    """Note all that keeps a merge from being written to `out`: what is there, what it would hit, too little disk.

    Args:
        out: the folder to write; must not exist, or be empty, unless `overwrite`.
        inputs: folders that are read; `out` may not be one of them, lie inside one, or hold one.
        needed: bytes of the output.
    """
    real = out.resolve()
    for folder in dict.fromkeys(path.resolve() for path in inputs):
        if real == folder or folder in real.parents or real in folder.parents:
            what = f"is, holds or lies inside the input {folder}"
            problems.add("OUTPUT", out, what, "choose a folder outside the inputs")
    if real.suffix == ".part" or not real.name:
        problems.add("OUTPUT", out, "cannot be the name of a model", "choose a name that does not end in .part")
        return
    if real.exists() and not real.is_dir():
        problems.add("OUTPUT", out, "is a file", "choose another folder")
    elif real.is_dir() and any(real.iterdir()) and not overwrite:
        fix = "choose another folder, or pass --overwrite to replace it"
        problems.add("OUTPUT", out, "exists and is not empty", fix)
    above = next(p for p in real.parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        what = "cannot be written to" if above.is_dir() else "is a file"
        problems.add("OUTPUT", above, what, "choose another folder, or change its permissions")
        return
    free = shutil.disk_usage(above).free + sum(f.stat().st_blocks * 512 for f in _files(part_of(real)))
    if free < needed:
        fix = "free some space, or write elsewhere"
        problems.add("DISK", out, f"{needed:,} bytes are needed and {free:,} are free", fix)


def _files(folder: Path) -> Iterator[Path]:
    return (f for f in folder.iterdir() if f.is_file()) if folder.is_dir() else iter(())


class Output:
    """The growing output of one merge; `with Output.open(...) as output: ...; output.complete(...)`."""

    def __init__(self, out: Path, shards: Sequence[Shard], writer: ShardWriter, finished: dict[str, Finished]) -> None:
        self.out, self.part, self.shards, self.writer = out, part_of(out), shards, writer
        self.finished = finished

    @classmethod
    @contextmanager
    def open(
        cls, out: Path, shards: Sequence[Shard], identity: Mapping[str, Any], tiles: Mapping[str, int], *, resume: bool
    ) -> Iterator[Output]:
        """Create (or with `resume` take up again) `out.part/` and hold its lock.

        Args:
            out: the folder that the merge becomes.
            shards: its files, laid out.
            identity: what the merge is made of (recipe, inputs, versions); a resumed merge must have the same.
            tiles: bytes of a block of each tensor, to check digests by.
            resume: go on with what is there; without it an abandoned `out.part/` is begun anew.

        Raises:
            OutputError: BUSY (another merge holds it), RESUME_STALE (names what changed), DISK, OUTPUT.
        """
        out = out.resolve()  # the link stays, what it leads to is replaced
        _finish_exchange(part_of(out), out)
        with _held(part_of(out)) as part:
            _tidy_replaced(part, out)
            journal = _read_journal(part) if resume else None
            if journal is not None:
                _check_identity(part, journal[0], identity)
            with _writing(part):
                _clear(part, keep={LOCK, JOURNAL, *(shard.file for shard in shards)} if journal else {LOCK})
            writer = _open_shards(part, shards, resume=journal is not None)
            try:
                output = cls(out, shards, writer, _verified(part, shards, tiles, journal[1] if journal else {}))
                with output._journalling(identity):
                    yield output
            finally:
                writer.close()

    def memory(self, room: PageAlignedBuffer, name: str, start: int, nbytes: int) -> Any:
        """`[nbytes]` uint8 of `room` for what goes to `start` bytes into the tensor `name`."""
        return room.array(nbytes, self.writer.offset(name, start))

    def write(self, name: str, start: int, buffer: Any, room: PageAlignedBuffer | None = None) -> None:
        """Write `buffer` at `start` bytes into the tensor `name`; from any thread. `room`: as for `ShardWriter.write`."""
        self.writer.write(name, start, buffer, room)

    def finish_tensor(self, finished: Finished) -> None:
        """Note that all of a tensor's bytes are written, once they are."""
        self.writer.settle(finished.name)
        self.finished[finished.name] = finished
        with _writing(self.part):
            self.journal.write(_line(finished.to_json()))

    def complete(self, files: Mapping[str, bytes | Path], *, overwrite: bool) -> None:
        """Write index and side files, make everything durable, and give the folder its name.

        Args:
            files: what goes beside the shards: name to content, or to a file to copy.
            overwrite: replace an existing `out`, which stays whole until then.
        """
        self.writer.finish()
        index = index_of(self.shards)
        with _writing(self.part):
            for name, content in files.items():
                target = self.part / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _write_durably(target, content if isinstance(content, bytes) else content.read_bytes())
            if index is not None:
                _write_durably(self.part / f"{_stem(self.shards)}.safetensors.index.json", index_text(index).encode())
            _fsync(self.part)
            self.journal.close()
            (self.part / JOURNAL).unlink()
            _put_in_place(self.part, self.out, overwrite=overwrite)
            (self.out / LOCK).unlink()  # only now: nobody may begin in out.part while it is there
            _fsync(self.out.parent)

    @contextmanager
    def _journalling(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Begin the journal with what the merge is and what of it was verified, and keep it open."""
        lines = [{"identity": identity}, *(f.to_json() for f in self.finished.values())]
        path, made = self.part / JOURNAL, self.part / f"{JOURNAL}.new"
        with _writing(self.part):
            made.write_bytes(b"".join(map(_line, lines)))
            os.replace(made, path)  # killed here or not, there is a whole journal
            self.journal = path.open("ab", buffering=0)  # nothing is left to write when a full disk closes it
        with self.journal:
            yield


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def digest_of(folder: Path, slot: Slot, tile_bytes: int) -> str:
    """The digest of a written tensor: XXH3-128 over the XXH3-128 of its blocks of `tile_bytes`."""
    digest = xxhash.xxh3_128()
    with (folder / slot.file).open("rb") as file:
        file.seek(slot.offset)
        for start in range(0, slot.nbytes, tile_bytes):
            digest.update(xxhash.xxh3_128_digest(file.read(min(tile_bytes, slot.nbytes - start))))
    return digest.hexdigest()


def _stem(shards: Sequence[Shard]) -> str:
    """What the index is called, by which readers find it; the shards may be called anything."""
    diffusers = "diffusion_pytorch_model"
    return diffusers if all(shard.file.startswith(diffusers) for shard in shards) else "model"


# --- the growing folder -----------------------------------------------------------------------------------------------


@contextmanager
def _held(part: Path) -> Iterator[Path]:
    """Create `part` and hold its lock; a folder of that name that no merge has left is not touched."""
    with _writing(part):
        if part.is_dir() and any(part.iterdir()) and not (part / LOCK).is_file():
            fix = "move it away, or choose another folder"
            raise OutputError.of("OUTPUT", part, "is in the way, and no merge has left it", fix)
        part.mkdir(parents=True, exist_ok=True)
        lock = (part / LOCK).open("a+")
    with lock:
        with _writing(part):
            _take(lock, part)
        yield part


def _take(lock: Any, part: Path) -> None:
    """Take the lock, or say who has it. One that was renamed away in between belongs to a merge that just ended."""
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
    """The identity and the finished tensors of an unfinished merge; None when there is nothing to go on with.

    A line that cannot be read, as one that was cut off, is a tensor that is not finished.
    """
    try:
        first, *rest = (part / JOURNAL).read_text(encoding="utf-8", errors="replace").split("\n")
        identity = json.loads(first)["identity"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        log.warning("%s cannot be read, so the merge is begun anew", part / JOURNAL)
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
        what = f"was begun with another {details}"
        raise OutputError.of("RESUME_STALE", part, what, "run without --resume to begin anew")


def _what_changed(key: str, before: Any, now: Any) -> str:
    """`key`, and which of its parts differ where it has parts."""
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
    """Those of `finished` whose bytes are what the journal says."""
    slots = {slot.name: slot for shard in shards for slot in shard.slots}
    known = {name: one for name, one in finished.items() if name in slots}
    good = {n: one for n, one in known.items() if digest_of(part, slots[n], tiles[n]) == one.digest}
    if len(good) < len(finished):
        lost = len(finished) - len(good)
        log.warning("%d tensors in %s are not what the journal says and are merged again", lost, part)
    return good


# --- the finished folder ----------------------------------------------------------------------------------------------


def _put_in_place(part: Path, out: Path, *, overwrite: bool) -> None:
    """Give `part` the name `out`; what had it is there, whole, until that instant, and is then removed."""
    if not (overwrite and out.is_dir()):
        os.rename(part, out)  # which refuses a folder that is not empty
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
    """Finish what a merge that was killed while it replaced `out` had begun."""
    replaced = _replaced(part)
    with _writing(replaced):
        if replaced.is_dir() and out.exists():
            shutil.rmtree(replaced)
        elif replaced.is_dir():
            os.rename(replaced, out)


def _finish_exchange(part: Path, out: Path) -> None:
    """Move the replaced model away where a merge was killed right after the exchange: its lock is in `out` then."""
    if (out / LOCK).is_file() and part.is_dir() and not (part / LOCK).exists():
        with _writing(out), (out / LOCK).open("a+") as lock:
            _take(lock, out)
            os.rename(part, _replaced(part))
            (out / LOCK).unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step where the system can (Linux, most file systems); False where it cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _write_durably(target: Path, content: bytes) -> None:
    with target.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Say what an error of the file system means for the merge."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        fix = "free some space and run again with --resume" if full else "choose a folder that can be written"
        where, what = error.filename or place, error.strerror or str(error)
        raise OutputError.of("DISK" if full else "OUTPUT", where, what, fix) from error
