"""L1 on a LoRA's update, its proximal step, its strength's controller, and what the update looks like.

O = out features, I = in features, R = rank. The delta of one matrix is `scale * B_OR @ A_RI`; nothing here but
`trimmed` ever holds a whole one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from paft_merge.compute.magnitudes import EPSILON
from paft_merge.errors import TrainError

CHUNK_BYTES, DEVICE_CHUNK_BYTES = 1 << 19, 1 << 26
"""Size of the block of delta that is looked at in one go: what a core's cache holds, and what keeps a GPU busy."""

_BIN_SHIFT = 19
_BINS = 1 << (31 - _BIN_SHIFT)


@dataclass(frozen=True, eq=False)
class Factors:
    """One adapted matrix: its low-rank factors and what multiplies them."""

    name: str
    """Dotted name of the adapted module in the base model."""
    a_RI: Tensor
    b_OR: Tensor
    scale: float
    weight: Tensor | None = None
    """The frozen weight beneath; None where it has no plain float form (4-bit bases)."""
    linear: bool = True
    """The module is an `nn.Linear`."""

    @property
    def numel(self) -> int:
        """Entries of the delta."""
        return self.b_OR.shape[0] * self.a_RI.shape[1]


def adapted(model: nn.Module, adapter: str = "default") -> tuple[Factors, ...]:
    """List the matrices that LoRA `adapter` updates, in the model's order.

    Raises:
        TrainError: TARGET, when an update is not `scale * B @ A` (DoRA, fused parameters) or nothing is adapted.
    """
    found = [_factors(name, module, adapter) for name, module in model.named_modules() if _holds(module, adapter)]
    if not found:
        raise TrainError.of("TARGET", adapter, "the adapter touches no module", "check lora.target_modules")
    return tuple(found)


def _holds(module: nn.Module, adapter: str) -> bool:
    factors = ("lora_A", "lora_embedding_A")
    return any(adapter in getattr(module, kind, ()) for kind in factors) and adapter in getattr(module, "scaling", ())


def _factors(name: str, module: Any, adapter: str) -> Factors:
    name = name.removeprefix("base_model.model.")
    if adapter in getattr(module, "lora_magnitude_vector", {}):
        raise TrainError.of(
            "TARGET",
            name,
            "DoRA's update is not a product of two factors, so it has no product L1",
            "set use_dora: false",
        )
    if adapter in module.lora_A:
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    else:
        a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    if hasattr(module, "parameter_name"):
        raise TrainError.of("TARGET", name, "fused expert parameters are not supported here", "use target_modules")
    layer = module.get_base_layer()
    weight = getattr(layer, "weight", None)
    plain = weight is not None and weight.is_floating_point() and type(weight).__name__ != "Params4bit"
    scale, linear = float(module.scaling[adapter]), isinstance(layer, nn.Linear)
    return Factors(name, a.flatten(1), b.flatten(1), scale, weight if plain else None, linear)


