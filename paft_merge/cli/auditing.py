"""`paft audit`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from paft_merge.cli.terminal import sigterm_as_interrupt, warn
from paft_merge.compute.magnitudes import EPSILON


@click.command(short_help="How sparse adapters are, and whether they will merge.")
@click.argument("sources", nargs=-1, required=True)
@click.option(
    "--base", help="What the sources change, a folder or Hub name. Adapters do without it, as far as that goes."
)
@click.option(
    "--fetch-base",
    is_flag=True,
    help="Fetch the weights of adapters' base from the Hub. Without it its headers are all that is read there.",
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
    "--epsilon", type=float, default=EPSILON, show_default=True, help="An entry is sparse when |delta| is below this."
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
    sources: tuple[str, ...], base: str | None, fetch_base: bool, method: str, parameters: tuple[str, ...], no_preview: bool, epsilon: float,
    as_json: bool, csv: Path | None, html: Path | None, plots: Path | None, require: tuple[str, ...], threads: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Audit SOURCES: adapters, fine-tuned models with --base, `base+adapter`, one recipe, or a finished merge.

    Says how sparse each delta is, how several get along, and what a merge would keep of each. A finished merge without
    --base is compared with its own manifest, which also has what the merge measured of its sources.
    """
    from paft_merge import auditing
    from paft_merge.cli.audit_report import Outlets, report, report_manifest
    from paft_merge.output.manifest import is_merged

    if len(sources) == 1 and base is None and is_merged(sources[0]):
        report_manifest(auditing.verify(sources[0]), Outlets(as_json, csv, html, plots), require)
        return
    proposal = (
        None
        if no_preview
        else auditing.Proposal.parse(method, parameters)
        if parameters or method != "ties"
        else auditing.Proposal()
    )
    with sigterm_as_interrupt(), _audit_progress(quiet) as progress:
        done = auditing.audit(
            *sources, base=base, preview=proposal, epsilon=epsilon, require=require, fetch_base=fetch_base, threads=threads,
            progress=progress,
        )  # fmt: skip
    report(done, Outlets(as_json, csv, html, plots), require, warn)


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
