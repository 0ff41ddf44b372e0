"""Which entries of a delta survive: thresholds by rank, by L1 mass or fixed, random drops, and rescaling.

Magnitudes are compared as the bits of a float32 without its sign, which sort as the absolute values do. A threshold by rank
is exact: the k-th largest of a whole tensor. It takes two passes and never sorts the tensor: the first bounds the threshold
by a bracket, from a sample or a full histogram, the second collects the few magnitudes inside the bracket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, ClassVar, Literal

import numpy as np
import xxhash

from paft_merge.compute.block_walk import BlockWalk
from paft_merge.compute.blocks import NOTHING, Counts, KeepThreshold, Ops
from paft_merge.compute.histogram import bits_of, exact_sum, l1_of_bins, squares_of_bins, value_of
from paft_merge.compute.kernels import BINS
from paft_merge.compute.magnitudes import INFINITY
from paft_merge.methods.rules.threshold_bounds import (
    EVERY,
    FOREVER,
    NOWHERE,
    Bracket,
    guess_bracket,
    largest,
    samples_of,
    small,
)
from paft_merge.methods.rules.walks import COLLECT, ELECT, HISTOGRAM_SUMS, Walks

_LISTED = 16
"""If more than one in this many of a tile's magnitudes is collected, distinct ones are kept with their counts, which are few."""


@dataclass(frozen=True)
class Trim:
    """Which entries of one delta survive by their magnitude.

    `density`  the `kept_count(numel, value)` largest entries (TIES-Merging, arXiv:2306.01708, sec. 3.1; their k / 100).
    `count`    the `value` largest entries.
    `l1_mass`  the fewest largest entries that have the share `value` of the delta's L1 norm.
    `epsilon`  the entries with |delta| > `value` (PAFT, arXiv:2406.17923, sec. 2.2 calls the others sparse).
    `outliers` as `density`, after the largest `int(gamma * numel)` are dropped (Breadcrumbs, arXiv:2312.06795), or
               fewer if too few others would be left for the density.
    """

    rule: Literal["density", "count", "l1_mass", "epsilon", "outliers"]
    value: float
    gamma: float = 0.0
    soft: bool = False
    """Take the threshold's magnitude off the survivors too: the proximal step of the L1 norm."""

    def keeps_all(self, numel: int) -> bool:
        """Whether all of `numel` entries survive, whatever they are."""
        return self.rule != "epsilon" and self.value >= (numel if self.rule == "count" else 1)

    def ranks(self, numel: int) -> list[int]:
        """The ranks (1 is the largest of `numel`) of the last entry kept and, for outliers, of the last one dropped.

        Empty if everything or nothing is kept, and for `epsilon` and `l1_mass`, which need the entries.
        """
        if self.keeps_all(numel) or self.value <= 0 or self.rule in ("epsilon", "l1_mass"):
            return []
        if self.rule == "outliers":
            wanted, top = int(self.value * numel), int(self.gamma * numel)
            dropped = numel - max(0, numel - wanted - top) - wanted
            return [wanted + dropped, *([dropped] if dropped else [])] if wanted else []
        return [kept_count(numel, self.value) if self.rule == "density" else int(self.value)]


EVERYTHING = Trim("density", 1.0)

Rescale = Literal["none", "l1", "l2"]
"""The norm of a delta that scaling the survivors restores. L1 is mergekit's rule, L2 that of DoTS (arXiv:2605.00610)."""


def kept_count(numel: int, density: float) -> int:
    """How many of `numel` entries a density keeps: `int(density * numel)`, at least one; all if it is 1 or more, none if 0 or less.

    This is mergekit's rule. PEFT may keep no entry of a small tensor, and other tools keep every tie of the last entry.
    """
    if density >= 1:
        return numel
    return 0 if density <= 0 or numel == 0 else max(1, int(density * numel))


