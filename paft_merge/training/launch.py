"""All adapters of a recipe: one after another on one base in memory, or one process each on GPUs of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paft_merge.errors import Problem, RecipeError, TrainError
from paft_merge.training.spec import AdapterSpec, Where, did_you_mean, dotted, read_adapters

if TYPE_CHECKING:
    from paft_merge.training.callbacks import Progress

log = logging.getLogger(__name__)

Schedule = Literal["auto", "sequential", "processes"]

GRACE_S = 10.0
"""How long a process that is told to stop may take before it is killed."""


def train(
    recipe: Mapping[str, Any] | Path | str,
    out: Path | str,
    *,
    adapters: Sequence[str] | None = None,
    resume: bool = False,
    schedule: Schedule = "auto",
    base: Any = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Path]:
    """Train adapters of a recipe, each into `out/<name>`; returns the folders by name.

    Args:
        recipe: A PAFT recipe: a file, or the mapping it holds (`base_model`, `adapters`).
        out: Folder of the adapters.
        adapters: Names to train; all by default.
        resume: Leave finished adapters alone and go on with interrupted ones.
        schedule: `sequential`: one after another, one base in memory. `processes`: one `accelerate launch` per adapter,
            as many at a time as there are GPUs for. `auto`: processes when several GPUs are visible and there is more
            than one adapter, or an adapter asks for several.
        base: The model in memory instead of the recipe's `base_model` (sequential only).
        progress: Called after every optimizer step and with every log (sequential only).

    Raises:
        RecipeError: what the recipe says wrong, all of it. TrainError: what went wrong later, naming the adapter.
    """
    mapping, folder, where = _read(recipe)
    specs = _chosen(read_adapters(mapping, where), adapters, where)
    name = str(mapping.get("base_model") or "")
    if not name and base is None:
        raise RecipeError.of(
            "BASE", where(("base_model",)), "no base_model", "name the model that the adapters are for"
        )
    out = Path(out)
    if _wants_processes(specs, schedule) and base is None:
        source = Path(recipe) if isinstance(recipe, str | Path) else _spill(mapping, out)
        return _in_processes(specs, source, out, resume)
    return _one_after_another(specs, name, base, out, folder, resume, progress)


def _read(recipe: Mapping[str, Any] | Path | str) -> tuple[Mapping[str, Any], Path, Where]:
    if isinstance(recipe, Mapping):
        return recipe, Path(), dotted
    from paft_merge.recipe.text import load_yaml

    located = load_yaml(recipe)

    def where(path: tuple[str | int, ...]) -> str:
        return f"{recipe}:{located.line(path)}: {dotted(path)}"

    if not isinstance(located.data, Mapping):
        raise RecipeError.of("RECIPE", recipe, "not a mapping", "write base_model: and adapters:")
    return located.data, Path(recipe).parent, where


def _chosen(specs: dict[str, AdapterSpec], names: Sequence[str] | None, where: Where) -> dict[str, AdapterSpec]:
    unknown = [name for name in names or () if name not in specs]
    if unknown:
        known = list(specs)
        raise RecipeError(
            [
                Problem("ADAPTERS", where(("adapters",)), f"no adapter {name!r}", did_you_mean(name, known))
                for name in unknown
            ]
        )
    return {name: spec for name, spec in specs.items() if not names or name in names}


def _wants_processes(specs: dict[str, AdapterSpec], schedule: Schedule) -> bool:
    if "LOCAL_RANK" in os.environ or schedule == "sequential":
        return False  # a launched child trains in its own process
    if schedule == "processes":
        return True
    import torch

    return any(spec.processes > 1 for spec in specs.values()) or (torch.cuda.device_count() > 1 and len(specs) > 1)


# ------------------------------------------------------------------------------------------------- one base, in turn


def _one_after_another(
    specs: dict[str, AdapterSpec],
    name: str,
    base: Any,
    out: Path,
    folder: Path,
    resume: bool,
    progress: Callable[[Progress], None] | None,
) -> dict[str, Path]:
    from paft_merge.training.loading import digest_of, load_base
    from paft_merge.training.run import train_adapter

    done: dict[str, Path] = {}
    model, loaded, digest = base, None, None
    for adapter, spec in specs.items():
        if resume and (out / adapter / "paft_train.json").exists():
            done[adapter] = out / adapter
            continue
        if base is None and loaded != spec.base:
            model = None  # the old base is let go before the next is read
            model, loaded, digest = load_base(_path(name, folder), spec.base), spec.base, None
        digest = digest or digest_of(model)
        done[adapter] = train_adapter(
            model, spec, out / adapter, name=adapter, resume=resume, folder=folder,
            base_name=name or None, base_path=_path(name, folder) or None, base_digest=digest, progress=progress,
        )  # fmt: skip
        if digest_of(model) != digest:
            what = "the base's weights are not what they were before this adapter was trained"
            raise TrainError.of("BASE_CHANGED", adapter, what, "this is a fault of paft_merge; please report it")
    return done


def _path(name: str, folder: Path) -> str:
    """The base as `from_pretrained` takes it: a folder beside the recipe, or the name as it is."""
    return str(folder / name) if name and (folder / name).is_dir() else name


# ----------------------------------------------------------------------------------------------- processes, one each


@dataclass(frozen=True)
class Launch:
    """One child: what it runs, on which GPUs, where its output goes."""

    name: str
    command: tuple[str, ...]
    gpus: tuple[str, ...]
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        """The child's environment."""
        shown = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        return {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **shown}


