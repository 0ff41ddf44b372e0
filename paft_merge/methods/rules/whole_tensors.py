"""Apply a rule to whole tensors in memory, block by block, with the code that a merge runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute.block_walk import ArrayTensor, BlockWalk
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.methods.rules.rule import Rule, TensorPass

if TYPE_CHECKING:
    import torch

Array: TypeAlias = NDArray[np.float32]


def merge_tensors(rule: Rule, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Apply `rule` to whole tensors.

    Args:
        rule: a rule that wants deltas gets `tensors` as deltas, any other one gets them as values.
        tensors: each `[*shape]`, any float dtype; not modified. At least one.

    Returns:
        `[*shape]` float32: the merged tensor, or the merged delta.

    Raises:
        ValueError: different shapes, or values that are not finite.
    """
    import torch

    if any(t.shape != tensors[0].shape for t in tensors):
        raise ValueError(f"a merge needs tensors of one shape, got {[tuple(t.shape) for t in tensors]}")
    arrays = [t.detach().cpu().to(torch.float32).numpy() for t in tensors]
    return torch.from_numpy(merge_arrays(rule, arrays, range(len(arrays))))


def merge_arrays(rule: Rule, arrays: Sequence[Array], active: Sequence[int]) -> Array:
    """Apply `rule` to whole arrays, as `merge_tensors` does.

    Args:
        rule: as for `merge_tensors`.
        arrays: each `[*shape]` float32; not modified. At least one.
        active: the source of the rule that each array belongs to.

    Returns:
        `[*shape]` float32.

    Raises:
        ValueError: values that are not finite.
    """
    shape = arrays[0].shape
    sources = np.stack([np.ravel(one) for one in arrays]).view(np.uint32)
    if not np.isfinite(sources.view(np.float32)).all():
        raise ValueError("the tensors have NaN or infinite values")
    deltas = rule.wants == "deltas"
    base = np.zeros(sources.shape[1] if deltas else 0, np.uint32)
    each = BlockWalk([ArrayTensor(base, sources, rule.row(shape))])
    combine = rule.prepare(TensorPass(each.numel, each, CpuOps(), active, shape), deltas)
    out = np.empty(sources.shape[1], np.float32)
    bits = out.view(np.uint32)
    outcomes = each(lambda block: combine(block, bits[block.index : block.index + block.size], 0))
    if any(outcome.bad for outcome in outcomes):
        raise ValueError("the merged tensor has NaN or infinite values")
    return out.reshape(shape)
