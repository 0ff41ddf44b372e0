"""`python -m paft_merge`."""

from paft_merge.cli import cli

cli(prog_name="paft")
