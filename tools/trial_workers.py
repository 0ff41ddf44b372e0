"""Merge tiny models by workers that are killed, stopped, doubled and set to other times at random, and compare every byte.

python tools/trial_workers.py FOLDER [--kills 50] [--case NAME ...] [--workers 3] [--seed 1]

Per case: merges by several workers, one after another, until that many SIGKILLs have hit workers at random moments. A killed
worker is started again. In between a worker is stopped for longer than its lease and then continued, a second process gets a
number that is in use, the clock of some workers is an hour off, and so are the times of the files by which workers show that
they live. Prints one line a case; the exit status is 1 if a merge ended in other bytes, left something, did not end, or if a
worker failed with anything but an error of one line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from bench_data import Llama, make

from paft_merge import MergeOptions, PaftMergeError, merge
from paft_merge.output.folder import Output
from paft_merge.output.placing import WORKERS, part_of

SHAPE = Llama(64, 96, 6, 4, 2, 256)
LEASE_S = 1.0
LIMIT_S = 120.0
"""After which a merge counts as one that does not end."""

Recipe = dict[str, Any]


def cases(data: Path) -> dict[str, list[Recipe]]:
    """The documents of each case."""
    base, adapters = str(data / "base"), [f"{data / 'base'}+{data / name}" for name in ("sft_lora", "dpo_lora")]
    tuned = [str(data / name) for name in ("sft", "dpo")]

    def of(method: str, sources: list[str], own: Recipe, **more: Any) -> Recipe:
        models = [{"model": source, **({"parameters": own} if own else {})} for source in sources]
        return {"merge_method": method, "base_model": base, "models": models, **more}

    trimmed, everywhere = {"weight": 0.5, "density": 0.4}, {"parameters": {"trim_scope": "global"}}
    stochastic = {"rounding": "stochastic", "seed": 7}
    inner = of("ties", adapters, trimmed, name="inner", **everywhere)
    outer = {**of("slerp", ["inner"], {}, parameters={"t": 0.3}), "base_model": tuned[0]}
    layers = [
        {"sources": [{"model": source, "layer_range": span}]}
        for source, span in zip(tuned, ([0, 4], [2, 6]), strict=True)
    ]
    return {
        "ties/checkpoints": [of("ties", tuned, trimmed)],
        "ties/adapters": [of("ties", adapters, trimmed)],
        "ties-global/checkpoints": [of("ties", tuned, trimmed, **everywhere)],
        "ties-global/adapters": [of("ties", [tuned[0], *adapters], trimmed, **everywhere)],
        "dare-stochastic/checkpoints": [of("dare_ties", tuned, trimmed, **stochastic)],
        "dare-stochastic/adapters": [of("dare_ties", adapters, trimmed, **stochastic)],
        "slerp/checkpoints": [of("slerp", tuned[:1], {}, parameters={"t": 0.4})],
        "slices/checkpoints": [{"merge_method": "passthrough", "slices": layers}],
        "documents/mixed": [inner, outer],
    }


def digest(folder: Path) -> str:
    """One digest of the names and bytes of all files of a folder."""
    state = xxhash.xxh3_128()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            state.update(f"{path.relative_to(folder)}\0".encode())
            state.update(path.read_bytes())
    return state.hexdigest()


def in_fork(work: Callable[[], Any], log: Path) -> int:
    """Start a function in a fork, whose stderr goes to the end of a file; its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    with log.open("a", buffering=1) as said:
        os.dup2(said.fileno(), 2)
        try:
            work()
            status = 0
        except PaftMergeError as error:
            said.write(f"{error}\n")
        except BaseException as error:
            said.write(f"UNEXPECTED {error!r}\n")
    os._exit(status)


