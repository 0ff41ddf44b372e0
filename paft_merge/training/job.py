"""The steps of training one adapter: build the trainer, train, measure and check the result, write the folder."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from paft_merge.errors import PaftMergeError, TrainError, cause_of
from paft_merge.training.adapter_record import check_trim, write_card, write_record, write_trimmed
from paft_merge.training.arguments import lora_config
from paft_merge.training.callbacks import L1, ProxCallback, Watch
from paft_merge.training.delta_stats import Stats, measure
from paft_merge.training.factors import Factors, adapted, whole
from paft_merge.training.run_folder import RunFolder, is_first, write_json
from paft_merge.training.schema import AdapterSpec, settings_of
from paft_merge.training.train_options import TrainOptions

log = logging.getLogger(__name__)


@dataclass
class Job:
    """The training of one adapter: checked inputs, and the facts and warnings that its record will hold."""

    spec: AdapterSpec
    place: RunFolder
    options: TrainOptions
    base: Any
    """The model, without adapters."""
    base_name: str
    tokenizer: Any
    arguments: Any
    """The TRL config."""
    rows: Any
    eval_rows: Any
    base_digest: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts about the data."""
    warnings: list[str] = field(default_factory=list)
    parts: dict[str, Job] = field(default_factory=dict)
    """Of a mixed adapter: the jobs of its parts that have steps, by name."""

    @property
    def name(self) -> str:
        """Name of the adapter in messages."""
        return self.options.name

    def warn(self, text: str) -> None:
        """Log a warning, once for all processes, and keep it for the record."""
        if is_first():
            log.warning("%s: %s", self.name, text)
        self.warnings.append(text)


def uses_old_fsdp(name: str) -> TrainError:
    """The error for FSDP 1."""
    what = "FSDP 1 flattens the factors of all matrices into one tensor, so they cannot be measured or penalised"
    return TrainError.of("FSDP", name, what, "set fsdp_config: {fsdp_version: 2} in the accelerate_config")


def is_main_process() -> bool:
    """Whether this process is the first one of accelerate's."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def wait_for_everyone() -> None:
    """Wait until all of accelerate's processes are here."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def training_plan(job: Job) -> dict[str, Any]:
    """The settings that a resumed run must share with the interrupted one."""
    return {**settings_of(job.spec, job.base_name), "data": job.facts["fingerprint"]}


def make_trainer(job: Job, *, rows: Any = None, adapter: Path | None = None, policy: Any = None) -> Any:
    """Build the objective's trainer on the job's base.

    Args:
        job: The job.
        rows: Training rows; default: the job's. Without evaluation rows if given.
        adapter: Folder of an adapter whose weights the new adapter starts with.
        policy: A PeftModel to train further instead of a new adapter on the base.

    Raises:
        TrainError: TARGET or DATA, when PEFT or TRL refuses the settings; PROX_ZERO, ZERO or FSDP, when a process
            would not have whole factors.
    """
    from paft_merge.training import trainers

    spec = job.spec
    l1 = L1(spec.l1) if spec.l1 else None
    options: dict[str, Any] = {}
    if spec.objective in ("rloo", "grpo"):
        from paft_merge.training.rewards import reward_functions

        options["reward_funcs"] = reward_functions(spec.reward, job.options.folder)
    if spec.objective == "rwr":
        job.tokenizer.pad_token = job.tokenizer.pad_token or job.tokenizer.eos_token
        options["data_collator"] = trainers.weighted_collator(job.tokenizer)
    watch = Watch(job.name, l1, job.options.progress)
    callbacks = [watch, *([ProxCallback(l1)] if l1 and l1.spec.mode == "prox" else []), *job.options.callbacks]
    try:
        trainer = trainers.TRAINERS[spec.objective](
            model=job.base if policy is None else policy,
            args=job.arguments,
            train_dataset=job.rows if rows is None else rows,
            eval_dataset=job.eval_rows if rows is None else None,
            processing_class=job.tokenizer,
            peft_config=lora_config(spec) if policy is None else None,
            callbacks=callbacks,
            **options,
        )
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        code = "TARGET" if "target" in str(error).lower() and "module" in str(error).lower() else "DATA"
        raise TrainError.of(code, job.name, f"TRL cannot start: {str(error).strip()}", "") from error
    without_printer(trainer)
    trainer.l1, trainer.watch, trainer.where = l1, watch, job.name
    trainer.orpo, trainer.ift = spec.orpo, spec.ift
    widen_adapter(trainer.model)
    if spec.trim:
        check_trim(adapted(trainer.model), spec.trim.density)
    if adapter is not None:
        _load_adapter(trainer.model, adapter)
    check_sharding(job, trainer)
    return trainer


