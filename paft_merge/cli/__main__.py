"""`python -m paft_merge.cli`."""

from paft_merge.cli import cli

cli()
