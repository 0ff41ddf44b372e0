"""Rounds on the policy's own samples: pairing, mixing, references, the contrasts, and TRL's online trainers."""

from __future__ import annotations

import json

import pytest
import torch
from toys.train import FAST, THEIR_WARNINGS, dataset, preferences, pretrained, sentences, tokenizer

from paft_merge.errors import TrainError
from paft_merge.recipe.trust import file_of
from paft_merge.training import train_adapter
from paft_merge.training.base_model import digest_of
from paft_merge.training.on_policy import Sampled, best_of, mixed, pairs_of, sample, weighted
from paft_merge.training.rewards import load_function, reward_functions, total
from paft_merge.training.schema import RewardSpec, SamplingSpec

pytestmark = THEIR_WARNINGS

REWARD = """
def likes_w1(prompts, completions, **columns):
    return [float(text(c).split().count("w1")) for c in completions]

def text(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]

def broken(prompts, completions, **columns):
    return [1.0]

def spoiled(prompts, completions, **columns):
    return [float("nan")] * len(completions)
"""


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    import datasets

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    (tmp_path / "toy_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "toy_rewards", raising=False)


def sampled():
    return [Sampled("p", ("a", "b", "c"), (1.0, 3.0, 2.0)), Sampled("q", ("d", "e", "f"), (1.0, 1.0, 1.0))]


def test_pairs_are_best_against_worst_or_everything_beyond_the_threshold():
    best = pairs_of(sampled(), SamplingSpec())
    assert best == [{"prompt": "p", "chosen": "b", "rejected": "a"}]
    every = pairs_of(sampled(), SamplingSpec(pairing="threshold"))
    assert [(r["chosen"], r["rejected"]) for r in every] == [("b", "a"), ("b", "c"), ("c", "a")]
    assert pairs_of(sampled(), SamplingSpec(pairing="threshold", threshold=1.0)) == best
    assert pairs_of(sampled(), SamplingSpec(threshold=2.0)) == []


def test_the_likelihood_contrasts_keep_the_best_or_weigh_all():
    assert best_of(sampled()) == [{"prompt": "p", "completion": "b"}, {"prompt": "q", "completion": "d"}]
    rows = weighted(sampled(), 1.0)
    assert [r["completion"] for r in rows] == list("abcdef")
    assert sum(r["weight"] for r in rows) == pytest.approx(6.0)
    assert rows[3]["weight"] == pytest.approx(1.0)


def test_conversations_stay_conversations():
    turns = [{"role": "user", "content": "p"}]
    row = pairs_of([Sampled(turns, ("a", "b"), (0.0, 1.0))], SamplingSpec())[0]
    assert row["chosen"] == [{"role": "assistant", "content": "b"}]
    assert row["prompt"] == turns


def test_the_mixing_ratio_is_the_share_of_offline_pairs():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 10
    for ratio, offline in ((0.0, 0), (0.5, 10), (0.9, 32)):  # 90 are wanted, 32 are there
        assert len(mixed(rows, preferences(), ratio, 0)) - 10 == offline


def test_generation_is_repeatable_and_gives_each_prompt_its_samples():
    spec = SamplingSpec(completions=3, max_new_tokens=5, batch_size=2)
    prompts = ["w1 w2", "w3", "w4 w5 w6"]
    model, words = pretrained(), tokenizer()
    first = sample(model, words, prompts, spec, 1)
    assert [len(group) for group in first] == [3, 3, 3]
    assert first == sample(model, words, prompts, spec, 1)
    assert first != sample(model, words, prompts, spec, 2)


@pytest.mark.parametrize(("prompt", "begins"), [("w1 w2", True), ("w1 w2 ", False), (None, False)])
def test_a_completion_begins_with_the_space_that_its_tokenizer_leaves_out(prompt, begins):
    """Else `Once upon a` and `time` are trained on as `Once upon atime`."""
    model, words = pretrained(20), tokenizer()
    given = prompt or [{"role": "user", "content": "w1 w2"}]
    (texts,) = sample(model, words, [given], SamplingSpec(completions=3, max_new_tokens=4), 0)
    assert all(texts)
    assert [text.startswith(" ") for text in texts] == [begins] * 3
    if begins:
        assert words(prompt + texts[0])["input_ids"][:2] == words(prompt)["input_ids"]


def test_rewards_come_from_functions_rules_and_sums(tmp_path):
    functions = reward_functions([RewardSpec(function="toy_rewards:likes_w1", weight=2.0), RewardSpec(rule="short")])
    scores = total(functions, prompts=["p"] * 2, completions=["w1 w1", "w2 w2 w2"])
    assert scores == [4.0 - 2, 0.0 - 3]
    match = reward_functions([RewardSpec(rule="match"), RewardSpec(rule="contains")])
    assert total(match, prompts=["p"], completions=[" 42 "], answer=["42"]) == [2.0]
    with pytest.raises(TrainError, match="returned 1 score for 2 completions"):
        total([load_function("toy_rewards:broken")], prompts=["p"] * 2, completions=["a", "b"])
    with pytest.raises(TrainError, match="not finite"):
        total([load_function("toy_rewards:spoiled")], prompts=["p"], completions=["a"])
    with pytest.raises(TrainError, match="toy_rewards has no function 'likes_w2'; did you mean 'likes_w1'"):
        load_function("toy_rewards:likes_w2")
    with pytest.raises(TrainError, match=r"cannot be imported: ModuleNotFoundError.*; write rewards\.py:function"):
        load_function("no_such_module:f")


def test_a_reward_is_a_function_of_a_file_beside_the_recipe_or_of_a_module(tmp_path):
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "mine.py").write_text(REWARD)
    given = {"prompts": ["p"], "completions": ["w1 w2"]}
    for name in ("mine.py:likes_w1", f"{tmp_path / 'beside' / 'mine.py'}:likes_w1", "toy_rewards:likes_w1"):
        assert total(reward_functions([RewardSpec(function=name)], tmp_path / "beside"), **given) == [1.0]
    with pytest.raises(TrainError, match=r"mine\.py:likes_w1: cannot be imported: FileNotFoundError"):
        load_function("mine.py:likes_w1", tmp_path)
    assert file_of("mine.py:likes_w1", tmp_path / "beside") == tmp_path / "beside" / "mine.py"
    assert file_of("toy_rewards:likes_w1", tmp_path) == tmp_path / "toy_rewards.py"


