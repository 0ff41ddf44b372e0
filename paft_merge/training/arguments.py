"""Build the configs of TRL and PEFT from a section; every field is checked before a model is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from paft_merge.errors import Problems, TrainError
from paft_merge.inputs.adapters.patterns import PatternError
from paft_merge.recipe.sections import suggestion
from paft_merge.training.child_process import match_in_time
from paft_merge.training.schema import AdapterSpec, trained_parts

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
"""Fields of the TRL config that have no effect for an objective, and the reason."""

UNMEASURED = {
    "use_dora": "the L1 penalty and the sparsity metrics do not support DoRA, whose update is not a low-rank product",
    "target_parameters": "the L1 penalty and the sparsity metrics do not support fused parameters",
}
"""Unsupported fields of LoraConfig, and the reason."""


def training_arguments(spec: AdapterSpec, output_dir: Path, name: str, **fixed: Any) -> Any:
    """Build the TRL config of an adapter.

    Defaults that differ from TRL's: float32 and no pinned memory without a GPU, no reports, no progress bar, and NaN
    losses are logged.

    Args:
        spec: The adapter's section.
        output_dir: Folder of the checkpoints.
        name: The adapter's name in messages.
        fixed: Fields that override the section's.

    Raises:
        TrainError: TRAINING, with every unknown or unsupported field.
    """
    from paft_merge.training.trainers import CONFIGS, DPO_LOSSES

    config, problems = CONFIGS[spec.objective], Problems()
    fields = {field.name: field for field in dataclasses.fields(config) if field.init}
    known, values = list(fields), dict(spec.training)
    for key, value in spec.training.items():
        where = f"{name}: training.{key}"
        if key not in known:
            hint = suggestion(key, known)
            problems.add("TRAINING", where, f"TRL's {config.__name__} does not have this field", hint)
        elif key in NOT_FOR.get(spec.objective, {}):
            problems.add("TRAINING", where, f"has no effect for {spec.objective}", NOT_FOR[spec.objective][key])
        else:
            with problems.catching():
                values[key] = _value(value, fields[key], where)
                if (least := _LEAST.get(key)) is not None and values[key] is not None and values[key] < least:
                    problems.add("TRAINING", where, f"must be at least {least}, got {value}")
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
        return config(**_renamed({**ours, **values, **fixed}, known))
    except (TypeError, ValueError, ImportError) as error:
        what = str(error).strip().splitlines()[0]
        raise TrainError.of("TRAINING", f"{name}: training", what, "see TRL's documentation of the field") from error


_LEAST = {
    "learning_rate": 0, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "max_length": 1, "seed": 0,
    "num_train_epochs": 0, "gradient_accumulation_steps": 1, "max_steps": -1,
    "weight_decay": 0, "beta": 0, "dataloader_num_workers": 0,
}  # fmt: skip
"""Smallest values of fields that TRL does not check."""


def _value(value: Any, field: dataclasses.Field[Any], where: str) -> Any:
    """A value of the type of TRL's field; YAML reads `2e-4` as text. TrainError TRAINING for another type."""
    kind = float if field.type in (float, float | None) else type(field.default)
    if value is None or kind not in (bool, int, float):
        return value
    try:
        number = float(value) if kind is not bool and not isinstance(value, bool) else None
    except (TypeError, ValueError):
        number = None
    if kind is bool and isinstance(value, bool):
        return value
    if number is None or not math.isfinite(number) or (kind is int and number != int(number)):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise TrainError.of("TRAINING", where, f"must be {wanted}, got {value!r}")
    if isinstance(value, int):
        return value
    return int(number) if kind is int else number


SHARED = (
    "seed", "full_determinism", "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "bf16", "fp16", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "torch_compile", "neftune_noise_alpha", "use_liger_kernel", "activation_offloading", "auto_find_batch_size",
)  # fmt: skip
"""Fields that the parts of a mixed adapter share, because one optimizer trains it."""


