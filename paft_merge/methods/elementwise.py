"""Methods that decide for each entry by nearness, overlap, variance, magnitude or competition: NearSwap, RAM, SCE, MagMax, PCB."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from paft_merge.methods.in_memory import run
from paft_merge.methods.parameters import (
    INT8_MASK,
    LAMBDA,
    REQUIRED,
    WEIGHT_SCOPE,
    Method,
    Parameter,
    Shared,
    Sources,
    Weights,
    delta_weight,
)

if TYPE_CHECKING:
    import torch

    from paft_merge.methods.rules.rule import Rule


def _nearswap_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.elementwise import NearSwap

    return NearSwap(shared["t"])


def _ram_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.elementwise import Overlap

    return Overlap(shared["epsilon"], shared.get("r", 0.0), shared.get("alpha", 0.0))


def _magmax_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.elementwise import Largest

    return Largest(tuple(source["weight"] * shared["lambda"] for source in sources))


def _pcb_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.competition import Competition

    weights = tuple(source["weight"] * shared["lambda"] for source in sources)
    return Competition(tuple(source["density"] for source in sources), weights)


def _sce_rule(sources: Sources, shared: Shared, keys: Sequence[int]) -> Rule:
    from paft_merge.methods.rules.elementwise import Fuse

    return Fuse(len(sources), shared["select_topk"])


_CHANGED = Parameter(
    "epsilon", float, "shared", 1e-5, "A source changes an entry if |delta| is larger than this.", low=0.0
)

NEARSWAP = Method(
    "nearswap", "NearSwap", "huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    (Parameter("t", float, "shared", REQUIRED, "Take the source where it differs by at most this; less of it elsewhere."),),
    "required", _nearswap_rule, max_sources=1,
)  # fmt: skip
RAM = Method("ram", "Reinforced Agent Merging", "arXiv:2601.13572", (_CHANGED,), "required", _ram_rule)
RAMPLUS_TL = Method(
    "ramplus_tl", "Reinforced Agent Merging Plus (tensor-local)", "arXiv:2601.13572",
    (
        Parameter("r", float, "shared", 0.1, "How much changes of one source alone are boosted by its overlap with others."),
        Parameter("alpha", float, "shared", 0.2, "Largest overlap that counts: shared changes divided by own changes.", low=0.0),
        _CHANGED,
    ),
    "required", _ram_rule,
)  # fmt: skip
SCE = Method(
    "sce", "SCE", "arXiv:2408.07990",
    (
        Parameter("select_topk", float, "shared", 1.0, "Share of the entries merged: those of largest variance.", low=0.0, high=1.0),
        INT8_MASK,
    ),
    "required", _sce_rule,
)  # fmt: skip
MAGMAX = Method(
    "magmax", "MagMax", "arXiv:2407.06322", (delta_weight(1.0), LAMBDA, WEIGHT_SCOPE), "required", _magmax_rule
)
PCB = Method(
    "pcb", "PCB-Merging (by tensor)", "arXiv:2410.02396",
    (
        delta_weight(1.0),
        Parameter("density", float, "source", 0.2, "Share of the delta's entries that is kept, by score, in each tensor.", low=0.0, high=1.0),
        LAMBDA, WEIGHT_SCOPE,
    ),
    "required", _pcb_rule, max_sources=128,
)  # fmt: skip
TABLE: Final = (NEARSWAP, RAM, RAMPLUS_TL, SCE, MAGMAX, PCB)


def nearswap(delta: torch.Tensor, t: float) -> torch.Tensor:
    """Limit every entry of a delta to the magnitude `t`: `delta * clip(t / |delta|, 0, 1)`.

    Args:
        delta: `[*shape]`, any float dtype; not modified. Magnitudes under 1e-6 count as 1e-6.
        t: entries of at most this magnitude are unchanged.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    return run(NEARSWAP, [delta], t=t)


def ram(deltas: Sequence[torch.Tensor], *, epsilon: float = 1e-5) -> torch.Tensor:
    """Add entries that one delta alone changes, average those that several change (Reinforced Agent Merging, arXiv:2601.13572).

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        epsilon: a delta changes an entry if |delta| is larger; other entries are dropped.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    return run(RAM, deltas, epsilon=epsilon)


def ramplus_tl(
    deltas: Sequence[torch.Tensor], *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5
) -> torch.Tensor:
    """As `ram`, but changes of one delta alone are multiplied by `1 + r * min(shared / own, alpha)`, from its counts of changes.

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        r, alpha: the boost and its limit.
        epsilon: as in `ram`.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    return run(RAMPLUS_TL, deltas, r=r, alpha=alpha, epsilon=epsilon)


def sce(deltas: Sequence[torch.Tensor], *, select_topk: float = 1.0) -> torch.Tensor:
    """Select entries by variance, weight sources by energy, erase minority signs (SCE, arXiv:2408.07990; see `rules.elementwise.Fuse`).

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        select_topk: share in [0, 1] of the entries whose variance is not zero; ties keep the lowest index. At 1 all entries
            are merged, also those without variance.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    return run(SCE, deltas, select_topk=select_topk)


def magmax(deltas: Sequence[torch.Tensor], weight: Weights = 1.0, *, lambda_: float = 1.0) -> torch.Tensor:
    """Take every entry from the delta that is largest there in magnitude (MagMax, arXiv:2407.06322).

    Args:
        deltas: each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta: numbers, or words as in a recipe; the magnitudes that are compared are those of weight * delta.
        lambda_: multiplies the result.

    Returns:
        `[*shape]` float32, to add to the base. Of equal magnitudes the first delta's entry is taken.
    """
    return run(MAGMAX, deltas, weight=weight, lambda_=lambda_)


def pcb(
    deltas: Sequence[torch.Tensor],
    weight: Weights = 1.0,
    *,
    density: float | Sequence[float] = 0.2,
    lambda_: float = 1.0,
) -> torch.Tensor:
    """Keep the entries that win in their delta and against the other deltas, and average them by their scores (PCB-Merging, arXiv:2410.02396).

    The formula is in `rules.competition.Competition`. The paper normalizes and ranks over the whole model, this function over the tensor.

    Args:
        deltas: at most 128, each `[*shape]`, any float dtype; not modified.
        weight: one for all, or one a delta: numbers, or words as in a recipe (the paper's lambda_i); it does not change the scores.
        density: share kept in [0, 1] (the paper's r): the `rules.thresholds.kept_count` largest scores, ties by lowest index.
        lambda_: multiplies the result.

    Returns:
        `[*shape]` float32, to add to the base.
    """
    return run(PCB, deltas, weight=weight, density=density, lambda_=lambda_)
