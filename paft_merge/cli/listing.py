"""`paft methods`."""

from __future__ import annotations

import click

from paft_merge.cli.terminal import import_option, json_option, print_json


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from paft_merge.methods import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


@click.command(short_help="The merge methods, or one with its parameters.")
@click.argument("name", required=False, shell_complete=_complete)
@import_option
@json_option("Print the methods with all their parameters as JSON.")
def methods(name: str | None, imports: tuple[str, ...], as_json: bool) -> None:
    """List the merge methods, or show the parameters of NAME."""
    from paft_merge.cli.plan_tables import method_details, method_named, method_table, methods_json
    from paft_merge.methods import METHODS
    from paft_merge.methods.mergekit_methods import import_methods

    known = import_methods(imports, METHODS)
    if as_json:
        print_json(methods_json(known if name is None else {name: method_named(name, known)}))
    elif name is None:
        method_table(known)
    else:
        method_details(name, known)