def owner(factor: Tensor) -> Tensor:
    """The parameter of which a factor is a flattened view."""
    return factor._base if factor._base is not None else factor


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded (FSDP2) parameter; others are returned as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def rows_per_chunk(a_RI: Tensor, chunk_bytes: int | None = None) -> int:
    """How many float32 rows of a delta fit in `chunk_bytes` (by device, if not given); at least one."""
    size = chunk_bytes or (CHUNK_BYTES if a_RI.device.type == "cpu" else DEVICE_CHUNK_BYTES)
    return max(1, size // (4 * a_RI.shape[1]))


class ProductL1(torch.autograd.Function):
    """Sum of |scale * B @ A| with its subgradient (0 at 0); holds `chunk` rows of the product at a time.

    dP/dB = |s| S A^T and dP/dA = |s| B^T S with S = sign(BA). The sum itself is <B, S A^T>: no pass for |.| is needed.
    """

    @staticmethod
    def forward(ctx: Any, a_RI: Tensor, b_OR: Tensor, scale: float, chunk: int) -> Tensor:
        with torch.autocast(a_RI.device.type, enabled=False):
            wide = torch.promote_types(a_RI.dtype, torch.float32)
            a, b = a_RI.to(wide), b_OR.to(wide)
            grad_a, grad_b = torch.zeros_like(a), torch.empty_like(b)
            signs = a.new_empty((min(chunk, b.shape[0]), a.shape[1]))
            for start in range(0, b.shape[0], chunk):
                rows = b[start : start + chunk]
                sign = signs[: rows.shape[0]]
                torch.mm(rows, a, out=sign).sign_()
                torch.mm(sign, a.T, out=grad_b[start : start + chunk])
                grad_a.addmm_(rows.T, sign)
            size = abs(scale)
            total = (b * grad_b).sum() * size
            ctx.save_for_backward(grad_a.mul_(size).to(a_RI.dtype), grad_b.mul_(size).to(b_OR.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_a, grad_b = ctx.saved_tensors
        return grad * grad_a, grad * grad_b, None, None


def product_l1(factors: Iterable[Factors], chunk_bytes: int | None = None) -> Tensor:
    """Return the L1 norm of the whole delta: sum over all matrices of |scale * B @ A|. Scalar, differentiable.

    The penalty of PAFT (arXiv:2406.17923, eq. 1), whose delta is the product. There is no gradient while B = 0.
    """
    parts = [_one_product(f, chunk_bytes) for f in factors]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _one_product(f: Factors, chunk_bytes: int | None) -> Tensor:
    total: Tensor = ProductL1.apply(whole(f.a_RI), whole(f.b_OR), f.scale, rows_per_chunk(f.a_RI, chunk_bytes))  # type: ignore[no-untyped-call]
    return total


def factor_l1(factors: Iterable[Factors]) -> Tensor:
    """Return sum(|A|) + sum(|B|) over all matrices: the cheap stand-in, which thins the rank more than the entries."""
    parts = [whole(f.a_RI).float().abs().sum() + whole(f.b_OR).float().abs().sum() for f in factors]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def soft_threshold_(tensor: Tensor, threshold: Tensor | float) -> Tensor:
    """Shrink `tensor` towards zero by `threshold` in place; what is no larger becomes exactly zero."""
    return tensor.copy_(tensor.sign() * (tensor.abs() - threshold).clamp_(min=0))


@torch.no_grad()
def prox_step_(
    parameter: Tensor, *, lr: float, strength: float, second_moment: Tensor | None, eps: float, cap: float
) -> Tensor:
    """Apply the proximal operator of `strength * |.|` in the metric of the Adam step just taken.

    Adaptive proximal gradient (Yun et al., "Adaptive Proximal Gradient Methods for Structured Neural Networks", NeurIPS
    2021): the threshold of an entry is lr * strength / (sqrt(v) + eps), as its step was lr * m / (sqrt(v) + eps).

    Args:
        parameter: A factor, modified in place.
        lr: Learning rate of the step just taken.
        strength: L1 strength, ramped already.
        second_moment: Bias-corrected Adam `v`; None for a plain gradient step (threshold lr * strength).
        eps: Adam's epsilon.
        cap: Largest threshold in units of `lr`: entries that never had a gradient (v = 0) would be wiped otherwise.
    """
    if second_moment is None:
        return soft_threshold_(parameter, lr * min(strength, cap))
    threshold = (lr * strength) / second_moment.sqrt().add_(eps)
    return soft_threshold_(parameter, threshold.clamp_(max=lr * cap))


def ramp(step: int, warmup_steps: int) -> float:
    """Share of the strength in force at optimizer step `step` (0-based): 0 for half the warmup, then linear to 1.

    The silent half lets B leave zero before anything shrinks A: with B = 0 nothing holds A up.
    """
    if warmup_steps <= 0:
        return 1.0
    return min(1.0, max(0.0, 2 * (step + 1) / warmup_steps - 1))


# ---------------------------------------------------------------------------------------------- what a delta looks like


def chunks(f: Factors, chunk_bytes: int | None = None) -> Iterator[Tensor]:
    """Yield float32 row blocks of `scale * B @ A`, in order."""
    a, b = whole(f.a_RI).detach().float(), whole(f.b_OR).detach().float()
    step = rows_per_chunk(a, chunk_bytes)
    with torch.autocast(a.device.type, enabled=False):
        for start in range(0, b.shape[0], step):
            yield (b[start : start + step] @ a).mul_(f.scale)


def frobenius(f: Factors) -> float:
    """Norm of the delta from R x R Gram matrices, in float64: sqrt(tr(B^T B A A^T)) * |scale|."""
    a, b = whole(f.a_RI).detach().double(), whole(f.b_OR).detach().double()
    return abs(f.scale) * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


@dataclass(frozen=True)
class MatrixStats:
    """One adapted matrix in numbers."""

    name: str
    entries: int
    """Entries of the delta."""
    below_epsilon: float
    """Share of entries with |delta| < 1e-5: PAFT's sparsity, which also falls with the learning rate."""
    exact_zero: float
    """Share of entries that are exactly 0."""
    norm: float
    """Frobenius norm of the delta."""
    relative_norm: float | None
    """That norm over the norm of the weight beneath; None where the weight has no plain float form."""
    below_tenth_rms: float
    """Share of entries with |delta| < 0.1 rms(delta): sparsity that no learning rate can fake (a Gaussian has 0.08)."""
    hoyer: float
    """(sqrt(n) - l1/l2) / (sqrt(n) - 1): 0 for equal entries, 0.2 for a Gaussian, 1 for a single one."""
    energy_top_10: float
    """Share of the squared norm in the largest 10 % of entries, to about 3 %."""
    effective_rank: float | None
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); None for a trimmed delta."""


@dataclass(frozen=True)
class Stats:
    """A whole adapter in numbers: means over matrices as PAFT takes them, and totals."""

    below_epsilon: float
    exact_zero: float
    below_tenth_rms: float
    hoyer: float
    energy_top_10: float
    effective_rank: float | None
    norm: float
    """Frobenius norm of the whole delta."""
    relative_norm: float | None
    """That norm over the norm of all weights beneath."""
    matrices: tuple[MatrixStats, ...] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class QuickStats:
    """What is measured while training: one pass over the delta, chunk by chunk."""

    below_epsilon: float
    exact_zero: float
    below_tenth_rms: float
    settled: float
    """What `below_epsilon` will be when the learning rate has gone to zero."""
    norm: float


@torch.no_grad()
def quick_stats(factors: Sequence[Factors], step: float = 0.0, epsilon: float = EPSILON) -> QuickStats:
    """Measure PAFT's sparsity, exact zeros and the scale-free one (means over matrices), and the norm.

    `settled` foretells the first for when the learning rate will have gone to zero: a subgradient never rests on zero,
    it steps across by about `step`, which leaves about `step * (|B_i| + |A_j|)` in entry (i, j).
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
    """Measure every matrix of an adapter, trimmed if a density is given: the record that merge and audit read."""
    matrices = tuple(_measure_matrix(f, epsilon, density) for f in factors)
    beneath = [math.inf if m.relative_norm is None else _norm(f.weight) for m, f in zip(matrices, factors, strict=True)]
    norm, total = math.sqrt(sum(m.norm**2 for m in matrices)), math.sqrt(sum(b**2 for b in beneath))

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
    blocks = chunks(f) if density is None else iter([trimmed(f, density)])
    norm, n = frobenius(f), f.numel
    if density is not None:
        norm = float(trimmed(f, density).norm())
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
    beneath = _norm(f.weight)
    hoyer = (math.sqrt(n) - l1 / norm) / (math.sqrt(n) - 1) if norm > 0 and n > 1 else 0.0
    return MatrixStats(
        name=f.name,
        entries=n,
        below_epsilon=small / n,
        exact_zero=zero / n,
        norm=norm,
        relative_norm=norm / beneath if beneath > 0 else None,
        below_tenth_rms=faint / n,
        hoyer=hoyer,
        energy_top_10=_share_of_top(counts, energy, 0.1),
        effective_rank=_effective_rank(f) if density is None else None,
    )


def _share_of_top(counts: Tensor, energy: Tensor, share: float) -> float:
    """Energy share of the largest `share` of entries, linear within the histogram bin that is cut."""
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

    Plain magnitude pruning, per matrix. Of equal magnitudes at the border the first in row order stay.

    Returns:
        `[O, I]`, float32, dense: one matrix, the only place where a whole delta is held.
    """
    delta = torch.cat(list(chunks(f)))
    size = delta.abs().flatten()
    kept = max(1, math.floor(density * size.numel()))
    border = size.kthvalue(size.numel() - kept + 1).values
    above, at = size > border, size == border
    spare = kept - int(above.sum())
    keep = above | (at & (at.cumsum(0) <= spare))
    return delta.mul_(keep.view_as(delta))


# ----------------------------------------------------------------------------------------- the strength's controller


@dataclass
class Controller:
    """Moves the strength of the L1 slowly until a sparsity is met, then leaves it alone.

    Proportional-integral control of log(strength) on the error in logit space: with every look the log moves by a gain
    times the error and `damping` times its change, at most `limit`, until the learning rate has all but gone. The gain
    grows as the learning rate falls, `reach`-fold at most: the smaller it is, the less a strength moves.
    """

    target: float
    """Share of zeros wanted, in (0, 1)."""
    strength: float
    gain: float = 0.1
    reach: float = 30.0
    damping: float = 0.7
    """Answer to a *change* of the error: the sparsity lags behind the strength, which would overshoot otherwise."""
    limit: float = 0.3
    freeze_below: float = 0.01
    """Share of the largest learning rate at which the strength is left alone."""
    frozen: bool = False
    before: float | None = None
    """The error at the last look."""
    peak: float = 0.0
    """The largest learning rate so far."""

    def update(self, sparsity: float, lr: float, progress: float) -> float:
        """Take a measured sparsity and return the strength to use from here on.

        Args:
            sparsity: share of zeros, as it will be when the learning rate is gone.
            lr: of the step just taken.
            progress: 0..1 of the run; the last look changes nothing that could still act.
        """
        self.peak = max(self.peak, lr)
        left = lr / self.peak if self.peak else 1.0
        if self.frozen:
            return self.strength
        error = _logit(self.target) - _logit(sparsity)
        change = 0.0 if self.before is None else error - self.before
        self.before, self.frozen = error, left <= self.freeze_below or progress >= 1
        if not self.frozen:
            move = self.gain * min(1 / left, self.reach) * error + self.damping * change
            self.strength *= math.exp(max(-self.limit, min(self.limit, move)))
        return self.strength

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as JSON values."""
        return asdict(self)


def _logit(share: float) -> float:
    clipped = min(max(share, 1e-4), 1 - 1e-4)
    return math.log(clipped / (1 - clipped))
