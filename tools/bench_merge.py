"""Time `paft merge` beside mergekit and beside plainly reading and writing the same bytes, and check what it wrote.

    python tools/bench_merge.py runs/bench                                    # all ten cases, 1.1 B parameters: an hour
    python tools/bench_merge.py runs/bench --params tiny                      # does the script work? a few minutes
    python tools/bench_merge.py runs/bench --case ties/adapters --runs 9 --mergekit-runs 0
    python tools/bench_merge.py runs/bench --params 1.1b --layers 44          # does memory grow with the model?

The first run makes the data set (`bench_data.py`); later ones find it in the work folder. Per case there is one run
that is not timed, whose output is compared with a float64 reference (`bench_reference.py`) and which pays for numba's
compilation; then rounds of plain copy, paft and mergekit in turn, each a fresh process on the same recipe file, with
inputs in the page cache (or, with --cold, out of it). Outputs are deleted at once; all outputs of paft must be the same
bytes. A table goes to stderr and one JSON line to stdout, and after every case to `measured.json` in the work folder, so
that a run that is cut short has measured something. Nothing else should run on the machine meanwhile.

Seconds are wall time from the start of the process to its end. Private memory is the peak of RssAnon + RssShmem of the
process and its children, 50 times a second: the page cache does not count. Scratch is the peak of bytes on disk beside
the output. Plain is one thread that reads every input and writes a file as large as the output; durable is the same with an
fsync at the end, as every merge of ours ends and none of mergekit's.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

import click
import torch
import xxhash
import yaml
from bench_data import PRESETS, Llama, make
from bench_reference import CASES, Case, Check, check
from rich.console import Console
from rich.table import Table

BLOCK = 4 << 20
SAMPLE_S = 0.02
SCAN_S = 0.5
"""Between two looks for new child processes and at scratch files."""
BIN = Path(sys.executable).parent
VERSIONS = ("torch", "numpy", "numba", "safetensors", "transformers", "peft", "mergekit", "paft-merge")
FREE_BYTES = 300 << 20
"""What `Ballast` leaves free."""

log = Console(stderr=True, highlight=False, width=160)


# ---------------------------------------------------------------------------------------------------------------
# One process


@dataclass(frozen=True)
class Run:
    """What one process took."""

    seconds: float
    private_bytes: int
    scratch_bytes: int


class Watch(threading.Thread):
    """Samples a process's private memory, and the scratch files in a folder, until `stop` is set."""

    def __init__(self, pid: int, folder: Path) -> None:
        super().__init__(daemon=True)
        self.pid, self.folder = pid, folder
        self.private_bytes = self.scratch_bytes = 0
        self.stop = threading.Event()

    def run(self) -> None:
        """Take samples."""
        family, scanned = [self.pid], time.monotonic()
        while not self.stop.wait(SAMPLE_S):
            if time.monotonic() - scanned > SCAN_S:
                family = descendants(self.pid)
                self.scratch_bytes = max(self.scratch_bytes, scratch(self.folder))
                scanned = time.monotonic()
            self.private_bytes = max(self.private_bytes, sum(map(private, family)))


