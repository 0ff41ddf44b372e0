"""The folder a merge writes: `out.part/` while it grows, `out/` only when it is whole.

`out.part/` holds the shards at their full size, a lock, and a journal with one line per finished tensor (its digest and
tally). A merge that was killed is taken up again from the journal; a tensor counts only if its bytes still have its digest.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from paft_merge.blocks import Counts, Sums
from paft_merge.checkpoint import UNFINISHED
from paft_merge.errors import OutputError, Problems
from paft_merge.shards import Shard, ShardWriter, Slot, index_of, index_text

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

    def to_json(self) -> dict[str, Any]:
        """One line of the journal; floats keep every bit."""
        rows = {"active": list(self.active), "counts": self.counts.tolist(), "sums": self.sums.tolist()}
        return {"name": self.name, "digest": self.digest, **rows}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Finished:
        counts = np.array(line["counts"], np.int64).reshape(len(line["active"]), -1)
        return cls(line["name"], line["digest"], line["active"], counts, np.array(line["sums"]).reshape(counts.shape[0], -1))


def part_of(out: Path) -> Path:
    """Where a merge into `out` grows."""
    return out.with_name(out.name + ".part")


def check_place(out: Path, inputs: Sequence[Path], needed: int, *, overwrite: bool, problems: Problems) -> None:
    """Note everything that keeps a merge from being written to `out`: what is there, what it would hit, and too little disk.

    Args:
        out: the folder to write; must not exist, or be empty, unless `overwrite`.
        inputs: folders that are read; `out` may not be one of them, lie inside one, or hold one.
        needed: bytes of the output.
    """
    real = out.resolve()
    for folder in {path.resolve() for path in inputs}:
        if real == folder or folder in real.parents or real in folder.parents:
            problems.add("OUTPUT", out, f"is, holds or lies inside the input {folder}", "choose a folder outside the inputs")
    if out.exists() and not out.is_dir():
        problems.add("OUTPUT", out, "is a file", "choose another folder")
    elif out.is_dir() and any(out.iterdir()) and not overwrite:
        problems.add("OUTPUT", out, "exists and is not empty", "choose another folder, or pass --overwrite to replace it")
    above = next(p for p in [real.parent, *real.parents] if p.exists())
    if not os.access(above, os.W_OK):
        problems.add("OUTPUT", above, "cannot be written to", "choose another folder, or change its permissions")
        return
    free = shutil.disk_usage(above).free + sum(f.stat().st_blocks * 512 for f in _files(part_of(real)))
    if free < needed:
        problems.add("DISK", out, f"{needed:,} bytes are needed and {free:,} are free", "free some space, or write elsewhere")


def _files(folder: Path) -> Iterator[Path]:
    return (f for f in folder.iterdir() if f.is_file()) if folder.is_dir() else iter(())


class Output:
    """The growing output of one merge; `with Output.open(...) as output: ...; output.complete(...)`."""

    def __init__(self, out: Path, part: Path, shards: Sequence[Shard], writer: ShardWriter, finished: dict[str, Finished]) -> None:
        self.out, self.part, self.shards, self.writer = out, part, shards, writer
        self.finished = finished
        self.journal = (part / JOURNAL).open("a", encoding="utf-8")

    @classmethod
    @contextmanager
    def open(cls, out: Path, shards: Sequence[Shard], identity: Mapping[str, Any], tiles: Mapping[str, int], *, resume: bool) -> Iterator[Output]:
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
        part = part_of(out)
        with _writing(part):
            part.mkdir(parents=True, exist_ok=True)
            lock = (part / LOCK).open("a+")
        with lock:
            _take(lock, part)
            begun = (part / JOURNAL).is_file()
            if begun and not resume:
                log.info("%s was left by an unfinished merge and is begun anew (--resume would continue it)", part)
                for file in _files(part):
                    if file.name != LOCK:
                        file.unlink()
            going_on = begun and resume
            finished = _read_journal(part, identity) if going_on else {}
            writer = ShardWriter(part, shards, resume=going_on)
            try:
                output = cls(out, part, shards, writer, _verified(part, shards, tiles, finished))
                output._rewrite_journal(identity)
                yield output
            finally:
                writer.close()

    def write(self, name: str, start: int, buffer: Any) -> None:
        """Write `buffer` at `start` bytes into the tensor `name`; from any thread."""
        self.writer.write(name, start, buffer)

    def finish_tensor(self, finished: Finished) -> None:
        """Note that all of a tensor's bytes are written."""
        self.finished[finished.name] = finished
        with _writing(self.part):
            self.journal.write(json.dumps(finished.to_json()) + "\n")
            self.journal.flush()

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
            self.journal.close()
            (self.part / JOURNAL).unlink()
            (self.part / LOCK).unlink()
            _fsync(self.part)
            old = self.out.with_name(f"{self.out.name}.old-{os.getpid()}")
            if overwrite and self.out.exists():
                os.rename(self.out, old)
            os.rename(self.part, self.out)
            _fsync(self.out.parent)
            if old.exists():
                shutil.rmtree(old)

    def _rewrite_journal(self, identity: Mapping[str, Any]) -> None:
        """Begin the journal with what the merge is and what of it was verified."""
        self.journal.truncate(0)
        for line in [{"identity": identity}, *(f.to_json() for f in self.finished.values())]:
            self.journal.write(json.dumps(line) + "\n")
        self.journal.flush()


def _stem(shards: Sequence[Shard]) -> str:
    return re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", shards[0].file)


def _take(lock: Any, part: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        raise OutputError.of("BUSY", part, f"process {holder} is writing here", "wait for it, or choose another folder") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def _read_journal(part: Path, identity: Mapping[str, Any]) -> dict[str, Finished]:
    """The finished tensors of an unfinished merge, if it is this merge; a last line that was cut off is dropped."""
    lines = (part / JOURNAL).read_text(encoding="utf-8").split("\n")[:-1]
    begun = json.loads(lines[0])["identity"] if lines else {}
    changed = sorted(key for key in {*begun, *identity} if begun.get(key) != json.loads(json.dumps(identity.get(key))))
    if changed:
        raise OutputError.of(
            "RESUME_STALE", part, f"was begun with another {', '.join(changed)}", "run without --resume to begin anew"
        )
    found = (Finished.from_json(json.loads(line)) for line in lines[1:])
    return {finished.name: finished for finished in found}


def _verified(part: Path, shards: Sequence[Shard], tiles: Mapping[str, int], finished: Mapping[str, Finished]) -> dict[str, Finished]:
    """Those of `finished` whose bytes are what the journal says."""
    slots = {slot.name: slot for shard in shards for slot in shard.slots}
    good = {n: f for n, f in finished.items() if digest_of(part, slots[n], tiles[n]) == f.digest}
    if len(good) < len(finished):
        log.warning("%d tensors in %s are not what the journal says and are merged again", len(finished) - len(good), part)
    return good


def digest_of(folder: Path, slot: Slot, tile_bytes: int) -> str:
    """The digest of a written tensor: XXH3-128 over the XXH3-128 of its blocks of `tile_bytes`."""
    digest = xxhash.xxh3_128()
    with (folder / slot.file).open("rb") as file:
        file.seek(slot.offset)
        for start in range(0, slot.nbytes, tile_bytes):
            digest.update(xxhash.xxh3_128_digest(file.read(min(tile_bytes, slot.nbytes - start))))
    return digest.hexdigest()


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
        raise OutputError.of("DISK" if full else "OUTPUT", error.filename or place, error.strerror or str(error), fix) from error
