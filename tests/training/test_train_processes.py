"""Several processes for real, on a CPU: the same adapter as one process makes, siblings, signals, no orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from toys.train import FAST, THEIR_WARNINGS, preferences, saved, texts, tiny_llama

from paft_merge.errors import TrainError
from paft_merge.training import train

pytestmark = [pytest.mark.slow, THEIR_WARNINGS]
FILE = "adapter_model.safetensors"

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    datasets.disable_progress_bars()
    torch.set_num_threads(1)


def recipe(folder, **sections):
    """A recipe in a file; every section trains on the same few sentences."""
    saved(folder / "base", tiny_llama())
    texts().to_json(folder / "texts.jsonl")
    preferences().to_json(folder / "pairs.jsonl")
    adapters = {}
    for name, (processes, more) in sections.items():
        training = {**FAST, "max_steps": 4, "per_device_train_batch_size": 8 // processes, **more.pop("training", {})}
        section = {"objective": "sft", "data": "texts.jsonl", "lora": {"r": 4}, "processes": processes, **more}
        adapters[name] = section | {"training": training}
    path = folder / f"{'-'.join(sections)}.yaml"
    path.write_text(yaml.safe_dump({"base_model": "base", "adapters": adapters}, sort_keys=False))
    return path


def logged(folder):
    record = json.loads((folder / "paft_train.json").read_text())
    return [
        {k: v for k, v in line.items() if "l1/" in k or k == "loss"} for line in record["run"]["log"] if "loss" in line
    ]


def test_two_processes_make_the_adapter_that_one_makes_on_the_same_batches(tmp_path):
    l1 = {"l1": {"strength": 1e-2}}
    heard = []
    both = recipe(tmp_path, two=(2, dict(l1)))
    two = train(both, tmp_path / "out", progress=heard.append)["two"]
    one = train(recipe(tmp_path, one=(1, dict(l1))), tmp_path / "out", schedule="sequential")["one"]
    ours, theirs = load_file(two / FILE), load_file(one / FILE)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=1e-3)
    for line, alone in zip(logged(two), logged(one), strict=True):
        assert line == pytest.approx(alone, rel=1e-3, abs=1e-5)
    # One record, one log, and the parent heard every step once.
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["one", "two", "two.log"]
    assert [p.logs["loss"] for p in heard if "loss" in p.logs] == pytest.approx(
        [line["loss"] for line in logged(two)], rel=1e-4
    )
    text = (tmp_path / "out" / "two.log").read_text()
    assert text.count("step 4/4 {}") == 1
    assert "Traceback" not in text


def family_of(pid):
    return psutil.Process(pid).children(recursive=True)


def start(path, out, *more):
    command = [sys.executable, "-m", "paft_merge.cli", "train", str(path), str(out), "--devices", "cpu:3", *more]
    # Where the tests run in a shell's background, Ctrl-C is ignored, and so it would be by every process they start.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


LONG = {"training": {"max_steps": 100_000, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}}


def stepping(log):
    return log.exists() and "step 4/" in log.read_text()


def test_ctrl_c_stops_both_adapters_with_all_their_processes_and_they_can_go_on(tmp_path):
    path = recipe(tmp_path, two=(2, dict(LONG)), one=(1, dict(LONG)))
    out = tmp_path / "out"
    running = start(path, out)
    until(lambda: (stepping(out / "two.log") and stepping(out / "one.log")) or running.poll() is not None)
    family = family_of(running.pid)
    ports = [
        p.cmdline()[p.cmdline().index("--main_process_port") + 1]
        for p in family
        if "--main_process_port" in p.cmdline()
    ]
    assert len(ports) == len(set(ports)) == 2
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert (running.returncode, "--resume continues" in told) == (130, True)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert [p.name for p in (out / "two.part" / "checkpoints").glob("checkpoint-*")]
    assert not (out / "two").exists()


def test_a_fault_in_several_processes_is_reported_in_one_line_and_none_is_left(tmp_path):
    path = recipe(tmp_path, bad=(2, {"data": "pairs.jsonl"}))
    with pytest.raises(
        TrainError, match=r"bad: .* code 1: TrainError: .*:\d+: adapters.bad: pairs.jsonl: needs messages"
    ):
        train(path, tmp_path / "out")
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(path) in (p.info["cmdline"] or [])]
    assert not (tmp_path / "out" / "bad").exists()


def test_what_fsdp_would_break_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # what accelerate launch says to its processes
    monkeypatch.setenv("FSDP_VERSION", "1")
    path = recipe(tmp_path, one=(1, {"base": {"dtype": "float32"}}))
    with pytest.raises(TrainError, match=r"one: FSDP 1 flattens the factors .* set fsdp_config: \{fsdp_version: 2\}"):
        train(path, tmp_path / "out", schedule="sequential")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(TrainError, match="PEFT writes checkpoints without the adapter; set fsdp_activation"):
        train(path, tmp_path / "out", schedule="sequential")


def test_fsdp_2_gathers_the_factors_and_its_sharded_checkpoints_resume_to_what_one_process_makes(tmp_path):
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    sparse = {
        "l1": {"strength": 1e-2, "target": 0.5},
        "training": {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": True},
    }
    path = recipe(tmp_path, two=(2, {**sparse, "accelerate_config": "fsdp.yaml"}))
    one = train(recipe(tmp_path, one=(1, dict(sparse))), tmp_path / "out", schedule="sequential")["one"]
    with pytest.raises(subprocess.CalledProcessError):
        fsdp(path, tmp_path / "out", STOP_AFTER="3")
    two = fsdp(path, tmp_path / "out", "--resume")
    held = load_file(two / FILE)
    for name, tensor in load_file(one / FILE).items():
        torch.testing.assert_close(held[name], tensor, atol=2e-4, rtol=1e-3)
    for line, alone in zip(logged(two), logged(one), strict=True):
        assert line == pytest.approx(alone, rel=1e-3, abs=1e-5)


FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: true
"""


def fsdp(path, out, *more, **environment):
    """Run the launcher's own command on `fsdp_on_cpu.py` instead of on its module: accelerate shards on GPUs only."""
    from paft_merge.training.launch import read_recipe
    from paft_merge.training.processes import command_for, free_ports
    from paft_merge.training.schema import read_adapters

    spec = read_adapters(read_recipe(path)[0])["two"]
    command = list(command_for("two", spec, path, out, False, free_ports(1)[0]))
    at = command.index("paft_merge.training.launch")
    command[at - 1 : at + 1] = [str(TESTS / "toys" / "fsdp_on_cpu.py")]
    surrounded = {**os.environ, "ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1", **environment}
    subprocess.run([*command, *more], check=True, env=surrounded, capture_output=True)
    return out / "two"
