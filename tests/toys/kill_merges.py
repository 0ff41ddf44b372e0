"""Kills merges at every step and resumes them; test_output.py runs it in a process of its own, so that forking is safe.

Steps are the calls that change the disk: writes, renames, removals, syncs. For every step n a child process merges into
FOLDER/n and kills itself (SIGKILL) just before the n-th; another one then resumes it. Prints one JSON line: how many steps
there are, and every n whose resumed output is not that of an unbroken merge, or that had left more than `n.part`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toys.merge import files_of

from paft_merge import merge
from paft_merge.engine import streaming as streaming  # imported before the forks, so that they need not
from paft_merge.output import placing
from paft_merge.output.folder import Output

STEPS = ("write", "pwrite", "link", "rename", "replace", "unlink", "fsync", "mkdir", "rmdir")


class Steps:
    """Counts the calls of this process that change the disk, and kills it before one of them."""

    def __init__(self, last: int | None) -> None:
        self.done, self.last = 0, last
        for name in STEPS:
            setattr(os, name, self.counted(getattr(os, name)))
        Output.finish_tensor = self.counted(Output.finish_tensor)  # type: ignore[method-assign]

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **keywords: Any) -> Any:
            self.done += 1
            if self.last is not None and self.done > self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return counting


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a fork; its exit status, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def count_steps(recipe: Path, out: Path, **keywords: Any) -> int:
    """Merge in a fork without a fault, and say in how many steps."""

    def work() -> None:
        steps = Steps(None)
        merge(recipe, out, threads=1, **keywords)
        done = steps.done
        out.with_name("steps").write_text(str(done))

    assert in_child(work) == 0
    return int(out.with_name("steps").read_text())


def fault_at(
    n: int, recipe: Path, folder: Path, whole: dict[str, bytes], old: dict[str, bytes] | None, workers: bool
) -> str | None:
    """What is wrong after a merge that was killed before step `n` and resumed; None when all is well."""
    out = folder / str(n)
    keywords: dict[str, Any] = {"overwrite": old is not None, "threads": 1, **({"worker": "0/2"} if workers else {})}
    if old is not None:
        shutil.copytree(folder / "old", out)
    elif placing.is_mount is yes:
        out.mkdir()

    def killed() -> None:
        Steps(n)
        merge(recipe, out, **keywords)

    if in_child(killed) != -signal.SIGKILL:
        return "was not killed"
    left = files_of(out) if out.exists() else None
    if left and workers:
        left = {name: data for name, data in left.items() if not name.startswith(placing.WORKERS)}
    if placing.is_mount is yes:
        moving = (out / placing.INSIDE / placing.PLACING).exists()
        found = {name: data for name, data in (left or {}).items() if not name.startswith(placing.INSIDE)}
        left = old if moving or not found else found
    if left not in (old, whole, whole | {"lock": (left or {}).get("lock")}):
        return "left something that is neither what was there nor what was asked for"
    again = {**keywords, "overwrite": True, **({"worker": "1/2"} if workers else {"resume": True})}
    if in_child(lambda: merge(recipe, out, **again) and None) != 0:
        return "could not be resumed"
    if files_of(out) != whole:
        return "was resumed to other bytes"
    beside = {path.name for path in folder.glob(f"{n}.*")}
    shutil.rmtree(out)
    return f"left {beside}" if beside else None


def yes(_: Path) -> bool:
    """Stands for `placing.is_mount`."""
    return True


def main(recipe: str, where: str, what: str, every: str) -> None:
    """Kill a merge of `recipe` before each step (or every third), where there is nothing yet or `replacing` something.

    `mounted` and `replacing-mounted` do so in folders that cannot be renamed. With `workers` in it, a worker is killed, and
    another one ends the merge.
    """
    folder, replacing, workers = Path(where), what.startswith("replacing"), "workers" in what
    old = files_of(folder / "old") if replacing else None
    whole = files_of(merge(recipe, folder / "whole", threads=1))  # here, so that every fork has the kernels
    if replacing:
        shutil.copytree(folder / "old", folder / "counted")
    if what.endswith("mounted"):
        placing.is_mount = yes
        (folder / "counted").mkdir(exist_ok=True)
    keywords = {"worker": "0/2"} if workers else {}
    steps = count_steps(Path(recipe), folder / "counted", overwrite=replacing, **keywords)
    faults = {n: fault_at(n, Path(recipe), folder, whole, old, workers) for n in range(0, steps, int(every))}
    print(json.dumps({"steps": steps, "faults": {n: fault for n, fault in faults.items() if fault}}))
