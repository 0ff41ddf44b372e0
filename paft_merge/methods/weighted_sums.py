"""Weighted sums: linear, task arithmetic, and one model as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from paft_merge.methods.in_memory import run
from paft_merge.methods.parameters import (
    INT8_MASK,
    LAMBDA,
    WEIGHT_SCOPE,
    Method,
    Parameter,
    Shared,
    Sources,
    Weights,
    by_all_weights,
    delta_weight,
    density,
    weight,
    weights,
)

if TYPE_CHECKING:
    import torch

    from paft_merge.methods.rules.rule import Rule


def _linear_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.rule import WeightedSum

    return WeightedSum(weights(sources, shared["normalize"]), "values")


def _passthrough_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.rule import WeightedSum

    return WeightedSum(tuple(1.0 if s["scale"] is None else s["scale"] for s in sources), "values")


def _task_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.rule import WeightedSum

    shares = weights(sources, shared["normalize"], zero=1.0)
    return WeightedSum(tuple(w * shared["lambda"] for w in shares), "deltas")


LINEAR = Method(
    "linear", "Linear (model soups)", "arXiv:2203.05482", (weight(), by_all_weights(True)), "ignored", _linear_rule
)
PASSTHROUGH = Method(
    "passthrough", "Passthrough", "none",
    (Parameter("scale", float, "source", None, "Multiplies the tensor; without a scale it is unchanged."),),
    "ignored", _passthrough_rule, max_sources=1,
)  # fmt: skip
TASK_ARITHMETIC = Method(
    "task_arithmetic", "Task arithmetic", "arXiv:2212.04089",
    (
        delta_weight(),
        density("Accepted for mergekit's recipes, without effect, as in mergekit."),
        by_all_weights(False),
        LAMBDA,
        Parameter("rescale", bool, "shared", False, "Accepted for mergekit's recipes, without effect, as in mergekit."),
        WEIGHT_SCOPE,
        INT8_MASK,
    ),
    "required", _task_rule,
)  # fmt: skip
TABLE: Final = (LINEAR, PASSTHROUGH, TASK_ARITHMETIC)


def linear(tensors: Sequence[torch.Tensor], weight: float | Sequence[float], *, normalize: bool = True) -> torch.Tensor:
    """Weighted mean of tensors (model soups, arXiv:2203.05482), or their weighted sum.

    Args:
        tensors: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a tensor.
        normalize: divide by the sum of the weights.

    Returns:
        `[*shape]` float32.

    Raises:
        ValueError: the weights add up to zero and `normalize` is set.
    """
    return run(LINEAR, tensors, weight=weight, normalize=normalize)


def passthrough(tensor: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """One tensor, unchanged or multiplied by `scale`.

    Args:
        tensor: `[*shape]`, any float dtype; not modified.
        scale: None leaves the tensor unchanged.

    Returns:
        `[*shape]` float32.
    """
    return run(PASSTHROUGH, [tensor], scale=scale)


def task_arithmetic(
    deltas: Sequence[torch.Tensor], weight: Weights, *, normalize: bool = False, lambda_: float = 1.0
) -> torch.Tensor:
    """Weighted sum of deltas (task vectors, arXiv:2212.04089).

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta: numbers, or words as in a recipe.
        normalize: divide by the sum of the weights (a sum under 1e-8 counts as one).
        lambda_: multiplies the result.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    return run(TASK_ARITHMETIC, deltas, weight=weight, normalize=normalize, lambda_=lambda_)
