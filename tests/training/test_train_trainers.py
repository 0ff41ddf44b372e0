"""The trainers on a tiny Llama: what reaches the gradient, what is logged, what is written, what is given back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from toys.train import (
    FAST,
    THEIR_WARNINGS,
    dataset,
    preferences,
    pretrained,
    saved,
    sentences,
    texts,
    tiny_llama,
    tokenizer,
)

from paft_merge.errors import TrainError
from paft_merge.training import train_adapter
from paft_merge.training.base_model import digest_of, restoring_base
from paft_merge.training.factors import adapted
from paft_merge.training.l1 import product_l1

pytestmark = THEIR_WARNINGS


@pytest.fixture(autouse=True)
def one_thread():
    """Toys are faster, and the same bits, on one thread; no bars of `datasets` in the test output."""
    import datasets

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base():
    return pretrained()


def spec(objective="sft", steps=2, training=None, **more):
    fields = {**FAST, "max_steps": steps, **(training or {})}
    return {"objective": objective, "data": "memory", "lora": {"r": 4, "lora_alpha": 8}, "training": fields, **more}


def rows_for(objective):
    return preferences() if objective in ("dpo", "orpo") else texts()


def record_of(folder):
    return json.loads((folder / "paft_train.json").read_text())


def lines_of(folder):
    return [line for line in record_of(folder)["run"]["log"] if "loss" in line]


class Gradients:
    """Keeps the gradients that the optimizer sees at the first step."""

    def __new__(cls):
        from transformers import TrainerCallback

        class Keep(TrainerCallback):
            seen = None
            penalty = None

            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                if self.seen is None:
                    model = kwargs["model"]
                    self.seen = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
                    with torch.enable_grad():
                        parameters = [p for p in model.parameters() if p.requires_grad]
                        grads = torch.autograd.grad(product_l1(adapted(model)), parameters)
                    self.penalty = dict(zip(self.seen, grads, strict=True))

        return Keep()


def gradients(base, out, objective, accumulate, l1, **more):
    keep = Gradients()
    training = {
        "gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 8 // accumulate,
        "max_grad_norm": 0.0, "seed": 3,
    }  # fmt: skip
    # B is zero at first, and so is the penalty's gradient: start from noise in B.
    section = spec(objective, 1, training, **({"l1": l1} if l1 else {}), **more)
    section["lora"]["extra"] = {"init_lora_weights": False}
    train_adapter(
        base, section, out, rows=rows_for(objective), tokenizer=tokenizer(), base_name="toy", callbacks=[keep]
    )
    return keep


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("objective", ["sft", "dpo", "orpo", "ift"])
def test_the_penalty_reaches_the_optimizer_once_whatever_the_accumulation(base, tmp_path, objective, accumulate):
    strength = 0.01
    plain = gradients(base, tmp_path / "plain", objective, accumulate, None)
    sparse = gradients(base, tmp_path / "sparse", objective, accumulate, {"strength": strength})
    for name, gradient in sparse.seen.items():
        torch.testing.assert_close(gradient - plain.seen[name], strength * sparse.penalty[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("objective", ["sft", "dpo", "orpo", "ift"])
def test_the_tasks_gradient_does_not_depend_on_the_accumulation(base, tmp_path, objective):
    # Rows of equal length, so that a mean of micro-batch means is the mean of the batch.
    whole = gradients(base, tmp_path / "1", objective, 1, None)
    split = gradients(base, tmp_path / "4", objective, 4, None)
    for name, gradient in whole.seen.items():
        torch.testing.assert_close(gradient, split.seen[name], atol=1e-5, rtol=1e-3)


def test_the_penalty_is_computed_once_per_optimizer_step_and_never_in_evaluation(base, tmp_path, monkeypatch):
    from paft_merge.training.callbacks import L1

    calls, original = [], L1.penalty
    monkeypatch.setattr(L1, "penalty", lambda self, factors: calls.append(1) or original(self, factors))
    training = {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 4}
    options = {"rows": texts(), "eval_rows": texts(), "tokenizer": tokenizer(), "base_name": "toy"}
    train_adapter(base, spec(steps=2, training=training, l1={"strength": 0.01}), tmp_path / "x", **options)
    assert len(calls) == 2


def test_the_penalty_is_logged_apart_and_absent_from_both_losses(base, tmp_path):
    section = spec(training={"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "max_steps": 1})
    section["lora"]["extra"] = {"init_lora_weights": False}
    for name, l1 in (("plain", {}), ("sparse", {"l1": {"strength": 0.05}})):
        options = {"rows": texts(), "eval_rows": texts(), "tokenizer": tokenizer(), "base_name": "toy"}
        train_adapter(base, section | l1, tmp_path / name, **options)
    plain, sparse = lines_of(tmp_path / "plain")[0], lines_of(tmp_path / "sparse")[0]
    assert sparse["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert sparse["l1/loss"] == pytest.approx(0.05 * sparse["l1/norm"])
    assert sparse["l1/norm"] > 10
    assert "l1/loss" not in plain
    assert "sparsity/below_1e-5" in plain
    losses = [record_of(tmp_path / name)["run"]["eval_loss"] for name in ("plain", "sparse")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_the_norms_of_both_gradients_are_logged_apart(base, tmp_path, objective, accumulate):
    plain = gradients(base, tmp_path / "plain", objective, accumulate, None)
    sparse = gradients(base, tmp_path / "sparse", objective, accumulate, {"strength": 0.01})
    line = lines_of(tmp_path / "sparse")[0]
    task = sum(g.square().sum().item() for g in plain.seen.values()) ** 0.5
    penalty = 0.01 * sum(g.square().sum().item() for g in sparse.penalty.values()) ** 0.5
    both = sum(g.square().sum().item() for g in sparse.seen.values()) ** 0.5
    assert line["l1/grad_norm"] == pytest.approx(penalty, rel=1e-4)
    assert line["l1/task_grad_norm"] == pytest.approx(task, rel=1e-4)
    assert line["grad_norm"] == pytest.approx(both, rel=1e-4)
    assert "l1/grad_norm" not in lines_of(tmp_path / "plain")[0]


def test_dpo_takes_the_base_as_its_reference_and_orpo_takes_none(base, tmp_path):
    for objective in ("dpo", "orpo"):
        train_adapter(
            base, spec(objective, 1), tmp_path / objective, rows=preferences(), tokenizer=tokenizer(), base_name="toy"
        )
    first = lines_of(tmp_path / "dpo")[0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # policy = reference before the first step
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert {"nll", "odds_loss", "rewards/accuracies"} <= lines_of(tmp_path / "orpo")[0].keys()


def test_every_dpo_loss_of_trl_is_known_and_no_other():
    import inspect
    import re

    from trl import DPOTrainer

    from paft_merge.training.trainers import DPO_LOSSES

    told = re.search(r"Should be one of \[(.*?)\]", inspect.getsource(DPOTrainer), re.DOTALL).group(1)
    assert set(re.findall(r"'(\w+)'", told)) == set(DPO_LOSSES)


def test_ift_sees_the_greedy_predictions_and_plain_sft_is_its_limit(base, tmp_path):
    limit = {"ift": {"lambda": 0.0, "gamma": 0.0}}
    out = train_adapter(
        base, spec("ift", 1, **limit), tmp_path / "ift", rows=texts(), tokenizer=tokenizer(), base_name="toy"
    )
    sft = train_adapter(base, spec("sft", 1), tmp_path / "sft", rows=texts(), tokenizer=tokenizer(), base_name="toy")
    assert lines_of(out)[0]["loss"] == pytest.approx(lines_of(sft)[0]["loss"], rel=1e-5)
    mixed = train_adapter(
        base, spec("ift", 1), tmp_path / "mixed", rows=texts(), tokenizer=tokenizer(), base_name="toy"
    )
    assert lines_of(mixed)[0]["loss"] != pytest.approx(lines_of(sft)[0]["loss"], rel=1e-3)
    assert 0 < lines_of(mixed)[0]["greedy_agreement"] < 1


def test_ift_matches_a_hand_written_step(base, tmp_path):
    rows = texts(count=8)
    out = train_adapter(base, spec("ift", 1), tmp_path / "ift", rows=rows, tokenizer=tokenizer(), base_name="toy")
    ids = torch.tensor(tokenizer()([row["text"] + " </s>" for row in rows])["input_ids"])
    with torch.no_grad():
        guess = base(input_ids=ids).logits.argmax(-1)
        swapped = torch.cat([ids[:, :1], guess[:, :-1]], 1)
        embed = base.get_input_embeddings()
        mixed = 0.8 * embed(ids) + 0.2 * embed(swapped)
        mixed[:, 0] = embed(ids[:, 0])
        logps = base(inputs_embeds=mixed).logits[:, :-1].double().log_softmax(-1)
        losses = -logps.gather(-1, ids[:, 1:, None])[..., 0]
    total = 0.0
    for row in losses:
        c = [sum(0.95 ** (j - i) * row[j] for j in range(i, len(row))) for i in range(len(row))]
        total += float(sum(w * x for w, x in zip(c, row, strict=True)) / sum(c))
    assert lines_of(out)[0]["loss"] == pytest.approx(total / len(losses), rel=1e-4)


def test_the_base_comes_back_bit_for_bit_and_unpatched(base, tmp_path):
    before, keys = digest_of(base), set(base.__dict__)
    modules = [type(module) for module in base.modules()]
    for objective in ("sft", "dpo"):
        section = spec(objective, 1, {"gradient_checkpointing": True})
        train_adapter(
            base, section, tmp_path / objective, rows=rows_for(objective), tokenizer=tokenizer(), base_name="toy"
        )
    assert digest_of(base) == before
    assert [type(module) for module in base.modules()] == modules
    assert "forward" not in base.__dict__
    assert set(base.__dict__) - keys <= {"_require_grads_hooks", "warnings_issued", "model_tags", "hf_device_map"}
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    assert not base.training


def test_the_base_comes_back_after_an_error_too():
    model = tiny_llama()
    before = digest_of(model)

    def adapt_and_fail():
        from peft import LoraConfig, get_peft_model

        with restoring_base(model):
            get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
            raise KeyError

    with pytest.raises(KeyError):
        adapt_and_fail()
    assert digest_of(model) == before
    assert not hasattr(model, "peft_config")


def test_an_adapter_is_the_same_bits_alone_and_after_another(base, tmp_path):
    for folder, objectives in (("alone", ["dpo"]), ("after", ["sft", "dpo"])):
        for objective in objectives:
            out = tmp_path / folder / objective
            train_adapter(base, spec(objective), out, rows=rows_for(objective), tokenizer=tokenizer(), base_name="toy")
    file = "dpo/adapter_model.safetensors"
    assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "after" / file).read_bytes()


def test_the_folder_says_what_made_it_and_any_peft_user_can_load_it(base, tmp_path):
    from peft import PeftModel

    section = spec(steps=3, l1={"strength": 1e-3})
    out = train_adapter(base, section, tmp_path / "sft", rows=texts(), tokenizer=tokenizer(), base_name="toy/base")
    record = record_of(out)
    assert record["objective"] == "sft"
    assert record["base"] == {"name": "toy/base", "digest": digest_of(base)}
    assert record["spec"]["l1"]["strength"] == 1e-3
    assert record["data"]["rows"] == 64
    assert len(record["data"]["fingerprint"]) == 32
    assert record["delta"]["norm"] > 0
    assert 0 < record["delta"]["relative_norm"] < 1
    assert len(record["delta"]["matrices"]) == 14
    assert record["run"]["steps"] == 3
    assert record["versions"]["trl"].startswith("1.")
    card = (out / "README.md").read_text()
    assert 'base_model: "toy/base"' in card
    assert "L1 on the product (penalty)" in card
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "toy/base"
    assert not list(out.glob("*.bin"))
    assert not out.with_name("sft.part").exists()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(out))
    norm = sum((f.scale * f.b_OR @ f.a_RI).norm().item() ** 2 for f in adapted(loaded)) ** 0.5
    assert norm == pytest.approx(record["delta"]["norm"], rel=1e-5)


# PEFT makes its sparse tensors without saying whether torch is to check them.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_trimming_writes_a_sparse_adapter_that_peft_loads(base, tmp_path):
    from peft import PeftModel

    section = spec(steps=3, trim={"density": 0.1})
    out = train_adapter(base, section, tmp_path / "sft", rows=texts(), tokenizer=tokenizer(), base_name="toy")
    whole = PeftModel.from_pretrained(copy.deepcopy(base), str(out / "untrimmed"))
    thin = PeftModel.from_pretrained(copy.deepcopy(base), str(out))
    for f in adapted(whole):
        delta = (f.scale * f.b_OR @ f.a_RI).detach()
        sparse = thin.get_submodule("base_model.model." + f.name).get_delta_weight("default").to_dense().detach()
        kept = sparse != 0
        assert int(kept.sum()) == int(0.1 * delta.numel())
        torch.testing.assert_close(sparse[kept], delta[kept])
        assert delta[kept].abs().min() >= delta[~kept].abs().max()
    assert record_of(out)["run"]["trimmed_density"] == pytest.approx(0.1, abs=1e-3)
    assert record_of(out)["delta"]["exact_zero"] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_a_trimmed_adapter_with_a_trained_module_merges_and_audits_as_peft_merges_it(base, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

    from paft_merge import merge
    from paft_merge.auditing import audit

    folder = saved(tmp_path / "base", base)
    section = spec(steps=3, trim={"density": 0.1})
    section["lora"]["modules_to_save"] = ["lm_head"]
    out = train_adapter(base, section, tmp_path / "sft", rows=texts(), tokenizer=tokenizer(), base_name=folder)
    recipe = {
        "merge_method": "task_arithmetic", "base_model": folder,
        "models": [{"model": f"{folder}+{out}", "parameters": {"weight": 1.0}}],
    }  # fmt: skip
    ours = load_file(merge(recipe, tmp_path / "merged") / "model.safetensors")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(out)).merge_and_unload().state_dict()
    before = base.state_dict()
    moved = [name for name in ours if not torch.equal(ours[name], before[name])]
    assert len(moved) == 15
    assert "lm_head.weight" in moved
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=0)
    measured = audit(out).sources[0]
    zeros = {t.name: t.measure.zero_share for t in measured.tensors}
    assert len(zeros) == 14
    assert all(0.899 < share < 0.903 for share in zeros.values())
    matrices = {m["name"] + ".weight": m["exact_zero"] for m in record_of(out)["delta"]["matrices"]}
    assert zeros == pytest.approx(matrices)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"lora": {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}, "trim": {"density": 0.1}},
            "not a linear layer",
        ),
        ({"lora": {"r": 2}, "trim": {"density": 0.9}}, "more entries than the matrix"),
    ],
)
def test_what_the_sparse_format_cannot_hold_is_refused_before_training(base, tmp_path, more, message):
    with pytest.raises(TrainError, match=message) as caught:
        train_adapter(base, spec() | more, tmp_path / "x", rows=texts(), tokenizer=tokenizer(), base_name="toy")
    assert {problem.code for problem in caught.value.problems} == {"TRIM"}
    assert not (tmp_path / "x.part").exists()
    assert not hasattr(base, "peft_config")


def test_a_target_that_was_missed_is_told_with_where_the_strength_ended(base, tmp_path):
    section = spec(steps=3, l1={"strength": 1e-3, "target": 0.9}, trim={"density": 0.05})
    out = train_adapter(base, section, tmp_path / "x", rows=texts(), tokenizer=tokenizer(), base_name="toy")
    (told,) = record_of(out)["run"]["warnings"]
    assert "the target was 0.9; give it more steps" in told
    assert record_of(out)["delta"]["below_epsilon"] > 0.94  # which is the trimming's


def test_prox_gives_exact_zeros_and_the_penalty_none(base, tmp_path):
    zeros = {}
    for mode in ("prox", "penalty"):
        l1 = {"strength": 0.01, "mode": mode, "penalize": "factors", "warmup": 4}
        out = train_adapter(
            base, spec(steps=20, l1=l1), tmp_path / mode, rows=texts(), tokenizer=tokenizer(), base_name="toy"
        )
        zeros[mode] = record_of(out)["delta"]["exact_zero"]
    assert zeros["prox"] > 0.3
    assert zeros["penalty"] == 0


def test_an_entry_that_was_thrown_far_does_not_hide_a_collapse_and_a_sparse_adapter_is_none():
    from types import SimpleNamespace

    from paft_merge.training.callbacks import L1, Watch
    from paft_merge.training.factors import Factors
    from paft_merge.training.schema import L1Spec

    lr, state = 1e-3, SimpleNamespace(global_step=30, max_steps=100)

    def look_twice(b):
        watch = Watch("x", L1(L1Spec(strength=1.0)))
        for _ in range(2):
            watch.check_collapse((Factors("q", torch.ones(4, 50), b, 1.0),), lr, state)

    noise = torch.full((1000, 4), 0.2 * lr)
    noise[0, 0] = 4 * lr
    with pytest.raises(TrainError, match="driven the adapter to zero by step 30 of 100"):
        look_twice(noise)
    alive = torch.full((100, 4), 0.2 * lr)
    alive[:2] = 20 * lr  # 2 % of the entries
    look_twice(alive)
    rare = torch.zeros(100, 4)
    rare[0, 0] = 4 * lr  # the one row that came up
    look_twice(rare)


@pytest.mark.parametrize(("l1", "steps"), [({"strength": 30.0}, 40), ({"strength": 5.0, "mode": "prox"}, 40)])
def test_a_strength_that_kills_the_adapter_is_named_and_stopped(base, tmp_path, l1, steps):
    with pytest.raises(TrainError, match="driven the adapter to zero by step") as caught:
        train_adapter(
            base, spec(steps=steps, l1=l1), tmp_path / "x", rows=texts(), tokenizer=tokenizer(), base_name="toy"
        )
    assert caught.value.problems[0].code == "L1_COLLAPSE"
    assert not (tmp_path / "x.part").exists()  # there is nothing to resume
    assert not (tmp_path / "x").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(TrainError, match="the loss is nan in optimizer step 1") as caught:
        train_adapter(model, spec(), tmp_path / "x", rows=texts(), tokenizer=tokenizer(), base_name="toy")
    assert caught.value.problems[0].code == "NONFINITE"


@pytest.mark.parametrize(
    ("l1", "stage", "message"),
    [
        ({"mode": "prox"}, 2, "overwrite the result of the proximal step; use mode: penalty"),
        ({"penalize": "product"}, 3, "ZeRO-3 shards the factors"),
        ({"penalize": "factors"}, 3, "cannot be measured or penalised; use FSDP 2"),
        (None, 3, "ZeRO-3 shards the factors"),
        ({"penalize": "product"}, 2, None),
    ],
)
def test_what_zero_would_undo_is_refused(l1, stage, message):
    from types import SimpleNamespace

    from paft_merge.training.job import check_sharding
    from paft_merge.training.schema import read_adapter

    plugin = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    trainer = SimpleNamespace(
        is_fsdp_enabled=False, is_deepspeed_enabled=True, accelerator=SimpleNamespace(state=plugin)
    )
    job = SimpleNamespace(name="sft", spec=read_adapter({"objective": "sft", "data": "x", "l1": l1}))
    if message is None:
        check_sharding(job, trainer)
        return
    with pytest.raises(TrainError, match=message) as caught:
        check_sharding(job, trainer)
    assert caught.value.problems[0].code == ("PROX_ZERO" if stage == 2 else "ZERO")
    trainer.is_deepspeed_enabled = False
    check_sharding(job, trainer)


def test_four_bits_without_bitsandbytes_say_what_to_install_and_with_it_what_was_asked_for(monkeypatch):
    import importlib.util

    from transformers import AutoModelForCausalLM

    from paft_merge.training.base_model import load_base
    from paft_merge.training.schema import BaseSpec

    wanted = BaseSpec(quantization={"load_in_4bit": True})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainError, match=r"bitsandbytes is not installed; pip install 'paft-merge\[4bit\]'"):
        load_base("toy", wanted)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **options: options)
    asked = load_base("toy", wanted)["quantization_config"]
    assert (asked.load_in_4bit, asked.bnb_4bit_quant_type) == (True, "nf4")
    assert asked.bnb_4bit_compute_dtype == torch.bfloat16


def test_a_base_in_four_bits_is_trained_with_float32_adapters_and_the_result_merges(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    from paft_merge import merge

    folder = saved(tmp_path / "base", base)
    section = spec(steps=8, l1={"strength": 1e-3}, base={"quantization": {"load_in_4bit": True}})
    texts().to_json(tmp_path / "texts.jsonl")
    out = train_adapter(folder, section | {"data": str(tmp_path / "texts.jsonl")}, tmp_path / "sft")
    held, record = load_file(out / "adapter_model.safetensors"), record_of(out)
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    losses = [line["loss"] for line in record["run"]["log"] if "loss" in line]
    assert losses[-1] < losses[0]
    assert record["delta"]["relative_norm"] is None  # the weights beneath have no plain form
    recipe = {
        "merge_method": "task_arithmetic", "base_model": folder,
        "models": [{"model": f"{folder}+{out}", "parameters": {"weight": 1.0}}],
    }  # fmt: skip
    merged, before = load_file(merge(recipe, tmp_path / "merged") / "model.safetensors"), base.state_dict()
    moved = sum(float((merged[name] - before[name]).square().sum()) for name in merged) ** 0.5
    assert moved == pytest.approx(record["delta"]["norm"], rel=1e-3)


def test_adapters_that_trl_narrowed_arewiden_adaptered_and_frozen_weights_are_not():
    from paft_merge.training.job import widen_adapter

    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).bfloat16()
    net[0].requires_grad_(False)
    widen_adapter(net)
    assert [p.dtype for p in net.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_tensorboard_gets_the_lines_with_our_measures_and_keeps_them(base, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    section = spec(steps=3, training={"report_to": ["tensorboard"]}, l1={"strength": 1e-3})
    out = train_adapter(base, section, tmp_path / "x", rows=texts(), tokenizer=tokenizer(), base_name="toy")
    (events,) = (out / "runs").glob("*/events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    for name in ("loss", "l1/loss", "l1/strength", "l1/grad_norm", "l1/task_grad_norm"):
        values = [line[name] for line in record_of(out)["run"]["log"] if name in line]
        shown = [event.value for event in board.Scalars(f"train/{name}")]
        assert shown == pytest.approx(values, rel=1e-5)
        assert len(shown) == 3
    assert "train/sparsity/below_1e-5" in board.Tags()["scalars"]
    assert not (out / "checkpoints").exists()


def test_no_trainer_tells_the_hub_of_itself(base, tmp_path, monkeypatch):
    from trl.trainer import base_trainer

    monkeypatch.setattr(base_trainer, "send_telemetry", lambda *args, **kwargs: pytest.fail("telemetry was sent"))
    train_adapter(base, spec(steps=1), tmp_path / "x", rows=texts(), tokenizer=tokenizer(), base_name="toy")


def test_conversations_train_on_the_assistant_only_when_asked(base, tmp_path):
    turns = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in zip(sentences(torch.ones(32, 32), 16, 4, 1), sentences(torch.ones(32, 32), 16, 6, 2), strict=True)
    ]
    tokens = {}
    for only in (False, True):
        section = spec(steps=1, training={"assistant_only_loss": only, "per_device_train_batch_size": 16})
        out = train_adapter(
            base, section, tmp_path / str(only), rows=dataset(turns), tokenizer=tokenizer(), base_name="toy"
        )
        tokens[only] = lines_of(out)[0]["loss"]
    assert tokens[True] != tokens[False]


def test_prompt_completion_rows_and_packing_run(base, tmp_path):
    pairs = dataset([{"prompt": r["prompt"], "completion": r["chosen"]} for r in preferences()])
    train_adapter(base, spec(steps=1), tmp_path / "pairs", rows=pairs, tokenizer=tokenizer(), base_name="toy")
    training = {"packing": True, "packing_strategy": "wrapped", "max_length": 32}
    out = train_adapter(
        base, spec(steps=1, training=training), tmp_path / "packed", rows=texts(), tokenizer=tokenizer(), base_name="t"
    )
    assert record_of(out)["data"]["rows_trained_on"] < 64
    assert "rows_cut" not in record_of(out)["data"]  # wrapped: what does not fit goes on in the next row


def test_rows_that_packing_cuts_are_counted(base, tmp_path):
    training = {"packing": True, "packing_strategy": "bfd", "max_length": 8}
    section = spec(steps=1, training=training)
    out = train_adapter(base, section, tmp_path / "x", rows=texts(), tokenizer=tokenizer(), base_name="toy")
    assert record_of(out)["data"]["rows_cut"] == 64
    assert "64 of 64 rows looked at are longer than max_length 8" in record_of(out)["run"]["warnings"][0]
