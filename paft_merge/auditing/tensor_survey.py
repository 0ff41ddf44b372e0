"""Measures one tensor: the delta of each source, every pair of deltas, and the entries that a merge would keep.

n active sources; blocks come from `HeldDeltas`. Counts do not depend on the order in which blocks are done, and sums are
taken block by block and added in tile order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from threading import Lock
from typing import Any

import numpy as np

from paft_merge.auditing.opening import AuditedTensor
from paft_merge.auditing.preview import Survived, with_survivals
from paft_merge.auditing.walk import HeldDeltas
from paft_merge.compute import kernels
from paft_merge.compute.blocks import Block, KeepThreshold, Tally
from paft_merge.compute.cpu_ops import CpuOps
from paft_merge.compute.histogram import bits_of, value_of
from paft_merge.compute.magnitudes import INFINITY
from paft_merge.compute.scratch import SCRATCH
from paft_merge.errors import AuditError
from paft_merge.methods.rules.rule import Rule, TensorPass
from paft_merge.methods.rules.thresholds import Trim, trim_survivals
from paft_merge.stats.metrics import Histogram, Measure
from paft_merge.stats.pairs import PairMeasure
from paft_merge.stats.spectrum import FactorCounts, Factored, Spectrum

Pairs = Mapping[tuple[int, int], PairMeasure]


@dataclass(frozen=True)
class Wanted:
    """Settings of a survey."""

    epsilon: float
    epsilons: tuple[float, ...]
    weights: bool
    """The base's weights can be read."""
    pairs: bool
    density: float
    """Share of the largest entries whose positions are compared between two sources."""


@dataclass(frozen=True)
class TensorStats:
    """The measures of one tensor; sources are indices into those of the tensor."""

    measures: Mapping[int, Measure]
    spectra: Mapping[int, tuple[Spectrum, FactorCounts]]
    """Spectrum and counts of each source whose delta is one product of factors."""
    pairs: Pairs
    subspaces: Mapping[tuple[int, int], tuple[float, float]]
    survived: Mapping[int, Survived]
    merged_square: float
    sum_square: float


def survey(subject: AuditedTensor, walker: HeldDeltas, wanted: Wanted, rule: Rule | None) -> TensorStats:
    """Measure one tensor in one walk, and in two more (from memory where it fits) where sources are compared.

    Raises:
        AuditError: NONFINITE, naming the tensor and the source.
    """
    active = subject.inputs.active
    first = _First(subject, wanted, len(active))
    decomposed = [walker.pool.submit(_factored, subject, i) for i in active]
    blocks = walker.first(first.work)
    measures = first.measures(blocks, subject)
    factored = [later.result() for later in decomposed]
    pairs = first.pairs(blocks, measures)
    related = {(a, b): walker.pool.submit(_relate, factored[a], factored[b]) for a, b in pairs}
    survivals: list[KeepThreshold] = []
    if pairs:
        trims = [Trim("density", wanted.density)] * len(active)
        survivals = trim_survivals(trims, subject.numel, walker.walk, CpuOps(), full=first.full)
    survived, merged, support = _second(subject, walker, rule, survivals, wanted)
    subspaces = {}
    for (a, b), later in related.items():
        pairs[a, b] = _with_support(pairs[a, b], support[a, b], subject.numel)
        relation = later.result()
        if relation is not None:
            pairs[a, b] = replace(pairs[a, b], dot=relation[0])
            subspaces[active[a], active[b]] = relation[1]
    return TensorStats(
        dict(zip(active, measures, strict=True)),
        {i: (f.spectrum, f.counts) for i, f in zip(active, factored, strict=True) if f},
        {(active[a], active[b]): pair for (a, b), pair in pairs.items()},
        subspaces,
        {active[i]: s for i, s in survived.items()},
        merged,
        _sum_square(rule, active, measures, pairs),
    )


@dataclass(frozen=True)
class _Part:
    """The sums of one block, with a row for each source or pair."""

    sums: Any
    below: Any
    largest: list[int]
    erased: list[int]
    weight_square: float
    pair_counts: Any
    pair_sums: Any


