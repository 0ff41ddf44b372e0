"""Checks of a run before anything is executed: files, columns, fields, packages, names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from paft_merge.errors import Problems, RecipeError, RunError, TrainError, first_line
from paft_merge.evaluating import HARNESS, check_evaluate
from paft_merge.exporting import check_tools
from paft_merge.hub import is_repository, resolve
from paft_merge.hub.run_checkpoints import expand
from paft_merge.inputs.architecture import bounded_modules
from paft_merge.inputs.model_config import refuse_odd_files
from paft_merge.pipeline.adapter_sections import mixed_section
from paft_merge.pipeline.arms import (
    arms_wanted,
    chains,
    check_compare,
    merge_before_polish,
    merges_of,
    variants_of,
    writes_adapter,
)
from paft_merge.pipeline.named_models import is_reference, references, resolved_merge
from paft_merge.pipeline.schema import RunRecipe
from paft_merge.pipeline.steps import Evaluate, Step, Train
from paft_merge.pipeline.trained_templates import check_turns
from paft_merge.recipe import load_recipe
from paft_merge.recipe.sections import beside_recipe, not_found
from paft_merge.recipe.yaml_source import KeyPath, Located, did_you_mean
from paft_merge.stores import has_scheme, shown
from paft_merge.training.consent import check_code
from paft_merge.training.schema import read_adapter


def check_run(recipe: RunRecipe, *, trust_code: bool = False) -> None:
    """Check a recipe without its training data: comparisons, merges, the audit's gate, evaluations, the push.

    Raises:
        RecipeError: every problem, each with its line.
    """
    problems = Problems()
    check_compare(recipe, problems)
    _check_base(recipe, problems)
    _check_existing(recipe, problems)
    if not problems.found:
        _check_merges(recipe, problems)
        _check_mixed(recipe, problems)
    _check_audit(recipe, problems)
    for name, adapter in recipe.adapters.items():
        with problems.catching(recipe.where("adapters", name)):
            check_code(adapter, recipe.folder, trust_code=trust_code)
    if recipe.evaluate is not None:
        with problems.catching(recipe.where("evaluate")):
            models = ("base", *recipe.names)
            check_evaluate(recipe.evaluate, recipe.folder, trust_code=trust_code, models=models)
        check_turns(recipe, problems)
    _check_verify(recipe, problems)
    _check_export(recipe, problems)
    _check_push(recipe, problems)
    problems.raise_as(RecipeError)


_COPY = "copy it into a folder first: a run reads folders and the Hub"


def _check_base(recipe: RunRecipe, problems: Problems) -> None:
    base = Path(recipe.base)
    where = recipe.where("base_model")
    if base.is_dir():
        if not (base / "config.json").is_file():
            problems.add("BASE", where, f"{recipe.base} has no config.json", "name a model folder")
        with problems.catching(where):
            refuse_odd_files(base)
    elif has_scheme(recipe.base):
        problems.add("BASE", where, f"{shown(recipe.base)} is a URL", _COPY)
    elif not is_repository(recipe.base):
        what = f"{recipe.base} is not a Hub repository, and is {not_found(recipe.folder)}"
        problems.add("BASE", where, what, "check the path")


def _check_existing(recipe: RunRecipe, problems: Problems) -> None:
    """Find the adapters that exist, and check from headers that each fits the base."""
    from paft_merge.engine.api import open_plan

    found = len(problems.found)
    with problems.catching(recipe.where("base_model")):
        if recipe.existing:
            resolve(recipe.base, kind="model")
    if len(problems.found) > found:
        return  # each adapter would report it again
    for name, spec in recipe.existing.items():
        with problems.catching(recipe.where("adapters", name)):
            if has_scheme(spec.path):
                raise RunError.of("NOT_FOUND", shown(spec.path), "is a URL", _COPY)
            if not Path(spec.path).exists() and not is_repository(spec.path):
                alone = re.split(r"[+:]", spec.path)[-1].strip()
                known = beside_recipe(alone, recipe.folder).is_dir() or is_repository(alone)
                fix = f"write the adapter alone: {alone}" if known else "check the path"
                raise RunError.of("NOT_FOUND", spec.path, not_found(recipe.folder), fix)
            resolve(spec.path, spec.revision, kind="adapter")
            model = {"model": {"path": recipe.base}, "lora": {"path": spec.path, "revision": spec.revision}}
            one = {"model": model, "parameters": {"weight": 1.0}}
            with open_plan(
                {"merge_method": "task_arithmetic", "base_model": recipe.base, "models": [one]}, stream_from_hub=True
            ):
                pass


def _check_merges(recipe: RunRecipe, problems: Problems) -> None:
    if recipe.merge is not None:
        check_merge(recipe, recipe.merge.data, ("merge",), problems)
    polish = [merge_before_polish(recipe)] if "polish" in arms_wanted(recipe) else []
    for merge in (*merges_of(recipe), *polish):
        check_merge(recipe, merge.written, merge.steps, problems)
    problems.found = list(dict.fromkeys(problems.found))  # the points of a sweep share most of their recipe


def _check_mixed(recipe: RunRecipe, problems: Problems) -> None:
    """Check that one adapter can be trained on the objectives of the arm `mixed`."""
    if recipe.compare is None or "mixed" not in arms_wanted(recipe):
        return
    ratio = recipe.compare.mixed.ratio if recipe.compare.mixed else None
    for one in ratio if isinstance(ratio, list) else [ratio]:
        for chain in chains(recipe).values():
            section = mixed_section(recipe, chain, None, one)
            with problems.catching():
                read_adapter(replace(recipe.located, data=section, prefix=("compare", "mixed")))
    problems.found = list(dict.fromkeys(problems.found))


def check_merge(recipe: RunRecipe, data: Mapping[str, Any], steps: tuple[str | int, ...], problems: Problems) -> None:
    """Check a merge recipe and the models that it names.

    Args:
        recipe: the run's recipe.
        data: the merge recipe, with adapters by name.
        steps: its key path in the run's recipe.
        problems: where problems are added.
    """
    paths = {name: {"path": f"adapters/{name}"} for name in recipe.names}
    resolved = resolved_merge(data, paths, recipe)
    # A whole recipe has its own lines; a plain name of a method (or a default) has the line of the name.
    whole = isinstance(_value_at(recipe.located.data, steps), dict)
    lines: Mapping[KeyPath, int] = recipe.located.lines if whole else {(): recipe.located.line(steps) or 1}
    located = Located(resolved, recipe.located.file, prefix=steps, lines=lines)
    with problems.catching():
        located, _ = expand(located)
        load_recipe(located, strict=True)
    for place in references(located.data):
        if Path(place).exists() or place == recipe.base or place.removeprefix("adapters/") in paths:
            continue
        if "/" in place and is_repository(place):
            continue
        fix = (
            did_you_mean(place, paths)
            or f"adapters are {', '.join(paths) or 'none'}; a model is a folder or OWNER/NAME"
        )
        what = f"{place!r} is not an adapter of the recipe, and is {not_found(recipe.folder)}"
        problems.add("MODEL", _spot_of(recipe, data, steps, place), what, fix)


def _value_at(data: Any, steps: KeyPath) -> Any:
    """The value at a key path; None if there is none."""
    for step in steps:
        inside = (isinstance(data, dict) and step in data) or (isinstance(data, list) and isinstance(step, int))
        data = data[step] if inside else None
    return data


def _spot_of(recipe: RunRecipe, data: Any, steps: tuple[str | int, ...], wanted: str) -> str:
    """File, line and path where a merge recipe names a model."""

    def find(value: Any, way: tuple[str | int, ...]) -> tuple[str | int, ...] | None:
        if isinstance(value, Mapping | list):
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            return next((found for key, inner in pairs if (found := find(inner, (*way, key)))), None)
        return way if value == wanted and is_reference(way) else None

    return recipe.where(*(find(data, steps) or steps))


def _check_audit(recipe: RunRecipe, problems: Problems) -> None:
    if recipe.audit is None:
        return
    from paft_merge.auditing.report.gate import METRICS, Requirement

    names = [variant.name for variant in variants_of(recipe)]
    for at, text in enumerate(recipe.audit.require):
        with problems.catching(recipe.where("audit", "require", at)):
            wanted = Requirement.parse(text)
            if METRICS[wanted.metric].of == "preview":
                fix = "use paft audit on the finished run"
                raise RunError.of(
                    "GATE",
                    text,
                    f"{wanted.metric} needs a preview of a merge, which the audit of a run does not have",
                    fix,
                )
            source = wanted.scope.get("source", "*")
            if not any(fnmatchcase(name, source) for name in names):
                fix = did_you_mean(source, names) or f"adapters are {', '.join(names)}"
                raise RunError.of("GATE", text, f"no adapter is called {source!r}", fix)


def _check_verify(recipe: RunRecipe, problems: Problems) -> None:
    if recipe.verify is None:
        return
    from paft_merge.verifying.prompts import read_prompts
    from paft_merge.verifying.report import read_requirement

    for at, text in enumerate(recipe.verify.require):
        with problems.catching(recipe.where("verify", "require", at)):
            read_requirement(text, tensors_only=recipe.verify.tensors_only)
    if recipe.verify.data is not None:
        with problems.catching(recipe.where("verify", "data")):
            read_prompts(beside_recipe(recipe.verify.data, recipe.folder), recipe.verify.rows)


def _check_export(recipe: RunRecipe, problems: Problems) -> None:
    """Check that the converters are here, before anything is trained."""
    if (spec := recipe.export) is None:
        return
    adapter = recipe.merge is not None and writes_adapter(recipe.merge.data)
    for to in spec.to:
        if (to == "gguf-lora") != adapter:
            what = f"the merge writes {'an adapter' if adapter else 'a whole model'}, which {to} is not for"
            problems.add("EXPORT", recipe.where("export"), what, "to: gguf-lora" if adapter else "to: gguf")
            continue
        with problems.catching(recipe.where("export")):
            check_tools(to, spec.quantize)


def _check_push(recipe: RunRecipe, problems: Problems) -> None:
    if recipe.push is None:
        return
    where = recipe.where("push")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        problems.add("PUSH", where, "HF_HUB_OFFLINE is set, so nothing can be pushed", "unset it, or remove push:")


# --- what training reads ----------------------------------------------------------------------------------------------


def check_training(recipe: RunRecipe, steps: Sequence[Step]) -> None:
    """Check the adapters that will be trained, as `check_adapters` does."""
    from paft_merge.training.arguments import check_one_optimizer

    jobs = [step.job for step in steps if isinstance(step.job, Train)]
    check_adapters(recipe, [name for job in jobs for name in job.named])
    problems = Problems()
    for job in jobs:
        if job.section["objective"] == "mixed":
            with problems.catching(recipe.where("compare", "mixed")):
                check_one_optimizer(read_adapter(job.section), job.adapter)
    problems.raise_as(RecipeError)


def check_adapters(recipe: RunRecipe, names: Iterable[str], *, base: bool = True) -> None:
    """Check packages, TRL's and PEFT's fields, target modules and data sets of adapters.

    Args:
        recipe: the recipe.
        names: adapters to check.
        base: check against the base too; False where the base itself cannot be used.

    Raises:
        RecipeError: every problem, by adapter.
    """
    problems = Problems()
    for name in dict.fromkeys(names):
        with problems.catching(recipe.where("adapters", name)):
            _check_adapter(recipe, name, base)
    problems.raise_as(RecipeError)


def check_task_data(recipe: RunRecipe, steps: Sequence[Step], *, run_files: bool = False) -> None:
    """Load the data of lm-eval's tasks if something is trained before they are evaluated.

    `run_files`: of task files too, which runs their code.

    Raises:
        RecipeError: it cannot be loaded.
    """
    asked = any(isinstance(step.job, Evaluate) and step.job.metric == HARNESS for step in steps)
    if recipe.evaluate is None or not asked or not any(isinstance(step.job, Train) for step in steps):
        return
    from paft_merge.evaluating.harness import check_data

    problems = Problems()
    with problems.catching(recipe.where("evaluate")):
        check_data(recipe.evaluate, recipe.folder, run_files=run_files)
    problems.raise_as(RecipeError)


def _check_adapter(recipe: RunRecipe, name: str, base: bool) -> None:
    from paft_merge.training.base_model import load_tokenizer
    from paft_merge.training.prepared_rows import prepare
    from paft_merge.training.train_options import TrainOptions

    spec, problems = recipe.adapters[name], Problems()
    if base:
        with problems.catching():
            _check_targets(recipe, name)
    tokenizer, source = None, recipe.base if base else None
    if source and spec.base.trust_remote_code:
        try:
            tokenizer = load_tokenizer(source, spec, recipe.folder, trust_code=False)
        except TrainError:
            source = None  # training checks rows with the tokenizer of the base's code
    with problems.catching():
        options = TrainOptions(name=name, folder=recipe.folder, tokenizer=tokenizer)
        prepare(source, spec, Path("checkpoints"), options)
    problems.raise_as(RunError)


_MODULES = 100_000
"""A base is built for its names of modules only up to this many."""


def _check_targets(recipe: RunRecipe, name: str) -> None:
    """Check that the base has the modules that an adapter names, on a model without memory for its weights."""
    spec = recipe.adapters[name]
    if isinstance(spec.lora.target_modules, str) or not Path(recipe.base).is_dir():
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from paft_merge.training.arguments import check_targets

    try:
        with torch.device("meta"), bounded_modules(_MODULES):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(recipe.base, trust_remote_code=False), trust_remote_code=False
            )
    except Exception as error:  # transformers raises anything on unknown files
        if spec.base.trust_remote_code:
            return  # training checks the modules of the base's code
        what = f"cannot be read: {first_line(error)}"
        raise RunError.of("BASE", recipe.base, what, "name a causal language model") from error
    check_targets(spec, model)
