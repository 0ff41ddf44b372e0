"""`paft evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from paft_merge.cli.running import set_option, silence_libraries
from paft_merge.cli.terminal import sigterm_as_interrupt

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(short_help="Measure a model, or an adapter on its base.")
@click.argument("model")
@click.option("--recipe", type=_FILE, help="Do what the section evaluate: of this recipe says.")
@set_option
@click.option("--suite", type=click.Choice(["open-llm-v1"]), help="A suite of lm-eval tasks (extra [eval]).")
@click.option("--task", "tasks", multiple=True, metavar="NAME|FILE", help="An lm-eval task, or a task's YAML file.")
@click.option("--num-fewshot", type=click.IntRange(0), help="Shots of --task. Default: the task's own.")
@click.option("--limit", type=float, help="Only so many rows of each lm-eval task, or a share of them when below 1.")
@click.option(
    "--exact-match", type=_FILE, multiple=True, help="A .jsonl of prompt and answer: share of right greedy answers."
)
@click.option(
    "--preference", type=_FILE, multiple=True, help="A .jsonl of prompt, chosen, rejected: share of pairs told apart."
)
@click.option("--perplexity", type=_FILE, multiple=True, help="A text file.")
@click.option(
    "--reward", nargs=2, multiple=True, metavar="FILE FUNCTION",
    help="A .jsonl of prompts, and what scores the greedy answers: module:function or file.py:function.",
)  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Of greedy answers.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Rows at a time.")
@click.option("--device", help="cuda or cpu. Default: a GPU where there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the score of every row, instead of a table.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write that JSON to a file.")
@click.option(
    "--alpaca-eval", type=click.Path(dir_okay=False, path_type=Path),
    help="Write greedy answers to --instructions in AlpacaEval's format, to be judged elsewhere.",
)  # fmt: skip
@click.option("--instructions", type=_FILE, help="AlpacaEval's alpaca_eval.json, or any list of {instruction: ...}.")
def evaluate(
    model: str, recipe: Path | None, overrides: tuple[str, ...], suite: str | None, tasks: tuple[str, ...], num_fewshot: int | None,
    limit: float | None, exact_match: tuple[Path, ...], preference: tuple[Path, ...], perplexity: tuple[Path, ...],
    reward: tuple[tuple[str, str], ...], max_new_tokens: int, batch_size: int, device: str | None, as_json: bool,
    out: Path | None, alpaca_eval: Path | None, instructions: Path | None,
) -> None:  # fmt: skip
    """Evaluate MODEL: a folder, a Hub name, or BASE+ADAPTER, which is never written as a merged model."""
    if alpaca_eval is not None and instructions is None:
        raise click.UsageError("--alpaca-eval needs --instructions.")
    metrics = {
        path.stem if len(files) > 1 else kind: {"kind": kind, "data": str(path), **more}
        for kind, files, more in (
            ("exact_match", exact_match, {"max_new_tokens": max_new_tokens}),
            ("preference", preference, {}),
            ("perplexity", perplexity, {}),
        )
        for path in files
    }
    for data, function in reward:
        metrics[function.rpartition(":")[2]] = {
            "kind": "reward", "data": data, "function": function, "max_new_tokens": max_new_tokens,
        }  # fmt: skip
    asked = bool(metrics or tasks or suite)
    if not (asked or recipe or alpaca_eval):
        raise click.UsageError(
            "Nothing to evaluate: give --recipe, --suite, --task, --exact-match or one of the others."
        )
    if overrides and recipe is None:
        raise click.UsageError("--set changes a recipe, and needs --recipe.")
    silence_libraries()
    from paft_merge.evaluating import EvaluateSpec

    given = {
        "metrics": metrics, "suite": suite, "tasks": list(tasks), "num_fewshot": num_fewshot, "limit": limit,
        "batch_size": batch_size, "device": device,
    }  # fmt: skip
    with sigterm_as_interrupt():
        scores: dict[str, Any] = {}
        if recipe is not None:
            scores |= _by_recipe(model, recipe, overrides)
        if asked:
            from paft_merge.evaluating import evaluate

            scores |= evaluate(model, given)
        if alpaca_eval is not None and instructions is not None:
            from paft_merge.evaluating.alpaca import write_alpaca

            spec = EvaluateSpec(batch_size=batch_size, device=device)
            count = write_alpaca(model, instructions, alpaca_eval, spec, max_new_tokens=max_new_tokens)
            click.echo(f"{count} answers in {alpaca_eval}", err=True)
    _show(scores, as_json, out)


def _by_recipe(model: str, recipe: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    from paft_merge.errors import EvaluateError
    from paft_merge.evaluating import evaluate
    from paft_merge.pipeline.schema import load_run

    loaded = load_run(recipe, overrides)
    if loaded.evaluate is None:
        raise EvaluateError.of("SECTION", recipe, "has no section evaluate", "add evaluate: {metrics: ...}")
    return {**evaluate(model, loaded.evaluate, folder=loaded.folder)}


def _show(scores: dict[str, Any], as_json: bool, out: Path | None) -> None:
    if not scores:
        return
    text = json.dumps({name: score.to_json() for name, score in scores.items()}, indent=2) + "\n"
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if as_json:
        sys.stdout.write(text)
    else:
        from paft_merge.cli.run_tables import scores as show

        show(scores)
