"""The plan of a sparse delta (`output: {kind: delta}`): the entries of every merged delta that are not zero.

Their number is not known from headers. `delta_of` plans all entries, which is the most that can be written. `with_counts` plans
what is stored once a pass over the inputs has counted the entries: the smaller of two forms (see
`inputs.adapters.sparse_delta`), or SHiRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from paft_merge.errors import Problems, RecipeError
from paft_merge.inputs.adapters.deltas import Lazy
from paft_merge.inputs.adapters.sparse_delta import FORMAT, NAME, layout_of, mask_shape
from paft_merge.inputs.architecture import Architecture
from paft_merge.inputs.checkpoint import DTYPES
from paft_merge.inputs.safetensors_header import join_first, quote, truncate
from paft_merge.inputs.tensor_inputs import Inputs, Read
from paft_merge.methods.rules.rule import WeightedSum
from paft_merge.methods.rules.thresholds import stream_key
from paft_merge.output.shards import plan_shards
from paft_merge.plan.adapter_output import FILE, base_of, check_recipe, module_of, targets_of, task_type_of
from paft_merge.plan.merged_deltas import MergedDelta, is_zero, merged_delta
from paft_merge.plan.planned import MergePlan, PlannedTensor, SparsePart, StoredBlock
from paft_merge.plan.side_files import SideFiles

_VALUES = ("float32", "bfloat16", "float16")
"""Types of the stored values."""

_DENSE = "write kind: delta without format: shira"


def delta_of(plan: MergePlan) -> MergePlan:
    """Turn the plan of a merged checkpoint into that of its deltas, each with all entries.

    Args:
        plan: the merged checkpoint.

    Raises:
        RecipeError: ADAPTER_OUTPUT, what cannot be stored as a delta of one base, all of it together.
    """
    problems, spot = Problems(), plan.recipe.located.spot(("output",))
    check_recipe(plan, problems)
    if plan.allow_nonfinite:
        what = "NaN and infinity have no place in a delta: nothing can be added to them"
        problems.add("ADAPTER_OUTPUT", spot, what, "repair the sources, and merge without allow_nonfinite")
    if _dtype(plan) not in _VALUES:
        what = f"the values of a delta cannot be {_dtype(plan)}"
        problems.add("ADAPTER_OUTPUT", spot, what, f"write out_dtype: {', '.join(_VALUES[:-1])} or {_VALUES[-1]}")
    base, deltas, absent = plan.config_source.checkpoint, list[MergedDelta](), list[str]()
    for tensor in plan.tensors:
        own = (tensor.inputs.base or tensor.inputs.reads[0]).name
        if own not in base.tensors or base.tensors[own].shape != tensor.shape:
            absent.append(quote(tensor.name))
        elif found := merged_delta(plan, tensor):
            deltas.append(found)
        elif tensor.name not in base.tensors:
            deltas.append(_untied(plan, tensor, own))
    if absent:
        what = f"the base does not have {join_first(absent)} in the merged shape"
        problems.add("ADAPTER_OUTPUT", spot, what, "write kind: checkpoint, or leave these tensors out of the sources")
    modules = _linear_modules(plan, deltas, problems) if _is_shira(plan) else {}
    if problems.found:
        raise RecipeError(truncate(problems.found, "the recipe"))
    if _is_shira(plan):
        kept = [(delta, modules[delta.tensor.name]) for delta in deltas if delta.tensor.name in modules]
        return _planned(plan, [part for one in kept for part in _shira_parts(plan, *one, one[0].tensor.numel, {})], {})
    return _planned(plan, [_part(plan, delta, "delta", delta.tensor.shape) for delta in deltas], {})


def with_counts(plan: MergePlan, counts: Mapping[str, Sequence[int]]) -> MergePlan:
    """Return the plan of what is stored; deltas that are zero are left out.

    Args:
        plan: from `delta_of`.
        counts: by the name of a delta the number of its stored entries that are not zero, one a block.

    Raises:
        RecipeError: ADAPTER_OUTPUT, every delta is zero, or the deltas do not fit SHiRA.
    """
    held, spot = plan.config_source.checkpoint.tensors, plan.recipe.located.spot(("output",))
    whole = [one for one in plan.tensors if one.sparse and one.sparse.part in ("delta", "values")]
    whole = [one for one in whole if sum(counts[one.merged.name]) or one.merged.name not in held]
    kept = sum(sum(counts[one.merged.name]) for one in whole)
    if not kept:
        what = "the merged delta is zero, so there is nothing to write"
        raise RecipeError.of("ADAPTER_OUTPUT", spot, what, "check weights and sources")
    if _is_shira(plan):
        rank = _shira_rank(plan, whole, counts)
        tensors = list[PlannedTensor]()
        for one in whole:
            assert one.sparse is not None
            delta, found, stored = _delta(one), counts[one.merged.name], rank * sum(one.merged.shape)
            blocks = _blocks(delta, found, stored - sum(found))
            tensors += _shira_parts(plan, delta, one.sparse.module, stored, blocks)
        return _planned(plan, tensors, {"r": rank})
    tensors = [part for one in whole for part in _parts(plan, one, counts[one.merged.name])]
    tensors.sort(key=lambda tensor: tensor.dtype == "U8")  # values first, each at a multiple of its width
    return _planned(plan, tensors, {"kept": kept})


def deltas_of(plan: MergePlan) -> MergePlan:
    """Return the plan of the merged deltas themselves, as float32 tensors with the base's names."""
    return replace(plan, tensors=tuple({tensor.merged.name: tensor.merged for tensor in plan.tensors}.values()))


