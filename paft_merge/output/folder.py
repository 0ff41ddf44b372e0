"""The folder that a merge writes: `out.part/` until it is complete, then `out/`.

`out.part/` (`out/.paft.part/` if `out` is a mount point, see `placing`) holds the shards at their full size, a lock, and a
journal with one line per finished tensor (its digest and counts). A merge that was killed resumes from the journal; a
finished tensor is kept only if its bytes have its digest.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from paft_merge.compute import kernels
from paft_merge.compute.blocks import Counts, Sums
from paft_merge.errors import OutputError
from paft_merge.output.direct_io import PageAlignedBuffer
from paft_merge.output.placing import (
    JOURNAL,
    LOCK,
    WORKERS,
    check_place,
    held,
    lock,
    part_of,
    put_in_place,
    remove_entries,
    write_durably,
    writing,
)  # fmt: skip
from paft_merge.output.shards import START_OVER, Shard, ShardWriter, Slot, index_of, index_text, sync_folder

log = logging.getLogger(__name__)

__all__ = ["JOURNAL", "LOCK", "Finished", "Output", "check_place", "digest_of", "part_of"]


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
    weights: Sequence[float] = ()
    """The weight of each planned source, if they were measured."""
    noted: bytes = b"{}"
    """Further statistics of its deltas, the JSON of `stats.record.note`: parsed, those of many sources take ten times as much."""

    def line(self) -> bytes:
        """Return one line of the journal; floats are exact."""
        rows = {"active": list(self.active), "counts": self.counts.tolist(), "sums": self.sums.tolist()}
        own = {
            "name": self.name,
            "digest": self.digest,
            **rows,
            "nonfinite": self.nonfinite,
            "weights": list(self.weights),
        }
        return json.dumps(own)[:-1].encode() + b', "noted": ' + self.noted + b"}\n"

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Finished:
        """Read a parsed `line`; raises ValueError, KeyError or TypeError for anything else."""
        rows = len(line["active"])
        counts = np.array(line["counts"], np.int64).reshape(rows, len(kernels.COUNTS))
        sums = np.array(line["sums"], np.float64).reshape(rows, len(kernels.SUMS))
        return cls(
            line["name"],
            line["digest"],
            line["active"],
            counts,
            sums,
            line["nonfinite"],
            line["weights"],
            compact(line["noted"]),
        )


class Output:
    """The unfinished output of one merge: `with Output.open(...) as output: ...; output.complete(...)`.

    Attributes:
        out: the folder that the merge becomes.
        part: the folder until then.
        shards: its files.
        writer: writes them.
        finished: finished tensors by name.
    """

    def __init__(
        self, out: Path, part: Path, shards: Sequence[Shard], writer: ShardWriter, finished: dict[str, Finished]
    ) -> None:
        self.out, self.part, self.shards, self.writer = out, part, shards, writer
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
        with held(part_of(out), out) as part:
            journal = _read_journal(part) if resume else None
            if journal is not None:
                check_identity(part, journal[0], identity, START_OVER)
            with writing(part):
                files = [shard.file.split("/")[0] for shard in shards] if journal else []
                remove_entries(part, keep=[LOCK, *([JOURNAL] if journal else []), *files])
            with cls._begun(out, part, shards, identity, resume=journal is not None) as output:
                output.finished.update(_verified(part, shards, tiles, journal[1] if journal else {}))
                with output._open_journal(identity):
                    yield output

    @classmethod
    @contextmanager
    def file(cls, out: Path, folder: Path, shard: Shard, identity: Mapping[str, Any]) -> Iterator[Output]:
        """Create one file of a merge and its journal in an empty folder, which no other process uses."""
        with cls._begun(out, folder, [shard], identity, resume=False) as output, output._open_journal(identity):
            yield output

    @classmethod
    @contextmanager
    def gathered(
        cls, out: Path, shards: Sequence[Shard], identity: Mapping[str, Any], folders: Sequence[Path]
    ) -> Iterator[Output]:
        """Move every file from its folder, one a shard (see `file`), into `out.part/`, to `complete` the merge.

        Raises:
            OutputError: BUSY (another process holds `out.part`), OUTPUT (a file or a journal is damaged).
        """
        with held(part_of(out), out, shared=True) as part:
            with writing(part):  # an earlier attempt to complete it
                remove_entries(part, keep=[LOCK, JOURNAL, WORKERS, *(shard.file.split("/")[0] for shard in shards)])
            finished = dict[str, Finished]()
            for shard, folder in zip(shards, folders, strict=True):
                journal = _read_journal(folder)
                if journal is None or journal[1].keys() != {slot.name for slot in shard.slots}:
                    fix = "delete this folder, and start a worker again"
                    raise OutputError.of("OUTPUT", folder, "its journal is incomplete", fix)
                finished |= journal[1]
                with writing(part):
                    (part / shard.file).parent.mkdir(parents=True, exist_ok=True)
                    if (folder / shard.file).exists():
                        os.rename(folder / shard.file, part / shard.file)
            with cls._begun(out, part, shards, identity, resume=True) as output:
                output.finished.update(finished)
                with output._open_journal(identity):
                    yield output

    @classmethod
    @contextmanager
    def _begun(
        cls, out: Path, part: Path, shards: Sequence[Shard], identity: Mapping[str, Any], *, resume: bool
    ) -> Iterator[Output]:
        """Open the files in `part`."""
        writer = _open_shards(part, shards, resume=resume)
        try:
            yield cls(out, part, shards, writer, {})
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
        with writing(self.part):
            self.journal.write(finished.line())

    def sync(self) -> None:
        """Make the files and the journal durable."""
        self.writer.finish()
        with writing(self.part):
            os.fsync(self.journal.fileno())

    def complete(self, files: Mapping[str, bytes | Path], *, overwrite: bool) -> None:
        """Write index and side files, make everything durable, and rename the folder to `out`.

        Args:
            files: side files: name to content, or to a file to copy.
            overwrite: replace an existing `out`, which stays complete until then.
        """
        self.writer.finish()
        index = index_of(self.shards)
        with writing(self.part):
            for name, content in files.items():
                target = self.part / name
                target.parent.mkdir(parents=True, exist_ok=True)
                write_durably(target, content)
            if index is not None:
                write_durably(self.part / index_name(self.shards), index_text(index).encode())
            # The journal becomes the lock, and so stays until the last rename: a merge that cannot be renamed is resumed.
            lock(self.journal, shared=(self.part / WORKERS).is_dir())
            os.replace(self.part / JOURNAL, self.part / LOCK)
            sync_folder(self.part)
            put_in_place(self.part, self.out, overwrite=overwrite)

    @contextmanager
    def _open_journal(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """Write a journal with the identity and the verified tensors, and keep it open."""
        path, made = self.part / JOURNAL, self.part / f"{JOURNAL}.new"
        with writing(self.part):
            with made.open("wb") as file:
                file.write(json.dumps({"identity": identity}).encode() + b"\n")
                file.writelines(finished.line() for finished in self.finished.values())
            os.replace(made, path)  # atomic: there is always a complete journal
            self.journal = path.open("ab", buffering=0)  # unbuffered, so that closing it cannot fail on a full disk
        with self.journal:
            yield


def compact(data: Any) -> bytes:
    """Return JSON without spaces."""
    return json.dumps(data, separators=(",", ":")).encode()


def digest_of(folder: Path, slot: Slot, tile_bytes: int) -> str:
    """Compute the digest of a written tensor: XXH3-128 over the XXH3-128 of its blocks of `tile_bytes`."""
    digest = xxhash.xxh3_128()
    with (folder / slot.file).open("rb") as file:
        file.seek(slot.offset)
        for start in range(0, slot.nbytes, tile_bytes):
            digest.update(xxhash.xxh3_128_digest(file.read(min(tile_bytes, slot.nbytes - start))))
    return digest.hexdigest()


def index_name(shards: Sequence[Shard]) -> str:
    """The name of the index, by which readers find it; shards can have any name."""
    diffusers = "diffusion_pytorch_model"
    stem = diffusers if all(s.file.startswith(diffusers) for s in shards if "/" not in s.file) else "model"
    return f"{stem}.safetensors.index.json"


def finished_in(folder: Path) -> list[str]:
    """Names of the tensors in the journal of an unfinished folder; none if there is none."""
    found = _read_journal(folder)
    return list(found[1]) if found else []


# --- the unfinished folder -----------------------------------------------------------------------------------------------


def _read_journal(part: Path) -> tuple[Mapping[str, Any], dict[str, Finished]] | None:
    """The identity and the finished tensors of an unfinished merge; None if there is no readable journal.

    A line that cannot be read, e.g. because it is incomplete, is skipped: its tensor is merged again.
    """
    try:
        with (part / JOURNAL).open(encoding="utf-8", errors="replace", newline="\n") as file:
            identity, finished = json.loads(file.readline())["identity"], dict[str, Finished]()
            for line in file:
                with suppress(ValueError, KeyError, TypeError):
                    one = Finished.from_json(json.loads(line))
                    finished[one.name] = one
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        log.warning("%s cannot be read, so the merge starts over", part / JOURNAL)
        return None
    return identity, finished


def check_identity(part: Path | str, begun: Mapping[str, Any], identity: Mapping[str, Any], fix: str) -> None:
    """Raise RESUME_STALE, which names what differs, if a merge was started with another identity."""
    now = json.loads(json.dumps(identity))
    changed = sorted(key for key in {*begun, *now} if begun.get(key) != now.get(key))
    if changed:
        details = ", ".join(_what_changed(key, begun.get(key), now.get(key)) for key in changed)
        what = f"was started with another {details}"
        raise OutputError.of("RESUME_STALE", part, what, fix)


def _what_changed(key: str, before: Any, now: Any) -> str:
    """`key`, and the names of its parts that differ, if it has parts."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return key
    parts = [part for part in {**before, **now} if before.get(part) != now.get(part)]
    return f"{key} ({', '.join(parts[:3])}{'...' if len(parts) > 3 else ''})"


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
