"""`paft tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paft_merge.cli.running import resume_hint, set_option, silence_libraries, step_lines
from paft_merge.cli.terminal import (
    check_engine,
    engine_options,
    json_option,
    links_option,
    print_json,
    say,
    sigterm_as_interrupt,
    trust_option,
)

if TYPE_CHECKING:
    from paft_merge.pipeline.schema import RunRecipe
    from paft_merge.pipeline.search_result import Trial, TuneResult


@click.command(short_help="Search for the weights and densities that merge best.")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", metavar="RUN_DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--trials",
    type=click.IntRange(1),
    help="Number of trials in all, with the recipe as it is and earlier ones in RUN_DIR. Default: the recipe's.",
)
@click.option(
    "--pick", type=click.IntRange(1), metavar="N", help="Write trial N as best.yaml, instead of the best one."
)
@set_option
@trust_option
@links_option
@engine_options
@click.option(
    "--parallel", type=click.IntRange(1),
    help="Trials at a time. Default: 4 for a small base on the CPU of this machine, else 1; with --engine ray one for each "
    "GPU, or for each machine without GPUs.",
)  # fmt: skip
@click.option("--quiet", is_flag=True, help="No lines about the trials.")
@json_option("Print the best recipe and all trials as JSON.")
def tune(
    recipe: Path,
    folder: Path,
    trials: int | None,
    pick: int | None,
    overrides: tuple[str, ...],
    trust_code: bool,
    follow_links: bool,
    quiet: bool,
    as_json: bool,
    **engine: Any,
) -> None:
    """Search weights, densities and other parameters of RECIPE's merge for the highest metric of its `tune:` section.

    The first trial is the recipe as it is. Adapters are trained once, in RUN_DIR. Writes best.yaml, tune.png and
    trials.csv there, and for several metrics front/N.yaml. Started again, it continues.
    """
    check_engine(engine["engine"], engine["ray_address"], None)
    silence_libraries()
    from paft_merge.pipeline.execution import Event
    from paft_merge.pipeline.schema import load_run
    from paft_merge.pipeline.tuning import tune as search

    loaded = load_run(recipe, overrides)

    def progress(trial: Trial, done: int, total: int) -> None:
        on_event(Event(f"trial {trial.number}/{total}", "done", f"{_values(loaded, trial)}  {_described(trial)}"))

    with resume_hint(), sigterm_as_interrupt(), step_lines(quiet) as on_event:
        found = search(
            recipe, folder, overrides=overrides, trials=trials, pick=pick, progress=progress, on_event=on_event,
            trust_code=trust_code, follow_links=follow_links, **engine,
        )  # fmt: skip
    if not quiet:
        _summary(loaded, found, pick)
    print_json(found.to_json()) if as_json else say(found.recipe, err=False)


def _summary(recipe: RunRecipe, found: TuneResult, pick: int | None) -> None:
    """Print the front of several objectives, and the best trial."""
    best, count = found.best, len(found.trials)
    several = len(best.values) > 1
    if several:
        say(f"front ({len(found.front)} of {count} trials, each in {found.recipe.with_name('front')}):")
        for trial in found.front:
            say(f"  trial {trial.number}: {_values(recipe, trial)}  {_described(trial)}")
    own = next(trial for trial in found.trials if trial.is_recipe)
    worse = "; no other trial is better" if best.is_recipe and not several else ""
    against = "" if best.is_recipe else f" (the recipe as it is: {_values(recipe, own)})"
    rule = "picked" if pick else f"best of {count}"
    say(f"{rule}: trial {best.number}, {_values(recipe, best)}{against}  {_described(best)}{worse}")


def _values(recipe: RunRecipe, trial: Trial) -> str:
    from paft_merge.pipeline.search_result import shown_values

    values = shown_values(recipe, trial)
    if len(values) == 1:
        return f"{trial.value:.4f}"
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def _described(trial: Trial) -> str:
    if trial.is_recipe:
        return "the recipe as it is"
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial.parameters.items())
