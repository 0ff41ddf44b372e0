"""`paft train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from paft_merge.cli.terminal import terminable


@click.command()
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
    from paft_merge.training import train

    with terminable():
        for folder in train(recipe, out, adapters=adapters or None, resume=resume, schedule=schedule).values():
            click.echo(folder)
