"""The `paft` command. Commands import heavy packages when they run, so that `paft --help` answers at once."""

from __future__ import annotations

import atexit
import gc
import logging
import sys
from typing import Any

import click

from paft_merge.cli.auditing import audit
from paft_merge.cli.evaluating import evaluate
from paft_merge.cli.explaining import explain
from paft_merge.cli.hub import card, pull, push, reproduce
from paft_merge.cli.listing import methods
from paft_merge.cli.merging import merge
from paft_merge.cli.running import run
from paft_merge.cli.starting import init
from paft_merge.cli.terminal import Size as Size
from paft_merge.cli.terminal import line, warn
from paft_merge.cli.training import train
from paft_merge.cli.tuning import tune
from paft_merge.errors import PaftMergeError


class _Group(click.Group):
    """Prints the problems of a `PaftMergeError`, one line each, and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PaftMergeError as error:
            warn(error.warnings)
            for problem in error.problems:
                click.echo(line("error", problem), err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted; finished tensors are kept beside the output, and --resume continues", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="paft-merge", prog_name="paft")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def cli(verbose: bool) -> None:
    """Merge LoRA adapters and checkpoints by streaming tensors, and train the sparse adapters to merge."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)


atexit.register(gc.freeze)  # saves 0.05 s at exit: without it, Python collects garbage in all imported modules

for verb in (run, init, tune, evaluate, merge, explain, audit, train, pull, push, card, reproduce, methods):
    cli.add_command(verb)
