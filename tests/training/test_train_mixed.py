"""A mixed adapter: which steps each part has, that its steps are those of the parts alone, and that it resumes to the same bits."""

from __future__ import annotations

import json
import math

import pytest
import torch
from toys.train import FAST, THEIR_WARNINGS, preferences, pretrained, texts, tokenizer

from paft_merge.errors import RecipeError, TrainError
from paft_merge.training import train_adapter
from paft_merge.training.arguments import check_one_optimizer
from paft_merge.training.base_model import digest_of
from paft_merge.training.mixed import interleaved, steps_of
from paft_merge.training.schema import read_adapter, read_adapters

pytestmark = THEIR_WARNINGS


@pytest.fixture(autouse=True)
def one_thread():
    import datasets

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base():
    return pretrained(60)


LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


def part(objective, steps=4, training=None, **more):
    fields = {**FAST, "max_steps": steps, "lr_scheduler_type": "cosine", **(training or {})}
    return {"objective": objective, "data": "memory", "lora": LORA, "training": fields, **more}


ROWS = {"sft": texts(count=20), "dpo": preferences(12), "orpo": preferences(12), "ift": texts(count=20)}


def train(base, out, spec, **more):
    rows = ROWS if "parts" in spec else ROWS[spec["objective"]]
    options = {"rows": rows, "tokenizer": tokenizer(), "base_name": "toy", **more}
    return train_adapter(base, spec, out, **options)


def mixed(steps, *parts, **more):
    return {
        "objective": "mixed",
        "parts": {one["objective"]: one for one in parts},
        **({"training": {"max_steps": steps}} if steps else {}),
        **more,
    }


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def record_of(folder):
    return json.loads((folder / "paft_train.json").read_text())


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_each_part_has_its_own_steps_or_its_share_of_all():
    assert steps_of([30, 20]) == [30, 20]
    assert steps_of([30, 20], total=10) == [6, 4]
    assert steps_of([30, 20], [1, 1]) == [25, 25]
    assert steps_of([30, 21], [1, 1]) == [26, 25], "of equal remainders the first part has the step"
    assert steps_of([30, 20, 10], [0.1, 0.2, 0.7], 11) == [1, 2, 8]
    assert steps_of([5], [3.0]) == [5]
    for alone, ratio in (([7, 7, 7], [1, 1e-9, 1]), ([1, 1], [1e300, 1e-300])):
        assert sum(steps_of(alone, ratio, 10)) == 10


def test_steps_are_spread_evenly_and_in_one_order():
    assert interleaved([2, 2]) == [0, 1, 0, 1]
    assert interleaved([4, 2]) == [0, 1, 0, 0, 1, 0]
    assert interleaved([1, 2, 1]) == [1, 0, 2, 1]
    assert interleaved([3]) == [0, 0, 0]
    for steps in ([7, 3], [100, 1], [5, 5, 5], [1, 13, 6, 2]):
        order = interleaved(steps)
        assert [order.count(i) for i in range(len(steps))] == steps
        for done in range(len(order)):
            for i, of in enumerate(steps):
                assert abs(order[:done].count(i) - done * of / len(order)) < max(1, len(steps) - 1)


# --- the training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "l1", "training"),
    [
        # 5 batches in an epoch, so that its last step has one
        ("sft", {"strength": 1e-3}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        ("sft", {"strength": 1e-2, "mode": "prox", "warmup": 2}, {}),
        ("dpo", None, {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}),
    ],
)
def test_one_part_with_all_steps_is_its_training_alone_bit_for_bit(base, tmp_path, one, l1, training):
    """Over several epochs, with dropout."""
    own = part(one, 7, training, **({"l1": l1} if l1 else {}))
    other = part("dpo" if one == "sft" else "sft", 3)
    whole = mixed(7, own, other, ratio=0) if one == "sft" else mixed(7, other, own, ratio=math.inf)
    assert weights(train(base, tmp_path / "mixed", whole)) == weights(train(base, tmp_path / "alone", own))


