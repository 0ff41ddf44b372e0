"""The rows of one adapter, loaded, checked and counted: what a training, a dry run and `--show` begin with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paft_merge.errors import Problems, TrainError
from paft_merge.training import data as sets
from paft_merge.training.arguments import loop_arguments, lora_config, training_arguments
from paft_merge.training.base_model import load_tokenizer
from paft_merge.training.row_checks import check_tokens
from paft_merge.training.row_sources import in_memory
from paft_merge.training.schema import AdapterSpec, trained_parts
from paft_merge.training.train_options import TrainOptions, need_extras
from paft_merge.training.vllm_engine import check_rounds, samples_by_vllm


@dataclass
class PreparedRows:
    """Rows that are ready for TRL."""

    train: Any
    """A `datasets.Dataset`."""
    eval: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts for the record."""
    notes: list[str] = field(default_factory=list)
    """What is unusual, one sentence each."""
    labels: NDArray[np.bool_] | None = None
    """The token ids that have a label."""


@dataclass
class Prepared:
    """An adapter's tokenizer, TRL config and rows."""

    tokenizer: Any
    arguments: Any
    rows: PreparedRows
    parts: dict[str, Prepared] = field(default_factory=dict)
    """Of a mixed adapter: its parts that have steps, by name."""


def prepare(source: str | None, spec: AdapterSpec, checkpoints: Path, options: TrainOptions) -> Prepared:
    """Build and check everything that a training needs besides the base's weights.

    Args:
        source: Folder or Hub name of the tokenizer; None checks everything that needs none.
        spec: The adapter's section.
        checkpoints: Folder of the checkpoints.
        options: Options of the training.

    Raises:
        TrainError: MISSING, a package of the extra `train`; TRAINING, LORA, TEMPLATE, DATA; every problem at once.
    """
    need_extras()
    if spec.parts:
        return _prepare_parts(source, spec, checkpoints, options)
    problems, arguments, tokenizer, rows = Problems(), None, options.tokenizer, PreparedRows(None)
    with problems.catching():
        arguments = training_arguments(spec, checkpoints, options.name)
    with problems.catching():
        lora_config(spec)
    with problems.catching():
        if samples_by_vllm(spec):
            check_rounds(spec, source, options.name)
    with problems.catching():
        if tokenizer is None and source is not None:
            tokenizer = load_tokenizer(source, spec, options.folder, trust_code=options.trust_code)
    with problems.catching():
        rows = prepare_rows(spec, tokenizer, arguments, options)
    problems.raise_as(TrainError)
    if samples_by_vllm(spec):
        rows.notes.append("vLLM generates the completions, which is experimental")
    return Prepared(tokenizer, arguments, rows)


def _prepare_parts(source: str | None, spec: AdapterSpec, checkpoints: Path, options: TrainOptions) -> Prepared:
    """Prepare every part of a mixed adapter, and check that one optimizer can train them."""
    problems, parts = Problems(), dict[str, Prepared]()
    sections, given = trained_parts(spec), options.rows or {}
    for part, section in sections.items():
        with problems.catching():
            own = replace(options, name=f"{options.name}.{part}", rows=given.get(part), eval_rows=None)
            parts[part] = prepare(source, section, checkpoints, own)
    problems.raise_as(TrainError)
    arguments = loop_arguments(spec, {part: made.arguments for part, made in parts.items()}, checkpoints, options.name)
    rows = PreparedRows(None)
    rows.facts = {
        "fingerprint": "+".join(made.rows.facts.get("fingerprint", "") for made in parts.values()),
        "rows": sum(made.rows.facts.get("rows", 0) for made in parts.values()),
        "parts": {part: made.rows.facts for part, made in parts.items()},
    }
    rows.notes = [
        f"eval_data of {part} is not used in a mixed training"
        for part, one in (spec.parts or {}).items()
        if one.eval_data
    ]
    return Prepared(next(iter(parts.values())).tokenizer, arguments, rows, parts)


def prepare_rows(spec: AdapterSpec, tokenizer: Any, arguments: Any, options: TrainOptions) -> PreparedRows:
    """Load, convert, shorten and check the rows of an adapter.

    Args:
        spec: The adapter's section.
        tokenizer: The base's, with the adapter's chat template. None if it cannot be loaded: the rows are then read and
            converted, and not tokenised.
        arguments: The TRL config; None if it is wrong.
        options: `rows`, `eval_rows` and `folder` of the training.

    Raises:
        TrainError: DATA, TEMPLATE; everything that is wrong with the training and the evaluation rows.
    """
    problems, done = Problems(), PreparedRows(None)
    for what, given, specs in (
        ("data", options.rows, spec.data), ("eval_data", options.eval_rows, spec.eval_data),
    ):  # fmt: skip
        if given is None and not specs:
            continue
        with problems.catching():
            sources = specs or [] if given is None else [in_memory(given, what)]
            chat = tokenizer is None or bool(tokenizer.chat_template)
            loaded = sets.load_rows(sources, spec, chat=chat, folder=options.folder, what=what)
            if tokenizer is None:
                continue
            facts: dict[str, Any] = {"fingerprint": sets.fingerprint(loaded.plain), "rows": len(loaded.rows)}
            notes = [note if what == "data" else f"{what}: {note}" for note in loaded.notes]
            if spec.max_prompt_tokens and sets.kind_of(spec) == "preference":
                whole = Problems()
                check_tokens(loaded, spec, tokenizer, arguments, whole, what)
                if refused := [problem for problem in whole.found if problem.code == "TEMPLATE"]:
                    problems.found += refused
                    continue
                facts["prompts_cut"] = cut = sets.shorten_prompts(loaded, tokenizer, spec.max_prompt_tokens)
                if cut:
                    of = f"{cut} of {len(loaded.rows)}"
                    notes.append(f"{of} prompts were cut from the left to {spec.max_prompt_tokens} tokens")
            counts = check_tokens(loaded, spec, tokenizer, arguments, problems, what)
            done.notes += notes + counts.notes
            if what == "data":
                done.train, done.labels = loaded.plain, counts.labels
                done.facts = facts | counts.facts
            else:
                done.eval = loaded.plain
    problems.raise_as(TrainError)
    return done
