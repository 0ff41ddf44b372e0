"""Measures one tensor: the delta of each source, every pair of deltas, and the entries that a merge would keep.

n active sources; blocks come from `HeldDeltas`. Counts do not depend on the order in which blocks are done, and sums are
taken block by block and added in tile order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, pairwise
from threading import Lock
from typing import Any

import numpy as np

from paft_merge.auditing.opening import AuditedTensor
from paft_merge.auditing.preview import Survived, with_survivals
from paft_merge.auditing.walk import HeldDeltas
from paft_merge.compute import kernels
from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.blocks import Block, Election, KeepThreshold, Outcome, Tally, Undecided
from paft_merge.compute.cpu_ops import CpuOps, undecided
from paft_merge.compute.histogram import bits_of, exact_sum, value_of
from paft_merge.compute.magnitudes import INFINITY
from paft_merge.compute.scratch import SCRATCH
from paft_merge.errors import AuditError
from paft_merge.inputs.quantized.code_intervals import unmoved
from paft_merge.inputs.quantized.dequantized import Dequantized
from paft_merge.methods.rules.one_pass import OnePass, plan_one_pass
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
    """Measure one tensor in one walk, or in several (from memory where it fits) where its thresholds cannot be guessed.

    Raises:
        AuditError: NONFINITE, naming the tensor and the source.
    """
    active = subject.inputs.active
    decomposed = [walker.pool.submit(_factored, subject, i) for i in active]
    seen = _seen(subject, walker, wanted, rule)
    factored = [later.result() for later in decomposed]
    related = {(a, b): walker.pool.submit(_relate, factored[a], factored[b]) for a, b in seen.pairs}
    pairs, subspaces = dict(seen.pairs), {}
    for (a, b), later in related.items():
        relation = later.result()
        if relation is not None:
            pairs[a, b] = replace(pairs[a, b], dot=relation[0])
            subspaces[active[a], active[b]] = relation[1]
    return TensorStats(
        dict(zip(active, seen.measures, strict=True)),
        {i: (f.spectrum, f.counts) for i, f in zip(active, factored, strict=True) if f},
        {(active[a], active[b]): pair for (a, b), pair in pairs.items()},
        subspaces,
        {active[i]: s for i, s in seen.survived.items()},
        seen.merged_square,
        _sum_square(rule, active, seen.measures, pairs),
    )


@dataclass(frozen=True)
class _Seen:
    """Counts and sums over the entries of one tensor; sources are rows of its blocks."""

    measures: Sequence[Measure]
    pairs: Pairs
    survived: Mapping[int, Survived]
    merged_square: float


def _seen(subject: AuditedTensor, walker: HeldDeltas, wanted: Wanted, rule: Rule | None) -> _Seen:
    """Measure a tensor while it is read: entries near a threshold are set aside until it is known (see `one_pass`).

    Where thresholds cannot be guessed, the deltas are stored for further walks. A missed guess is followed by such walks too.
    """
    first = _First(subject, wanted)
    largest, previewed = _guesses(subject, walker, wanted, rule, first)
    passes = [one for one in dict.fromkeys((largest, previewed)) if one is not None]
    with walker.first(passes, store=rule is not None and previewed is None) as each:
        parts = each(lambda block: first.work(block, passes, merge=previewed is not None))
        return _decided(subject, walker, wanted, rule, first, parts, largest, previewed)


def _decided(
    subject: AuditedTensor, walker: HeldDeltas, wanted: Wanted, rule: Rule | None, first: _First, parts: Sequence[_Part],
    largest: OnePass | None, previewed: OnePass | None,
) -> _Seen:  # fmt: skip
    """Settle the undecided entries of the first walk's `parts`, and walk again for what was not guessed (see `_guesses`)."""
    passes = [one for one in dict.fromkeys((largest, previewed)) if one is not None]
    starts, asides = (
        [start for start, _ in subject.bounds],
        {one: [p.undecided[i] for p in parts] for i, one in enumerate(passes)},
    )
    known = {one: one.thresholds(starts, aside) for one, aside in asides.items()}
    supported = largest is not None and known[largest] is not None
    survivals = list[KeepThreshold]()
    if first.combinations and not supported:
        trims = [Trim("density", wanted.density)] * first.n
        survivals = trim_survivals(trims, subject.numel, walker.walk, CpuOps(), full=first.full)
    support = sum((p.support for p in parts if supported), first.no_support())
    settled = [
        later
        for one, thresholds in known.items()
        if thresholds is not None
        for later in walker.pool.map(
            partial(first.settle, one, thresholds, count=one is largest, merge=one is previewed),
            *_together(starts, asides[one]),
        )
    ]
    support = sum((s.support for s in settled), support)
    measures = first.measures(parts)
    survived, square = dict[int, Survived](), 0.0
    if previewed is not None and known[previewed] is not None:
        tally = Tally.empty(first.n)
        for outcome in (*(s.outcome for s in settled), *(p.outcome for p in parts)):
            tally.add(outcome.counts, outcome.sums)
        square = math.fsum([*(float(p.merged[0]) for p in parts), *(s.square for s in settled)])
        survived, rule = _survived(tally, [m.square for m in measures], subject.numel), None
    if rule is not None or survivals:
        survived_later, square_later, support_later = _second(subject, walker, rule, survivals, wanted, first)
        survived, square, support = survived_later or survived, square_later or square, support + support_later
    return _Seen(measures, first.pairs(parts, measures, support), survived, square)


