"""What has no streaming rule here: mergekit's own function on whole float32 tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from paft_merge.methods.parameters import Method, Shared, Sources

if TYPE_CHECKING:
    import torch

    from paft_merge.bridge import WholeTensor


def _arcee_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> WholeTensor:
    from paft_merge.bridge import WholeTensor

    return WholeTensor("arcee_fusion", shared, tuple(sources), keys[0], dtype="float32")


ARCEE_FUSION = Method(
    "arcee_fusion", "Arcee Fusion", "arcee.ai", (), "required", _arcee_rule, max_sources=1, streamed=False
)
TABLE: Final = (ARCEE_FUSION,)


def arcee_fusion(base: torch.Tensor, other: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """The other tensor's value at its important entries, the base's elsewhere.

    An entry's importance is |difference| times the KL divergence of the rows' softmaxes; important is what lies above the
    median plus 1.5 times the interquartile range, over a random million of the entries where there are more.

    Args:
        base, other: `[*shape]`, any float dtype; not modified.
        seed: of that sample.

    Returns:
        `[*shape]` float32.

    Raises:
        ValueError: shapes that differ.
    """
    if base.shape != other.shape:
        raise ValueError(f"a merge needs tensors of one shape, got {[tuple(base.shape), tuple(other.shape)]}")
    return _arcee_rule([{}], {}, [seed]).merge(base, [other], "tensor")
