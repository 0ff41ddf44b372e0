"""The plan of a merge, from the recipe and headers: every output tensor, its inputs, its rule and its place in a file.

| module | contents |
|---|---|
| planned | `MergePlan` and its tensors |
| output_tensors | where every output tensor comes from |
| tensor_planner | the inputs and the rule of an output tensor |
| layer_stacks | layers and modules by tensor name |
| layer_kinds | the kind of a layer by its number |
| compatibility | whether models can be merged with each other |
| output_config | changes to `config.json` |
| vocabulary | the output's tokenizer and chat template |
| explanation | what is done with each tensor, and why |
| formatting | short text and tables |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from paft_merge.compute.scratch import uncollected
from paft_merge.errors import CheckpointError, Problems, RecipeError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.models import Model
from paft_merge.inputs.safetensors_header import truncate
from paft_merge.output.shards import Shard, plan_shards, split
from paft_merge.plan.output_config import config_changes
from paft_merge.plan.planned import COPY, MergePlan, PlannedTensor
from paft_merge.plan.tensor_planner import Planner, resolved
from paft_merge.recipe import ModelRef, Recipe

__all__ = ["COPY", "MergePlan", "Model", "PlannedTensor", "plan_merge", "resolved"]


@uncollected()
def plan_merge(
    recipe: Recipe,
    models: Mapping[ModelRef, Model],
    *,
    out_shard_bytes: int | None = None,
    allow_crimes: bool = False,
    allow_nonfinite: bool = False,
    tensor_names: Literal["intersection", "union"] | None = None,
) -> MergePlan:
    """Plan a merge from headers.

    Args:
        recipe: what to merge.
        models: every model that the recipe refers to, opened.
        out_shard_bytes: largest size of an output file; None keeps the donor's files.
        allow_crimes: merge models whose configs differ in fields that shapes do not show (heads, rope, activation).
        allow_nonfinite: merge NaN and infinity instead of raising an error.
        tensor_names: which tensors to merge of tensor files with different tensors; None: raise an error.

    Raises:
        RecipeError, CheckpointError: all problems that the headers show.
    """
    _refuse_unplanned(recipe)
    planner = Planner(recipe, models, allow_crimes, tensor_names)
    tensors = list(planner.tensors())
    planner.check_global_trim(tensors)
    config = config_changes(recipe, planner.places, tensors, planner.problems, allow_crimes)
    if planner.vocabulary:
        config = planner.vocabulary.in_config(planner.donor.checkpoint.config, config)
    if planner.problems.found:
        raise CheckpointError(truncate(list(dict.fromkeys(planner.problems.found)), "the recipe"))
    shards = _layout(planner.donor.checkpoint, tensors, out_shard_bytes, as_donor=planner.places.whole)
    order = {slot.name: i for i, slot in enumerate(slot for shard in shards for slot in shard.slots)}
    tensors.sort(key=lambda t: order[t.name])
    return MergePlan(
        recipe, tuple(models.values()), planner.donor, tuple(tensors), shards, config,
        (*recipe.warnings, *planner.warnings), allow_nonfinite, planner.vocabulary,
    )  # fmt: skip


def _refuse_unplanned(recipe: Recipe) -> None:
    """Raise `RecipeError` for combinations that cannot be planned."""
    problems = Problems()
    if recipe.arithmetic == "mergekit" and recipe.rounding == "stochastic":
        where, fix = recipe.located.spot(("rounding",)), "remove one of the two"
        problems.add("RECIPE", where, "mergekit rounds to nearest, so its arithmetic has no stochastic rounding", fix)
    problems.raise_as(RecipeError)


_SHARD_BYTES = 5_000_000_000


def _layout(
    donor: Checkpoint, tensors: Sequence[PlannedTensor], out_shard_bytes: int | None, *, as_donor: bool
) -> tuple[Shard, ...]:
    """Return the output's files: those of the donor, unless a size is given, layers are new, or the donor has pickles."""
    rows = [(t.name, t.dtype, t.shape) for t in tensors]
    if out_shard_bytes is not None or not as_donor or not all(f.name.endswith(".safetensors") for f in donor.files):
        return plan_shards(split(rows, out_shard_bytes or _SHARD_BYTES))
    last = donor.files[-1].name
    files: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {f.name: [] for f in donor.files}
    for row in rows:
        info = donor.tensors.get(row[0])
        files[info.file if info else last].append(row)
    held = {file: rows for file, rows in files.items() if rows}
    return plan_shards(held, {f.name: f.metadata for f in donor.files if f.metadata and f.name in held})
