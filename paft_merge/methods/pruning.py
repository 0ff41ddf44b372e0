"""Methods that drop entries at random (DARE), as outliers (Breadcrumbs) or at random by rank (DELLA), then add the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    elect,
    election,
    normalize,
    rescale,
    signs,
)

if TYPE_CHECKING:
    import torch

    from paft_merge.methods.rules.rule import Rule
    from paft_merge.methods.rules.thresholds import Rescale


def _dare_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.consensus import Consensus, Drop

    drops = tuple(Drop(s["density"], key) for s, key in zip(sources, keys, strict=True))
    return Consensus(drops, election(sources, shared), shared["rescale"])


def _breadcrumbs_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.consensus import Consensus
    from paft_merge.methods.rules.thresholds import Trim

    trims = tuple(Trim("outliers", s["density"], gamma=s["gamma"]) for s in sources)
    return Consensus(trims, election(sources, shared), shared["rescale"])


def _della_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.magprune import RankedConsensus, RankedDrop

    drops = tuple(RankedDrop(s["density"], s["epsilon"], key) for s, key in zip(sources, keys, strict=True))
    return RankedConsensus(drops, election(sources, shared), shared["rescale"])


_KEPT = "Share of the delta's entries that is kept, {}"
_AT_RANDOM = density(_KEPT.format("at random."))
_AFTER_OUTLIERS = density(_KEPT.format("the largest after the outliers. 1 keeps everything, also the outliers."))
_BY_RANK = density(_KEPT.format("at random, larger ones of a row with higher probability."))
_GAMMA = Parameter("gamma", float, "source", 0.01, "Share of the largest entries that is dropped.", low=0.0, high=1.0)
_EPSILON = Parameter(
    "epsilon", float, "source", 0.15, "From density - epsilon for the smallest of a row to density + epsilon."
)


def _table(
    names: tuple[str, str], titles: tuple[str, str], paper: str, own: tuple[Parameter, ...],
    rule: Callable[[Sources, Shared, Sequence[int]], Rule], *, rescaled: Rescale, normalized: bool = False,
) -> tuple[Method, Method]:  # fmt: skip
    """A method without an election, and the same with TIES' election, whose `normalize` is `weights` if `normalized`."""
    rest = rescale(rescaled), LAMBDA
    plain = (delta_weight(), *own, by_all_weights(False), *rest, WEIGHT_SCOPE, INT8_MASK)
    elected = (
        delta_weight(),
        *own,
        normalize("weights" if normalized else "none"),
        *rest,
        *elect("weighted"),
        WEIGHT_SCOPE,
        INT8_MASK,
    )
    return (
        Method(names[0], titles[0], paper, plain, "required", rule),
        Method(names[1], titles[1], paper, elected, "required", rule),
    )


DARE_LINEAR, DARE_TIES = _table(
    ("dare_linear", "dare_ties"),
    ("DARE", "DARE with TIES' election"),
    "arXiv:2311.03099",
    (_AT_RANDOM,),
    _dare_rule,
    rescaled="l1",
)
BREADCRUMBS, BREADCRUMBS_TIES = _table(
    ("breadcrumbs", "breadcrumbs_ties"), ("Model Breadcrumbs", "Model Breadcrumbs with TIES' election"), "arXiv:2312.06795",
    (_AFTER_OUTLIERS, _GAMMA), _breadcrumbs_rule, rescaled="none",
)  # fmt: skip
DELLA_LINEAR, DELLA = _table(
    ("della_linear", "della"), ("DELLA without an election", "DELLA"), "arXiv:2406.11617", (_BY_RANK, _EPSILON), _della_rule,
    rescaled="l1", normalized=True,
)  # fmt: skip
TABLE: Final = (DARE_LINEAR, DARE_TIES, BREADCRUMBS, BREADCRUMBS_TIES, DELLA_LINEAR, DELLA)


def dare_linear(
    deltas: Sequence[torch.Tensor],
    weight: Weights,
    *,
    density: float | Sequence[float] = 1.0,
    normalize: bool = False,
    rescale: str | bool = "l1",
    lambda_: float = 1.0,
    seed: int = 0,
) -> torch.Tensor:
    """Drop entries at random, rescale, add up (DARE, arXiv:2311.03099, sec. 3.2).

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta: numbers, or words as in a recipe.
        density: probability in [0, 1] that an entry stays (the paper's 1 - p).
        normalize: divide by the sum of the weights.
        rescale: multiply by (norm before / norm after), of `l1` (True, as in mergekit) or `l2`; the paper divides by the density.
        lambda_: multiplies the result.
        seed: of the masks, which depend on the seed, the delta's place in the list and the entry.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    return run(
        DARE_LINEAR,
        deltas,
        weight=weight,
        density=density,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
        seed=seed,
    )


def dare_ties(
    deltas: Sequence[torch.Tensor],
    weight: Weights,
    *,
    density: float | Sequence[float] = 1.0,
    normalize: str | bool = "none",
    rescale: str | bool = "l1",
    lambda_: float = 1.0,
    elect: str = "weighted",
    elect_tie: str = "positive",
    seed: int = 0,
) -> torch.Tensor:
    """Drop entries at random, rescale, then elect signs and merge as `ties` does.

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta: numbers, or words as in a recipe.
        density: as in `dare_linear`.
        normalize, rescale, lambda_, elect, elect_tie: as in `ties`.
        seed: as in `dare_linear`.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    chosen = signs(normalize, lambda_, elect, elect_tie)
    return run(DARE_TIES, deltas, weight=weight, density=density, rescale=rescale, seed=seed, **chosen)


