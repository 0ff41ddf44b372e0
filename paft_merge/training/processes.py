"""Train adapters in parallel: one `accelerate launch` per adapter with its own devices, port and log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paft_merge.errors import TrainError
from paft_merge.recipe.sections import beside_recipe
from paft_merge.training.schema import AdapterSpec

log = logging.getLogger(__name__)

GRACE_S = 10.0
"""Seconds between the request to stop a process and killing it."""

CPU = "cpu"

OnStep = Callable[[str, int, int, dict[str, float]], None]
"""Called with a child's adapter, step, number of steps, and logged values."""

_STEP = re.compile(r"step (\d+)/(\d+) (\{.*\})")


@dataclass(frozen=True)
class Launch:
    """The command, devices and log of one child."""

    name: str
    command: tuple[str, ...]
    devices: tuple[str, ...]
    """GPUs as in CUDA_VISIBLE_DEVICES, or `cpu` once per process."""
    log: Path
    threads: int | None = None
    """Threads of each process on a CPU."""

    @property
    def environment(self) -> dict[str, str]:
        """The child's environment variables: visible devices, threads, no progress bars, no modules of the working directory."""
        mine = {"HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
        mine["PYTHONWARNINGS"] = os.environ.get("PYTHONWARNINGS", "ignore::FutureWarning")  # of TRL
        if CPU in self.devices:  # else each process would act as the only one
            mine |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(self.threads or 1)}
            mine |= {key: os.environ[key] for key in ("OMP_NUM_THREADS",) if key in os.environ}
        elif self.devices:
            mine["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices)
        return {**os.environ, **mine}


def command_for(name: str, spec: AdapterSpec, recipe: Path, out: Path, resume: bool, port: int) -> tuple[str, ...]:
    """The `accelerate launch` command of one adapter.

    Args:
        name: The adapter.
        spec: Its section.
        recipe: The recipe's file.
        out: Folder of the adapters.
        resume: Continue an interrupted run.
        port: A free TCP port.

    Raises:
        TrainError: PROCESSES, when its `accelerate_config` does not exist.
    """
    config = ("--config_file", str(config_of(name, spec.accelerate_config, recipe))) if spec.accelerate_config else ()
    several = ("--multi_gpu",) if spec.processes > 1 and not config else ()
    return (
        sys.executable, "-m", "accelerate.commands.launch", *config, *several,
        "--num_processes", str(spec.processes), "--num_machines", "1", "--main_process_port", str(port),
        *(() if config else ("--mixed_precision", "no", "--dynamo_backend", "no")),
        "-m", "paft_merge.training.launch", str(recipe), str(out), name, *(("--resume",) if resume else ()),
    )  # fmt: skip


def config_of(name: str, given: str, recipe: Path) -> Path:
    """The file of `accelerate_config`; TrainError PROCESSES when it does not exist."""
    path = beside_recipe(given, recipe.parent)
    if path.is_file():
        return path
    fix = "write one with `accelerate config --config_file FILE`"
    raise TrainError.of("PROCESSES", f"{name}: accelerate_config", f"file {given} not found", fix)


def devices_of(given: str | None, needs: Mapping[str, int]) -> tuple[str, ...]:
    """Parse devices: `0,1` for GPUs, `cpu:4` for four CPU processes. Default: every visible GPU.

    Without a GPU the default is as many CPU processes as the largest adapter needs.

    Args:
        given: Text of `--devices`, or None.
        needs: Number of processes by adapter.

    Raises:
        TrainError: PROCESSES, when `given` is malformed, or an adapter needs more devices than there are.
    """
    if given and given.split(":")[0] == CPU:
        count = given.partition(":")[2] or "1"
        found: tuple[str, ...] = (CPU,) * int(count) if count.isdigit() else ()
    elif given:
        found = tuple(one.strip() for one in given.split(",") if one.strip().isdigit())
        found = found if len(found) == len(given.split(",")) else ()
    else:
        found = visible_gpus() or (CPU,) * max(needs.values(), default=1)
    if not found:
        raise TrainError.of(
            "PROCESSES", f"devices {given}", "not a list of devices", "write 0,1 (GPUs) or cpu:2 (processes)"
        )
    for name, count_of in needs.items():
        if count_of > len(found):
            what = f"needs {count_of} processes, but there are {len(found)} devices ({', '.join(found)})"
            raise TrainError.of("PROCESSES", name, what, "lower processes, or name more devices")
    return found


def visible_gpus() -> tuple[str, ...]:
    """The visible GPUs, as in CUDA_VISIBLE_DEVICES."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(one for one in given.split(",") if one and one != "-1")
    import torch

    return tuple(str(index) for index in range(torch.cuda.device_count()))


def free_ports(count: int) -> list[int]:
    """Find `count` different free TCP ports."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def run_all(
    needs: Mapping[str, int],
    devices: Sequence[str],
    launch: Callable[[str, tuple[str, ...]], Launch],
    on_step: OnStep | None = None,
    poll_s: float = 0.2,
) -> None:
    """Run children, as many at a time as the devices allow, and stop all of them when one fails.

    Args:
        needs: Number of devices by adapter.
        devices: All devices.
        launch: Makes the launch of an adapter on given devices.
        on_step: Called for every reported step.
        poll_s: Seconds between looks at the children.

    Raises:
        TrainError: CHILD, with the adapter that failed, its error, and its log.
    """
    waiting, free = dict(needs), list(devices)
    running: list[Child] = []
    try:
        while waiting or running:
            for name in [name for name in waiting if waiting[name] <= len(free)]:
                if waiting[name] <= len(free):
                    mine, free = tuple(free[: waiting[name]]), free[waiting.pop(name) :]
                    running.append(Child(launch(name, mine)))
            for child in list(running):
                ended = child.process.poll() is not None
                child.listen(on_step)
                if ended:
                    running.remove(child)
                    free += child.how.devices
                    child.check()
            time.sleep(poll_s)
    finally:
        stop([child.process for child in running])


