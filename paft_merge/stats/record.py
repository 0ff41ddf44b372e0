"""Statistics of a merged tensor as JSON for journal and manifest, and the metrics computed from that JSON.

The tally of a merge counts every entry: zeros, thresholds, norms, kept and elected entries. Costlier statistics come
from a `Sample` of the entries: fourth powers, a histogram with bins 3 to 6 % wide, erasure by a cast to bfloat16, signs
of two sources. Low-rank factors give singular values, idle components and cosines exactly.
Sampled counts are scaled to the whole tensor: shares and ratios are those of the sample, norms are those of the tally.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from paft_merge.compute import kernels
from paft_merge.compute.magnitudes import EPSILON, EPSILONS
from paft_merge.stats.metrics import ENERGY_SHARES, Histogram, Measure
from paft_merge.stats.pairs import PairMeasure
from paft_merge.stats.sample import Sample
from paft_merge.stats.spectrum import FactorCounts, Factored, Spectrum

DENSITY = 0.2
"""Share of the largest entries of two deltas whose overlap is counted."""

DROPPED = 19
"""Lower bits of a float32 that bins of the histogram ignore: 16 bins per doubling."""

MOST_PAIRED = 32
"""Most sources of a tensor whose pairs are measured. The work and the manifest grow with the square of their number."""

Note = Mapping[str, Any]
Pair = tuple[Any, Any]
"""Factors B `[O, R]` and A `[R, I]`."""


def note(
    sample: Sample, squares: Sequence[float], factors: Iterable[Pair | None], *, pairs: bool = True
) -> dict[str, Any]:
    """The statistics of one tensor's deltas beside the tally, as JSON.

    Args:
        sample: sampled entries of the deltas and the base.
        squares: `[n]`, the sum of squares of each delta.
        factors: `n` of them: the factors of each delta that is one low-rank product, else None.
        pairs: measure every pair of deltas too.

    Returns:
        `{}` where a sum of squares is not finite, or nothing was sampled.
    """
    if not sample.size or not all(map(math.isfinite, squares)):
        return {}
    base, measured, kept = sample.row(-1), list[dict[str, Any]](), list[tuple[Any, Factored | None]]()
    for i, pair in enumerate(factors):
        delta = sample.row(i)
        measured.append(_sampled(delta, base))
        known = Factored.of(*pair, dtype=np.float32) if pair else None
        if known:
            measured[i]["singular_values"] = [_short(v) for v in known.spectrum.values]
            measured[i]["factors"] = known.counts.to_json()
        if pairs:
            kept.append((delta, known))
    tops = [_threshold(one["histogram"], sample.size) for one in measured]
    paired = [
        {"of": [a, b], **_pair(kept[a][0], kept[b][0], (tops[a], tops[b])), **_related(kept[a][1], kept[b][1])}
        for a, b in combinations(range(len(kept)), 2)
    ]
    return {"sampled": sample.size, "sources": measured, "pairs": paired}


def _sampled(delta: Any, base: Any) -> dict[str, Any]:
    """Counts and sums over the sampled entries of one source."""
    packed, (counts, lows) = np.zeros((1, kernels.BINS), np.int64), np.zeros((2, 1, kernels.BINS), np.int64)
    sums, erased, weight, none = np.zeros(2), np.zeros(1, np.int64), np.zeros(1), np.empty(0, np.uint32)
    for start in range(0, delta.size, kernels.MOST):
        some = slice(start, start + kernels.MOST)
        kernels.measure(
            delta[some], base[some], none, none.view(np.int64), packed[0], sums, erased, weight, kernels.lines(1)
        )
        kernels.unpack(packed, counts, lows)
    counts = counts[0]
    filled = np.flatnonzero(counts)
    index = filled >> (DROPPED - 16)
    coarse = np.bincount(index - index[0], counts[filled]).astype(np.int64)
    bins = {"first": int(index[0]), "counts": coarse.tolist()}
    square, fourth = map(float, sums)
    return {
        "square": square, "fourth": fourth, "erased": int(erased[0]), "weight_square": _defined(float(weight[0])),
        "histogram": bins,
    }  # fmt: skip


def _threshold(histogram: Mapping[str, Any], sampled: int) -> int:
    """Bits of the lowest magnitude among the largest `DENSITY` of a sample, to a bin's width; not 0."""
    held = np.cumsum(histogram["counts"][::-1])
    place = len(held) - 1 - int(np.searchsorted(held, DENSITY * sampled))
    return max(int(histogram["first"] + place) << DROPPED, 1)


