"""`paft init`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Write a commented recipe to begin with.")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option("--base", required=True, help="The model to start from: a folder or Hub name.")
@click.option(
    "--data", "data", multiple=True, metavar="FILE|NAME", help="The skill's data; given twice, then the preferences'."
)
@click.option("--gpus", type=click.IntRange(0), default=0, show_default=True, help="How many GPUs; 0 for a CPU.")
def init(out: Path | None, base: str, data: tuple[str, ...], gpus: int) -> None:
    """Write a commented recipe for `paft run` to OUT, or print it."""
    from paft_merge.pipeline.starter_recipe import starter, write_starter

    if len(data) > 2:
        raise click.UsageError("--data is given at most twice: the skill's, then the preferences'.")
    sft, dpo = (*data, None, None)[:2]
    text = starter(base, sft, dpo, gpus)
    if out is None:
        click.echo(text, nl=False)
    else:
        write_starter(out, text)
        click.echo(f"{out} is written; look at it, then: paft run --dry-run {out} runs/first", err=True)
