"""Size and sparsity of an adapter's update, measured block by block, and magnitude pruning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from paft_merge.compute.magnitudes import EPSILON
from paft_merge.stats.metrics import hoyer
from paft_merge.training.factors import Factors, chunks, frobenius, whole

_BIN_SHIFT = 19
_BINS = 1 << (31 - _BIN_SHIFT)


@dataclass(frozen=True)
class MatrixStats:
    """Statistics of one adapted matrix."""

    name: str
    entries: int
    """Number of entries of the delta."""
    below_epsilon: float
    """Share of entries with |delta| < 1e-5: PAFT's sparsity, which also rises when the learning rate is lower."""
    exact_zero: float
    """Share of entries that are exactly 0."""
    norm: float
    """Frobenius norm of the delta."""
    relative_norm: float | None
    """That norm over the norm of the frozen weight; None where the weight is quantised."""
    below_tenth_rms: float
    """Share of entries with |delta| < 0.1 rms(delta), which does not depend on the scale; 0.08 for a Gaussian."""
    hoyer: float
    """(sqrt(n) - l1/l2) / (sqrt(n) - 1): 0 for equal entries, 0.2 for a Gaussian, 1 for a single one."""
    energy_top_10: float
    """Share of the squared norm in the largest 10 % of entries, to about 3 %."""
    effective_rank: float | None
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); None for a trimmed delta."""


@dataclass(frozen=True)
class Stats:
    """Statistics of a whole adapter: means over matrices, as in PAFT, and norms of all matrices together."""

    below_epsilon: float
    exact_zero: float
    below_tenth_rms: float
    hoyer: float
    energy_top_10: float
    effective_rank: float | None
    norm: float
    """Frobenius norm of the whole delta."""
    relative_norm: float | None
    """That norm over the norm of all frozen weights."""
    matrices: tuple[MatrixStats, ...] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """Return the statistics as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class QuickStats:
    """Statistics that are measured during training, in one pass over the delta."""

    below_epsilon: float
    exact_zero: float
    below_tenth_rms: float
    settled: float
    """`below_epsilon` as predicted for the end of the run, when the learning rate is zero."""
    norm: float


@torch.no_grad()
def quick_stats(factors: Sequence[Factors], step: float = 0.0, epsilon: float = EPSILON) -> QuickStats:
    """Measure an adapter during training.

    A subgradient never stops at zero: it oscillates with an amplitude of about `step`, which leaves about
    `step * (|B_i| + |A_j|)` in entry (i, j). `settled` counts entries below that as zero.

    Args:
        factors: The adapted matrices.
        step: Amplitude of the oscillation of a factor's entries; 0 makes `settled` equal to `below_epsilon`.
        epsilon: Threshold of `below_epsilon`.
    """
    rows, square = [], 0.0
    for f in factors:
        norm = frobenius(f)
        tenth = 0.1 * norm / math.sqrt(f.numel)
        a, b = whole(f.a_RI).detach().float(), whole(f.b_OR).detach().float()
        noise = step * abs(f.scale)
        across, down = noise * a.norm(dim=0) + epsilon, noise * b.norm(dim=1).unsqueeze(1)
        counts, start = torch.zeros(4, dtype=torch.int64), 0
        for block in chunks(f):
            block.abs_()
            found = [block < epsilon, block == 0, block < tenth]
            if step:
                found.append(block < across + down[start : start + len(block)])
            else:
                found.append(found[0])
            counts += torch.stack([torch.count_nonzero(one) for one in found]).cpu()
            start += len(block)
        rows.append(counts / f.numel)
        square += norm**2
    below, zero, faint, settled = torch.stack(rows).mean(0).tolist()
    return QuickStats(below, zero, faint, settled, math.sqrt(square))


