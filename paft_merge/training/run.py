"""One adapter from its section to its folder: check, lend the base to a TRL trainer, train, measure, write."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paft_merge.errors import TrainError
from paft_merge.training import data as sets
from paft_merge.training.arguments import check_targets, training_arguments
from paft_merge.training.base_model import digest_of, load_base, load_tokenizer, restoring_base
from paft_merge.training.callbacks import TrainProgress
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
from paft_merge.training.run_folder import RunFolder, is_first
from paft_merge.training.schema import SAMPLING, AdapterSpec, read_adapter

log = logging.getLogger(__name__)


def train_adapter(
    base: Any,
    spec: AdapterSpec | Mapping[str, Any],
    out: Path | str,
    *,
    name: str = "adapter",
    rows: Any = None,
    eval_rows: Any = None,
    tokenizer: Any = None,
    resume: bool = False,
    folder: Path = Path(),
    base_name: str | None = None,
    base_path: str | None = None,
    base_digest: str | None = None,
    progress: Callable[[TrainProgress], None] | None = None,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Train one adapter and write it to `out`; returns that folder.

    Args:
        base: A folder, a Hub name, or a causal language model in memory (given back bit for bit as it was).
        spec: The adapter's section of a recipe.
        out: Folder to write; must not exist. The run works in `<out>.part`.
        name: What messages call the adapter.
        rows: A `datasets.Dataset` instead of `spec.data`; `eval_rows` instead of `spec.eval_data`.
        tokenizer: Instead of the base's own.
        resume: Go on from the last checkpoint of an interrupted run; a finished adapter is left alone.
        folder: Where relative paths of the section start.
        base_name: What the adapter's files call the base; the folder or name it was loaded from by default.
        base_path: Where the tokenizer of a base given in memory is; `base_name` by default.
        base_digest: `digest_of` the base, if the caller knows it.
        progress: Called after every optimizer step and with every log.
        callbacks: Further `transformers.TrainerCallback`s.

    Raises:
        TrainError, RecipeError: with everything that is wrong, before the first step where that can be known.
    """
    spec = spec if isinstance(spec, AdapterSpec) else read_adapter(spec, name)
    _need_extras()
    place = RunFolder(Path(out))
    if resume and place.finished:
        return place.final
    named = base_name or str(base if isinstance(base, str | Path) else base.config._name_or_path)
    arguments = training_arguments(spec, place.checkpoints, name)
    _check_processes(spec, name)
    source = str(base) if isinstance(base, str | Path) else base_path or named
    tokenizer = tokenizer or load_tokenizer(source, spec, folder)
    rows = rows if rows is not None else sets.load_rows(spec.data, folder)
    eval_rows = eval_rows if eval_rows is not None or not spec.eval_data else sets.load_rows(spec.eval_data, folder)
    sets.check_rows(rows, spec, tokenizer)
    if eval_rows is not None:
        sets.check_rows(eval_rows, spec, tokenizer, "eval_data")
    model = load_base(source, spec.base) if isinstance(base, str | Path) else base
    check_targets(spec, model)
    job = Job(
        name, spec, place, model, named, tokenizer, arguments, rows, eval_rows, resume, progress, tuple(callbacks)
    )
    job.folder = folder
    job.base_digest = base_digest or (digest_of(model) if is_first() else "")
    _look_at_data(job)
    begun = place.part.exists()
    if is_main_process():
        place.open(training_plan(job), resume)
    wait_for_everyone()
    with restoring_base(model):
        try:
            _train(job)
        except TrainError:
            if not begun and is_main_process() and not place.holds_work():
                shutil.rmtree(place.part)  # there is nothing to resume
            raise
    return place.final


def _train(job: Job) -> None:
    if job.spec.objective in SAMPLING:
        from paft_merge.training.on_policy import train_in_rounds

        train_in_rounds(job)
    else:
        trainer = make_trainer(job)
        run_trainer(job, trainer)
        finish(job, trainer)


def _need_extras() -> None:
    missing = [package for package in ("trl", "datasets") if find_spec(package) is None]
    if missing:
        fix = "pip install 'paft-merge[train]'"
        raise TrainError.of("MISSING", "train", f"{' and '.join(missing)} not installed", fix)


def _check_processes(spec: AdapterSpec, name: str) -> None:
    from accelerate import PartialState

    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":  # accelerate launch tells by the environment
        if os.environ.get("FSDP_VERSION", "1") == "1":
            raise uses_old_fsdp(name)
        if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
            what = "its activation checkpointing renames modules, so that PEFT finds no adapter to put into checkpoints"
            fix = "set fsdp_activation_checkpointing: false there, and training: {gradient_checkpointing: true} here"
            raise TrainError.of("FSDP", f"{name}: accelerate_config", what, fix)
    if spec.objective in SAMPLING and PartialState().num_processes > 1:
        fix = "use processes: 1, or rloo/grpo, which TRL spreads over GPUs"
        raise TrainError.of("PROCESSES", name, f"{spec.objective} generates on one device", fix)


def _look_at_data(job: Job) -> None:
    """Shorten prompts where asked, count what the length limit cuts, and tell what is unusual."""
    job.facts = {"fingerprint": sets.fingerprint(job.rows), "rows": len(job.rows)}
    spec, tokenizer = job.spec, job.tokenizer
    if tokenizer.pad_token is None:
        job.warn(f"the tokenizer has no pad token; its eos token {tokenizer.eos_token!r} is used")
    if spec.max_prompt_tokens and sets.kind_of(spec) == "preference":
        job.rows, cut = sets.shorten_prompts(job.rows, tokenizer, spec.max_prompt_tokens)
        job.facts["prompts_cut"] = cut
        if cut:
            job.warn(f"{cut} of {len(job.rows)} prompts were cut from the left to {spec.max_prompt_tokens} tokens")
    uncut = getattr(job.arguments, "packing", False) and job.arguments.packing_strategy != "bfd"  # bfd cuts
    limit = None if uncut else getattr(job.arguments, "max_length", None)
    counts = sets.count_cut(job.rows, tokenizer, limit, getattr(job.arguments, "dataset_text_field", "text"))
    job.facts.update(counts)
    if counts.get("rows_cut"):
        job.warn(
            f"{counts['rows_cut']} of {counts['rows_looked_at']} rows looked at are longer than max_length "
            f"{counts['max_length']} and will be cut (the longest has {counts['longest_tokens']} tokens)"
        )
    if spec.l1 and str(getattr(job.arguments.lr_scheduler_type, "value", "")).startswith("constant"):
        job.warn("L1 with a constant learning rate leaves noise where zeros should be; use cosine or linear")
