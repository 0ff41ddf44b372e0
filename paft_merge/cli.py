"""The `paft` command: one verb a job. Heavy imports are inside the verbs, so that `paft --help` answers at once."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from paft_merge.errors import PaftMergeError, Problem, Problems

if TYPE_CHECKING:
    from paft_merge.engine import Progress
    from paft_merge.plan import MergePlan

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """Bytes, as `800M`, `5GB` or, in mergekit's spelling, `5B`; decimal units."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        number = value.strip().lower()
        for unit in ("kb", "mb", "gb", "tb"):
            number = number.removesuffix(unit) + unit[0] if number.endswith(unit) else number
        factor = _UNITS.get(number[-1:], 0) if not number[-1:].isdigit() else 1
        try:
            size = int(float(number.rstrip("kmgbt")) * factor)
        except (ValueError, OverflowError):
            size = 0
        if size <= 0:
            self.fail(f"{value!r} is no size; write for example 800M or 5GB", param, ctx)
        return size


class _Group(click.Group):
    """Prints what a user can mend as one line a problem, and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PaftMergeError as error:
            for problem in error.problems:
                click.echo(_line("error", problem), err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo(
                "interrupted; what was finished is kept beside the output, and --resume goes on with it", err=True
            )
            ctx.exit(130)


def _line(kind: str, problem: Problem) -> str:
    return f"{kind}[{problem.code}]: {problem}"


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="paft-merge", prog_name="paft")
@click.option("-v", "--verbose", is_flag=True, help="Say more about what is going on.")
def cli(verbose: bool) -> None:
    """Merge LoRA adapters and checkpoints by streaming tensors, and train the sparse adapters to merge."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)


_import_option = click.option(
    "--import", "imports", multiple=True, metavar="MODULE", help="Import a module that registers methods with mergekit."
)  # fmt: skip


