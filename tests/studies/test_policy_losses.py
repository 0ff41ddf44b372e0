"""The losses of the studies are those of the product's trainers, and of the papers written out as loops."""

from __future__ import annotations

import math

import pytest
import torch
from toys.train import FAST, THEIR_WARNINGS, preferences, pretrained, tokenizer

from paft_merge.studies.bandit import METHODS, loss_of
from paft_merge.studies.policy_losses import policy_gradient, preference_loss, preference_margin
from paft_merge.training.arguments import lora_config, training_arguments
from paft_merge.training.losses import rwr_weights
from paft_merge.training.on_policy import Sampled, best_of, pairs_of
from paft_merge.training.schema import AdapterSpec, SamplingSpec
from paft_merge.training.trainers import TRAINERS


@pytest.fixture(scope="module")
def base():
    return pretrained(5)


@THEIR_WARNINGS
@pytest.mark.parametrize(("kind", "name"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_dpo_and_ipo_are_the_losses_of_the_products_trainer(kind, name, base, tmp_path):
    fields = {**FAST, "loss_type": name, "beta": 0.3, "max_steps": 1}
    spec = AdapterSpec.model_validate({"objective": "dpo", "data": "memory", "lora": {"r": 4}, "training": fields})
    trainer = TRAINERS["dpo"](
        model=base, args=training_arguments(spec, tmp_path, "x"), train_dataset=preferences(),
        processing_class=tokenizer(), peft_config=lora_config(spec),
    )  # fmt: skip
    policy = trainer.model.eval()
    for key, parameter in policy.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = trainer.compute_loss(policy, batch)

        def logps():
            logits = policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]

        own = logps()
        with policy.disable_adapter():
            reference = logps()
    margin = preference_margin(own, reference, batch["completion_mask"][:, 1:].float(), kind)
    assert margin.abs().min() > 1e-3
    torch.testing.assert_close(preference_loss(margin, 0.3, kind).mean(), theirs)
    trainer.model.unload()


def by_loops(method: str, logps: list[float], reference: list[float], rewards: list[float], strength: float) -> float:
    """The loss of one group of samples, with the product's choice of samples, pairs and weights."""
    count = len(rewards)
    sampled = [Sampled("", tuple(map(str, range(count))), tuple(rewards))]
    pairs = pairs_of(sampled, SamplingSpec(pairing="threshold", threshold=0.0))
    chosen = [(int(pair["chosen"]), int(pair["rejected"])) for pair in pairs]
    ratio = [a - b for a, b in zip(logps, reference, strict=True)]
    if method == "Best-of-N":
        return -logps[int(best_of(sampled)[0]["completion"])]
    if method == "RWR":
        return -sum(w * p for w, p in zip(rwr_weights(rewards, strength), logps, strict=True)) / count
    if method == "REINFORCE":
        others = [(sum(rewards) - one) / (count - 1) for one in rewards]
        return -sum((r - o) * p for r, o, p in zip(rewards, others, logps, strict=True)) / count
    every = count * (count - 1) // 2  # pairs of equal rewards count, with a loss of 0
    if method == "Pref-FT":
        return -sum(logps[win] for win, _ in chosen) / every
    margins = [ratio[win] - ratio[lose] for win, lose in chosen]
    if method == "DPO":
        return sum(math.log1p(math.exp(-strength * margin)) for margin in margins) / every
    return sum((margin - 1 / (2 * strength)) ** 2 for margin in margins) / every


@pytest.mark.parametrize("method", METHODS)
def test_the_losses_of_the_bandit_are_those_of_each_group(method):
    draw = torch.Generator().manual_seed(0)
    logps, reference = (-3 * torch.rand(2, 3, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    rewards = torch.randint(0, 4, (2, 3, 5), generator=draw).double() / 4  # some are equal
    strength = torch.tensor([0.3, 0.7], dtype=torch.float64)
    found = loss_of(method, logps, reference, rewards, strength)
    groups = [
        by_loops(method, logps[v, g].tolist(), reference[v, g].tolist(), rewards[v, g].tolist(), float(strength[v])) / 3
        for v in range(2)
        for g in range(3)
    ]
    assert float(found) == pytest.approx(sum(groups), rel=1e-12)


def test_the_policy_gradient_is_zero_for_equal_rewards():
    assert float(policy_gradient(torch.randn(3, 4), torch.full((3, 4), 0.7)).abs().max()) < 1e-6
