"""Counts and sums of a delta that add up over tensors, and the metrics computed from them.

A `Measure` covers n entries d_1 .. d_n of one tensor, a layer, a kind of module or a whole model; the measure of the whole is the
sum of those of its parts. Counts are exact and sums are float64. Metrics by rank, or by a threshold that is known only at the
end (energy of the largest entries, shares relative to rms or maximum), come from a histogram whose bins are 0.4 to 0.8 %
wide. Inside the one bin that contains the threshold, entries are assumed to be spread around the bin's mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paft_merge.compute.histogram import l1_of_bins

ENERGY_SHARES = (0.01, 0.05, 0.10, 0.20, 0.50)
"""Shares of the entries whose energy is reported."""

UNDEFINED = math.nan
"""The value of a metric that is undefined, such as the Hoyer sparsity of an all-zero delta; `null` in JSON."""


@dataclass(frozen=True)
class Histogram:
    """A histogram of magnitudes by their upper bits: its nonempty bins, smallest magnitude first."""

    index: NDArray[np.int64]
    """Upper bits of the magnitudes in each bin."""
    count: NDArray[Any]
    """Entries of each bin: int64, or float64 where estimated from a sample."""
    l1: NDArray[np.float64]
    """Sum of the magnitudes of each bin."""
    dropped: int = 16
    """Lower bits of a float32 that bins ignore; 16 give bins 0.4 to 0.8 % wide."""

    @classmethod
    def of(cls, counts: NDArray[np.int64], lows: NDArray[np.int64]) -> Histogram:
        """From `[BINS]` counts and sums of the lower 16 bits (see `histogram.l1_of_bins`)."""
        index = np.flatnonzero(counts)
        return cls(index, counts[index], l1_of_bins(counts, lows)[index])

    @classmethod
    def total(cls, parts: Iterable[Histogram]) -> Histogram:
        """The sum of `parts`, at least one, whose bins are equally wide."""
        held = list(parts)
        bins, dropped = 1 << (31 - held[0].dropped), held[0].dropped
        counts, l1 = np.zeros(bins, held[0].count.dtype), np.zeros(bins)
        for part in held:
            counts[part.index] += part.count
            l1[part.index] += part.l1
        index = np.flatnonzero(counts)
        return cls(index, counts[index], l1[index], dropped)

    @property
    def energy(self) -> NDArray[np.float64]:
        """Sum of squares of each bin, with a relative error below 1.5e-5 because the entries of a bin are nearly equal."""
        return np.asarray(self.l1 * self.l1 / np.maximum(self.count, 1))

    @property
    def edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lowest magnitude of each bin, and of the bin above it."""
        return _magnitude(self.index << self.dropped), _magnitude((self.index + 1) << self.dropped)

    def count_up_to(self, magnitude: float) -> float:
        """The number of entries not above `magnitude`, exact except within the bin that contains it.

        There, entries are assumed to be spread evenly over the widest range around the bin's mean. This also counts entries on
        a lattice correctly (differences of two float16 values), which sit on one edge of a bin.
        """
        low, high = self.edges
        mean = self.l1 / np.maximum(self.count, 1)
        reach = np.minimum(mean - low, high - mean).clip(min=0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside = np.clip((magnitude - mean + reach) / (2 * reach), 0.0, 1.0)
        inside = np.where(reach > 0, inside, magnitude >= mean * (1 - 1e-9))
        return float((self.count * inside).sum())

    def energy_curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Cumulative counts and energies from the largest magnitude down, both starting at 0."""
        count, energy = self.count[::-1], self.energy[::-1]
        return np.concatenate([[0], np.cumsum(count)]).astype(np.float64), np.concatenate([[0], np.cumsum(energy)])


@dataclass(frozen=True)
class Measure:
    """Counts and sums over the entries of a delta."""

    entries: int
    zeros: int
    below: Mapping[float, int]
    """Entries with |delta| below each threshold, compared in float32; zeros included."""
    l1: float
    square: float
    fourth: float
    largest: float
    histogram: Histogram
    erased: int | None = None
    """Entries with bf16(weight + delta) == bf16(weight); None where the weights are not available."""
    weight_square: float | None = None
    coded: int = 0
    """Entries of quantised weights, where those are available."""
    same_codes: int = 0
    """Those of them whose code stays the same when the delta is added and the sum is rounded to the grid of the weight."""

    @classmethod
    def total(cls, parts: Sequence[Measure]) -> Measure:
        """The sum of `parts`, at least one."""
        known = all(p.erased is not None for p in parts)
        return cls(
            entries=sum(p.entries for p in parts),
            zeros=sum(p.zeros for p in parts),
            below={e: sum(p.below[e] for p in parts) for e in parts[0].below},
            l1=math.fsum(p.l1 for p in parts),
            square=math.fsum(p.square for p in parts),
            fourth=math.fsum(p.fourth for p in parts),
            largest=max(p.largest for p in parts),
            histogram=Histogram.total(p.histogram for p in parts),
            erased=sum(p.erased or 0 for p in parts) if known else None,
            weight_square=math.fsum(p.weight_square or 0.0 for p in parts) if known else None,
            coded=sum(p.coded for p in parts),
            same_codes=sum(p.same_codes for p in parts),
        )

    def sparsity(self, epsilon: float) -> float:
        """Share of entries with |delta| < `epsilon`, in [0, 1] (PAFT, arXiv:2406.17923, sec. 2.2).

        Raises:
            KeyError: `epsilon` was not counted.
        """
        return ratio(self.below[epsilon], self.entries)

    @property
    def zero_share(self) -> float:
        """Share of entries that are exactly zero."""
        return ratio(self.zeros, self.entries)

    @property
    def bf16_sparsity(self) -> float | None:
        """Share of entries that a cast of weight + delta to bfloat16 erases, zeros included; None without the weights."""
        return None if self.erased is None else ratio(self.erased, self.entries)

    @property
    def quantised_sparsity(self) -> float | None:
        """Share of the entries of quantised weights that their grid erases, zeros included; None where there are none."""
        return ratio(self.same_codes, self.coded) if self.coded else None

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return math.sqrt(self.square)

    @property
    def rms(self) -> float:
        """Root mean square of the entries."""
        return math.sqrt(ratio(self.square, self.entries)) if self.entries else UNDEFINED

    @property
    def relative_norm(self) -> float | None:
        """Norm over the norm of the base's weights; None without them."""
        return None if self.weight_square is None else ratio(self.norm, math.sqrt(self.weight_square))

    @property
    def hoyer(self) -> float:
        """Hoyer sparsity: see `hoyer`."""
        return hoyer(self.entries, self.l1, self.norm)

    @property
    def participation(self) -> float:
        """(sum d^2)^2 / (n sum d^4): the share of entries that carry the energy; a Gaussian has 1/3."""
        return ratio(self.square * self.square, self.entries * self.fourth)

    def relative_rms(self, share: float) -> float:
        """Share of entries with |delta| <= `share` * rms."""
        return ratio(self.histogram.count_up_to(share * self.rms), self.entries) if self.square else UNDEFINED

    def relative_max(self, share: float) -> float:
        """Share of entries with |delta| <= `share` * max |delta|."""
        return ratio(self.histogram.count_up_to(share * self.largest), self.entries) if self.square else UNDEFINED

    def top_energy(self, share: float) -> float:
        """Share of sum d^2 in the largest `share` of the entries."""
        count, energy = self.histogram.energy_curve()
        return ratio(float(np.interp(share * self.entries, count, energy)), float(energy[-1]))

    def density_for(self, energy: float) -> float:
        """The smallest share of the entries with the share `energy` of sum d^2."""
        counts, energies = self.histogram.energy_curve()
        if not energies[-1]:
            return UNDEFINED
        return ratio(float(np.interp(energy * energies[-1], energies, counts)), self.entries)

    def magnitudes(self, per_decade: int = 8) -> tuple[list[float], list[float]]:
        """A logarithmic histogram for plots, without zeros.

        Returns:
            Lower edges of its bins, `per_decade` in each power of ten; and the share of the entries in each bin.
        """
        low, high = self.histogram.edges
        inside = (self.histogram.index > 0) & (high > 0)
        if not inside.any():
            return [], []
        # A bin across an edge is split there, as if its entries were spread evenly.
        ends = np.log10(np.stack([low[inside], high[inside]], 1)).ravel() * per_decade
        held = np.cumsum(self.histogram.count[inside])
        below = np.stack([np.concatenate([[0], held[:-1]]), held], 1).ravel()
        edges = np.arange(math.floor(ends[0]), math.ceil(ends[-1]) + 1)
        shares = np.diff(np.interp(edges, ends, below)) / self.entries
        return [float(10.0 ** (p / per_decade)) for p in edges[:-1]], [float(s) for s in shares]

    def to_json(self) -> dict[str, Any]:
        """Every metric by its name in the report's JSON."""
        return {
            "entries": self.entries,
            "zeros": self.zero_share,
            "sparsity": {f"{e:g}": self.sparsity(e) for e in self.below},
            "bf16_sparsity": self.bf16_sparsity,
            "quantised_sparsity": self.quantised_sparsity,
            "relative_rms": {"0.01": self.relative_rms(0.01), "0.1": self.relative_rms(0.1)},
            "relative_max": {
                "0.001": self.relative_max(0.001),
                "0.01": self.relative_max(0.01),
                "0.1": self.relative_max(0.1),
            },
            "hoyer": self.hoyer,
            "participation": self.participation,
            "top_energy": {f"{k:g}": self.top_energy(k) for k in ENERGY_SHARES},
            "density_for": {f"{e:g}": self.density_for(e) for e in (0.5, 0.9, 0.99)},
            "l1": self.l1,
            "norm": self.norm,
            "rms": self.rms,
            "largest": self.largest,
            "relative_norm": self.relative_norm,
        }


def hoyer(entries: int, l1: float, l2: float) -> float:
    """(sqrt(n) - L1 / L2) / (sqrt(n) - 1): 0 for equal entries, 0.20 for a Gaussian, 1 for one entry.

    Hoyer 2004, sec. 3.1. UNDEFINED for an all-zero delta and for a single entry.
    """
    root = math.sqrt(entries)
    return ratio(root - ratio(l1, l2), root - 1)


def ratio(part: float, whole: float) -> float:
    """`part / whole`; UNDEFINED where `whole` is 0."""
    return part / whole if whole else UNDEFINED


def _magnitude(bits: Any) -> NDArray[np.float64]:
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)  # type: ignore[no-any-return]
