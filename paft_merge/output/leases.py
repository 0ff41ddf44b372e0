"""Leases: exclusive rights of processes, also on several machines, that share a folder. No locks, and no clocks are compared.

A process counts in its own file, `ID.beat`. A right belongs to the process that created the newest of the files `RIGHT.0`,
`RIGHT.1`, ..., of which each is created once. If a count did not change for some seconds, by the clock of whoever looks at
it, the process is taken for dead, and another one may create the next file of its rights.

A process that was only slow, and still lives, can have lost its rights without knowing. So a right saves work and never
protects a file: whoever has a right writes under names of its own, and renames.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_BEATS = 6
"""Counts in the time after which a process is taken for dead."""

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Error numbers of a file system without hard links."""


@dataclass(frozen=True)
class Holder:
    """The process that has a right, or had it last."""

    id: str
    who: str
    """Its description, for messages."""
    state: Literal["here", "alive", "ended", "silent"]
    """`here`: it is this process. `ended`: it has finished or is known to be dead. `silent`: its count stopped."""


class Leases:
    """The rights of this process: `with Leases.open(...) as leases: ...`.

    Attributes:
        folder: holds the files of all processes.
        seconds: after which a process whose count does not change is taken for dead, if it does not ask for more itself.
        id: of this process, unique.
        who: describes this process, in the messages of others.
    """

    def __init__(self, folder: Path, seconds: float, who: str) -> None:
        self.folder, self.seconds, self.who, self.id = folder, seconds, who, uuid.uuid4().hex
        self._newest: dict[str, tuple[int, str, str]] = {}
        """Right to the newest generation that is known, and the id and description of its process."""
        self._seen: dict[str, tuple[str, float]] = {}
        """Process to its count, and when it was seen first."""

    @classmethod
    @contextmanager
    def open(cls, folder: Path, seconds: float, who: str) -> Iterator[Leases]:
        """Count in the background; at the end all rights of this process are free.

        Raises:
            OSError: the folder cannot be written.
        """
        leases, ends = cls(folder, seconds, f"{who}, process {os.getpid()} on {platform.node()}"), threading.Event()
        leases._beat(0)
        thread = threading.Thread(target=leases._keep_beating, args=(ends,), name="lease", daemon=True)
        thread.start()
        try:
            yield leases
        finally:
            ends.set()
            thread.join()
            with suppress(OSError):  # the folder is gone when the merge is complete
                leases._beat(-1)

    def take(self, right: str) -> bool:
        """Take a right that nobody has, or whose holder is not alive; False if another process has it."""
        held = self.holder(right)
        if held is None or held.state not in ("here", "alive"):
            generation = self._newest[right][0] + 1 if held else 0
            text = json.dumps({"id": self.id, "who": self.who})
            create_once(self.folder / f"{right}.{generation}", text, self.id)
            held = self.holder(right)
        return held is not None and held.id == self.id

    def wait_for(self, right: str, waits: Callable[[Holder], None]) -> bool:
        """Take a right as soon as its holder is dead; False when the holder shows that it is alive.

        `waits`: called once with the holder if that takes time.
        """
        seen: str | None = None
        while not self.take(right):
            holder = self.holder(right)
            if holder is not None:
                now = self._seen.get(holder.id, ("", 0.0))[0]
                if seen is None:
                    seen = now
                    waits(holder)
                if now != seen:
                    return False
            time.sleep(self.seconds / _BEATS / 4)
        return True

    def holds(self, right: str) -> bool:
        """Whether this process has a right, which no other one took over."""
        holder = self.holder(right)
        return holder is not None and holder.state == "here"

    def holder(self, right: str) -> Holder | None:
        """Return who has a right, or had it last; None if nobody ever had."""
        known = self._newest.get(right)
        generation = known[0] + bool(known[1]) if known else 0
        while (text := _text(self.folder / f"{right}.{generation}")) is not None:
            try:
                read = json.loads(text)
            except ValueError:  # its creator is writing it, see `_create_once_without_links`
                read = {"id": "", "who": "another process"}
            self._newest[right] = generation, read["id"], read["who"]
            generation += 1
        if right not in self._newest:
            return None
        _, name, who = self._newest[right]
        return Holder(name, who, self._state(name))

    def _state(self, name: str) -> Literal["here", "alive", "ended", "silent"]:
        if name == self.id:
            return "here"
        text = _text(self.folder / f"{name}.beat") or ""  # NFS may not show a new file for a while
        count, seconds, *process = text.split() or ["", "0"]
        if count == "-1" or _is_gone(process):
            return "ended"
        now = time.monotonic()
        if name not in self._seen or self._seen[name][0] != text:
            self._seen[name] = text, now
        return "silent" if now - self._seen[name][1] >= max(self.seconds, float(seconds)) else "alive"

    def _keep_beating(self, ends: threading.Event) -> None:
        count = 0
        while not ends.wait(self.seconds / _BEATS):
            count += 1
            with suppress(OSError):  # a server may be away for a while, and the folder is gone at the end
                self._beat(count)

    def _beat(self, count: int) -> None:
        """Write the count over the last one: a client of NFS that opens the file again sees it, and a rename only later."""
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT if count == 0 else 0)
        fd = os.open(self.folder / f"{self.id}.beat", flags, 0o666)
        try:
            os.pwrite(fd, f"{count:>12} {self.seconds:g} {os.getpid()} {_machine()}\n".encode(), 0)
        finally:
            os.close(fd)


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def create_once(path: Path, text: str, id: str) -> bool:
    """Create a file with its content, unless it exists; of several processes that do so at once, one gets True.

    Args:
        path: the file.
        text: its content.
        id: of this process, unique in the folder.
    """
    made = path.with_name(f".{path.name}.{id}")
    try:
        made.write_text(text)
        os.link(made, path)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return _create_once_without_links(path, text)
        if error.errno != errno.EEXIST:
            raise
        return made.stat().st_nlink == 2  # NFS may create the link and lose the answer
    else:
        return True
    finally:
        made.unlink(missing_ok=True)


def _create_once_without_links(path: Path, text: str) -> bool:
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _machine() -> str:
    """The running system and its numbering of processes; "" where they have no name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_gone(process: list[str]) -> bool:
    """Whether a process, given by its number and its machine, ran on this machine and does not exist any more."""
    if len(process) != 2 or process[1] != _machine():
        return False
    try:
        os.kill(int(process[0]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False
