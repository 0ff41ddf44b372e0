"""`paft dequantize`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paft_merge.cli.merging import log_of, noted, progress_bar, show_plan, warned_and_noted
from paft_merge.cli.terminal import (
    Folder,
    Size,
    as_flags,
    engine_options,
    json_option,
    links_option,
    print_json,
    say,
    sigterm_as_interrupt,
    warn,
)
from paft_merge.engine.options import MergeOptions
from paft_merge.errors import CheckpointError

if TYPE_CHECKING:
    from paft_merge.plan import MergePlan


@click.command(short_help="Write a quantised model with plain weights.")
@click.argument("model")
@click.argument("out", type=Folder(), required=False)
@click.option(
    "--out-dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Storage type of all weights. Default: bfloat16 for those that are quantised; the others keep theirs.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan, from headers alone, and write nothing.")
@json_option("Print the result as JSON; with --dry-run the whole plan.")
@click.option("--threads", type=click.IntRange(1), help="Blocks computed at a time. Default: all cores.")
@click.option("--memory", type=Size(), help="Upper bound of the working memory, e.g. 800M.")
@click.option("--resume", is_flag=True, help="Continue an interrupted command into OUT; a finished OUT stays.")
@click.option("--overwrite", is_flag=True, help="Replace the model in OUT, which stays complete until the new one is.")
@click.option("--out-shard-size", "out_shard_bytes", type=Size(), help="Largest output file, e.g. 5GB.")
@click.option(
    "--stream-from-hub", is_flag=True, help="Read weights from the Hub by byte ranges; nothing but OUT is stored."
)
@links_option
@engine_options
@click.option("--quiet", is_flag=True, help="No progress bar and no summary.")
def dequantize(
    model: str, out: Path | str | None, out_dtype: str | None, dry_run: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Write the weights of the quantised MODEL into the folder OUT, as a model that is not quantised.

    A merge of one model: it has the same plan, memory, log, manifest and card as `paft merge`. MODEL is a folder or a
    repository of the Hub.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from paft_merge.engine import api

    try:
        asked = MergeOptions(**options, warn=warn)
    except ValueError as error:
        raise click.UsageError(as_flags(str(error))) from None
    if out is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT' (it may be left out only with --dry-run).")
    recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": model}]}
    recipe |= {"out_dtype": out_dtype} if out_dtype else {}
    with api.open_plan(recipe, asked, stream_from_hub=True) as plan:
        _check_quantised(plan)
        if dry_run:
            warn(plan.warnings)
            show_plan(plan, out, asked, 1, {}, as_json)
    if dry_run or out is None:
        return
    with sigterm_as_interrupt(), progress_bar(quiet) as progress, log_of(out) as note:
        made = api.merge(recipe, out, asked, progress=noted(progress, note), warn=warned_and_noted(note))
        note(logging.INFO, f"{out} is done")
    if as_json:
        print_json(made.to_json())
    elif not quiet:
        say(out, err=False)
    if not quiet:
        say(f"{out} is done: see its README.md and merge_manifest.json")


def _check_quantised(plan: MergePlan) -> None:
    """Check that the model is quantised, in a format that can be read."""
    from paft_merge.inputs.quantized.recognition import quantised

    model = plan.config_source
    if found := quantised(model.checkpoint):
        raise CheckpointError([found.problem(model.ref, "paft does not read this format")])
    if not any(model.checkpoint.stored_format(name) for name in model.checkpoint.tensors):
        what = "is not quantised: none of its weights is stored as codes with scales"
        fix = "paft merge with out_dtype converts plain weights"
        raise CheckpointError.of("DTYPE_UNSUPPORTED", model.ref, what, fix)
