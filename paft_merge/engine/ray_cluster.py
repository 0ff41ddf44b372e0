"""A connection to a Ray cluster, and tasks whose errors are those of this package."""

from __future__ import annotations

import logging
import math
import os
import platform
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any, ClassVar
from uuid import uuid4

from paft_merge.errors import PaftMergeError, Problem, RunError, first_line
from paft_merge.inputs.links import following_links, follows_links

log = logging.getLogger(__name__)

_RETRIES = 5
"""Times that Ray starts a task again whose process or machine was lost."""

_STOPS = 10.0
"""Seconds that tasks have to stop after an interrupt."""

_LOOKS = (0.2, 2.0)
"""Seconds between calls of `waits` while tasks run: at first, and at most."""

_NAMESPACE = "paft_merge"
"""Namespace of this package in the key-value store of a cluster."""


@dataclass(frozen=True)
class Needs:
    """Resources of a task, as Ray counts them."""

    cpus: float
    gpus: float = 0
    memory: int = 0
    """Bytes."""

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU{'s' * (self.cpus != 1)}", f"{self.gpus:g} GPU{'s' * (self.gpus != 1)}"]
        memory = [f"{self.memory / 1e9:.1f} GB of memory"] if self.memory else []
        return ", ".join([*parts[: 1 + bool(self.gpus)], *memory])


