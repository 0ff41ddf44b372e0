"""From a section to the objects TRL and PEFT take, with every field checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from paft_merge.errors import Problems, TrainError
from paft_merge.recipe.sections import suggestion
from paft_merge.training.schema import AdapterSpec

_ROUNDS = {
    "max_steps": "sampling.rounds, samples_per_round and inner_passes decide",
    "num_train_epochs": "use sampling: {inner_passes: ...}",
    "eval_strategy": "rounds report their rewards instead",
}
_PER_SEQUENCE = {"packing": "its weights are per sequence", "padding_free": "its weights are per sequence"}

NOT_FOR: dict[str, dict[str, str]] = {
    "on_policy": _ROUNDS,
    "best_of_n": _ROUNDS,
    "orpo": {
        "beta": "use orpo: {beta: ...}",
        "loss_type": "the objective is the loss",
        "precompute_ref_log_probs": "ORPO has no reference",
    },
    "ift": {**_PER_SEQUENCE, "loss_type": "the objective is the loss"},
    "rwr": {**_PER_SEQUENCE, **_ROUNDS, "loss_type": "the objective is the loss"},
}
"""Fields of the TRL config that an objective leaves without a meaning, and why."""


UNMEASURED = {
    "use_dora": "DoRA's update is no product of two factors: no L1 and no measure of sparsity here knows it",
    "target_parameters": "fused parameters have no measure of sparsity here",
}
"""Fields of LoraConfig that this trainer does not take, and why."""


def training_arguments(spec: AdapterSpec, output_dir: Path, name: str, **fixed: Any) -> Any:
    """Build the TRL config of an adapter; `fixed` fields override the section's.

    Ours beneath the user's: float32 and no pinned memory where there is no GPU (TRL's default is bf16 everywhere), no
    report, no bar, and no filter that hides a NaN in the logs.

    Raises:
        TrainError: TRAINING, with every field that the config does not know or does not take.
    """
    from paft_merge.training.trainers import CONFIGS, DPO_LOSSES

    config, problems = CONFIGS[spec.objective], Problems()
    known = [field.name for field in dataclasses.fields(config) if field.init]
    for key in spec.training:
        where = f"{name}: training.{key}"
        if key not in known:
            hint = suggestion(key, known)
            problems.add("TRAINING", where, f"TRL's {config.__name__} has no such field", hint)
        elif key in NOT_FOR.get(spec.objective, {}):
            problems.add("TRAINING", where, f"has no meaning for {spec.objective}", NOT_FOR[spec.objective][key])
    if spec.objective in ("dpo", "on_policy"):
        given = spec.training.get("loss_type", [])
        for kind in [given] if isinstance(given, str) else given:
            if kind not in DPO_LOSSES:
                hint = suggestion(str(kind), list(DPO_LOSSES))
                problems.add("TRAINING", f"{name}: training.loss_type", f"TRL has no DPO loss {kind!r}", hint)
    problems.raise_as(TrainError)
    ours = {"report_to": "none", "disable_tqdm": True, "logging_nan_inf_filter": False, "output_dir": str(output_dir)}
    if not torch.cuda.is_available():
        ours |= {"dataloader_pin_memory": False} | ({} if spec.training.get("fp16") else {"bf16": False})
    if spec.objective in ("rwr",):
        ours["remove_unused_columns"] = False  # the weights are a column of the rows
    try:
        return config(**_renamed({**ours, **spec.training, **fixed}, known))
    except (TypeError, ValueError) as error:
        raise TrainError.of(
            "TRAINING", f"{name}: training", str(error), "see TRL's documentation of the field"
        ) from error


def _renamed(given: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """Say `activation_checkpointing` where transformers knows it: the old name warns, TRL's own default included."""
    if "activation_checkpointing" not in known:
        return given
    old, new = "gradient_checkpointing", "activation_checkpointing"
    moved = {(key.replace(old, new) if key.startswith(old) else key): value for key, value in given.items()}
    return {new: True, **moved}


def lora_config(spec: AdapterSpec) -> Any:
    """Build PEFT's config of an adapter; TrainError LORA for a field under `extra` that PEFT does not know."""
    from peft import LoraConfig

    lora = spec.lora
    known = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    problems = Problems()
    for key in lora.extra:
        if key not in known:
            problems.add("LORA", f"lora.extra.{key}", "peft.LoraConfig has no such field", suggestion(key, known))
    for key, why in UNMEASURED.items():
        if lora.extra.get(key):
            problems.add("LORA", f"lora.extra.{key}", why, "remove it")
    problems.raise_as(TrainError)
    plain = lora.model_dump(exclude={"extra"})
    return LoraConfig(**plain, **lora.extra, task_type="CAUSAL_LM")


def check_targets(spec: AdapterSpec, model: Any) -> None:
    """Raise TrainError TARGET when the section names modules that the base does not have."""
    targets = spec.lora.target_modules
    if isinstance(targets, str):
        _check_pattern(targets, model)
        return
    leaves = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if not list(module.children())})
    names = [name for name, _ in model.named_modules()]
    problems = Problems()
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            hint = suggestion(target, leaves)
            problems.add("TARGET", f"lora.target_modules: {target}", "the base has no such module", hint)
    if any(target.rsplit(".", 1)[-1] == "lm_head" for target in targets):
        problems.add(
            "TARGET", "lora.target_modules: lm_head", "TRL's fused head reads its weight, so it would never be trained",
            "remove it, or use modules_to_save: [lm_head]",
        )  # fmt: skip
    problems.raise_as(TrainError)


def _check_pattern(pattern: str, model: Any) -> None:
    """A regular expression for whole names, unless it is `all-linear`."""
    if pattern == "all-linear":
        return
    where = f"lora.target_modules: {pattern}"
    try:
        found = any(re.fullmatch(pattern, name) for name, _ in model.named_modules())
    except re.error as error:
        raise TrainError.of("TARGET", where, f"is no regular expression: {error}") from error
    if not found:
        fix = "it has to match a whole name (.*q_proj); or give a list of names, or all-linear"
        raise TrainError.of("TARGET", where, "no module of the base matches", fix)
