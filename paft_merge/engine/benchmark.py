"""Measures the rates of this machine, on which the time of a merge depends, in half a minute."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from mmap import mmap
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, thread_time

import numpy as np

from paft_merge.compute.blocks import Block, Election, KeepThreshold
from paft_merge.compute.cores import available_cores
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.kernels import multiply
from paft_merge.compute.kernels.block_source import PIECE, packed
from paft_merge.engine.machine import Machine, Rates
from paft_merge.errors import OutputError
from paft_merge.output.direct_io import PageAlignedBuffer
from paft_merge.output.shards import Shard, ShardWriter, plan_shards
from paft_merge.output.versions import version_of

SECONDS, BYTES = 5.0, 4 << 30
"""Most seconds of each measurement, and most bytes of the file that is written and read."""

_BLOCK, _READ = 4 << 20, 2 * PIECE
"""Bytes written at a time, a merged tile of bfloat16, and bytes read at a time, a piece of one."""

_CACHED = 256 << 20
"""Bytes of each core that are read again and again from the page cache."""

_RANK, _ROWS, _COLUMNS = 32, 256, 4096
"""Sizes of the low-rank product."""

_REFERENCE = 1.3
"""Nanoseconds that the reference machine takes for an entry of the loop that is measured."""

_REPEATS = 16
"""Loops between two looks at the clock."""


def measure(folder: Path, *, nbytes: int = BYTES, limit: float = SECONDS) -> Machine:
    """Measure the disk of `folder`, and the cores of this machine with all of them at work.

    Args:
        folder: an existing folder; a temporary file is written into it.
        nbytes: most bytes of that file.
        limit: most seconds of each of the five measurements.

    Raises:
        OutputError: the file cannot be written.
    """
    cores = available_cores()
    nbytes = min(nbytes, shutil.disk_usage(folder).free // 2) // _BLOCK * _BLOCK
    if nbytes < _BLOCK:
        what = f"has room for less than {2 * _BLOCK:,} bytes"
        raise OutputError.of("DISK", folder, what, "free space, or measure another folder")
    with TemporaryDirectory(prefix=".paft-bench-", dir=folder) as made, ThreadPoolExecutor(cores) as pool:
        shards = plan_shards({"model.safetensors": [("weight", "U8", (nbytes,))]})
        written, write = _writing(Path(made), shards, nbytes, limit)
        with (Path(made) / "model.safetensors").open("rb") as file:
            read, cached = _reading(file.fileno(), written, limit, cores, pool)
        kernels = [_each(pool, cores, limit, make) for make in (_product, _election)]
    rates = Rates(
        read_gbps=read, write_gbps=write, cached_gbps=cached, gflops=kernels[0], loops=kernels[1],
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
    )  # fmt: skip
    known = {name: float(f"{value:.4g}") for name, value in rates.model_dump().items()}
    return Machine(
        version=version_of("paft-merge"), host=platform.node() or "localhost", cores=cores, measured=date.today(),
        folder=str(folder.resolve()), rates=Rates(**known),
    )  # fmt: skip


def _writing(folder: Path, shards: Sequence[Shard], nbytes: int, limit: float) -> tuple[int, float]:
    """Write a file as a merge does. Returns the bytes and GB/s, until they are durable."""
    values = np.random.default_rng(0).integers(0, 256, _BLOCK, np.uint8)
    buffers = [PageAlignedBuffer() for _ in range(4)]
    with ShardWriter(folder, shards) as writer:
        begun, at = perf_counter(), 0
        while at < nbytes and (at == 0 or perf_counter() - begun < limit):
            buffer = buffers[at // _BLOCK % len(buffers)]
            block = buffer.array(_BLOCK, writer.offset("weight", at))
            np.copyto(block, values)
            writer.write("weight", at, block, buffer)
            at += _BLOCK
        writer.finish()
        return at, at / (perf_counter() - begun) / 1e9


def _reading(fd: int, nbytes: int, limit: float, cores: int, pool: ThreadPoolExecutor) -> tuple[float, float]:
    """Read a file of `nbytes` bytes from the disk, by all cores. Returns GB/s, and those of one core from the page cache."""
    os.fsync(fd)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    begun, part = perf_counter(), nbytes // cores

    def walk(core: int) -> int:
        held, at = mmap(-1, _READ), core * part
        while at == core * part or (at < (core + 1) * part and perf_counter() - begun < limit):
            at += os.preadv(fd, [held], at)
        return at - core * part

    count = sum(pool.map(walk, range(cores)))
    from_disk = count / (perf_counter() - begun) / 1e9

    def again(core: int) -> Callable[[], float]:
        held, size = mmap(-1, _READ), min(part, _CACHED)
        return lambda: sum(os.preadv(fd, [held], core * part + at) for at in range(0, size, _READ)) / 1e9

    return from_disk, _each(pool, cores, limit, again)


def _each(pool: ThreadPoolExecutor, cores: int, limit: float, make: Callable[[int], Callable[[], float]]) -> float:
    """The amount of work a second of processor of one core, while all cores work.

    Args:
        pool, cores: one thread a core.
        limit: most seconds.
        make: from the number of a core, a function that works and returns how much it did.
    """

    def run(core: int) -> float:
        work = make(core)
        work()  # compiles, and brings data into the caches
        begun, used, done = perf_counter(), thread_time(), 0.0
        while not done or perf_counter() - begun < limit:
            done += work()
        return done / max(thread_time() - used, 1e-9)

    return statistics.fmean(pool.map(run, range(cores)))


def _product(core: int) -> Callable[[], float]:
    """A low-rank product: GFLOP."""
    random = np.random.default_rng(core)
    left, right = (random.standard_normal(shape, np.float32) for shape in ((_ROWS, _RANK), (_RANK, _COLUMNS)))
    panels, out = packed(right), np.empty((_ROWS, _COLUMNS), np.float32)

    def work() -> float:
        multiply(left, panels, out)
        return 2e-9 * _RANK * out.size

    return work


def _election(core: int) -> Callable[[], float]:
    """The loop of TIES over two bfloat16 sources: seconds that it takes on the reference machine."""
    random, ops = np.random.default_rng(core), CpuOps()
    values = random.normal(0, 0.02, (3, PIECE)).astype(np.float32).view(np.uint32) >> np.uint32(16)
    base, *sources = values.astype(np.uint16)
    block, out = Block(0, base, np.stack(sources), subtract=True), np.empty(PIECE, np.uint16)
    survivals, election = [KeepThreshold(low=0x3C000000)] * 2, Election((0.5, 0.3))

    def work() -> float:
        for _ in range(_REPEATS):
            ops.consensus(block, out, survivals, election, 0)
        return 1e-9 * _REFERENCE * PIECE * _REPEATS

    return work
