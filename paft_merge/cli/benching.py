"""`paft bench`."""

from __future__ import annotations

from pathlib import Path

import click

from paft_merge.cli.terminal import Rate, Size, json_option, print_json, say, sigterm_as_interrupt


@click.command(short_help="Measure this machine, for predictions of a merge.")
@click.option(
    "--dir",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="Measure the disk of this folder, which gets a temporary file. Default: the working directory.",
)
@click.option("--size", type=Size(), help="Largest size of that file. Default: 4.3GB, or half of the free space.")
@click.option(
    "--seconds",
    type=Rate(),
    default=5,
    show_default=True,
    help="Longest time of each of the five measurements.",
)
@json_option("Print the measurement as JSON.")
def bench(folder: Path, size: int | None, seconds: float, as_json: bool) -> None:
    """Measure disk, cores and loops of this machine, and store the rates for `paft merge --dry-run`.

    It takes half a minute. Nothing else should run meanwhile.
    """
    from paft_merge.engine import benchmark, machine

    with sigterm_as_interrupt():
        found = benchmark.measure(folder, nbytes=size or benchmark.BYTES, limit=seconds)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        rates = found.rates
        click.echo(f"reads   {rates.read_gbps:.3g} GB/s from the disk of {found.folder}")
        click.echo(f"writes  {rates.write_gbps:.3g} GB/s to it")
        click.echo(f"cache   {rates.cached_gbps:.3g} GB/s a core")
        click.echo(f"product {rates.gflops:.3g} GFLOP/s a core, with {found.cores} at work")
        click.echo(f"loops   {rates.loops:.3g} times as fast as the reference machine's")
    path = machine.store(found)
    say(f"stored in {path}" if path else "not stored: this user has no folder for caches")
