"""`paft audit`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from paft_merge.cli.terminal import (
    COMPILER,
    clock,
    console,
    links_option,
    print_errors,
    sigterm_as_interrupt,
    warn,
)
from paft_merge.compute.magnitudes import EPSILON
from paft_merge.errors import AuditError

_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(short_help="How sparse adapters are, and whether they will merge.")
@click.argument("sources", nargs=-1, required=True)
@click.option("--base", help="The model that the sources change: a folder or Hub name. Optional for adapters.")
@click.option("--fetch-base", is_flag=True, help="Fetch the weights of the base from the Hub, not only its headers.")
@click.option("--lazy-unpickle", is_flag=True, help="Read .bin files through a reader that runs no code of them.")
@links_option
@click.option("--method", default="ties", show_default=True, help="Method to preview when there are several sources.")
@click.option(
    "-p",
    "--parameter",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    help="For --method; V1,V2: one for each source.",
)
@click.option("--no-preview", is_flag=True, help="Do not preview a merge.")
@click.option("--epsilon", default=EPSILON, show_default=True, help="An entry is sparse when |delta| is below this.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema in docs/audit.md) instead of tables.")
@click.option("--csv", type=_FILE, help="Write every number as CSV.")
@click.option("--html", type=_FILE, help="Write a report with figures and a glossary as one HTML page.")
@click.option("--png-dir", type=_FOLDER, help="Write the figures as PNG files into this folder.")
@click.option("--plots", type=_FOLDER, hidden=True, help="The former name of --png-dir.")
@click.option("--require", multiple=True, metavar="TEXT", help='Exit with 3 unless, e.g., "sparsity(1e-5) >= 0.9".')
@click.option("--threads", type=click.IntRange(1), help="Blocks computed at a time. Default: all cores.")
@click.option("--quiet", is_flag=True, help="Hide the progress bar.")
def audit(
    sources: tuple[str, ...], base: str | None, fetch_base: bool, lazy_unpickle: bool, follow_links: bool, method: str, parameters: tuple[str, ...], no_preview: bool, epsilon: float,
    as_json: bool, csv: Path | None, html: Path | None, png_dir: Path | None, plots: Path | None, require: tuple[str, ...],
    threads: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Audit SOURCES: adapters, fine-tuned models with --base, `base+adapter`, one recipe, or a finished merge.

    Reports how sparse each delta is, how the sources relate, and how much of each a merge would keep. A finished merge
    without --base is compared with its manifest, which also holds an audit of its sources.

    Exits with 3 when a --require fails, and with 2 when an option cannot be read.
    """
    from paft_merge import auditing
    from paft_merge.cli.audit_report import Outlets, report, report_manifest
    from paft_merge.output.manifest import is_merged
    from paft_merge.output.report_files import check_file

    outlets = Outlets(as_json, csv, html, png_dir or plots)
    with sigterm_as_interrupt(), _exit_codes():
        for file in filter(None, (csv, html)):
            check_file(file)
        if len(sources) == 1 and base is None and is_merged(sources[0]):
            report_manifest(auditing.verify(sources[0]), outlets, require)
            return
        preview = None if no_preview else auditing.Proposal.parse(method, parameters)
        with entries_bar(quiet) as progress:
            done = auditing.audit(
                *sources, base=base, preview=preview, epsilon=epsilon, require=require, fetch_base=fetch_base, lazy_unpickle=lazy_unpickle,
                follow_links=follow_links, threads=threads, progress=progress,
            )  # fmt: skip
        report(done, outlets, require)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Exit with 3 where a gate failed, with 2 where an option cannot be read, else with 1; name options in errors."""
    from paft_merge.cli.audit_tables import in_options

    try:
        yield
    except AuditError as error:
        warn(error.warnings)
        print_errors(error.problems, in_options)
        codes = {problem.code for problem in error.problems}
        raise click.exceptions.Exit(
            3 if codes == {"REQUIRED"} else 2 if codes <= {"GATE", "OPTION", "PREVIEW"} else 1
        ) from error


@contextmanager
def entries_bar(quiet: bool) -> Iterator[Callable[[Any], None]]:
    """A progress bar on stderr with the number of tensors and the time left."""
    if quiet:
        logging.getLogger(COMPILER).setLevel(logging.WARNING)
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.fields[tensors]}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console(stderr=True), transient=True, get_time=clock) as bar:
        task = bar.add_task("", total=None, tensors="")

        def advance(done: Any) -> None:
            bar.update(
                task,
                total=done.entries_total,
                completed=done.entries_done,
                tensors=f"{done.tensors}/{done.tensors_total} tensors",
            )

        yield advance
