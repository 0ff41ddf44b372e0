"""Compare predicted with measured times and memory of merges on this machine, with inputs on the disk and in the page cache.

    python tools/bench_prediction.py runs/bench --params 1.1b
    python tools/bench_prediction.py runs/bench --params 7b          # 55 GB of disk, half an hour
    python tools/bench_prediction.py runs/bench --data DIR           # a data set that `bench_data.py` made
    python tools/bench_prediction.py runs/bench --data DIR --memory  # memory alone, on a machine that does other things too

Runs `paft bench` on the disk of the work folder, then per case a prediction and merges in fresh processes. A table goes to stderr
and one JSON line to stdout. Nothing else should run on the machine meanwhile, except with --memory. Times are wall seconds, memory is
the peak of private memory. `wide` has 24 adapters and `fp8` a quantised base, which are made in the work folder; `workers`
are two processes, whose memory is added up.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from bench_data import PRESETS, make, write_adapter
from bench_merge import BIN, Ballast, run, settle
from bench_quantised import SIZES, Moe
from bench_quantised import make as make_quantised
from bench_reference import Case
from make_layout import Llama
from rich.console import Console
from rich.table import Table

METHODS = ("ties", "linear", "dare_ties", "slerp", "l1_ties")
MORE: dict[str, dict[str, Any]] = {
    "global/checkpoints": {"parameters": {"trim_scope": "global"}},
    "global/adapters": {"parameters": {"trim_scope": "global"}},
    "wide/adapters": {},
    "core/adapters": {"space": "core", "output": {"kind": "adapter", "rank": 32}},
    "adapter/adapters": {"output": {"kind": "adapter", "rank": 32}},
    "delta/checkpoints": {"output": {"kind": "delta"}},
    "fp8/adapters": {},
    "workers/checkpoints": {},
}
"""Cases of TIES at density 0.2, with the keys that they add to its recipe."""
CASES = [*(f"{method}/{kind}" for kind in ("checkpoints", "adapters") for method in METHODS), *MORE]
WIDE = 24
WORKERS = ["--out-shard-size", "200MB"]
"""Options of a merge by two workers."""
FP8 = Moe(4, 2048, 32, 768, 64)
"""The quantised base."""

log = Console(stderr=True, highlight=False, width=160)


def recipe(name: str, data: Path, work: Path) -> tuple[dict[str, Any], list[Path]]:
    """The recipe of a case, and the folders that it reads; `l1_ties` keeps 90 % of the L1 norm of each delta."""
    method, _, kind = name.partition("/")
    case = Case(
        "ties" if name in MORE else method,
        kind,
        density={"dare_ties": 0.5, "linear": 1, "slerp": 1, "l1_ties": 1}.get(method, 0.2),
    )
    found: dict[str, Any] = dict(case.recipe(data)) | MORE.get(name, {})
    folders = [data / folder for folder in case.folders]
    if method == "l1_ties":
        found["parameters"] = {"l1_mass": 0.9}
    if method in ("wide", "fp8"):
        base, adapters = (data / "base", wide(data, work)) if method == "wide" else quantised(data, work)
        given = {"weight": 1 / len(adapters), "density": 0.2}
        found |= {
            "base_model": str(base),
            "models": [{"model": f"{base}+{one}", "parameters": given} for one in adapters],
        }
        folders = [base, *adapters]
    return found, folders


def wide(data: Path, work: Path) -> list[Path]:
    """Adapters of the data set's shape, which are made if they are not there."""
    shape = Llama(
        **{
            key: value
            for key, value in json.loads((data / "made.json").read_text()).items()
            if key in Llama.__dataclass_fields__
        }
    )
    found = [work / "wide" / f"{number}" for number in range(WIDE)]
    for folder in found:
        if not (folder / "adapter_config.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(exist_ok=True)
            write_adapter(shape, folder, 5e-4)
    return found


def quantised(data: Path, work: Path) -> tuple[Path, list[Path]]:
    """A mixture of experts in FP8 with two adapters of rank 16, which are made if they are not there."""
    small = json.loads((data / "made.json").read_text())["hidden"] < 1024
    make_quantised("fp8", SIZES["fp8", "small"] if small else FP8, work / "fp8")
    return work / "fp8" / "coded", [work / "fp8" / name for name in ("one", "two")]


def paft_json(paft: Path, *arguments: str | Path) -> Any:
    """The JSON that a command prints."""
    done = subprocess.run([paft, *arguments, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr)
    return json.loads(done.stdout)


def measure(
    paft: Path, work: Path, path: Path, files: Sequence[Path], ballast: Ballast | None, workers: int, *, cold: bool
) -> Any:
    """One merge: seconds, and the peak of private memory, of all its workers together."""
    settle(files, ballast, cold=cold)
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        command = [str(paft), "merge", str(path), str(folder / "out"), "--quiet"]
        if workers > 1:
            each = (shlex.join([*command, *WORKERS, "--worker", f"{number}/{workers}"]) for number in range(workers))
            command = ["bash", "-c", f"{' & '.join(each)} & wait"]
        return run(command, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    heads = ("case", "cache", "predicted s", "measured s", "ratio", "predicted MB", "measured MB", "ratio")
    table = Table(*heads)
    for row in rows:
        times, sizes = (row["predicted_s"], row["measured_s"]), (row["predicted_mb"], row["measured_mb"])
        pairs = [f"{value:.2f}" for one in (times, sizes) for value in (*one, one[0] / one[1])]
        table.add_row(row["case"], "cold" if row["cold"] else "warm", *pairs)
    log.print(table)


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--params", type=click.Choice(list(PRESETS)), default="1.1b", show_default=True)
@click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Use this data set.")
@click.option("--case", "cases", type=click.Choice(CASES), multiple=True, help="Only these cases.")
@click.option(
    "--runs", type=click.IntRange(1), default=1, show_default=True, help="Runs of each case; the fastest counts."
)
@click.option("--seconds", default=5.0, show_default=True, help="Longest time of each measurement of `paft bench`.")
@click.option("--paft", type=click.Path(path_type=Path), default=BIN / "paft", show_default=True)
@click.option("--memory", is_flag=True, help="Compare memory alone, without rates.")
@click.option("--fill/--no-fill", default=True, help="Fill free memory before each run, see `bench_merge.Ballast`.")
def main(
    work: Path, params: str, data: Path | None, cases: Sequence[str], runs: int, seconds: float, paft: Path, memory: bool,
    fill: bool,
) -> None:  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(work.resolve() / "cache")
    if data is None:
        data = work / params
        make(PRESETS[params], data)
    machine = {} if memory else paft_json(paft, "bench", "--dir", work, "--seconds", str(seconds))
    log.print(f"paft bench: {machine.get('rates')}")
    ballast, rows = Ballast(work) if fill and not memory else None, list[dict[str, Any]]()
    for name in cases or CASES:
        found, folders = recipe(name, data.resolve(), work.resolve())
        path, workers = work / "recipe.yaml", 2 if name.startswith("workers/") else 1
        path.write_text(yaml.safe_dump(found, sort_keys=False))
        files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
        options = [*WORKERS, "--workers", str(workers)] * (workers > 1)
        measure(paft, work, path, files, ballast, workers, cold=False)  # compiles, which takes time and memory
        predicted = paft_json(paft, "merge", path, "--dry-run", *options)["prediction"]
        for cold in (False,) if memory else (False, True):
            took = [measure(paft, work, path, files, ballast, workers, cold=cold) for _ in range(runs)]
            row = {
                "case": name, "cold": cold, "predicted_s": predicted["seconds" if cold else "seconds_cached"],
                "measured_s": round(min(one.seconds for one in took), 2),
                "predicted_mb": round(sum(one["peak_bytes"] for one in predicted["workers"]) / 1e6, 1),
                "measured_mb": round(max(one.private_bytes for one in took) / 1e6, 1),
            }  # fmt: skip
            rows.append(row)
            log.print(json.dumps(row))
    show(rows)
    sys.stdout.write(json.dumps({"machine": {**machine, "folder": "", "host": ""}, "cases": rows}) + "\n")


if __name__ == "__main__":
    main()