def _guesses(
    subject: AuditedTensor, walker: HeldDeltas, wanted: Wanted, rule: Rule | None, first: _First
) -> tuple[OnePass | None, OnePass | None]:
    """Brackets for the supports of all pairs, and those of the merge to preview; None where there is nothing to guess, or no guess."""
    active, each = subject.inputs.active, BlockWalk([subject.stored], walker.pool)
    factors = cache(lambda k: subject.inputs.factors(active[k]))
    trim = Trim("density", wanted.density)
    previewed = None
    if rule is not None:
        previewed = rule.one_pass(TensorPass(subject.numel, each, CpuOps(), active, subject.shape, factors))
    if not first.combinations:
        return None, previewed
    if rule is not None and rule.trims_by(trim):
        return previewed, previewed
    every = Election((1.0,) * len(active))
    return plan_one_pass([trim] * len(active), every, subject.numel, each, CpuOps(), factors), previewed


_TOGETHER = 4 << 20
"""Bytes of undecided entries that are settled at once."""


def _together(
    starts: Sequence[int], undecided: Sequence[Undecided]
) -> tuple[list[Sequence[int]], list[Sequence[Undecided]]]:
    """Split the blocks of a tensor, and where each begins, so that each part has `_TOGETHER` bytes of undecided entries or one block."""
    sizes, cuts = np.cumsum([one.held.nbytes for one in undecided]), [0]
    while cuts[-1] < len(undecided):
        before = int(sizes[cuts[-1] - 1]) if cuts[-1] else 0
        cuts.append(max(int(np.searchsorted(sizes, before + _TOGETHER, side="right")), cuts[-1] + 1))
    parts = [slice(*two) for two in pairwise(cuts)]
    return [starts[part] for part in parts], [undecided[part] for part in parts]


_NO_MEMORY = np.empty(0, np.uint8)


def _grid(subject: AuditedTensor) -> tuple[Dequantized, str] | None:
    """The checkpoint and the name of a base that is stored as codes; None for another base."""
    base = subject.inputs.base
    if base is None or base.delta or not isinstance(held := base.checkpoint, Dequantized):
        return None
    return (held, base.name) if base.name in held.weights and base.shape == subject.shape else None


