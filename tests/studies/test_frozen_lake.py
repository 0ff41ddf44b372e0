"""Frozen Lake: Gymnasium's dynamics, the optimal policy, and methods that agree where they must."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paft_merge.studies import frozen_lake as lake
from paft_merge.studies.policy_losses import residual_states
from paft_merge.training.schema import IftSpec

LEFT, DOWN, RIGHT, UP = range(4)


def test_moves_are_those_of_gymnasium():
    solid, slippery = lake.dynamics("solid"), lake.dynamics("slippery")
    assert solid[0, LEFT, 0] == solid[0, DOWN, 4] == solid[0, RIGHT, 1] == solid[14, RIGHT, 15] == 1
    assert solid[5].sum(0)[5] == solid[15].sum(0)[15] == 4  # nobody leaves a hole or the goal
    third = pytest.approx(1 / 3)
    assert [float(slippery[14, RIGHT, s]) for s in (10, 14, 15)] == [third] * 3  # up, and down against the edge
    assert float(slippery[0, LEFT, 0]) == pytest.approx(2 / 3)
    torch.testing.assert_close(slippery.sum(-1), torch.ones(16, 4, dtype=torch.float64))


@pytest.mark.parametrize(("ice", "value", "reached"), [("solid", 0.99**5, 1.0), ("slippery", 0.5420, 0.7400)])
def test_the_optimal_policy_is_the_known_one(ice, value, reached):
    """0.542 and 0.74 are the values that are known of the slippery 4x4 map with a discount of 0.99 and 100 moves."""
    moves = lake.dynamics(ice)
    values = lake.action_values(moves, 0.99)
    assert float(values[0].max()) == pytest.approx(value, abs=5e-5)
    assert lake.success(lake.optimal_policy(values, 0), moves) == pytest.approx(reached, abs=5e-3)


def test_demonstrations_are_one_that_arrives_and_one_that_does_not():
    moves = lake.dynamics("slippery")
    best = lake.optimal_policy(lake.action_values(moves, 0.99), 0)
    good, bad = lake.demonstrations(best, moves, torch.Generator().manual_seed(3))
    assert (good.reaches_goal, bad.reaches_goal) == (True, False)
    assert all(best[s, a] > 0 for s, a in zip(good.states, good.actions, strict=True))
    assert good.states[0] == bad.states[0] == 0


def test_ift_mixes_each_state_with_the_one_that_the_policy_foresaw():
    states = torch.tensor([[0, 4, 8]])
    greedy = torch.tensor(
        [[RIGHT, DOWN, UP]]
    )  # from 0 to 1, from 4 to 8; the last action leads out of the demonstration
    assert lake.foreseen(states, greedy)[:, 1:].tolist() == [[1, 8]]
    one_hot = torch.eye(16)
    mixed = residual_states(one_hot[states], one_hot[lake.foreseen(states, greedy)], 0.25)
    torch.testing.assert_close(mixed[0], torch.stack([one_hot[0], 0.75 * one_hot[4] + 0.25 * one_hot[1], one_hot[8]]))


def small(**more):
    return lake.Parameters(ice=("solid",), starts={"untrained": 0}, target_steps=5, steps=[1, 4], **more)


def test_ift_without_residual_and_without_discount_is_sft():
    spec = small(variants={"IFT": IftSpec(lam=0, gamma=0), "other": IftSpec(lam=0.5, gamma=0)})
    rows = lake.run_seed(spec, 1, None, None, Path())["solid ice, untrained start"]
    assert rows["IFT, step 4"] == pytest.approx(rows["SFT, step 4"], rel=1e-6)
    assert rows["other, step 4"]["mse"] != pytest.approx(rows["SFT, step 4"]["mse"], rel=1e-3)


def test_the_nearest_step_is_the_one_with_the_least_distance():
    rows = lake.run_seed(small(), 0, None, None, Path())["solid ice, untrained start"]
    steps = {step: rows[f"DPO, step {step}"]["mse"] for step in (1, 4)}
    assert rows["DPO, nearest"]["mse"] == min(steps.values())
    assert rows["DPO, nearest"]["step"] == min(steps, key=steps.__getitem__)
    assert rows["optimal network"]["mse"] == 0 < rows["start"]["mse"]