class _First:
    """The first pass: each delta alone and, where wanted, against every other one."""

    def __init__(self, subject: AuditedTensor, wanted: Wanted, n: int) -> None:
        self.subject, self.wanted, self.n = subject, wanted, n
        self.edges = np.array([bits_of(1e-45), *map(bits_of, wanted.epsilons)], np.uint32)
        self.combinations = list(combinations(range(n), 2)) if wanted.pairs else []
        self._counts = np.zeros((n, kernels.BINS), np.int64)
        self._lows = np.zeros((n, kernels.BINS), np.int64)
        self._lock = Lock()

    def work(self, block: Block) -> _Part:
        sums, below = np.zeros((self.n, 3)), np.zeros((self.n, len(self.edges)), np.int64)
        largest = [self._measure(i, row, below[i], sums[i]) for i, row in enumerate(block.sources)]
        weight, erased = np.zeros(1), list[int]()
        for row in block.sources if self.wanted.weights else ():
            weight[0] = 0.0
            erased.append(kernels.erased(row, block.base, weight, kernels.lines(2)))
        edge = np.uint32(max(bits_of(self.wanted.epsilon), 1))
        pair_counts, pair_sums = np.zeros((len(self.combinations), 4), np.int64), np.zeros((len(self.combinations), 5))
        for k, (a, b) in enumerate(self.combinations):
            kernels.compare(block.sources[a], block.sources[b], edge, pair_counts[k], pair_sums[k], kernels.lines(2))
        return _Part(sums, below, largest, erased, float(weight[0]), pair_counts, pair_sums)

    def _measure(self, i: int, row: Any, below: Any, sums: Any) -> int:
        """Measure one delta; its histogram has integers, so that blocks may be added in any order."""
        largest = 0
        for start in range(0, row.size, kernels.MOST):
            packed = np.zeros(kernels.BINS, np.int64)
            chunk = row[start : start + kernels.MOST]
            largest = max(largest, kernels.measure(chunk, self.edges, below, packed, sums))
            filled = np.flatnonzero(packed)
            with self._lock:
                self._counts[i, filled] += packed[filled] >> kernels.COUNT_SHIFT
                self._lows[i, filled] += packed[filled] & ((1 << kernels.COUNT_SHIFT) - 1)
        if largest >= INFINITY:
            raise _not_finite(self.subject, i)
        return largest

    @property
    def full(self) -> tuple[Any, Any]:
        """The histograms of all blocks, as `thresholds.trim_survivals` takes them."""
        return self._counts, self._lows

    def measures(self, parts: Sequence[_Part], subject: AuditedTensor) -> list[Measure]:
        """The measure of every source, from all blocks."""
        found = []
        for i in range(self.n):
            sums = [math.fsum(p.sums[i, k] for p in parts) for k in range(3)]
            below = np.sum([p.below[i] for p in parts], axis=0) if parts else np.zeros(len(self.edges), np.int64)
            found.append(Measure(
                entries=subject.numel, zeros=int(below[0]),
                below={e: int(c) for e, c in zip(self.wanted.epsilons, below[1:], strict=True)},
                l1=sums[0], square=sums[1], fourth=sums[2],
                largest=value_of(max((p.largest[i] for p in parts), default=0)),
                histogram=Histogram.of(self._counts[i], self._lows[i]),
                erased=sum(p.erased[i] for p in parts) if self.wanted.weights else None,
                weight_square=math.fsum(p.weight_square for p in parts) if self.wanted.weights else None,
            ))  # fmt: skip
        return found

    def pairs(self, parts: Sequence[_Part], measures: Sequence[Measure]) -> dict[tuple[int, int], PairMeasure]:
        """The measure of every pair, without the overlap of the largest entries."""
        found = {}
        for k, (a, b) in enumerate(self.combinations):
            both, conflicts, above, above_conflicts = (int(sum(p.pair_counts[k, c] for p in parts)) for c in range(4))
            dot, least, least_conflict, left, right = (math.fsum(p.pair_sums[k, c] for p in parts) for c in range(5))
            found[a, b] = PairMeasure(
                self.subject.numel, both, conflicts, above, above_conflicts, dot, measures[a].square, measures[b].square,
                least, least_conflict, left, right,
            )  # fmt: skip
        return found