def _count_same_codes(block: Block, held: Dequantized, name: str, counts: Any) -> None:
    """Write into `counts` `[n]` how many entries of each source the grid of the base erases."""
    base, sources = block.base.view(np.float32), block.sources.view(np.float32)
    low, high = held.intervals(name, block.index, block.index + block.size)
    for start in range(0, block.size, kernels.CACHED):
        some = slice(start, start + kernels.CACHED)
        for i, source in enumerate(sources):
            values = source[some] if block.subtract else base[some] + source[some]
            counts[i] += unmoved(values, low[some], high[some])


def _square(bits: Any) -> float:
    squares = np.zeros(1)
    kernels.add_squares(bits, squares)
    return float(squares[0])


@dataclass(frozen=True)
class _Part:
    """The counts and sums of one block, with a row for each source or pair (see `kernels.statistics.survey`)."""

    below: Any
    largest: Any
    sums: Any
    erased: Any
    weight_square: Any
    pair_counts: Any
    pair_sums: Any
    support: Any
    outcome: Outcome
    """Of the preview, without the undecided entries."""
    merged: Any
    """`[1]`: sum of squares of the merged block, whose undecided entries are zero."""
    undecided: list[Undecided]
    """For each pass."""
    same_codes: Any
    """`[n]` int64: entries of a quantised weight that its grid erases; `[0]` for another weight."""

    @classmethod
    def empty(cls, n: int, edges: int, pairs: int, *, weights: bool, coded: bool) -> _Part:
        known = n if weights else 0
        return cls(
            np.zeros((n, edges), np.int64), np.zeros(n, np.uint32), np.zeros((n, 2)), np.zeros(known, np.int64), np.zeros(known),
            np.zeros((pairs, 4), np.int64), np.zeros((pairs, 5)), np.zeros((pairs, 4), np.int64), Outcome.empty(n), np.zeros(1), [],
            np.zeros(n if coded else 0, np.int64),
        )  # fmt: skip


@dataclass(frozen=True)
class _Settled:
    """The counts and sums of undecided entries, once their thresholds are known; zeros for what is not wanted."""

    support: Any
    outcome: Outcome
    square: float
    """Sum of squares of the merged entries."""