def private(pid: int) -> int:
    """Bytes of anonymous and shared memory that a process holds; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue
    return found


def scratch(folder: Path) -> int:
    """Bytes of the files under `folder` that are not the output."""
    total = 0
    for path in folder.iterdir():
        if not path.name.startswith("out") and path.name != "log":
            total += disk_bytes(path)
    return total


def disk_bytes(folder: Path) -> int:
    """Bytes of all files under `folder`, which another process may be changing."""
    total = 0
    for path in (folder, *folder.rglob("*")):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


class CommandError(Exception):
    """A program ended with an error; the message is the end of its output."""


def run(command: Sequence[str | Path], folder: Path, limit_s: float | None = None) -> Run:
    """Run a command whose scratch goes to `folder`, and measure it; kill it after `limit_s`."""
    (folder / "tmp").mkdir(exist_ok=True)
    env = os.environ | {"TMPDIR": str(folder / "tmp"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # a checkout has its modules compiled, as an installed package has
    with (folder / "log").open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=env)
        watch = Watch(process.pid, folder)
        watch.start()
        try:
            status = process.wait(limit_s)
        finally:
            process.kill()
            watch.stop.set()
        seconds = time.perf_counter() - start
    watch.join()
    if status:
        raise CommandError((folder / "log").read_text(errors="replace")[-2000:])
    return Run(seconds, watch.private_bytes, max(watch.scratch_bytes, scratch(folder)))


# ---------------------------------------------------------------------------------------------------------------
# The state of the machine before a run


class Ballast:
    """Keeps free memory in the page cache, by reading ever new holes of a nameless sparse file.

    The host of a virtual machine may take free memory back within seconds, and gives it out again ten times slower than
    memory is written; a run would then measure the host. Pages of the page cache stay, and the kernel reuses them for
    whoever needs memory, as on any machine that has been up for a while. Each is read once, so that the kernel
    drops it before the inputs, which are read again and again.
    """

    def __init__(self, folder: Path) -> None:
        self.fd = os.open(folder, os.O_TMPFILE | os.O_RDWR)
        os.ftruncate(self.fd, 1 << 43)
        self.at = 0

    def fill(self) -> None:
        """Read until little memory is free."""
        end = self.at + meminfo("MemTotal")
        buffer = mmap.mmap(-1, BLOCK)
        while self.at < end and meminfo("MemFree") > FREE_BYTES:
            for _ in range(16):
                self.at += os.preadv(self.fd, [buffer], self.at)


def settle(files: Sequence[Path], ballast: Ballast | None, *, cold: bool) -> None:
    """Write back what earlier runs left, then bring the inputs into the page cache, or put them out of it."""
    os.sync()
    if ballast:
        ballast.fill()
    buffer = mmap.mmap(-1, BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.readinto(buffer):
                    pass


def meminfo(key: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def plain(files: Sequence[Path], written: int, out: Path) -> tuple[float, float]:
    """Seconds to read `files` and write `written` bytes side by side, without and with an fsync at the end."""
    buffer = mmap.mmap(-1, BLOCK)
    sizes = [path.stat().st_size for path in files]
    start = time.perf_counter()
    sources = [os.open(path, os.O_RDONLY) for path in files]
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for at in range(0, max(written, *sizes), BLOCK):
        for source, size in zip(sources, sizes, strict=True):
            if at < size:
                os.preadv(source, [buffer], at)
        if at < written:
            os.pwrite(target, memoryview(buffer)[: min(BLOCK, written - at)], at)
    seconds = time.perf_counter() - start
    os.fsync(target)
    synced = time.perf_counter() - start
    for fd in (*sources, target):
        os.close(fd)
    out.unlink()
    return seconds, synced


# ---------------------------------------------------------------------------------------------------------------
# One case


@dataclass
class Result:
    """Everything measured in one case."""

    case: Case
    read_bytes: int
    written_bytes: int
    plain: list[float] = field(default_factory=list)
    plain_fsync: list[float] = field(default_factory=list)
    paft: list[Run] = field(default_factory=list)
    mergekit: list[Run] = field(default_factory=list)
    paft_check: Check | None = None
    mergekit_check: Check | None = None
    mergekit_failed: str = ""
    digests: set[str] = field(default_factory=set)

    @property
    def passed(self) -> bool:
        """Whether paft's output was right and, each time, the same."""
        return len(self.digests) <= 1 and (self.paft_check is None or self.paft_check.passed)

    def report(self) -> dict[str, object]:
        """For the JSON line."""
        moved = self.read_bytes + self.written_bytes
        return {
            "case": str(self.case),
            "recipe": self.case.recipe(Path()),
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "plain": spread(self.plain) | {"gb_per_s": rate(moved, self.plain)},
            "plain_fsync_s": median(self.plain_fsync),
            "paft": summary(self.paft, moved) | {"check": self.paft_check and self.paft_check.report(self.case)},
            "mergekit": summary(self.mergekit, moved)
            | {"check": self.mergekit_check and self.mergekit_check.report(self.case)}
            | ({"failed": self.mergekit_failed} if self.mergekit_failed else {}),
            "identical_outputs": len(self.digests) <= 1,
            "mergekit_over_paft": ratio(self.mergekit, self.paft),
            "paft_over_plain": over(median(seconds(self.paft)), median(self.plain)),
            "paft_over_plain_fsync": over(median(seconds(self.paft)), median(self.plain_fsync)),
        }


def seconds(runs: Sequence[Run]) -> list[float]:
    """The wall times."""
    return [run.seconds for run in runs]


def median(values: Sequence[float]) -> float | None:
    """The median, None of nothing."""
    return statistics.median(values) if values else None


def over(top: float | None, bottom: float | None) -> float | None:
    """A ratio, None when a side was not measured."""
    return round(top / bottom, 3) if top and bottom else None


def ratio(slow: Sequence[Run], fast: Sequence[Run]) -> float | None:
    """How many times the median of `slow` is that of `fast`."""
    return over(median(seconds(slow)), median(seconds(fast)))


def rate(moved: int, values: Sequence[float]) -> float | None:
    """GB read and written per second, at the median."""
    return over(moved / 1e9, median(values))


