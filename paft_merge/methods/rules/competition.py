"""The rule of PCB-Merging: entries of the deltas compete, the best of each delta are averaged by their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np

from paft_merge.compute import kernels
from paft_merge.compute.blocks import Block, Outcome
from paft_merge.compute.histogram import value_of
from paft_merge.methods.rules.rule import Combine, Rule, TensorPass, write_merged
from paft_merge.methods.rules.thresholds import Trim, trim_survivals
from paft_merge.methods.rules.walks import COMPETE, EXPONENTIALS, PRODUCTS, SCORES, Walks

MOST_SOURCES = 128
"""Scores of more sources could leave the range of float32."""


@dataclass(frozen=True)
class Competition(Rule):
    """PCB-Merging (arXiv:2410.02396, sec. 3) in each tensor.

    With n deltas d_i, and norm(x) = (x - min x) / (max x - min x) over the entries of the tensor (0 where all are equal):

        intra_i = softmax(n * norm(d_i * d_i))
        inter_i = sum over j of softmax(norm(d_i * d_j))
        score_i = intra_i * inter_i
        share_i = score_i / max score_i for the `density` largest scores, ties by lowest index; 0 elsewhere
        merged  = sum of share_i * weight_i * d_i / sum of share_i; 0 where no share is positive

    A delta that is zero in the whole tensor does not take part, and does not count for n.
    """

    densities: tuple[float, ...]
    weights: tuple[float, ...]
    """Weight times lambda of each source."""

    wants: ClassVar[Literal["deltas"]] = "deltas"

    @property
    def selection_weights(self) -> tuple[float, ...]:
        """Weight times lambda."""
        return self.weights

    def walks(self, numel: int, active: Sequence[int]) -> Walks:
        """The extremes of products, their exponentials, the largest scores, the thresholds."""
        ranked = any(0 < self.densities[i] < 1 for i in active)
        measuring = (PRODUCTS, EXPONENTIALS, SCORES, *((SCORES,) * ranked))
        return Walks(COMPETE, measuring, sampled=ranked, ties=1.0 * ranked, made=1 + len(active))

    def prepare(self, walk: TensorPass, deltas: bool) -> Combine:
        """Measure what the scores need, then the largest score and the threshold of each source."""
        score = self._scoring(walk)
        spread = walk.each.derived(score)
        tops = spread(lambda block: walk.ops.tally(block)[0][:, kernels.COUNTS.index("max_bits")])
        largest = np.max(tops, axis=0).tolist() if tops else [0] * len(walk.active)
        scales = [1 / value_of(top) if top else 0.0 for top in largest]
        trims = [Trim("density", self.densities[i]) for i in walk.active]
        survivals = trim_survivals(trims, walk.numel, spread, walk.ops)
        weights = [self.weights[i] for i in walk.active]

        def combine(block: Block, out: Any, key: int) -> Outcome:
            merged, kept, energy = walk.ops.compete(block, score(block), survivals, scales, weights)
            outcome = write_merged(walk.ops, block, merged, out, key, deltas)
            outcome.counts[:, 5:7], outcome.sums[:, 2:] = kept[:, None], energy[:, None]
            return outcome

        return combine

    @staticmethod
    def _scoring(walk: TensorPass) -> Callable[[Block], Block]:
        """The function from a block to its scores."""
        n = len(walk.active)
        extremes = walk.each(walk.ops.products) or [np.zeros((2, n, n))]
        least, greatest = np.min([one[0] for one in extremes], axis=0), np.max([one[1] for one in extremes], axis=0)
        with np.errstate(invalid="ignore"):  # the merge reports values that are not finite
            span = greatest - least
        scale = np.where(span > 0, 1 / np.where(span > 0, span, 1.0), 0.0)
        blocks = walk.each(lambda block: walk.ops.exponential_sums(block, least, scale))
        shares = np.zeros((n, n))
        part = np.diagonal(greatest) > 0
        for i, k in zip(*np.nonzero(np.outer(part, part)), strict=True):
            shares[i, k] = walk.numel / math.fsum(block[i, k] for block in blocks)
        return partial(walk.ops.scores, least=least, scale=scale, shares=shares)
