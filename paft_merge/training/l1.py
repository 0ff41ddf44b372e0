"""L1 penalties on a LoRA's update with their gradients, the proximal step, and the controller of the strength.

O = out features, I = in features, R = rank. The delta of one matrix is `scale * B_OR @ A_RI`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from paft_merge.training.factors import Factors, rows_per_chunk, whole


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

    The penalty of PAFT (arXiv:2406.17923, eq. 1), whose delta is the product. It has zero gradient while B = 0.
    """
    parts = [_one_product(f, chunk_bytes) for f in factors]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _one_product(f: Factors, chunk_bytes: int | None) -> Tensor:
    total: Tensor = ProductL1.apply(whole(f.a_RI), whole(f.b_OR), f.scale, rows_per_chunk(f.a_RI, chunk_bytes))  # type: ignore[no-untyped-call]
    return total


def factor_l1(factors: Iterable[Factors]) -> Tensor:
    """Return sum(|A|) + sum(|B|) over all matrices: cheaper, but it reduces the rank more than the number of entries."""
    parts = [whole(f.a_RI).float().abs().sum() + whole(f.b_OR).float().abs().sum() for f in factors]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def soft_threshold_(tensor: Tensor, threshold: Tensor | float) -> Tensor:
    """Shrink `tensor` towards zero by `threshold` in place; entries not above it become exactly zero."""
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
        cap: Largest threshold in units of `lr`; without it entries that never had a gradient (v = 0) become zero.
    """
    if second_moment is None:
        return soft_threshold_(parameter, lr * min(strength, cap))
    threshold = (lr * strength) / second_moment.sqrt().add_(eps)
    return soft_threshold_(parameter, threshold.clamp_(max=lr * cap))


def ramp(step: int, warmup_steps: int) -> float:
    """Factor of the strength at optimizer step `step` (0-based): 0 for half of the warmup, then linear to 1.

    The first half lets B leave zero before A is shrunk: with B = 0 A has no gradient that opposes the penalty.
    """
    if warmup_steps <= 0:
        return 1.0
    return min(1.0, max(0.0, 2 * (step + 1) / warmup_steps - 1))


@dataclass
class Controller:
    """Adjusts the L1 strength until a target sparsity is reached, then freezes it.

    Proportional-integral control of log(strength) on the error in logit space: each update changes the log by a gain
    times the error plus `damping` times the change of the error, at most by `limit`. The gain grows up to `reach`-fold
    as the learning rate falls, because a given change of the strength then has less effect.
    """

    target: float
    """Share of zeros wanted, in (0, 1)."""
    strength: float
    gain: float = 0.1
    reach: float = 30.0
    damping: float = 0.7
    """Gain on the *change* of the error: the sparsity lags behind the strength, which would overshoot otherwise."""
    limit: float = 0.3
    freeze_below: float = 0.01
    """Share of the largest learning rate at which the strength is frozen."""
    frozen: bool = False
    before: float | None = None
    """The error at the last update."""
    peak: float = 0.0
    """The largest learning rate so far."""

    def update(self, sparsity: float, lr: float, progress: float) -> float:
        """Take a measured sparsity and return the strength of the following steps.

        Args:
            sparsity: Share of zeros, predicted for the end of the run (`QuickStats.settled`).
            lr: Learning rate of the last step.
            progress: Finished share of the run, in (0, 1]; at 1 the strength is frozen.
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
        """Return the state that a resumed run needs, as JSON values."""
        return asdict(self)


def _logit(share: float) -> float:
    clipped = min(max(share, 1e-4), 1 - 1e-4)
    return math.log(clipped / (1 - clipped))