def spread(values: Sequence[float]) -> dict[str, object]:
    """Median, extremes and all values, in seconds."""
    if not values:
        return {"runs": 0}
    rounded = [round(v, 4) for v in values]
    return {
        "runs": len(values),
        "median_s": statistics.median(rounded),
        "min_s": min(rounded),
        "max_s": max(rounded),
        "all_s": rounded,
    }


def summary(runs: Sequence[Run], moved: int) -> dict[str, object]:
    """Times, rate, and the peaks over all runs."""
    if not runs:
        return {"runs": 0}
    return spread(seconds(runs)) | {
        "gb_per_s": rate(moved, seconds(runs)),
        "private_mb": round(max(run.private_bytes for run in runs) / 1e6, 1),
        "scratch_bytes": max(run.scratch_bytes for run in runs),
    }


@dataclass(frozen=True)
class Bench:
    """Where things lie and how often to run."""

    data: Path
    work: Path
    paft: Path
    mergekit: Path
    runs: int
    mergekit_runs: int
    cold: bool
    ballast: Ballast | None

    @contextmanager
    def fresh(self) -> Iterator[Path]:
        """An empty folder for one run, deleted after it."""
        folder = self.work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def measure(self, case: Case) -> Result:
        """Run one case from the untimed pass to the last round."""
        recipe = self.work / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(case.recipe(self.data), sort_keys=False))
        files = [path for folder in case.folders for path in sorted((self.data / folder).glob("*.safetensors"))]
        result = Result(case, sum(f.stat().st_size for f in files), disk_bytes_of_weights(self.data / "base"))
        if self.runs:
            settle(files, self.ballast, cold=False)
            self.run_paft(recipe, result, timed=False)
            plain(files, result.written_bytes, self.work / "plain")
        for i in range(max(self.runs, self.mergekit_runs)):
            if i < self.runs:
                settle(files, self.ballast, cold=self.cold)
                once, synced = plain(files, result.written_bytes, self.work / "plain")
                result.plain.append(once)
                result.plain_fsync.append(synced)
                settle(files, self.ballast, cold=self.cold)
                self.run_paft(recipe, result, timed=True)
            if i < self.mergekit_runs:
                settle(files, self.ballast, cold=self.cold)
                self.run_mergekit(recipe, result)
        return result

    def run_paft(self, recipe: Path, result: Result, *, timed: bool) -> None:
        """One run of ours; the untimed one is compared with the reference, each timed one with it."""
        with self.fresh() as folder:
            try:
                done = run([self.paft, "merge", recipe, folder / "out", "--quiet"], folder)
            except CommandError as error:
                raise click.ClickException(f"paft failed on {result.case}:\n{error}") from error
            result.digests.add(digest(folder / "out"))
            if timed:
                result.paft.append(done)
                log.print(f"  paft {done.seconds:.2f} s")
            else:
                result.paft_check = check(result.case, self.data, folder / "out", exact_trim=True)

    def run_mergekit(self, recipe: Path, result: Result) -> None:
        """One run of mergekit; a case it cannot do is noted."""
        with self.fresh() as folder:
            command: list[str | Path] = [
                self.mergekit,
                recipe,
                folder / "out",
                "--lora-merge-cache",
                folder / "cache",
                "--quiet",
            ]
            try:
                done = run([*command, "--copy-tokenizer"], folder)
            except CommandError as error:
                result.mergekit_failed = str(error).strip().splitlines()[-1]
                log.print(f"  mergekit failed: {result.mergekit_failed}")
                return
            result.mergekit.append(done)
            log.print(f"  mergekit {done.seconds:.2f} s")
            if result.mergekit_check is None:
                result.mergekit_check = check(result.case, self.data, folder / "out", exact_trim=False)


