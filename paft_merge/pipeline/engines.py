"""Which steps generate text with vLLM, and whether it can load their models, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paft_merge.errors import PaftMergeError, Problems, RecipeError
from paft_merge.pipeline.schema import RunRecipe
from paft_merge.pipeline.steps import Answer, Evaluate, Step, Train
from paft_merge.training.engine_schema import Engine
from paft_merge.training.schema import read_adapter


def engine_of(recipe: RunRecipe, step: Step) -> Engine:
    """What generates text in a step; `transformers` where nothing does."""
    if isinstance(step.job, Evaluate | Answer):
        return recipe.evaluate.engine_of(step.job.metric) if recipe.evaluate else "transformers"
    if isinstance(step.job, Train):
        from paft_merge.training.vllm_engine import samples_by_vllm

        specs = [recipe.adapters[name] for name in step.job.named if name in recipe.adapters]
        return "vllm" if any(map(samples_by_vllm, specs)) else "transformers"
    return "transformers"


def check_engine(recipe: RunRecipe, steps: Sequence[Step], todo: Sequence[Step]) -> None:
    """Check that vLLM can generate the answers of the models whose evaluations are to do.

    Args:
        recipe: the recipe.
        steps: all steps.
        todo: the steps that will be done.

    Raises:
        RecipeError: ENGINE, every model that vLLM cannot load as it is evaluated.
    """
    mine = [step.job for step in todo if isinstance(step.job, Evaluate | Answer) and engine_of(recipe, step) == "vllm"]
    if not mine:
        return
    from paft_merge.training.vllm_engine import generation_of, unlike

    trained = {str(step.out): step.job.section for step in steps if isinstance(step.job, Train)}
    problems, where = Problems(), recipe.where("evaluate", "engine")
    problems.found += unlike(generation_of(recipe.base), recipe.base)
    for parts in dict.fromkeys(job.arm.parts for job in mine):
        _, *adapters = parts
        if len(adapters) > 1:
            what = f"vLLM applies one adapter at a time, and {'+'.join(parts)} has {len(adapters)}"
            problems.add("ENGINE", where, what, "merge them, or use engine: transformers")
        elif adapters and (reason := _unserved(adapters[0], trained.get(adapters[0]))):
            problems.add("ENGINE", where, f"{adapters[0]}: {reason}", "use engine: transformers")
    problems.raise_as(RecipeError)


def _unserved(adapter: str, section: object) -> str:
    """Why vLLM cannot apply an adapter, by its section if it is trained here; empty if it can, or if that is not known yet."""
    from paft_merge.evaluating.vllm_loading import unserved_files
    from paft_merge.training.vllm_engine import unserved

    if section is not None:
        return unserved(read_adapter(section))
    try:
        return unserved_files(Path(adapter)) if any(Path(adapter).glob("*.safetensors")) else ""
    except PaftMergeError as error:
        return str(error)