def stream_key(seed: int, source: str, name: str, purpose: str) -> int:
    """The 64-bit key of the random numbers for one source's tensor: the same in any order, on any shard and thread."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{source}\0{name}\0{purpose}".encode()) or 1


def drop_survival(density: float, key: int) -> KeepThreshold:
    """Keep each entry with probability `density`, by SplitMix64 of (`key`, flat index); resolution 2**-32."""
    return KeepThreshold(keep=min(max(round(density * 2**32), 0), 2**32), key=key)


def rescale_drops(
    survivals: Sequence[KeepThreshold], each: BlockWalk, ops: Ops, rescale: Rescale
) -> list[KeepThreshold]:
    """Scale the survivors of a random drop by (norm before / norm after), with the L1 norm as mergekit's DARE does.

    The DARE paper (arXiv:2311.03099) divides by the density instead; it agrees with the L1 norm in expectation.
    """
    blocks = each(lambda block: ops.dropped_norms(block, survivals, squares=rescale == "l2"))
    sums = [[math.fsum(block[i, k] for block in blocks) for k in (0, 1)] for i in range(len(survivals))]
    return [replace(s, scale=norm_ratio(rescale, *both)) for s, both in zip(survivals, sums, strict=True)]


def trim_survivals(
    trims: Sequence[Trim],
    numel: int,
    each: BlockWalk,
    ops: Ops,
    *,
    rescale: Rescale = "none",
    full: tuple[Counts, Counts] | None = None,
    factors: Sequence[Callable[[], tuple[Any, Any] | None]] = (),
) -> list[KeepThreshold]:
    """Resolve every source's trim of one tensor into a threshold, reading the tensor at most three times.

    Args:
        trims: one a source.
        numel: entries of the tensor.
        each, ops: the walk over its blocks, and the operations on them.
        rescale: scale the survivors so that the delta keeps this norm.
        full: the histogram of every source with its lower bits (`Ops.histogram`), if it is known already.
        factors: of each source, see `threshold_bounds.samples_of`.

    Returns:
        One `KeepThreshold` a source. Ties at a threshold keep the lowest flat indices.
    """
    if numel == 0:
        return [KeepThreshold()] * len(trims)
    return _Search(trims, numel, each, ops, rescale=rescale, full=full, factors=factors).survivals


def trim_walks(trims: Sequence[Trim], numel: int, *, rescale: Rescale = "none") -> Walks:
    """The walks with which `trim_survivals` and the merge after it read a tensor, for predictions."""
    ranks = [trim.ranks(numel) for trim in trims]
    masses = any(trim.rule == "l1_mass" and 0 < trim.value < 1 for trim in trims)
    norms = rescale != "none" or any(trim.rule == "l1_mass" for trim in trims)
    collected = masses + max(map(len, ranks)) + (rescale != "none" and any(trim.rule == "epsilon" for trim in trims))
    plain = all(trim.rule in ("density", "count") and not trim.soft for trim in trims)
    return Walks(
        ELECT, (HISTOGRAM_SUMS,) * norms + (COLLECT,) * collected, sampled=any(ranks) and not norms, ties=0.5 if masses else max(map(len, ranks)),
        one_pass=plain and not norms and any(ranks),
    )  # fmt: skip


Counted = tuple[Counts, ...]
"""Arrays of integers, which are added up over blocks; or of float64, each element of which is not zero in one part of a walk only."""

AddUp = Callable[[BlockWalk, Callable[[BlockWalk], Counted]], Counted]
"""`add_up(each, count)` is `count(each)`, or the sum of it over parts of the walk."""


def count_all(each: BlockWalk, count: Callable[[BlockWalk], Counted]) -> Counted:
    """Count over a whole walk, in this process."""
    return count(each)


def trim_globally(
    trims: Sequence[Trim],
    numel: int,
    each: BlockWalk,
    ops: Ops,
    *,
    rescale: Rescale = "none",
    add_up: AddUp = count_all,
) -> list[KeepThreshold]:
    """Resolve every source's trim over a whole model, as the TIES paper does: one threshold for all its tensors.

    Args:
        trims, ops, rescale: as in `trim_survivals`.
        numel: entries of all tensors together.
        each: walks the blocks of all of them; every block has a row for each source.
        add_up: adds up what several processes count.

    Returns:
        One `KeepThreshold` a source. Every tie of the last entry is kept, as in the paper's code.
    """
    if numel == 0:
        return [KeepThreshold()] * len(trims)
    return _GlobalSearch(trims, numel, each, ops, rescale=rescale, add_up=add_up).survivals


def norm_ratio(rescale: Rescale, before: float, after: float) -> float:
    """The scale that restores the norm of a sparsified delta; 1 if a norm is under 1e-7, as in mergekit.

    Args:
        rescale: `l1`, or `l2`.
        before, after: sums of the magnitudes; with `l2` of their squares.
    """
    if rescale == "l2":
        before, after = math.sqrt(before), math.sqrt(max(after, 0.0))
    return 1.0 if before < 1e-7 or after < 1e-7 else before / after


@dataclass
class _Found:
    """The magnitudes of one source inside a bracket, tile by tile; never zero."""

    bracket: Bracket
    above: int = 0
    tiles: Sequence[tuple[Any, Any]] = ()
    """Each tile's bits and None; or, if they are many, its distinct bits, ascending, and their counts."""

    def merged(self) -> tuple[Any, Any]:
        """Distinct bits, largest first, and their counts in the tensor."""
        bits = np.concatenate([b for b, _ in self.tiles])
        counts = np.concatenate([np.ones(b.size, np.int64) if c is None else c for b, c in self.tiles])
        order = np.argsort(bits, kind="stable")[::-1]
        bits, counts = bits[order], counts[order]
        if not bits.size:
            return bits, counts
        first = np.flatnonzero(np.concatenate([[True], bits[1:] != bits[:-1]]))
        return bits[first], np.add.reduceat(counts, first)

    def holds(self, rank: int) -> bool:
        """Whether the `rank`-th largest magnitude is inside, or only zeros are below."""
        inside = sum(b.size if c is None else int(c.sum()) for b, c in self.tiles)
        return self.above < rank and (rank <= self.above + inside or self.bracket.open_below)

    def at(self, rank: int) -> tuple[int, int, int]:
        """Bits of the `rank`-th largest magnitude, how many are larger and how many are equal; (0, 0, 0) if it is zero."""
        if any(counts is not None for _, counts in self.tiles):
            bits, often = self.merged()
            running = self.above + np.cumsum(often)
            at = int(np.searchsorted(running, rank))
            return (int(bits[at]), int(running[at] - often[at]), int(often[at])) if at < len(bits) else (0, 0, 0)
        bits = np.concatenate([b for b, _ in self.tiles])
        if rank - self.above > bits.size:
            return 0, 0, 0
        found, larger, equal = largest(bits, rank - self.above)
        return found, self.above + larger, equal

    def equal(self, tile: int, bits: int) -> int:
        """How many magnitudes of a tile are exactly `bits`."""
        values, counts = self.tiles[tile]
        same = values == bits
        return int(np.count_nonzero(same) if counts is None else counts[same].sum())