def test_the_steps_are_those_of_plain_losses_with_one_optimizer(base, tmp_path):
    """Both losses written out, the reference is the base; batches of all rows, so that their order does not matter."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    rows = {"sft": texts(count=8), "dpo": preferences(8)}
    plain = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "weight_decay": 0.0, "beta": 0.3}
    sft = part("sft", 3, {k: v for k, v in plain.items() if k != "beta"})
    dpo = part("dpo", 3, {**plain, "learning_rate": 2e-3})
    for one in (sft, dpo):
        one["lora"] = {**LORA, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    out = train(base, tmp_path / "mixed", mixed(None, sft, dpo), rows=rows)

    words, model = tokenizer(), pretrained(60)
    set_seed(42)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    policy = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1.0, weight_decay=0.0)

    def logps(sequences):
        found = []
        for prompt, answer in sequences:
            ids = torch.tensor([words(prompt)["input_ids"] + words(answer)["input_ids"] + [1]])
            at = policy(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            found.append(at[max(0, len(words(prompt)["input_ids"]) - 1) :])
        return found

    def dpo_loss():
        sides = [[(row["prompt"], row[side]) for row in rows["dpo"]] for side in ("chosen", "rejected")]
        with torch.no_grad(), policy.disable_adapter():
            reference = [torch.stack([one.sum() for one in logps(side)]) for side in sides]
        chosen, rejected = ([one.sum() for one in logps(side)] for side in sides)
        margin = (torch.stack(chosen) - reference[0]) - (torch.stack(rejected) - reference[1])
        return -torch.nn.functional.logsigmoid(0.3 * margin).mean()

    for step in range(6):
        loss = dpo_loss() if step % 2 else -torch.cat(logps([("", row["text"]) for row in rows["sft"]])).mean()
        optimizer.param_groups[0]["lr"] = 2e-3 if step % 2 else 5e-3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    from safetensors.torch import load_file

    trained = load_file(str(out / "adapter_model.safetensors"))
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name.replace(".default", "")], parameter.detach(), atol=2e-4, rtol=1e-2)


def test_three_parts_share_one_adapter_and_are_logged_apart(base, tmp_path):
    before = digest_of(base)
    recompute = {"gradient_checkpointing": True}
    parts = (part("dpo", 2, recompute), part("sft", 3, recompute, l1={"strength": 1e-3}), part("orpo", 1, recompute))
    out = train(base, tmp_path / "x", mixed(None, *parts), name="both")
    run = record_of(out)["run"]
    assert run["steps"] == 6
    assert {name: one["steps"] for name, one in run["parts"].items()} == {"dpo": 2, "sft": 3, "orpo": 1}
    assert [line.keys() & {"dpo/loss", "sft/loss", "orpo/loss"} for line in run["log"][:6]] == [
        {f"{name}/loss"} for name in ("sft", "dpo", "sft", "orpo", "dpo", "sft")
    ]
    assert run["log"][0]["sft/l1/strength"] == 1e-3
    assert run["log"][1]["dpo/rewards/margins"] != 0
    assert [line["epoch"] for line in run["log"][:6]] == pytest.approx([i / 6 for i in range(1, 7)])
    assert not list(out.glob("ref"))
    assert record_of(out)["data"]["rows_trained_on"] == 44
    sentence, pair = 16 + 1, (4 + 6 + 1) + (4 + 8 + 1)
    assert run["tokens"] == 20 * sentence + (12 + 8) * pair, "of all batches, without padding, both sides of a pair"
    assert run["seconds"] > 0
    assert digest_of(base) == before
    assert "forward" not in base.__dict__
    assert not base.get_input_embeddings()._forward_hooks
    assert "A mixed (DPO, SFT, ORPO) adapter for `toy`" in (out / "README.md").read_text()
    assert not any(p.requires_grad is False for p in base.parameters())


def test_a_part_without_any_step_is_refused(base, tmp_path):
    with pytest.raises(TrainError, match="dpo: has none of the 5 steps; give it a larger share of the ratio, or 0"):
        train(base, tmp_path / "x", mixed(5, part("sft"), part("dpo"), ratio=1e-6))


def killer(step):
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Kill()


def test_a_killed_run_resumes_to_the_same_bits_and_counts(base, tmp_path):
    save = {"save_strategy": "steps", "save_steps": 2}
    parts = (part("sft", 5, save, l1={"strength": 1e-3, "target": 0.5}), part("dpo", 4, save))
    straight = train(base, tmp_path / "straight", mixed(None, *parts))
    with pytest.raises(KeyboardInterrupt):
        train(base, tmp_path / "killed", mixed(None, *parts), callbacks=[killer(5)])
    resumed = train(base, tmp_path / "killed", mixed(None, *parts), resume=True)
    assert weights(straight) == weights(resumed)
    for key in ("steps", "tokens", "l1_strength", "parts"):
        assert record_of(straight)["run"][key] == record_of(resumed)["run"][key], key
    with pytest.raises(TrainError, match=r"parts\.dpo\.training\.max_steps: 4 there, 3 in the recipe"):
        train(base, tmp_path / "killed", mixed(None, parts[0], part("dpo", 3, save)), resume=True)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ["sft", "dop"]}, r"adapters\.both\.parts: no adapter 'dop'; did you mean 'dpo'"),
        ({"parts": ["sft"]}, "needs `parts`, the names of two or more adapters"),
        ({"parts": ["sft", "sft"]}, "sft is there twice"),
        ({"parts": ["sft", "old"]}, "old exists already, and a part is trained"),
        ({"parts": ["sft", "both"]}, "both has parts itself"),
        ({"parts": ["sft", "best"]}, "best cannot be a part of a mixed adapter: best_of_n generates the text"),
        ({"parts": ["sft", "dpo", "orpo"], "ratio": 2}, r"one `ratio` is for two parts, and there are 3; write ratio: \{sft: 1"),
        ({"ratio": {"sft": 1}}, "`ratio` needs a number for each of the parts sft, dpo"),
        ({"ratio": {"sft": 0, "dpo": 0}}, "at least one above 0"),
        ({"ratio": -1}, "`ratio` must be a number of at least 0, or one for each part by name; got -1"),
        ({"ratio": "much"}, "both.ratio: must be a mapping"),
        ({"data": "x"}, "`data` of a mixed adapter is that of its parts"),
        ({"l1": {"strength": 1}}, "`l1` of a mixed adapter is that of its parts"),
        ({"parts": ["sft", "wide"]}, "`lora` differs between the parts sft, wide; write the mixed adapter's lora:"),
        ({"orpo": {"beta": 1}}, "`orpo` has no effect for objective mixed"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_mixed_are_refused(change, message):
    sections = {one: part(one) for one in ("sft", "dpo", "orpo")}
    sections |= {"wide": {**part("sft"), "lora": {"r": 8}}, "old": "some/folder"}
    sections["best"] = {**part("best_of_n"), "reward": {"rule": "short"}}
    sections["both"] = {"objective": "mixed", "parts": ["sft", "dpo"], **change}
    with pytest.raises(RecipeError, match=message):
        read_adapters({"adapters": sections})


def test_what_one_optimizer_cannot_have_twice_is_refused_unless_the_mixed_adapter_sets_it():
    def check(**more):
        check_one_optimizer(
            read_adapter(mixed(None, part("sft"), part("dpo", 1, {"weight_decay": 0.1, "seed": 3}), **more)), "both"
        )

    with pytest.raises(TrainError) as caught:
        check()
    assert "both: training.weight_decay: sft has 0.0 and dpo has 0.1, but one optimizer trains both" in str(
        caught.value
    )
    assert "training.seed" in str(caught.value)
    plain = {"weight_decay": 0.0, "seed": 1}
    check(training=plain)
    with pytest.raises(TrainError, match=r"both: training\.max_steps: must be a whole number, got 'many'"):
        check(training={**plain, "max_steps": "many"})
    with pytest.raises(TrainError, match=r"both\.sft: training\.beta: TRL's SFTConfig does not have this field"):
        check(training={**plain, "beta": 1.0})