def _is_shira(plan: MergePlan) -> bool:
    return plan.recipe.output.format == "shira"


def _dtype(plan: MergePlan) -> str:
    """torch's name of the type of the stored values."""
    return plan.recipe.out_dtype or plan.recipe.dtype or "float32"


def _untied(plan: MergePlan, tensor: PlannedTensor, own: str) -> MergedDelta:
    """The zero delta of a tensor that the merge cuts from the one it is tied to, and does not change."""
    base = Read(plan.config_source.ref, plan.config_source.checkpoint, own)
    nothing = Inputs(base, (), "deltas", subtract=False, without_base=True)
    rule = WeightedSum((), "deltas")
    return MergedDelta(replace(tensor, dtype="F32", rounding_key=0, inputs=nothing, rule=rule), None)


def _parts(plan: MergePlan, whole: PlannedTensor, counts: Sequence[int]) -> Iterator[PlannedTensor]:
    """The tensors of the smaller form of a delta."""
    delta, mask = _delta(whole), mask_shape(whole.shape)
    if math.prod(mask) + sum(counts) * whole.width >= whole.nbytes:
        yield whole
        return
    yield _part(plan, delta, "values", (sum(counts),), _blocks(delta, counts))
    yield replace(_part(plan, delta, "mask", mask), dtype="U8")


def _delta(part: PlannedTensor) -> MergedDelta:
    assert part.sparse is not None
    return MergedDelta(part.sparse.delta, part.sparse.subtracted)


def _blocks(delta: MergedDelta, counts: Sequence[int], zeros: int = 0) -> dict[int, StoredBlock]:
    """The stored entries of every block, with `zeros` more, each in the first block that has one."""
    blocks, place = dict[int, StoredBlock](), 0
    for (start, stop), count in zip(delta.tensor.bounds, counts, strict=True):
        blocks[start] = StoredBlock(place, count, min(zeros, stop - start - count))
        zeros -= blocks[start].zeros
        place += count + blocks[start].zeros
    return blocks


def _part(
    plan: MergePlan,
    delta: MergedDelta,
    part: Literal["mask", "values", "delta", "indices"],
    shape: tuple[int, ...],
    blocks: Mapping[int, StoredBlock] | None = None,
    module: str = "",
) -> PlannedTensor:
    recipe, merged = plan.recipe, delta.tensor
    dtype = next(one for one in DTYPES.values() if one.torch == _dtype(plan))
    rounds = recipe.rounding == "stochastic" and dtype.bits < 32
    key = stream_key(recipe.seed, "", merged.name, "round") if rounds else 0
    made = SparsePart(part, merged, delta.subtracted, blocks or {}, module)
    return replace(merged, name=f"{merged.name}.{part}", shape=shape, dtype=dtype.name, rounding_key=key, sparse=made)


