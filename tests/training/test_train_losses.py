"""The objectives against hand-written float64 references, published test vectors and TRL's own numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paft_merge.training.losses import (
    discounted_suffix,
    ift_loss,
    log1mexp,
    masked_mean,
    orpo_loss,
    residual_embeddings,
    rwr_weights,
    weighted_nll,
)

VECTOR = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)


def token_logps(logits, labels):
    """Log-probability of every next token `[B, T]`, zero where the label is -100."""
    targets = labels[:, 1:]
    picked = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(targets == -100, 0.0)


def test_ift_matches_the_vectors_of_the_authors_code():
    losses = VECTOR.clone().requires_grad_()
    assert discounted_suffix(losses, 0.5)[0].tolist() == [3.25, 4.5, 5.0, 4.0]
    loss = ift_loss(losses, torch.ones(1, 4), gamma=0.5)
    assert loss.item() == pytest.approx(43.25 / 16.75, rel=1e-12)  # printed as 2.5820894 in the notes
    loss.backward()
    expected = torch.tensor([0.0995767, 0.1866785, 0.2824683, 0.3154377], dtype=torch.float64)
    torch.testing.assert_close(losses.grad[0], expected, atol=1e-7, rtol=0)


def test_ift_with_detached_weights_has_the_weights_as_gradient():
    losses = VECTOR.clone().requires_grad_()
    ift_loss(losses, torch.ones(1, 4), gamma=0.5, detach_weights=True).backward()
    expected = torch.tensor([0.7761194, 1.0746268, 1.1940299, 0.9552239], dtype=torch.float64) / 4
    torch.testing.assert_close(losses.grad[0], expected, atol=1e-7, rtol=0)


def test_ift_can_push_an_easy_token_down_unless_weights_are_detached():
    losses = torch.tensor([[9.0, 0.01, 0.01, 0.01]], dtype=torch.float64, requires_grad=True)
    ift_loss(losses, torch.ones(1, 4), gamma=0.95).backward()
    assert (losses.grad[0, 1:] < 0).all()
    losses.grad = None
    ift_loss(losses, torch.ones(1, 4), gamma=0.95, detach_weights=True).backward()
    assert (losses.grad >= 0).all()


def test_ift_without_discount_is_the_mean_over_sequences_of_token_means():
    losses = torch.rand(3, 7, dtype=torch.float64)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 1]])
    torch.testing.assert_close(ift_loss(losses, mask, gamma=0.0), masked_mean(losses, mask).mean())


def test_ift_ignores_sequences_without_a_response_and_survives_a_perfect_model():
    losses = torch.rand(2, 5, dtype=torch.float64)
    alone = ift_loss(losses[:1], torch.ones(1, 5), gamma=0.9)
    with_empty = ift_loss(losses, torch.tensor([[1] * 5, [0] * 5]), gamma=0.9)
    torch.testing.assert_close(with_empty, alone)
    assert ift_loss(torch.zeros(2, 5), torch.ones(2, 5), gamma=0.9).item() == 0.0
    assert ift_loss(torch.ones(2, 5), torch.zeros(2, 5), gamma=0.9).item() == 0.0


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 37), gamma=st.floats(0, 1), seed=st.integers(0, 999))
def test_the_suffix_sum_is_the_double_loop(length, gamma, seed):
    losses = torch.rand(2, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    slow = torch.stack([sum(gamma ** (j - i) * losses[:, j] for j in range(i, length)) for i in range(length)], -1)
    torch.testing.assert_close(discounted_suffix(losses, gamma), slow)


def test_ift_gradient_agrees_with_finite_differences():
    losses = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1] * 6, [0, 1, 1, 0, 1, 0]])
    assert torch.autograd.gradcheck(lambda x: ift_loss(x, mask, gamma=0.8), losses)


def _preferences(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    logps = -torch.rand(4, 6, generator=generator, dtype=dtype) * 3 - 0.05
    completion = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
    attention = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    return logps * attention, completion, attention


@pytest.mark.parametrize("nll", ["full", "response"])
def test_orpo_matches_the_formula_written_out_by_hand(nll):
    logps, completion, attention = _preferences()
    losses, counted, total = [], 0, 0.0
    for pair in range(2):
        odds = []
        for row in (pair, pair + 2):
            p = sum(logps[row][completion[row] == 1].tolist()) / int(completion[row].sum())
            odds.append(p - torch.log(1 - torch.exp(torch.tensor(p, dtype=torch.float64))).item())
        losses.append(-torch.log(torch.sigmoid(torch.tensor(odds[0] - odds[1], dtype=torch.float64))).item())
        kept = (attention if nll == "full" else completion)[pair] == 1
        total, counted = total - logps[pair][kept].sum().item(), counted + int(kept.sum())
    terms = orpo_loss(logps, completion, attention, beta=0.3, nll=nll)
    assert terms.loss.item() == pytest.approx(total / counted + 0.3 * sum(losses) / 2, rel=1e-12)


def test_orpo_odds_term_is_the_one_of_trls_trainer():
    from types import SimpleNamespace

    orpo = pytest.importorskip("trl.experimental.orpo")
    logps, completion, attention = _preferences()
    ours = orpo_loss(logps, completion, attention, beta=0.3)
    fake = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs = orpo.ORPOTrainer.odds_ratio_loss(fake, ours.chosen, ours.rejected)[0]
    assert 0.3 * ours.odds.item() == pytest.approx(-theirs.mean().item(), rel=1e-6)


def test_orpo_gradient_agrees_with_finite_differences():
    logps, completion, attention = _preferences()
    logps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: orpo_loss(x, completion, attention, beta=0.5).loss, logps)


def test_log1mexp_is_accurate_near_zero_and_far_away():
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(400):
        for x in (-1e-12, -1e-4, -0.5, -0.8, -20.0, -700.0):
            value = log1mexp(torch.tensor(x, dtype=torch.float64)).item()
            assert value == pytest.approx(float(mpmath.log(1 - mpmath.exp(x))), rel=1e-12, abs=1e-300)
    sure = torch.zeros(1, requires_grad=True)
    log1mexp(sure).backward()
    assert torch.isfinite(sure.grad).all()


def test_token_logps_are_cross_entropy_with_the_sign_turned():
    logits = torch.randn(2, 5, 11)
    labels = torch.tensor([[1, 2, 3, 4, -100], [0, -100, 5, 6, 7]])
    logps = token_logps(logits, labels)
    reference = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 11).double(), labels[:, 1:].reshape(-1), reduction="none", ignore_index=-100
    )
    torch.testing.assert_close(logps.double().flatten(), -reference, atol=1e-6, rtol=1e-6)
    assert logps[0, 3] == 0


def test_residual_embeddings_mix_only_the_response():
    gold, predicted = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    mixed = residual_embeddings(gold, predicted, torch.tensor([[False, True, True]]), 0.2)
    assert mixed[0, :, 0].tolist() == pytest.approx([0.0, 0.2, 0.2])


def test_rwr_weights_average_one_and_follow_the_rewards():
    weights = rwr_weights([0.0, 1.0, 2.0], 0.5)
    assert sum(weights) == pytest.approx(3.0)
    assert weights[2] / weights[1] == pytest.approx(torch.tensor(2.0).exp().item())
    logps = -torch.ones(3, 2)
    assert weighted_nll(logps, torch.ones(3, 2), torch.tensor(weights)).item() == pytest.approx(1.0)