def loop_arguments(spec: AdapterSpec, parts: Mapping[str, Any], output_dir: Path, name: str) -> Any:
    """Build the TRL config of the loop of a mixed training: that of its first part, without the batches of the parts.

    Args:
        spec: The mixed adapter's section.
        parts: The configs of its parts, by name.
        output_dir: Folder of the checkpoints.
        name: The adapter's name in messages.

    Raises:
        TrainError: TRAINING, with every field that the parts must share and do not.
    """
    _check_shared(parts, name)
    first = trained_parts(spec)[next(iter(parts))]
    section = first.model_copy(update={"training": {**first.training, "max_steps": spec.training.get("max_steps", -1)}})
    peak = max(one.learning_rate for one in parts.values())
    return training_arguments(
        section, output_dir, name, learning_rate=peak, gradient_accumulation_steps=1, ignore_data_skip=True
    )


def _check_shared(parts: Mapping[str, Any], name: str) -> None:
    """Raise TrainError TRAINING for each field of the configs of a mixed adapter's parts that must be equal and is not."""
    problems, (first, one) = Problems(), next(iter(parts.items()))
    for field in SHARED:
        for part, other in parts.items():
            mine, its = getattr(one, field, None), getattr(other, field, None)
            if mine != its:
                what = f"{first} has {mine!r} and {part} has {its!r}, but one optimizer trains both"
                problems.add("TRAINING", f"{name}: training.{field}", what, f"set it under training: of {name}")
    if one.auto_find_batch_size:
        problems.add(
            "TRAINING", f"{name}: training.auto_find_batch_size", "is not possible for a mixed adapter", "remove it"
        )
    problems.raise_as(TrainError)


def check_one_optimizer(spec: AdapterSpec, name: str) -> None:
    """Check the TRL configs of a mixed adapter's parts, without their data; TrainError TRAINING with every problem."""
    problems, made = Problems(), dict[str, Any]()
    for part, section in trained_parts(spec).items():
        with problems.catching():
            made[part] = training_arguments(section, Path("checkpoints"), f"{name}.{part}")
    problems.raise_as(TrainError)
    loop_arguments(spec, made, Path("checkpoints"), name)


def _renamed(given: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """Use the name `activation_checkpointing` where transformers has it: the old name gives a warning."""
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
            problems.add(
                "LORA", f"lora.extra.{key}", "peft.LoraConfig does not have this field", suggestion(key, known)
            )
    for key, why in UNMEASURED.items():
        if lora.extra.get(key):
            problems.add("LORA", f"lora.extra.{key}", why, "remove it")
    problems.raise_as(TrainError)
    plain = lora.model_dump(exclude={"extra"})
    try:
        return LoraConfig(**plain, **lora.extra, task_type="CAUSAL_LM")
    except (TypeError, ValueError) as error:
        what = str(error).strip().splitlines()[0]
        raise TrainError.of("LORA", "lora", what, "see PEFT's documentation of LoraConfig") from error


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
            problems.add("TARGET", f"lora.target_modules: {target}", "the base does not have this module", hint)
    if any(target.rsplit(".", 1)[-1] == "lm_head" for target in targets):
        what = "TRL's fused head reads the weight directly, so its adapter would not be trained"
        fix = "remove it, or use modules_to_save: [lm_head]"
        problems.add("TARGET", "lora.target_modules: lm_head", what, fix)
    problems.raise_as(TrainError)


def _check_pattern(pattern: str, model: Any) -> None:
    """A regular expression for whole names, unless it is `all-linear`."""
    if pattern == "all-linear":
        return
    where = f"lora.target_modules: {pattern}"
    try:
        [found] = match_in_time([pattern], [name for name, _ in model.named_modules()], "fullmatch")
    except PatternError as error:
        raise TrainError.of("TARGET", where, str(error)) from error
    if not any(found):
        fix = "match whole names (.*q_proj), or give a list of names, or all-linear"
        raise TrainError.of("TARGET", where, "no module of the base matches", fix)
