"""Train all adapters of a recipe: one after another on one base in memory, or one process per adapter."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paft_merge.compute.cores import available_cores
from paft_merge.compute.scratch import uncollected
from paft_merge.errors import PaftMergeError, Problems, RecipeError, TrainError, escape_logs
from paft_merge.inputs.links import following_links
from paft_merge.inputs.model_config import refuse_odd_files
from paft_merge.recipe.sections import refuse_merge_recipe, suggestion
from paft_merge.recipe.trust import announce, file_of
from paft_merge.recipe.yaml_source import Located, load_yaml
from paft_merge.training.consent import check_code
from paft_merge.training.processes import Launch, OnStep, command_for, devices_of, free_ports, run_all, step_printer
from paft_merge.training.run_folder import RunFolder, is_first
from paft_merge.training.schema import AdapterSpec, read_adapters, settings_of
from paft_merge.training.train_options import TrainOptions, TrainProgress, need_extras
from paft_merge.training.vllm_engine import in_memory, samples_by_vllm

if TYPE_CHECKING:
    from paft_merge.training.prepared_rows import Prepared

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
    logs: bool = False,
    trust_code: bool = False,
    follow_links: bool = False,
) -> dict[str, Path]:
    """Train adapters of a recipe, each into `out/<name>`; returns the folders by name.

    Args:
        recipe: A PAFT recipe: a file, or the mapping it holds (`base_model`, `adapters`).
        out: Folder of the adapters.
        adapters: Names to train; all by default.
        resume: Skip finished adapters and continue interrupted ones.
        schedule: `sequential`: one after another, one base in memory. `processes`: one `accelerate launch` per adapter,
            as many at a time as there are devices for. `auto`: processes when there are several devices and there is
            more than one adapter, or an adapter asks for several.
        devices: Devices of the processes: GPUs (`0,1`) or a number of CPU processes (`cpu:2`). Default: every visible
            GPU, or without GPUs as many CPU processes as the largest adapter needs.
        base: The model in memory instead of the recipe's `base_model` (sequential only).
        progress: Called after every optimizer step and with every log; by processes about once a second.
        logs: Write `out/<name>.log` also when adapters are trained in this process; processes always write theirs.
        trust_code: Run code that the recipe names, also where it does not lie beside the recipe: see docs/trust.md.
        follow_links: Follow links of the base's folder to files outside of it.

    Raises:
        RecipeError: every fault of the recipe. TrainError: a failure of an adapter, with its name.
    """
    located, folder = read_recipe(recipe)
    specs = _chosen(read_adapters(located), adapters, located)
    name = str(located.data.get("base_model") or "")
    if not name and base is None:
        where = located.spot(("base_model",))
        raise RecipeError.of("BASE", where, "no base_model", "name the model that the adapters are for")
    _check_code(specs, folder, trust_code, located)
    for function in filter(None, (reward.function for spec in specs.values() for reward in spec.reward)):
        announce(function, file_of(function, folder))
    out = Path(out)
    if base is not None and (asked := [adapter for adapter, spec in specs.items() if samples_by_vllm(spec)]):
        raise in_memory(asked[0])
    if base is None:
        with following_links(follow_links):
            refuse_odd_files(Path(_path_of(name, folder)))
    if base is None and _wants_processes(specs, schedule, devices):
        source = (
            Path(recipe)
            if isinstance(recipe, str | Path)
            else _spill(located.data, out / f"recipe-{next(iter(specs))}.json")
        )
        finished = {name for name in specs if resume and RunFolder(out / name).finished}
        for adapter in finished:
            RunFolder(out / adapter).check_finished(settings_of(specs[adapter], name))
        return _in_processes(specs, source, out, resume, devices, progress)
    options = TrainOptions(
        resume=resume,
        folder=folder,
        base_name=name or None,
        base_path=_path_of(name, folder) or None,
        progress=progress,
        trust_code=True,
        spots=_spots(specs, located),
    )
    with following_links(follow_links):
        return _one_after_another(specs, base, out, options, logs)


def _check_code(specs: Mapping[str, AdapterSpec], folder: Path, trust_code: bool, located: Located) -> None:
    """Check the code that the adapters name."""
    problems = Problems()
    for name, spec in specs.items():
        with problems.catching(str(located.spot(("adapters", name)))):
            check_code(spec, folder, trust_code=trust_code)
    problems.raise_as(TrainError)


def _path_of(base: str, folder: Path) -> str:
    """A base's folder beside the recipe, else its name."""
    return str(folder / base) if base and (folder / base).is_dir() else base


