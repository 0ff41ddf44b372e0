"""Killed runs go on to the same bits; what does not belong together is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from contextlib import suppress

import pytest
import torch
from toys.train import FAST, THEIR_WARNINGS, preferences, pretrained, texts, tokenizer

from paft_merge.errors import PaftMergeError, TrainError
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
    section = {"objective": objective, "data": "m", "lora": lora, "training": training} | more
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
    with pytest.raises(TrainError, match="an interrupted run left this folder; continue it with resume=True"):
        run(tmp_path / "x")
    with pytest.raises(TrainError, match=r"other settings: l1: null there, .*strength.* in the recipe; resume with"):
        run(tmp_path / "x", resume=True, l1={"strength": 1.0})
    shutil.rmtree(tmp_path / "x.part")
    out = run(tmp_path / "x")
    before = (out / "paft_train.json").stat().st_mtime_ns
    with pytest.raises(TrainError, match="the folder exists; skip finished adapters with resume=True"):
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


PARTS = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")


@pytest.mark.parametrize("how", ["gone", "empty", "torn"])
@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_with_a_damaged_part_is_not_whole(tmp_path, finished_checkpoints, part, how):
    place = RunFolder(tmp_path / "killed")
    shutil.copytree(finished_checkpoints, place.part)
    assert place.last_checkpoint().name == "checkpoint-6"
    assert place.last_checkpoint(processes=2) is None
    damage(place.checkpoints / "checkpoint-6" / part, how)
    assert place.last_checkpoint().name == "checkpoint-3"
    fault = next(place.faults())[1]
    assert part in fault
    assert {"gone": "missing", "empty": "empty", "torn": ""}[how] in fault


def damage(file, how):
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(b"" if how == "empty" else file.read_bytes()[:-20])


@pytest.fixture(scope="module")
def finished_checkpoints(tmp_path_factory):
    """The work folder of a run that was killed after checkpoint-6."""
    out = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(KeyboardInterrupt):
        run(out, callbacks=[killer(7)])
    return RunFolder(out).part


def test_a_flipped_byte_and_a_file_that_another_checkpoint_has_are_noticed(tmp_path, finished_checkpoints):
    place = RunFolder(tmp_path / "killed")
    shutil.copytree(finished_checkpoints, place.part)
    (place.checkpoints / "checkpoint-3" / "scaler.pt").write_bytes(b"of fp16")
    assert "scaler.pt is missing" in dict(place.faults())[place.checkpoints / "checkpoint-6"]
    (place.checkpoints / "checkpoint-3" / "scaler.pt").unlink()
    file = place.checkpoints / "checkpoint-6" / "optimizer.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert place.last_checkpoint().name == "checkpoint-3"


def test_a_state_of_another_step_a_folder_for_a_file_and_a_foreign_archive_are_noticed(tmp_path, finished_checkpoints):
    place = RunFolder(tmp_path / "killed")
    shutil.copytree(finished_checkpoints, place.part)
    six, three = (place.checkpoints / f"checkpoint-{n}" for n in (6, 3))
    kept = (six / "trainer_state.json").read_text()
    for text in ("{}", (three / "trainer_state.json").read_text(), kept.replace('"train_batch_size"', '"x"')):
        (six / "trainer_state.json").write_text(text)
        assert dict(place.faults())[six] == "trainer_state.json is not the state of its step"
    (six / "trainer_state.json").write_text(kept)
    with zipfile.ZipFile(six / "optimizer.pt", "w") as archive:
        archive.writestr("a", "b")
    assert dict(place.faults())[six] == "optimizer.pt is damaged"
    (six / "optimizer.pt").unlink()
    (six / "optimizer.pt").mkdir()
    assert dict(place.faults())[six] == "optimizer.pt is not a file"
    (place.part / "paft_run.json").write_text('{"a"')
    with pytest.raises(TrainError, match=r"paft_run\.json.*; remove the folder"):
        place.open({}, resume=True)


def test_a_run_that_goes_back_says_so_and_ends_in_the_same_bits(tmp_path, finished_checkpoints, caplog):
    straight = run(tmp_path / "straight")
    shutil.copytree(finished_checkpoints, tmp_path / "killed.part")
    (tmp_path / "killed.part" / "checkpoints" / "checkpoint-6" / "optimizer.pt").unlink()
    resumed = run(tmp_path / "killed", resume=True)
    file = "adapter_model.safetensors"
    assert (straight / file).read_bytes() == (resumed / file).read_bytes()
    text = "checkpoint-6 is not whole: optimizer.pt is missing; going back to checkpoint-3"
    assert text in caplog.text
    assert text in json.loads((resumed / "paft_train.json").read_text())["run"]["warnings"]


class Touch:
    """A pickle of it creates a file where it is loaded as code."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin"])
