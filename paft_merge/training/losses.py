"""Losses of the objectives, as pure functions of token log-probabilities.

B = sequences, P = preference pairs (B = 2P: chosen first, then rejected), T = predicted positions, D = embedding width.
A position `t` of a `[B, T]` tensor is the prediction of token `t + 1` of its sequence (labels already shifted).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NllScope = Literal["full", "response"]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average `[B, T]` over the marked positions of each row: `[B]`; 0 for a row without any."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0 without cancellation (Maechler 2012, "Accurately Computing log(1-exp(-a))")."""
    below = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = below > -0.6931471805599453
    # Each branch gets harmless values where the other one is used: `where` would propagate a NaN gradient.
    return torch.where(
        near,
        (-torch.expm1(torch.where(near, below, -1.0))).log(),
        torch.log1p(-torch.exp(torch.where(near, -1.0, below))),
    )


class OrpoTerms(NamedTuple):
    """The terms of one ORPO batch; `loss` is minimised."""

    loss: Tensor
    """Scalar: `nll + beta * odds`."""
    nll: Tensor
    """Scalar: token-mean negative log-likelihood of the chosen sequences."""
    odds: Tensor
    """Scalar: mean of -log sigmoid of the log odds ratio."""
    chosen: Tensor
    """`[P]`: mean log-probability per token of the chosen responses."""
    rejected: Tensor
    """`[P]`: the same of the rejected ones."""


def orpo_loss(
    logps: Tensor, completion_mask: Tensor, attention_mask: Tensor, *, beta: float, nll: NllScope = "full"
) -> OrpoTerms:
    """Score preference pairs without a reference: NLL of the chosen plus `beta` times the odds-ratio term.

    ORPO (Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7; `beta` is the paper's lambda). The official code and TRL take
    the NLL over prompt and response (`full`), LLaMA-Factory over the response only.

    Args:
        logps: `[2P, T]` log-probabilities of every attended token, prompt included; chosen rows first.
        completion_mask: `[2P, T]`, 1 on response tokens (shifted).
        attention_mask: `[2P, T]`, 1 on every real token (shifted).
        beta: Weight of the odds-ratio term, >= 0.
        nll: Tokens that the NLL counts.

    Returns:
        `OrpoTerms`, in float32 or wider.
    """
    logps = logps.to(torch.promote_types(logps.dtype, torch.float32))
    chosen, rejected = masked_mean(logps, completion_mask).chunk(2)
    ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    odds = -F.logsigmoid(ratio).mean()
    counted = (attention_mask if nll == "full" else completion_mask).chunk(2)[0]
    loss_of_chosen = -(logps.chunk(2)[0] * counted).sum() / counted.sum().clamp(min=1)
    return OrpoTerms(loss_of_chosen + beta * odds, loss_of_chosen, odds, chosen, rejected)


def discounted_suffix(losses: Tensor, gamma: float) -> Tensor:
    """Return c_i = sum over j >= i of gamma^(j - i) * l_j along the last axis; differentiable, log2(T) passes.

    Args:
        losses: `[B, T]`, zero on positions that do not count; distances are positions, counted or not.
        gamma: Discount, in [0, 1].
    """
    total, step = losses, 1
    while step < losses.shape[-1] and gamma > 0:
        total = total + gamma**step * F.pad(total[..., step:], (0, step))
        step *= 2
    return total


def ift_loss(losses: Tensor, mask: Tensor, *, gamma: float, detach_weights: bool = False) -> Tensor:
    """Weight every token's loss by the discounted losses that follow it, as Intuitive Fine-Tuning does.

    IFT (Hua et al. 2024, arXiv:2405.11870) as its authors' code computes it: w_i = N c_i / sum(c), the loss of a
    sequence is mean(w_i l_i) = sum(l c) / sum(c), the batch the mean over sequences. The paper's eq. 22 weighs *late*
    tokens linearly instead; this function follows the code. Gradients flow through its weights, which can lower the
    probability of a gold token; `detach_weights` avoids that.

    Args:
        losses: `[B, T]` negative log-likelihoods.
        mask: `[B, T]`, 1 on response tokens.
        gamma: Discount in [0, 1]; 0 gives the plain mean over tokens.
        detach_weights: Hold the weights constant in the gradient.

    Returns:
        Scalar. Sequences without a response token are left out of the mean; a batch of only such gives 0.
    """
    counted = losses * mask
    weights = discounted_suffix(counted, gamma) * mask if gamma > 0 else mask.to(losses.dtype)
    if gamma > 0 and detach_weights:
        weights = weights.detach()
    total = weights.sum(-1)
    usable = total > 0
    per_sequence = (counted * weights).sum(-1) / torch.where(usable, total, torch.ones_like(total))
    present = mask.sum(-1) > 0
    return (per_sequence * usable).sum() / present.sum().clamp(min=1)


def residual_embeddings(embeddings: Tensor, predicted: Tensor, mask: Tensor, lam: float) -> Tensor:
    """Mix the gold embeddings with those of the model's own greedy predictions: `(1 - lam) e + lam E(x')`.

    Args:
        embeddings: `[B, T + 1, D]` of the gold tokens.
        predicted: `[B, T + 1, D]` of the greedy prediction *of* each position (from the gold prefix before it).
        mask: `[B, T + 1]`, true on response positions; the others keep the gold embedding.
        lam: Share of the prediction, in [0, 1].
    """
    return torch.where(mask.unsqueeze(-1), (1 - lam) * embeddings + lam * predicted, embeddings)


def rwr_weights(rewards: Sequence[float], temperature: float) -> list[float]:
    """Return reward-weighted-regression weights of one prompt's samples: softmax(reward / temperature), mean 1.

    RWR (Peters and Schaal 2007) with the normaliser taken over the samples of a prompt, as in arXiv:2404.14367.
    """
    scaled = torch.tensor(list(rewards), dtype=torch.float64) / temperature
    return [float(weight) for weight in scaled.softmax(0) * len(rewards)]


def weighted_nll(logps: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over sequences of weight times token-mean NLL: `logps`, `mask` `[B, T]`, `weights` `[B]`."""
    return -(masked_mean(logps, mask) * weights).mean()
