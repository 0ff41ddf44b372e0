"""`paft tune`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paft_merge.cli.running import resume_hint, set_option, silence_libraries
from paft_merge.cli.terminal import sigterm_as_interrupt

if TYPE_CHECKING:
    from paft_merge.pipeline.tuning import Trial


@click.command(short_help="Search for the weights and densities that merge best.")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", metavar="RUN_DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--trials", type=click.IntRange(1), help="Trials in all, earlier ones in RUN_DIR counted. Default: the recipe's."
)
@set_option
@click.option("--quiet", is_flag=True, help="No lines about the trials.")
def tune(recipe: Path, folder: Path, trials: int | None, overrides: tuple[str, ...], quiet: bool) -> None:
    """Search weights, densities and the like of RECIPE's merge for the highest metric of its `tune:` section.

    Adapters are trained once, in RUN_DIR. Writes best.yaml, tune.png and trials.csv there; started again, it goes on.
    """
    silence_libraries()
    from paft_merge.pipeline.tuning import tune as search

    with resume_hint(), sigterm_as_interrupt(), _lines(quiet) as progress:
        found = search(recipe, folder, overrides=overrides, trials=trials, progress=progress)
    if not quiet:
        click.echo(f"best of {len(found.trials)}: {found.best.value:.4f} {dict(found.best.parameters)}", err=True)
    click.echo(found.recipe)


@contextmanager
def _lines(quiet: bool) -> Iterator[Callable[[Trial, int, int], None]]:
    def tell(trial: Trial, done: int, total: int) -> None:
        if not quiet:
            chosen = ", ".join(
                f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial.parameters.items()
            )
            click.echo(f"trial {done}/{total}: {trial.value:.4f}  {chosen}", err=True)
            sys.stderr.flush()

    yield tell