def test_a_reward_model_scores_with_its_first_logit(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=38, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "rm")
    tokenizer().save_pretrained(tmp_path / "rm")
    scores = total(reward_functions([RewardSpec(model=str(tmp_path / "rm"))]), prompts=["w1 "], completions=["w2 w3"])
    ids = torch.tensor([tokenizer()("w1 w2 w3")["input_ids"]])
    assert scores == [pytest.approx(model(input_ids=ids).logits.item(), rel=1e-5)]


def prompts(count=24):
    return dataset([{"prompt": s + " "} for s in sentences(torch.ones(32, 32), count, 3, 7)])


def section(objective, **sampling):
    knobs = {"rounds": 2, "samples_per_round": 12, "completions": 4, "max_new_tokens": 6, **sampling}
    return {
        "objective": objective, "data": "m", "lora": {"r": 4}, "training": {**FAST, "learning_rate": 5e-3},
        "sampling": knobs, "reward": {"function": "toy_rewards:likes_w1"},
    }  # fmt: skip


def record_of(folder):
    return json.loads((folder / "paft_train.json").read_text())


@pytest.mark.parametrize("objective", ["on_policy", "best_of_n", "rwr"])
def test_rounds_raise_the_reward_and_leave_the_base_alone(tmp_path, objective):
    model = pretrained()
    before = digest_of(model)
    knobs = {"rounds": 4, "samples_per_round": 24, "inner_passes": 3}
    out = train_adapter(
        model, section(objective, **knobs), tmp_path / "x", rows=prompts(), tokenizer=tokenizer(), base_name="t"
    )
    rounds = record_of(out)["run"]["rounds"]
    assert [one["round"] for one in rounds] == [0, 1, 2, 3]
    assert rounds[-1]["mean_reward"] > rounds[0]["mean_reward"]
    assert digest_of(model) == before
    assert len((out / "rounds" / "0" / "samples.jsonl").read_text().splitlines()) == 24
    assert sorted(p.name for p in (out / "rounds" / "0").iterdir()) == ["round.json", "samples.jsonl"]


def test_a_reference_that_follows_the_policy_starts_each_round_at_ln_2(tmp_path):
    losses = {}
    for reference in ("base", "previous"):
        training = {"per_device_train_batch_size": 64, "logging_steps": 1}
        chosen = section("on_policy", reference=reference, rounds=2)
        chosen["training"] |= training
        out = train_adapter(
            pretrained(), chosen, tmp_path / reference, rows=prompts(), tokenizer=tokenizer(), base_name="t"
        )
        losses[reference] = next(line["loss"] for line in record_of(out)["run"]["log"] if "loss" in line)
        assert not (out / "ref").exists()
    assert losses["previous"] == pytest.approx(0.6931, abs=1e-3)
    assert losses["base"] != pytest.approx(0.6931, abs=1e-3)


def test_rounds_resume_with_their_samples_to_the_same_bits(tmp_path):
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        begun = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.begun += 1
            if self.begun == 2:
                raise KeyboardInterrupt

    def run(name, **more):
        options = {"rows": preferences(), "tokenizer": tokenizer(), "base_name": "t", **more}
        return train_adapter(pretrained(), section("on_policy", mixing_ratio=0.25), tmp_path / name, **options)

    straight = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("killed", callbacks=[Kill()])
    resumed = run("killed", resume=True)
    file = "adapter_model.safetensors"
    assert (straight / file).read_bytes() == (resumed / file).read_bytes()
    assert record_of(resumed)["run"]["rounds"] == record_of(straight)["run"]["rounds"]


def test_a_round_without_a_single_pair_says_why(tmp_path):
    same = section("on_policy") | {"reward": {"rule": "length"}}
    same["sampling"] |= {"threshold": 100.0}
    with pytest.raises(TrainError, match="round 0 gave no pair"):
        train_adapter(pretrained(), same, tmp_path / "x", rows=prompts(), tokenizer=tokenizer(), base_name="t")


@pytest.mark.parametrize("objective", ["rloo", "grpo"])
def test_trls_online_trainers_take_our_rewards_and_our_l1(tmp_path, objective):
    training = {
        **FAST, "max_steps": 2, "num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 8,
    }  # fmt: skip
    plain = {"objective": objective, "data": "m", "lora": {"r": 4}, "training": training, "l1": {"strength": 1e-3}}
    plain["reward"] = [{"function": "toy_rewards.py:likes_w1"}, {"rule": "short", "weight": 0.1}]
    out = train_adapter(pretrained(), plain, tmp_path / "x", rows=prompts(), tokenizer=tokenizer(), base_name="t")
    logged = [line for line in record_of(out)["run"]["log"] if "loss" in line]
    assert "rewards/likes_w1/mean" in logged[0]
    assert logged[-1]["l1/loss"] > 0
