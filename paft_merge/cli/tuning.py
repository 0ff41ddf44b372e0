"""`paft tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paft_merge.cli.running import resume_hint, set_option, silence_libraries, step_lines
from paft_merge.cli.terminal import (
    check_engine,
    engine_options,
    links_option,
    parallel_option,
    say,
    sigterm_as_interrupt,
    trust_option,
)

if TYPE_CHECKING:
    from paft_merge.pipeline.tuning import Trial


@click.command(short_help="Search for the weights and densities that merge best.")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", metavar="RUN_DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--trials",
    type=click.IntRange(1),
    help="Number of trials in all, with the recipe as it is and earlier ones in RUN_DIR. Default: the recipe's.",
)
@set_option
@trust_option
@links_option
@engine_options
@parallel_option
@click.option("--quiet", is_flag=True, help="No lines about the trials.")
def tune(
    recipe: Path,
    folder: Path,
    trials: int | None,
    overrides: tuple[str, ...],
    trust_code: bool,
    follow_links: bool,
    quiet: bool,
    **engine: Any,
) -> None:
    """Search weights, densities and other parameters of RECIPE's merge for the highest metric of its `tune:` section.

    The first trial is the recipe as it is. Adapters are trained once, in RUN_DIR. Writes best.yaml, tune.png and
    trials.csv there. Started again, it continues.
    """
    check_engine(**engine)
    silence_libraries()
    from paft_merge.pipeline.execution import Event
    from paft_merge.pipeline.tuning import tune as search

    def progress(trial: Trial, done: int, total: int) -> None:
        on_event(Event(f"trial {trial.number}/{total}", "done", f"{trial.value:.4f}  {_described(trial)}"))

    with resume_hint(), sigterm_as_interrupt(), step_lines(quiet) as on_event:
        found = search(
            recipe, folder, overrides=overrides, trials=trials, progress=progress, on_event=on_event, trust_code=trust_code,
            follow_links=follow_links, **engine,
        )  # fmt: skip
    if not quiet:
        best, count = found.best, len(found.trials)
        worse = "; no other trial is better" if best.is_recipe else ""
        own = next(trial.value for trial in found.trials if trial.is_recipe)
        against = "" if best.is_recipe else f" (the recipe as it is: {own:.4f})"
        say(f"best of {count}: trial {best.number}, {best.value:.4f}{against}  {_described(best)}{worse}")
    say(found.recipe, err=False)


def _described(trial: Trial) -> str:
    if trial.is_recipe:
        return "the recipe as it is"
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial.parameters.items())