def disk_bytes_of_weights(folder: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def digest(folder: Path) -> str:
    """One digest of all weight files of a checkpoint, names included."""
    state = xxhash.xxh3_128()
    buffer = bytearray(BLOCK)
    for path in sorted(folder.glob("*.safetensors")):
        state.update(path.name.encode())
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                state.update(memoryview(buffer)[:count])
    return state.hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# The report


def is_virtual() -> bool:
    """Whether a hypervisor runs this machine."""
    return " hypervisor" in Path("/proc/cpuinfo").read_text()


def machine() -> dict[str, object]:
    """The hardware, in words and numbers."""
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(meminfo("MemTotal") / 1e9, 1),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str | None]:
    """The versions that matter, and the commit when there is one."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found | {"commit": described.stdout.strip() or None}


def table(results: Sequence[Result]) -> Table:
    """The results for people."""
    shown = Table(title="Seconds: median ± half the range. MB: private memory, peak.")
    for column in (
        "case",
        "plain",
        "durable",
        "paft",
        "x plain",
        "x durable",
        "MB",
        "right",
        "mergekit",
        "x paft",
        "MB",
        "scratch GB",
    ):
        shown.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
    for result in results:
        moved = result.read_bytes + result.written_bytes
        ours, theirs = summary(result.paft, moved), summary(result.mergekit, moved)
        shown.add_row(
            str(result.case),
            times(result.plain),
            times(result.plain_fsync),
            times(seconds(result.paft)),
            text(over(median(seconds(result.paft)), median(result.plain))),
            text(over(median(seconds(result.paft)), median(result.plain_fsync))),
            text(ours.get("private_mb")),
            "-" if result.paft_check is None else "yes" if result.passed else "NO",
            "fails" if result.mergekit_failed else times(seconds(result.mergekit)),
            text(ratio(result.mergekit, result.paft)),
            text(theirs.get("private_mb")),
            f"{max((r.scratch_bytes for r in result.mergekit), default=0) / 1e9:.2f}",
        )
    return shown


def times(values: Sequence[float]) -> str:
    """Median, and how far the extremes are apart."""
    return f"{statistics.median(values):.2f} ±{(max(values) - min(values)) / 2:.2f}" if values else "-"


def text(value: object) -> str:
    """A cell; a dash for what was not measured."""
    return "-" if value is None else str(value)


def report(results: Sequence[Result], shape: Llama, params: str, *, cold: bool, filled: bool) -> dict[str, object]:
    """The JSON line."""
    return {
        "benchmark": "merge",
        "date": time.strftime("%Y-%m-%d"),
        "params": params,
        "layers": shape.layers,
        "parameters": shape.parameters,
        "page_cache": "cold" if cold else "warm",
        "free_memory_filled": filled,
        "machine": machine(),
        "versions": versions(),
        "cases": [result.report() for result in results],
    }


def room_needed(shape: Llama, data: Path) -> int:
    """Bytes of disk: the data set unless it is there, and the output beside mergekit's two merged adapters."""
    checkpoint = 2 * shape.parameters
    return (0 if (data / "made.json").exists() else 4 * checkpoint) + 4 * checkpoint


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--params", type=click.Choice(list(PRESETS)), default="1.1b", show_default=True, help="Shape of the model."
)
@click.option("--layers", type=click.IntRange(1), help="Another number of layers than the shape has.")
@click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, help="Only this; may be repeated.")
@click.option("--runs", type=click.IntRange(0), default=5, show_default=True, help="Timed runs of paft and plain.")
@click.option("--mergekit-runs", type=click.IntRange(0), default=1, show_default=True, help="Timed runs of mergekit.")
@click.option("--cold", is_flag=True, help="Put the inputs out of the page cache before each timed run.")
@click.option("--fill/--no-fill", default=is_virtual, help="Fill free memory first [on virtual machines].")
@click.option("--make-only", is_flag=True, help="Make the data set and stop.")
@click.option("--paft", type=click.Path(path_type=Path), default=BIN / "paft", help="The paft to time [this Python's].")
@click.option("--mergekit", type=click.Path(path_type=Path), default=BIN / "mergekit-yaml", help="Likewise.")
def main(
    work: Path,
    params: str,
    layers: int | None,
    cases: tuple[str, ...],
    runs: int,
    mergekit_runs: int,
    cold: bool,
    fill: bool,
    make_only: bool,
    paft: Path,
    mergekit: Path,
) -> None:
    """Run the benchmark."""
    work = work.resolve()
    if set("+@ ") & set(str(work)):
        raise click.UsageError(f"{work}: a path with '+', '@' or a space cannot be written in a recipe; choose another")
    shape = replace(PRESETS[params], layers=layers or PRESETS[params].layers)
    data = work / (f"{params}-{layers}" if layers else params)
    work.mkdir(parents=True, exist_ok=True)
    needed, free = room_needed(shape, data), shutil.disk_usage(work).free
    if needed > free:
        raise click.ClickException(f"{work}: needs {needed / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free")
    if make(shape, data):
        log.print(f"made {data}: {shape.parameters:,} parameters")
    if make_only:
        return
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    ballast = Ballast(work) if fill else None
    bench = Bench(data, work, paft, mergekit, runs, mergekit_runs, cold, ballast)
    results = []
    for name in cases or CASES:
        log.print(name)
        results.append(bench.measure(CASES[name]))
        line = json.dumps(report(results, shape, params, cold=cold, filled=fill))
        (work / "measured.json").write_text(f"{line}\n")
    log.print(table(results))
    click.echo(line)
    if not all(result.passed for result in results):
        raise click.ClickException("paft's output is wrong; see `check` and `identical_outputs` in the JSON line")


if __name__ == "__main__":
    main()
