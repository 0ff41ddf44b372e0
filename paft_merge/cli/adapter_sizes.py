"""`paft extract` and `paft resize`: adapters of a rank that is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paft_merge.cli.merging import loss_lines, progress_bar
from paft_merge.cli.terminal import Size, console, links_option, plain, print_json, say, sigterm_as_interrupt, warn
from paft_merge.engine.options import MergeOptions

if TYPE_CHECKING:
    from paft_merge.auditing.rank_costs import RankCurve
    from paft_merge.engine.extraction import Extracted
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


@click.command(short_help="Write the difference of a fine-tune from its base as a LoRA.")
@click.argument("finetune")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option("--base", required=True, help="The model that it was trained from: a folder or Hub name.")
@click.option(
    "--curve", is_flag=True, help="Instead of writing OUT, show the error at every rank up to --max-rank [128]."
)
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --curve: draw the errors, too (.svg, .png, .pdf).",
)
@size_options
@click.option(
    "--threads", type=click.IntRange(1), help="Blocks computed at a time. Default: all cores. Changes no bit."
)
@click.option("--memory", type=Size(), help="Upper bound of the working memory, e.g. 800M.")
@click.option("--resume", is_flag=True, help="Continue an interrupted extraction into OUT.")
@click.option(
    "--unsafe-truncate-embeddings", is_flag=True,
    help="For a fine-tune with more tokens: ignore their rows. The ids of the other tokens must agree.",
)  # fmt: skip
@click.option("--lazy-unpickle", is_flag=True, help="Read .bin files through a reader that runs no code of them.")
@links_option
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
def extract(
    finetune: str,
    out: Path | None,
    base: str,
    curve: bool,
    picture: Path | None,
    as_json: bool,
    quiet: bool,
    rank: int | None,
    energy: float | None,
    max_rank: int | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    portable: bool,
    dtype: str | None,
    **options: Any,
) -> None:
    """Write the best low-rank approximation of FINETUNE minus its base as a LoRA into the folder OUT.

    Give --rank or --energy, or --curve to choose them. Both models are read block by block. Deltas that an adapter cannot
    hold, such as those of norms and embeddings, are left out and reported; --no-portable stores what PEFT can load.
    """  # fmt: skip
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in `paft merge`
    from paft_merge.engine.extraction import extracted, output_of, recipe_of

    asked = MergeOptions(**options, warn=warn)
    if curve:
        _check_curve(out, rank, energy, options)
        from paft_merge.auditing.rank_costs import check_plot, plot, rank_curve

        if picture:
            check_plot(picture)
        output = output_of(max_rank or _MOST, None, None, include, exclude, portable)
        found = rank_curve(recipe_of(finetune, base, **output), max_rank or _MOST, asked)
        print_json(found.to_json()) if as_json else _show_curve(found)
        if picture:
            plot(found, picture)
            say(f"{picture} is drawn")
        return
    if out is None:
        raise click.UsageError("Missing argument 'OUT' (it is left out only with --curve).")
    if picture:
        raise click.UsageError("--plot draws a curve, and needs --curve.")
    try:
        output = output_of(rank, energy, max_rank, include, exclude, portable)
        with sigterm_as_interrupt(), progress_bar(quiet) as progress:
            made = extracted(recipe_of(finetune, base, dtype=dtype, **output), out, replace(asked, progress=progress))
    except ValueError as error:
        raise click.UsageError(f"{error}.") from None
    if as_json:
        print_json(made.to_json())
    else:
        say(out, err=False)
    if not quiet:
        _show_extracted(made)


_MOST = 128
"""The largest rank of a curve, without --max-rank."""


def _check_curve(out: Path | None, rank: int | None, energy: float | None, options: dict[str, Any]) -> None:
    given = [
        name
        for name, value in {
            "OUT": out, "--rank": rank, "--energy": energy, "--resume": options["resume"], "--overwrite": options["overwrite"],
            "--max-error": options["max_error"],
        }.items()
        if value
    ]  # fmt: skip
    if given:
        raise click.UsageError(f"--curve writes no adapter: leave out {', '.join(given)}.")


def _show_extracted(made: Extracted) -> None:
    for line in loss_lines(made.merge):
        say(line)
    if made.left_out:
        name, norm = next(iter(made.left_out.items()))
        say(
            f"left out: {len(made.left_out):,} deltas with {made.left_out_share:.2%} of the squared norm of the fine-tune,"
            f" the largest of {plain(name)} (norm {norm:.3g})"
        )


def _show_curve(curve: RankCurve) -> None:
    """Print the error at each rank, and the ranks that some energies need."""
    from rich.table import Table

    from paft_merge.auditing.rank_costs import ENERGIES
    from paft_merge.plan.formatting import show_bytes

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("rank", "relative error", "energy kept", "size in bfloat16"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank in curve.ranks:
        error = curve.error(rank)
        table.add_row(str(rank), f"{error:.4f}", f"{1 - error**2:.2%}", show_bytes(2 * curve.parameters(rank)))
    console(highlight=False).print(table)
    for energy in ENERGIES:
        need = curve.needed(energy)
        found = (
            f"rank {need.largest} (on average {need.mean:.1f})"
            if need.largest is not None
            else f"more than rank {curve.ranks[-1]}"
        )
        say(f"--energy {energy:g} needs {found}", err=False)


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
        print_json(made.to_json())
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
