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


class Size(click.ParamType):
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
    "--import", "imports", multiple=True, metavar="MODULE", help="Import a module that registers methods with mergekit. Repeatable."
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
        with api.plan(Path(recipe), **planning) as planned:
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


if __name__ == "__main__":
    cli()
