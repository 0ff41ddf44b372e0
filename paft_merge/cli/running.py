"""`paft run`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paft_merge.cli.terminal import (
    COMMAND,
    check_engine,
    console,
    engine_options,
    json_option,
    links_option,
    parallel_option,
    plain,
    print_json,
    say,
    sigterm_as_interrupt,
    trust_option,
)  # fmt: skip

if TYPE_CHECKING:
    from paft_merge.pipeline import Event, Planned

STAGES = ("train", "audit", "merge", "verify", "evaluate", "export", "push")

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Change the recipe, e.g. adapters.sft.training.max_steps=100 or merge.models[0].parameters.weight=0.5.",
)  # fmt: skip


@click.command(short_help="Train, audit, merge, verify, evaluate and push as a recipe says.")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option(
    "--from", "start", type=click.Choice(STAGES), help="Repeat this stage and those after it, changed or not."
)
@click.option("--only", type=click.Choice(STAGES), help="Run only this stage.")
@click.option("--dry-run", is_flag=True, help="Check everything and show the steps; write nothing.")
@set_option
@trust_option
@links_option
@engine_options
@parallel_option
@click.option("--quiet", is_flag=True, help="No lines about the steps.")
@json_option("Print the table as JSON; with --dry-run the steps.")
def run(
    recipe: Path,
    folder: Path,
    start: Any,
    only: Any,
    dry_run: bool,
    overrides: tuple[str, ...],
    trust_code: bool,
    follow_links: bool,
    quiet: bool,
    as_json: bool,
    **engine: Any,
) -> None:
    """Train, audit, merge, evaluate and push as RECIPE says, in RUN_DIR; finished steps that have not changed are skipped.

    A run that was killed resumes when the same command is given again. The table of results is printed last.
    """
    check_engine(**engine)
    silence_libraries()
    from paft_merge import pipeline
    from paft_merge.cli.run_tables import steps_table, table

    if dry_run:
        planned = pipeline.plan(
            recipe,
            folder,
            overrides=overrides,
            start=start,
            only=only,
            trust_code=trust_code,
            follow_links=follow_links,
        )
        print_json(planned.to_json()) if as_json else steps_table(planned)
        return
    with resume_hint(), sigterm_as_interrupt(), step_lines(quiet) as on_event:
        done = pipeline.run(
            recipe,
            folder,
            overrides=overrides,
            start=start,
            only=only,
            on_event=on_event,
            planned=_planned(folder, quiet),
            trust_code=trust_code,
            follow_links=follow_links,
            **engine,
        )
    if as_json:
        print_json({"folder": str(folder), "steps_done": len(done.done), "table": done.table.to_json()})
    elif done.table.rows:
        table(done.table)
    else:
        say(folder, err=False)
    if not quiet:
        say(f"{_steps(len(done.done))} done; results and logs are in {folder}")


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def silence_libraries() -> None:
    """Hide progress bars and known warnings of Hugging Face libraries; a run writes their logs into its folder."""
    for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    import warnings
    from logging import ERROR, getLogger

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="(trl|peft|transformers).*")
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")  # without a GPU torch does not pin
    getLogger("bitsandbytes").setLevel(ERROR)  # at import it lists kernels that are not installed


@contextmanager
def resume_hint() -> Iterator[None]:
    """After Ctrl-C, print the command that continues: the one that was given."""
    try:
        yield
    except KeyboardInterrupt:
        context = click.get_current_context()
        say(f"interrupted; finished steps are kept. To continue: {context.meta[COMMAND]}")
        context.exit(130)


def _planned(folder: Path, quiet: bool) -> Callable[[Planned], None]:
    def show(planned: Planned) -> None:
        if not quiet:
            done = len(planned.steps) - len(planned.todo)
            say(f"{_steps(len(planned.todo))} to do, {done} done already; logs: {folder / 'logs'}")

    return show


@contextmanager
def step_lines(quiet: bool) -> Iterator[Callable[[Event], None]]:
    """Print a line for every finished step; on a terminal, show the current step below."""
    if quiet:
        yield lambda _: None
        return
    if not sys.stderr.isatty():
        yield (lambda event: say(f"{event.step}: {event.text}") if event.what in ("done", "failed") else None)
        return
    shown = console(stderr=True)
    with shown.status("") as status:

        def show(event: Event) -> None:
            if event.what in ("done", "failed"):
                mark = "[green]done[/]" if event.what == "done" else "[red]failed[/]"
                shown.print(f"{mark} {plain(event.step)} [dim]{plain(event.text)}[/]")
            else:
                status.update(f"{plain(event.step)} {plain(event.text)}")

        yield show
