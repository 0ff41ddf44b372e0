"""`paft init`."""

from __future__ import annotations

from pathlib import Path

import click

from paft_merge.cli.terminal import json_option, links_option, print_json, say, warn
from paft_merge.errors import Problem


@click.command(short_help="Write a commented recipe to start from.")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option("--base", help="The base model: a folder or Hub name. Default with --adapter: the base that it names.")
@click.option(
    "--data", "data", multiple=True, metavar="FILE|NAME",
    help="SFT data; given twice, SFT data and then preference data. With --adapter: files to evaluate on.",
)  # fmt: skip
@click.option(
    "--adapter", "adapters", multiple=True, metavar="DIR|NAME",
    help="An adapter that exists; given twice or more, the recipe compares ways of merging them, without training.",
)  # fmt: skip
@click.option("--gpus", type=click.IntRange(0), default=0, show_default=True, help="Number of GPUs; 0 for a CPU.")
@click.option(
    "--quickstart", is_flag=True,
    help="Write the quickstart's recipe to OUT, and its tiny base and its data to the folder quickstart beside it.",
)  # fmt: skip
@links_option
@json_option("Print the paths of the recipe and its schema as JSON; without OUT, the recipe's text.")
def init(
    out: Path | None, base: str | None, data: tuple[str, ...], adapters: tuple[str, ...], gpus: int, quickstart: bool,
    follow_links: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a commented recipe for `paft run` to OUT, or print it.

    Checks that local files exist and have the columns of their objective. Local paths are written relative to OUT. Beside OUT,
    paft.schema.json lets editors complete and check the recipe, as `paft schema` does.
    """
    from paft_merge.inputs.links import following_links

    if quickstart:
        if out is None or base or data or adapters or gpus:
            raise click.UsageError("--quickstart is given with OUT and without other options.")
        from paft_merge.pipeline.shipped_recipes import copy_quickstart

        _report(out, copy_quickstart(out), as_json)
        return
    with following_links(follow_links):
        _init(out, base, data, adapters, gpus, as_json)


def _init(
    out: Path | None, base: str | None, data: tuple[str, ...], adapters: tuple[str, ...], gpus: int, as_json: bool
) -> None:
    from paft_merge.inputs.adapter_places import base_of
    from paft_merge.pipeline import starter_recipe as recipes

    base = base or next(filter(None, (base_of(Path(adapter), "") for adapter in adapters)), None)
    if base is None:
        why = " (the adapters do not name their base)" if adapters else ""
        ways = "--base and --data for training, two --adapter for a comparison, or --quickstart and OUT for an example"
        raise click.UsageError(f"Missing option '--base'{why}. Give {ways}.")
    if len(adapters) == 1:
        raise click.UsageError("--adapter is given at least twice: the recipe compares ways of merging them.")
    if len(data) > 2 and not adapters:
        raise click.UsageError("--data is given at most twice: SFT data, then preference data.")
    if adapters:
        recipes.check_given(base, adapters=adapters)
        text = recipes.starter_of_adapters(base, adapters, data, out)
    else:
        sft, dpo = (*data, None, None)[:2]
        recipes.check_given(base, sft, dpo)
        template = recipes.needs_template(base, sft, dpo)
        if template:
            what, fix = "the rows are chats and the base has no chat template", "set chat_template: in the recipe"
            warn([Problem("TEMPLATE", base, what, fix)])
        sft, dpo = (recipes.beside(one, out) if one else None for one in (sft, dpo))
        small = recipes.is_small(base)
        text = recipes.starter(recipes.beside(base, out), sft, dpo, gpus, small=small, template=template)
    if not Path(base).is_dir() and "/" not in base:
        warn([Problem("BASE", base, "not a local folder; written as a Hub name", "check the path if it is a folder")])
    if out is None:
        print_json({"recipe": None, "schema": None, "text": text}) if as_json else click.echo(text, nl=False)
    else:
        _report(out, recipes.write_starter(out, text), as_json)


def _report(out: Path, schema: Path | None, as_json: bool) -> None:
    """Print what was written, and what comes next."""
    if schema:
        say(f"editors complete and check it with {schema}")
    say(f"next: paft run --dry-run {out} runs/first")
    if as_json:
        print_json({"recipe": str(out), "schema": str(schema) if schema else None, "text": None})
    else:
        say(out, err=False)