class Trial:
    """Merges of one recipe by workers that are disturbed."""

    def __init__(self, recipe: Path, folder: Path, whole: str, workers: int, chance: random.Random) -> None:
        self.recipe, self.folder, self.whole, self.workers, self.chance = recipe, folder, whole, workers, chance
        self.log, self.events, self.faults = folder / "log", Counter[str](), list[str]()
        self.running: dict[int, int] = {}
        """Number of a worker to its process."""

    def start(self, index: int, *, slow: float) -> int:
        """Start a worker, which takes `slow` seconds longer for each tensor."""
        clock = self.chance.choice((0.0, 0.0, 3600.0, -3600.0))

        def work() -> None:
            finish, now = Output.finish_tensor, time.time

            def slowly(self: Output, finished: Any) -> None:
                time.sleep(slow)
                finish(self, finished)

            Output.finish_tensor = slowly  # type: ignore[method-assign]
            time.time = lambda: now() + clock
            options = MergeOptions(
                worker=f"{index}/{self.workers}",
                threads=1,
                lease_seconds=LEASE_S,
                out_shard_bytes=60_000,
                warn=lambda _: None,
            )
            merge(self.recipe, self.out, options)

        return in_fork(work, self.log)

    def merged(self) -> None:
        """One merge, from its first worker to its last."""
        self.events["merges"] += 1
        self.out = self.folder / f"out{self.events['merges']}"
        self.running, began = {i: self.start(i, slow=0.004) for i in range(self.workers)}, time.monotonic()
        disturbed = self.chance.randrange(4, 12)
        while self.running:
            if time.monotonic() - began > LIMIT_S:
                self.faults.append(f"{self.out.name} did not end in {LIMIT_S:g} s")
                for process in self.running.values():
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                return
            time.sleep(self.chance.uniform(0, 0.15))
            self.reap()
            if disturbed and self.running:
                disturbed -= 1
                self.disturb()
        if not self.out.is_dir() or digest(self.out) != self.whole:
            self.faults.append(f"{self.out.name} has other bytes")
        if part_of(self.out).exists():
            self.faults.append(f"{part_of(self.out).name} was left")
        shutil.rmtree(self.out, ignore_errors=True)

    def disturb(self) -> None:
        """Do something bad to a random worker."""
        index = self.chance.choice(sorted(self.running))
        what = self.chance.choices(("kill", "stop", "double", "time"), (8, 1, 1, 1))[0]
        self.events[what] += 1
        process = self.running[index]
        if what == "kill":
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            self.running[index] = self.start(index, slow=0.004)
        elif what == "stop":
            os.kill(process, signal.SIGSTOP)
            time.sleep(1.5 * LEASE_S)
            os.kill(process, signal.SIGCONT)
        elif what == "double":
            second = self.start(index, slow=0.004)
            status = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
            self.events["double refused"] += status == 1
        else:
            for beat in (part_of(self.out) / WORKERS / "leases").glob("*.beat"):
                with suppress(OSError):
                    os.utime(beat, (0, time.time() + self.chance.choice((-3600, 3600))))

    def reap(self) -> None:
        """Forget workers that have ended; one that failed with BUSY lost its number to a second process, others may not fail."""
        for index, process in list(self.running.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                del self.running[index]
                if os.waitstatus_to_exitcode(status):
                    self.events["ended with an error"] += 1

    def errors(self) -> Iterator[str]:
        """Lines of workers that are not an expected error."""
        known = r"is at work already|took its number|was taken for dead"
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            if not re.search(known, line):
                yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, failed = options.folder.resolve(), False
    make(SHAPE, folder / "data")
    for name, documents in cases(folder / "data").items():
        if options.case and name not in options.case:
            continue
        place = folder / name.replace("/", "-")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        recipe = place / "recipe.yaml"
        recipe.write_text("\n---\n".join(json.dumps(document) for document in documents))
        merge(recipe, place / "whole", threads=1, out_shard_bytes=60_000)  # here, so that every fork has the kernels
        trial = Trial(recipe, place, digest(place / "whole"), options.workers, random.Random(f"{name} {options.seed}"))
        began = time.monotonic()
        while trial.events["kill"] < options.kills and not trial.faults:
            trial.merged()
        faults = [*trial.faults, *trial.errors()]
        failed |= bool(faults)
        row = {"case": name, **trial.events, "seconds": round(time.monotonic() - began), "faults": faults[:5]}
        print(json.dumps(row), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
