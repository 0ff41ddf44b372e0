"""Run code that a stranger's file decides, such as a chat template, in a child process with limits."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TypeVar

from paft_merge.inputs.adapters.patterns import MOST_SECONDS, PatternError, compile_pattern

T = TypeVar("T")

SECONDS = 30.0
"""Longest wait for an item."""

BYTES = 2 << 30
"""Memory that the child may take in addition to the parent's."""


class LimitError(Exception):
    """The child ran into a limit, or ended without a result."""


def in_child(make: Callable[[], Iterable[T]], seconds: float | None = SECONDS, memory: int = BYTES) -> Iterator[T]:
    """Iterate in a forked child over what `make` returns; the items are pickled.

    Args:
        make: Called in the child. It should not use threads or CUDA.
        seconds: Longest wait for an item; None sets no limit.
        memory: Bytes that the child may take in addition to the parent's.

    Raises:
        LimitError: an item took longer or more memory, or the child ended. Other errors of `make` are raised as they are.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_send_all, args=(make, send, memory), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork beside threads
        child.start()
    send.close()
    try:
        while True:
            if not receive.poll(seconds):
                raise LimitError(f"takes longer than {seconds:.0f} seconds")
            try:
                kind, value = receive.recv()
            except EOFError:
                child.join()
                late = child.exitcode == -signal.SIGXCPU  # `make` set a limit
                raise LimitError("takes too much processor time" if late else "ended its process") from None
            if kind == "end":
                return
            if kind == "memory":
                raise LimitError(f"needs more than {memory / 2**30:.0f} GiB of memory")
            if kind == "error":
                raise value
            yield value
    finally:
        child.kill()
        child.join()
        receive.close()


@contextmanager
def calls_in_child(function: Callable[..., T]) -> Iterator[Callable[..., T]]:
    """Within the block, call a function in a child process, with the limits of `in_child` for each call.

    All calls have one child, which is forked at the first call, after a call that failed, and in a process that was
    forked since. In a child of `in_child`, which has the limits already, the function is called directly.
    """
    children: dict[int, tuple[Connection, Iterator[Any]]] = {}
    context = multiprocessing.get_context("fork")

    def started() -> tuple[Connection, Iterator[Any]]:
        receive, send = context.Pipe(duplex=False)

        def answers() -> Iterator[Any]:
            send.close()  # so that the child ends when its parent does
            yield None
            while True:
                given, named = receive.recv()
                yield function(*given, **named)

        made = in_child(answers)
        next(made)
        receive.close()
        return send, made

    def call(*given: Any, **named: Any) -> T:
        if multiprocessing.current_process().daemon:
            return function(*given, **named)
        send, made = children.get(os.getpid()) or children.setdefault(os.getpid(), started())
        try:
            send.send((given, named))
            answer: T = next(made)
        except BaseException as error:
            children.pop(os.getpid())[0].close()
            if isinstance(error, BrokenPipeError):
                raise LimitError("ended its process") from None
            raise
        return answer

    try:
        yield call
    finally:
        if mine := children.pop(os.getpid(), None):
            mine[0].close()
            mine[1].close()  # type: ignore[attr-defined]  # a generator


def match_in_time(
    keys: Sequence[str], texts: Sequence[str], way: Literal["fullmatch", "search"], seconds: float = MOST_SECONDS
) -> list[list[list[str | None] | None]]:
    """Match texts with `re`, in a child process: for each key and text the match and its groups, or None.

    Raises:
        PatternError: a key is malformed or too long, or all of them take longer than `seconds`.
    """
    patterns = [compile_pattern(key) for key in keys]

    def found() -> list[list[list[str | None] | None]]:
        return [[m and [m[0], *m.groups()] for m in map(getattr(p, way), texts)] for p in patterns]

    try:
        return next(in_child(lambda: [found()], seconds)) if patterns else []
    except LimitError as error:
        raise PatternError(f"{error}; write names, or a simpler pattern") from error


def _send_all(make: Callable[[], Iterable[T]], send: Connection, memory: int) -> None:
    """The child: send every item, then how it ended."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of a tokenizer are only in the parent
    with suppress(OSError, ValueError):  # without /proc or the limit, only the time is limited
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
        most = pages * resource.getpagesize() + memory  # of data: mapped files and reserved addresses are no memory
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    try:
        for item in make():
            send.send(("item", item))
        send.send(("end", None))
    except MemoryError:
        send.send(("memory", None))
    except BrokenPipeError:
        pass  # the parent stopped early
    except Exception as error:  # the parent raises it
        send.send(("error", error))
