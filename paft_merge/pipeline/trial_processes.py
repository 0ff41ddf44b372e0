"""Trials on this machine: the first in this process, the others in children that inherit the model which it loaded.

A small model gains little from several threads, and trials that run at a time on one core each gain almost all of a core.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from paft_merge.compute.cores import available_cores
from paft_merge.engine.ray_cluster import Needs
from paft_merge.errors import PaftMergeError, RunError, first_line
from paft_merge.pipeline.schema import RunRecipe

log = logging.getLogger(__name__)

ROUND = 4
"""Trials of a small model that the sampler chooses at a time, however many cores there are."""

_PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when its parent ends."""

SMALL_BYTES = 256 << 20
"""Largest size of a base's weights for which trials run at a time by default."""


def trials_at_once(recipe: RunRecipe, parallel: int | None) -> int:
    """Return how many trials of a search are chosen, and run where there are as many cores, at a time.

    Args:
        recipe: the run's recipe.
        parallel: the number that the user asks for. None: `ROUND` for a small base on the CPU, else 1.

    Raises:
        RunError: PARALLEL, trials cannot run at a time on this machine.
    """
    import torch

    spec = recipe.evaluate
    on_cpu = not torch.cuda.is_available() if spec is None or spec.device is None else spec.device == "cpu"
    if parallel is not None and parallel > 1 and not (on_cpu and sys.platform == "linux"):
        what = "trials run at a time only on the CPU of a Linux machine"
        raise RunError.of("PARALLEL", recipe.where("tune"), what, "pass --engine ray, or leave --parallel out")
    if parallel is not None:
        return parallel
    files = [file for kind in ("*.safetensors", "*.bin") for file in Path(recipe.base).glob(kind)]
    small = files and sum(file.stat().st_size for file in files) <= SMALL_BYTES
    return ROUND if small and on_cpu and sys.platform == "linux" else 1


class TrialProcesses:
    """Runs trials in the order in which they start. `TaskPool` does the same on Ray.

    Attributes:
        running: the trials that have started and not ended, by name.
    """

    def __init__(self, at_once: int) -> None:
        self.running = dict[str, Callable[[], Any]]()
        self._at_once, self._count = at_once, min(at_once, available_cores())
        self._children: list[Child] = []
        self._has_model = False

    @classmethod
    @contextmanager
    def open(cls, at_once: int) -> Iterator[TrialProcesses]:
        """Within the block, run up to `at_once` trials at a time; at its end the children are stopped."""
        pool = cls(at_once)
        try:
            yield pool
        finally:
            for child in pool._children:
                child.stop()

    @property
    def at_once(self) -> int:
        """Trials that may run at a time: one until this process has loaded the model."""
        return self._at_once if self._has_model else 1

    @property
    def threads(self) -> int:
        """Cores of each trial."""
        return max(1, available_cores() // self._count)

    def start(self, name: str, do: Callable[..., Any], arguments: tuple[Any, ...], needs: Needs) -> None:
        """Start a trial, or keep it until its turn; `needs` is for `TaskPool`."""
        self.running[name] = partial(do, *arguments)

    def ended(self) -> Iterator[tuple[str, Any]]:
        """Run what was started; yield the name and the result of each trial in their order, or raise its error."""
        if self._count == 1 or not self._has_model:
            for name in list(self.running):
                yield name, self.running.pop(name)()
            self._has_model = True
            return
        if not self._children:
            self._children = [Child.start("fork", "tune", "a trial") for _ in range(self._count)]
        waiting, busy = list(self.running), dict[str, Child]()
        free = list(self._children)
        for name in list(self.running):
            while waiting and free:
                following = waiting.pop(0)
                busy[following] = free.pop(0)
                busy[following].send(self.running[following])
            result = busy[name].result()
            free.append(busy.pop(name))
            del self.running[name]
            yield name, result


class Child:
    """A process that runs one task after the other on one thread, until this process ends."""

    def __init__(self, process: Any, connection: Connection, where: str, task: str) -> None:
        self._process, self._connection, self._where, self._task = process, connection, where, task
        self._busy = False

    @classmethod
    def start(cls, method: Literal["fork", "spawn"], where: str, task: str) -> Child:
        """Start a process.

        Args:
            method: of `multiprocessing`. A fork inherits the models of this process; after torch has trained on threads
                only a spawned process can train.
            where: the place that errors name.
            task: what runs there, as errors name it (`a trial`).
        """
        context: Any = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        hidden = [one for one in warnings.filters if one[2].__module__ == "builtins"]  # a child may not import others
        process = context.Process(target=_serve, args=(ours, theirs, where, task, hidden))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork beside threads
            process.start()
        theirs.close()
        return cls(process, ours, where, task)

    def send(self, do: Callable[[], Any]) -> None:
        """Give the process its next task.

        Raises:
            RunError: PARALLEL, the process ended.
        """
        try:
            self._connection.send(do)
        except ConnectionError:
            raise self._ended() from None
        self._busy = True

    def result(self) -> Any:
        """Wait for the task; log what it logged, and return its value or raise its error.

        Raises:
            RunError: PARALLEL, the process ended.
        """
        try:
            value, error, said = self._connection.recv()
        except (EOFError, ConnectionError):
            raise self._ended() from None
        self._busy = False
        for name, level, text in said:
            logging.getLogger(name).log(level, "%s", text)
        if error is not None:
            raise error
        return value

    def _ended(self) -> RunError:
        what = f"the process of {self._task} ended, perhaps because memory ran out"
        fix = "start again with fewer at a time (--parallel of paft tune, or taskset); what is finished is kept"
        return RunError.of("PARALLEL", self._where, what, fix)

    def stop(self) -> None:
        """End the process; kill it if it has a task."""
        if not self._busy and self._process.is_alive():
            with suppress(ConnectionError):
                self._connection.send(None)
            self._process.join(10)
        self._process.kill()
        self._process.join()
        self._connection.close()


class _Said(logging.Handler):
    """Collects the messages of this package, which the parent logs."""

    def __init__(self) -> None:
        super().__init__()
        self.found = list[tuple[str, int, str]]()

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append((record.name, record.levelno, self.format(record)))


def _serve(parents: Connection, connection: Connection, where: str, task: str, filters: list[Any]) -> None:
    """The child: run tasks until the parent ends, with the parent's filters of Python's warnings."""
    os.environ["TQDM_DISABLE"] = "1"  # several children have one terminal
    import torch

    warnings.filters[:] = filters  # type: ignore[index]
    if sys.platform == "linux":  # a child holds the lock of the run folder too
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its children
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of a tokenizer are only in the parent
    torch.set_num_threads(1)  # those of torch too
    said = _Said()
    logging.getLogger().handlers = []  # a thread of the parent may hold their locks
    logging.getLogger("paft_merge").handlers = [said]
    while True:
        if (do := connection.recv()) is None:
            return
        value: Any = None
        error: Exception | None = None
        try:
            value = do()
        except (PaftMergeError, OSError, MemoryError) as caught:
            error = caught
        except Exception as caught:  # the parent raises it; an error of another package may not survive pickling
            log.info("%s failed", task, exc_info=caught)
            error = RunError.of("TRIAL", where, f"{task} failed: {type(caught).__name__}: {first_line(caught)}")
        connection.send((value, error, said.found))
        said.found = []