def _merge_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--strict", is_flag=True, help="Treat what would be ignored as an error."),
        _import_option,
        click.option(
            "--out-shard-size", type=Size(), help="Largest output file, e.g. 5GB. Default: the base's own files."
        ),
        click.option(
            "--lazy-unpickle", is_flag=True, help="Read .bin checkpoints through mergekit's restricted unpickler."
        ),
        click.option(
            "--allow-crimes", is_flag=True, help="Merge models whose configs differ where their tensors do not."
        ),
        click.option("--allow-nonfinite", is_flag=True, help="Merge NaN and infinity as they come."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("recipe")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--dry-run", is_flag=True, help="Show the plan, from headers alone, and write nothing.")
@click.option(
    "--json", "as_json", is_flag=True, help="With --dry-run: the whole plan as JSON, every tensor with its parameters."
)
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@click.option(
    "--threads", type=click.IntRange(1), help="Blocks computed at a time. Default: all cores. Changes no bit."
)
@click.option("--memory", type=Size(), help="Upper bound of the working memory, e.g. 800M.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted merge into OUT.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, which stays whole until the merge is.")
@click.option("--trust-remote-code", is_flag=True, help="Copy the base's Python files into OUT. They are not run.")
@click.option("--write-model-card/--no-write-model-card", default=True, show_default=True, help="Write README.md.")
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
@_merge_options
def merge(
    recipe: str, out: Path | None, dry_run: bool, as_json: bool, device: str, threads: int | None, memory: int | None,
    resume: bool, overwrite: bool, trust_remote_code: bool, write_model_card: bool, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Merge the models of RECIPE (mergekit's YAML) into the folder OUT."""
    from paft_merge import api

    planning = {("out_shard_bytes" if key == "out_shard_size" else key): value for key, value in options.items()}
    if dry_run:
        with api.open_plan(Path(recipe), **planning) as planned:
            problems = Problems()
            if out is not None:
                api.check_output(planned, out, overwrite=overwrite, problems=problems)
            _warn([*planned.warnings, *problems.found])
            _show_plan(planned, out, as_json)
        return
    if as_json:
        raise click.UsageError("--json shows a plan, and needs --dry-run.")
    if out is None:
        raise click.UsageError("Missing argument 'OUT' (only --dry-run does without).")
    with _terminable(), _progress(quiet) as progress:
        api.merge(
            Path(recipe), out, device=device, threads=threads, memory=memory, resume=resume, overwrite=overwrite,
            trust_remote_code=trust_remote_code, write_model_card=write_model_card, progress=progress,
            warn=_warn, **planning,
        )  # fmt: skip
    if not quiet:
        click.echo(f"{out} is done: see its README.md and merge_manifest.json", err=True)


def _warn(problems: Sequence[Problem]) -> None:
    for problem in problems:
        click.echo(_line("warning", problem), err=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that files are closed and the way to resume is told."""

    def stop(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr with tensors, GB/s and the time left."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.fields[tensors]}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TransferSpeedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[name]}", style="dim"),
    )  # fmt: skip
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, tensors="", name="")

        def advance(done: Progress) -> None:
            counts = f"{done.tensors}/{done.tensors_total} tensors"
            bar.update(task, total=done.bytes_total, completed=done.bytes_done, tensors=counts, name=done.name[-40:])

        yield advance


def _show_plan(planned: MergePlan, out: Path | None, as_json: bool) -> None:
    from paft_merge.report import plan_json, plan_table

    if as_json:
        click.echo(json.dumps(plan_json(planned, out), indent=2))
    else:
        plan_table(planned, out)


@cli.command()
@click.argument("name", required=False)
@_import_option
def methods(name: str | None, imports: tuple[str, ...]) -> None:
    """List the merge methods, or show the parameters of NAME."""
    from paft_merge.bridge import import_methods
    from paft_merge.methods import METHODS
    from paft_merge.report import method_details, method_table

    known = import_methods(imports, METHODS)
    if name is None:
        method_table(known)
    else:
        method_details(name, known)


@cli.command()
@click.argument("sources", nargs=-1, required=True)
@click.option(
    "--base", help="What the sources change, a folder or Hub name. Adapters do without it, as far as that goes."
)
@click.option("--method", default="ties", show_default=True, help="Method to preview when there are several sources.")
@click.option(
    "-p",
    "--parameter",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    help="Parameter of --method; V1,V2 is one a source.",
)
@click.option("--no-preview", is_flag=True, help="Preview nothing.")
@click.option(
    "--epsilon", type=float, default=1e-5, show_default=True, help="An entry is sparse when |delta| is below this."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema in docs/audit.md) instead of tables.")
@click.option("--csv", type=click.Path(dir_okay=False, path_type=Path), help="Write every number as CSV.")
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the report with pictures, one page."
)
@click.option(
    "--plots", type=click.Path(file_okay=False, path_type=Path), help="Write the pictures as PNG into this folder."
)
@click.option(
    "--require", multiple=True, metavar="TEXT", help='Exit with 1 unless it holds, e.g. "sparsity(1e-5) >= 0.9".'
)
@click.option(
    "--threads", type=click.IntRange(1), help="Blocks computed at a time. Default: all cores. Changes no count."
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def audit(
    sources: tuple[str, ...], base: str | None, method: str, parameters: tuple[str, ...], no_preview: bool, epsilon: float,
    as_json: bool, csv: Path | None, html: Path | None, plots: Path | None, require: tuple[str, ...], threads: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Audit SOURCES: adapters, fine-tuned models with --base, `base+adapter`, one recipe, or a finished merge.

    Says how sparse each delta is, how several get along, and what a merge would keep of each. A finished merge without
    --base is compared with its own manifest.
    """
    from paft_merge import auditing
    from paft_merge.auditing.command import Outlets, report, report_manifest
    from paft_merge.auditing.verify import is_merged

    if len(sources) == 1 and base is None and is_merged(sources[0]):
        if csv or html or plots or require:
            raise click.UsageError(
                "A finished merge is compared with its manifest; --csv, --html, --plots and --require need --base."
            )
        report_manifest(auditing.verify(sources[0]), as_json)
        return
    proposal = (
        None
        if no_preview
        else auditing.Proposal.parse(method, parameters)
        if parameters or method != "ties"
        else auditing.Proposal()
    )
    with _terminable(), _audit_progress(quiet) as progress:
        done = auditing.audit(
            *sources, base=base, preview=proposal, epsilon=epsilon, require=require, threads=threads, progress=progress
        )
    report(done, Outlets(as_json, csv, html, plots), require, _warn)


@cli.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--adapter", "adapters", multiple=True, metavar="NAME", help="Train this adapter only; may be repeated.")
@click.option("--resume", is_flag=True, help="Leave finished adapters alone and go on with interrupted ones.")
@click.option(
    "--schedule", type=click.Choice(["auto", "sequential", "processes"]), default="auto", show_default=True,
    help="One after another on one base in memory, or one process with its own GPUs for each adapter.",
)  # fmt: skip
def train(recipe: Path, out: Path, adapters: tuple[str, ...], resume: bool, schedule: Any) -> None:
    """Train the adapters of RECIPE, each into OUT/NAME (needs the extra: paft-merge[train])."""
    from paft_merge.train import train_recipe

    with _terminable():
        for folder in train_recipe(recipe, out, adapters=adapters or None, resume=resume, schedule=schedule).values():
            click.echo(folder)


@contextmanager
def _audit_progress(quiet: bool) -> Iterator[Callable[[Any], None]]:
    """A bar on stderr with the tensors and the time left."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.fields[tensors]}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, tensors="")

        def advance(done: Any) -> None:
            bar.update(
                task,
                total=done.entries_total,
                completed=done.entries_done,
                tensors=f"{done.tensors}/{done.tensors_total} tensors",
            )

        yield advance


if __name__ == "__main__":
    cli()