def import_ray() -> Any:
    """Return the module `ray`, which sends no statistics of its use.

    Raises:
        RunError: MISSING, it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # else it prints at exit, see `_WithoutRay`
    try:
        import ray
    except ImportError:
        raise RunError.of("MISSING", "", "ray is not installed", "pip install 'paft-merge[ray]'") from None
    return ray


def uses_ray(engine: str) -> bool:
    """Whether an engine is Ray, which must then be installed.

    Raises:
        ValueError: an unknown engine. RunError: as for `import_ray`.
    """
    if engine not in ("local", "ray"):
        raise ValueError(f"engine must be local or ray, not {engine!r}")
    if engine == "ray":
        import_ray()
    return engine == "ray"


class Cluster:
    """A Ray cluster that this process uses: `with Cluster.connect(...) as cluster: ...`.

    Attributes:
        ray: the module.
        started: whether this process started Ray, so that no further machine can join.
    """

    _own: ClassVar[Cluster | None] = None
    """The connection that this process has opened."""

    def __init__(self, ray: Any, started: bool) -> None:
        self.ray, self.started = ray, started

    @classmethod
    @contextmanager
    def connect(cls, address: str | None) -> Iterator[Cluster]:
        """Connect to a cluster, or start Ray on this machine; a connection that this process already has is used.

        Args:
            address: `auto`, or `host:port`. None: that of `RAY_ADDRESS`, else Ray is started here.

        Raises:
            RunError: MISSING, Ray is not installed; RAY, no cluster answers.
        """
        ray = import_ray()
        if ray.is_initialized():
            yield cls._own or cls(ray, False)
            return
        address = address or os.environ.get("RAY_ADDRESS")
        started = address is None
        own = {"include_dashboard": False, "object_store_memory": 80 << 20} if started else {}
        before = signal.getsignal(signal.SIGTERM)
        answers = False
        with redirect_stdout(_WithoutRay(sys.stdout)):
            try:
                answers = _check_answers(address)
                ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
            except (OSError, RuntimeError, ValueError) as error:
                fix = "start one with `ray start --head`, or leave ray_address out to use this machine"
                if answers:
                    fix = "use Ray in the version of the cluster, with its token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
                raise RunError.of("RAY", address or "ray", f"no cluster: {first_line(error)}", fix) from error
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, before)  # Ray replaces it
            try:
                cls._own = cls(ray, started)
                yield cls._own
            finally:
                cls._own = None
                ray.shutdown()

    def nodes(self) -> list[Mapping[str, float]]:
        """The resources of each machine that runs tasks."""
        found = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return [resources for resources in found if resources.get("CPU")]

    @property
    def cores(self) -> int:
        """CPUs of the smallest machine that runs tasks; those of this machine if none does yet."""
        return int(min((node["CPU"] for node in self.nodes()), default=os.cpu_count() or 1)) or 1

    def share(self, parallel: int | None) -> tuple[int, Needs]:
        """Divide the machines among tasks that load a model, on machines with GPUs if there are any.

        Args:
            parallel: tasks at a time. None: one for each GPU, or for each machine without GPUs.

        Returns:
            The number of tasks at a time, and the resources of each.
        """
        nodes = [node for node in self.nodes() if node.get("GPU")] or self.nodes()
        gpus = min((node.get("GPU", 0) for node in nodes), default=0)
        on_each = math.ceil(parallel / max(len(nodes), 1)) if parallel else max(1, int(gpus))
        cpus = min((node["CPU"] for node in nodes), default=1)
        return parallel or on_each * max(len(nodes), 1), Needs(max(1, cpus // on_each), min(1, gpus / on_each))

    def check(self, needs: Needs) -> None:
        """Warn if no machine has the resources of a task, which then waits for one.

        Raises:
            RunError: RAY, no machine can join, as Ray runs on this machine only.
        """
        nodes = self.nodes()
        wanted = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.memory}
        if any(all(node.get(name, 0) >= value for name, value in wanted.items()) for node in nodes):
            return
        there = "; ".join(sorted({str(Needs(n["CPU"], n.get("GPU", 0), int(n.get("memory", 0)))) for n in nodes}))
        what = f"a task needs {needs}; no machine of the cluster has that ({there or 'none runs tasks'})"
        if self.started:
            raise RunError.of("RAY", "", what, "lower threads or memory")
        log.warning("%s; tasks wait until one joins", what)

    def each(
        self,
        do: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        needs: Needs,
        *,
        waits: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Any]]:
        """Run a function once for each tuple of arguments, on any machine; yield the index and the result of each as it ends.

        Args:
            do: a function of a module that the machines have.
            tasks: arguments; the first tasks begin first.
            needs: resources of each task.
            waits: called about once a second while tasks run.

        Raises:
            PaftMergeError, OSError, MemoryError: that of a task. The others are stopped.
            RunError: RAY, the process of a task ended again and again.
        """
        with TaskPool.open(self) as pool:
            for number, arguments in enumerate(tasks):
                pool.start(number, do, arguments, needs)
            while pool.running:
                yield from pool.ended(waits)


def until_seen(seen: Callable[[], bool], place: Path, kind: type[PaftMergeError], seconds: float) -> None:
    """Wait, in a task, until this machine sees what the process that submitted the task has written to a folder.

    Args:
        seen: whether it does. NFS may show new files late.
        place: the folder, for the message.
        kind: class of the error.
        seconds: after which it never will.

    Raises:
        PaftMergeError: OUTPUT, the folder is another one on this machine.
    """
    pause, began = 0.05, monotonic()
    while not seen():
        if monotonic() - began > seconds:
            what = f"machine {platform.node()} does not see what the process that submits tasks has written there"
            raise kind.of("OUTPUT", place, what, "choose a folder that all machines of the cluster share")
        sleep(pause)
        pause = min(2 * pause, 2.0)


def _check_answers(address: str | None) -> bool:
    """Whether something listens at `host:port`; False for other addresses.

    Raises:
        OSError: nothing does. Ray would wait for a minute, and then end the process.
    """
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        return True
    return False


class _WithoutRay:
    """Standard output without what Ray's threads write there about lost processes, which is logged."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if not threading.current_thread().name.startswith("ray_"):
            return int(self._stream.write(text))
        if text.strip():
            log.info("Ray: %s", text.strip())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Warnings(logging.Handler):
    """Keeps the warnings of a task, for the process that submitted it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[tuple[str, int, Problem | str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record: its logger, its level, and its problem or its text."""
        given = record.args if isinstance(record.args, tuple) else ()
        problem = next((one for one in given if isinstance(one, Problem)), None)
        self.found.append((record.name, record.levelno, problem or record.getMessage()))


def _in_task(
    pool: str, folder: str, links: bool, do: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Any, list[Any]]:
    """Call a function in the working directory of the process that submitted the task, for relative paths.

    Returns:
        Its result, and the warnings that this package logged; nothing if the pool of the task is closed.
    """
    ours, warnings = logging.getLogger("paft_merge"), _Warnings()
    ours.addHandler(warnings)
    try:
        with _until_closed(pool), chdir(folder) if os.path.isdir(folder) else nullcontext(), following_links(links):
            return do(*arguments), warnings.found
    except _PoolClosed:
        return None, []
    finally:
        ours.removeHandler(warnings)


