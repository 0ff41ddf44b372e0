"""Sections of the adapters that a run trains: variants of those of the recipe, and mixed adapters of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from paft_merge.pipeline.arms import Variant
from paft_merge.pipeline.schema import MixedSpec, RunRecipe
from paft_merge.recipe import CHAT_TEMPLATES
from paft_merge.recipe.sections import as_list, beside_recipe, current_keys
from paft_merge.recipe.trust import file_of
from paft_merge.training.schema import AdapterSpec

_EPOCHS = 3.0
"""Default of `num_train_epochs`."""


def section_of(recipe: RunRecipe, variant: Variant, seed: int | None) -> dict[str, Any]:
    """An adapter's section for one variant and seed, its paths as written; the parts of a mixed one as sections."""
    given: dict[str, Any] = current_keys(AdapterSpec, recipe.located.data["adapters"][variant.adapter])
    if variant.dense:
        given = {key: value for key, value in given.items() if key not in ("l1", "trim")}
    if given["objective"] == "mixed":
        given = {**given, "parts": {name: section_of(recipe, Variant(name), seed) for name in as_list(given["parts"])}}
    if variant.beta is not None:
        key = "orpo" if given["objective"] == "orpo" else "training"
        given = {**given, key: {**(given.get(key) or {}), "beta": variant.beta}}
    if (variant.begin, variant.end) != (0.0, 1.0):
        given = {**given, "training": _shortened(given.get("training") or {}, variant)}
    if seed is not None:
        given["training"] = {**(given.get("training") or {}), "seed": seed}
        if "sampling" in given:
            given["sampling"] = {**given["sampling"], "seed": seed}
    return given


def _shortened(training: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """The `training` of a part of an adapter's steps: whole steps of `max_steps`, else a share of the epochs."""
    steps = steps_within(training, variant.begin, variant.end)
    if steps is not None:
        return {**training, "max_steps": steps}
    with suppress(TypeError, ValueError):  # the check of the adapter reports it
        epochs = float(training.get("num_train_epochs", _EPOCHS)) * (variant.end - variant.begin)
        return {**training, "num_train_epochs": round(epochs, 9)}
    return dict(training)


def steps_within(training: Mapping[str, Any], begin: float, end: float) -> int | None:
    """The number of optimizer steps in a part of a training; None if `max_steps` does not say how many there are."""
    with suppress(TypeError, ValueError):
        steps = int(float(training.get("max_steps", -1)))
        return round(steps * end) - round(steps * begin) if steps > 0 else None
    return None


def mixed_section(
    recipe: RunRecipe, variants: Sequence[Variant], seed: int | None, ratio: float | Mapping[str, float] | None
) -> dict[str, Any]:
    """The section of the adapter that the arm `mixed` trains.

    Args:
        recipe: the run's recipe.
        variants: the adapters whose objectives it has.
        seed: the run's seed.
        ratio: as in the section of a mixed adapter; None: each objective has as many steps as alone.
    """
    spec = (recipe.compare and recipe.compare.mixed) or MixedSpec()
    sections = {variant.adapter: section_of(recipe, variant, seed) for variant in variants}
    training = spec.training if seed is None else {**spec.training, "seed": seed}
    processes = [section["processes"] for section in sections.values() if "processes" in section]
    found = {"ratio": ratio, "lora": spec.lora, "training": training, "processes": max(processes, default=None)}
    return {
        "objective": "mixed",
        "parts": sections,
        **{key: value for key, value in found.items() if value is not None},
    }


def placed(section: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A section whose files beside the recipe have absolute paths."""
    given = dict(section)
    if isinstance(given.get("parts"), Mapping):
        given["parts"] = {name: placed(part, folder) for name, part in given["parts"].items()}
    for key in ("data", "eval_data"):
        if given.get(key):
            given[key] = _absolute_data(given[key], folder)
    for key in ("chat_template", "accelerate_config"):
        if given.get(key) not in (None, *CHAT_TEMPLATES) and (folder / given[key]).exists():
            given[key] = str((folder / given[key]).resolve())
    if given.get("reward"):
        given["reward"] = [_absolute_reward(one, folder) for one in as_list(given["reward"])]
    return given


def _absolute_reward(given: Any, folder: Path) -> Any:
    file, _, function = (given.get("function") or "").rpartition(":")
    if not file.endswith(".py"):
        return given
    return {**given, "function": f"{beside_recipe(file, folder).resolve()}:{function}"}


def _absolute_data(given: Any, folder: Path) -> Any:
    if isinstance(given, list):
        return [_absolute_data(one, folder) for one in given]
    if isinstance(given, str):
        return str((folder / given).resolve()) if (folder / given).exists() else given
    return {**given, "path": _absolute_data(given["path"], folder)}


def files_of(spec: AdapterSpec, folder: Path) -> dict[str, Path]:
    """The local files that an adapter's training reads."""
    found: dict[str, Path] = {}
    for data in [*spec.data, *(spec.eval_data or [])]:
        found[data.path] = beside_recipe(data.path, folder)
    if spec.chat_template:
        found["chat_template"] = beside_recipe(spec.chat_template, folder)
    for reward in spec.reward:
        code = file_of(reward.function, folder) if reward.function else None
        if code:
            found[str(reward.function)] = code
    for name, part in (spec.parts or {}).items():
        found |= {f"{name}/{key}": path for key, path in files_of(part, folder).items()}
    return found
