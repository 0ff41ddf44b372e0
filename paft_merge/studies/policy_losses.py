"""Losses of policies over states and actions: the losses of `training`, with an action in the place of a token.

N = sequences (of pairs: chosen ones first, then rejected ones), T = actions, S = states.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from paft_merge.training.losses import ift_loss, orpo_loss, residual_embeddings, weighted_nll

Preference = Literal["dpo", "ipo"]


def likelihood(logps: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of actions, averaged over the actions of a sequence and then over sequences.

    It is SFT of demonstrations, of the preferred samples (Pref-FT) and of the best of N, and RWR with `weights`.

    Args:
        logps: `[N, T]` log-probabilities of the actions.
        mask: `[N, T]`, 1 on actions and 0 on padding.
        weights: `[N]`, by default 1.
    """
    return weighted_nll(logps, mask, torch.ones_like(logps[:, 0]) if weights is None else weights)


def preference_margin(logps: Tensor, reference: Tensor, mask: Tensor, kind: Preference = "dpo") -> Tensor:
    """Log-ratio of policy to reference of the chosen sequence minus that of the rejected one, `[N / 2]`.

    A sequence's ratio is the sum over its actions in DPO and the mean in IPO, as in TRL's trainer, which the product uses.
    """
    ratios = ((logps - reference) * mask).sum(-1)
    chosen, rejected = (ratios / mask.sum(-1) if kind == "ipo" else ratios).chunk(2)
    return chosen - rejected


def preference_loss(margin: Tensor, beta: float | Tensor, kind: Preference) -> Tensor:
    """Loss of each margin: DPO (arXiv:2305.18290, eq. 7) or IPO (arXiv:2310.12036, eq. 17); of the shape of `margin`."""
    return -F.logsigmoid(beta * margin) if kind == "dpo" else (margin - 1 / (2 * beta)) ** 2


def odds_ratio(logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    """ORPO of pairs of sequences, `[N, T]`; all actions belong to the response."""
    return orpo_loss(logps, mask, mask, beta=beta).loss


def residual_states(states: Tensor, predicted: Tensor, lam: float) -> Tensor:
    """IFT's inputs: each state after the first is mixed with the state that the policy's greedy action would lead to.

    Args:
        states: `[N, T, S]` one-hot states of the demonstration.
        predicted: `[N, T, S]` one-hot, the state that follows the greedy action of the state before; its first is not used.
        lam: Share of the predicted state.
    """
    later = torch.arange(states.shape[1]).expand(states.shape[:2]) > 0
    return residual_embeddings(states, predicted, later, lam)


def intuitive(logps: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """IFT of demonstrations, from log-probabilities `[N, T]` at the inputs of `residual_states`."""
    return ift_loss(-logps, mask, gamma=gamma)


def policy_gradient(logps: Tensor, rewards: Tensor) -> Tensor:
    """REINFORCE with a leave-one-out baseline over the samples of a group; both `[..., N]`; a scalar for each group.

    The baseline of a sample is the mean reward of the others (RLOO, arXiv:2402.14740, eq. 9).
    """
    count = rewards.shape[-1]
    advantages = (rewards - rewards.mean(-1, keepdim=True)) * (count / (count - 1))
    return -(advantages * logps).mean(-1)