def without_printer(trainer: Any) -> None:
    """Stop transformers from printing its logs to stdout, which is for results."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def widen_adapter(model: Any) -> None:
    """Convert trainable 16-bit parameters to float32: TRL casts adapters to bf16 on quantised bases."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _load_adapter(model: Any, adapter: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(model, load_file(str(adapter / "adapter_model.safetensors")))
    if result.unexpected_keys:
        raise TrainError.of(
            "ADAPTER", adapter, f"unexpected tensors {result.unexpected_keys[:3]}", "use the same lora:"
        )


def check_sharding(job: Job, trainer: Any) -> None:
    """Raise TrainError FSDP, ZERO or PROX_ZERO when the trainer's sharding makes the L1 term or its measures wrong."""
    l1 = job.spec.l1
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise uses_old_fsdp(job.name)
    if not trainer.is_deepspeed_enabled:
        return
    if trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        what = "ZeRO-3 shards the factors, so they cannot be measured or penalised"
        raise TrainError.of("ZERO", job.name, what, "use FSDP 2, whose shards are gathered, or ZeRO-2")
    if l1 and l1.mode == "prox":
        what = "ZeRO keeps float32 copies of the factors, which overwrite the result of the proximal step"
        raise TrainError.of("PROX_ZERO", job.name, what, "use mode: penalty, or DDP or FSDP instead of DeepSpeed")


def run_trainer(job: Job, trainer: Any) -> None:
    """Train, from the last complete checkpoint when the job resumes; TrainError DATA when no row is left."""
    if not all(map(len, rows := trainer.row_sets)):
        fix = "raise training.max_length, or check for empty completions"
        raise TrainError.of("DATA", job.name, "no row is left: every row is masked or cut completely", fix)
    checkpoint = _whole_checkpoint(job) if job.options.resume else None
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if checkpoint is None or trainer.watch.stepping or isinstance(error, PaftMergeError):
            raise
        fix = "remove this folder; the run then resumes from the checkpoint before it"
        raise TrainError.of("RESUME", checkpoint, cause_of(error), fix) from error
    job.facts.setdefault("rows_trained_on", sum(map(len, rows)))
    job.facts["train_loss"] = result.training_loss


def _whole_checkpoint(job: Job) -> Path | None:
    """The newest whole checkpoint; warn about newer ones, because their steps are repeated."""
    passed: list[str] = []
    for path, fault in job.place.faults(_processes()):
        if not fault:
            if passed:
                job.warn(f"{'; '.join(passed)}; going back to {path.name}")
            log.info("%s: resuming from %s", job.name, path.name)
            return path
        passed.append(f"{path.name} is not whole: {fault}")
    if passed:
        job.warn(f"{'; '.join(passed)}; starting over")
    return None


def _processes() -> int:
    from accelerate import PartialState

    return int(PartialState().num_processes)


