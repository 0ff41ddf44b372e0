"""`paft train`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paft_merge.cli.running import silence_libraries
from paft_merge.cli.terminal import (
    console,
    json_option,
    links_option,
    plain,
    print_json,
    say,
    sigterm_as_interrupt,
    trust_option,
)

if TYPE_CHECKING:
    from paft_merge.training.train_options import TrainProgress


@click.command(short_help="Train the sparse adapters of a recipe.")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", required=False, type=click.Path(file_okay=False, path_type=Path))
@click.option("--adapter", "adapters", multiple=True, metavar="NAME", help="Train this adapter only; may be repeated.")
@click.option(
    "--show", type=click.IntRange(1), metavar="N", help="Print the first N rows as they will be trained, and stop."
)
@click.option("--dry-run", is_flag=True, help="Check the recipe, the templates and every row, and stop.")
@click.option("--resume", is_flag=True, help="Skip finished adapters and continue interrupted ones.")
@click.option(
    "--schedule", type=click.Choice(["auto", "sequential", "processes"]), default="auto", show_default=True,
    help="Train one after another on one base in memory, or each in a process with its own GPUs.",
)  # fmt: skip
@click.option(
    "--devices", metavar="LIST",
    help="Devices for processes: GPUs (0,1) or CPU processes (cpu:2). Default: every visible GPU.",
)  # fmt: skip
@trust_option
@links_option
@click.option("--quiet", is_flag=True, help="Show no progress.")
@json_option("Print the folders of the adapters as JSON; with --dry-run what is known of the rows.")
def train(
    recipe: Path, out: Path | None, adapters: tuple[str, ...], show: int | None, dry_run: bool, resume: bool, schedule: Any,
    devices: str | None, trust_code: bool, follow_links: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train the adapters of RECIPE, each into OUT/NAME with a log in OUT/NAME.log (extra: paft-merge[train])."""
    if show and as_json:
        raise click.UsageError("--show prints rows for reading, and has no --json.")
    if show or dry_run:
        from paft_merge.inputs.links import following_links

        silence_libraries()
        with following_links(follow_links):
            _without_training(recipe, adapters, show, dry_run, trust_code, as_json)
        return
    if out is None:
        raise click.UsageError("Missing argument 'OUT', the folder of the adapters.")
    if devices and schedule == "sequential":
        raise click.UsageError("--devices needs processes; use CUDA_VISIBLE_DEVICES with --schedule sequential")
    from paft_merge.training import train
    from paft_merge.training.run_folder import RunFolder

    silence_libraries()
    before = {folder for folder in out.glob("*") if RunFolder(folder).finished}
    with sigterm_as_interrupt(), _progress(quiet) as progress:
        done = train(
            recipe, out, adapters=adapters or None, resume=resume, schedule=schedule, devices=devices,
            progress=progress, logs=True, trust_code=trust_code, follow_links=follow_links,
        )  # fmt: skip
    if as_json:
        print_json({"adapters": {name: str(folder) for name, folder in done.items()}})
    for name, folder in done.items():
        if not as_json:
            say(folder, err=False)
        if not quiet and (log := out / f"{name}.log").exists():
            say(f"{name}: {'was finished already, ' if out / name in before else ''}log in {log}")


def _without_training(
    recipe: Path, adapters: tuple[str, ...], show: int | None, dry_run: bool, trust_code: bool, as_json: bool
) -> None:
    """Print rows as they will be trained, and check all of them."""
    from rich.text import Text

    from paft_merge.cli.terminal import console
    from paft_merge.training.shown_rows import check, shown

    screen = console(highlight=False, soft_wrap=True)
    if show:
        for row in shown(recipe, show, adapters or None, trust_code=trust_code):
            screen.print(
                f"--- {row.adapter}: {row.place}, {row.name}, {row.tokens} tokens ---", style="dim", markup=False
            )
            text = Text()
            for part, labelled in row.parts:
                if screen.is_terminal:
                    text.append(part, "bold green" if labelled else "dim")
                else:
                    text.append(f"[[{part}]]" if labelled else part)
            screen.print(text)
        learned = "green" if screen.is_terminal else "[[...]]"
        screen.print(f"({learned}: tokens that are learned)", style="dim", markup=False)
    if dry_run and as_json:
        checked = check(recipe, adapters or None, trust_code=trust_code)
        print_json({"adapters": {name: {**facts, "notes": list(notes)} for name, facts, notes in checked}})
    elif dry_run:
        for name, facts, notes in check(recipe, adapters or None, trust_code=trust_code):
            say(f"{name}: {facts['rows']} rows are right", err=False)
            for note in notes:
                say(f"  {note}", err=False)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[TrainProgress], None] | None]:
    """On a terminal, a bar for every adapter; without one, a line for every logging step. Both on stderr."""
    if quiet or not sys.stderr.isatty():
        yield None if quiet else _line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    name, logged = TextColumn("{task.description}"), TextColumn("{task.fields[logged]}")
    with Bar(
        name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), logged, console=console(stderr=True)
    ) as bar:
        tasks: dict[str, Any] = {}

        def advance(now: TrainProgress) -> None:
            if now.name not in tasks:
                tasks[now.name] = bar.add_task(plain(now.name), total=now.steps, logged="")
            bar.update(tasks[now.name], completed=now.step, total=now.steps)
            if shown := _shown(now, _ON_BAR):
                bar.update(tasks[now.name], logged=shown)

        yield advance


_ON_BAR = {"loss": "loss", "sparse": "sparsity/below_1e-5"}
_ON_LINE = {**_ON_BAR, "eval loss": "eval_loss", "rate": "learning_rate"}
"""Values that are shown, and their names in the trainer's log."""


def _shown(now: TrainProgress, names: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {now.logs[name]:.4g}" for key, name in names.items() if name in now.logs)


def _line(now: TrainProgress) -> None:
    if shown := _shown(now, _ON_LINE):
        say(f"{now.name}: step {now.step}/{now.steps}, {shown}")
