"""All adapters of a recipe: one after another on one base in memory, or one process each on GPUs of its own."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paft_merge.errors import Problems, RecipeError, TrainError
from paft_merge.recipe.sections import suggestion
from paft_merge.recipe.yaml_source import Located, load_yaml
from paft_merge.training.processes import Launch, Told, command_for, devices_of, free_ports, run_all, step_printer
from paft_merge.training.run_folder import is_first
from paft_merge.training.schema import AdapterSpec, read_adapters

if TYPE_CHECKING:
    from paft_merge.training.callbacks import TrainProgress

Schedule = Literal["auto", "sequential", "processes"]


def train(
    recipe: Mapping[str, Any] | Path | str,
    out: Path | str,
    *,
    adapters: Sequence[str] | None = None,
    resume: bool = False,
    schedule: Schedule = "auto",
    devices: str | None = None,
    base: Any = None,
    progress: Callable[[TrainProgress], None] | None = None,
) -> dict[str, Path]:
    """Train adapters of a recipe, each into `out/<name>`; returns the folders by name.

    Args:
        recipe: A PAFT recipe: a file, or the mapping it holds (`base_model`, `adapters`).
        out: Folder of the adapters.
        adapters: Names to train; all by default.
        resume: Leave finished adapters alone and go on with interrupted ones.
        schedule: `sequential`: one after another, one base in memory. `processes`: one `accelerate launch` per adapter,
            as many at a time as there are devices for. `auto`: processes when there are several devices and there is
            more than one adapter, or an adapter asks for several.
        devices: What processes may use: GPUs (`0,1`) or a number of processes on the CPU (`cpu:2`). By default every
            visible GPU; without one, as many processes as the largest adapter asks for.
        base: The model in memory instead of the recipe's `base_model` (sequential only).
        progress: Called after every optimizer step and with every log; by processes about once a second.

    Raises:
        RecipeError: what the recipe says wrong, all of it. TrainError: what went wrong later, naming the adapter.
    """
    located, folder = read_recipe(recipe)
    specs = _chosen(read_adapters(located), adapters, located)
    name = str(located.data.get("base_model") or "")
    if not name and base is None:
        where = located.spot(("base_model",))
        raise RecipeError.of("BASE", where, "no base_model", "name the model that the adapters are for")
    out = Path(out)
    if base is None and _wants_processes(specs, schedule, devices):
        source = Path(recipe) if isinstance(recipe, str | Path) else _spill(located.data, out)
        return _in_processes(specs, source, out, resume, devices, progress)
    return _one_after_another(specs, name, base, out, folder, resume, progress)


def read_recipe(recipe: Mapping[str, Any] | Path | str) -> tuple[Located, Path]:
    """A recipe's data with its lines, and the folder where its relative paths start."""
    if isinstance(recipe, Mapping):
        return Located(recipe), Path()
    located = load_yaml(recipe)
    if not isinstance(located.data, Mapping):
        raise RecipeError.of("RECIPE", recipe, "not a mapping", "write base_model: and adapters:")
    return located, Path(recipe).parent


def _chosen(specs: dict[str, AdapterSpec], names: Sequence[str] | None, located: Located) -> dict[str, AdapterSpec]:
    problems, where = Problems(), located.spot(("adapters",))
    for name in names or ():
        if name not in specs:
            problems.add("ADAPTERS", where, f"no adapter {name!r}", suggestion(name, specs))
    problems.raise_as(RecipeError)
    if not specs:
        what = "every adapter exists already, so there is nothing to train"
        raise RecipeError.of("ADAPTERS", where, what, "use paft run, which merges and compares them")
    return {name: spec for name, spec in specs.items() if not names or name in names}


def _wants_processes(specs: dict[str, AdapterSpec], schedule: Schedule, devices: str | None) -> bool:
    if "LOCAL_RANK" in os.environ or schedule == "sequential":
        return False  # a launched child trains in its own process
    several = any(spec.processes > 1 for spec in specs.values())
    if schedule == "processes" or several or devices:
        return True
    import torch

    return torch.cuda.device_count() > 1 and len(specs) > 1


# ------------------------------------------------------------------------------------------------- one base, in turn


def _one_after_another(
    specs: dict[str, AdapterSpec],
    name: str,
    base: Any,
    out: Path,
    folder: Path,
    resume: bool,
    progress: Callable[[TrainProgress], None] | None,
) -> dict[str, Path]:
    from paft_merge.training.base_model import digest_of, is_sharded, load_base
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
        digest = digest or (digest_of(model) if is_first() else "taken by the first process")
        done[adapter] = train_adapter(
            model, spec, out / adapter, name=adapter, resume=resume, folder=folder,
            base_name=name or None, base_path=_path(name, folder) or None, base_digest=digest, progress=progress,
        )  # fmt: skip
        after, sharded = digest_of(model), is_sharded(model)
        if is_first() and after != digest:
            what = "the base's weights are not what they were before this adapter was trained"
            raise TrainError.of("BASE_CHANGED", adapter, what, "this is a fault of paft_merge; please report it")
        if sharded:
            loaded = None  # each process has its part of it now: the next adapter needs a whole one
    return done


def _path(name: str, folder: Path) -> str:
    """The base as `from_pretrained` takes it: a folder beside the recipe, or the name as it is."""
    return str(folder / name) if name and (folder / name).is_dir() else name


# ----------------------------------------------------------------------------------------------- processes, one each


def _in_processes(
    specs: dict[str, AdapterSpec],
    recipe: Path,
    out: Path,
    resume: bool,
    devices: str | None,
    progress: Callable[[TrainProgress], None] | None,
) -> dict[str, Path]:
    wanted = {name: spec for name, spec in specs.items() if not (resume and (out / name / "paft_train.json").exists())}
    needs = {name: spec.processes for name, spec in wanted.items()}
    given = devices_of(devices, needs)
    ports = dict(zip(wanted, free_ports(len(wanted)), strict=True))
    commands = {name: command_for(name, spec, recipe, out, resume, ports[name]) for name, spec in wanted.items()}
    out.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // len(given))

    def launch(name: str, mine: tuple[str, ...]) -> Launch:
        return Launch(name, commands[name], mine, out / f"{name}.log", threads)

    run_all(needs, given, launch, _teller(progress))
    return {name: out / name for name in specs}


def _teller(progress: Callable[[TrainProgress], None] | None) -> Told | None:
    """What a child tells, as our own trainers tell it."""
    if progress is None:
        return None
    from paft_merge.training.callbacks import TrainProgress

    return lambda name, step, steps, logs: progress(TrainProgress(name, step, steps, logs))


def _spill(mapping: Mapping[str, Any], out: Path) -> Path:
    """Write a recipe that has no file (JSON is YAML), so that children can read it."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "recipe.json"
    path.write_text(json.dumps(mapping, indent=2), encoding="utf-8")
    return path


def main(arguments: Sequence[str]) -> int:
    """What a child runs: RECIPE OUT NAME [--resume]; errors of the user are one line on stderr and exit code 1."""
    recipe, out, name, *rest = arguments
    first = is_first()
    logging.basicConfig(level=logging.WARNING if first else logging.ERROR, format="%(levelname)s: %(message)s")
    logging.getLogger("paft_merge").setLevel(logging.INFO if first else logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells at import which kernels it would rather have
    progress = step_printer(sys.stdout.write) if first else None
    try:
        train(recipe, out, adapters=[name], resume="--resume" in rest, schedule="sequential", progress=progress)
    except (TrainError, RecipeError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