def finish(job: Job, trainer: Any, **run: Any) -> Stats:
    """Measure the adapter, write it with its record and card, and rename its folder to the final name.

    Args:
        job: The job.
        trainer: Its trainer, after training.
        run: Further entries of the record's `run`.
    """
    place, spec = job.place, job.spec
    factors = adapted(trainer.accelerator.unwrap_model(trainer.model))
    if spec.trim:  # every process takes part in gathering, and one writes
        factors = tuple(replace(f, a_RI=whole(f.a_RI).detach(), b_OR=whole(f.b_OR).detach()) for f in factors)
    _check_weights(job, trainer)
    stats = measure(factors, density=spec.trim.density if spec.trim else None)
    save_adapter(trainer, place.part)
    if is_main_process():
        _check_written(place.part, factors)
        (place.part / "training_args.bin").unlink(missing_ok=True)  # a pickle; the record has the same values
        shutil.rmtree(place.part / "ref", ignore_errors=True)  # TRL's frozen copy of the policy
        _name_base(place.part, job.base_name)
        run = {**_run_facts(job, trainer, stats), **run}
        if spec.trim:
            run["trimmed_density"] = _trim(job, factors)
        facts = {k: v for k, v in job.facts.items() if k != "train_loss"}
        base = {"name": job.base_name, "digest": job.base_digest}
        record = write_record(place.part, spec, stats, base=base, data=facts, run=run)
        write_card(place.part, job.name, record)
        place.finish()
    wait_for_everyone()
    return stats


def _check_weights(job: Job, trainer: Any) -> None:
    """Raise TrainError NONFINITE with the first trained parameter that holds NaN or infinity."""
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(whole(parameter.detach())).all()):
            what = f"{name} is NaN or infinite after training"
            raise TrainError.of("NONFINITE", job.name, what, "lower training.learning_rate, or check the data")


def save_adapter(trainer: Any, folder: Path) -> None:
    """Write the adapter and the tokenizer; of sharded models only the trained parameters are gathered."""
    if not trainer.is_fsdp_enabled:
        trainer.save_model(str(folder))
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = {name: whole(p.detach()).cpu() for name, p in model.named_parameters() if p.requires_grad}
    if is_main_process():
        model.save_pretrained(str(folder), state_dict=state)
        trainer.processing_class.save_pretrained(str(folder))


def _check_written(folder: Path, factors: Sequence[Factors]) -> None:
    """Raise TrainError ADAPTER unless the file holds every factor in full: wrappers of a model may hide names."""
    from safetensors import safe_open

    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as held:
        found = sum(math.prod(held.get_slice(key).get_shape()) for key in held.keys() if ".lora_" in key)  # noqa: SIM118
    wanted = sum(f.a_RI.numel() + f.b_OR.numel() for f in factors)
    if found != wanted:
        what = f"only {found} of the adapter's {wanted} values were written"
        raise TrainError.of("ADAPTER", folder, what, "this is a bug of paft_merge; please report it")


def _name_base(folder: Path, base: str) -> None:
    """Write the base's name into the adapter's config: PEFT does not know the name of a model in memory."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, config | {"base_model_name_or_path": base})


def _run_facts(job: Job, trainer: Any, stats: Stats) -> dict[str, Any]:
    state, l1 = trainer.state, trainer.l1
    target = job.spec.l1.target if job.spec.l1 else None
    reached = trainer.watch.latest.get("sparsity/below_1e-5", stats.below_epsilon)  # before any trimming
    if target is not None and abs(reached - target) > 0.02:
        fix = f"give it more steps, or start l1.strength nearer to its last value ({l1.strength:.2g})"
        job.warn(f"the sparsity is {reached:.3f}, the target was {target}; {fix}")
    if stats.norm == 0:
        job.warn("the delta is zero: nothing was learned")
    return {
        "steps": state.global_step,
        "seconds": round(trainer.watch.seconds, 2),
        "tokens": trainer.watch.tokens,
        "train_loss": job.facts.get("train_loss"),
        "eval_loss": next((e["eval_loss"] for e in reversed(state.log_history) if "eval_loss" in e), None),
        "l1_strength": l1.strength if l1 else None,
        "l1_on": l1.spec.penalized if l1 else None,
        "warnings": list(job.warnings),
        "log": state.log_history,
    }


def _trim(job: Job, factors: Sequence[Factors]) -> float:
    """Move the LoRA to `untrimmed/` and write the pruned delta in its place; returns its density."""
    assert job.spec.trim is not None
    part = job.place.part
    (part / "untrimmed").mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.move(str(part / name), str(part / "untrimmed" / name))
    return write_trimmed(part, factors, job.spec.trim.density, job.base_name)
