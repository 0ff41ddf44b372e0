"""Numbers of rules that are measured over all tensors of a model before any is merged."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.blocks import Ops
from paft_merge.methods.rules.measured_weights import MeasuredWeights, SourcedTensor, weigh_over_model
from paft_merge.methods.rules.rule import Rule, WholeRule
from paft_merge.methods.rules.thresholds import AddUp, count_all


def measure_over_model(
    rules: Sequence[Rule | WholeRule | None],
    tensors: Sequence[SourcedTensor],
    pool: Executor | None,
    ops: Ops,
    add_up: AddUp = count_all,
) -> dict[int, Rule]:
    """Find the weights (`weight: equal_norm`) and the thresholds (`trim_scope: global`) that depend on the whole model.

    Args:
        rules: one a tensor. All that rank globally have the same `global_trims`.
        tensors: all tensors of the model.
        pool: for the walks over them; None: the calling thread.
        ops: operations on their blocks.
        add_up: adds up what several processes measure.

    Returns:
        By position in `rules`, those that need the model, with what they need.
    """
    streamed = {i: r for i, r in enumerate(rules) if r is not None and r.wants != "whole" and r.needs_model}
    weighed = {i: r for i, r in streamed.items() if isinstance(r, MeasuredWeights) and r.weighs_model}
    if weighed:
        streamed |= weigh_over_model(weighed, tensors, pool, ops, add_up)
    ranked = {i: rule for i, rule in streamed.items() if rule.global_trims is not None}
    if ranked:
        walk = BlockWalk([tensors[i] for i in ranked], pool, all_sources=True)
        thresholds = next(iter(ranked.values())).global_thresholds(walk, ops, add_up)
        streamed |= {i: rule.with_thresholds(thresholds) for i, rule in ranked.items()}
    return streamed
