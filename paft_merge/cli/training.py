"""`paft train`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from paft_merge.cli.running import silence_libraries
from paft_merge.cli.terminal import sigterm_as_interrupt


@click.command(short_help="Train the sparse adapters of a recipe.")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--adapter", "adapters", multiple=True, metavar="NAME", help="Train this adapter only; may be repeated.")
@click.option("--resume", is_flag=True, help="Leave finished adapters alone and go on with interrupted ones.")
@click.option(
    "--schedule", type=click.Choice(["auto", "sequential", "processes"]), default="auto", show_default=True,
    help="One after another on one base in memory, or one process with its own GPUs for each adapter.",
)  # fmt: skip
@click.option(
    "--devices", metavar="LIST",
    help="Train side by side on these: GPUs (0,1) or processes on the CPU (cpu:2). Default: every visible GPU.",
)  # fmt: skip
@click.option("--quiet", is_flag=True, help="No progress bar.")
def train(
    recipe: Path, out: Path, adapters: tuple[str, ...], resume: bool, schedule: Any, devices: str | None, quiet: bool
) -> None:
    """Train the adapters of RECIPE, each into OUT/NAME (needs the extra: paft-merge[train])."""
    if devices and schedule == "sequential":
        raise click.UsageError("--devices are for processes; use CUDA_VISIBLE_DEVICES with --schedule sequential")
    from paft_merge.training import train

    silence_libraries()
    with sigterm_as_interrupt(), _train_progress(quiet) as progress:
        done = train(
            recipe, out, adapters=adapters or None, resume=resume, schedule=schedule, devices=devices,
            progress=progress,
        )  # fmt: skip
    for folder in done.values():
        click.echo(folder)


@contextmanager
def _train_progress(quiet: bool) -> Iterator[Callable[[Any], None] | None]:
    """A bar on stderr for every adapter, with the loss and the sparsity that were logged last."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    name, logged = TextColumn("{task.description}"), TextColumn("{task.fields[logged]}")
    with Bar(
        name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), logged, console=Console(stderr=True)
    ) as bar:
        tasks: dict[str, Any] = {}

        def advance(done: Any) -> None:
            if done.name not in tasks:
                tasks[done.name] = bar.add_task(done.name, total=done.steps, logged="")
            shown = [f"{key} {done.logs[name]:.4g}" for key, name in _SHOWN.items() if name in done.logs]
            task = tasks[done.name]
            bar.update(task, completed=done.step, total=done.steps)
            if shown:
                bar.update(task, logged=", ".join(shown))

        yield advance


_SHOWN = {"loss": "loss", "sparse": "sparsity/below_1e-5"}
"""What the bar shows, and how it is logged."""