def breadcrumbs(
    deltas: Sequence[torch.Tensor],
    weight: Weights,
    *,
    density: float | Sequence[float] = 1.0,
    gamma: float | Sequence[float] = 0.01,
    normalize: bool = False,
    rescale: str | bool = "none",
    lambda_: float = 1.0,
) -> torch.Tensor:
    """Drop the largest and the smallest entries, add up the others (Model Breadcrumbs, arXiv:2312.06795, sec. 3).

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta: numbers, or words as in a recipe.
        density: share kept in [0, 1], `int(density * numel)` entries; 1 keeps everything, also the outliers, as in mergekit.
        gamma: share of the largest entries that is dropped, fewer if the density cannot be reached otherwise. Ties at
            either end keep or drop the lowest index first.
        normalize: divide by the sum of the weights.
        rescale: scale each sparsified delta back to its norm, `l1` (True) or `l2`; `none` (False) does not.
        lambda_: multiplies the result.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    return run(
        BREADCRUMBS,
        deltas,
        weight=weight,
        density=density,
        gamma=gamma,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
    )


def breadcrumbs_ties(
    deltas: Sequence[torch.Tensor],
    weight: Weights,
    *,
    density: float | Sequence[float] = 1.0,
    gamma: float | Sequence[float] = 0.01,
    normalize: str | bool = "none",
    rescale: str | bool = "none",
    lambda_: float = 1.0,
    elect: str = "weighted",
    elect_tie: str = "positive",
) -> torch.Tensor:
    """Drop the largest and the smallest entries, then elect signs and merge as `ties` does.

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta: numbers, or words as in a recipe.
        density, gamma: as in `breadcrumbs`.
        normalize, rescale, lambda_, elect, elect_tie: as in `ties`.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    chosen = signs(normalize, lambda_, elect, elect_tie)
    return run(BREADCRUMBS_TIES, deltas, weight=weight, density=density, gamma=gamma, rescale=rescale, **chosen)


def della_linear(
    deltas: Sequence[torch.Tensor],
    weight: Weights,
    *,
    density: float | Sequence[float] = 1.0,
    epsilon: float | Sequence[float] = 0.15,
    normalize: bool = False,
    rescale: str | bool = "l1",
    lambda_: float = 1.0,
    seed: int = 0,
) -> torch.Tensor:
    """Drop entries at random, smaller ones of a row with higher probability, rescale, add up (DELLA, arXiv:2406.11617, sec. 3.1).

    Args:
        deltas: each `[*shape]`, any float dtype; not modified. Entries are ranked along the second dimension (a vector as a
            whole), ties by position; the entry of a row of one is kept with the density.
        weight: one for all, or one a delta: numbers, or words as in a recipe.
        density: mean probability in [0, 1] that an entry stays; 1 keeps everything.
        epsilon: the probability runs from `density - epsilon` for the smallest entry of a row to `density + epsilon` for the
            largest; both must be inside (0, 1) unless the density is 0 or 1.
        normalize: divide by the sum of the weights.
        rescale: as in `dare_linear`; the paper divides by the probability.
        lambda_: multiplies the result.
        seed: of the masks, which depend on the seed, the delta's place in the list and the entry.

    Returns:
        `[*shape]` float32, to add to the base.

    Raises:
        ValueError: `density` plus or minus `epsilon` leaves (0, 1).
    """
    return run(
        DELLA_LINEAR,
        deltas,
        weight=weight,
        density=density,
        epsilon=epsilon,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
        seed=seed,
    )


def della(
    deltas: Sequence[torch.Tensor],
    weight: Weights,
    *,
    density: float | Sequence[float] = 1.0,
    epsilon: float | Sequence[float] = 0.15,
    normalize: str | bool = "weights",
    rescale: str | bool = "l1",
    lambda_: float = 1.0,
    elect: str = "weighted",
    elect_tie: str = "positive",
    seed: int = 0,
) -> torch.Tensor:
    """Drop entries at random as `della_linear` does, rescale, then elect signs and merge as `ties` does.

    Args:
        deltas: each `[*shape]`, any float dtype; not modified. Ranked as in `della_linear`.
        weight: one for all, or one a delta: numbers, or words as in a recipe.
        density, epsilon: as in `della_linear`.
        normalize, rescale, lambda_, elect, elect_tie: as in `ties`.
        seed: as in `della_linear`.

    Returns:
        `[*shape]` float32, to add to the base.

    Raises:
        ValueError: `density` plus or minus `epsilon` leaves (0, 1).
    """
    chosen = signs(normalize, lambda_, elect, elect_tie)
    return run(DELLA, deltas, weight=weight, density=density, epsilon=epsilon, rescale=rescale, seed=seed, **chosen)
