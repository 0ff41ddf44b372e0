"""The command `paft-mergekit-yaml`: mergekit-yaml with our methods, and a failure as one line."""

from __future__ import annotations

import logging
import sys

import click

from paft_merge.errors import PaftMergeError, escape

_EPILOG = (
    "`paft merge CONFIG OUT` takes the same options, starts in half a second and streams. This command is for methods of other "
    "packages, and for mergekit's own arithmetic."
)


def main() -> None:
    """Run mergekit-yaml; with `-v` a failure is a traceback."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs missing kernels when mergekit imports it
    from paft_merge import mergekit_plugin

    arguments = sys.argv[1:]
    try:
        mergekit_plugin.run("paft-mergekit-yaml", arguments, _EPILOG)
    except click.ClickException as error:  # of usage: click prints it
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit("interrupted")
    except PaftMergeError as error:
        sys.exit("\n".join(f"error[{problem.code}]: {problem}" for problem in error.problems))
    except Exception as error:  # mergekit raises errors of every type about a config
        if {"-v", "-vv", "--verbose"} & {*arguments}:
            raise
        hint = "`paft merge` takes the same file and names the line; -v shows a traceback"
        sys.exit(f"error[MERGEKIT]: {escape(mergekit_plugin.in_one_line(error))}; {hint}")
