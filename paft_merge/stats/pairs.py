"""Interference of two deltas of one tensor: direction, signs, support, subspaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from paft_merge.stats.metrics import ratio


@dataclass(frozen=True)
class PairMeasure:
    """Counts and sums of two deltas d1, d2 over the same entries, which add up over tensors.

    A tensor that only one of the two changes contributes only its square.
    """

    entries: int = 0
    both: int = 0
    """Entries where neither is zero."""
    conflicts: int = 0
    """Of these, entries whose signs differ."""
    above: int = 0
    """Entries where both magnitudes are at least the audit's epsilon."""
    above_conflicts: int = 0
    """Of these, entries whose signs differ."""
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
    """Entries among the largest of both, at the density of the audit."""
    kept_either: int = 0
    chance_both: float = 0.0
    """Expected `kept_both` of two random supports: k1 k2 / n."""
    kept_sum: int = 0
    """k1 + k2."""

    @classmethod
    def total(cls, parts: Sequence[PairMeasure]) -> PairMeasure:
        """The sum of `parts`."""
        return cls(**{name: sum(getattr(p, name) for p in parts) for name in cls.__dataclass_fields__})

    @property
    def turned(self) -> PairMeasure:
        """The measure with left and right exchanged."""
        return replace(
            self, left_square=self.right_square, right_square=self.left_square,
            left_conflict_square=self.right_conflict_square, right_conflict_square=self.left_conflict_square,
        )  # fmt: skip

    @property
    def cosine(self) -> float:
        """<d1, d2> / (||d1|| ||d2||)."""
        return ratio(self.dot, math.sqrt(self.left_square) * math.sqrt(self.right_square))

    @property
    def size_ratio(self) -> float:
        """Norm of the larger delta over that of the smaller one, at least 1."""
        sizes = sorted((self.left_square, self.right_square))
        return math.sqrt(ratio(sizes[1], sizes[0]))

    @property
    def conflict(self) -> float:
        """Share of differing signs among the entries nonzero in both; 0.5 is chance."""
        return ratio(self.conflicts, self.both)

    @property
    def conflict_above(self) -> float:
        """The same among entries where both are at least epsilon."""
        return ratio(self.above_conflicts, self.above)

    @property
    def conflict_weighted(self) -> float:
        """The same, each entry weighted by min(|d1|, |d2|), the magnitude that cancels in d1 + d2."""
        return ratio(self.least_conflict, self.least)

    @property
    def conflict_energy(self) -> tuple[float, float]:
        """Shares of ||d1||^2 and ||d2||^2 on entries whose signs differ."""
        return ratio(self.left_conflict_square, self.left_square), ratio(self.right_conflict_square, self.right_square)

    @property
    def overlap(self) -> float:
        """Jaccard index of the two supports: |both kept| / |either kept|."""
        return ratio(self.kept_both, self.kept_either)

    @property
    def overlap_chance(self) -> float:
        """The Jaccard index of two random supports of these sizes."""
        return ratio(self.chance_both, self.kept_sum - self.chance_both)

    def to_json(self) -> dict[str, Any]:
        """Every metric by its name in the report's JSON."""
        left, right = self.conflict_energy
        return {
            "size_ratio": self.size_ratio, "cosine": self.cosine, "conflict": self.conflict, "conflict_above": self.conflict_above,
            "conflict_weighted": self.conflict_weighted, "conflict_energy": [left, right],
            "overlap": self.overlap, "overlap_chance": self.overlap_chance,
            "both": self.both, "conflicts": self.conflicts, "above": self.above, "above_conflicts": self.above_conflicts,
        }  # fmt: skip