class _Search:
    """Finds the exact thresholds of all sources of one tensor in shared passes over it.

    A source asks for ranks (1 = the largest magnitude): the last entry kept and, for outliers, the last one dropped. A
    rank's threshold is found inside a bracket of magnitudes, which is guessed from a sample, or taken from a full histogram
    if norms are needed anyway or the guess missed.
    """

    every_tie: ClassVar[bool] = False
    """Keep all entries equal to the last one kept, instead of the first of them."""

    def __init__(
        self,
        trims: Sequence[Trim],
        numel: int,
        each: BlockWalk,
        ops: Ops,
        *,
        rescale: Rescale = "none",
        full: tuple[Counts, Counts] | None = None,
        factors: Sequence[Callable[[], tuple[Any, Any] | None]] = (),
        add_up: AddUp = count_all,
    ) -> None:
        self.trims, self.numel, self.each, self.ops, self.add_up = trims, numel, each, ops, add_up
        self.rescale, self.factors = rescale, factors
        needs_norms = rescale != "none" or self.every_tie or any(trim.rule == "l1_mass" for trim in trims)
        self.full = full or (self._histogram(2 if rescale == "l2" else 1) if needs_norms else None)
        self.brackets: dict[tuple[int, int], _Found] = {}
        self.ranks = [trim.ranks(numel) for trim in trims]
        for i, rank in self._mass_ranks().items():
            self.ranks[i] = [rank]
        for place in (0, 1):
            self._find({i: ranks[place] for i, ranks in enumerate(self.ranks) if len(ranks) > place})

    @property
    def survivals(self) -> list[KeepThreshold]:
        """The threshold of each source, with the scale that `rescale` asks for."""
        found = [self.survival(i) for i in range(len(self.trims))]
        return found if self.rescale == "none" else [self.rescaled(i, one) for i, one in enumerate(found)]

    def survival(self, i: int) -> KeepThreshold:
        """The threshold of source `i`."""
        trim = self.trims[i]
        if trim.rule == "epsilon":
            return KeepThreshold(low=bits_of(trim.value), shrink=value_of(bits_of(trim.value)) if trim.soft else 0.0)
        if not self.ranks[i]:
            return KeepThreshold() if trim.keeps_all(self.numel) else NOTHING
        low, low_cut = self._threshold(i, self.ranks[i][0])
        survival = KeepThreshold(low=low, low_cut=low_cut, shrink=value_of(low) if trim.soft else 0.0)
        if len(self.ranks[i]) == 2:
            high, high_cut = self._threshold(i, self.ranks[i][1])
            survival = replace(survival, high=high, high_cut=high_cut)
        return survival

    def rescaled(self, i: int, survival: KeepThreshold) -> KeepThreshold:
        """`survival` with the scale that restores the norm of source `i`."""
        if survival in (KeepThreshold(), NOTHING):
            return survival
        before, less = exact_sum(self._norms(i)), survival.shrink
        kept, mass = self._above(i, survival.low, self.ranks[i][0] if self.ranks[i] else None, less)
        if len(self.ranks[i]) == 2:
            dropped, lost = self._above(i, survival.high, self.ranks[i][1], less)
            kept, mass = kept - dropped, mass - lost
        after = mass if self.rescale == "l2" else mass - kept * less
        return replace(survival, scale=norm_ratio(self.rescale, before, after))

    def _norms(self, i: int, less: float = 0.0) -> Any:
        """The L1 norm of each bin of source `i`; to restore L2 norms, its sum of squares, `less` taken off each magnitude before."""
        assert self.full is not None
        counts, sums = self.full[0][i], self.full[1][i]
        return squares_of_bins(counts, sums, less) if self.rescale == "l2" else l1_of_bins(counts, sums[:BINS])

    def _size(self, magnitudes: Any, less: float) -> Any:
        """The share of magnitudes in the sums of `_norms`."""
        return (magnitudes - less) ** 2 if self.rescale == "l2" else magnitudes

    def _mass_ranks(self) -> dict[int, int]:
        """For each `l1_mass` source, how many of its largest entries have that share together (at least one)."""
        goals, ranges, heads = {}, {}, {}
        for i, trim in enumerate(self.trims):
            if trim.rule == "l1_mass" and 0 < trim.value < 1:
                assert self.full is not None
                norms = l1_of_bins(self.full[0][i], self.full[1][i][:BINS])
                held = np.cumsum(norms[::-1])
                goals[i] = trim.value * float(held[-1])
                place = int(np.searchsorted(held, goals[i]))
                heads[i] = float(held[place - 1]) if place else 0.0
                ranges[i] = _bin(BINS - 1 - place)
        ranks = {}
        for i, bracket in self._gather(ranges).items():
            bits, often = bracket.merged()
            values = (
                np.minimum(bits, INFINITY).view(np.float32).astype(np.float64)
            )  # NaN is infinite; the merge reports it
            running = np.concatenate([[heads[i]], heads[i] + np.cumsum(values * often)])
            at = max(min(int(np.searchsorted(running, goals[i])) - 1, len(bits) - 1), 0)
            part = math.ceil((goals[i] - running[at]) / values[at]) if len(bits) else 0
            last = min(max(part, 1), int(often[at])) if len(bits) else 0
            ranks[i] = max(1, bracket.above + int(often[:at].sum()) + last)
            self.brackets[i, ranks[i]] = bracket
        return ranks

    def _threshold(self, i: int, rank: int) -> tuple[int, int]:
        """Bits and cut of the `rank`-th largest magnitude of source `i`; (0, 0) if that is zero."""
        bracket = self.brackets[i, rank]
        bits, larger, equal = bracket.at(rank)
        if not equal:
            return 0, 0
        if self.every_tie or (larger + equal == rank and bits != bracket.bracket.low):
            return bits, self.numel
        return bits, self._cut(i, bracket, bits, rank - larger)

    def _cut(self, i: int, bracket: _Found, bits: int, kept: int) -> int:
        """The flat index below which exactly `kept` entries equal the threshold."""
        for tile in range(len(bracket.tiles)):
            equal = bracket.equal(tile, bits)
            if equal >= kept:
                return self._locate(i, tile, bits, kept - 1) + 1
            kept -= equal
        raise AssertionError("the ties of a threshold were counted and then not found")

    def _locate(self, i: int, tile: int, bits: int, nth: int) -> int:
        return self.each(lambda block: self.ops.locate(block, i, bits, nth), tiles=[tile])[0]

    def _above(self, i: int, low: int, rank: int | None, less: float) -> tuple[int, float]:
        """How many entries of source `i` pass a threshold, and the sum of their sizes; `rank` is that number where ties are cut."""
        assert self.full is not None
        norms, top = self._norms(i, less), low >> 16
        bracket = self.brackets[i, rank] if rank else self._gather({i: _bin(top)})[i]
        bits, often = bracket.merged()
        over = bits > low
        count = int(self.full[0][i][top + 1 :].sum()) + int(often[over].sum())
        sizes = self._size(bits[over].view(np.float32).astype(np.float64), less)
        mass = exact_sum(np.append(norms[top + 1 :], sizes * often[over]))
        equal = int(often[bits == low].sum()) if rank else 0
        ties = equal if self.every_tie or not rank else min(rank - count, equal)
        return count + ties, mass + ties * self._size(value_of(low), less)

    def _histogram(self, sums: int = 0) -> tuple[Counts, Counts]:
        """The histogram of every source; see `Ops.histogram`."""

        def count(each: BlockWalk) -> Counted:
            n, lock = len(self.trims), Lock()
            counts, lows = np.zeros((n, BINS), np.int64), np.zeros((n, sums * BINS), np.int64)

            def work(block: Any) -> None:
                some, low = self.ops.histogram(block, sums)
                with lock:  # integers: the order of blocks does not matter
                    np.add(counts, some, out=counts)
                    np.add(lows, low, out=lows)

            each(work)
            return counts, lows

        counts, lows = self.add_up(self.each, count)
        return counts, lows

    def _find(self, ranks: dict[int, int]) -> None:
        """Collect a bracket that contains the rank, for one rank a source."""
        ranks = {i: rank for i, rank in ranks.items() if (i, rank) not in self.brackets}
        if ranks and self.full is None:
            for i, bracket in self._gather(self._guess(ranks)).items():
                if bracket.holds(ranks[i]):
                    self.brackets[i, ranks.pop(i)] = bracket
        if not ranks:
            return
        self.full = self.full or self._histogram()
        ranges = {i: _bin(_bin_of(self.full[0][i], rank)) for i, rank in ranks.items()}
        for i, bracket in self._gather(ranges).items():
            self.brackets[i, ranks[i]] = bracket

    def _guess(self, ranks: dict[int, int]) -> dict[int, Bracket]:
        """A bracket for each rank: from a sample, or all entries if the tensor is small."""
        if small(self.numel, self.each):
            return dict.fromkeys(ranks, EVERY)
        samples = samples_of(self.each, self.ops, self.factors)
        return {i: guess_bracket(samples[i](), rank / self.numel) for i, rank in ranks.items()}

    def _gather(self, brackets: dict[int, Bracket]) -> dict[int, _Found]:
        """Read the tensor once, and collect for some sources the magnitudes inside a bracket."""
        if not brackets:
            return {}

        def work(block: Any) -> tuple[Counts, list[tuple[Any, Any]]]:
            size = block.size
            counts, found = self.ops.collect(block, *self._bounds(brackets, block.index, block.index + size))
            return counts, [np.unique(f, return_counts=True) if f.size > size // _LISTED else (f, None) for f in found]

        parts = self.each(work)
        return {
            i: _Found(bracket, sum(int(c[i, 1]) for c, _ in parts), [found[i] for _, found in parts])
            for i, bracket in brackets.items()
        }

    def _bounds(self, brackets: dict[int, Bracket], start: int, stop: int) -> tuple[list[int], list[int]]:
        """Lowest bits and numbers of bits in a block, one a source."""
        bounds = [brackets.get(i, NOWHERE).within(start, stop) for i in range(len(self.trims))]
        return [low for low, _ in bounds], [width for _, width in bounds]


class _GlobalSearch(_Search):
    """A search over all tensors of a model, whose memory does not grow with the model.

    Its brackets are single bins of a full histogram, so it stores 65,536 counts instead of a list by tile. It does not know
    where ties are, and every tie of the last entry is kept.
    """

    every_tie: ClassVar[bool] = True

    def _gather(self, brackets: dict[int, Bracket]) -> dict[int, _Found]:
        if not brackets:
            return {}
        bounds = self._bounds(brackets, 0, FOREVER)

        def count(each: BlockWalk) -> Counted:
            n, lock = len(self.trims), Lock()
            inside, above = np.zeros((n, 1 << 16), np.int64), np.zeros(n, np.int64)

            def work(block: Any) -> None:
                counts, found = self.ops.collect(block, *bounds)
                for i, bits in enumerate(found):
                    some = np.bincount(bits & 0xFFFF, minlength=1 << 16)
                    with lock:
                        inside[i] += some
                        above[i] += counts[i, 1]

            each(work)
            return inside, above

        inside, above = self.add_up(self.each, count)
        found = {i: np.flatnonzero(inside[i]).astype(np.uint32) for i in brackets}
        return {
            i: _Found(bracket, int(above[i]), [((bracket.low & ~0xFFFF) | found[i], inside[i][found[i]])])
            for i, bracket in brackets.items()
        }


def _bin_of(counts: Any, rank: int) -> int:
    """The bin of the `rank`-th largest magnitude; the lowest bin if there are fewer."""
    return max(BINS - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), rank)), 0)


def _bin(index: int) -> Bracket:
    """All of a bin, without zero in the lowest."""
    return Bracket(index << 16, 1 << 16) if index else Bracket(1, (1 << 16) - 1)
