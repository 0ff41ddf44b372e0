"""`paft schema`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from paft_merge.cli.terminal import import_option, json_option, print_document, print_json, say


@click.command(short_help="The JSON Schema of recipes, for editors.")
@click.argument("kind", type=click.Choice(["merge", "run", "train"]), required=False)
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write it to this file.")
@import_option
@json_option("With --out: print the path as JSON. The schema is JSON anyway.")
def schema(kind: str | None, out: Path | None, imports: tuple[str, ...], as_json: bool) -> None:
    """Print the JSON Schema of recipes for `paft merge`, `paft run` or `paft train`, or one schema for all of them.

    Editors with a YAML language server complete keys, methods and parameters with it, and underline mistakes, once the
    first line of a recipe is `# yaml-language-server: $schema=FILE`.
    """
    from paft_merge.methods import METHODS
    from paft_merge.methods.mergekit_methods import import_methods
    from paft_merge.output.report_files import write_file
    from paft_merge.pipeline.recipe_schemas import schema_of

    text = json.dumps(schema_of(kind, import_methods(imports, METHODS))) + "\n"  # type: ignore[arg-type]
    if out is None:
        print_document(text)
    else:
        write_file(out, text)
        print_json({"schema": str(out)}) if as_json else say(out, err=False)
