"""Study 2: SFT, DPO, ORPO and IFT on Frozen Lake (arXiv:2405.11870, Figure 3 and section 5.3).

The world is Gymnasium's 4x4 map: states count from the upper left, actions are left, down, right and up. On slippery ice
a move goes to the intended side or to one of the two sides next to it, each with probability 1/3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from paft_merge.recipe.sections import Section
from paft_merge.studies.policy_losses import (
    intuitive,
    likelihood,
    odds_ratio,
    preference_loss,
    preference_margin,
    residual_states,
)
from paft_merge.studies.study import Tables
from paft_merge.training.schema import IftSpec, OpenShare

MAP = "SFFFFHFHFFFHHFFG"
WIDTH, STATES, ACTIONS = 4, 16, 4
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))
HORIZON = 100
"""Gymnasium ends an episode after so many moves."""
ENDS = torch.tensor([cell in "HG" for cell in MAP])


class Parameters(Section):
    """The parameters of the study."""

    ice: tuple[Literal["solid", "slippery"], ...] = ("solid", "slippery")
    hidden: PositiveInt = 32
    learning_rate: PositiveFloat = 0.01
    steps: list[PositiveInt] = Field(default_factory=lambda: [1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300], min_length=1)
    """Steps of Adam after which a policy is measured."""
    starts: dict[str, NonNegativeInt] = Field(default_factory=lambda: {"untrained": 0, "half-trained": 20})
    """Policies that all methods start from, which are also DPO's reference: by name, the steps towards the optimal policy."""
    target_steps: PositiveInt = 600
    """Steps that train the network of the optimal policy, from the start of all methods."""
    discount: OpenShare = 0.99
    exploration: OpenShare = 0.05
    """Share of the optimal policy that is uniform over the actions: its log-probabilities are finite then."""
    beta: PositiveFloat = 0.1
    orpo_beta: NonNegativeFloat = 0.1
    variants: dict[str, IftSpec] = Field(default_factory=lambda: {"IFT": IftSpec()})
    """IFT with the settings of the paper, and with others, by the name of the row."""


def landing(state: int, action: int) -> int:
    """The state that a move leads to without slipping; ends are never left."""
    if ENDS[state]:
        return state
    row, column = divmod(state, WIDTH)
    down, right = MOVES[action]
    return min(max(row + down, 0), WIDTH - 1) * WIDTH + min(max(column + right, 0), WIDTH - 1)


def dynamics(ice: str) -> Tensor:
    """The probabilities `[state, action, next state]`, float64."""
    found = torch.zeros(STATES, ACTIONS, STATES, dtype=torch.float64)
    for state in range(STATES):
        for action in range(ACTIONS):
            sides = (0,) if ice == "solid" else (-1, 0, 1)
            for side in sides:
                found[state, action, landing(state, (action + side) % ACTIONS)] += 1 / len(sides)
    return found


def action_values(moves: Tensor, discount: float) -> Tensor:
    """The optimal action values `[state, action]` by value iteration; reaching the goal pays 1."""
    goal = STATES - 1
    pays = moves[..., goal] * ~ENDS[:, None]
    values = torch.zeros(STATES, dtype=torch.float64)
    while True:
        found = pays + discount * (moves @ values) * ~ENDS[:, None]
        if torch.equal(best := found.max(1).values, values) or (best - values).abs().max() < 1e-12:
            return found
        values = best


def optimal_policy(values: Tensor, exploration: float) -> Tensor:
    """Equal shares for the optimal actions of each state, mixed with `exploration` of the uniform policy: `[state, action]`."""
    best = (values >= values.max(1, keepdim=True).values - 1e-9).double()
    return (1 - exploration) * best / best.sum(1, keepdim=True) + exploration / ACTIONS


def success(policy: Tensor, moves: Tensor) -> float:
    """The probability that a policy `[state, action]` reaches the goal within an episode."""
    step = torch.einsum("sa,san->sn", policy.double(), moves)
    return float(torch.linalg.matrix_power(step, HORIZON)[0, STATES - 1])


class Trajectory(NamedTuple):
    """The states that a policy passed through, and its action in each."""

    states: list[int]
    actions: list[int]
    reaches_goal: bool


def wander(policy: Tensor, moves: Tensor, draw: torch.Generator) -> Trajectory:
    """Sample an episode."""
    states: list[int] = []
    actions: list[int] = []
    here = 0
    while not ENDS[here] and len(states) < HORIZON:
        action = int(torch.multinomial(policy[here], 1, generator=draw))
        states.append(here)
        actions.append(action)
        here = int(torch.multinomial(moves[here, action], 1, generator=draw))
    return Trajectory(states, actions, here == STATES - 1)