def _second(
    subject: AuditedTensor, walker: HeldDeltas, rule: Rule | None, survivals: list[KeepThreshold], wanted: Wanted
) -> tuple[dict[int, Survived], float, dict[tuple[int, int], Any]]:
    """The last walk: merge the deltas as `rule` does, and compare the supports of every pair."""
    n = len(subject.inputs.active)
    if rule is None and not survivals:
        return {}, 0.0, {}
    combine = None
    if rule is not None:
        if survivals and rule.trims_by(Trim("density", wanted.density)):
            rule = with_survivals(rule, survivals, len(subject.inputs.sources), subject.inputs.active)
        combine = rule.prepare(
            TensorPass(subject.numel, walker.walk, CpuOps(), subject.inputs.active, subject.shape), deltas=True
        )
    every = list(combinations(range(n), 2)) if survivals else []
    lows = np.array([s.low for s in survivals], np.uint32)
    cuts = np.array([s.low_cut for s in survivals], np.int64)

    def work(block: Block) -> tuple[Any, float, Any]:
        outcome, square = None, 0.0
        if combine is not None:
            out = SCRATCH.array("audit_out", block.sources.shape[1], np.uint32)
            outcome = combine(block, out, 0)
            squares = np.zeros(1)
            kernels.add_squares(out, squares)
            square = float(squares[0])
        counts = np.zeros((len(every), 4), np.int64)
        for k, (a, b) in enumerate(every):
            kernels.shared_support(
                block.sources[a], block.sources[b], block.index, lows[[a, b]], cuts[[a, b]], counts[k]
            )
        return outcome, square, counts

    parts = walker.walk(work)
    support = {pair: np.sum([p[2][k] for p in parts], axis=0) for k, pair in enumerate(every)}
    if combine is None:
        return {}, 0.0, support
    tally = Tally.empty(n)
    for outcome, _, _ in parts:
        tally.add(outcome.counts, outcome.sums)
    return _survived(tally, subject.numel), math.fsum(square for _, square, _ in parts), support


def _survived(tally: Tally, numel: int) -> dict[int, Survived]:
    counts, sums = tally.counts, tally.total()
    kept, elected = kernels.COUNTS.index("kept"), kernels.COUNTS.index("elected")
    square = [kernels.SUMS.index(name) for name in ("square", "kept_square", "elected_square")]
    return {
        i: Survived(numel, int(c[kept]), int(c[elected]), *(float(sums[i][k]) for k in square))
        for i, c in enumerate(counts)
    }


def _with_support(pair: PairMeasure, counts: Any, numel: int) -> PairMeasure:
    both, either, left, right = (int(c) for c in counts)
    chance = left * right / numel if numel else 0.0
    return replace(pair, kept_both=both, kept_either=either, chance_both=chance, kept_sum=left + right)


def _relate(left: Factored | None, right: Factored | None) -> tuple[float, tuple[float, float]] | None:
    """Inner product and overlap of subspaces from the factors, where both sources have some.

    That product is exact, where the stream rounds each entry to float32 first.
    """
    return left.relate(right) if left and right else None


def _sum_square(rule: Rule | None, active: Sequence[int], measures: Sequence[Measure], pairs: Pairs) -> float:
    """||sum of weight * delta||^2, from the squares and the inner products."""
    given = rule.selection_weights if rule is not None else None
    if given is None:
        return 0.0
    weights = [given[i] for i in active]
    alone = math.fsum(w * w * measures[i].square for i, w in enumerate(weights))
    return alone + 2 * math.fsum(weights[a] * weights[b] * p.dot for (a, b), p in pairs.items())


def _factored(subject: AuditedTensor, i: int) -> Factored | None:
    """The decomposed factors of a source whose delta is one product of factors, else None."""
    factors = subject.inputs.factors(i)
    return Factored.of(*factors) if factors else None


def _not_finite(subject: AuditedTensor, row: int) -> AuditError:
    source = subject.inputs.sources[subject.inputs.active[row]].source
    return AuditError.of(
        "NONFINITE", f"{source}: {subject.name}", "the delta has NaN or infinite values", "repair the source"
    )