def chosen_adapters(
    recipe: Path, adapters: Sequence[str] | None, trust_code: bool = False
) -> tuple[dict[str, AdapterSpec], str, TrainOptions]:
    """The sections of a recipe's adapters, the base's folder or name, and the options that all share.

    Raises:
        RecipeError: every fault of the recipe. TrainError: TRUST, code of the base without `trust_code`.
    """
    located, folder = read_recipe(recipe)
    specs, name = _chosen(read_adapters(located), adapters, located), str(located.data.get("base_model") or "")
    _check_code(specs, folder, trust_code, located)
    spots = _spots(specs, located)
    options = TrainOptions(folder=folder, base_name=name, trust_code=trust_code, spots=spots)
    return specs, _path_of(name, folder), options


def _spots(specs: Mapping[str, AdapterSpec], located: Located) -> dict[str, str]:
    """The file, line and key of each adapter."""
    return {name: str(located.spot(("adapters", name))) for name in specs}


def read_recipe(recipe: Mapping[str, Any] | Path | str) -> tuple[Located, Path]:
    """A recipe's data with its lines, and the folder where its relative paths start."""
    if isinstance(recipe, Mapping):
        return Located(recipe), Path()
    located = load_yaml(recipe)
    if not isinstance(located.data, Mapping):
        raise RecipeError.of("RECIPE", recipe, "not a mapping", "write base_model: and adapters:")
    refuse_merge_recipe(located)
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


def _one_after_another(
    specs: dict[str, AdapterSpec], base: Any, out: Path, options: TrainOptions, logs: bool
) -> dict[str, Path]:
    need_extras()
    with uncollected():  # the search for reference cycles took a quarter of the time of importing TRL
        from paft_merge.training.base_model import digest_of, is_sharded, load_base
        from paft_merge.training.run import train_adapter

        importlib.import_module("paft_merge.training.trainers")

    done: dict[str, Path] = {}
    model, loaded, digest = base, None, None
    source = str(options.base_path or getattr(getattr(base, "config", None), "_name_or_path", ""))
    wanted = {name: spec for name, spec in specs.items() if not (options.resume and RunFolder(out / name).finished)}
    prepared = prepare_all(wanted, source, out, options)
    for adapter, spec in specs.items():
        if options.resume and RunFolder(out / adapter).finished:
            RunFolder(out / adapter).check_finished(settings_of(spec, _base_name(base, options)))
            done[adapter] = out / adapter
            continue
        if base is None and loaded != spec.base:
            model = None  # frees the old base before the next is loaded
            model, loaded, digest = load_base(str(options.base_path), spec.base), spec.base, None
        digest = digest or (digest_of(model) if is_first() else "computed by the first process")
        log_file = _logged(out / f"{adapter}.log", options.progress) if logs else nullcontext(options.progress)
        with log_file as progress:
            mine = replace(options, name=adapter, base_digest=digest, progress=progress, prepared=prepared.pop(adapter))
            done[adapter] = train_adapter(model, spec, out / adapter, mine)
        after, sharded = digest_of(model), is_sharded(model)
        if is_first() and after != digest:
            what = "training this adapter changed the base's weights"
            raise TrainError.of("BASE_CHANGED", adapter, what, "this is a bug of paft_merge; please report it")
        if sharded:
            loaded = None  # each process now has only a part: the next adapter needs a whole base
    return done


