"""The sizes of deltas before a merge, from records of training, and warnings where they differ much between sources."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paft_merge.errors import DOCS, Problem
from paft_merge.inputs.source_labels import labels_of
from paft_merge.methods.rules.measured_weights import MeasuredWeights, weights_for

if TYPE_CHECKING:
    from paft_merge.plan import MergePlan, PlannedTensor

FOLD = 5.0
"""Smallest ratio of sizes that gives a warning. (SFT and DPO adapters at their usual learning rates: about 15.)"""


def weight_of(tensor: PlannedTensor, source: int) -> float:
    """Return the weight of one source of a tensor: 1 for a method without weights, NaN for one that is not measured yet."""
    parameters = tensor.parameters.get("sources", ())
    given = parameters[source].get("weight") if source < len(parameters) else None
    return 1.0 if given is None else math.nan if isinstance(given, str) else float(given)


def recorded(plan: MergePlan) -> list[Problem]:
    """Return a warning if the records that `paft train` wrote beside the adapters show very different sizes.

    A plan is enough for this. Adapters of other trainers have no record; `measured` covers them after the merge.
    """
    sizes: dict[str, float] = {}
    for model in plan.models:
        rms = _recorded_rms(model.adapter.record) if model.adapter else 0.0
        squares = [
            weight_of(tensor, i) ** 2
            for tensor in plan.tensors
            for i, read in enumerate(tensor.inputs.sources)
            if read.source == model.ref and read.delta
        ]
        if rms and squares and not any(map(math.isnan, squares)):
            sizes[model.ref] = rms * math.sqrt(math.fsum(squares) / len(squares))
    return _apart(sizes, plan)


def measured(totals: Iterable[Mapping[str, Any]], plan: MergePlan) -> list[Problem]:
    """Return the same warning from the totals of a finished merge."""
    rows = [row for row in totals if row.get("weighted_l2") and row["entries"]]
    return _apart({row["source"]: row["weighted_l2"] / math.sqrt(row["entries"]) for row in rows}, plan)


def expected_weights(plan: MergePlan) -> dict[str, float]:
    """Return the weight of each source if it follows from norms over the model (`weight: equal_norm`), by the records of training.

    Empty without such weights, without a record of some source, and where the tensors have different sources or weights.
    """
    rules = [(tensor.source_names, tensor.rule) for tensor in plan.tensors if isinstance(tensor.rule, MeasuredWeights)]
    asked = {(*names, *rule.given) for names, rule in rules if rule.scope == "global"}
    records = {model.ref: model.adapter.record.get("delta", {}) for model in plan.models if model.adapter}
    names = rules[0][0] if len(asked) == 1 else []
    if not names or not all(records.get(name) for name in names):
        return {}
    norms = [float(records[name]["norm"]) for name in names]
    return dict(zip(names, weights_for(rules[0][1].given, norms), strict=True))


def _recorded_rms(record: Mapping[str, Any]) -> float:
    """Return the root mean square of the entries of the recorded delta; 0 without a record."""
    matrices: Sequence[Mapping[str, Any]] = record.get("delta", {}).get("matrices", ())
    entries = sum(int(m["entries"]) for m in matrices)
    return float(record["delta"]["norm"]) / math.sqrt(entries) if entries else 0.0


def _apart(sizes: Mapping[str, float], plan: MergePlan) -> list[Problem]:
    if len(sizes) < 2 or max(sizes.values()) <= FOLD * min(sizes.values()):
        return []
    short = zip(labels_of(list(sizes)), sizes.values(), strict=True)
    ordered = sorted(short, key=lambda item: -item[1])
    (large, most), (small, least) = ordered[0], ordered[-1]
    each = ", ".join(f"{source} {size:.2g}" for source, size in ordered)
    ratio = most / least
    fold = f"{ratio:.0f}" if ratio < 1e6 else f"{ratio:.0e}"
    what = (
        f"weight * delta differs {fold}-fold between the sources (root mean square of the changed entries: {each}): "
        f"{large} decides elections nearly alone"
    )
    weight = plan.recipe.method.parameter("weight")
    words = " or weight: equal_norm," if weight and weight.words else ""
    fix = f"a sum (task_arithmetic) keeps both as they were trained; for an election give {small} more weight,{words} up to {fold} times ({DOCS}/audit.md#scale)"
    return [Problem("SCALE", "", what, fix)]
