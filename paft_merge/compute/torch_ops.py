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

from paft_merge.compute import kernels
from paft_merge.compute.blocks import NO_BITS, Block, Counts, Election, KeepThreshold, Outcome, RankedKeep, Sums
from paft_merge.compute.histogram import bits_of
from paft_merge.compute.magnitudes import EPSILONS, MAGNITUDE
from paft_merge.compute.splitmix64 import GOLDEN, MIX1, MIX2

_THRESHOLDS = tuple(bits_of(e) for e in EPSILONS)
"""Bits of the magnitudes below which a tally counts."""


class TorchOps:
    """The operations of `blocks.Ops` on `device`: blocks come as NumPy bits, results go back to NumPy."""

    deferring: ClassVar[None] = None
    """Tensors are always measured first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sample(self, block: Block, step: int) -> Any:
        """See `Ops.sample`."""
        bits = _bits(self._deltas(block)[:, ::step].contiguous()) & MAGNITUDE
        return bits.cpu().numpy().astype(np.uint32)

    def histogram(self, block: Block, lows: bool) -> tuple[Counts, Counts]:
        """See `Ops.histogram`."""
        bits = _bits(self._deltas(block)) & MAGNITUDE
        counts, low = [], []
        for row in bits:
            bins = row >> 16
            counts.append(torch.bincount(bins, minlength=kernels.BINS))
            if lows:  # sums below 2**53 are exact in float64
                low.append(torch.bincount(bins, (row & 0xFFFF).double(), minlength=kernels.BINS).long())
        empty = np.zeros((len(counts), 0), np.int64)
        return torch.stack(counts).cpu().numpy(), torch.stack(low).cpu().numpy() if lows else empty

    def collect(self, block: Block, low: Sequence[int], width: Sequence[int]) -> tuple[Counts, list[Any]]:
        """See `Ops.collect`."""
        bits = _bits(self._deltas(block)) & MAGNITUDE
        counts, found = np.zeros((len(bits), 2), np.int64), []
        for i, (row, first, span) in enumerate(zip(bits, low, width, strict=True)):
            inside = row[(row >= first) & (row < first + span)]
            found.append(inside.cpu().numpy().astype(np.uint32))
            if first != NO_BITS:
                counts[i] = len(found[-1]), int((row >= first + span).sum())
        return counts, found

    def locate(self, block: Block, source: int, bits: int, nth: int) -> int:
        """See `Ops.locate`."""
        row = _bits(self._deltas(block))[source] & MAGNITUDE
        return block.index + int(torch.nonzero(row == bits)[nth, 0])

    def dropped_l1(self, block: Block, survivals: Sequence[KeepThreshold]) -> Sums:
        """See `Ops.dropped_l1`."""
        deltas = self._deltas(block)
        sums = []
        for row, survival in zip(deltas, survivals, strict=True):
            size = row.double().abs()
            sums.append(torch.stack([size.sum(), (size * self._kept(survival, block.index, len(row))).sum()]))
        return torch.stack(sums).cpu().numpy()

    def gram(self, block: Block) -> Sums:
        """See `Ops.gram`."""
        rows = self._deltas(block).double()
        return (rows @ rows.T).cpu().numpy()

    def blend(
        self, block: Block, out: Any, base_weight: float, weights: Sequence[float], key: int, tally: bool
    ) -> Outcome:
        """See `Ops.blend`."""
        rows = self._deltas(block)
        outcome = _unchanged(rows) if tally else Outcome.empty(len(rows))
        total = torch.zeros(block.size, device=self.device)
        if block.base.size:
            total = self._float(block.base) * float(np.float32(base_weight))
        for row, weight in zip(rows, weights, strict=True):
            total = total + row * float(np.float32(weight))
        outcome.bad = self._store(total, out, key, block.index)
        return outcome

    def consensus(
        self, block: Block, out: Any, survivals: Sequence[KeepThreshold], election: Election, key: int
    ) -> Outcome:
        """See `Ops.consensus`."""
        deltas, base = self._deltas(block), self._float(block.base)
        outcome = _tally(deltas)
        counts, sums = outcome.counts, outcome.sums
        weights = [float(np.float32(w)) for w in election.weights]
        rows = [self._surviving(d, s, block.index) for d, s in zip(deltas, survivals, strict=True)]
        for i, row in enumerate(rows):
            counts[i, 5], sums[i, 2] = int((row != 0).sum()), float((row.double() ** 2).sum())
        rows = [row * float(np.float32(s.scale)) for row, s in zip(rows, survivals, strict=True)]
        if election.elect == "weighted":
            rows = [row * w for row, w in zip(rows, weights, strict=True)]
        agree = _agreement(rows, election)
        result, divisor = torch.zeros_like(base), torch.zeros_like(base)
        for i, (row, agrees, weight) in enumerate(zip(rows, agree, weights, strict=True)):
            held = torch.where(agrees, row, torch.zeros_like(row))
            result = result + (held if election.elect == "weighted" else held * weight)
            divisor = divisor + agrees * (weight if election.normalize == "weights" else 1.0)
            unit = float(np.float32(survivals[i].scale)) * (weight if election.elect == "weighted" else 1.0)
            counts[i, 6] = int(agrees.sum())
            sums[i, 3] = float((held.double() ** 2).sum()) / unit**2 if unit else 0.0
        if election.normalize != "none":
            result = result / torch.where(divisor != 0, divisor, torch.ones_like(divisor))
        outcome.bad = self._store(base + result * float(np.float32(election.factor)), out, key, block.index)
        return outcome

    def tally(self, block: Block) -> tuple[Counts, Sums]:
        """See `Ops.tally`."""
        outcome = _unchanged(self._deltas(block))
        return outcome.counts, outcome.sums

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
        bits, at = _bits(self._float(by.sources[0])), self._places(block.index, block.size)
        stays = (bits > survival.low) | ((bits == survival.low) & (at < survival.low_cut))
        return _derived(block, torch.where(stays, deltas, torch.zeros_like(deltas)))

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
        return counts.cpu().numpy(), (torch.where(large, deltas, 0.0).double() ** 2).sum(1).cpu().numpy()

    def share(self, block: Block, epsilon: float, scales: Sequence[float]) -> Block:
        """See `Ops.share`."""
        deltas = self._deltas(block)
        large = deltas.abs() > float(np.float32(epsilon))
        kept, many = torch.where(large, deltas, torch.zeros_like(deltas)), large.sum(0).float()
        total = torch.zeros_like(many)
        for row, scale in zip(kept, scales, strict=True):
            total = total + torch.where(many > 1, row / many, row * float(np.float32(scale)))
        return _derived(block, total[None])

    def fuse(self, block: Block, weights: Sequence[float]) -> tuple[Block, Counts, Sums]:
        """See `Ops.fuse`."""
        rows = self._deltas(block)
        agree = _agreement(list(rows), Election((), "unweighted", True, "weights", 1.0))
        total = torch.zeros(block.size, device=self.device)
        divisor, elected, energy = total, [], []
        for row, agrees, weight in zip(rows, agree, weights, strict=True):
            held = torch.where(agrees, row, torch.zeros_like(row))
            total = total + held * float(np.float32(weight))
            divisor = divisor + agrees * float(np.float32(weight))
            elected.append(int(agrees.sum()))
            energy.append(float((held.double() ** 2).sum()))
        merged = total / divisor.clamp(min=float(np.float32(1e-6)))
        return _derived(block, merged[None]), np.array(elected, np.int64), np.array(energy)

    def drop_ranked(self, block: Block, length: int, inner: int, drops: Sequence[RankedKeep]) -> Block:
        """See `Ops.drop_ranked`."""
        deltas = self._deltas(block)
        kept = torch.empty_like(deltas)
        for i, (row, drop) in enumerate(zip(deltas, drops, strict=True)):
            magnitudes = (_bits(row) & MAGNITUDE).view(-1, length, inner)
            ranks = magnitudes.argsort(dim=1, stable=True).argsort(dim=1).view(-1)
            bound = torch.from_numpy(drop.keep.astype(np.int64)).to(self.device)[ranks]
            stays = _shift(self._hash(drop.key, block.index, len(row)), 32) < bound
            kept[i] = torch.where(stays, row, torch.zeros_like(row))
        return _derived(block, kept)

    def gram_rows(self, block: Block, row: int) -> Sums:
        """See `Ops.gram_rows`."""
        deltas = self._deltas(block).double().view(block.count, -1, row).transpose(0, 1)
        return (deltas @ deltas.mT).cpu().numpy()

    def gram_columns(self, block: Block, row: int) -> Sums:
        """See `Ops.gram_columns`."""
        deltas = self._deltas(block).double().view(block.count, -1, row)
        return torch.stack([(deltas * one).sum(1) for one in deltas]).cpu().numpy()

    def mix(self, block: Block, weights: Any, row: int, *, across: bool) -> Block:
        """See `Ops.mix`."""
        deltas = self._deltas(block).view(block.count, -1, row)
        own = torch.from_numpy(np.ascontiguousarray(weights, np.float32)).to(self.device)
        total = torch.zeros(deltas.shape[1:], device=self.device)
        for one, weight in zip(deltas, own, strict=True):
            total = total + one * (weight if across else weight[:, None])
        return _derived(block, total.view(1, -1))

    def _float(self, bits: Any) -> Tensor:
        """Bits as float32 on the device; computed rows are on it already."""
        if isinstance(bits, Tensor):
            return bits
        if bits.dtype == np.uint16:
            return torch.from_numpy(bits.view(np.int16)).to(self.device).view(torch.bfloat16).float()
        return torch.from_numpy(bits.view(np.float32)).to(self.device, copy=True)

    def _deltas(self, block: Block) -> Tensor:
        rows = self._float(block.sources.reshape(-1)).view(block.sources.shape)
        return rows - self._float(block.base) if block.subtract else rows

    def _surviving(self, delta: Tensor, survival: KeepThreshold, index: int) -> Tensor:
        bits, at = _bits(delta) & MAGNITUDE, self._places(index, len(delta))
        stays = (bits > survival.low) | ((bits == survival.low) & (at < survival.low_cut))
        stays &= ~((bits > survival.high) | ((bits == survival.high) & (at < survival.high_cut)))
        stays &= self._kept(survival, index, len(delta))
        kept = torch.where(stays, delta, torch.zeros_like(delta))
        soft = float(np.float32(survival.shrink))
        return torch.where(kept > 0, kept - soft, torch.where(kept < 0, kept + soft, kept)) if soft else kept

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

    def _store(self, total: Tensor, out: Any, key: int, index: int) -> int:
        """Round into `out`; returns how many elements are not finite."""
        bad = int((~torch.isfinite(total)).sum())
        if out.dtype == np.uint32:
            out[:] = total.cpu().numpy().view(np.uint32)
        elif key:
            noise = _shift(self._hash(key, index, len(total)), 48)
            rounded = ((_bits(total) & 0xFFFFFFFF) + noise) >> 16
            out[:] = rounded.cpu().numpy().astype(np.uint16)
        else:
            out[:] = total.bfloat16().view(torch.int16).cpu().numpy().view(np.uint16)
        return bad


def _derived(block: Block, rows: Tensor) -> Block:
    """A block of float32 rows that were computed from `block`."""
    return Block(block.index, block.base, rows, subtract=False)


def _bits(values: Tensor) -> Tensor:
    """float32 bits as int64 (the sign bit makes them negative; mask it off)."""
    return values.contiguous().view(torch.int32).long()


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)


def _tally(rows: Tensor) -> Outcome:
    """Counts and sums over deltas, without those of kept and elected entries."""
    outcome = Outcome.empty(len(rows))
    counts, sums = outcome.counts, outcome.sums
    for i, row in enumerate(rows):
        bits, wide = _bits(row) & MAGNITUDE, row.double()
        counts[i, 0] = int((bits == 0).sum())
        counts[i, 1:5] = [int((bits < e).sum()) for e in _THRESHOLDS]
        counts[i, 7] = int(bits.max()) if len(bits) else 0
        sums[i, :2] = float(wide.abs().sum()), float((wide * wide).sum())
    return outcome


def _unchanged(rows: Tensor) -> Outcome:
    """Counts and sums over deltas that are merged unchanged: every nonzero entry is kept and elected."""
    outcome = _tally(rows)
    outcome.counts[:, 5:7] = rows.shape[1] - outcome.counts[:, :1]
    outcome.sums[:, 2:] = outcome.sums[:, 1:2]
    return outcome


def _agreement(rows: Sequence[Tensor], election: Election) -> list[Tensor]:
    """Which entries of each row have the elected sign."""
    if election.elect == "none":
        return [row != 0 for row in rows]
    vote = torch.zeros_like(rows[0])
    for row in rows:
        vote = vote + (row.sign() if election.elect == "count" else row)
    plus = vote >= 0 if election.tie_positive else vote > 0
    return [(plus & (row > 0)) | ((vote < 0) & (row < 0)) for row in rows]
