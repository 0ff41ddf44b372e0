"""`merge` and `open_plan`: from a recipe to a folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from paft_merge.compute.cores import available_cores
from paft_merge.engine import imbalance
from paft_merge.engine.factors import check_loss, loss_of
from paft_merge.engine.finished import is_finished
from paft_merge.engine.intermediate import Intermediate
from paft_merge.engine.merge_result import MergeResult
from paft_merge.engine.options import MergeKeywords, MergeOptions
from paft_merge.engine.ray_cluster import Cluster, uses_ray
from paft_merge.engine.sidefiles import code_notice, identity, licence_notice, side_files, totals, wide_notice
from paft_merge.engine.sources import Sources
from paft_merge.engine.stored_merge import check_output_at, scratch_of
from paft_merge.errors import OutputError, PaftMergeError, Problem, Problems, RecipeError
from paft_merge.hub import HF, fetch_file, fetch_text
from paft_merge.hub.run_checkpoints import expand
from paft_merge.inputs.links import following_links
from paft_merge.methods import METHODS
from paft_merge.methods.mergekit_methods import import_methods
from paft_merge.output.folder import Output
from paft_merge.output.manifest import is_merged
from paft_merge.output.placing import check_place, tidy_finished
from paft_merge.output.stored import tidy
from paft_merge.plan import MergePlan, Model, plan_merge
from paft_merge.recipe import ModelRef, Recipe
from paft_merge.recipe.documents import Documents, load_recipes
from paft_merge.stores import Store, folder_of, has_scheme, is_url, place_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from paft_merge.engine.streaming import Progress
    from paft_merge.inputs.checkpoint import Checkpoint
    from paft_merge.output.stored import StoredOutput

log = logging.getLogger(__name__)

Source = Path | str | Mapping[str, Any] | Recipe | Documents


def open_plan(
    recipe: Source, options: MergeOptions | None = None, **overrides: Unpack[MergeKeywords]
) -> AbstractContextManager[MergePlan]:
    """Plan a merge from file headers and keep its inputs open: `with open_plan("recipe.yaml") as plan: ...`.

    Args:
        recipe: a file (also `hf://user/repository/recipe.yaml@revision`), YAML text, a mapping, or a loaded `Recipe`.
        options: see `MergeOptions`. Weights that are only on the Hub are downloaded, once the plan from their headers
            is valid, unless `stream_from_hub`.
        overrides: single options, which replace those of `options`.

    Raises:
        PaftMergeError: all problems that the recipe and the headers show, on entry of the context.
        TypeError: a keyword that is not an option.
    """
    return _open_plan(recipe, MergeOptions.of(options, overrides))


def merge(
    recipe: Source, out: Path | str, options: MergeOptions | None = None, **overrides: Unpack[MergeKeywords]
) -> MergeResult:
    """Merge the models of a recipe into the folder `out`, which `AutoModelForCausalLM.from_pretrained` then loads.

    Args:
        recipe: as for `open_plan`. Of a file with several results each is written to a folder of its name in `out`.
        out: folder to write; must not exist or be empty, unless `overwrite`. It grows as `out.part`, and in a mount
            point as `out/.paft.part`. Or the URL of a folder in an object store, which is finished when it has its manifest.
        options: see `MergeOptions`.
        overrides: single options, which replace those of `options`: `merge(recipe, out, threads=2)`.

    Raises:
        PaftMergeError: all problems that can be found together.
        TypeError: a keyword that is not an option.
    """
    asked, out = MergeOptions.of(options, overrides), place_of(out)
    with _with_place(out, asked, Problems()):
        documents = read_documents(recipe, asked)
    if asked.output_name is not None or len(documents.finals) == 1:
        return _merge(documents, out, asked)
    names = [str(result.name) for result in documents.finals]
    with Cluster.connect(asked.ray_address) if uses_ray(asked.engine) else nullcontext():
        return MergeResult.of_several(
            out, {name: _merge(documents, _below(out, name), replace(asked, output_name=name)) for name in names}
        )


def read_documents(recipe: Source, options: MergeOptions) -> Documents:
    """Read and check the recipe, from the Hub or an object store if it is there."""
    if isinstance(recipe, Documents):
        return recipe
    here, url = recipe, None
    if isinstance(recipe, str) and recipe.startswith(HF):
        here = fetch_file(recipe)
    elif has_scheme(recipe) and "\n" not in str(recipe):
        url = str(recipe)
        here = fetch_text(url)
    methods = import_methods(options.imports, METHODS)
    return load_recipes(here, strict=options.strict, methods=methods, expand=expand, named=url)


@contextmanager
def _open_plan(recipe: Source, options: MergeOptions) -> Iterator[MergePlan]:
    with _planned(read_documents(recipe, options), options) as plan:
        yield plan


@contextmanager
def _planned(
    documents: Documents,
    options: MergeOptions,
    before_download: Callable[[MergePlan, Sources], None] = lambda *_: None,
) -> Iterator[MergePlan]:
    """Open the inputs of one recipe and plan its merge.

    Args:
        documents: the recipe and those that it uses.
        options: which recipe, and how to read its inputs.
        before_download: called with the plan from headers before weights are downloaded; may raise.
    """
    recipe = documents.only(options.output_name)
    parts = documents.parts_of(recipe)
    notices: list[Problem] = documents.unused([recipe]) if options.output_name is None else []

    def plan(models: Mapping[ModelRef, Model], of: Recipe = recipe) -> MergePlan:
        return _plan(of, models, options, notices if of is recipe else None)

    def compute(name: str, models: Mapping[ModelRef, Model]) -> Checkpoint:
        inner = documents.named[name]
        if inner.output.kind != "checkpoint":
            what = f"{name} is merged by another document, and its output is not a checkpoint"
            raise RecipeError.of("RECIPE", inner.located.spot(("output",)), what, "remove output from it")
        if inner.quantization:
            what = f"{name} is merged by another document, and its result is not written as codes"
            raise RecipeError.of("RECIPE", inner.located.spot(("quantization",)), what, "remove quantization from it")
        made = plan(models, inner)
        notices.extend(made.warnings)
        return Intermediate(name, made, rounded=recipe.arithmetic == "mergekit")

    with ExitStack() as inputs:
        with _with_warnings(recipe.warnings), following_links(options.follow_links):
            refs = tuple(dict.fromkeys(ref for part in parts for ref in part.references))
            template = _template(recipe, documents)
            unpickle, computed = options.lazy_unpickle, documents.named
            beside = folder_of(recipe.located.file) if recipe.located.file else None
            sources = Sources.find(
                refs, unpickle=unpickle, computed=computed, template=template, spots=_spots(parts), beside=beside
            )
            notices += sources.warnings
            if sources.missing_bytes and not options.stream_from_hub:
                with sources.opened(compute) as models:
                    from_headers = plan(models)
                    sources.headers_only = not from_headers.stored_reads
                    before_download(from_headers, sources)
                sources.pull()
            planned = plan(inputs.enter_context(sources.opened(compute)))
        yield planned


def _planned_in_task(documents: Documents, options: MergeOptions) -> AbstractContextManager[MergePlan]:
    """As `_planned`, in a process that has not read the recipe and so has not imported its methods."""
    import_methods(options.imports, METHODS)
    return _planned(documents, options)


def _plan(
    recipe: Recipe, models: Mapping[ModelRef, Model], options: MergeOptions, notices: Sequence[Problem] | None
) -> MergePlan:
    """Plan a merge of models that are open; `notices` are further warnings of the result, None for one that another uses."""
    made = plan_merge(
        recipe,
        {ref: models[ref] for ref in recipe.references},
        out_shard_bytes=options.shard_bytes,
        allow_crimes=options.allow_crimes,
        allow_nonfinite=options.allow_nonfinite,
        tensor_names=options.tensor_names,
        truncate_embeddings=options.unsafe_truncate_embeddings,
    )
    if notices is None:
        return made
    return replace(made, warnings=tuple(dict.fromkeys((*notices, *made.warnings, *imbalance.recorded(made)))))


def planned_again(plan: MergePlan, recipe: Source) -> MergePlan | None:
    """Plan a merge of the open models of a plan with other parameters.

    Args:
        plan: a plan of `open_plan` without options.
        recipe: as for `open_plan`.

    Returns:
        None if the recipe may need other models, or the same ones opened otherwise.
    """
    documents, before = read_documents(recipe, MergeOptions()), plan.recipe
    found = documents.only(None)
    known = not documents.named and found.references == before.references
    if not known or _template(found, documents) != _template(before, documents):
        return None
    return _plan(found, dict(zip(before.references, plan.models, strict=True)), MergeOptions(), ())


def _template(recipe: Recipe, documents: Documents) -> ModelRef:
    """Return the model whose tensor names the output has: the base, or the first source; through other documents."""
    first = recipe.modules[0].slices[0]
    found = recipe.base_model or first.base or first.sources[0].ref
    return _template(documents.named[found.path], documents) if found.path in documents.named else found


def _spots(parts: Sequence[Recipe]) -> dict[ModelRef, str]:
    """Return the file and the line of each reference of a recipe that is a file."""
    named = [one for part in parts for output in part.slices for one in output.sources]
    return {one.ref: f"{one.spot.file}:{one.spot.line}" for one in reversed(named) if one.spot.file and one.spot.line}


def _merge(documents: Documents, out: Path | str, options: MergeOptions) -> MergeResult:
    """Merge one result of the documents."""
    from paft_merge.compute.devices import ops_for
    from paft_merge.engine.coded_weights import lost, write_codes, writes_codes
    from paft_merge.engine.sparse_deltas import counted, write_deltas
    from paft_merge.engine.streaming import merge_checkpoint, sized

    start, problems, worker = perf_counter(), Problems(), options.worker_number
    on_ray = uses_ray(options.engine)
    ops = ops_for("cpu" if on_ray else options.device, worker.local_index if worker else None)
    warnings: list[Problem] = []

    def warn(found: Sequence[Problem]) -> None:
        warnings.extend(found)
        (options.warn or _log)(found)

    def before_download(plan: MergePlan, sources: Sources) -> None:
        place = Problems()
        check_output(plan, out, options, place)
        if not (
            options.keeps_finished and is_merged(out)
        ):  # after the check: another worker may just have completed it
            place.raise_as(OutputError)
        sources.check_room(0 if is_url(out) else plan.bytes_written, Path(out))

    with ExitStack() as inputs:
        with _with_place(out, options, problems):
            plan = inputs.enter_context(_planned(documents, options, before_download))
        place = Problems()
        check_output(plan, out, options, place)
        if is_finished(plan, out, options, problems):  # likewise
            _tidy(plan, out, options)
            warn(plan.warnings)
            return MergeResult(out, (plan,), tuple(warnings), perf_counter() - start, 0)
        if not problems.found:
            problems.found += place.found
        if options.max_error is not None and plan.recipe.output.kind != "adapter":
            what = f"max_error is about the rank of an adapter, and the recipe writes a {plan.recipe.output.kind}"
            problems.add("ADAPTER_OUTPUT", out, what, "leave it out, or write output: {kind: adapter, rank: ...}")
        if on_ray and plan.recipe.output.kind == "delta":
            what = (
                "the size of a sparse delta is known after a pass over the inputs, which the tasks of Ray do not share"
            )
            problems.add("OUTPUT", out, what, "merge with engine='local': the output is one file")
        if on_ray:
            problems.raise_as(OutputError)
            cluster = inputs.enter_context(Cluster.connect(options.ray_address))
        cores = cluster.cores if on_ray else available_cores() // (worker.local_count if worker else 1)
        threads = threads_within(plan, options.threads or max(cores, 1), options.memory_bytes, problems)
        if options.shared and plan.recipe.output.rank == "auto":
            what = "rank: auto measures all deltas before the merge, which several workers do not share"
            problems.add("ADAPTER_OUTPUT", plan.recipe.located.spot(("output", "rank")), what, "write rank as a number")
        problems.raise_as(OutputError)
        plan = sized(plan, threads=threads, ops=ops)
        notices = [
            *code_notice(plan, trust_remote_code=options.trust_remote_code),
            *licence_notice(plan),
            *wide_notice(plan),
        ]
        log.info("merging %d tensors, %d bytes, into %s", len(plan.tensors), plan.bytes_written, out)
        warn([*plan.warnings, *notices])
        held = held_bytes(plan, threads, options.memory_bytes)
        if plan.recipe.output.kind == "delta":
            log.info("counting the entries of %d deltas that are not zero", len(plan.tensors))
            progress = options.progress or (lambda _: None)
            plan = counted(plan, threads=threads, ops=ops, hold=held, progress=progress)
        written = 0

        def merge_into(output: Output, part: MergePlan, progress: Callable[[Progress], None]) -> None:
            nonlocal written
            codes = write_codes if writes_codes(part) else merge_checkpoint
            write = write_deltas if part.recipe.output.kind == "delta" else codes
            write(part, output, threads=threads, ops=ops, hold=held, progress=progress)
            written += part.bytes_written

        def complete(output: Output | StoredOutput) -> None:
            check_loss(loss_of(plan, output.finished), options.max_error)
            output.complete(side_files(plan, output.finished, options), overwrite=options.overwrite)
            warn(lost(plan, output.finished))
            if not any(problem.code == "SCALE" for problem in plan.warnings):
                warn(imbalance.measured(totals(plan, output.finished), plan))

        if isinstance(out, str):
            from paft_merge.engine.stored_merge import merge_into_store

            merge_into_store(
                plan, Store(out), options, merge_into=merge_into, threads=threads, ops=ops, complete=complete
            )  # fmt: skip
        elif on_ray:
            from paft_merge.engine.ray_merge import merge_on_ray

            written = merge_on_ray(
                plan,
                partial(_planned_in_task, documents, replace(options, progress=None, warn=None)),
                out,
                options,
                cluster=cluster,
                threads=threads,
                hold=held,
                complete=complete,
                warn=warn,
            )
        elif options.shared:
            from paft_merge.engine.workers import merge_shared

            merge_shared(
                plan,
                out,
                worker,
                options,
                merge_into=merge_into,
                threads=threads,
                ops=ops,
                complete=complete,
                warn=warn,
            )
        else:
            tiles = {tensor.name: tensor.tile_bytes for tensor in plan.tensors}
            with Output.open(out, plan.shards, identity(plan, options.device), tiles, resume=options.resume) as output:
                merge_into(output, plan, options.progress or (lambda _: None))
                complete(output)
    log.info("%s: merged in %.1f s", out, perf_counter() - start)
    return MergeResult(out, (plan,), tuple(warnings), perf_counter() - start, written)


def _below(out: Path | str, name: str) -> Path | str:
    return f"{out.rstrip('/')}/{name}" if isinstance(out, str) else out / name


def _tidy(plan: MergePlan, out: Path | str, options: MergeOptions) -> None:
    """Remove what a merge that was killed after its last rename, or after the upload of its manifest, left."""
    if isinstance(out, str):
        tidy(Store(out), scratch_of(options))
        return
    try:
        tidy_finished(out)
    except OutputError:
        if not options.shared:  # else another worker is still doing that
            raise
    if options.shared:
        from paft_merge.engine.workers import remove_late_folder

        remove_late_folder(plan, out, options)


def check_output(plan: MergePlan | None, out: Path | str, options: MergeOptions, problems: Problems) -> None:
    """Add to `problems` every reason why the merge cannot be written to `out`; without a plan, those that the folder shows."""
    if is_url(out):
        check_output_at(plan, str(out), options, problems)
        return
    out = Path(out)
    replaces = {"overwrite": options.overwrite, "force": options.force}
    needed = plan.bytes_written + sum(f.stat().st_size for f in plan.side_files.copied.values()) if plan else 0
    check_place(out, _inputs(plan) if plan else (), needed, problems=problems, **replaces)


def threads_within(plan: MergePlan, threads: int, memory: int | None, problems: Problems) -> int:
    """Return the number of blocks to compute at once: `threads`, or fewer if `memory` bytes do not hold as many."""
    largest = max(plan.tensors, key=lambda t: t.block_bytes, default=None)
    if memory is None or largest is None:
        return threads
    if memory < largest.block_bytes:
        what = f"one block and its inputs take {largest.block_bytes:,} bytes, more than memory={memory}"
        problems.add("MEMORY", largest.name, what, f"allow at least {largest.block_bytes:,} bytes")
        return 1
    return min(threads, memory // max(largest.block_bytes, 1))


def held_bytes(plan: MergePlan, threads: int, memory: int | None) -> int:
    """Return the bytes of merged tensors that may wait in memory beside the blocks being computed."""
    from paft_merge.engine.streaming import HELD_BYTES

    blocks = threads * max((t.block_bytes for t in plan.tensors), default=0)
    return HELD_BYTES if memory is None else max(0, min(HELD_BYTES, memory - blocks))


@contextmanager
def _with_place(out: Path | str, options: MergeOptions, problems: Problems) -> Iterator[None]:
    """Add the problems of the output folder to an error about the inputs."""
    try:
        yield
    except PaftMergeError as error:
        with problems.catching():
            if not (options.keeps_finished and is_merged(out)):
                check_output(None, out, options, problems)
        raise type(error)(tuple(dict.fromkeys([*error.problems, *problems.found])), error.warnings) from error


@contextmanager
def _with_warnings(warnings: Sequence[Problem]) -> Iterator[None]:
    """Add warnings to an error, because no plan will report them."""
    try:
        yield
    except PaftMergeError as error:
        error.warnings = (*warnings, *error.warnings)
        raise


def _log(problems: Sequence[Problem]) -> None:
    for problem in problems:
        log.warning("%s", problem)


def _inputs(plan: MergePlan) -> list[Path]:
    adapters = [part.folder for model in plan.models if model.adapter for part in model.adapter.parts]
    file = plan.recipe.located.file
    recipe = [Path(file)] if file and not is_url(file) else []
    return [*recipe, *(folder for model in plan.models for folder in model.checkpoint.folders), *adapters]
