"""The bandit: its reference, equal numbers of samples and steps, and settings chosen on seeds of their own."""

from __future__ import annotations

import pytest
import torch

from paft_merge.studies import bandit


def test_the_reference_is_the_distribution_of_the_paper():
    """10,000 samples of tanh(Cauchy(-0.7, 0.4)) in 100 bins give the same shares."""
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = torch.tanh(-0.7 + 0.4 * torch.tan(torch.pi * (uniform - 0.5)))
    shares = torch.histc(samples.float(), bandit.ARMS, -1, 1).double() / len(samples)
    torch.testing.assert_close(bandit.reference(), shares, atol=3e-3, rtol=0)
    assert float(bandit.reference().sum()) == pytest.approx(1)


def test_rewards_peak_where_they_should():
    paid = bandit.rewards_of([70, 20])
    assert paid.argmax(-1).tolist() == [70, 20]
    assert float(paid[0, 60]) == pytest.approx(float(torch.tensor(-1.0).exp()))


SMALL = bandit.Parameters(samples=40, tuning_seeds=1, learning_rates=[0.1, 0.3], reuse=[1], mixing=[0, 1])


@pytest.mark.parametrize("method", bandit.METHODS)
def test_every_method_raises_the_reward_where_the_peak_is_likely(method):
    spec = SMALL.model_copy(update={"samples": 200})
    rate, strength = torch.tensor([0.1, 0.1]).double(), torch.tensor([0.1, 0.1]).double()
    policy = bandit.train(bandit.Cell(method, 0.0, 4), [20, 70], rate, strength, 0, spec)
    gained = ((policy - bandit.reference()) * bandit.rewards_of([20, 70])).sum(-1)
    assert float(gained[0]) > 0.2
    torch.testing.assert_close(policy.sum(-1), torch.ones(2, dtype=torch.float64))


def test_problems_side_by_side_do_not_touch_each_other(monkeypatch):
    """Offline, with the same arms drawn for each problem, a problem ends where it ends alone."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n, **_: (torch.arange(n) * 7 % 100).expand(len(p), n))
    cell = bandit.Cell("DPO", 1.0, 2)
    both = bandit.train(cell, [20, 70], torch.tensor([0.1, 0.3]).double(), torch.tensor([0.1, 1.0]).double(), 0, SMALL)
    alone = bandit.train(cell, [70], torch.tensor([0.3]).double(), torch.tensor([1.0]).double(), 0, SMALL)
    torch.testing.assert_close(both[1:], alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("mixing", "share"), [(1.0, 1.0), (0.0, 0.0), (0.25, 0.25)])
def test_the_mixing_ratio_is_the_share_of_samples_that_do_not_come_from_the_policy(mixing, share, monkeypatch):
    """The policy's samples are arm 3 here, and the reference's arm 5."""
    draws = iter([3, 5] * 1000)
    monkeypatch.setattr(torch, "multinomial", lambda p, n, **_: torch.full((len(p), n), next(draws)))
    seen = []

    def loss(method, logps, reference, rewards, strength):
        seen.append(reference)
        return logps.sum()

    monkeypatch.setattr(bandit, "loss_of", loss)
    spec = SMALL.model_copy(update={"samples": 400})
    bandit.train(bandit.Cell("DPO", mixing, 2), [20], torch.ones(1).double(), torch.ones(1).double(), 0, spec)
    assert len(seen) == 400 // spec.batch * 2  # steps: batches times reuse
    known = bandit.reference().log()
    offline = torch.stack(seen) == known[5]
    assert bool((offline | (torch.stack(seen) == known[3])).all())
    assert float(offline.double().mean()) == pytest.approx(share, abs=0.08)


def test_settings_are_the_best_of_the_grid_and_not_chosen_on_reported_seeds(monkeypatch):
    seen = []

    def train(cell, peaks, rates, strengths, seed, spec):
        seen.append(seed)
        policy = torch.zeros(len(peaks), bandit.ARMS, dtype=torch.float64)
        policy[range(len(peaks)), peaks] = 1 - (rates - 0.3).abs() - (strengths - 0.1).abs()
        return policy

    monkeypatch.setattr(bandit, "train", train)
    found = dict(bandit.tune(SMALL))
    assert found["RWR, mixing 1, reuse 4"] == [[0.3, 0.1]] * 3
    assert found.keys() == {cell.name for cell in bandit.cells(SMALL)}
    assert min(seen) >= 1_000_000