@torch.no_grad()
def measure(factors: Sequence[Factors], epsilon: float = EPSILON, density: float | None = None) -> Stats:
    """Measure every matrix of an adapter, after trimming it to `density` if given; part of `paft_train.json`."""
    matrices = tuple(_measure_matrix(f, epsilon, density) for f in factors)
    weights = [math.inf if m.relative_norm is None else _norm(f.weight) for m, f in zip(matrices, factors, strict=True)]
    norm, total = math.sqrt(sum(m.norm**2 for m in matrices)), math.sqrt(sum(w**2 for w in weights))

    def mean(key: str) -> float:
        return float(sum(getattr(m, key) for m in matrices) / len(matrices))

    keys = ["below_epsilon", "exact_zero", "below_tenth_rms", "hoyer", "energy_top_10"]
    rank = mean("effective_rank") if density is None else None
    relative = norm / total if math.isfinite(total) and total > 0 else None
    shares = {key: mean(key) for key in keys}
    return Stats(**shares, effective_rank=rank, norm=norm, relative_norm=relative, matrices=matrices)


def _norm(weight: Tensor | None) -> float:
    if weight is None:
        return math.nan
    plain = whole(weight).detach()
    parts = (plain[start : start + 1024].float() for start in range(0, plain.shape[0], 1024))
    return math.sqrt(sum(float(part.square().sum(dtype=torch.float64)) for part in parts))


def _measure_matrix(f: Factors, epsilon: float, density: float | None) -> MatrixStats:
    n = f.numel
    if density is None:
        blocks, norm = chunks(f), frobenius(f)
    else:
        delta = trimmed(f, density)
        blocks, norm = iter([delta]), float(delta.norm())
    tenth = 0.1 * norm / math.sqrt(n)
    counts, energy = torch.zeros(_BINS, dtype=torch.float64), torch.zeros(_BINS, dtype=torch.float64)
    small = zero = faint = 0
    l1 = 0.0
    for block in blocks:
        size = block.abs_().flatten().cpu()
        small += int(torch.count_nonzero(size < epsilon))
        zero += size.numel() - int(torch.count_nonzero(size))
        faint += int(torch.count_nonzero(size < tenth))
        l1 += float(size.sum(dtype=torch.float64))
        bins = size.view(torch.int32) >> _BIN_SHIFT
        counts += torch.bincount(bins, minlength=_BINS)
        energy += torch.bincount(bins, weights=size.double().square(), minlength=_BINS)
    weight = _norm(f.weight)
    return MatrixStats(
        name=f.name,
        entries=n,
        below_epsilon=small / n,
        exact_zero=zero / n,
        norm=norm,
        relative_norm=norm / weight if weight > 0 else None,
        below_tenth_rms=faint / n,
        hoyer=hoyer(n, l1, norm) if norm > 0 and n > 1 else 0.0,
        energy_top_10=_share_of_top(counts, energy, 0.1),
        effective_rank=_effective_rank(f) if density is None else None,
    )


def _share_of_top(counts: Tensor, energy: Tensor, share: float) -> float:
    """Share of the energy in the largest `share` of entries; linear within the histogram bin at the boundary."""
    total = float(energy.sum())
    if total == 0:
        return 0.0
    wanted, kept = share * float(counts.sum()), 0.0
    for count, held in zip(counts.flip(0).tolist(), energy.flip(0).tolist(), strict=True):
        part = min(1.0, wanted / count) if count else 0.0
        kept, wanted = kept + part * held, wanted - part * count
        if wanted <= 0:
            break
    return kept / total


def _effective_rank(f: Factors) -> float:
    a, b = whole(f.a_RI).detach().double(), whole(f.b_OR).detach().double()
    values = torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T)
    shares = values[values > 0] / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return float((-(shares * shares.log()).sum()).exp()) if len(shares) else 0.0


@torch.no_grad()
def trimmed(f: Factors, density: float) -> Tensor:
    """Keep the `floor(density * entries)` largest magnitudes of one matrix's delta (at least one) and zero the rest.

    Magnitude pruning per matrix. Of equal magnitudes at the threshold the first in row order are kept.

    Returns:
        `[O, I]`, float32, dense: only here does a whole delta exist.
    """
    delta = torch.cat(list(chunks(f)))
    size = delta.abs().flatten()
    kept = max(1, math.floor(density * size.numel()))
    border = size.kthvalue(size.numel() - kept + 1).values
    above, at = size > border, size == border
    spare = kept - int(above.sum())
    keep = above | (at & (at.cumsum(0) <= spare))
    return delta.mul_(keep.view_as(delta))
