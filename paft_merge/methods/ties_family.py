"""Methods that trim, elect a sign and merge what agrees: TIES, L1-aware TIES, sign election."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

from paft_merge.methods.in_memory import run
from paft_merge.methods.parameters import (
    INT8_MASK,
    LAMBDA,
    TRIM_SCOPE,
    WEIGHT_SCOPE,
    Method,
    Parameter,
    Shared,
    Sources,
    Weights,
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


def _ties_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.consensus import Consensus
    from paft_merge.methods.rules.thresholds import Trim

    ways: tuple[Literal["epsilon", "density", "l1_mass"], ...] = "epsilon", "density", "l1_mass"
    trims = []
    for source in sources:
        way = next((way for way in ways if source.get(way) is not None), None)
        if way is None:
            raise ValueError("nothing says which entries are kept; set density, l1_mass or epsilon")
        trims.append(Trim(way, source[way], soft=shared.get("shrink") == "soft"))
    return Consensus(
        tuple(trims), election(sources, shared), shared.get("rescale", "none"), shared.get("trim_scope", "tensor")
    )


TIES = Method(
    "ties", "TIES", "arXiv:2306.01708",
    (delta_weight(), density(), normalize("weights"), rescale("none"), LAMBDA, *elect("weighted"), TRIM_SCOPE, WEIGHT_SCOPE, INT8_MASK),
    "required", _ties_rule,
)  # fmt: skip
L1_TIES = Method(
    "l1_ties", "L1-aware TIES", "ours, after arXiv:2306.01708 and PAFT (arXiv:2406.17923)",
    (
        delta_weight(1.0),
        Parameter("density", float, "source", None, "trim: keep this share of the entries.", low=0.0, high=1.0),
        Parameter("l1_mass", float, "source", 0.95, "trim: keep the fewest with this share of the L1 norm.", low=0.0, high=1.0),
        Parameter("epsilon", float, "source", None, "trim: keep the entries with |delta| > epsilon.", low=0.0),
        Parameter("shrink", str, "shared", "hard", "soft: take the threshold off the kept entries.", choices=("hard", "soft")),
        rescale("l1"), normalize("none"), LAMBDA, *elect("none"), TRIM_SCOPE, WEIGHT_SCOPE,
    ),
    "required", _ties_rule,
)  # fmt: skip
SIGN_ELECTION = Method(
    "sign_election", "Sign election", "ours, after PAFT (arXiv:2406.17923) and arXiv:2306.01708",
    (delta_weight(1.0), density(), normalize("none"), LAMBDA, *elect("weighted"), TRIM_SCOPE, WEIGHT_SCOPE),
    "required", _ties_rule,
)  # fmt: skip
TABLE: Final = (TIES, L1_TIES, SIGN_ELECTION)


def ties(
    deltas: Sequence[torch.Tensor],
    weight: Weights,
    *,
    density: float | Sequence[float] = 1.0,
    normalize: str | bool = "weights",
    rescale: str | bool = "none",
    lambda_: float = 1.0,
    elect: str = "weighted",
    elect_tie: str = "positive",
) -> torch.Tensor:
    """Trim, elect signs, merge what agrees (TIES-Merging, arXiv:2306.01708, sec. 3.1).

    The defaults are mergekit's: signs are elected on *weighted* deltas, so a source with a negative weight votes for the
    opposite sign and is subtracted where that sign wins. The paper is `elect="unweighted", normalize="count"` (then
    `lambda_`), and so is PEFT's `ties_svd` before its SVD. PAFT elects by `elect="count"` (`elect_tie="zero"`: sgn(0) = 0).

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta: numbers, or words as in a recipe.
        density: share kept in [0, 1] (the paper's k / 100): the `rules.thresholds.kept_count` largest, ties by lowest index.
        normalize: `weights`, `count` or `none`; True is `weights`, False `none`.
        rescale: scale each trimmed delta back to its norm, `l1` (True) or `l2`; `none` (False) does not.
        lambda_: multiplies the result.
        elect: `weighted`, `unweighted`, `count` or `none`.
        elect_tie: `positive` or `zero`.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    chosen = signs(normalize, lambda_, elect, elect_tie)
    return run(TIES, deltas, weight=weight, density=density, rescale=rescale, **chosen)


def l1_ties(
    deltas: Sequence[torch.Tensor],
    weight: Weights = 1.0,
    *,
    density: float | Sequence[float] | None = None,
    l1_mass: float | Sequence[float] | None = 0.95,
    epsilon: float | Sequence[float] | None = None,
    shrink: str = "hard",
    rescale: str | bool = "l1",
    normalize: str | bool = "none",
    lambda_: float = 1.0,
    elect: str = "none",
    elect_tie: str = "positive",
) -> torch.Tensor:
    """TIES that trims by L1 mass instead of a fixed density.

    A delta trained with an L1 penalty (PAFT, arXiv:2406.17923, eq. 1) has nearly all of its L1 norm in few entries and stays
    almost unchanged; a dense delta is trimmed more. `shrink="soft"` is the proximal step of the L1 norm.

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta: numbers, or words as in a recipe.
        density, l1_mass, epsilon: which entries are kept (see `rules.thresholds.Trim`): by `epsilon` if given, else by `density`, else by `l1_mass`.
        shrink: `hard` or `soft`.
        rescale: as in `ties`.
        normalize, lambda_, elect, elect_tie: as in `ties`.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    chosen = signs(normalize, lambda_, elect, elect_tie)
    return run(
        L1_TIES,
        deltas,
        weight=weight,
        density=density,
        l1_mass=l1_mass,
        epsilon=epsilon,
        shrink=shrink,
        rescale=rescale,
        **chosen,
    )


def sign_election(
    deltas: Sequence[torch.Tensor],
    weight: Weights = 1.0,
    *,
    density: float | Sequence[float] = 1.0,
    normalize: str | bool = "none",
    lambda_: float = 1.0,
    elect: str = "weighted",
    elect_tie: str = "positive",
) -> torch.Tensor:
    """Elect a sign for every entry and add up what agrees with it; nothing is trimmed unless `density` says so.

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta: numbers, or words as in a recipe.
        density: as in `ties`; 1 keeps everything.
        normalize, lambda_, elect, elect_tie: as in `ties`.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    chosen = signs(normalize, lambda_, elect, elect_tie)
    return run(SIGN_ELECTION, deltas, weight=weight, density=density, **chosen)
