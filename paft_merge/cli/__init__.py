"""The `paft` command: one verb a job, one file a verb. Heavy imports are inside the verbs, so that `paft --help` answers at once."""

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
    """Prints what a user can mend as one line a problem, and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PaftMergeError as error:
            warn(error.warnings)
            for problem in error.problems:
                click.echo(line("error", problem), err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo(
                "interrupted; what was finished is kept beside the output, and --resume goes on with it", err=True
            )
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="paft-merge", prog_name="paft")
@click.option("-v", "--verbose", is_flag=True, help="Say more about what is going on.")
def cli(verbose: bool) -> None:
    """Merge LoRA adapters and checkpoints by streaming tensors, and train the sparse adapters to merge."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)


atexit.register(gc.freeze)  # or all that was imported is searched for garbage once more, at the end, for 0.05 s

for verb in (run, init, tune, evaluate, merge, explain, audit, train, pull, push, card, reproduce, methods):
    cli.add_command(verb)
