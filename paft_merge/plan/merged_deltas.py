"""The merged delta of a planned tensor: what a merge adds to the base, in float32."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.tensor_inputs import Inputs, Read
from paft_merge.methods.rules.measured_weights import MeasuredWeights
from paft_merge.methods.rules.rule import Rule, WeightedSum, WholeRule
from paft_merge.plan.planned import MergePlan, PlannedTensor

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class MergedDelta(NamedTuple):
    """A merged delta that may differ from zero.

    Attributes:
        tensor: has the name and the shape of the merged tensor; its rule writes the delta, in float32.
        subtracted: the base's tensor, if the rule writes merged values from which it is to be subtracted; else None.
    """

    tensor: PlannedTensor
    subtracted: Read | None


def merged_delta(plan: MergePlan, tensor: PlannedTensor) -> MergedDelta | None:
    """Return the merged delta of a tensor of a merged checkpoint; None if it is zero.

    Where a method adds a delta to the base, the rule runs on blocks without the base, so that nothing is lost to rounding.

    Args:
        plan: the merged checkpoint. The base is the checkpoint of its config source.
        tensor: one of its tensors.
    """
    inputs, rule = tensor.inputs, tensor.rule
    base = plan.config_source.checkpoint
    own = Read(plan.config_source.ref, base, (inputs.base or inputs.reads[0]).name)
    made = replace(tensor, dtype="F32", rounding_key=0, is_delta=len(tensor.shape) > 1)
    if own.name not in base.tensors:
        return None
    if not inputs.sources:  # one tensor, unchanged
        only = inputs.reads[0]
        return None if only.same_weight(own) and only.plain else _difference(plan, made, only)
    adds = rule.wants != "whole" and inputs.deltas and not scales_base(rule)
    if not adds or inputs.base is None or not inputs.base.plain or not inputs.base.same_weight(own):
        return MergedDelta(made, own)
    if all(_is_untied(inputs.sources[i]) for i in inputs.active) or summands(inputs, rule) == []:
        return None
    deltas = replace(inputs, form="deltas", subtract=False, without_base=True)
    return MergedDelta(replace(made, inputs=deltas), None)


def zero_delta(plan: MergePlan, tensor: PlannedTensor) -> MergedDelta:
    """The merged delta of a tensor that no source changes, for a place that needs one."""
    own = Read(plan.config_source.ref, plan.config_source.checkpoint, tensor.name)
    return _difference(plan, replace(tensor, dtype="F32", rounding_key=0, is_delta=True), own)


def _difference(plan: MergePlan, made: PlannedTensor, only: Read) -> MergedDelta:
    """One tensor minus the base's."""
    own = Read(plan.config_source.ref, plan.config_source.checkpoint, only.name)
    inputs = Inputs(own, (only,), "deltas", subtract=False, without_base=True)
    rule, parameters = WeightedSum((1.0,), "deltas"), {"sources": [{"weight": 1.0}]}
    method = plan.recipe.merge_method
    return MergedDelta(replace(made, inputs=inputs, rule=rule, method=method, parameters=parameters), None)


def is_zero(delta: MergedDelta, base: Checkpoint) -> bool:
    """Whether no source differs from the base, by the bytes of its tensor: headers do not show that."""
    inputs = delta.tensor.inputs
    name = (delta.subtracted or inputs.base or inputs.reads[0]).name
    return all(read.plain and read.checkpoint.same_bytes(read.name, base, name) for read in inputs.reads)


def summands(inputs: Inputs, rule: Rule | WholeRule) -> list[tuple[int, float]] | None:
    """Return each source that a weighted sum adds to the base, with its weight; None if the rule is not such a sum.

    Weights that are not measured yet are 1.
    """
    if isinstance(rule, MeasuredWeights):
        rule = rule.resolved if rule.known is not None else rule.unit
    if not isinstance(rule, WeightedSum):
        return None
    return [(i, rule.weights[i]) for i in inputs.active if rule.weights[i] and not _is_untied(inputs.sources[i])]


def rank_of(read: Read, base: Read | None) -> int | None:
    """Return the rank of a source's difference from the base by its header; None if it is not one low-rank product."""
    if base is None or not read.same_weight(base) or (read.delta and read.delta.needs_weight):
        return None
    return (read.delta.rank or (0 if _is_untied(read) else None)) if read.delta else 0


def is_sum_of_products(delta: PlannedTensor) -> bool:
    """Whether the method adds up low-rank products, whose sum is one, by the headers of its sources."""
    inputs = delta.inputs
    added = summands(inputs, delta.rule) if inputs.without_base else None
    return added is not None and all(rank_of(inputs.sources[i], inputs.base) for i, _ in added)


def scales_base(rule: Rule | WholeRule) -> TypeIs[WeightedSum]:
    """Whether a rule is a sum of values whose weights do not add up to 1, which multiplies the base."""
    return isinstance(rule, WeightedSum) and rule.of == "values" and abs(math.fsum(rule.weights) - 1) > 1e-6


def _is_untied(read: Read) -> bool:
    """Whether a source has the base's value, and only its tie to another tensor is cut."""
    return read.delta is not None and read.delta.kind == "untied"
