"""The front door for Python: `open_plan` and `merge`, from a recipe to a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paft_merge.engine import imbalance
from paft_merge.engine.intermediate import Intermediate
from paft_merge.engine.sidefiles import code_notice, identity, licence_notice, side_files, totals
from paft_merge.engine.sources import Sources
from paft_merge.errors import OutputError, PaftMergeError, Problem, Problems
from paft_merge.hub import HF, fetch_file
from paft_merge.methods import METHODS
from paft_merge.methods.mergekit_methods import import_methods
from paft_merge.output.folder import Output, check_place
from paft_merge.plan import MergePlan, Model, plan_merge
from paft_merge.recipe import ModelRef, Recipe
from paft_merge.recipe.documents import load_recipes

if TYPE_CHECKING:
    from paft_merge.engine.streaming import Progress
    from paft_merge.inputs.checkpoint import Checkpoint

log = logging.getLogger(__name__)

Source = Path | str | Mapping[str, Any] | Recipe


@contextmanager
def open_plan(
    recipe: Source,
    *,
    strict: bool = False,
    imports: Sequence[str] = (),
    out_shard_bytes: int | None = None,
    lazy_unpickle: bool = False,
    allow_crimes: bool = False,
    allow_nonfinite: bool = False,
    tensor_names: Literal["intersection", "union"] | None = None,
    output_name: str | None = None,
    remote: bool = False,
    before_pull: Callable[[MergePlan, Sources], None] | None = None,
) -> Iterator[MergePlan]:
    """Plan a merge from headers and keep its inputs open: `with open_plan("recipe.yaml") as plan: ...`.

    Args:
        recipe: a file (`hf://user/repository/recipe.yaml@revision` too), YAML text, a mapping, or a loaded `Recipe`. A file may have several documents (see `graph`).
        strict: what would be ignored is an error.
        imports: modules that register methods with mergekit; a recipe may then name those too.
        out_shard_bytes: largest size of an output file; None keeps the base's files.
        lazy_unpickle: read `.bin` checkpoints through mergekit's restricted unpickler.
        allow_crimes: merge models whose configs differ where their tensors do not.
        allow_nonfinite: merge NaN and infinity as they come.
        tensor_names: of files of tensors that do not hold the same ones, merge those that all have, or each of those that have
            it. None: that is an error.
        output_name: which document of a file with several is the result; the one without a name by default, else the
            only one that no other uses.
        remote: leave the weights that are on the Hub only where they are, and read headers (and what is asked for
            later) over the network. Without it they are fetched, once the plan from their headers is sound.
        before_pull: called with that plan before anything is fetched; may raise.

    Raises:
        PaftMergeError: everything that the recipe and the headers show to be wrong, all at once.
    """
    methods = import_methods(imports, METHODS)
    recipe = _here(recipe)
    documents = load_recipes(recipe, strict=strict, methods=methods)
    loaded = documents.only(output_name)
    made_of = documents.beneath(loaded)
    notices: list[Problem] = []

    def plan(models: Mapping[ModelRef, Model], of: Recipe = loaded) -> MergePlan:
        own = {ref: models[ref] for ref in of.references}
        made = plan_merge(
            of, own, out_shard_bytes=out_shard_bytes, allow_crimes=allow_crimes, allow_nonfinite=allow_nonfinite,
            tensor_names=tensor_names,
        )  # fmt: skip
        told = dict.fromkeys((*notices, *made.warnings, *imbalance.recorded(made)))
        return replace(made, warnings=tuple(told) if of is loaded else made.warnings)

    def compute(name: str, models: Mapping[ModelRef, Model]) -> Checkpoint:
        made = plan(models, documents.named[name])
        notices.extend(made.warnings)
        return Intermediate(name, made, rounded=loaded.arithmetic == "mergekit")

    notices += documents.unused([loaded]) if output_name is None else []

    with ExitStack() as inputs:
        with _told_with(loaded.warnings):
            refs = tuple(dict.fromkeys(ref for one in made_of for ref in one.references))
            sources = Sources.find(refs, unpickle=lazy_unpickle, computed=documents.named.keys())
            if sources.missing_bytes and not remote:
                with sources.opened(compute) as models:
                    glance = plan(models)
                    if before_pull:
                        before_pull(glance, sources)
                sources.pull()
            planned = plan(inputs.enter_context(sources.opened(compute)))
        yield planned


def merge(
    recipe: Source,
    out: Path | str,
    *,
    strict: bool = False,
    imports: Sequence[str] = (),
    device: Literal["cpu", "cuda"] | str = "cpu",
    threads: int | None = None,
    memory: int | None = None,
    out_shard_bytes: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    lazy_unpickle: bool = False,
    trust_remote_code: bool = False,
    allow_crimes: bool = False,
    allow_nonfinite: bool = False,
    tensor_names: Literal["intersection", "union"] | None = None,
    write_model_card: bool = True,
    stream_from_hub: bool = False,
    output_name: str | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    warn: Callable[[Sequence[Problem]], None] | None = None,
) -> Path:
    """Merge the models of a recipe into the folder `out`, which `AutoModelForCausalLM.from_pretrained` then loads.

    Args:
        recipe, strict, imports, out_shard_bytes, lazy_unpickle, allow_crimes, allow_nonfinite, tensor_names, output_name: as for
            `open_plan`. Of a file with several results each is written to a folder of its name inside `out`.
        out: folder to write; must not exist, or be empty, unless `overwrite`. It grows as `out.part`.
        device: where the arithmetic is done, `cpu` or `cuda` (`cuda:1`).
        threads: blocks computed at a time; all cores by default. Changes no bit of the result.
        memory: upper bound of the working memory in bytes; lowers `threads` where it must.
        resume: go on with the `out.part` of a merge that was interrupted.
        overwrite: replace `out`, which stays whole until the merge is.
        trust_remote_code: copy the base's Python files into the output. They are not run.
        write_model_card: write README.md.
        stream_from_hub: read the weights that are on the Hub only over the network and keep nothing of them, so that
            the output is all that needs a disk. Rules with two passes read a tensor twice.
        progress: called after each tensor.
        warn: receives what is odd but possible; logged by default.

    Returns:
        `out`.

    Raises:
        PaftMergeError: with every problem that could be known at once.
    """
    settings = {key: value for key, value in locals().items() if key not in ("recipe", "out", "output_name")}
    from paft_merge.compute.devices import ops_for
    from paft_merge.engine.streaming import merge_checkpoint

    recipe = _here(recipe)
    with _also_where(Path(out), overwrite, Problems()):
        documents = load_recipes(recipe, strict=strict, methods=import_methods(imports, METHODS))
    if output_name is None and len(documents.finals) > 1:
        for result in documents.finals:
            merge(recipe, Path(out) / str(result.name), output_name=result.name, **settings)
        return Path(out)

    out, problems, ops = Path(out), Problems(), ops_for(device)

    def before_pull(glance: MergePlan, sources: Sources) -> None:
        check_output(glance, out, overwrite=overwrite, problems=problems)
        problems.raise_as(OutputError)
        sources.check_room(glance.bytes_written, out)

    with ExitStack() as inputs:
        with _also_where(out, overwrite, problems):
            planned = inputs.enter_context(
                open_plan(
                    recipe, strict=strict, imports=imports, out_shard_bytes=out_shard_bytes, lazy_unpickle=lazy_unpickle,
                    allow_crimes=allow_crimes, allow_nonfinite=allow_nonfinite, remote=stream_from_hub,
                    before_pull=before_pull, output_name=output_name, tensor_names=tensor_names,
                )
            )  # fmt: skip
        check_output(planned, out, overwrite=overwrite, problems=problems)
        workers = threads_within(planned, threads or _cores(), memory, problems)
        problems.raise_as(OutputError)
        notices = [*code_notice(planned, trust_remote_code=trust_remote_code), *licence_notice(planned)]
        (warn or _log)([*planned.warnings, *notices])
        tiles = {tensor.name: tensor.tile_bytes for tensor in planned.tensors}
        with Output.open(out, planned.shards, identity(planned, device), tiles, resume=resume) as output:
            merge_checkpoint(
                planned, output, threads=workers, ops=ops, hold=_room(planned, workers, memory), progress=progress
            )
            asked = {
                "device": device, "imports": list(imports), "out_shard_bytes": out_shard_bytes, "lazy_unpickle": lazy_unpickle,
                "allow_crimes": allow_crimes, "allow_nonfinite": allow_nonfinite, "trust_remote_code": trust_remote_code,
                **({"tensor_names": tensor_names} if tensor_names else {}),
            }  # fmt: skip
            files = side_files(
                planned, output.finished, trust_remote_code=trust_remote_code, card=write_model_card, options=asked
            )
            output.complete(files, overwrite=overwrite)
        if not any(problem.code == "SCALE" for problem in planned.warnings):
            (warn or _log)(imbalance.measured(totals(planned, output.finished)))
    return out


def check_output(planned: MergePlan, out: Path, *, overwrite: bool, problems: Problems) -> None:
    """Note everything that keeps a planned merge from being written to `out`."""
    check_place(out, _folders(planned), planned.bytes_written, overwrite=overwrite, problems=problems)


def threads_within(planned: MergePlan, threads: int, memory: int | None, problems: Problems) -> int:
    """How many blocks may be in flight at once: `threads`, or fewer where `memory` bytes do not hold as many."""
    largest = max(planned.tensors, key=lambda t: t.block_bytes, default=None)
    if memory is None or largest is None:
        return threads
    if memory < largest.block_bytes:
        what = f"one block of it and its inputs take {largest.block_bytes:,} bytes, and --memory allows {memory:,}"
        problems.add("MEMORY", largest.name, what, f"allow at least {largest.block_bytes:,}")
        return 1
    return min(threads, memory // max(largest.block_bytes, 1))


def _room(planned: MergePlan, threads: int, memory: int | None) -> int:
    """Bytes of merged tensors that may wait in memory beside the blocks in flight."""
    from paft_merge.engine.streaming import HELD_BYTES

    blocks = threads * max((t.block_bytes for t in planned.tensors), default=0)
    return HELD_BYTES if memory is None else max(0, min(HELD_BYTES, memory - blocks))


@contextmanager
def _also_where(out: Path, overwrite: bool, problems: Problems) -> Iterator[None]:
    """Tell what is wrong with the place of the output together with what is wrong with the inputs."""
    try:
        yield
    except PaftMergeError as error:
        check_place(out, (), 0, overwrite=overwrite, problems=problems)
        raise type(error)([*error.problems, *problems.found], error.warnings) from error


@contextmanager
def _told_with(warnings: Sequence[Problem]) -> Iterator[None]:
    """Tell of warnings beside the error that keeps them from being told by a plan."""
    try:
        yield
    except PaftMergeError as error:
        error.warnings = (*warnings, *error.warnings)
        raise


def _here(recipe: Source) -> Source:
    """A recipe on the Hub as a file of the cache; any other as it is."""
    return fetch_file(recipe) if isinstance(recipe, str) and recipe.startswith(HF) else recipe


def _cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _log(problems: Sequence[Problem]) -> None:
    for problem in problems:
        log.warning("%s", problem)


def _folders(planned: MergePlan) -> list[Path]:
    adapters = [model.adapter.folder for model in planned.models if model.adapter]
    return [*(folder for model in planned.models for folder in model.checkpoint.folders), *adapters]