class _First:
    """The first pass: each delta alone and, where wanted, against every other one."""

    def __init__(self, subject: AuditedTensor, wanted: Wanted) -> None:
        self.subject, self.wanted, self.n = subject, wanted, len(subject.inputs.active)
        self.edges = np.array([bits_of(1e-45), *map(bits_of, wanted.epsilons)], np.uint32)
        self.combinations = list(combinations(range(self.n), 2)) if wanted.pairs else []
        self._counts = np.zeros((self.n, kernels.BINS), np.int64)
        self._lows = np.zeros((self.n, kernels.BINS), np.int64)
        self._lock = Lock()
        self.grid = _grid(subject)

    def work(self, block: Block, passes: Sequence[OnePass] = (), *, merge: bool = False) -> _Part:
        """Measure one block.

        Args:
            block: deltas, or values to subtract the base from.
            passes: the brackets of the pairs' supports first, and last those of the merge to preview; the same may be both.
            merge: whether to preview the last.
        """
        n, size, many = self.n, block.size, len(passes)
        part = _Part.empty(
            n, len(self.edges), len(self.combinations), weights=self.wanted.weights, coded=self.grid is not None
        )
        if self.grid is not None:
            _count_same_codes(block, *self.grid, part.same_codes)
        edge = np.uint32(max(bits_of(self.wanted.epsilon), 1))
        # Zeros at first and after `unpack`. A block that fails leaves others, and ends the audit.
        packed = SCRATCH.array("packed bins", (n, kernels.BINS), np.int64, sparse=True)
        moved = np.zeros((2, n, kernels.BINS if size > kernels.MOST else 0), np.int64)
        made = SCRATCH.array("audit_deltas", (n, kernels.CACHED if block.subtract else 0), np.float32)
        bounds = np.array([one.bounds(block.index, block.index + size) for one in passes], np.uint32).reshape(
            many, n, 2
        )
        place = SCRATCH.array("open_place", (many, size), np.int32)
        held = SCRATCH.array("open_held", (many, n + 1, size), np.float32, sparse=True)
        found = SCRATCH.array("open_found", (many, n, size), np.uint32, sparse=True)
        tally = np.zeros((many, n + 1, 2), np.int64)
        election = passes[-1].election if merge else Election((1.0,) * n)
        block.filled(kernels.survey(
            *block.unfilled(), made, self.edges, part.below, packed, kernels.MOST, *moved, part.largest, part.sums,
            part.erased, part.weight_square, edge, part.pair_counts, part.pair_sums, part.support,
            *np.ascontiguousarray(bounds.transpose(2, 0, 1)), place, held, found, tally,
            np.array(election.weights, np.float32), kernels.ELECT[election.elect] if merge else -1, election.tie_positive,
            kernels.NORMALIZE[election.normalize], float(election.factor), part.outcome.counts, part.outcome.sums, part.merged,
            np.empty(n, np.uint32), np.empty(2, np.uint32), np.empty(2, np.int64), kernels.lines(n + 5),
        ))  # fmt: skip
        with self._lock:  # integers: the order of blocks does not matter
            kernels.unpack(packed, self._counts, self._lows)
            if moved.size:
                self._counts += moved[0]
                self._lows += moved[1]
        if part.largest.max() >= INFINITY:
            raise _not_finite(self.subject, int(np.argmax(part.largest >= INFINITY)))
        part.undecided.extend(undecided(place[p], held[p], found[p], tally[p], _NO_MEMORY) for p in range(many))
        return part

    @property
    def full(self) -> tuple[Any, Any]:
        """The histograms of all blocks, as `thresholds.trim_survivals` takes them."""
        return self._counts, self._lows

    def no_support(self) -> Any:
        """`[pairs, 4]` zeros; see `count_support`."""
        return np.zeros((len(self.combinations), 4), np.int64)

    def count_support(self, deltas: Any, index: int, survivals: Sequence[KeepThreshold], support: Any) -> None:
        """Add to `support` `[pairs, 4]` the entries of `deltas` `[n, E]` that survive in both, either and each."""
        lows = np.array([s.low for s in survivals], np.uint32)
        cuts = np.array([s.low_cut for s in survivals], np.int64)
        for k, (a, b) in enumerate(self.combinations):
            kernels.shared_support(deltas[a], deltas[b], index, lows[[a, b]], cuts[[a, b]], support[k])

    def settle(
        self, one: OnePass, thresholds: Sequence[KeepThreshold], starts: Sequence[int], undecided: Sequence[Undecided],
        *, count: bool, merge: bool,
    ) -> _Settled:  # fmt: skip
        """Count and merge the undecided entries of some blocks, side by side.

        Args:
            one, thresholds: their brackets, and the threshold of each source.
            starts: flat index of the first element of each block.
            undecided: the entries of each block.
            count: whether to count the supports of the pairs.
            merge: whether to merge, for the preview.
        """
        origin, many = starts[0], sum(u.place.size for u in undecided)
        place = SCRATCH.array("settled_place", many, np.int64)
        np.concatenate([u.place for u in undecided], out=place)
        place += np.repeat(np.array(starts) - origin, [u.place.size for u in undecided])
        held = SCRATCH.array("settled_held", (self.n + 1, many), np.float32)
        np.concatenate([u.held for u in undecided], axis=1, out=held)
        entries = Undecided(place, held, [], np.empty(0, np.int64))
        support, outcome, square = self.no_support(), Outcome.empty(self.n), 0.0
        if count:
            self.count_support(held.view(np.uint32)[:-1], 0, entries.within(origin, thresholds), support)
        if merge:
            square = _square(one.resolved(origin, entries, thresholds, outcome, np.uint32))
        return _Settled(support, outcome, square)

    def measures(self, parts: Sequence[_Part]) -> list[Measure]:
        """The measure of every source, from all blocks."""
        found = []
        for i in range(self.n):
            square, fourth = (math.fsum(p.sums[i, k] for p in parts) for k in range(2))
            histogram = Histogram.of(self._counts[i], self._lows[i])
            below = np.sum([p.below[i] for p in parts], axis=0) if parts else np.zeros(len(self.edges), np.int64)
            found.append(Measure(
                entries=self.subject.numel, zeros=int(below[0]),
                below={e: int(c) for e, c in zip(self.wanted.epsilons, below[1:], strict=True)},
                l1=exact_sum(histogram.l1), square=square, fourth=fourth,
                largest=value_of(max((int(p.largest[i]) for p in parts), default=0)),
                histogram=histogram,
                erased=sum(int(p.erased[i]) for p in parts) if self.wanted.weights else None,
                weight_square=math.fsum(p.weight_square[i] for p in parts) if self.wanted.weights else None,
                coded=self.subject.numel if self.grid else 0,
                same_codes=sum(int(p.same_codes[i]) for p in parts) if self.grid else 0,
            ))  # fmt: skip
        return found

    def pairs(
        self, parts: Sequence[_Part], measures: Sequence[Measure], support: Any
    ) -> dict[tuple[int, int], PairMeasure]:
        """The measure of every pair; `support` `[pairs, 4]`: see `count_support`."""
        found, numel = {}, self.subject.numel
        for k, (a, b) in enumerate(self.combinations):
            seen, opposed, above, above_opposed = (int(sum(p.pair_counts[k, c] for p in parts)) for c in range(4))
            dot, least, least_conflict, left, right = (math.fsum(p.pair_sums[k, c] for p in parts) for c in range(5))
            both, either, of_left, of_right = map(int, support[k])
            found[a, b] = PairMeasure(
                numel, seen, opposed, above, above_opposed, dot, measures[a].square, measures[b].square, least, least_conflict, left, right,
                both, either, of_left * of_right / numel if numel else 0.0, of_left + of_right,
            )  # fmt: skip
        return found