def _planned(plan: MergePlan, tensors: Sequence[PlannedTensor], counted: Mapping[str, int]) -> MergePlan:
    shards = plan_shards({FILE: [(t.name, t.dtype, t.shape) for t in tensors]})
    base, held = base_of(plan.recipe), plan.config_source.checkpoint
    config: dict[str, Any] = {"base_model_name_or_path": base.path, "revision": base.revision}
    if _is_shira(plan):
        modules = sorted({tensor.sparse.module for tensor in tensors if tensor.sparse})
        config |= {
            "fan_in_fan_out": False, "inference_mode": True, "init_weights": True, "mask_type": "random",
            "modules_to_save": None, "peft_type": "SHIRA", "random_seed": None, "target_modules": targets_of(modules, held),
            "task_type": task_type_of(plan),
        }  # fmt: skip
    else:
        deltas = list({tensor.merged.name: tensor.merged for tensor in tensors}.values())
        config |= {
            "base_layout": layout_of(held), "delta_format": FORMAT, "dtype": _dtype(plan),
            "entries": sum(delta.numel for delta in deltas), "peft_type": NAME,
            "sources": [str(ref) for ref in plan.recipe.references if ref != base],
            "unties": {t.name: (t.inputs.base or t.inputs.reads[0]).name for t in deltas if t.name not in held.tensors},
        }  # fmt: skip
    return replace(
        plan, tensors=tuple(tensors), shards=shards, config=config | dict(counted), vocabulary=None, side_files=SideFiles()
    )  # fmt: skip


# --- SHiRA ------------------------------------------------------------------------------------------------------------


def _linear_modules(plan: MergePlan, deltas: Sequence[MergedDelta], problems: Problems) -> dict[str, str]:
    """The module of every delta, by the delta's name; notes deltas of anything but a linear layer, unless they are zero."""
    base, modules, unfit = plan.config_source.checkpoint, dict[str, str](), list[str]()
    architecture = Lazy(lambda: Architecture.of(base))
    for delta in deltas:
        module, layer = module_of(delta.tensor, architecture)
        if layer == "linear" and delta.tensor.name in base.tensors:
            modules[delta.tensor.name] = module
        elif not is_zero(delta, base):
            unfit.append(quote(delta.tensor.name))
    if unfit:
        what = f"SHiRA changes the weights of linear layers alone, and the merge changes {join_first(unfit)}"
        problems.add("ADAPTER_OUTPUT", plan.recipe.located.spot(("output",)), what, _DENSE)
    return modules


def _shira_rank(plan: MergePlan, whole: Sequence[PlannedTensor], counts: Mapping[str, Sequence[int]]) -> int:
    """The least r with which every weight `[O, I]` has room for its entries: PEFT stores r (O + I) of each.

    Raises:
        RecipeError: ADAPTER_OUTPUT, a weight has fewer entries than that.
    """
    needed = {one.merged.name: math.ceil(sum(counts[one.merged.name]) / sum(one.merged.shape)) for one in whole}
    densest = max(needed, key=lambda name: needed[name])
    rank = max(needed[densest], 1)
    small = [quote(t.merged.name) for t in whole if rank * sum(t.merged.shape) > t.merged.numel]
    if small:
        what = f"SHiRA stores r (rows + columns) entries of every weight: {quote(densest)} needs r = {rank}, for which {join_first(small)} are too small"
        fix = f"lower the density, or {_DENSE}"
        raise RecipeError.of("ADAPTER_OUTPUT", plan.recipe.located.spot(("output",)), what, fix)
    return rank


def _shira_parts(
    plan: MergePlan, delta: MergedDelta, module: str, stored: int, blocks: Mapping[int, StoredBlock]
) -> Iterator[PlannedTensor]:
    """The tensors that PEFT has for a weight of which it stores `stored` entries."""
    name = f"base_model.model.{module}.shira_"
    yield replace(_part(plan, delta, "values", (stored,), blocks, module), name=f"{name}weight")
    yield replace(_part(plan, delta, "indices", (2, stored), module=module), name=f"{name}indices", dtype="I32")
