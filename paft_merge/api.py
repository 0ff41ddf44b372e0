"""The front door for Python: `open_plan` and `merge`, from a recipe to a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paft_merge.bridge import import_methods
from paft_merge.checkpoint import Checkpoint
from paft_merge.errors import OutputError, PaftMergeError, Problem, Problems
from paft_merge.hub import fetch
from paft_merge.methods import METHODS
from paft_merge.output import Output, check_place
from paft_merge.plan import MergePlan, Model, plan_merge
from paft_merge.recipe import ModelRef, Recipe, load_recipe
from paft_merge.sidefiles import code_notice, identity, side_files

if TYPE_CHECKING:
    from paft_merge.adapters import Adapter
    from paft_merge.engine import Progress

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
) -> Iterator[MergePlan]:
    """Plan a merge from headers and keep its inputs open: `with open_plan("recipe.yaml") as plan: ...`.

    Args:
        recipe: a file, YAML text, a mapping, or a loaded `Recipe`.
        strict: what would be ignored is an error.
        imports: modules that register methods with mergekit; a recipe may then name those too.
        out_shard_bytes: largest size of an output file; None keeps the base's files.
        lazy_unpickle: read `.bin` checkpoints through mergekit's restricted unpickler.
        allow_crimes: merge models whose configs differ where their tensors do not.
        allow_nonfinite: merge NaN and infinity as they come.

    Raises:
        PaftMergeError: everything that the recipe and the headers show to be wrong, all at once.
    """
    methods = import_methods(imports, METHODS)
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, strict=strict, methods=methods)
    models = _open_models(loaded.references, lazy_unpickle)
    try:
        made = plan_merge(
            loaded, models, out_shard_bytes=out_shard_bytes, allow_crimes=allow_crimes, allow_nonfinite=allow_nonfinite
        )
        yield made
    finally:
        for model in models.values():
            model.close()


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
    write_model_card: bool = True,
    progress: Callable[[Progress], None] = lambda _: None,
    warn: Callable[[Sequence[Problem]], None] | None = None,
) -> Path:
    """Merge the models of a recipe into the folder `out`, which `AutoModelForCausalLM.from_pretrained` then loads.

    Args:
        recipe, strict, imports, out_shard_bytes, lazy_unpickle, allow_crimes, allow_nonfinite: as for `open_plan`.
        out: folder to write; must not exist, or be empty, unless `overwrite`. It grows as `out.part`.
        device: where the arithmetic is done, `cpu` or `cuda` (`cuda:1`).
        threads: blocks computed at a time; all cores by default. Changes no bit of the result.
        memory: upper bound of the working memory in bytes; lowers `threads` where it must.
        resume: go on with the `out.part` of a merge that was interrupted.
        overwrite: replace `out`, which stays whole until the merge is.
        trust_remote_code: copy the base's Python files into the output. They are not run.
        write_model_card: write README.md.
        progress: called after each tensor.
        warn: receives what is odd but possible; logged by default.

    Returns:
        `out`.

    Raises:
        PaftMergeError: with every problem that could be known at once.
    """
    from paft_merge.device import ops_for
    from paft_merge.engine import merge_checkpoint

    out, problems, ops = Path(out), Problems(), ops_for(device)
    with ExitStack() as inputs:
        with _also_where(out, overwrite, problems):
            planned = inputs.enter_context(
                open_plan(
                    recipe, strict=strict, imports=imports, out_shard_bytes=out_shard_bytes, lazy_unpickle=lazy_unpickle,
                    allow_crimes=allow_crimes, allow_nonfinite=allow_nonfinite,
                )
            )  # fmt: skip
        check_output(planned, out, overwrite=overwrite, problems=problems)
        workers = threads_within(planned, threads or _cores(), memory, problems)
        problems.raise_as(OutputError)
        (warn or _log)([*planned.warnings, *code_notice(planned, trust_remote_code=trust_remote_code)])
        tiles = {tensor.name: tensor.tile_bytes for tensor in planned.tensors}
        with Output.open(out, planned.shards, identity(planned, device), tiles, resume=resume) as output:
            merge_checkpoint(planned, output, threads=workers, ops=ops, progress=progress)
            files = side_files(planned, output.finished, trust_remote_code=trust_remote_code, card=write_model_card)
            output.complete(files, overwrite=overwrite)
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


@contextmanager
def _also_where(out: Path, overwrite: bool, problems: Problems) -> Iterator[None]:
    """Tell what is wrong with the place of the output together with what is wrong with the inputs."""
    try:
        yield
    except PaftMergeError as error:
        check_place(out, (), 0, overwrite=overwrite, problems=problems)
        raise type(error)([*error.problems, *problems.found]) from error


def _cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _log(problems: Sequence[Problem]) -> None:
    for problem in problems:
        log.warning("%s", problem)


def _folders(planned: MergePlan) -> list[Path]:
    adapters = [model.adapter.folder for model in planned.models if model.adapter]
    return [*(model.checkpoint.folder for model in planned.models), *adapters]


def _open_adapter(ref: ModelRef, checkpoint: Checkpoint) -> Adapter:
    from paft_merge.adapters import Adapter  # imports torch, which a merge of plain checkpoints does without

    assert ref.lora is not None
    return Adapter.open(fetch(ref.lora, ref.lora_revision), checkpoint)


def _open_models(refs: Sequence[ModelRef], lazy_unpickle: bool) -> dict[ModelRef, Model]:
    """Open every reference once; a checkpoint that several share is opened once."""
    problems, models = Problems(), dict[ModelRef, Model]()
    checkpoints: dict[Path, Checkpoint | None] = {}
    for ref in refs:
        with problems.catching():
            folder = fetch(ref.path, ref.revision)
            if folder.resolve() not in checkpoints:
                checkpoints[folder.resolve()] = None
                checkpoints[folder.resolve()] = Checkpoint.open(folder, unpickle=lazy_unpickle)
            checkpoint = checkpoints[folder.resolve()]
            if checkpoint is not None:
                models[ref] = Model(str(ref), checkpoint, _open_adapter(ref, checkpoint) if ref.lora else None)
    try:
        problems.raise_as(PaftMergeError)
    except PaftMergeError:
        for checkpoint in filter(None, checkpoints.values()):
            checkpoint.close()
        for model in models.values():
            model.close()
        raise
    return models
