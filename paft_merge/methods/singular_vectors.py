"""Methods on the singular vectors of the deltas: TSV-Merge and Iso-C. They merge adapters in their core space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from paft_merge.methods.in_memory import run
from paft_merge.methods.parameters import LAMBDA, WEIGHT_SCOPE, Method, Shared, Sources, Weights, delta_weight
from paft_merge.methods.parameters import weights as weights_of

if TYPE_CHECKING:
    import torch

    from paft_merge.methods.rules.rule import Rule


def _tsv_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.singular_vectors import TaskSingularVectors

    return TaskSingularVectors(weights_of(sources, False), shared["lambda"])


def _iso_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.singular_vectors import Isotropic

    return Isotropic(weights_of(sources, False), shared["lambda"])


def _method(name: str, title: str, paper: str, rule: Callable[[Sources, Shared, Sequence[int]], Rule]) -> Method:
    return Method(name, title, paper, (delta_weight(1.0), LAMBDA, WEIGHT_SCOPE), "required", rule, core_only=True)


TSV = _method("tsv", "TSV-Merge", "arXiv:2412.00081", _tsv_rule)
ISO_C = _method("iso_c", "Iso-C", "arXiv:2502.04959", _iso_rule)
TABLE: Final = (TSV, ISO_C)


def tsv(deltas: Sequence[torch.Tensor], weight: Weights = 1.0, *, lambda_: float = 1.0) -> torch.Tensor:
    """Orthogonalise the leading singular vectors of all deltas, and add up (TSV-Merge, arXiv:2412.00081).

    Args:
        deltas: matrices `[K, L]` of one space, such as the cores of adapters; any float dtype; not modified. A tensor of another shape
            is a matrix of its first dimension and the rest. On deltas of low rank themselves, prefer their cores (`lowrank.core_space`).
        weight: one for all, or one a delta. Multiplies its singular values; a delta of weight 0 does not take part.
        lambda_: multiplies the result.

    Returns:
        `[K, L]` float32.
    """
    return run(TSV, deltas, weight=weight, lambda_=lambda_)


def iso_c(deltas: Sequence[torch.Tensor], weight: Weights = 1.0, *, lambda_: float = 1.0) -> torch.Tensor:
    """Add the deltas up, and set all singular values of the sum to their mean (Iso-C, arXiv:2502.04959).

    Args:
        deltas, weight, lambda_: as for `tsv`; the weights are those of the sum.

    Returns:
        `[K, L]` float32.
    """
    return run(ISO_C, deltas, weight=weight, lambda_=lambda_)
