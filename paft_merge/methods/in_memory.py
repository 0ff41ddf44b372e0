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
    sources: list[dict[str, Any]] = [{} for _ in tensors]
    shared: dict[str, Any] = {}
    for name, value in given.items():
        parameter = method.parameter(name.rstrip("_"))
        assert parameter is not None
        if parameter.scope == "shared":
            shared[parameter.name] = parameter.checked(value)
            continue
        values = np.asarray(value).tolist() if np.ndim(value) else [value] * len(tensors)
        if len(values) != len(tensors):
            raise ValueError(f"{name} has {len(values)} values for {len(tensors)} tensors")
        for source, one in zip(sources, values, strict=True):
            source[name] = one if one is None else parameter.checked(one)
    keys = [stream_key(seed, str(i), "", "drop") for i in range(len(tensors))]
    rule = method.rule(sources, shared, keys)
    assert rule.wants != "whole"
    return merge_tensors(rule, tensors)
