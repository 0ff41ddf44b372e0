"""`paft methods`."""

from __future__ import annotations

import click

from paft_merge.cli.terminal import import_option


@click.command(short_help="The merge methods, or one with its parameters.")
@click.argument("name", required=False)
@import_option
def methods(name: str | None, imports: tuple[str, ...]) -> None:
    """List the merge methods, or show the parameters of NAME."""
    from paft_merge.cli.plan_tables import method_details, method_table
    from paft_merge.methods import METHODS
    from paft_merge.methods.mergekit_methods import import_methods

    known = import_methods(imports, METHODS)
    if name is None:
        method_table(known)
    else:
        method_details(name, known)