def _pair(left: Any, right: Any, tops: tuple[int, int]) -> dict[str, Any]:
    """Counts and sums over the sampled entries of two sources."""
    counts, sums, shared = np.zeros(4, np.int64), np.zeros(5), np.zeros(4, np.int64)
    kernels.compare(left, right, np.float32(EPSILON).view(np.uint32), counts, sums)
    kernels.shared_support(left, right, 0, np.array(tops, np.uint32) - np.uint32(1), np.zeros(2, np.int64), shared)
    both, conflicts, above, above_conflicts = map(int, counts)
    dot, least, least_conflict, left_conflict, right_conflict = map(float, sums)
    return {
        "both": both, "conflicts": conflicts, "above": above, "above_conflicts": above_conflicts,
        "dot": dot, "least": least, "least_conflict": least_conflict,
        "left_conflict_square": left_conflict, "right_conflict_square": right_conflict,
        "largest_both": int(shared[0]), "largest": [int(shared[2]), int(shared[3])],
    }  # fmt: skip


def _related(left: Factored | None, right: Factored | None) -> dict[str, Any]:
    if not (left and right):
        return {}
    dot, (of_left, of_right) = left.relate(right)
    return {"exact_dot": _short(dot), "subspace": [_defined(_short(of_left)), _defined(_short(of_right))]}


@dataclass(frozen=True)
class Recorded:
    """The measure of one source's delta in one or several merged tensors."""

    measure: Measure
    spectra: tuple[Spectrum, ...]
    """One for each tensor whose delta is one low-rank product."""
    factors: FactorCounts | None

    @classmethod
    def of(cls, row: Note, entries: int, sampled: int) -> Recorded:
        """From a source's row of the manifest, for a tensor of `entries` entries of which `sampled` were sampled."""
        noted, grown, square = row["sample"], entries / sampled, row["l2"] ** 2
        # Scaled by the squares of the same entries: a smaller error than scaling fourth powers by the number of entries.
        fourth = noted["fourth"] * (square / noted["square"]) ** 2 / grown if noted["square"] else 0.0
        weight, known = noted["weight_square"], row.get("singular_values")
        measure = Measure(
            entries, row["zeros"], {e: row[f"below_{e:.0e}"] for e in EPSILONS}, row["l1"], square, fourth, row["max"],
            _histogram(noted["histogram"], grown), round(noted["erased"] * grown), None if weight is None else weight * grown,
        )  # fmt: skip
        if known is None:
            return cls(measure, (), None)
        return cls(measure, (Spectrum(tuple(known)),), FactorCounts(**row["factors"]))

    @classmethod
    def total(cls, parts: Sequence[Recorded]) -> Recorded:
        """The sum of `parts`, at least one."""
        factors = [p.factors for p in parts if p.factors]
        spectra = tuple(s for p in parts for s in p.spectra)
        return cls(Measure.total([p.measure for p in parts]), spectra, FactorCounts.total(factors) if factors else None)

    def to_json(self) -> dict[str, Any]:
        """The metrics that the tally lacks; ranks are means over tensors."""
        measure, ranks = self.measure, dict[str, float | None]()
        for name in ("stable_rank", "effective_rank") if self.spectra else ():
            known = [rank for s in self.spectra if not math.isnan(rank := getattr(s, name))]
            ranks[name] = math.fsum(known) / len(known) if known else None
        return _rounded_all({
            "bf16_sparsity": measure.bf16_sparsity, "relative_norm": measure.relative_norm,
            "participation": measure.participation, "top_energy": {f"{k:g}": measure.top_energy(k) for k in ENERGY_SHARES},
            **ranks, **({"factors": self.factors.to_json()} if self.factors else {}),
        })  # fmt: skip


