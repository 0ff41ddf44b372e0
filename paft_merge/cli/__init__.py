"""The `paft` command. Commands import heavy packages when they run, so that `paft --help` answers at once."""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from paft_merge.cli.adapter_sizes import extract, resize
from paft_merge.cli.auditing import audit
from paft_merge.cli.benching import bench
from paft_merge.cli.dequantizing import dequantize
from paft_merge.cli.differing import diff
from paft_merge.cli.doctoring import completion, doctor
from paft_merge.cli.evaluating import evaluate
from paft_merge.cli.explaining import explain
from paft_merge.cli.exporting import export
from paft_merge.cli.hub import card, pull, push, reproduce
from paft_merge.cli.listing import methods
from paft_merge.cli.merging import merge
from paft_merge.cli.running import run
from paft_merge.cli.schemas import schema
from paft_merge.cli.serving import check, convert
from paft_merge.cli.starting import init
from paft_merge.cli.studying import study
from paft_merge.cli.terminal import (
    AS_JSON,
    COMMAND,
    COMPILER,
    NOTE,
    WORKERS,
    LineFormatter,
    StderrHandler,
    complete_files,
    print_error_document,
    print_errors,
    warn,
)
from paft_merge.cli.terminal import Size as Size
from paft_merge.cli.training import train
from paft_merge.cli.tuning import tune
from paft_merge.cli.verifying import verify
from paft_merge.errors import PaftMergeError, Problem, cause_of, escape, escape_logs
from paft_merge.output.versions import version_of

log = logging.getLogger(__name__)

REFUSED, GATE_FAILED, INTERRUPTED = 1, 3, 130
"""Exit codes besides 0 (done) and 2 (usage, click's own); docs/cli.md describes them."""


class _Group(click.Group):
    """Prints the problems of a `PaftMergeError`, one per line, and sets the exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _open_standard_streams()
        return super().main(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[COMMAND] = shlex.join(["paft", *args])
        ctx.meta[AS_JSON] = "--json" in args
        try:
            return super().parse_args(ctx, args)
        except click.ClickException as error:
            error.message = escape(error.message)  # type: ignore[misc]
            raise

    def invoke(self, ctx: click.Context) -> Any:
        began = time.monotonic()
        try:
            return super().invoke(ctx)
        except PaftMergeError as error:
            warn(error.warnings)
            print_errors(error.problems)
            ctx.exit(GATE_FAILED if any(problem.code == "REQUIRED" for problem in error.problems) else REFUSED)
        except ImportError as error:
            name = error.name or ""
            if name.partition(".")[0] == "paft_merge":
                raise
            log.info("where it came from", exc_info=error)
            fix = "install paft-merge again, in the environment of this command"
            print_errors([Problem("MISSING", name, f"cannot be imported: {error}", fix)])
            ctx.exit(REFUSED)
        except (OSError, MemoryError, RuntimeError, UnicodeError) as error:
            if isinstance(error, BrokenPipeError) or (fault := _problem_of(error)) is None:
                raise  # of a BrokenPipeError, click ends quietly
            log.info("where it came from", exc_info=error)
            print_errors([fault])
            ctx.exit(REFUSED)
        except click.ClickException as error:  # click prints it on stderr
            error.message = escape(error.message)  # type: ignore[misc]
            print_error_document([Problem("USAGE", _usage_of(error), error.format_message(), "")])
            raise
        except click.exceptions.Exit as end:
            if end.exit_code == INTERRUPTED:
                print_error_document([_INTERRUPTED])
            raise
        except KeyboardInterrupt:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            resumes = command is not None and any(option.name == "resume" for option in command.params)
            hint = "; finished work is kept, and the same command with --resume continues" if resumes else ""
            click.echo(f"interrupted{hint}", err=True)
            print_error_document([_INTERRUPTED])
            ctx.exit(INTERRUPTED)
        finally:
            log.info("%s: %.1f s", ctx.invoked_subcommand, time.monotonic() - began)


_INTERRUPTED = Problem("INTERRUPTED", "", "the command was interrupted", "give the same command again")


def _usage_of(error: click.ClickException) -> str:
    """The command whose usage is wrong."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    return context.command_path if context else "paft"


def _open_standard_streams() -> None:
    """Open stdin, stdout and stderr on the null device where they are closed: else the next file to be opened becomes one of them."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is `fd`
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (open as long as the process)


def _problem_of(error: OSError | MemoryError | RuntimeError | UnicodeError) -> Problem | None:
    """The problem of an error of the system, of memory or of an encoding that no command expected; None for other errors."""
    if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
        cause = error.__context__
        if str(error) == "can't start new thread":
            error = OSError(errno.EAGAIN, str(error))
        elif type(error) is RuntimeError and isinstance(cause, OSError) and cause.errno == errno.ELOOP:
            error = cause  # pathlib raises a RuntimeError for links that form a circle
        else:
            return None
    if isinstance(error, MemoryError):
        return Problem("MEMORY", "", "there is not enough memory", "lower --memory, --threads or the batch size")
    if not isinstance(error, OSError):
        return Problem("INPUT", "", f"an input {cause_of(error)}", "run again with `paft -v` to see where")
    where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    code = "DISK_FULL" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "SYSTEM"
    return Problem(
        code, where, error.strerror or str(error) or type(error).__name__, _SYSTEM_FIXES.get(error.errno or 0, "")
    )


_SYSTEM_FIXES = {
    errno.ENOSPC: "free space on that disk, then give the same command again",
    errno.EDQUOT: "free space within the quota, then give the same command again",
    errno.ENOMEM: "free memory, or lower --memory or --threads",
    errno.EAGAIN: "raise the limit of processes and threads (ulimit -u)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "the links form a circle",
}


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(version_of("paft-merge"), prog_name="paft")
@click.option("-v", "--verbose", is_flag=True, help="Log versions, steps and times to stderr.")
@click.option(
    "--log-file", type=click.Path(dir_okay=False, path_type=Path),
    help="Append versions, steps, warnings, errors and times to this file, without secrets.",
)  # fmt: skip
@click.pass_context
def cli(ctx: click.Context, verbose: bool, log_file: Path | None) -> None:
    """Merge LoRA adapters and checkpoints by streaming tensors, and train the sparse adapters to merge."""
    escape_logs()
    handler = StderrHandler()
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler], force=True)
    for name in (COMPILER, WORKERS):
        logging.getLogger(name).setLevel(logging.INFO)
    for name in ("azure", "gcsfs"):  # they log requests that are repeated, with tracebacks; our error says how it ended
        logging.getLogger(name).setLevel(logging.NOTSET if verbose else logging.CRITICAL)
    if log_file:
        from paft_merge.output.log_file import logged

        records = logged(log_file, ctx.meta[COMMAND])
        ctx.meta[NOTE] = records.__enter__()
        ctx.call_on_close(lambda: records.__exit__(None, None, None))
    if verbose:
        log.info("paft-merge %s, Python %s: %s", version_of("paft-merge"), platform.python_version(), ctx.meta[COMMAND])


atexit.register(gc.freeze)  # saves 0.05 s at exit: without it, Python collects garbage in all imported modules

for command in (
    run,
    init,
    tune,
    evaluate,
    merge,
    extract,
    resize,
    explain,
    dequantize,
    audit,
    diff,
    verify,
    check,
    convert,
    export,
    train,
    pull,
    push,
    card,
    reproduce,
    methods,
    bench,
    study,
    schema,
    doctor,
    completion,
):
    cli.add_command(command)
    for parameter in command.params:
        if parameter.type is click.STRING and parameter.name != "name":
            parameter.shell_complete = complete_files  # type: ignore[method-assign]
