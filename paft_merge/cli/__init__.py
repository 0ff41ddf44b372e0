"""The `paft` command. Commands import heavy packages when they run, so that `paft --help` answers at once."""

from __future__ import annotations

import atexit
import gc
import logging
import platform
import shlex
import sys
import time
from importlib.metadata import version
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
from paft_merge.cli.terminal import COMMAND, LineFormatter, line, warn
from paft_merge.cli.terminal import Size as Size
from paft_merge.cli.training import train
from paft_merge.cli.tuning import tune
from paft_merge.errors import PaftMergeError

log = logging.getLogger(__name__)

REFUSED, GATE_FAILED, INTERRUPTED = 1, 3, 130
"""Exit codes besides 0 (done) and 2 (usage, click's own); docs/cli.md describes them."""


class _Group(click.Group):
    """Prints the problems of a `PaftMergeError`, one per line, and sets the exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[COMMAND] = shlex.join(["paft", *args])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        began = time.monotonic()
        try:
            return super().invoke(ctx)
        except PaftMergeError as error:
            warn(error.warnings)
            for problem in error.problems:
                click.echo(line("error", problem), err=True)
            ctx.exit(GATE_FAILED if any(problem.code == "REQUIRED" for problem in error.problems) else REFUSED)
        except KeyboardInterrupt:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            resumes = command is not None and any(option.name == "resume" for option in command.params)
            hint = "; finished work is kept, and the same command with --resume continues" if resumes else ""
            click.echo(f"interrupted{hint}", err=True)
            ctx.exit(INTERRUPTED)
        finally:
            log.info("%s: %.1f s", ctx.invoked_subcommand, time.monotonic() - began)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="paft-merge", prog_name="paft")
@click.option("-v", "--verbose", is_flag=True, help="Log versions, steps and times to stderr.")
@click.pass_context
def cli(ctx: click.Context, verbose: bool) -> None:
    """Merge LoRA adapters and checkpoints by streaming tensors, and train the sparse adapters to merge."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler], force=True)
    if verbose:
        log.info("paft-merge %s, Python %s: %s", version("paft-merge"), platform.python_version(), ctx.meta[COMMAND])


atexit.register(gc.freeze)  # saves 0.05 s at exit: without it, Python collects garbage in all imported modules

for command in (run, init, tune, evaluate, merge, explain, audit, train, pull, push, card, reproduce, methods):
    cli.add_command(command)