class Child:
    """A running child, and the errors in its log."""

    def __init__(self, how: Launch) -> None:
        log.info("%s: starting on %s, log in %s", how.name, ",".join(how.devices), how.log)
        self.how = how
        self.read = how.log.stat().st_size if how.log.exists() else 0
        self.error = ""
        with how.log.open("ab") as sink:
            # In a new session, so that Ctrl-C reaches it only through `stop`.
            self.process = subprocess.Popen(
                how.command, stdout=sink, stderr=subprocess.STDOUT, env=how.environment, start_new_session=True
            )

    def listen(self, on_step: OnStep | None) -> None:
        """Read the complete lines since the last call: report steps, and keep the first error."""
        with self.how.log.open("rb") as source:
            source.seek(self.read)
            new = source.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            if (step := _STEP.fullmatch(line)) and on_step:
                on_step(self.how.name, int(step[1]), int(step[2]), json.loads(step[3]))
            self._keep(line.strip())

    def _keep(self, line: str) -> None:
        ours = ("TrainError: ", "RecipeError: ")
        theirs = re.match(r"(\[rank\d+\]: )?[\w.]*Error: ", line) and "ChildFailedError" not in line
        if self.error.startswith(ours):
            return  # errors of other processes follow from it
        if line.startswith(ours) or (theirs and not self.error):
            self.error = line

    def check(self) -> None:
        """Raise TrainError CHILD unless the exit code is 0."""
        code = self.process.returncode
        if code:
            what = f"training ended with exit code {code}" + (f": {self.error[:300]}" if self.error else "")
            raise TrainError.of("CHILD", self.how.name, what, f"see {self.how.log}")


def stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminate children and their descendants, and after `GRACE_S` kill those that still run.

    torch starts every worker in a new session, so descendants are found by their parents and not by process group.
    """
    import psutil

    family: list[psutil.Process] = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already
            family += psutil.Process(child.pid).children(recursive=True)
    for one in (*children, *family):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    _, left = psutil.wait_procs(family, timeout=max(0.5, deadline - time.monotonic()))
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=GRACE_S)


def step_printer(say: Callable[[str], Any], every_s: float = 1.0) -> Callable[[Any], None]:
    """Write progress as lines that `Child.listen` reads: every log, the last step, and other steps at most every second."""
    last = [0.0]

    def progress(now: Any) -> None:
        if now.logs or now.step == now.steps or time.monotonic() - last[0] >= every_s:
            last[0] = time.monotonic()
            say(f"step {now.step}/{now.steps} {json.dumps(_plain(now.logs.items()))}\n")

    return progress


def _plain(logs: Iterable[tuple[str, Any]]) -> dict[str, float]:
    """The finite numbers among the logged values: JSON has no others."""
    return {key: float(f"{value:.6g}") for key, value in logs if isinstance(value, int | float) and value - value == 0}