def command_for(name: str, spec: AdapterSpec, recipe: Path, out: Path, resume: bool, port: int) -> tuple[str, ...]:
    """The `accelerate launch` of one adapter; TrainError PROCESSES when its `accelerate_config` is not there."""
    config = ("--config_file", str(_config_of(name, spec.accelerate_config, recipe))) if spec.accelerate_config else ()
    several = ("--multi_gpu",) if spec.processes > 1 and not config else ()
    return (
        sys.executable, "-m", "accelerate.commands.launch", *config, *several,
        "--num_processes", str(spec.processes), "--num_machines", "1", "--main_process_port", str(port),
        *(() if config else ("--mixed_precision", "no", "--dynamo_backend", "no")),
        "-m", "paft_merge.training.launch", str(recipe), str(out), name, *(("--resume",) if resume else ()),
    )  # fmt: skip


def _config_of(name: str, given: str, recipe: Path) -> Path:
    """A file for accelerate, beside the recipe first; TrainError PROCESSES when there is none."""
    for path in (recipe.parent / given, Path(given)):
        if path.is_file():
            return path
    fix = "write one with `accelerate config --config_file FILE`"
    raise TrainError.of("PROCESSES", f"{name}: accelerate_config", f"there is no file {given}", fix)


def _in_processes(specs: dict[str, AdapterSpec], recipe: Path, out: Path, resume: bool) -> dict[str, Path]:
    gpus = visible_gpus()
    wanted = {name: spec for name, spec in specs.items() if not (resume and (out / name / "paft_train.json").exists())}
    for name, spec in wanted.items():
        if gpus and spec.processes > len(gpus):
            what = f"asks for {spec.processes} processes, but {len(gpus)} GPUs are visible"
            raise TrainError.of("PROCESSES", name, what, "lower processes")
        if spec.accelerate_config:
            _config_of(name, spec.accelerate_config, recipe)
    out.mkdir(parents=True, exist_ok=True)
    needs = {name: spec.processes for name, spec in wanted.items()}

    def launch(name: str, mine: tuple[str, ...]) -> Launch:
        command = command_for(name, wanted[name], recipe, out, resume, free_port())
        return Launch(name, command, mine, out / f"{name}.log")

    run_all(needs, gpus, launch)
    return {name: out / name for name in specs}


def run_all(
    needs: Mapping[str, int], gpus: Sequence[str], launch: Callable[[str, tuple[str, ...]], Launch], poll_s: float = 0.2
) -> None:
    """Run children, as many at a time as there are GPUs for (one at a time without), and stop all when one fails.

    Raises:
        TrainError: CHILD, naming the adapter that failed and its log.
    """
    waiting, free = dict(needs), list(gpus)
    running: dict[str, tuple[subprocess.Popen[bytes], Launch]] = {}
    try:
        while waiting or running:
            for name in list(waiting):
                fits = waiting[name] <= len(free) if gpus else not running
                if fits:
                    mine = tuple(free[: waiting[name]]) if gpus else ()
                    free = free[len(mine) :]
                    running[name] = _start(launch(name, mine))
                    del waiting[name]
            for name, (child, how) in list(running.items()):
                if child.poll() is not None:
                    del running[name]
                    free += how.gpus
                    if child.returncode:
                        raise TrainError.of("CHILD", name, _last_words(how.log, child.returncode), f"see {how.log}")
            time.sleep(poll_s)
    finally:
        _stop([child for child, _ in running.values()])


def _start(how: Launch) -> tuple[subprocess.Popen[bytes], Launch]:
    log.info("%s: starting on GPUs %s, log in %s", how.name, ",".join(how.gpus) or "none", how.log)
    with how.log.open("ab") as sink:
        # A session of its own, so that the workers accelerate starts are stopped with it.
        child = subprocess.Popen(
            how.command, stdout=sink, stderr=subprocess.STDOUT, env=how.environment, start_new_session=True
        )
    return child, how


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask every child's process group to end, then make those end that did not."""
    for child in children:
        _signal(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(child, signal.SIGKILL)
            child.wait()


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
        os.killpg(child.pid, number)


def _last_words(path: Path, code: int) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if "Error" in line and "ChildFailedError" not in line), "")
    return f"training ended with exit code {code}" + (f": {told.strip()[:300]}" if told else "")


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that children may be given, as CUDA_VISIBLE_DEVICES spells them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(one for one in given.split(",") if one and one != "-1")
    import torch

    return tuple(str(index) for index in range(torch.cuda.device_count()))


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _spill(mapping: Mapping[str, Any], out: Path) -> Path:
    """Write a recipe that has no file (JSON is YAML), so that children can read it."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "recipe.json"
    path.write_text(json.dumps(mapping, indent=2), encoding="utf-8")
    return path


def main(arguments: Sequence[str]) -> int:
    """What a child runs: RECIPE OUT NAME [--resume]; errors of the user are one line on stderr and exit code 1."""
    recipe, out, name, *rest = arguments
    try:
        train(recipe, out, adapters=[name], resume="--resume" in rest, schedule="sequential")
    except (TrainError, RecipeError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