def row_of(measured: Note, noted: Note, entries: int, sampled: int) -> dict[str, Any]:
    """A source's row of the manifest: its tally `measured`, and the metrics computed from its statistics `noted`."""
    own = {key: noted[key] for key in ("singular_values", "factors") if key in noted}
    row = {**measured, **own, "sample": {key: value for key, value in noted.items() if key not in own}}
    return {**measured, **Recorded.of(row, entries, sampled).to_json(), **own, "sample": row["sample"]}


def pair_row_of(noted: Note, rows: Sequence[Note], at: Sequence[int], entries: int, sampled: int) -> dict[str, Any]:
    """A pair's row of the manifest.

    Args:
        noted: the statistics of the pair, from `note`.
        rows: the rows of the tensor's sources.
        at: indices of the two sources in `rows`.
        entries, sampled: entries of the tensor, and of its sample.
    """
    subspace = {"subspace": noted["subspace"]} if "subspace" in noted else {}
    row = {"sources": list(at), "sample": {key: value for key, value in noted.items() if key not in ("of", "subspace")}}
    metrics = _pair_json(_pair_of(row, rows, entries, sampled))
    return {"sources": row["sources"], **metrics, **subspace, "sample": row["sample"]}


@dataclass(frozen=True)
class RecordedTensor:
    """The statistics in the manifest of one merged tensor's deltas, by the names of the sources."""

    sources: Mapping[str, Recorded]
    kinds: Mapping[str, str]
    """The manifest's `delta` of each source."""
    pairs: Mapping[tuple[str, str], tuple[PairMeasure, tuple[float, float] | None]]
    """Each with the overlap of the subspaces, or None where one lacks factors."""
    sampled: int
    """Entries of the sample."""

    @classmethod
    def of(cls, entry: Note) -> RecordedTensor | None:
        """From a tensor's entry of the manifest; None where it has no statistics."""
        sampled, entries, rows = entry.get("sampled"), math.prod(shape_of(entry)), entry.get("sources", [])
        if not sampled:
            return None
        names = [row["source"] for row in rows]
        pairs = dict[tuple[str, str], tuple[PairMeasure, tuple[float, float] | None]]()
        for row in entry["pairs"]:
            a, b = row["sources"]
            known = row.get("subspace")
            left, right = (math.nan if value is None else float(value) for value in known or (None, None))
            pairs[names[a], names[b]] = _pair_of(row, rows, entries, sampled), (left, right) if known else None
        held = {row["source"]: row for row in rows if "sample" in row}
        found = {name: Recorded.of(row, entries, sampled) for name, row in held.items()}
        return cls(found, {name: row["delta"] for name, row in held.items()}, pairs, sampled)

    def pair(self, left: str, right: str) -> tuple[PairMeasure, tuple[float, float] | None] | None:
        """The pair of two sources in either order; None where one does not change the tensor."""
        turned = self.pairs.get((right, left))
        return (turned[0].turned, turned[1]) if turned else self.pairs.get((left, right))


def shape_of(entry: Note) -> Sequence[int]:
    """The shape of the delta that an entry of the manifest describes, of which the output may hold a factor or some values."""
    shape: Sequence[int] = entry.get("delta_shape", entry["shape"])
    return shape


