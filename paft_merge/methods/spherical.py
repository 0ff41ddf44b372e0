"""Methods that merge directions and lengths: SLERP and its variants, the Karcher mean, Model Stock, the geometric median."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from paft_merge.methods.in_memory import run
from paft_merge.methods.parameters import LAMBDA, REQUIRED, Method, Parameter, Shared, Sources, weight, weights

if TYPE_CHECKING:
    import torch

    from paft_merge.methods.rules.rule import Rule


def _slerp_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.spherical import Slerp

    return Slerp(shared["t"])


def _nuslerp_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.spherical import NuSlerp

    if len(sources) != 2:
        raise ValueError(f"nuslerp interpolates between two sources, got {len(sources)}")
    total = sum(s["weight"] for s in sources)
    t = 0.5 if abs(total) < 1e-6 else sources[1]["weight"] / total
    return NuSlerp(t, "tensor" if shared["nuslerp_flatten"] else "columns" if shared["nuslerp_row_wise"] else "rows")


def _multislerp_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.spherical import MultiSlerp

    return MultiSlerp(weights(sources, shared["normalize_weights"]), shared["eps"])


def _karcher_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.spherical import Karcher

    return Karcher(len(sources), shared["max_iter"], shared["tol"])


def _model_stock_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.spherical import ModelStock

    if len(sources) < 2:
        raise ValueError("model_stock needs at least two deltas, because it uses the angle between them")
    return ModelStock(len(sources), shared["filter_wise"])


def _median_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.spherical import GeometricMedian

    total = sum(source["weight"] for source in sources)
    if not total:
        raise ValueError("every weight is 0, so no source counts; give one of them a weight")
    shares = tuple(source["weight"] / total for source in sources)
    return GeometricMedian(shares, shared["iterations"], shared["epsilon"], shared["lambda"])


SLERP = Method(
    "slerp", "SLERP", "Shoemake 1985",
    (Parameter("t", float, "shared", REQUIRED, "0 is the base, 1 the other source."),),
    "required", _slerp_rule, max_sources=1,
)  # fmt: skip
NUSLERP = Method(
    "nuslerp", "NuSLERP", "Shoemake 1985",
    (
        weight(),
        Parameter("nuslerp_flatten", bool, "shared", True, "Take each tensor as one vector."),
        Parameter("nuslerp_row_wise", bool, "shared", False, "Without nuslerp_flatten: vectors along the first dimension."),
    ),
    "optional", _nuslerp_rule, min_sources=2, max_sources=2,
)  # fmt: skip
MULTISLERP = Method(
    "multislerp", "Multi-SLERP", "goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    (
        weight(),
        Parameter("normalize_weights", bool, "shared", True, "Divide the weights by their sum."),
        Parameter("eps", float, "shared", 1e-8, "Added to lengths; a mean direction shorter than this counts as zero.", low=0.0),
    ),
    "optional", _multislerp_rule,
)  # fmt: skip
KARCHER = Method(
    "karcher", "Karcher mean", "arXiv:2603.04972",
    (
        Parameter("max_iter", int, "shared", 10, "Largest number of steps on the sphere.", low=0),
        Parameter("tol", float, "shared", 1e-5, "A step, an angle or a length below this counts as zero.", low=0.0),
    ),
    "ignored", _karcher_rule,
)  # fmt: skip
MODEL_STOCK = Method(
    "model_stock", "Model Stock", "arXiv:2403.19522",
    (Parameter("filter_wise", bool, "shared", False, "A ratio for each row of the last dimension, not one a tensor."),),
    "required", _model_stock_rule, min_sources=2,
)  # fmt: skip
GEOMETRIC_MEDIAN = Method(
    "geometric_median", "Geometric median", "Weiszfeld 1937, Vardi and Zhang 2000",
    (
        Parameter("weight", float, "source", 1.0, "How often this source counts; not negative.", low=0.0),
        Parameter("iterations", int, "shared", 100, "Largest number of steps.", low=0),
        Parameter("epsilon", float, "shared", 1e-6, "Stop where the weighted unit vectors to the deltas add up to at most this.", low=0.0),
        LAMBDA,
    ),
    "required", _median_rule,
)  # fmt: skip
TABLE: Final = (SLERP, NUSLERP, MULTISLERP, KARCHER, MODEL_STOCK, GEOMETRIC_MEDIAN)


def slerp(base: torch.Tensor, other: torch.Tensor, t: float) -> torch.Tensor:
    """Spherical interpolation of two tensors as flat vectors (see `rules.spherical.Slerp` for the degenerate cases).

    Args:
        base, other: `[*shape]`, any float dtype; not modified.
        t: 0 gives `base`, 1 gives `other`; values outside [0, 1] extrapolate.

    Returns:
        `[*shape]` float32.
    """
    return run(SLERP, [base, other], t=t)


def nuslerp(
    tensors: Sequence[torch.Tensor],
    weight: float | Sequence[float],
    *,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> torch.Tensor:
    """Spherical interpolation of two tensors, or of two deltas, by their weights (see `rules.spherical.NuSlerp`).

    Args:
        tensors: two, each `[*shape]`, any float dtype; not modified. mergekit's form with a base is this function on the deltas.
        weight: the interpolation's t is the second weight divided by their sum; 0.5 if the sum is nearly zero.
        nuslerp_flatten: the tensor is one vector; else every row of the last dimension is one.
        nuslerp_row_wise: without `nuslerp_flatten`, the vectors run along the first dimension instead.

    Returns:
        `[*shape]` float32: the value, or the delta.
    """
    return run(NUSLERP, tensors, weight=weight, nuslerp_flatten=nuslerp_flatten, nuslerp_row_wise=nuslerp_row_wise)


def multislerp(
    tensors: Sequence[torch.Tensor],
    weight: float | Sequence[float],
    *,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> torch.Tensor:
    """Barycentric interpolation of tensors, or of deltas, on a sphere (see `rules.spherical.MultiSlerp`).

    Args:
        tensors: each `[*shape]`, any float dtype; not modified. mergekit's form with a base is this function on the deltas.
        weight: one for all, or one a tensor.
        normalize_weights: divide the weights by their sum.
        eps: added to every length.

    Returns:
        `[*shape]` float32: the value, or the delta.

    Raises:
        ValueError: the weights add up to zero and `normalize_weights` is set.
        MergeError: DEGENERATE, three or more directions cancel out.
    """
    return run(MULTISLERP, tensors, weight=weight, normalize_weights=normalize_weights, eps=eps)


def karcher(tensors: Sequence[torch.Tensor], *, max_iter: int = 10, tol: float = 1e-5) -> torch.Tensor:
    """The Karcher mean of tensors as flat vectors: of directions on the sphere, and of lengths (arXiv:2603.04972).

    Args:
        tensors: each `[*shape]`, any float dtype; not modified. All have the same weight.
        max_iter: largest number of steps.
        tol: stop after a step shorter than this.

    Returns:
        `[*shape]` float32.
    """
    return run(KARCHER, tensors, max_iter=max_iter, tol=tol)


def model_stock(deltas: Sequence[torch.Tensor], *, filter_wise: bool = False) -> torch.Tensor:
    """The mean delta, scaled by how far the deltas agree (Model Stock, arXiv:2403.19522, eq. 5; see `rules.spherical.ModelStock`).

    Args:
        deltas: two or more, each `[*shape]`, any float dtype; not modified.
        filter_wise: one ratio for every row of the last dimension, not one for the tensor.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    return run(MODEL_STOCK, deltas, filter_wise=filter_wise)


def geometric_median(
    deltas: Sequence[torch.Tensor],
    weight: float | Sequence[float] = 1.0,
    *,
    iterations: int = 100,
    epsilon: float = 1e-6,
    lambda_: float = 1.0,
) -> torch.Tensor:
    """The delta with the least weighted sum of distances to all deltas, as flat vectors (see `rules.spherical.GeometricMedian`).

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: how often each delta counts, at least 0; one for all, or one a delta.
        iterations: largest number of steps of Weiszfeld's algorithm; 0 gives the weighted mean unless a delta is the median.
        epsilon: stop where the weighted unit vectors to the deltas add up to a vector of at most this length.
        lambda_: multiplies the result.

    Returns:
        `[*shape]` float32, to add to the base.

    Raises:
        ValueError: the weights add up to zero.
    """
    return run(GEOMETRIC_MEDIAN, deltas, weight=weight, iterations=iterations, epsilon=epsilon, lambda_=lambda_)
