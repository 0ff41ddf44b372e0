"""Study 3: on-policy samples and negative gradients on a bandit (arXiv:2404.14367, section 4).

The policy is a categorical distribution over 100 arms, and starts as the reference: tanh of a Cauchy variable, in 100 bins of
(-1, 1), whose mode is near arm 20. The reward of arm `a` is `exp(-((a - peak) / 10)^2)`. Every method sees the same number of
samples and takes the same number of steps of Adam; samples come from the policy (on-policy), from the reference, or from
both by a mixing ratio. Each batch is used for `reuse` steps.

V = problems that run side by side (peaks, and settings while these are chosen), G = groups of samples, N = samples of a group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from paft_merge.recipe.sections import Section, refused
from paft_merge.studies.policy_losses import likelihood, policy_gradient, preference_loss, preference_margin
from paft_merge.studies.study import Tables
from paft_merge.training.schema import Share

ARMS = 100
Arm = Annotated[int, Field(ge=0, lt=ARMS)]
METHODS = ("Best-of-N", "RWR", "Pref-FT", "DPO", "IPO", "REINFORCE")
"""The first three raise the probability of good samples; the others also lower that of bad ones (a negative gradient)."""


class Parameters(Section):
    """The parameters of the study."""

    peaks: dict[str, Arm] = Field(
        default_factory=lambda: {"unlikely": 70, "in between": 45, "likely": 20}, min_length=1
    )
    """The arm with reward 1, by name."""
    samples: PositiveInt = 1000
    """Samples of a run, at least one batch."""
    group: Annotated[int, Field(ge=2)] = 10
    """Samples that are compared with each other."""
    batch: PositiveInt = 20
    """Samples that are drawn at a time, a multiple of `group`."""
    reuse: list[PositiveInt] = Field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Steps of Adam on each batch."""
    usual_reuse: PositiveInt = 4
    mixing: list[Share] = Field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Shares of samples that come from the reference: 0 is on-policy, 1 is offline."""
    learning_rates: list[PositiveFloat] = Field(default_factory=lambda: [0.01, 0.03, 0.1, 0.3, 1.0], min_length=1)
    strengths: dict[str, list[PositiveFloat]] = Field(
        default_factory=lambda: {"RWR": [0.03, 0.1, 0.3], "DPO": [0.03, 0.1, 0.3, 1.0], "IPO": [0.01, 0.03, 0.1, 0.3]}
    )
    """Settings to choose from: `beta` of DPO and IPO, the temperature of RWR."""
    tuning_seeds: PositiveInt = 10
    """Seeds on which learning rate and strength of each cell are chosen; none of them is reported."""

    @model_validator(mode="after")
    def _whole_batches(self) -> Parameters:
        if self.batch % self.group or self.samples < self.batch:
            raise refused("batch is not a multiple of group, or samples is less than a batch")
        if missing := {"RWR", "DPO", "IPO"} - {name for name, values in self.strengths.items() if values}:
            raise refused(f"strengths has no values for {min(missing)}")
        return self


class Cell(NamedTuple):
    """A method, the share of samples from the reference, and the steps on each batch."""

    method: str
    mixing: float
    reuse: int

    @property
    def name(self) -> str:
        """The name of its row."""
        return f"{self.method}, mixing {self.mixing:g}, reuse {self.reuse}"


def cells(spec: Parameters) -> list[Cell]:
    """Every cell: all mixing ratios at the usual reuse, and every reuse on-policy."""
    found = [(mixing, spec.usual_reuse) for mixing in spec.mixing] + [(0.0, reuse) for reuse in spec.reuse]
    return [Cell(method, *one) for method in METHODS for one in dict.fromkeys(found)]


def reference() -> Tensor:
    """The reference policy, `[ARMS]` float64: the exact probabilities of the bins."""
    edges = torch.linspace(-1, 1, ARMS + 1, dtype=torch.float64)
    below = 0.5 + torch.atan((torch.atanh(edges) + 0.7) / 0.4) / math.pi
    return below.diff()


def rewards_of(peaks: Sequence[int]) -> Tensor:
    """The reward of each arm, `[V, ARMS]`."""
    arms = torch.arange(ARMS, dtype=torch.float64)
    return torch.exp(-(((arms - torch.tensor(peaks)[:, None]) / 10) ** 2))


def loss_of(method: str, logps: Tensor, reference: Tensor, rewards: Tensor, strength: Tensor) -> Tensor:
    """The sum over problems of a method's loss.

    Args:
        method: One of `METHODS`.
        logps, reference, rewards: `[V, G, N]` of the samples: log-probabilities in the policy and in the reference, rewards.
        strength: `[V]`.
    """
    problems, _, count = logps.shape
    if method == "REINFORCE":
        return policy_gradient(logps, rewards).mean(-1).sum()
    if method == "Best-of-N":
        flat = logps.gather(-1, rewards.argmax(-1, keepdim=True)).reshape(-1, 1)
        return likelihood(flat, torch.ones_like(flat)) * problems
    if method == "RWR":
        weights = (rewards / strength[:, None, None]).softmax(-1) * count  # rwr_weights, for all groups at once
        flat = logps.reshape(-1, 1)
        return likelihood(flat, torch.ones_like(flat), weights.flatten()) * problems
    one, other = torch.triu_indices(count, count, 1)
    first = rewards[..., one] > rewards[..., other]
    win, lose = torch.where(first, one, other), torch.where(first, other, one)
    differ = (rewards[..., one] != rewards[..., other]).double()  # of equal rewards there is no pair
    chosen = logps.gather(-1, win)
    if method == "Pref-FT":
        flat = chosen.reshape(-1, 1)
        return likelihood(flat, torch.ones_like(flat), differ.flatten()) * problems
    pairs = torch.cat([chosen.flatten(), logps.gather(-1, lose).flatten()])[:, None]
    known = torch.cat([reference.gather(-1, win).flatten(), reference.gather(-1, lose).flatten()])[:, None]
    kind: Any = method.lower()
    margin = preference_margin(pairs, known, torch.ones_like(pairs), kind).reshape(differ.shape)
    losses = preference_loss(margin, strength[:, None, None], kind) * differ
    return losses.mean((-1, -2)).sum()


def train(cell: Cell, peaks: Sequence[int], rates: Tensor, strengths: Tensor, seed: int, spec: Parameters) -> Tensor:
    """The policies `[V, ARMS]` after a run of a cell.

    Args:
        cell: The method and its sampling.
        peaks: V arms.
        rates, strengths: `[V]`.
        seed: Seed of the samples.
        spec: The parameters.
    """
    draw = torch.Generator().manual_seed(seed)
    known, paid = reference().log(), rewards_of(peaks)
    # Adam's steps do not depend on the scale of a gradient: logits of `rate * moved` move as with a learning rate of `rate`.
    moved = torch.zeros(len(peaks), ARMS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([moved], lr=1.0)

    def logits() -> Tensor:
        return (known + rates[:, None] * moved).log_softmax(-1)

    groups = spec.batch // spec.group
    for _ in range(spec.samples // spec.batch):
        with torch.no_grad():
            current = logits()
            own = torch.multinomial(current.exp(), spec.batch, replacement=True, generator=draw)
            given = torch.multinomial(known.exp().expand_as(current), spec.batch, replacement=True, generator=draw)
            offline = torch.rand(own.shape, generator=draw) < cell.mixing
            arms = torch.where(offline, given, own)
            shape = (len(peaks), groups, spec.group)
            paid_here, known_here = paid.gather(-1, arms).reshape(shape), known[arms].reshape(shape)
        for _ in range(cell.reuse):
            optimizer.zero_grad()
            logps = logits().gather(-1, arms).reshape(shape)
            loss_of(cell.method, logps, known_here, paid_here, strengths).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        return logits().exp()


def settings(spec: Parameters, method: str) -> list[tuple[float, float]]:
    """The learning rates and strengths to choose from."""
    return list(itertools.product(spec.learning_rates, spec.strengths.get(method, [1.0])))


def tune(spec: Parameters) -> Iterator[tuple[str, list[list[float]]]]:
    """Choose learning rate and strength of each cell and peak by the mean reward on seeds of their own.

    Yields:
        The name of a cell, and the settings of its peaks in their order.
    """
    peaks = list(spec.peaks.values())
    for cell in cells(spec):
        known = settings(spec, cell.method)
        every = [(peak, *setting) for peak in peaks for setting in known]
        rates, strengths = (torch.tensor([one[k] for one in every], dtype=torch.float64) for k in (1, 2))
        where = [one[0] for one in every]
        runs = [train(cell, where, rates, strengths, 1_000_000 + s, spec) for s in range(spec.tuning_seeds)]
        paid = rewards_of(where)
        mean = torch.stack([(policy * paid).sum(-1) for policy in runs]).mean(0).reshape(len(peaks), len(known))
        yield cell.name, [list(known[int(best)]) for best in mean.nan_to_num(-math.inf).argmax(-1)]


def run_seed(spec: Parameters, seed: int, data: Path | None, tuned: Mapping[str, Any], work: Path) -> Tables:
    """Run every cell with its chosen settings: the expected reward, and the divergence from the reference."""
    peaks, known = list(spec.peaks.values()), reference()
    tables: Tables = {f"peak {name}": {} for name in spec.peaks}
    paid = rewards_of(peaks)
    for name in spec.peaks:
        tables[f"peak {name}"]["reference"] = {
            "reward": float((known * paid[list(spec.peaks).index(name)]).sum()),
            "kl": 0.0,
        }
    for cell in cells(spec):
        chosen = torch.tensor(tuned[cell.name], dtype=torch.float64)
        policy = train(cell, peaks, chosen[:, 0], chosen[:, 1], seed, spec)
        reward = (policy * paid).sum(-1)
        divergence = torch.special.xlogy(policy, policy / known).sum(-1)
        for at, name in enumerate(spec.peaks):
            tables[f"peak {name}"][cell.name] = {"reward": float(reward[at]), "kl": float(divergence[at])}
    return tables