class Totals:
    """The statistics of sources and pairs over all merged tensors, added up tensor by tensor."""

    _AT_ONCE = 64
    """Tensors that are kept until they are added up."""

    def __init__(self, order: Iterable[str]) -> None:
        """`order`: the names of the sources."""
        self._place = {name: at for at, name in enumerate(order)}
        self._parts, self._sampled = dict[str, list[Recorded]](), Counter[str]()
        self._pairs = dict[tuple[str, str], PairMeasure]()

    def add(self, entry: Note) -> None:
        """Add a tensor's entry of the manifest."""
        tensor = RecordedTensor.of(entry)
        if tensor is None:
            return
        for name, part in tensor.sources.items():
            self._sampled[name] += tensor.sampled
            parts = self._parts.setdefault(name, [])
            parts.append(part)
            if len(parts) == self._AT_ONCE:
                parts[:] = [Recorded.total(parts)]
        for (left, right), (measure, _) in tensor.pairs.items():
            turned = self._place[left] > self._place[right]
            key, one = ((right, left), measure.turned) if turned else ((left, right), measure)
            so_far = self._pairs.get(key)
            self._pairs[key] = one if so_far is None else PairMeasure.total([so_far, one])

    def result(self) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """The statistics of each source, by its name, and a row for each pair."""
        totals, squares = {}, {}
        for name in (name for name in self._place if name in self._parts):
            total = Recorded.total(self._parts[name])
            squares[name] = total.measure.square
            lows, shares = total.measure.magnitudes()
            totals[name] = {
                "sampled": self._sampled[name], **total.to_json(),
                "magnitudes": _rounded({"from": lows, "share": shares}),
            }  # fmt: skip
        few, pairs = len(self._place) <= MOST_PAIRED, []
        for a, b in combinations(totals, 2):
            if few or (a, b) in self._pairs:
                both = self._pairs.get((a, b), PairMeasure())
                whole = replace(both, left_square=squares[a], right_square=squares[b])
                pairs.append({"sources": [a, b], **_pair_json(whole)})
        return totals, pairs


def _pair_of(row: Note, rows: Sequence[Note], entries: int, sampled: int) -> PairMeasure:
    """The measure of a pair, from its row of the manifest and those of the sources."""
    noted, grown, (a, b) = row["sample"], entries / sampled, (rows[i] for i in row["sources"])
    both, conflicts, above, above_conflicts = (
        round(noted[key] * grown) for key in ("both", "conflicts", "above", "above_conflicts")
    )
    squares = a["l2"] ** 2, b["l2"] ** 2
    own = a["sample"]["square"], b["sample"]["square"]
    left, right = (square / part if part else 0.0 for square, part in zip(squares, own, strict=True))
    dot = noted.get("exact_dot", noted["dot"] * math.sqrt(left * right))
    shared, (one, other) = noted["largest_both"], noted["largest"]
    return PairMeasure(
        entries, both, conflicts, above, above_conflicts, dot, *squares, noted["least"] * grown, noted["least_conflict"] * grown,
        noted["left_conflict_square"] * left, noted["right_conflict_square"] * right,
        round(shared * grown), round((one + other - shared) * grown), one * other / sampled * grown, round((one + other) * grown),
    )  # fmt: skip


def _pair_json(measure: PairMeasure) -> dict[str, Any]:
    counted = ("both", "conflicts", "above", "above_conflicts")
    return _rounded_all({key: value for key, value in measure.to_json().items() if key not in counted})


def _histogram(noted: Note, grown: float) -> Histogram:
    counts = np.array(noted["counts"], np.float64) * grown
    filled = np.flatnonzero(counts)
    bins = Histogram(noted["first"] + filled, counts[filled], np.zeros(len(filled)), DROPPED)
    low, high = bins.edges
    return replace(bins, l1=bins.count * (low + high) / 2)


def _rounded(value: Any) -> Any:
    """Every number rounded to six digits, and None for undefined ones."""
    if isinstance(value, float):
        return _defined(_short(value))
    if isinstance(value, Mapping):
        return _rounded_all(value)
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def _rounded_all(found: Note) -> dict[str, Any]:
    return {key: _rounded(one) for key, one in found.items()}


def _short(value: float) -> float:
    """Six digits: further digits depend on the order of summation of a processor."""
    return float(f"{value:.6g}")


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None
