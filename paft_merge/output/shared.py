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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from paft_merge.output.folder import Output, check_identity
from paft_merge.output.leases import Holder, Leases, create_once
from paft_merge.output.placing import part_of, shared, writing
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
            begun = json.loads(place.read_text())
        fix = f"give all workers the same recipe, inputs, version and options; to start over, delete {part}"
        check_identity(part, begun, identity, fix)
        with writing(part):
            leases = Leases.open(folder / _LEASES, seconds, who)
        with leases as mine:
            yield cls(out, part, shards, identity, mine)

    # --- shares of the work ---------------------------------------------------------------------------------------------

    def each(
        self,
        kind: str,
        order: Sequence[int],
        is_done: Callable[[int], bool],
        *,
        taken_over: Callable[[int, Holder], None],
        waits: Callable[[Mapping[int, Holder]], None],
    ) -> Iterator[int]:
        """Yield the parts of the work that this worker must do, until every part is done by some worker.

        Args:
            kind: of the work, for its leases.
            order: all parts, in the order in which this worker tries them.
            is_done: whether a part is complete.
            taken_over: called with a part that a dead worker began, and that worker.
            waits: called again and again with the parts that other workers have begun, while there are no others.
        """
        pause = _POLL[0]
        left = [number for number in order if not is_done(number)]
        while left:
            others = dict[int, Holder]()
            for number in left:
                right = f"{kind}-{number:05d}"
                before = self.leases.holder(right)
                if not self.leases.take(right):
                    others |= {number: holder} if (holder := self.leases.holder(right)) else {}
                elif not is_done(number):
                    if before and before.state != "here":
                        taken_over(number, before)
                    pause = _POLL[0]
                    yield number
            left = [number for number in left if not is_done(number)]
            if left and len(others) >= len(left):
                waits({number: holder for number, holder in others.items() if number in left})
                pause = self.pause(pause)

    def pause(self, seconds: float) -> float:
        """Wait, and return how long to wait next.

        Raises:
            FileNotFoundError: the folder is gone: another worker completed the output, or somebody deleted it.
        """
        time.sleep(seconds)
        (self._folder / _IDENTITY).stat()
        return min(max(seconds * 1.5, _POLL[0]), _POLL[1])

    # --- files ----------------------------------------------------------------------------------------------------------

    def has_file(self, number: int) -> bool:
        """Whether a file of the output is complete."""
        return self._file(number).is_dir()

    @contextmanager
    def file(self, number: int) -> Iterator[Output]:
        """Write one file of the output, in a folder that no other worker uses; it counts as complete at the end."""
        place = self._file(number)
        for left in place.parent.glob(f"{place.name}.*"):  # by a worker that is dead
            shutil.rmtree(left, ignore_errors=True)
        own = place.with_name(f"{place.name}.{self.leases.id}")
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
                    if not self.has_file(number):  # else a worker that was taken for dead was faster
                        raise
                sync_folder(place.parent)
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def gathered(self) -> AbstractContextManager[Output]:
        """Open the complete output, see `Output.gathered`."""
        folders = [self._file(number) for number in range(len(self.shards))]
        return Output.gathered(self.out, self.shards, self.identity, folders)

    def _file(self, number: int) -> Path:
        return self._folder / _FILES / f"{number:05d}"

    # --- sums -----------------------------------------------------------------------------------------------------------

    def has_counted(self, name: str) -> bool:
        """Whether `counted` has the counts of a share."""
        return (self._folder / _SUMS / name).is_file()

    def counted(self, name: str) -> Counted:
        """Read the counts of a share."""
        with np.load(self._folder / _SUMS / name, allow_pickle=False) as held:
            return tuple(held[key] for key in held.files)

    def add_counted(self, name: str, counts: Counted) -> None:
        """Write the counts of a share for all workers."""
        made = self._folder / _SUMS / f".{name}.{self.leases.id}"
        with writing(self.part):
            with made.open("wb") as file:
                np.savez_compressed(file, *counts)
            os.replace(made, self._folder / _SUMS / name)
