"""`paft merge`."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paft_merge.cli.mergekit_options import accepts_mergekit_options
from paft_merge.cli.terminal import (  # fmt: skip
    COMPILER,
    WORKERS,
    Folder,
    Rate,
    Size,
    as_flags,
    clock,
    command_line,
    console,
    engine_options,
    import_option,
    importing,
    links_option,
    plain,
    print_json,
    recipe_place,
    say,
    sigterm_as_interrupt,
    warn,
)
from paft_merge.compute.cores import available_cores
from paft_merge.engine.options import MergeOptions
from paft_merge.errors import Problem, Problems

if TYPE_CHECKING:
    from paft_merge.engine.merge_result import MergeResult
    from paft_merge.engine.streaming import Progress
    from paft_merge.output.log_file import Note
    from paft_merge.plan import MergePlan


def planning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of every command that plans a merge; their names are fields of `MergeOptions`."""
    options = [
        click.option("--strict", is_flag=True, help="Raise an error for a recipe key that has no effect."),
        import_option,
        click.option(
            "--out-shard-size",
            "out_shard_bytes",
            type=Size(),
            help="Largest output file, e.g. 5GB. Default: the base's own files.",
        ),
        click.option(
            "--lazy-unpickle", is_flag=True, help="Read .bin checkpoints through a reader that runs no code of them."
        ),
        links_option,
        click.option(
            "--allow-crimes", is_flag=True, help="Merge models whose configs differ in fields that shapes do not show."
        ),
        click.option("--allow-nonfinite", is_flag=True, help="Merge NaN and infinity instead of failing."),
        click.option(
            "-i",
            "--tensor-intersection",
            "tensor_names",
            flag_value="intersection",
            help="For tensor files: merge the tensors that all files hold (as mergekit-pytorch).",
        ),
        click.option(
            "-u",
            "--tensor-union",
            "tensor_names",
            flag_value="union",
            help="For tensor files: merge the tensors that any file holds (as mergekit-pytorch).",
        ),
        click.option(
            "--unsafe-truncate-embeddings",
            is_flag=True,
            help="Cut embeddings to the smallest vocabulary, by position. A tokenizer: in the recipe is safer.",
        ),
        click.option("--output-name", metavar="NAME", help="Document to write, for a recipe file with several."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(short_help="Merge the models of a recipe into a folder.")
@click.argument("recipe")
@click.argument("out", type=Folder(), required=False)
@click.option("--dry-run", is_flag=True, help="Show the plan, from headers alone, and write nothing.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the result as JSON; with --dry-run the whole plan, every tensor with its parameters.",
)
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@click.option(
    "--threads", type=click.IntRange(1), help="Blocks computed at a time. Default: all cores. Changes no bit."
)
@click.option("--memory", type=Size(), help="Upper bound of the working memory, e.g. 800M.")
@click.option("--resume", is_flag=True, help="Continue an interrupted merge into OUT; a finished one stays.")
@click.option(
    "--overwrite", is_flag=True, help="Replace the model in OUT, which stays complete until the merge has finished."
)
@click.option(
    "--scratch", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="For OUT at a URL: folder for a file before its upload. Default: TMPDIR.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="With --overwrite: replace OUT even if it holds no model.")
@click.option(
    "--stream-from-hub", is_flag=True, help="Read weights from the Hub by byte ranges; nothing but OUT is stored."
)
@click.option("--trust-remote-code", is_flag=True, help="Copy the base's Python files into OUT. They are never run.")
@click.option(
    "--max-error", type=click.FloatRange(0), metavar="X",
    help="For an adapter as output: fail if the relative error of its rank is above X, e.g. 0.1.",
)  # fmt: skip
@click.option("--write-model-card/--no-write-model-card", default=True, show_default=True, help="Write README.md.")
@click.option("--worker", metavar="I/N", help="Be worker I (0 to N-1) of N that write OUT together. See docs/scale.md.")
@click.option(
    "--distributed", is_flag=True, help="Be a worker, numbered by torchrun, Slurm or a Kubernetes indexed Job."
)
@click.option("--finalize", is_flag=True, help="Complete the OUT of workers, or list the files that are missing.")
@click.option(
    "--lease-seconds",
    type=click.FloatRange(0, min_open=True),
    default=60,
    show_default=True,
    help="Take a worker for dead after this time without a sign of life.",
)
@click.option("--workers", type=click.IntRange(1), help="With --dry-run: predict the cost for this many workers.")
@click.option("--read-gbps", type=Rate(), help="With --dry-run: GB/s that a worker reads. Default: see `paft bench`.")
@click.option("--write-gbps", type=Rate(), help="With --dry-run: GB/s that a worker writes.")
@click.option("--gflops", type=Rate(), help="With --dry-run: GFLOP/s of a core in low-rank products.")
@engine_options
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
@planning_options
@accepts_mergekit_options
def merge(
    recipe: str,
    out: Path | str | None,
    dry_run: bool,
    as_json: bool,
    workers: int | None,
    read_gbps: float | None,
    write_gbps: float | None,
    gflops: float | None,
    quiet: bool,
    notes: list[Problem],
    **options: Any,
) -> None:
    """Merge the models of RECIPE (mergekit's YAML) into the folder OUT, with a log in OUT.log beside it.

    The options of mergekit-yaml are accepted too; a warning names those that have no effect here.
    """
    # Read when NumPy is imported. A merge calls BLAS from every thread; further threads of BLAS would only spin.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with importing():
        from paft_merge.engine import api
        from paft_merge.output.manifest import is_merged

    warn(notes)
    try:
        asked, place = MergeOptions(**options, warn=warn), recipe_place(recipe)
    except ValueError as error:
        raise click.UsageError(as_flags(str(error))) from None
    rates = {"read_gbps": read_gbps, "write_gbps": write_gbps, "gflops": gflops}
    given = {name: value for name, value in rates.items() if value is not None}
    if not dry_run and (workers or given):
        names = [*(["workers"] if workers else []), *given]
        raise click.UsageError(f"--{names[0].replace('_', '-')} is for a prediction, and needs --dry-run.")
    if workers and asked.shared:
        raise click.UsageError(
            "--workers predicts a merge by N workers; --worker, --distributed and --finalize are for one of them."
        )
    if dry_run:
        with api.open_plan(place, asked, stream_from_hub=True) as plan:
            problems = Problems()
            if out is not None and not (asked.keeps_finished and is_merged(out)):
                api.check_output(plan, out, asked, problems)
            warn([*plan.warnings, *problems.found])
            show_plan(plan, out, asked, workers or 1, given, as_json)
        return
    if out is None:
        raise click.UsageError("Missing argument 'OUT' (it may be left out only with --dry-run).")
    worker = asked.worker_number
    log = log_of(out, worker.name if worker else None)
    with sigterm_as_interrupt(), progress_bar(quiet) as progress, log as note:
        made = api.merge(place, out, asked, progress=noted(progress, note), warn=warned_and_noted(note))
        note(logging.INFO, f"{out} is done")
    if as_json:
        print_json(made.to_json())
    elif not quiet:
        say(out, err=False)
    if not quiet:
        for line in loss_lines(made):
            say(line)
        say(f"{out} is done: see its README.md and merge_manifest.json")


def loss_lines(made: MergeResult) -> Iterator[str]:
    """One line for each adapter among the results: its rank, and what that costs."""
    for result in made.results.values() or [made]:
        if result.plan.recipe.output.kind != "checkpoint" and (loss := result.manifest.get("adapter")):
            from paft_merge.cli.plan_tables import cost_text

            cost = cost_text(loss["relative_error"], loss.get("outside"))
            yield f"{result.path}: LoRA of rank {loss['rank']} on {loss['modules']} modules, {cost}"


_NAMES_FROM, _NAME, _NUMBERS = 100, 40, 48
"""Columns of a terminal that shows names of tensors, of a name, and of the numbers of the bar."""


_NOTED = 30.0
"""Seconds between the lines of a log about progress."""


@contextmanager
def log_of(out: Path | str | None, worker: str | None = None) -> Iterator[Note]:
    """Write the log of a command beside what it writes (see `log_beside`); nothing if it writes nothing, or to a URL."""
    from paft_merge.output.log_file import log_beside, logged

    if out is None or isinstance(out, str):
        yield lambda level, text: None
        return
    with logged(log_beside(out, worker), command_line()) as note:
        yield note


def noted(progress: Callable[[Progress], None], note: Note) -> Callable[[Progress], None]:
    """`progress` that also writes a line to the log at times."""
    last = time.monotonic()

    def advance(done: Progress) -> None:
        nonlocal last
        progress(done)
        if time.monotonic() - last >= _NOTED:
            last = time.monotonic()
            tensors = f"{done.tensors}/{done.tensors_total} tensors"
            note(logging.INFO, f"{tensors}, {done.bytes_done:,} of {done.bytes_total:,} bytes")

    return advance


def warned_and_noted(note: Note) -> Callable[[Sequence[Problem]], None]:
    """Print warnings, and write them to the log."""

    def told(problems: Sequence[Problem]) -> None:
        warn(problems)
        for problem in problems:
            note(logging.WARNING, f"{problem.code}: {problem}")

    return told


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Draw a bar on stderr with tensors, GB/s and the time left. It starts with the first tensor, after downloads."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when huggingface_hub is imported
        for name in (COMPILER, WORKERS):
            logging.getLogger(name).setLevel(logging.WARNING)
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    screen = console(stderr=True)
    names = screen.width >= _NAMES_FROM
    columns = (
        TextColumn("{task.fields[tensors]}"),
        BarColumn(max(8, min(40, screen.width - _NUMBERS - names * (_NAME + 1)))),
        TextColumn("{task.percentage:>3.0f}%"),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        *([TextColumn("{task.fields[name]}", style="dim")] if names else []),
    )
    bar = Bar(*columns, console=screen, transient=True, get_time=clock)
    task = bar.add_task("", total=None, tensors="", name="")
    try:

        def advance(done: Progress) -> None:
            bar.start()
            counts = f"{done.tensors}/{done.tensors_total} tensors"
            bar.update(
                task, total=done.bytes_total, completed=done.bytes_done, tensors=counts, name=plain(done.name[-_NAME:])
            )

        yield advance
    finally:
        bar.stop()


def show_plan(
    plan: MergePlan, out: Path | str | None, options: MergeOptions, workers: int, given: dict[str, float], as_json: bool
) -> None:
    """Print a plan and the prediction of its cost.

    Args:
        plan: the merge.
        out: the folder or URL to be written, if it is known.
        options: the options of the merge.
        workers: number of processes of the prediction.
        given: rates of the machine that replace the measured ones.
        as_json: print the whole plan.
    """
    from datetime import date

    from paft_merge.cli.plan_tables import adapter_line, plan_table, prediction_table, weights_line
    from paft_merge.compute.kernels.object_cache import seconds_to_compile
    from paft_merge.engine import api, imbalance, machine
    from paft_merge.engine.balancing import spreading_size
    from paft_merge.engine.factors import predicted_loss
    from paft_merge.engine.prediction import predict
    from paft_merge.stores import is_url

    known, faults = machine.stored()
    warn(faults)
    rates = (known.rates if known else machine.REFERENCE).model_copy(update=given)
    threads = api.threads_within(plan, options.threads or available_cores(), options.memory_bytes, Problems())
    in_stores = any("://" in model.ref for model in plan.models)  # these are read by ranges
    downloaded = 0 if options.stream_from_hub or in_stores else plan.bytes_on_hub
    # An output file is uploaded from scratch while the next one is written.
    uploaded = sum(sorted(shard.size for shard in plan.shards)[-2:]) if is_url(out) else 0
    found = predict(
        plan, workers=workers, threads=threads, rates=rates, hold=api.held_bytes(plan, threads, options.memory_bytes),
        scratch=downloaded + uploaded,
    )  # fmt: skip
    origin = machine.described(known, date.today(), given)
    spread = spreading_size(plan, workers) if found.uneven else None
    compiling, expected = seconds_to_compile(), imbalance.expected_weights(plan)
    is_adapter = plan.recipe.output.kind == "adapter"
    loss = predicted_loss(plan) if is_adapter and not in_stores and not plan.bytes_on_hub else None
    if as_json:
        more = {"rates_from": origin, "out_shard_bytes": spread, "seconds_to_compile": compiling}
        predicted = {**found.to_json(), **more}
        weights: dict[str, Any] = {"expected_weights": expected} if expected else {}
        if is_adapter:
            weights |= {"adapter": loss.to_json() if loss else None}
        print_json({**plan.to_json(out), **weights, "prediction": predicted})
    else:
        plan_table(plan, out)
        weights_line(plan, expected)
        if is_adapter:
            adapter_line(plan, loss)
        prediction_table(found, origin, len(plan.shards), spread, compiling)
        if options.device != "cpu":
            click.echo("the prediction is for the CPU")
