"""`paft verify`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paft_merge.cli.running import silence_libraries
from paft_merge.cli.terminal import (
    Size,
    as_flags,
    clock,
    console,
    import_option,
    json_option,
    links_option,
    plain,
    print_document,
    print_errors,
    sigterm_as_interrupt,
    trust_option,
)  # fmt: skip
from paft_merge.errors import AuditError
from paft_merge.output.report_files import check_file, write_file

if TYPE_CHECKING:
    from paft_merge.verifying import Verification, VerifyProgress

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(short_help="Whether a merged model is what its recipe means.")
@click.argument("out", metavar="OUT")
@click.option(
    "--recipe", type=_FILE, help="Merge recipe of a model that another tool merged. Default: that of OUT's manifest."
)
@click.option(
    "--data", type=_FILE, help="Prompts: rows with prompt or messages, or a text file with a prompt per line."
)
@click.option("--rows", type=click.IntRange(1), default=64, show_default=True, help="Number of prompts.")
@click.option(
    "--new-tokens", type=click.IntRange(0, 512),
    help="Tokens of each greedy continuation. Default: 16, and 0 of a model that does not fit in memory.",
)  # fmt: skip
@click.option("--tensors-only", is_flag=True, help="Compare stored tensors and files, and run no model.")
@click.option("--require", multiple=True, metavar="TEXT", help='Exit with 3 unless, e.g., "kl < 0.001".')
@click.option("--device", help="cuda or cpu. Default: a GPU if there is one.")
@click.option(
    "--memory",
    type=Size(),
    help="Memory for a model (800M); a larger one is read layer by layer. Default: half of what is free.",
)
@click.option("--threads", type=click.IntRange(1), help="Tensors compared at a time. Default: all cores.")
@click.option("--lazy-unpickle", is_flag=True, help="Read .bin files through a reader that runs no code of them.")
@import_option
@trust_option
@links_option
@json_option("Print JSON (schema in docs/verify.md) instead of tables.")
@click.option("--out", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON to a file.")
@click.option("--quiet", is_flag=True, help="Hide the progress bar.")
def verify(
    out: str, recipe: Path | None, data: Path | None, rows: int, new_tokens: int | None, tensors_only: bool, require: tuple[str, ...],
    device: str | None, memory: int | None, threads: int | None, lazy_unpickle: bool, imports: tuple[str, ...], trust_code: bool,
    follow_links: bool, as_json: bool, file: Path | None, quiet: bool,
) -> None:  # fmt: skip
    """Verify the merged model OUT: compare it with what its recipe means, in float32.

    Compares every stored tensor, the config, the tokenizer and the chat template. Then runs OUT as transformers loads it, the recipe's
    model in float32, the base, and for one adapter PEFT's model that is not merged, on the same tokens. Differences are named:
    rounding, a scale, a tensor of another place, a lost norm, another vocabulary.

    Exits with 3 when OUT is not what its recipe means up to rounding or a --require fails, and with 2 when a requirement cannot be
    read or measured.
    """
    if file is not None:
        check_file(file)
    silence_libraries()
    from paft_merge.verifying import verify as verified

    with _gate_as_usage():
        with sigterm_as_interrupt(), _progress(quiet) as progress:
            found = verified(
                out, recipe=recipe, data=data, rows=rows, new_tokens=new_tokens, tensors_only=tensors_only, require=require,
                device=device, memory=memory, threads=threads, trust_code=trust_code, follow_links=follow_links,
                lazy_unpickle=lazy_unpickle, imports=imports, progress=progress,
            )  # fmt: skip
        text = json.dumps(found.to_json(), indent=2) + "\n"
        if file is not None:
            write_file(file, text)
        if as_json:
            print_document(text)
        else:
            _show(found)
        failed = found.failures(require)
    if failed:
        raise AuditError(failed)
    if not found.ok:
        raise click.exceptions.Exit(3)


@contextmanager
def _gate_as_usage() -> Iterator[None]:
    """Exit with 2 if a requirement cannot be read or was not measured."""
    try:
        yield
    except AuditError as error:
        if {problem.code for problem in error.problems} != {"GATE"}:
            raise
        print_errors(error.problems)
        raise click.exceptions.Exit(2) from error


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[VerifyProgress], None]]:
    """On a terminal the stage with a bar, on stderr."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), console=console(stderr=True), transient=True, get_time=clock
    ) as bar:
        task = bar.add_task("", total=None)

        def show(now: VerifyProgress) -> None:
            bar.update(task, description=now.stage, completed=now.done, total=now.total or None)

        yield show


def _show(found: Verification) -> None:
    """Print the verdict, the differences, and a row for each model that was compared; a paragraph where a row does not fit."""
    from rich.table import Table

    from paft_merge.cli.plan_tables import terminal
    from paft_merge.verifying.report import NUMBERS, OTHERS

    out = terminal(highlight=False)
    out.print(f"{plain(found.where)} {plain(found.verdict)}", style="bold", soft_wrap=True)
    for finding in found.findings:
        out.print(f"- {plain(finding)}", soft_wrap=True)
    if found.behaviours:
        table = Table(
            title=plain(f"{found.prompts}; {next(iter(found.behaviours.values())).tokens:,} tokens"),
            title_justify="left",
        )
        table.add_column("compared with")
        shown = {name: one.shown() for name, one in found.behaviours.items()}
        measured = [at for at in range(len(NUMBERS)) if any(texts[at] for texts in shown.values())]
        for at in measured:
            table.add_column(NUMBERS[at], justify="right")
        for name, texts in shown.items():
            table.add_row(OTHERS[name], *(texts[at] for at in measured))
        if out.measure(table, options=out.options.update(max_width=1000)).maximum <= out.width:
            out.print(table)
        else:
            out.print(plain(table.title))
            for name, texts in shown.items():
                numbers = (f"{NUMBERS[at]} {texts[at]}" for at in measured if texts[at])
                out.print(f"[bold]{OTHERS[name]}[/]: {plain(', '.join(numbers))}")
        if (layer := found.behaviours["recipe"].breaks_at if "recipe" in found.behaviours else None) is not None:
            out.print(f"the hidden states part from the recipe's at layer {layer}")
    for name, why in found.skipped.items():
        out.print(
            plain(as_flags(f"not compared with {OTHERS[name]}: {why}" if name in OTHERS else f"{name}: {why}")),
            style="dim",
            soft_wrap=True,
        )
