"""Killed runs go on to the same bits; what does not belong together is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from toys.train import FAST, THEIR_WARNINGS, preferences, pretrained, texts, tokenizer

from paft_merge.errors import TrainError
from paft_merge.training import train_adapter
from paft_merge.training.run_folder import RunFolder

pytestmark = THEIR_WARNINGS


@pytest.fixture(autouse=True)
def one_thread():
    import datasets

    datasets.disable_progress_bars()
    torch.set_num_threads(1)


def killer(step):
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Kill()


def run(out, objective="sft", callbacks=(), resume=False, **more):
    training = {**FAST, "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    lora = {"r": 4, "lora_dropout": 0.1}
    section = {"objective": objective, "data": "m", "lora": lora, "training": training, **more}
    rows = preferences() if objective == "dpo" else texts()
    options = {"rows": rows, "tokenizer": tokenizer(), "base_name": "toy", "resume": resume, "callbacks": callbacks}
    return train_adapter(pretrained(), section, out, **options)


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("sft", {}),
        ("sft", {"l1": {"strength": 1e-3, "target": 0.5}}),
        ("sft", {"l1": {"strength": 1e-2, "mode": "prox", "warmup": 2}}),
        ("dpo", {"l1": {"strength": 1e-3}}),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, objective, more):
    straight = run(tmp_path / "straight", objective, **more)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", objective, callbacks=[killer(5)], **more)
    assert not (tmp_path / "killed").exists()
    resumed = run(tmp_path / "killed", objective, resume=True, **more)
    file = "adapter_model.safetensors"
    assert (straight / file).read_bytes() == (resumed / file).read_bytes()
    strengths = [json.loads((p / "paft_train.json").read_text())["run"]["l1_strength"] for p in (straight, resumed)]
    assert strengths[0] == strengths[1]


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path):
    straight = run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", callbacks=[killer(7)])
    place = RunFolder(tmp_path / "killed")
    assert place.last_checkpoint().name == "checkpoint-6"
    state = place.checkpoints / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    assert place.last_checkpoint().name == "checkpoint-3"
    resumed = run(tmp_path / "killed", resume=True)
    file = "adapter_model.safetensors"
    assert (straight / file).read_bytes() == (resumed / file).read_bytes()


def test_an_interrupted_folder_is_not_overwritten_and_another_run_is_not_continued(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "x", callbacks=[killer(4)])
    with pytest.raises(TrainError, match="an interrupted run left this folder"):
        run(tmp_path / "x")
    with pytest.raises(TrainError, match=r"spec was .* resume with the same recipe"):
        run(tmp_path / "x", resume=True, l1={"strength": 1.0})
    shutil.rmtree(tmp_path / "x.part")
    out = run(tmp_path / "x")
    before = (out / "paft_train.json").stat().st_mtime_ns
    with pytest.raises(TrainError, match="the folder exists"):
        run(out)
    assert run(out, resume=True) == out
    assert (out / "paft_train.json").stat().st_mtime_ns == before


def test_resuming_before_the_first_checkpoint_starts_over(tmp_path):
    straight = run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", callbacks=[killer(1)])
    resumed = run(tmp_path / "killed", resume=True)
    file = "adapter_model.safetensors"
    assert (straight / file).read_bytes() == (resumed / file).read_bytes()