def demonstrations(best: Tensor, moves: Tensor, draw: torch.Generator) -> tuple[Trajectory, Trajectory]:
    """An episode of the optimal policy that reaches the goal, and one of the uniform policy that does not."""
    uniform = torch.full((STATES, ACTIONS), 1 / ACTIONS, dtype=torch.float64)
    optimal = next(t for _ in iter(int, 1) if (t := wander(best, moves, draw)).reaches_goal)
    worse = next(t for _ in iter(int, 1) if not (t := wander(uniform, moves, draw)).reaches_goal)
    return optimal, worse


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of numbers as `[N, T]` int64, and the mask of those that are there."""
    width = max(map(len, rows))
    return (
        torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]),
        torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows]),
    )


def foreseen(states: Tensor, greedy: Tensor) -> Tensor:
    """The state that the greedy action of the state before leads to, without slipping, `[N, T]`; the first is not defined.

    Args:
        states: `[N, T]` states of the demonstration.
        greedy: `[N, T]` greedy actions in them.
    """
    after = torch.tensor([[landing(state, action) for action in range(ACTIONS)] for state in range(STATES)])
    return after[states, greedy].roll(1, dims=1)


def loss_of(
    method: str, network: nn.Module, start: nn.Module, pair: Sequence[Trajectory], spec: Parameters
) -> Callable[[], Tensor]:
    """The loss of a method on its demonstrations: of the optimal one, or of the pair."""
    given = pair if method in ("DPO", "ORPO") else pair[:1]
    states, mask = _padded([t.states for t in given])
    actions, _ = _padded([t.actions for t in given])
    inputs = nn.functional.one_hot(states, STATES).float()

    def logps(net: nn.Module, at: Tensor) -> Tensor:
        found: Tensor = net(at).log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        return found

    with torch.no_grad():
        reference = logps(start, inputs)

    def loss() -> Tensor:
        if method == "SFT":
            return likelihood(logps(network, inputs), mask)
        if method == "ORPO":
            return odds_ratio(logps(network, inputs), mask, spec.orpo_beta)
        if method == "DPO":
            margin = preference_margin(logps(network, inputs), reference, mask)
            return preference_loss(margin, spec.beta, "dpo").mean()
        with torch.no_grad():
            predicted = foreseen(states, network(inputs).argmax(-1))
        ift = spec.variants[method]
        mixed = residual_states(inputs, nn.functional.one_hot(predicted, STATES).float(), ift.lam)
        return intuitive(logps(network, mixed), mask, ift.gamma)

    return loss


def run_seed(spec: Parameters, seed: int, data: Path | None, tuned: Any, work: Path) -> Tables:
    """Train every method from each start on each kind of ice, and compare the networks with that of the optimal policy."""
    return {
        f"{ice} ice, {start} start": _rows(ice, steps, spec, seed)
        for ice in spec.ice
        for start, steps in spec.starts.items()
    }


def _rows(ice: str, warm_steps: int, spec: Parameters, seed: int) -> dict[str, dict[str, float]]:
    """Each method after each of `spec.steps`, and at the one of them where its parameters are nearest to the target's."""
    draw = torch.Generator().manual_seed(seed)
    moves = dynamics(ice)
    values = action_values(moves, spec.discount)
    target = optimal_policy(values, spec.exploration)
    pair = demonstrations(optimal_policy(values, 0), moves, draw)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        best = nn.Sequential(nn.Linear(STATES, spec.hidden), nn.ReLU(), nn.Linear(spec.hidden, ACTIONS))
    start = copy.deepcopy(best)
    every, open_states = torch.eye(STATES), ~ENDS

    def to_target() -> Tensor:
        found: Tensor = -(target.float() * best(every).log_softmax(-1))[open_states].sum(-1).mean()
        return found

    for done in _descent(best, to_target, spec.target_steps, spec.learning_rate):
        if done == warm_steps:
            start = copy.deepcopy(best)
    on_path = torch.zeros(STATES, dtype=torch.bool)
    on_path[pair[0].states] = True

    def measured(network: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            logps = network(every).double().log_softmax(-1)
            squares = [((a - b) ** 2).flatten() for a, b in zip(network.parameters(), best.parameters(), strict=True)]
        divergence = (target * (target.log() - logps)).sum(-1)
        return {
            "mse": float(torch.cat(squares).mean()),
            "kl": float(divergence[open_states].mean()),
            "kl_path": float(divergence[on_path].mean()),
            "success": success(logps.exp(), moves),
        }

    rows = {"start": measured(start), "optimal network": measured(best)}
    for method in ("SFT", "DPO", "ORPO", *spec.variants):
        network = copy.deepcopy(start)
        loss = loss_of(method, network, start, pair, spec)
        steps = {
            done: measured(network)
            for done in _descent(network, loss, max(spec.steps), spec.learning_rate)
            if done in spec.steps
        }
        for done, found in steps.items():
            along = {name: found[name] for name in ("mse", "success")}
            rows[f"{method}, step {done}"] = found if done == max(steps) else along
        nearest = min(steps, key=lambda done: steps[done]["mse"])
        rows[f"{method}, nearest"] = steps[nearest] | {"step": float(nearest)}
    return rows


def _descent(network: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float) -> Iterator[int]:
    """Yield the number of each step of Adam after it is done."""
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    for done in range(1, steps + 1):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield done
