"""How two deltas of one tensor get along: direction, signs, support, subspaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from paft_merge.stats.metrics import UNDEFINED


@dataclass(frozen=True)
class PairMeasure:
    """Counts and sums of two deltas d1, d2 over the same entries; they add up over tensors.

    A tensor that only one of the two changes contributes its square and nothing else.
    """

    entries: int = 0
    both: int = 0
    """Entries where neither is zero."""
    conflicts: int = 0
    """Of these, entries whose signs differ."""
    above: int = 0
    """Entries where both are at least the audit's epsilon."""
    above_conflicts: int = 0
    dot: float = 0.0
    left_square: float = 0.0
    right_square: float = 0.0
    least: float = 0.0
    """Sum of min(|d1|, |d2|)."""
    least_conflict: float = 0.0
    """The same over the entries whose signs differ."""
    left_conflict_square: float = 0.0
    """Sum of d1^2 where the signs differ."""
    right_conflict_square: float = 0.0
    kept_both: int = 0
    """Entries among the largest of both, at the density of the overlap."""
    kept_either: int = 0
    chance_both: float = 0.0
    """What `kept_both` would be if the largest entries of each lay at random: k1 k2 / n."""
    kept_sum: int = 0
    """k1 + k2."""

    @classmethod
    def total(cls, parts: Sequence[PairMeasure]) -> PairMeasure:
        """The measure of everything in `parts`."""
        return cls(**{name: sum(getattr(p, name) for p in parts) for name in cls.__dataclass_fields__})

    @property
    def turned(self) -> PairMeasure:
        """The same with left as right."""
        return replace(
            self, left_square=self.right_square, right_square=self.left_square,
            left_conflict_square=self.right_conflict_square, right_conflict_square=self.left_conflict_square,
        )  # fmt: skip

    @property
    def cosine(self) -> float:
        """<d1, d2> / (||d1|| ||d2||)."""
        return _ratio(self.dot, math.sqrt(self.left_square) * math.sqrt(self.right_square))

    @property
    def size_ratio(self) -> float:
        """Norm of the larger delta over that of the smaller one, at least 1."""
        sizes = sorted((self.left_square, self.right_square))
        return math.sqrt(_ratio(sizes[1], sizes[0]))

    @property
    def conflict(self) -> float:
        """Share of the entries that neither leaves at zero whose signs differ; 0.5 is chance."""
        return _ratio(self.conflicts, self.both)

    @property
    def conflict_above(self) -> float:
        """The same among entries where both are at least epsilon."""
        return _ratio(self.above_conflicts, self.above)

    @property
    def conflict_weighted(self) -> float:
        """The same, each entry weighted by min(|d1|, |d2|), which is what the sum of the two loses there."""
        return _ratio(self.least_conflict, self.least)

    @property
    def conflict_energy(self) -> tuple[float, float]:
        """Shares of ||d1||^2 and ||d2||^2 on entries whose signs differ."""
        return _ratio(self.left_conflict_square, self.left_square), _ratio(
            self.right_conflict_square, self.right_square
        )

    @property
    def overlap(self) -> float:
        """Jaccard index of the two supports: |both kept| / |either kept|."""
        return _ratio(self.kept_both, self.kept_either)

    @property
    def overlap_chance(self) -> float:
        """The Jaccard index of two random supports of these sizes."""
        return _ratio(self.chance_both, self.kept_sum - self.chance_both)

    def to_json(self) -> dict[str, Any]:
        """As the report's JSON has it."""
        left, right = self.conflict_energy
        return {
            "size_ratio": self.size_ratio, "cosine": self.cosine, "conflict": self.conflict, "conflict_above": self.conflict_above,
            "conflict_weighted": self.conflict_weighted, "conflict_energy": [left, right],
            "overlap": self.overlap, "overlap_chance": self.overlap_chance,
            "both": self.both, "conflicts": self.conflicts, "above": self.above, "above_conflicts": self.above_conflicts,
        }  # fmt: skip


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else UNDEFINED
