"""The work folder of a merge by several workers, which share it and nothing else.

`OUT.part/.workers/` holds the identity of the merge (`merge.json`), leases, and the parts of the work: `files/00003/` is the
fourth file of the output with its journal, `sums/` are counts over a share of the tensors. A part appears under its name
when it is complete; until then it is in a folder that one process uses.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from paft_merge.errors import OutputError
from paft_merge.output.folder import Output, check_identity, finished_in
from paft_merge.output.leases import Holder, Leases, create_once
from paft_merge.output.placing import WORKERS, part_of, shared, writing
from paft_merge.output.shards import Shard, sync_folder

_IDENTITY, _FILES, _SUMS, _LEASES = "merge.json", "files", "sums", "leases"
_POLL = (0.02, 2.0)
"""Seconds between looks at what other workers have done: at first, and at most."""

Counted = tuple[np.ndarray[Any, np.dtype[np.int64]], ...]


class SharedOutput:
    """A merge by several workers as one of them sees it: `with SharedOutput.join(...) as shared: ...`.

    Attributes:
        out: the folder that the merge becomes.
        part: the folder until then.
        shards: its files.
        identity: of the merge.
        leases: the rights of this worker.
    """

    def __init__(
        self, out: Path, part: Path, shards: Sequence[Shard], identity: Mapping[str, Any], leases: Leases
    ) -> None:
        self.out, self.part, self.shards, self.identity, self.leases = out, part, tuple(shards), identity, leases
        self._folder = leases.folder.parent

    @classmethod
    @contextmanager
    def join(
        cls, out: Path, shards: Sequence[Shard], identity: Mapping[str, Any], who: str, seconds: float
    ) -> Iterator[SharedOutput]:
        """Create `out.part/` or join the workers that use it.

        Args:
            out: the folder that the merge becomes.
            shards: its files, from `plan_shards`.
            identity: recipe, inputs, versions and options of the merge; those of all workers must be the same.
            who: describes this worker, in the messages of others.
            seconds: after which a worker that shows no sign of life is taken for dead.

        Raises:
            OutputError: RESUME_STALE (names what differs), BUSY or OUTPUT (the folder is that of another merge).
        """
        out = out.resolve()
        part = part_of(out)
        folder = shared(part)
        with writing(part):
            for name in (_FILES, _SUMS, _LEASES):
                (folder / name).mkdir(exist_ok=True)
            place = folder / _IDENTITY
            create_once(place, json.dumps(identity), f"{os.getpid()}.{time.monotonic_ns()}")
            begun = _read(place)
        fix = f"give all workers the same recipe, inputs, version and options; to start over, delete {part}"
        check_identity(part, begun, identity, fix)
        with Leases.open(folder / _LEASES, seconds, who) as leases:
            yield cls(out, part, shards, identity, leases)

    @classmethod
    def has(cls, out: Path, id: str) -> bool:
        """Whether a process with this id (of its leases) has joined the work folder, as this machine sees it."""
        return (part_of(out.resolve()) / WORKERS / _LEASES / f"{id}.beat").exists()

    # --- shares of the work ---------------------------------------------------------------------------------------------

    def each(
        self,
        kind: str,
        order: Sequence[int],
        done: Callable[[], Container[int]],
        *,
        takes_over: Callable[[int, Holder], None],
        waits: Callable[[Mapping[int, Holder]], None],
    ) -> Iterator[int]:
        """Yield the parts of the work that this worker must do, until every part is done by some worker.

        Args:
            kind: of the work, for its leases.
            order: all parts, in the order in which this worker tries them.
            done: returns the parts that are complete.
            takes_over: called with a part that a dead worker began, and that worker.
            waits: called repeatedly with the unfinished parts and their workers, once other workers have begun all of them.
        """
        pause = _POLL[0]
        while left := _without(order, done()):
            others = dict[int, Holder]()
            for number in left:
                before = self.leases.holder(_right(kind, number))
                if not self.leases.take(_right(kind, number)):
                    others |= {number: holder} if (holder := self.leases.holder(_right(kind, number))) else {}
                elif number not in done():
                    if before and before.state != "here":
                        takes_over(number, before)
                    pause = _POLL[0]
                    yield number
            if len(others) == len(left):
                waits(others)
                pause = self.pause(pause)

    def holds(self, kind: str, number: int) -> bool:
        """Whether no other worker took over a part that `each` yielded."""
        return self.leases.holds(_right(kind, number))

    def pause(self, seconds: float) -> float:
        """Wait, and return how long to wait next.

        Raises:
            FileNotFoundError: the folder is gone: another worker completed the output, or somebody deleted it.
        """
        time.sleep(seconds)
        (self._folder / _IDENTITY).stat()
        return min(max(seconds * 1.5, _POLL[0]), _POLL[1])

    # --- files ----------------------------------------------------------------------------------------------------------

    def files(self) -> set[int]:
        """The files of the output that are complete."""
        return {int(name) for name in os.listdir(self._folder / _FILES) if name.isdigit()}

    def journalled(self) -> set[str]:
        """Names of the finished tensors of files that are being written."""
        folders = [name for name in os.listdir(self._folder / _FILES) if not name.isdigit()]
        return {tensor for name in folders for tensor in finished_in(self._folder / _FILES / name)}

    @contextmanager
    def file(self, number: int) -> Iterator[Output]:
        """Write one file of the output, in a folder that no other worker uses; it counts as complete at the end."""
        own, place = self._unfinished(number, self.leases.id), self._file(number)
        with writing(self.part):
            own.mkdir()
        try:
            with Output.file(self.out, own, self.shards[number], self.identity) as output:
                yield output
                output.sync()
            with writing(self.part):
                try:
                    os.rename(own, place)
                except OSError:
                    if not place.is_dir():  # else a worker that was taken for dead was faster
                        raise
                sync_folder(place.parent)
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def discard(self, number: int, holder: Holder) -> None:
        """Remove what a dead worker wrote of a file."""
        shutil.rmtree(self._unfinished(number, holder.id), ignore_errors=True)

    def gathered(self) -> AbstractContextManager[Output]:
        """Open the complete output, see `Output.gathered`."""
        folders = [self._file(number) for number in range(len(self.shards))]
        return Output.gathered(self.out, self.shards, self.identity, folders)

    def _file(self, number: int) -> Path:
        return self._folder / _FILES / f"{number:05d}"

    def _unfinished(self, number: int, id: str) -> Path:
        return self._folder / _FILES / f"{number:05d}.{id}"

    # --- sums -----------------------------------------------------------------------------------------------------------

    def counted(self, sum: int) -> dict[int, Path]:
        """The shares of a sum that were counted, for `counts`."""
        found = (path for path in (self._folder / _SUMS).iterdir() if path.name.startswith(f"{sum}-"))
        return {int(path.stem.partition("-")[2]): path for path in found}

    def add_counts(self, sum: int, number: int, counts: Counted) -> None:
        """Write the counts of a share of a sum for all workers."""
        name = f"{sum}-{number:05d}.npz"
        made = self._folder / _SUMS / f".{name}.{self.leases.id}"
        with writing(self.part):
            with made.open("wb") as file:
                np.savez_compressed(file, *counts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(made, self._folder / _SUMS / name)


def counts(file: Path) -> Counted:
    """Read the counts of a share."""
    with np.load(file, allow_pickle=False) as held:
        return tuple(held[key] for key in held.files)


def _right(kind: str, number: int) -> str:
    return f"{kind}-{number:05d}"


def _without(order: Sequence[int], done: Container[int]) -> list[int]:
    return [number for number in order if number not in done]


def _read(place: Path) -> Any:
    """Read the identity of a merge. Without hard links, its creator may not have written all of it."""
    for _ in range(20):
        with suppress(ValueError):
            return json.loads(place.read_text())
        time.sleep(0.1)
    raise OutputError.of("OUTPUT", place, "is damaged", f"delete {place.parents[1]} to start over")
