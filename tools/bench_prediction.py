"""Compare predicted with measured times of merges on this machine, with inputs on the disk and in the page cache.

    python tools/bench_prediction.py runs/bench --params 1.1b
    python tools/bench_prediction.py runs/bench --params 7b          # 55 GB of disk, half an hour
    python tools/bench_prediction.py runs/bench --data DIR           # a data set that `bench_data.py` made

Runs `paft bench` on the disk of the work folder, then per case a prediction and merges in fresh processes. A table goes to stderr
and one JSON line to stdout. Nothing else should run on the machine meanwhile. Times are wall seconds, memory is the peak of private
memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml
from bench_data import PRESETS, make
from bench_merge import BIN, Ballast, run, settle
from bench_reference import Case
from rich.console import Console
from rich.table import Table

METHODS = ("ties", "linear", "dare_ties", "slerp", "l1_ties")
CASES = [f"{method}/{kind}" for kind in ("checkpoints", "adapters") for method in METHODS]

log = Console(stderr=True, highlight=False, width=160)


def recipe(case: Case, data: Path) -> dict[str, object]:
    """The recipe of a case; `l1_ties` keeps 90 % of the L1 norm of each delta."""
    found = case.recipe(data)
    return found | {"parameters": {"l1_mass": 0.9}} if case.method == "l1_ties" else found


def case_of(name: str) -> Case:
    """A case by its name, with the density of `bench_reference.CASES`."""
    method, _, kind = name.partition("/")
    return Case(method, kind, density={"ties": 0.2, "dare_ties": 0.5}.get(method, 1.0))


def paft_json(paft: Path, *arguments: str | Path) -> Any:
    """The JSON that a command prints."""
    done = subprocess.run([paft, *arguments, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr)
    return json.loads(done.stdout)


def measure(paft: Path, work: Path, path: Path, files: Sequence[Path], ballast: Ballast | None, *, cold: bool) -> Any:
    """One merge: seconds, and the peak of private memory."""
    settle(files, ballast, cold=cold)
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        return run([paft, "merge", path, folder / "out", "--quiet"], folder)
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
@click.option("--fill/--no-fill", default=True, help="Fill free memory before each run, see `bench_merge.Ballast`.")
def main(
    work: Path, params: str, data: Path | None, cases: Sequence[str], runs: int, seconds: float, paft: Path, fill: bool
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(work.resolve() / "cache")
    if data is None:
        data = work / params
        make(PRESETS[params], data)
    machine = paft_json(paft, "bench", "--dir", work, "--seconds", str(seconds))
    log.print(f"paft bench: {machine['rates']}")
    ballast, rows = Ballast(work) if fill else None, list[dict[str, Any]]()
    for name in cases or CASES:
        case, path = case_of(name), work / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(case, data.resolve()), sort_keys=False))
        files = [file for folder in case.folders for file in sorted((data / folder).glob("*.safetensors"))]
        measure(paft, work, path, files, ballast, cold=False)  # compiles
        predicted = paft_json(paft, "merge", path, "--dry-run")["prediction"]
        for cold in (False, True):
            took = [measure(paft, work, path, files, ballast, cold=cold) for _ in range(runs)]
            row = {
                "case": name, "cold": cold, "predicted_s": predicted["seconds" if cold else "seconds_cached"],
                "measured_s": round(min(one.seconds for one in took), 2),
                "predicted_mb": round(predicted["workers"][0]["peak_bytes"] / 1e6, 1),
                "measured_mb": round(max(one.private_bytes for one in took) / 1e6, 1),
            }  # fmt: skip
            rows.append(row)
            log.print(f"{name} {'cold' if cold else 'warm'}: {row['predicted_s']:.2f} / {row['measured_s']:.2f} s")
    show(rows)
    sys.stdout.write(json.dumps({"machine": {**machine, "folder": "", "host": ""}, "cases": rows}) + "\n")


if __name__ == "__main__":
    main()
