"""The plan of a merge, from the recipe and file headers alone: every output tensor, its inputs, its rule and its file.

| module | contents |
|---|---|
| layer_stacks | layers and modules by tensor names |
| output_tensors | the output's tensors and their sources |
| tensor_planner | the tensors to read and the rule that merges them |
| compatibility | checks that models can be merged |
| layer_kinds | the kind of each layer by its number |
| routers | the routers of mixture-of-experts layers |
| output_config | changes of `config.json` |
| side_files | files beside the weights |
| vocabulary | tokenizer, embeddings and chat template of the output |
| planned | the plan |
| kept_quantization | the plan of a merge that writes codes and scales |
| merged_deltas | the delta that a merge adds to a base's tensor |
| adapter_output | the plan of an adapter |
| sparse_output | the plan of a sparse delta |
| explanation | the plan of single tensors, for readers |
| formatting | short text and tables |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from paft_merge.compute.scratch import uncollected
from paft_merge.errors import CheckpointError, RecipeError
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.models import Model
from paft_merge.inputs.safetensors_header import truncate
from paft_merge.output.shards import Shard, plan_shards, split
from paft_merge.plan import kept_quantization
from paft_merge.plan.adapter_output import adapter_of
from paft_merge.plan.output_config import config_changes
from paft_merge.plan.planned import COPY, MergePlan, PlannedTensor
from paft_merge.plan.sparse_output import delta_of
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
    truncate_embeddings: bool = False,
) -> MergePlan:
    """Plan a merge from file headers.

    Args:
        recipe: the recipe.
        models: every model that the recipe refers to, opened.
        out_shard_bytes: largest size of an output file; None keeps the files of the config source.
        allow_crimes: merge models whose configs differ in fields that tensors do not show (heads, rope, activation).
        allow_nonfinite: merge NaN and infinity instead of rejecting them.
        tensor_names: `intersection` or `union`, for files that hold different tensors; None: that is an error.
        truncate_embeddings: cut embeddings to the smallest vocabulary, by position.

    Raises:
        RecipeError, CheckpointError: all errors that are visible in the recipe and in file headers, reported together.
    """
    if recipe.arithmetic == "mergekit" and recipe.rounding == "stochastic":
        what = "mergekit's arithmetic has no stochastic rounding"
        raise RecipeError.of("RECIPE", recipe.located.spot(("rounding",)), what, "remove one of the two")
    if recipe.quantization and allow_nonfinite:
        what = "codes with scales cannot hold NaN and infinity"
        raise RecipeError.of("RECIPE", recipe.located.spot(("quantization",)), what, "merge without allow_nonfinite")
    planner = Planner(recipe, models, allow_crimes, tensor_names, truncate_embeddings=truncate_embeddings)
    tensors = list(planner.tensors())
    planner.check_global_trim(tensors)
    config = config_changes(recipe, planner.outputs, tensors, planner.problems, allow_crimes, planner.truncated)
    if planner.vocabulary:
        config = planner.vocabulary.in_config(planner.config_source.checkpoint.config, config)
    stored = planner.config_source.checkpoint
    if recipe.quantization == "keep" and not planner.problems.found:
        tensors = kept_quantization.kept(recipe, planner.config_source, tensors, planner.problems)
        stored = kept_quantization.as_stored(stored)
        config = kept_quantization.kept_config(stored.config, planner.config_source.checkpoint.config, config)
        planner.warnings += kept_quantization.notice(planner.config_source, tensors)
    if planner.problems.found:
        raise CheckpointError(truncate(list(dict.fromkeys(planner.problems.found)), "the recipe"))
    if not tensors:
        what = "the output has no tensors, because its sources have none in common"
        raise RecipeError.of("KEYS_MISSING", recipe.located.spot(()), what, "merge models of one architecture")
    shards = _layout(stored, tensors, out_shard_bytes, keep_files=planner.outputs.whole)
    order = {slot.name: i for i, slot in enumerate(slot for shard in shards for slot in shard.slots)}
    tensors.sort(key=lambda t: order[t.name])
    plan = MergePlan(
        recipe, tuple(models.values()), planner.config_source, tuple(tensors), shards, config,
        (*recipe.warnings, *planner.warnings), allow_nonfinite, planner.vocabulary, planner.side_files,
    )  # fmt: skip
    if recipe.output.kind == "checkpoint":
        return plan
    return adapter_of(plan) if recipe.output.kind == "adapter" else delta_of(plan)


_SHARD_BYTES = 5_000_000_000


def _layout(
    source: Checkpoint, tensors: Sequence[PlannedTensor], out_shard_bytes: int | None, *, keep_files: bool
) -> tuple[Shard, ...]:
    """The output's files: those of `source` if `keep_files` and they are safetensors, unless a size is given."""
    rows = [(t.name, t.dtype, t.shape) for t in tensors]
    held = {row[0]: info.file for row in rows if (info := source.tensors.get(row[0])) and "/" in info.file}
    modules: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
    for row in rows:
        if row[0] in held:
            file = held[row[0]]
            name = file if file.endswith(".safetensors") else f"{file.rpartition('/')[0]}/model.safetensors"
            modules.setdefault(name, []).append(row)
    rows = [row for row in rows if row[0] not in held]
    own = [f for f in source.files if "/" not in f.name]
    if out_shard_bytes is not None or not keep_files or not all(f.name.endswith(".safetensors") for f in own):
        return plan_shards({**split(rows, out_shard_bytes or _SHARD_BYTES), **modules})
    last = own[-1].name
    files: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {f.name: [] for f in own}
    for row in rows:
        info = source.tensors.get(row[0])
        files[info.file if info else last].append(row)
    files = {file: rows for file, rows in files.items() if rows} | modules
    return plan_shards(files, {f.name: f.metadata for f in source.files if f.metadata and f.name in files})
