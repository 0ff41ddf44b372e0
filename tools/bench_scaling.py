"""Time one worker with two threads beside two workers with one thread each, on one recipe; the bar is 10 %.

    python tools/bench_scaling.py RECIPE FOLDER [--workers 2] [--runs 3] [-- OPTION ...]

Both forms run in turn, from the start of their processes, which are started together, to the end of the last. Before each, inputs are
read, so that they are in the page cache as far as memory goes. Outputs are compared and deleted. Options after `--` go to every
`paft merge`, for example `--out-shard-size 500MB`, which makes enough files to share. Prints one JSON line: seconds of all runs, the
ratio of the medians, and the processor seconds of each form, which do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench_merge import BIN, digest, machine, settle, versions

from paft_merge import open_plan


def merged(recipe: Path, folder: Path, workers: int, threads: int, options: list[str]) -> tuple[float, float, str]:
    """Merge by so many workers: seconds, processor seconds, and the digest of the weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    used, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    common = [BIN / "paft", "merge", recipe, folder / "out", "--quiet", "--threads", str(threads), *options]
    running = [subprocess.Popen([*common, "--worker", f"{i}/{workers}"]) for i in range(workers)]
    failed = [process.wait() for process in running]
    seconds, now = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if any(failed):
        sys.exit(f"a worker failed: {failed}")
    found = digest(folder / "out")
    shutil.rmtree(folder)
    return seconds, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    own, _, passed = "\0".join(sys.argv[1:]).partition("\0--\0")
    given, options = parser.parse_args(own.split("\0")), passed.split("\0") if passed else []
    recipe, folder = given.recipe.resolve(), given.folder.resolve()
    with open_plan(recipe) as plan:
        folders = {at for model in plan.models for at in model.checkpoint.folders}
        folders |= {part.folder for model in plan.models if model.adapter for part in model.adapter.parts}
    files = sorted(path for at in folders for path in Path(at).glob("*.safetensors"))
    forms = {"one": (1, given.workers), "several": (given.workers, 1)}
    runs: dict[str, list[tuple[float, float, str]]] = {name: [] for name in forms}
    merged(recipe, folder / "run", *forms["one"], options)  # not timed: it may compile
    for _ in range(given.runs):
        for name, (workers, threads) in forms.items():
            settle(files, None, cold=False)
            runs[name].append(merged(recipe, folder / "run", workers, threads, options))
    median = {name: statistics.median(seconds for seconds, _, _ in some) for name, some in runs.items()}
    found = {
        "benchmark": "scaling",
        "date": time.strftime("%Y-%m-%d"),
        "workers": given.workers,
        "seconds": {name: [round(one[0], 2) for one in some] for name, some in runs.items()},
        "processor_s": {name: [round(one[1], 2) for one in some] for name, some in runs.items()},
        "several_over_one": round(median["several"] / median["one"], 3),
        "identical_outputs": len({one[2] for some in runs.values() for one in some}) == 1,
        "input_bytes": sum(os.stat(path).st_size for path in files),
        "machine": machine(),
        "versions": versions(),
    }
    print(json.dumps(found))
    sys.exit(not found["identical_outputs"])


if __name__ == "__main__":
    main()
