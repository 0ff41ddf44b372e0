"""Train one adapter, from its section of a recipe to its folder."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from paft_merge.errors import TrainError
from paft_merge.training.arguments import check_targets
from paft_merge.training.base_model import digest_of, load_base, restoring_base, without_row
from paft_merge.training.consent import check_code
from paft_merge.training.job import (
    Job,
    finish,
    is_main_process,
    make_trainer,
    run_trainer,
    training_plan,
    uses_old_fsdp,
    wait_for_everyone,
)
from paft_merge.training.prepared_rows import PreparedRows, prepare
from paft_merge.training.rendering import bounded_templates
from paft_merge.training.run_folder import RunFolder, is_first
from paft_merge.training.schema import SAMPLING, AdapterSpec, read_adapter, settings_of, trained_parts
from paft_merge.training.train_options import TrainOptions
from paft_merge.training.untrained_tokens import unlearnable
from paft_merge.training.vllm_engine import in_memory, samples_by_vllm

log = logging.getLogger(__name__)


def train_adapter(
    base: Any,
    spec: AdapterSpec | Mapping[str, Any],
    out: Path | str,
    options: TrainOptions | None = None,
    **fields: Any,
) -> Path:
    """Train one adapter and write it to `out`; returns that folder.

    Args:
        base: A folder, a Hub name, or a causal language model in memory (restored bit for bit afterwards).
        spec: The adapter's section of a recipe.
        out: Folder to write; must not exist. The run works in `<out>.part`.
        options: Data, names, callbacks and the like.
        fields: Fields of `TrainOptions`, as keywords.

    Raises:
        TrainError, RecipeError: with every problem at once, before the first step where possible.
    """
    options = replace(options or TrainOptions(), **fields)
    spec = spec if isinstance(spec, AdapterSpec) else read_adapter(spec, options.name)
    place = RunFolder(Path(out))
    if options.resume and place.finished:
        base_name = options.base_name or str(getattr(getattr(base, "config", None), "_name_or_path", base))
        place.check_finished(settings_of(spec, base_name))
        return place.final
    job = _prepared(base, spec, place, options)
    begun = place.part.exists()
    if is_main_process():
        place.open(training_plan(job), options.resume)
    wait_for_everyone()
    with restoring_base(job.base), bounded_templates(job.name):
        try:
            _train(job)
        except TrainError:
            if not begun and is_main_process() and not place.holds_work():
                shutil.rmtree(place.part)  # nothing to resume
            raise
    return place.final


def _prepared(base: Any, spec: AdapterSpec, place: RunFolder, options: TrainOptions) -> Job:
    """Load and check everything that a training needs."""
    name, loaded = options.name, not isinstance(base, str | Path)
    base_name = options.base_name or str(base.config._name_or_path if loaded else base)
    check_code(spec, options.folder, trust_code=options.trust_code)
    _check_processes(spec, name)
    source = (options.base_path or base_name) if loaded else str(base)
    if loaded and not options.base_path and samples_by_vllm(spec):
        raise in_memory(name)
    options = replace(options, base_path=source)
    made = options.prepared or prepare(source, spec, place.checkpoints, options)
    model = base if loaded else load_base(source, spec.base)
    check_targets(spec, model)
    digest = options.base_digest or (digest_of(model) if is_first() else "")
    rows = made.rows
    job = Job(spec, place, options, model, base_name, made.tokenizer, made.arguments, rows.train, rows.eval, digest)
    job.facts |= rows.facts
    for note in rows.notes:
        job.warn(note)
    warn_of_settings(job, rows)
    sections = trained_parts(spec)
    for part, own in made.parts.items():
        silent = replace(options, name=f"{name}.{part}", callbacks=(), progress=None)
        job.parts[part] = replace(
            job, spec=sections[part], options=silent, tokenizer=own.tokenizer, arguments=own.arguments,
            rows=own.rows.train, eval_rows=None, facts=dict(own.rows.facts), parts={},
        )  # fmt: skip
        for note in own.rows.notes:
            job.parts[part].warn(note)
        warn_of_settings(job.parts[part], own.rows)
    return job


def _train(job: Job) -> None:
    if job.parts:
        from paft_merge.training.mixed import mixed_trainer

        trainer = mixed_trainer(job)
        run_trainer(job, trainer)
        finish(job, trainer, **trainer.facts)
    elif job.spec.objective in SAMPLING:
        from paft_merge.training.on_policy import train_in_rounds

        train_in_rounds(job)
    else:
        trainer = make_trainer(job)
        run_trainer(job, trainer)
        finish(job, trainer)


def _check_processes(spec: AdapterSpec, name: str) -> None:
    from accelerate import PartialState

    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":  # set by accelerate launch
        if os.environ.get("FSDP_VERSION", "1") == "1":
            raise uses_old_fsdp(name)
        if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
            what = "FSDP's activation checkpointing renames modules, so PEFT writes checkpoints without the adapter"
            fix = "set fsdp_activation_checkpointing: false there, and training: {gradient_checkpointing: true} here"
            raise TrainError.of("FSDP", f"{name}: accelerate_config", what, fix)
    if spec.objective in SAMPLING and PartialState().num_processes > 1:
        fix = "use processes: 1, or rloo/grpo, which TRL spreads over GPUs"
        raise TrainError.of("PROCESSES", name, f"{spec.objective} generates on one device", fix)


def warn_of_settings(job: Job, rows: PreparedRows) -> None:
    """Warn of unusual settings, and of tokens that this adapter cannot learn."""
    spec, tokenizer = job.spec, job.tokenizer
    if tokenizer.pad_token is None:
        job.warn(f"the tokenizer has no pad token; its eos token {tokenizer.eos_token!r} is used")
    elif without_row([tokenizer.pad_token_id], job.base):
        job.warn(f"the base's embedding has no row for the pad token {tokenizer.pad_token!r}; the eos token is used")
        tokenizer.pad_token = tokenizer.eos_token
    if spec.l1 and str(getattr(job.arguments.lr_scheduler_type, "value", "")).startswith("constant"):
        job.warn("L1 with a constant learning rate leaves noise instead of zeros; use cosine or linear")
    if rows.labels is None or spec.objective in ("rloo", "grpo"):
        return
    if missing := without_row(np.flatnonzero(rows.labels).tolist(), job.base):
        shown = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in missing[:5])
        what = f"{len(missing)} of their tokens have no row in the base's embedding: {shown}"
        raise TrainError.of("TOKENS", f"the rows of {job.name}", what, "use the base's own tokenizer")
    if tokens := unlearnable(rows.labels, job.base, tokenizer, spec):
        shown = ", ".join(tokens[:5]) + (f" and {len(tokens) - 5} more" if len(tokens) > 5 else "")
        job.warn(
            f"tokens with a label were never trained in the base, so this adapter cannot learn to write them: {shown}; "
            "use lora: {modules_to_save: [embed_tokens, lm_head]} or extra: {trainable_token_indices: [...]}, or end "
            "answers with another token (chat_template, or the tokenizer's eos_token)"
        )
