"""Merge LoRA adapters and checkpoints by streaming tensors; train the sparse adapters to merge.

merge(recipe, out)          merge the models of a recipe into a model folder
merge_state_dicts(...)      merge dicts of tensors in memory
open_plan(recipe)           plan a merge from file headers; explain(plan) describes each tensor
reproduce(folder)           repeat a merge from its manifest and compare the bytes
train(recipe, out)          train the sparse adapters of a recipe
extract(finetune, ...)      write the difference of a fine-tune from its base as a LoRA
resize(adapter, out, ...)   write a LoRA with another rank, from its factors alone
diff(a, b)                  compare two models or adapters tensor by tensor
audit(source, ...)          measure how sparse deltas are and how they will merge
evaluate(model, spec)       evaluate a model, or an adapter on its base
run(recipe, folder)         run one recipe from data to a merged model, resuming finished steps
tune(recipe, folder)        search the parameters of a merge
pull(reference), push(...)  download from and upload to the Hub
methods                     the merge methods as functions on tensors

docs/api.md has an example of each.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paft_merge import hub as hub
    from paft_merge import methods as methods
    from paft_merge.auditing import audit as audit
    from paft_merge.differences import diff as diff
    from paft_merge.engine.api import merge as merge
    from paft_merge.engine.api import open_plan as open_plan
    from paft_merge.engine.extraction import extract as extract
    from paft_merge.engine.merge_result import MergeResult as MergeResult
    from paft_merge.engine.options import MergeOptions as MergeOptions
    from paft_merge.engine.reproduction import reproduce as reproduce
    from paft_merge.engine.resizing import resize as resize
    from paft_merge.engine.state_dicts import merge_state_dicts as merge_state_dicts
    from paft_merge.engine.streaming import Progress as Progress
    from paft_merge.errors import PaftMergeError as PaftMergeError
    from paft_merge.errors import Problem as Problem
    from paft_merge.evaluating import evaluate as evaluate
    from paft_merge.hub import pull as pull
    from paft_merge.hub import push as push
    from paft_merge.pipeline import run as run
    from paft_merge.pipeline.tuning import tune as tune
    from paft_merge.plan import MergePlan as MergePlan
    from paft_merge.plan.explanation import explain as explain
    from paft_merge.recipe import Recipe as Recipe
    from paft_merge.recipe import load_recipe as load_recipe
    from paft_merge.training import train as train

    __version__: str

# Imported on first use, so that `import paft_merge` (and `paft --help`) does not import torch.
_MODULES = {
    "MergeOptions": "engine.options",
    "MergePlan": "plan",
    "MergeResult": "engine.merge_result",
    "PaftMergeError": "errors",
    "Problem": "errors",
    "Progress": "engine.streaming",
    "Recipe": "recipe",
    "audit": "auditing",
    "diff": "differences",
    "evaluate": "evaluating",
    "explain": "plan.explanation",
    "extract": "engine.extraction",
    "load_recipe": "recipe",
    "merge": "engine.api",
    "merge_state_dicts": "engine.state_dicts",
    "open_plan": "engine.api",
    "pull": "hub",
    "push": "hub",
    "reproduce": "engine.reproduction",
    "resize": "engine.resizing",
    "run": "pipeline",
    "train": "training",
    "tune": "pipeline.tuning",
}
"""Every exported object and its module."""

__all__ = [
    "MergeOptions",
    "MergePlan",
    "MergeResult",
    "PaftMergeError",
    "Problem",
    "Progress",
    "Recipe",
    "__version__",
    "audit",
    "diff",
    "evaluate",
    "explain",
    "extract",
    "hub",
    "load_recipe",
    "merge",
    "merge_state_dicts",
    "methods",
    "open_plan",
    "pull",
    "push",
    "reproduce",
    "resize",
    "run",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"paft_merge.{_MODULES[name]}"), name)
    if name in ("hub", "methods"):
        return import_module(f"paft_merge.{name}")
    if name == "__version__":
        from paft_merge.output.versions import version_of

        return version_of("paft-merge")
    raise AttributeError(f"module 'paft_merge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