def _second(
    subject: AuditedTensor,
    walker: HeldDeltas,
    rule: Rule | None,
    survivals: list[KeepThreshold],
    wanted: Wanted,
    first: _First,
) -> tuple[dict[int, Survived], float, Any]:
    """The last walk: merge the deltas as `rule` does, and compare the supports of every pair."""
    total = first.no_support()
    combine = None
    if rule is not None:
        if survivals and rule.trims_by(Trim("density", wanted.density)):
            rule = with_survivals(rule, survivals, len(subject.inputs.sources), subject.inputs.active)
        combine = rule.prepare(
            TensorPass(subject.numel, walker.walk, CpuOps(), subject.inputs.active, subject.shape), deltas=True
        )

    def work(block: Block) -> tuple[Any, float, Any]:
        outcome, square = None, 0.0
        if combine is not None:
            out = SCRATCH.array("audit_out", block.sources.shape[1], np.uint32)
            outcome = combine(block, out, 0)
            square = _square(out)
        counts = np.zeros_like(total)
        if survivals:
            first.count_support(block.sources, block.index, survivals, counts)
        return outcome, square, counts

    parts = walker.walk(work)
    for _, _, counts in parts:
        total += counts
    if combine is None:
        return {}, 0.0, total
    tally = Tally.empty(first.n)
    for outcome, _, _ in parts:
        tally.add(outcome.counts, outcome.sums)
    squares = [float(square) for square in tally.total()[:, kernels.SUMS.index("square")]]
    return _survived(tally, squares, subject.numel), math.fsum(square for _, square, _ in parts), total


def _survived(tally: Tally, squares: Sequence[float], numel: int) -> dict[int, Survived]:
    """What a merge keeps of each source, whose sum of squares is in `squares`."""
    counts, sums = tally.counts, tally.total()
    kept, elected = kernels.COUNTS.index("kept"), kernels.COUNTS.index("elected")
    energies = [kernels.SUMS.index(name) for name in ("kept_square", "elected_square")]
    return {
        i: Survived(
            numel, int(counts[i, kept]), int(counts[i, elected]), square, *(float(sums[i, k]) for k in energies)
        )
        for i, square in enumerate(squares)
    }


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