class _PoolClosed(BaseException):
    """The process that submitted this task does not wait for it any more."""


@contextmanager
def _until_closed(pool: str) -> Iterator[None]:
    """Interrupt the block of a task, which runs in the main thread, when its pool is closed.

    Raises:
        _PoolClosed: it is.
    """
    ended, closed, lock = threading.Event(), threading.Event(), threading.Lock()
    main = threading.get_ident()

    def watch() -> None:
        while not ended.wait(_LOOKS[0]):
            if _is_closed(pool):
                with lock:  # so that no interrupt arrives after the block
                    if not ended.is_set():
                        closed.set()
                        signal.pthread_kill(main, signal.SIGINT)  # also wakes it where it waits for a lock
                return

    if _is_closed(pool):
        raise _PoolClosed
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        if closed.is_set():
            raise _PoolClosed from None
        raise
    finally:
        with lock:
            ended.set()


def _is_closed(pool: str) -> bool:
    from ray.experimental.internal_kv import _internal_kv_exists

    return bool(_internal_kv_exists(pool, namespace=_NAMESPACE))


class TaskPool:
    """Tasks that run on a cluster.

    Attributes:
        running: the name of each task, by Ray's reference.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.running = cluster, dict[Any, Any]()
        self._key = f"closed-{uuid4().hex}"

    @classmethod
    @contextmanager
    def open(cls, cluster: Cluster) -> Iterator[TaskPool]:
        """Open a pool; at the end of the block the tasks that still run are stopped."""
        pool = cls(cluster)
        try:
            yield pool
        finally:
            pool._close()

    def start(self, name: Any, do: Callable[..., Any], arguments: tuple[Any, ...], needs: Needs) -> None:
        """Start a task as soon as a machine has the resources that it needs."""
        options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "memory": needs.memory or None, "name": str(name)}
        remote = self.cluster.ray.remote(max_retries=_RETRIES, scheduling_strategy="SPREAD", **options)(_in_task)
        self.running[remote.remote(self._key, str(Path.cwd()), follows_links(), do, arguments)] = name

    def ended(self, waits: Callable[[], None] = lambda: None) -> Iterator[tuple[Any, Any]]:
        """Wait until a task ends; yield the name and the result of each that has, or raise its error."""
        pause = _LOOKS[0]
        while True:
            done, _ = self.cluster.ray.wait(list(self.running), num_returns=1, timeout=pause)
            waits()
            if done:
                break
            pause = min(pause * 1.5, _LOOKS[1])
        for reference in done:
            name = self.running.pop(reference)
            yield name, self._result(reference)

    def _result(self, reference: Any) -> Any:
        from ray import exceptions

        try:
            result, warnings = self.cluster.ray.get(reference)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, PaftMergeError | OSError | MemoryError):
                raise error.cause from None
            last = str(error).strip().splitlines()[-1]
            if isinstance(error.cause, exceptions.RaySystemError) or "failed to import" in str(error):
                machine = re.search(r"ip=([^,)]+)", str(error))
                what = f"a task cannot begin on machine {machine[1] if machine else '?'}: {last}"
                fix = "install paft-merge, in one version, on every machine"
                raise RunError.of("RAY", "", what, fix) from error
            raise
        except exceptions.RayError as error:
            what = f"the process of a task ended {_RETRIES + 1} times: {first_line(error)}"
            raise RunError.of("RAY", "", what, "give the same command again; finished work is kept") from error
        for logger, level, text in warnings:
            logging.getLogger(logger).log(level, "%s", text)
        return result

    def _close(self) -> None:
        """Stop the tasks that run, and those that wait for a machine as soon as they begin.

        `ray.cancel` does the same, but ends the process that calls it when a task ends at that moment
        ("Tried to complete task that was not pending", seen with Ray 2.60 in one of four interrupts).
        """
        from ray.experimental.internal_kv import _internal_kv_put

        if not self.running:
            return
        began = monotonic()
        _internal_kv_put(self._key, b"1", namespace=_NAMESPACE)
        _, left = self.cluster.ray.wait(list(self.running), num_returns=len(self.running), timeout=_STOPS)
        self.running.clear()
        log.debug("tasks stopped after %.1f s, all but %d", monotonic() - began, len(left))
