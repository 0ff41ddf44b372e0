"""`paft evaluate`."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paft_merge.cli.merging import log_of
from paft_merge.cli.running import set_option, silence_libraries
from paft_merge.cli.terminal import (
    console,
    links_option,
    plain,
    print_json,
    say,
    sigterm_as_interrupt,
    trust_option,
)
from paft_merge.output.report_files import check_file, write_file

if TYPE_CHECKING:
    from paft_merge.evaluating import EvaluateProgress
    from paft_merge.training.engine_schema import Engine

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(short_help="Evaluate a model, or an adapter on its base.")
@click.argument("model")
@click.option("--recipe", type=_FILE, help="Run the section evaluate: of this recipe.")
@set_option
@click.option(
    "--suite", type=click.Choice(["open-llm-v1"]), help="Run a suite of lm-eval tasks (extra: paft-merge[eval])."
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME|FILE",
    help="Run an lm-eval task, given by name or as a YAML file; may be repeated.",
)
@click.option(
    "--num-fewshot", type=click.IntRange(0), help="Number of few-shot examples of --task. Default: the task's."
)
@click.option("--limit", type=float, help="Number of rows per lm-eval task, or a share of them if below 1.")
@click.option(
    "--exact-match", type=_FILE, multiple=True, help="Share of right greedy answers to a file of questions and answers."
)
@click.option(
    "--preference",
    type=_FILE,
    multiple=True,
    help="Share of pairs in a file of prompt, chosen, rejected whose chosen answer is more likely.",
)
@click.option("--perplexity", type=_FILE, multiple=True, help="Perplexity of a text file.")
@click.option(
    "--unit", type=click.Choice(["text", "line"]), default="text", show_default=True,
    help="--perplexity: windows of the whole text, or every line by itself.",
)  # fmt: skip
@click.option(
    "--reward", nargs=2, multiple=True, metavar="FILE FUNCTION",
    help="Mean reward of greedy answers to a file of prompts; FUNCTION is rewards.py:f or package.module:f.",
)  # fmt: skip
@click.option(
    "--self-consistency", type=_FILE, multiple=True,
    help="Share of 8 sampled answers to each prompt of a file that equal the most frequent one; needs no right answers.",
)  # fmt: skip
@click.option(
    "--agreement", nargs=2, multiple=True, metavar="FILE MODEL",
    help="Share of greedy answers to a file of prompts that are those of another MODEL; needs no right answers.",
)  # fmt: skip
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Longest generated answer, in tokens.",
)
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Rows per batch.")
@click.option("--device", help="cuda or cpu. Default: a GPU if there is one.")
@click.option(
    "--engine", type=click.Choice(["transformers", "vllm"]), default="transformers", show_default=True,
    help="What generates answers; vllm (experimental) needs a GPU and pip install vllm.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON with the value of every row instead of a table.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the JSON to a file, and a log beside it (FILE.log).",
)
@click.option(
    "--alpaca-eval", type=click.Path(dir_okay=False, path_type=Path),
    help="Write greedy answers to --instructions in AlpacaEval's format, for judging elsewhere.",
)  # fmt: skip
@trust_option
@links_option
@click.option("--instructions", type=_FILE, help="AlpacaEval's alpaca_eval.json, or any list of {instruction: ...}.")
def evaluate(
    model: str, recipe: Path | None, overrides: tuple[str, ...], suite: str | None, tasks: tuple[str, ...], num_fewshot: int | None,
    limit: float | None, exact_match: tuple[Path, ...], preference: tuple[Path, ...], perplexity: tuple[Path, ...],
    unit: str, reward: tuple[tuple[str, str], ...], self_consistency: tuple[Path, ...],
    agreement: tuple[tuple[str, str], ...], max_new_tokens: int, batch_size: int, device: str | None, engine: Engine,
    as_json: bool, out: Path | None, alpaca_eval: Path | None, instructions: Path | None, trust_code: bool,
    follow_links: bool,
) -> None:  # fmt: skip
    """Evaluate MODEL: a folder, a Hub name, or BASE+ADAPTER, without writing a merged model."""
    if alpaca_eval is not None and instructions is None:
        raise click.UsageError("--alpaca-eval needs --instructions.")
    answer = {"max_new_tokens": max_new_tokens}
    metrics = _named(
        [
            (path.stem if len(files) > 1 else kind, {"kind": kind, "data": str(path), **more})
            for kind, files, more in (
                ("exact_match", exact_match, answer),
                ("preference", preference, {}),
                ("perplexity", perplexity, {"unit": unit}),
                ("self_consistency", self_consistency, answer),
            )
            for path in files
        ]
        + [(of.rpartition(":")[2], {"kind": "reward", "data": data, "function": of, **answer}) for data, of in reward]
        + [
            (
                f"agreement with {source} on {data}" if len(agreement) > 1 else "agreement",
                {"kind": "agreement", "data": data, "with": source, **answer},
            )
            for data, source in agreement
        ]
    )
    asked = bool(metrics or tasks or suite)
    if not (asked or recipe or alpaca_eval):
        raise click.UsageError(
            "Nothing to evaluate: give --recipe, --suite, --task, --exact-match or one of the others."
        )
    if overrides and recipe is None:
        raise click.UsageError("--set changes a recipe and needs --recipe.")
    if out is not None:
        check_file(out)
    silence_libraries()
    from paft_merge.evaluating import EvaluateProgress, EvaluateSpec
    from paft_merge.evaluating import evaluate as evaluate_model
    from paft_merge.evaluating.alpaca import write_alpaca
    from paft_merge.inputs.links import following_links

    given = {
        "metrics": metrics, "suite": suite, "tasks": list(tasks), "num_fewshot": num_fewshot, "limit": limit,
        "batch_size": batch_size, "device": device, "engine": engine,
    }  # fmt: skip
    with sigterm_as_interrupt(), following_links(follow_links), log_of(out or alpaca_eval) as note:
        scores: dict[str, Any] = {}
        with _progress() as shown:

            def progress(now: EvaluateProgress) -> None:
                shown(now)
                for text in [f"{now.name} starts"] if now.rows is None and now.scores is None else _lines(now):
                    note(logging.INFO, text)

            if recipe is not None:
                changes = (*([f"evaluate.engine={engine}"] if engine == "vllm" else []), *overrides)
                scores |= _by_recipe(model, recipe, changes, progress, trust_code, metrics)
            if asked:
                scores |= evaluate_model(model, given, progress=progress, trust_code=trust_code)
            if alpaca_eval is not None and instructions is not None:
                count = write_alpaca(
                    model, instructions, alpaca_eval, EvaluateSpec(batch_size=batch_size, device=device),
                    engine=engine, max_new_tokens=max_new_tokens, trust_code=trust_code,
                    advance=lambda done, rows: progress(EvaluateProgress("alpaca-eval", done, rows)),
                )  # fmt: skip
        if alpaca_eval is not None:
            say(f"{count} answers in {alpaca_eval}")
    _show(scores, as_json, out)


def _named(asked: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Mapping[str, Any]]:
    """Metrics by name: a short one, or its kind (of `reward` the function) and its file where two have the same short one."""
    short, found = Counter(name for name, _ in asked), dict[str, Mapping[str, Any]]()
    for name, metric in asked:
        whole = name if short[name] == 1 else f"{metric.get('function') or metric['kind']} on {metric['data']}"
        if whole in found:
            raise click.UsageError(f"{whole} is asked twice.")
        found[whole] = metric
    return found


@contextmanager
def _progress() -> Iterator[Callable[[EvaluateProgress], None]]:
    """On a terminal, a bar of rows for every metric; without one, a line for every finished metric. All on stderr."""
    from paft_merge.evaluating import HARNESS

    if not sys.stderr.isatty():
        yield _line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    shown = console(stderr=True)
    name = TextColumn("{task.description}", table_column=Column(max_width=shown.width // 3, no_wrap=True))
    columns = name, BarColumn(shown.width // 4), MofNCompleteColumn(), TimeRemainingColumn()
    with Bar(*columns, console=shown) as bar:
        tasks: dict[str, Any] = {}

        def show(now: EvaluateProgress) -> None:
            if now.name == HARNESS:
                bar.stop()  # lm-eval draws its own bars
                if now.scores is not None:
                    bar.start()
                return
            if now.name not in tasks:
                tasks[now.name] = bar.add_task(plain(now.name), total=None)
            if now.rows is not None:
                bar.update(tasks[now.name], completed=now.done, total=now.rows)

        yield show


def _line(now: EvaluateProgress) -> None:
    for text in _lines(now):
        say(text)


def _lines(now: EvaluateProgress) -> Iterator[str]:
    """A line for each result of an evaluation that is finished."""
    for name, score in (now.scores or {}).items():
        spread = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        yield f"{name}: {score.value:.4f}{spread} ({now.seconds:.1f} s)"


def _by_recipe(
    model: str,
    recipe: Path,
    overrides: tuple[str, ...],
    progress: Callable[[EvaluateProgress], None],
    trust_code: bool,
    also: Collection[str],
) -> dict[str, Any]:
    """The scores of a recipe's section; `also` are the names of further metrics."""
    from paft_merge.errors import EvaluateError
    from paft_merge.evaluating import evaluate
    from paft_merge.pipeline.named_models import models_outside
    from paft_merge.pipeline.schema import load_run

    loaded = load_run(recipe, overrides)
    if loaded.evaluate is None:
        raise EvaluateError.of("SECTION", recipe, "has no section evaluate", "add evaluate: {metrics: ...}")
    if twice := [name for name in also if name in loaded.evaluate.metrics]:
        raise click.UsageError(f"{', '.join(twice)}: a metric of {recipe} and one of the options have this name.")
    scores = evaluate(
        model, loaded.evaluate, folder=loaded.folder, models=models_outside(loaded), progress=progress, trust_code=trust_code
    )  # fmt: skip
    return {**scores}


def _show(scores: dict[str, Any], as_json: bool, out: Path | None) -> None:
    if not scores:
        return
    found = {name: score.to_json() for name, score in scores.items()}
    if out is not None:
        write_file(out, json.dumps(found, indent=2) + "\n")
    if as_json:
        print_json(found)
    else:
        from paft_merge.cli.run_tables import scores as show

        show(scores)
