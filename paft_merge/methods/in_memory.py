"""Run a method on whole tensors through the code that a merge runs block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paft_merge.methods.parameters import Method

if TYPE_CHECKING:
    import torch


def run(method: Method, tensors: Sequence[torch.Tensor], *, seed: int = 0, **given: Any) -> torch.Tensor:
    """Merge tensors in memory.

    Args:
        method: a row of METHODS.
        tensors: each `[*shape]`: values, or deltas if the method wants deltas; not modified.
        seed: of random masks, which also depend on a tensor's place in the list.
        given: every parameter by its name (`lambda_` for `lambda`); one of a source has one value for all, or one a tensor.

    Returns:
        `[*shape]` float32.

    Raises:
        ValueError: a value cannot be used, a list does not have one value a tensor, or a tensor has NaN or infinite values.
    """
    import numpy as np

    from paft_merge.methods.rules.thresholds import stream_key
    from paft_merge.methods.rules.whole_tensors import merge_tensors

    if not tensors:
        raise ValueError("a merge needs at least one tensor")
    values = {
        name.rstrip("_"): np.asarray(one, _kind(one)).tolist() if np.ndim(one) else one for name, one in given.items()
    }
    sources, shared = method.spread(values, len(tensors))
    keys = [stream_key(seed, str(i), "", "drop") for i in range(len(tensors))]
    rule = method.build(sources, shared, keys)
    assert rule.wants != "whole"
    return merge_tensors(rule, tensors)


def _kind(values: Any) -> type[object] | None:
    """The dtype that keeps numbers beside words what they are; None for numbers alone."""
    return object if any(isinstance(value, str) for value in values) else None