def test_no_pickle_of_a_strangers_run_runs_code(tmp_path, finished_checkpoints, name, zipped):
    shutil.copytree(finished_checkpoints, tmp_path / "killed.part")
    evil = {"state": Touch(tmp_path / "ran"), "param_groups": []}
    for folder in (tmp_path / "killed.part" / "checkpoints").glob("checkpoint-*"):
        if zipped:
            torch.save(evil, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(evil))
    with suppress(TrainError):
        run(tmp_path / "killed", resume=True)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(evil))
    assert (tmp_path / "ran").exists()


def header_of(fields):
    def write(folder):
        text = json.dumps(fields).encode()
        (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))

    return write


def state_with(**fields):
    def write(folder):
        path = folder / "trainer_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return write


def packed(method):
    def write(folder):
        with zipfile.ZipFile(folder / "optimizer.pt", "w") as archive:
            archive.writestr("optimizer/data.pkl", b"x" * 100)
        raw = bytearray((folder / "optimizer.pt").read_bytes())
        for mark, offset in ((b"PK\1\2", 10), (b"PK\3\4", 8)):
            raw[raw.find(mark) + offset] = method
        (folder / "optimizer.pt").write_bytes(raw)

    return write


def folder_instead(folder):
    (folder / "optimizer.pt").unlink()
    (folder / "optimizer.pt").mkdir()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (header_of({"a": 1}), "adapter_model.safetensors is damaged"),
        (header_of({"a": {"data_offsets": "x"}}), "adapter_model.safetensors is damaged"),
        (header_of({"a": {"data_offsets": [0, "8"]}}), "adapter_model.safetensors is cut short"),
        (packed(99), "optimizer.pt is damaged"),
        (folder_instead, "optimizer.pt is not a file"),
        (state_with(global_step="x"), "trainer_state.json has a wrong value of global_step"),
        (state_with(log_history=[1]), "trainer_state.json has a wrong value of log_history"),
        (state_with(save_steps=None), "trainer_state.json has a wrong value of save_steps"),
        (state_with(stateful_callbacks=[1]), "trainer_state.json has a wrong value of stateful_callbacks"),
    ],
)
def test_a_checkpoint_of_wrong_content_is_passed_over(tmp_path, finished_checkpoints, damage, fault):
    place = RunFolder(tmp_path / "killed")
    shutil.copytree(finished_checkpoints, place.part)
    damage(place.checkpoints / "checkpoint-6")
    assert next(place.faults())[1] == fault
    assert place.last_checkpoint().name == "checkpoint-3"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize(
    "content", [[1], {}, {"state": {}, "param_groups": []}, "x", {"python": 1, "numpy": 2, "cpu": 3}]
)
def test_a_checkpoint_that_cannot_be_loaded_is_named(tmp_path, finished_checkpoints, name, content):
    shutil.copytree(finished_checkpoints, tmp_path / "killed.part")
    torch.save(content, tmp_path / "killed.part" / "checkpoints" / "checkpoint-6" / name)
    with pytest.raises(TrainError, match=r"checkpoint-6: .*; remove this folder; the run then resumes from"):
        run(tmp_path / "killed", resume=True)


@pytest.mark.parametrize("raw", [b"", b"[[[[", b"null", b"\xff\xfe", b"[" * 5000, b"[1]", None])
def test_the_settings_of_an_interrupted_run_may_be_damaged(tmp_path, finished_checkpoints, raw):
    shutil.copytree(finished_checkpoints, tmp_path / "killed.part")
    file = tmp_path / "killed.part" / "paft_run.json"
    file.unlink()
    if raw is None:
        os.mkfifo(file)
    else:
        file.write_bytes(raw)
    with pytest.raises(PaftMergeError, match=r"paft_run\.json|killed\.part"):
        run(tmp_path / "killed", resume=True)


def test_a_finished_adapter_is_not_taken_for_that_of_a_changed_recipe(tmp_path):
    out = run(tmp_path / "x")
    with pytest.raises(
        TrainError, match=r"x: was trained with other settings: lora.r: 4 there, 2 in the recipe; train into"
    ):
        run(out, resume=True, lora={"r": 2, "lora_dropout": 0.1})
    damage(out / "adapter_model.safetensors", "torn")
    with pytest.raises(TrainError, match=r"adapter_model.safetensors is cut short; remove the folder"):
        run(out, resume=True)


def test_a_rate_that_overflows_is_one_line(tmp_path):
    training = {**FAST, "max_steps": 2, "learning_rate": 1e38, "logging_steps": 100, "max_grad_norm": 0.0}
    with pytest.raises(TrainError) as caught:
        run(tmp_path / "x", training=training)
    assert [problem.code for problem in caught.value.problems] == ["NONFINITE"]
    assert len(str(caught.value).splitlines()) == 1
