"""The operations on a block by torch, for a GPU: the arithmetic of `kernels.merging`, step by step, on whole blocks.

Every elementwise step is the same float32 operation in the same order, so results differ from the CPU's only where sums
(norms, inner products) are rounded in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from paft_merge.compute import exponentials, kernels
from paft_merge.compute.blocks import NO_BITS, Block, Counts, Election, KeepThreshold, Outcome, RankedKeep, Sums
from paft_merge.compute.histogram import bits_of
from paft_merge.compute.magnitudes import EPSILONS, MAGNITUDE
from paft_merge.compute.splitmix64 import GOLDEN, MIX1, MIX2
from paft_merge.compute.staging import Staging

_THRESHOLDS = tuple(bits_of(e) for e in EPSILONS)
"""Bits of the magnitudes below which a tally counts."""


class TorchOps:
    """The operations of `blocks.Ops` on `device`: blocks come as NumPy bits, results go back to NumPy."""

    deferring: ClassVar[None] = None
    """Tensors are always measured first."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._staging = device, Staging(device)

    def sample(self, block: Block, step: int) -> Any:
        """See `Ops.sample`."""
        return self._magnitudes(self._deltas(block)[:, ::step])

    def histogram(self, block: Block, sums: int) -> tuple[Counts, Counts]:
        """See `Ops.histogram`."""
        bits = _bits(self._deltas(block)) & MAGNITUDE
        found = []
        for row in bits:
            bins, low = row >> 16, (row & 0xFFFF).double()
            summed = [low, (low - kernels.MIDDLE) ** 2][:sums]  # sums below 2**53 are exact in float64
            found += [torch.bincount(bins, minlength=kernels.BINS)]
            found += [torch.bincount(bins, part, minlength=kernels.BINS).long() for part in summed]
        rows = self._host(torch.stack(found)).reshape(len(bits), 1 + sums, kernels.BINS)
        return rows[:, 0], rows[:, 1:].reshape(len(bits), -1)

    def collect(self, block: Block, low: Sequence[int], width: Sequence[int]) -> tuple[Counts, list[Any]]:
        """See `Ops.collect`."""
        rows = self._deltas(block)
        found, above = [], []
        for row, first, span in zip(rows, low, width, strict=True):
            bits = _bits(row) & MAGNITUDE
            found.append(self._magnitudes(row[(bits >= first) & (bits < first + span)]))
            above.append((bits >= first + span).sum())
        counts = np.stack([[len(inside) for inside in found], self._host(torch.stack(above))], 1)
        counts[[first == NO_BITS for first in low]] = 0
        return counts, found

    def locate(self, block: Block, source: int, bits: int, nth: int) -> int:
        """See `Ops.locate`."""
        row = _bits(self._deltas(block))[source] & MAGNITUDE
        return block.index + int(torch.nonzero(row == bits)[nth, 0])

    def dropped_norms(self, block: Block, survivals: Sequence[KeepThreshold], *, squares: bool) -> Sums:
        """See `Ops.dropped_norms`."""
        deltas = self._deltas(block)
        sums = []
        for row, survival in zip(deltas, survivals, strict=True):
            size = row.double() ** 2 if squares else row.double().abs()
            sums.append(torch.stack([size.sum(), (size * self._kept(survival, block.index, len(row))).sum()]))
        return self._host(torch.stack(sums))

    def gram(self, block: Block) -> Sums:
        """See `Ops.gram`."""
        rows = self._deltas(block).double()
        return self._host(rows @ rows.T)

    def blend(
        self, block: Block, out: Any, base_weight: float, weights: Sequence[float], key: int, tally: bool
    ) -> Outcome:
        """See `Ops.blend`."""
        base, rows = self._inputs(block)
        total = base * float(np.float32(base_weight)) if len(base) else rows.new_zeros(block.size)
        for row, weight in zip(rows, weights, strict=True):
            total = total + row * float(np.float32(weight))
        return self._store(total, out, key, block.index, *(_unchanged(rows) if tally else _nothing(rows)))

    def consensus(
        self, block: Block, out: Any, survivals: Sequence[KeepThreshold], election: Election, key: int
    ) -> Outcome:
        """See `Ops.consensus`."""
        base, deltas = self._inputs(block)
        weights = [float(np.float32(w)) for w in election.weights]
        kept = [self._surviving(d, s, block.index) for d, s in zip(deltas, survivals, strict=True)]
        rows = [
            row * float(np.float32(s.scale)) if s.scale != 1 else row for row, s in zip(kept, survivals, strict=True)
        ]
        if election.elect == "weighted":
            rows = [row * w for row, w in zip(rows, weights, strict=True)]
        result, divisor, held = torch.zeros_like(base), torch.zeros_like(base), []
        agree = _agreement(rows, election)
        for row, agrees, weight in zip(rows, agree, weights, strict=True):
            held.append(torch.where(agrees, row, 0.0))
            result = result + (held[-1] if election.elect == "weighted" else held[-1] * weight)
            divisor = divisor + agrees.float() * (weight if election.normalize == "weights" else 1.0)
        if election.normalize != "none":
            result = result / torch.where(divisor != 0, divisor, torch.ones_like(divisor))
        counts, sums = _tally(deltas, kept, agree, held)
        total = base + result * float(np.float32(election.factor))
        outcome = self._store(total, out, key, block.index, counts, sums)
        units = [float(np.float32(s.scale)) for s in survivals]
        if election.elect == "weighted":
            units = [unit * weight for unit, weight in zip(units, weights, strict=True)]
        for i, unit in enumerate(units):
            outcome.sums[i, 3] = outcome.sums[i, 3] / unit**2 if unit else 0.0
        return outcome

    def tally(self, block: Block) -> tuple[Counts, Sums]:
        """See `Ops.tally`."""
        return self._hosts(*_unchanged(self._deltas(block)))

    def variance(self, block: Block, total: int) -> Block:
        """See `Ops.variance`; computed in float64."""
        rows = self._deltas(block).double()
        mean = torch.zeros(block.size, dtype=torch.float64, device=self.device)
        for row in rows:
            mean = mean + row
        mean = mean / total
        spread = (total - len(rows)) * (mean * mean)
        for row in rows:
            spread = spread + (row - mean) * (row - mean)
        return _derived(block, (spread / total).float()[None])

    def select(self, block: Block, by: Block, survival: KeepThreshold) -> Block:
        """See `Ops.select`."""
        deltas = self._deltas(block)
        stays = self._above(_bits(self._float(by.sources[0])), survival.low, survival.low_cut, block.index)
        return _derived(block, torch.where(stays, deltas, 0.0))

    def swap(self, block: Block, t: float) -> Block:
        """See `Ops.swap`."""
        delta = self._deltas(block)
        reach = torch.full_like(delta, float(np.float32(t)))
        return _derived(block, delta * (reach / delta.abs().clamp(min=float(np.float32(1e-6)))).clamp(0, 1))

    def overlaps(self, block: Block, epsilon: float) -> tuple[Counts, Sums]:
        """See `Ops.overlaps`."""
        deltas = self._deltas(block)
        large = deltas.abs() > float(np.float32(epsilon))
        many = large.sum(0)
        counts = torch.stack([(large & (many > 1)).sum(1), (large & (many == 1)).sum(1)], 1)
        return self._hosts(counts, (torch.where(large, deltas, 0.0).double() ** 2).sum(1))

    def share(self, block: Block, epsilon: float, scales: Sequence[float]) -> Block:
        """See `Ops.share`."""
        deltas = self._deltas(block)
        large = deltas.abs() > float(np.float32(epsilon))
        kept, many = torch.where(large, deltas, 0.0), large.sum(0).float()
        total = torch.zeros_like(many)
        for row, scale in zip(kept, scales, strict=True):
            total = total + torch.where(many > 1, row / many, row * float(np.float32(scale)))
        return _derived(block, total[None])

    def fuse(self, block: Block, weights: Sequence[float]) -> tuple[Block, Counts, Sums]:
        """See `Ops.fuse`."""
        rows = self._deltas(block)
        agree = _agreement(list(rows), Election((), "unweighted", True, "weights", 1.0))
        total = torch.zeros_like(rows[0])
        divisor, elected, energy = total, [], []
        for row, agrees, weight in zip(rows, agree, weights, strict=True):
            held = torch.where(agrees, row, 0.0)
            total = total + held * float(np.float32(weight))
            divisor = divisor + agrees.float() * float(np.float32(weight))
            elected.append(agrees.sum())
            energy.append((held.double() ** 2).sum())
        merged = total / divisor.clamp(min=float(np.float32(1e-6)))
        return _derived(block, merged[None]), *self._hosts(torch.stack(elected), torch.stack(energy))

    def largest(self, block: Block, weights: Sequence[float]) -> tuple[Block, Counts, Sums]:
        """See `Ops.largest`."""
        rows = self._deltas(block)
        best = torch.zeros_like(rows[0])
        owner = torch.full_like(best, -1, dtype=torch.int64)
        for i, (row, weight) in enumerate(zip(rows, weights, strict=True)):
            weighted = row * float(np.float32(weight))
            larger = weighted.abs() > best.abs()
            best, owner = torch.where(larger, weighted, best), torch.where(larger, i, owner)
        mine = [owner == i for i in range(len(rows))]
        won = torch.stack([own.sum() for own in mine])
        energy = torch.stack(
            [(torch.where(own, row, 0.0).double() ** 2).sum() for own, row in zip(mine, rows, strict=True)]
        )
        return _derived(block, best[None]), *self._hosts(won, energy)

    def drop_ranked(self, block: Block, length: int, inner: int, drops: Sequence[RankedKeep]) -> Block:
        """See `Ops.drop_ranked`."""
        deltas = self._deltas(block)
        kept = torch.empty_like(deltas)
        for i, (row, drop) in enumerate(zip(deltas, drops, strict=True)):
            magnitudes = (_bits(row) & MAGNITUDE).view(-1, length, inner)
            ranks = magnitudes.argsort(dim=1, stable=True).argsort(dim=1).view(-1)
            bound = self._staging.to_device(drop.keep.astype(np.int64))[ranks]
            stays = _shift(self._hash(drop.key, block.index, len(row)), 32) < bound
            kept[i] = torch.where(stays, row, 0.0)
        return _derived(block, kept)

    def products(self, block: Block) -> Sums:
        """See `Ops.products`."""
        rows = self._deltas(block).double()
        pairs = [one * rows for one in rows]
        return self._host(
            torch.stack([torch.stack([p.amin(1) for p in pairs]), torch.stack([p.amax(1) for p in pairs])])
        )

    def exponential_sums(self, block: Block, least: Sums, scale: Sums) -> Sums:
        """See `Ops.exponential_sums`."""
        rows = self._deltas(block).double()
        places = range(len(rows))
        return self._host(
            torch.stack([torch.stack([_exponential(rows, i, k, least, scale).sum() for k in places]) for i in places])
        )

    def scores(self, block: Block, least: Sums, scale: Sums, shares: Sums) -> Block:
        """See `Ops.scores`."""
        rows = self._deltas(block).double()
        found = []
        for i, row in enumerate(rows):
            total, own = torch.zeros_like(row), torch.ones_like(row)
            for k in range(len(rows)):
                total = total + _exponential(rows, i, k, least, scale) * float(shares[i, k])
            alone = _exponential(rows, i, i, least, scale)
            for _ in range(np.count_nonzero(np.diagonal(shares))):
                own = own * alone
            found.append((own * total).float())
        return _derived(block, torch.stack(found))

    def compete(
        self,
        block: Block,
        scores: Block,
        survivals: Sequence[KeepThreshold],
        scales: Sequence[float],
        weights: Sequence[float],
    ) -> tuple[Block, Counts, Sums]:
        """See `Ops.compete`."""  # fmt: skip
        rows = self._deltas(block)
        total = torch.zeros_like(rows[0])
        divisor, kept, energy = total, [], []
        each = zip(rows, self._float(scores.sources), survivals, scales, weights, strict=True)
        for row, score, survival, scale, weight in each:
            stays = self._above(_bits(score), survival.low, survival.low_cut, block.index)
            share = torch.where(stays, score * float(np.float32(scale)), 0.0)
            held = torch.where(share > 0, row, 0.0)
            total = total + share * float(np.float32(weight)) * row
            divisor = divisor + share
            kept.append((held != 0).sum())
            energy.append((held.double() ** 2).sum())
        merged = total / torch.where(divisor > 0, divisor, torch.ones_like(divisor))
        return _derived(block, merged[None]), *self._hosts(torch.stack(kept), torch.stack(energy))

    def gram_rows(self, block: Block, row: int) -> Sums:
        """See `Ops.gram_rows`."""
        deltas = self._deltas(block).double().view(block.count, -1, row).transpose(0, 1)
        return self._host(deltas @ deltas.mT)

    def gram_columns(self, block: Block, row: int) -> Sums:
        """See `Ops.gram_columns`."""
        deltas = self._deltas(block).double().view(block.count, -1, row)
        return self._host(torch.stack([(deltas * one).sum(1) for one in deltas]))

    def mix(self, block: Block, weights: Any, row: int, *, across: bool) -> Block:
        """See `Ops.mix`."""
        deltas = self._deltas(block).view(block.count, -1, row)
        own = self._staging.to_device(np.ascontiguousarray(weights, np.float32))
        total = torch.zeros_like(deltas[0])
        for one, weight in zip(deltas, own, strict=True):
            total = total + one * (weight if across else weight[:, None])
        return _derived(block, total.view(1, -1))

    def _float(self, bits: Any) -> Tensor:
        """Bits as float32 on the device; computed rows are on it already."""
        if isinstance(bits, Tensor):
            return bits
        if bits.dtype == np.uint16:
            return self._staging.to_device(bits.view(np.int16)).view(torch.bfloat16).float()
        return self._staging.to_device(bits.view(np.float32))

    def _inputs(self, block: Block) -> tuple[Tensor, Tensor]:
        """The base `[E]` or `[0]`, and the deltas `[n, E]`."""
        base, rows = self._float(block.base), self._float(block.sources)
        return base, rows - base if block.subtract else rows

    def _deltas(self, block: Block) -> Tensor:
        return self._inputs(block)[1] if block.subtract else self._float(block.sources)

    def _host(self, values: Tensor) -> np.ndarray[Any, Any]:
        """Values as an array of the host."""
        return np.array(self._staging.to_host(values)[0])

    def _hosts(self, first: Tensor, second: Tensor) -> tuple[Any, Any]:
        one, two = self._staging.to_host(first, second)
        return one.copy(), two.copy()

    def _magnitudes(self, values: Tensor) -> Any:
        """The magnitudes of float32 values on the device, as an array uint32."""
        return self._host(values.contiguous().view(torch.int32)).view(np.uint32) & np.uint32(MAGNITUDE)

    def _surviving(self, delta: Tensor, survival: KeepThreshold, index: int) -> Tensor:
        bits = _bits(delta) & MAGNITUDE
        stays = self._above(bits, survival.low, survival.low_cut, index)
        if survival.high < NO_BITS:
            stays &= ~self._above(bits, survival.high, survival.high_cut, index)
        if survival.keep < 2**32:
            stays &= self._kept(survival, index, len(delta))
        kept = torch.where(stays, delta, 0.0)
        soft = float(np.float32(survival.shrink))
        return torch.where(kept > 0, kept - soft, torch.where(kept < 0, kept + soft, kept)) if soft else kept

    def _above(self, bits: Tensor, threshold: int, cut: int, index: int) -> Tensor:
        """Which bits are above a threshold, or equal to it at a flat index below `cut`; each launch takes time."""
        if cut <= index:
            return bits > threshold
        if cut >= index + len(bits):
            return bits >= threshold
        return (bits > threshold) | ((bits == threshold) & (self._places(index, len(bits)) < cut))

    def _places(self, index: int, size: int) -> Tensor:
        """The flat index of each of `size` entries from `index` on."""
        return torch.arange(index, index + size, device=self.device)

    def _kept(self, survival: KeepThreshold, index: int, size: int) -> Tensor:
        if survival.keep >= 2**32:
            return torch.ones(size, dtype=torch.bool, device=self.device)
        return _shift(self._hash(survival.key, index, size), 32) < survival.keep

    def _hash(self, key: int, index: int, size: int) -> Tensor:
        """`splitmix64.numbers` on the device; int64 wraps as uint64 does, shifts are made logical."""
        z = self._places(index + 1, size) * _signed(GOLDEN) + _signed(key)
        z = (z ^ _shift(z, 30)) * _signed(MIX1)
        z = (z ^ _shift(z, 27)) * _signed(MIX2)
        return z ^ _shift(z, 31)

    def _store(self, total: Tensor, out: Any, key: int, index: int, counts: Tensor, sums: Tensor) -> Outcome:
        """Round into `out`; return how many elements are not finite, with the counts and the sums."""
        if out.dtype == np.uint32:
            stored = total.view(torch.int32)
        elif key:
            noise = _shift(self._hash(key, index, len(total)), 48)
            rounded = ((_bits(total) & 0xFFFFFFFF) + noise) >> 16 & 0xFFFF
            stored = (rounded - (rounded >> 15 << 16)).to(torch.int16)
        else:
            stored = total.bfloat16().view(torch.int16)
        bad = (~torch.isfinite(total)).sum()
        made, *found = self._staging.to_host(stored, bad, counts, sums)
        np.copyto(out, made.view(out.dtype))
        return Outcome(int(found[0]), found[1].copy(), found[2].copy())


