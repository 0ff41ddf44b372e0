"""Merge LoRA adapters and checkpoints by streaming tensors; train the sparse adapters to merge.

merge(recipe, out)     a recipe in mergekit's language to a model folder
open_plan(recipe)      what that would do, from headers alone
train(recipe, out)     the sparse adapters of a recipe
audit(source, ...)     how sparse deltas are, and how they will merge
evaluate(model, spec)  what a model, or an adapter on its base, can do
run(recipe, folder)    one recipe from data to a merged model, each step done once
tune(recipe, folder)   the search for a merge's parameters
methods                the methods as functions on plain tensors
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paft_merge import methods as methods
    from paft_merge.auditing import audit as audit
    from paft_merge.engine.api import merge as merge
    from paft_merge.engine.api import open_plan as open_plan
    from paft_merge.errors import PaftMergeError as PaftMergeError
    from paft_merge.evaluating import evaluate as evaluate
    from paft_merge.pipeline import run as run
    from paft_merge.pipeline.tuning import tune as tune
    from paft_merge.recipe import load_recipe as load_recipe
    from paft_merge.training import train as train

# Found on first use, so that `import paft_merge` (and `paft --help`) does not import torch.
_HOMES = {
    "PaftMergeError": "errors",
    "audit": "auditing",
    "evaluate": "evaluating",
    "load_recipe": "recipe",
    "merge": "engine.api",
    "open_plan": "engine.api",
    "run": "pipeline",
    "train": "training",
    "tune": "pipeline.tuning",
}

__all__ = [
    "PaftMergeError",
    "audit",
    "evaluate",
    "load_recipe",
    "merge",
    "methods",
    "open_plan",
    "run",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"paft_merge.{_HOMES[name]}"), name)
    if name == "methods":
        return import_module("paft_merge.methods")
    raise AttributeError(f"module 'paft_merge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
