"""`paft check` and `paft convert`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paft_merge.cli.terminal import (
    console,
    json_option,
    links_option,
    plain,
    print_json,
    say,
    sigterm_as_interrupt,
    warn,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paft_merge.dialects.checking import Finding, Verdict
    from paft_merge.dialects.conversion import Target

_STYLES = {"silent": "bold red", "refuses": "red", "option": "yellow", "loads": "green"}
_SHOWN = 2
"""Names of tensors that the table shows of each finding."""


@click.command(short_help="What vLLM, SGLang, llama.cpp, MLX and PEFT do with an adapter.")
@click.argument("adapter")
@click.option(
    "--for",
    "readers",
    metavar="LIST",
    help="Programs that must read it, e.g. vllm,sglang,peft, or all. Default: show all.",
)
@click.option("--base", help="The model that it was trained on: a folder or Hub name; checks names and shapes, too.")
@json_option("Print JSON (schema in docs/serving.md) instead of a table.")
@click.option("--lazy-unpickle", is_flag=True, help="Read .bin files through a reader that runs no code of them.")
@links_option
def check(
    adapter: str, readers: str | None, base: str | None, as_json: bool, lazy_unpickle: bool, follow_links: bool
) -> None:
    """Show what each program will do with ADAPTER: load it, need an option, refuse it, or silently ignore a part.

    Reads only headers. The rules and their sources are in docs/serving.md.

    Exits with 3 if a program that --for names refuses the adapter, or silently ignores a part of it.
    """
    from paft_merge.dialects import checking
    from paft_merge.dialects.places import adapter_at, base_at
    from paft_merge.dialects.rules import READERS
    from paft_merge.errors import AdapterError
    from paft_merge.inputs.links import following_links

    try:
        wanted = checking.readers_of(readers) if readers is not None else list(READERS)
    except AdapterError as error:
        raise click.UsageError(str(error)) from None
    with following_links(follow_links), base_at(base) as opened:
        folder = adapter_at(adapter, unpickle=lazy_unpickle)
        verdicts = checking.check(folder, wanted, opened, lazy_unpickle=lazy_unpickle)
    if as_json:
        print_json(checking.to_json(folder, verdicts))
    else:
        _show(verdicts)
    if readers is not None and not all(verdict.passes for verdict in verdicts):
        raise click.exceptions.Exit(3)


def _show(verdicts: Sequence[Verdict]) -> None:
    """Print a line for each finding, the worst first."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("reader", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for verdict in verdicts:
        reader = verdict.reader
        for finding in verdict.findings:
            table.add_row(reader, f"[{_STYLES[finding.outcome]}]{finding.outcome}[/]", _text(finding))
            reader = ""
        if not verdict.findings:
            table.add_row(reader, f"[{_STYLES['loads']}]loads[/]", "all of it, as it is")
    console(highlight=False).print(table)


def _text(finding: Finding) -> str:
    listed = ", ".join(name.removeprefix("base_model.model.") for name in finding.names[:_SHOWN]) + (
        ", ..." if finding.names[_SHOWN:] else ""
    )
    names = f" [dim]({len(finding.names):,}: {plain(listed)})[/]" if finding.names else ""
    fix = f"\n[dim]fix:[/] {plain(finding.fix)}" if finding.fix else ""
    return f"{plain(finding.what)}{names}{fix}"


@click.command(short_help="Write an adapter as another program reads it.")
@click.argument("adapter")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Choice(["vllm", "peft", "mlx", "kohya"]),
    help="vllm: what vLLM, SGLang, llama.cpp and PEFT all read.",
)
@click.option("--base", help="The model that it was trained on: a folder or Hub name. Needed for fused experts.")
@click.option("--overwrite", is_flag=True, help="Replace an adapter in OUT.")
@click.option("--lazy-unpickle", is_flag=True, help="Read .bin files through a reader that runs no code of them.")
@links_option
@json_option("Print the result and the warnings as JSON.")
def convert(
    adapter: str, out: Path, to: Target, base: str | None, overwrite: bool, lazy_unpickle: bool, follow_links: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Write ADAPTER, of PEFT, mlx-lm or kohya's scripts, to the folder OUT as another program reads it.

    No value changes where that is possible; every other change is a warning. What has no place in the other form is
    refused by name. See docs/serving.md.
    """
    from paft_merge.dialects import conversion
    from paft_merge.dialects.places import adapter_at, base_at
    from paft_merge.inputs.links import following_links

    with following_links(follow_links), base_at(base) as opened, sigterm_as_interrupt():
        folder = adapter_at(adapter, unpickle=lazy_unpickle)
        notes = conversion.convert(folder, out, to, opened, overwrite=overwrite, lazy_unpickle=lazy_unpickle)
    warn(notes)
    if as_json:
        print_json({"adapter": str(out), "warnings": [asdict(note) for note in notes]})
    else:
        say(out, err=False)