def _derived(block: Block, rows: Tensor) -> Block:
    """A block of float32 rows that were computed from `block`."""
    return Block(block.index, block.base, rows, subtract=False)


def _exponential(rows: Tensor, i: int, k: int, least: Sums, scale: Sums) -> Tensor:
    """`exponentials.exponential` of the products of two rows in [0, 1]."""
    place = (rows[i] * rows[k] - float(least[i, k])) * float(scale[i, k]) - exponentials.CENTRE
    found = torch.full_like(place, exponentials.COEFFICIENTS[0])
    for coefficient in exponentials.COEFFICIENTS[1:]:
        found = found * place + coefficient
    return found


def _bits(values: Tensor) -> Tensor:
    """float32 bits as int64 (the sign bit makes them negative; mask it off)."""
    return values.contiguous().view(torch.int32).long()


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)


def _nothing(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and sums as of `_tally`, all zero."""
    empty = Outcome.empty(len(rows))
    return torch.from_numpy(empty.counts).to(rows.device), torch.from_numpy(empty.sums).to(rows.device)


def _tally(
    deltas: Tensor, kept: Sequence[Tensor], agree: Sequence[Tensor], held: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The columns of a tally (`kernels.COUNTS`, `SUMS`) of each delta, on the device.

    Args:
        deltas: `[n, E]`.
        kept: the entries of each delta that survive; zero elsewhere.
        agree: which entries are elected.
        held: those entries; zero elsewhere.
    """
    if not len(deltas):
        return _nothing(deltas)
    bits, counts, sums = deltas.view(torch.int32) & MAGNITUDE, [], []
    below = torch.stack([(bits < e).sum(1) for e in (1, *_THRESHOLDS)], 1)
    for delta, some, elected, values in zip(deltas, kept, agree, held, strict=True):
        counts.append(torch.stack([(some != 0).sum(), elected.sum()]))
        wide, squares = delta.double(), [(x.double() ** 2).sum() for x in (some, values)]
        sums.append(torch.stack([wide.abs().sum(), (wide * wide).sum(), *squares]))
    largest = bits.amax(1, keepdim=True).long() if bits.shape[1] else below[:, :1]
    return torch.cat([below, torch.stack(counts), largest], 1), torch.stack(sums)


def _unchanged(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and sums over deltas that are merged unchanged: every nonzero entry is kept and elected."""
    return _tally(rows, list(rows), [row != 0 for row in rows], list(rows))


def _agreement(rows: Sequence[Tensor], election: Election) -> list[Tensor]:
    """Which entries of each row have the elected sign."""
    if election.elect == "none":
        return [row != 0 for row in rows]
    vote = torch.zeros_like(rows[0])
    for row in rows:
        vote = vote + (row.sign() if election.elect == "count" else row)
    plus = vote >= 0 if election.tie_positive else vote > 0
    return [(plus & (row > 0)) | ((vote < 0) & (row < 0)) for row in rows]
