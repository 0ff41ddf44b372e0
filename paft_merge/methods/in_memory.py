"""Run a method on whole tensors through the code that a merge runs block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paft_merge.methods.parameters import Method

if TYPE_CHECKING:
    import torch


def run(
    method: Method, tensors: Sequence[torch.Tensor], source: dict[str, Any], shared: dict[str, Any], seed: int = 0
) -> torch.Tensor:
    """Merge tensors in memory.

    Args:
        method: a row of METHODS.
        tensors: each `[*shape]`: values, or deltas where the method wants deltas; not modified.
        source: parameters of sources, one value for all or one a tensor.
        shared: the other parameters.
        seed: of random masks, which also depend on a tensor's place in the list.

    Returns:
        `[*shape]` float32.

    Raises:
        ValueError: a word that is no choice, or a list of another length than `tensors`.
    """
    from paft_merge.methods.rules.thresholds import stream_key
    from paft_merge.methods.rules.whole_tensors import merge_tensors

    for key, value in shared.items():
        parameter = method.parameter(key)
        assert parameter is not None
        if isinstance(value, bool) and parameter.flags:
            shared[key] = parameter.flags[value]
        elif parameter.choices and value not in parameter.choices:
            raise ValueError(f"{key} must be one of {', '.join(parameter.choices)}, got {value!r}")
    sources: list[dict[str, Any]] = [{} for _ in tensors]
    for key, value in source.items():
        values = value if isinstance(value, Sequence) else [value] * len(tensors)
        if len(values) != len(tensors):
            raise ValueError(f"{key} has {len(values)} values for {len(tensors)} tensors")
        for each, one in zip(sources, values, strict=True):
            each[key] = one
    keys = [stream_key(seed, str(i), "", "drop") for i in range(len(tensors))]
    rule = method.rule(sources, shared, keys)
    assert rule.wants != "whole"
    return merge_tensors(rule, tensors)