def _base_name(base: Any, options: TrainOptions) -> str:
    return options.base_name or str(base.config._name_or_path)


def prepare_all(specs: Mapping[str, AdapterSpec], source: str, out: Path, options: TrainOptions) -> dict[str, Prepared]:
    """Load and check the data of every adapter, before the base is loaded and the first adapter is trained.

    Raises:
        TrainError: every problem of every adapter, each with the adapter's line in the recipe.
    """
    from paft_merge.training.prepared_rows import prepare

    need_extras()  # one cause, not one per adapter
    problems, done = Problems(), {}
    for name, spec in specs.items():
        with problems.catching(options.spots[name]):
            done[name] = prepare(source, spec, RunFolder(out / name).checkpoints, replace(options, name=name))
    problems.raise_as(TrainError)
    return done


@contextmanager
def _logged(path: Path, progress: Callable[[TrainProgress], None] | None) -> Iterator[Callable[[TrainProgress], None]]:
    """Append steps, warnings and an error to an adapter's log, in the format of a child process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    package = logging.getLogger("paft_merge")
    with path.open("a", encoding="utf-8", buffering=1) as file:
        steps, handler = step_printer(file.write), logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))

        def both(now: TrainProgress) -> None:
            steps(now)
            if progress:
                progress(now)

        package.addHandler(handler)
        try:
            yield both
        except BaseException as error:
            file.write(f"{type(error).__name__}: {error}\n")
            raise
        finally:
            package.removeHandler(handler)


def _in_processes(
    specs: dict[str, AdapterSpec],
    recipe: Path,
    out: Path,
    resume: bool,
    devices: str | None,
    progress: Callable[[TrainProgress], None] | None,
) -> dict[str, Path]:
    need_extras()
    wanted = {name: spec for name, spec in specs.items() if not (resume and RunFolder(out / name).finished)}
    needs = {name: spec.processes for name, spec in wanted.items()}
    given = devices_of(devices, needs)
    ports = dict(zip(wanted, free_ports(len(wanted)), strict=True))
    commands = {name: command_for(name, spec, recipe, out, resume, ports[name]) for name, spec in wanted.items()}
    out.mkdir(parents=True, exist_ok=True)
    threads = max(1, available_cores() // len(given))

    def launch(name: str, mine: tuple[str, ...]) -> Launch:
        return Launch(name, commands[name], mine, out / f"{name}.log", threads)

    run_all(needs, given, launch, _on_step(progress))
    return {name: out / name for name in specs}


def _on_step(progress: Callable[[TrainProgress], None] | None) -> OnStep | None:
    """Convert the messages of children to `TrainProgress`."""
    if progress is None:
        return None
    return lambda name, step, steps, logs: progress(TrainProgress(name, step, steps, logs))


def _spill(mapping: Mapping[str, Any], path: Path) -> Path:
    """Write a recipe that has no file as JSON, which is YAML, so that children can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mapping, indent=2), encoding="utf-8")
    return path


def main(arguments: Sequence[str]) -> int:
    """Entry point of a child: RECIPE OUT NAME [--resume]. Its parent has checked the code that runs, and links. An error of ours is one line on stderr and exit code 1."""
    recipe, out, name, *rest = arguments
    first = is_first()
    escape_logs()
    logging.basicConfig(level=logging.WARNING if first else logging.ERROR, format="%(levelname)s: %(message)s")
    logging.getLogger("paft_merge").setLevel(logging.INFO if first else logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs missing kernels at import
    progress = step_printer(sys.stdout.write) if first else None
    try:
        train(
            recipe,
            out,
            adapters=[name],
            resume="--resume" in rest,
            schedule="sequential",
            progress=progress,
            trust_code=True,
            follow_links=True,
        )
    except PaftMergeError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
