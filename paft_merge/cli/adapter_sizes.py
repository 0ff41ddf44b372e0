"""`paft resize`: an adapter of another rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paft_merge.cli.terminal import console, links_option, plain, say, sigterm_as_interrupt

if TYPE_CHECKING:
    from paft_merge.engine.resizing import Resized

_SHOWN = 8
"""Modules that the table shows."""


def size_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose the ranks of an adapter."""
    options = [
        click.option("--rank", type=click.IntRange(1), help="Rank of every module."),
        click.option(
            "--energy", type=click.FloatRange(0, 1, min_open=True), metavar="E",
            help="For each module the smallest rank that keeps this share of the squared norm, e.g. 0.99.",
        ),
        click.option("--max-rank", type=click.IntRange(1), help="Limit of the ranks that --energy finds."),
        click.option("--include", multiple=True, metavar="NAME", help="Only modules of this name, e.g. q_proj or 'layers.1?.*'; may be repeated."),
        click.option("--exclude", multiple=True, metavar="NAME", help="No modules of this name; may be repeated."),
        click.option(
            "--portable/--no-portable", default=True, show_default=True,
            help="Write what vLLM, SGLang, llama.cpp and PEFT all read: one rank, no full tensors.",
        ),
        click.option(
            "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Type of the factors. Default: the input's."
        ),
        click.option("--max-error", type=click.FloatRange(0), metavar="X", help="Fail if the relative error is above X, e.g. 0.1."),
        click.option("--overwrite", is_flag=True, help="Replace the adapter in OUT."),
        click.option("--json", "as_json", is_flag=True, help="Print the ranks and errors of all modules as JSON."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command(short_help="Write a LoRA with another rank, from its factors alone.")
@click.argument("adapter")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@size_options
@click.option("--lazy-unpickle", is_flag=True, help="Read .bin files through a reader that runs no code of them.")
@links_option
def resize(adapter: str, out: Path, as_json: bool, lazy_unpickle: bool, follow_links: bool, **options: Any) -> None:
    """Write the best approximation of the LoRA in ADAPTER by one of another rank into the folder OUT.

    The base is not needed. Give --rank or --energy. The scale goes into the factors: lora_alpha becomes r. All other
    tensors are copied.
    """
    from paft_merge.engine.resizing import resize as resized
    from paft_merge.inputs.links import following_links

    try:
        with sigterm_as_interrupt(), following_links(follow_links):
            made = resized(adapter, out, unpickle=lazy_unpickle, **options)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from None
    if as_json:
        click.echo(json.dumps(made.to_json(), indent=2))
        return
    _show(made)
    say(out, err=False)


def _show(made: Resized) -> None:
    """Print the modules with the largest errors, and the error of all together."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("module", overflow="fold")
    for name in ("rank", "norm", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    worst = sorted(made.modules.items(), key=lambda item: -item[1].relative)
    for name, one in worst[:_SHOWN]:
        table.add_row(plain(name), str(one.rank), f"{one.norm:.3g}", f"{one.relative:.3g}")
    if len(worst) > _SHOWN:
        table.add_row(f"[dim]and {len(worst) - _SHOWN:,} more with smaller errors[/]")
    table.add_row("all", str(made.rank), f"{made.norm:.3g}", f"{made.error:.3g}")
    console(stderr=True, highlight=False).print(table)
