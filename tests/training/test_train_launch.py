"""All adapters of a recipe: on one base in turn, or a process each, whose failure stops the others."""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toys.train import FAST, THEIR_WARNINGS, preferences, pretrained, saved, texts

from paft_merge.errors import RecipeError, TrainError
from paft_merge.training import launch, train
from paft_merge.training.processes import Launch, command_for, devices_of, free_ports, run_all
from paft_merge.training.schema import read_adapter
from paft_merge.training.train_options import TrainOptions

pytestmark = THEIR_WARNINGS


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    torch.set_num_threads(1)


def recipe(folder, **more):
    saved(folder / "base", pretrained())
    texts().to_json(folder / "texts.jsonl")
    preferences().to_json(folder / "pairs.jsonl")
    training = {**FAST, "max_steps": 2}
    made = {
        "base_model": "base",
        "adapters": {
            "sft": {"objective": "sft", "data": "texts.jsonl", "training": training, "l1": {"strength": 0.001}},
            "dpo": {"objective": "dpo", "data": "pairs.jsonl", "training": training},
            **more,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made, sort_keys=False))
    return folder / "recipe.yaml"


def test_all_adapters_are_trained_on_one_base_and_named_ones_alone(tmp_path):
    path = recipe(tmp_path)
    done = train(path, tmp_path / "out", schedule="sequential")
    assert list(done) == ["sft", "dpo"]
    records = {name: json.loads((folder / "paft_train.json").read_text()) for name, folder in done.items()}
    assert records["sft"]["base"]["digest"] == records["dpo"]["base"]["digest"]
    assert records["sft"]["base"]["name"] == "base"
    alone = train(path, tmp_path / "alone", adapters=["dpo"], schedule="sequential")
    assert list(alone) == ["dpo"]
    file = "adapter_model.safetensors"
    assert (alone["dpo"] / file).read_bytes() == (done["dpo"] / file).read_bytes()
    again = train(path, tmp_path / "out", resume=True, schedule="sequential")
    assert again == done


def test_a_trainer_that_touches_the_base_is_found_out(tmp_path, monkeypatch):
    from paft_merge.training import run

    original = run.run_trainer

    def spoil(job, trainer):
        original(job, trainer)
        with torch.no_grad():
            job.base.get_input_embeddings().weight[0, 0] += 1e-6

    monkeypatch.setattr(run, "run_trainer", spoil)
    with pytest.raises(TrainError, match="training this adapter changed") as caught:
        train(recipe(tmp_path), tmp_path / "out", adapters=["sft"], schedule="sequential")
    assert caught.value.problems[0].code == "BASE_CHANGED"


def test_faults_of_a_recipe_carry_their_line(tmp_path):
    path = recipe(tmp_path, third={"objective": "sft", "data": "x", "l1": {"strenght": 1}})
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "strenght" in text)
    with pytest.raises(RecipeError, match=f"recipe.yaml:{line}: adapters.third.l1.strenght: unknown key"):
        train(path, tmp_path / "out")
    with pytest.raises(RecipeError, match="no adapter 'dop'; did you mean 'dpo'"):
        train(recipe(tmp_path), tmp_path / "out", adapters=["dop"])
    with pytest.raises(RecipeError, match="no adapters to train"):
        train({"base_model": "x"}, tmp_path / "out")


def script(folder, name, body):
    path = folder / f"{name}.py"
    path.write_text(body)
    return (sys.executable, "-I", str(path))


def test_children_get_their_own_gpus_and_run_as_many_as_fit(tmp_path):
    body = (
        "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], time.time()); time.sleep(0.4); print(time.time())"
    )

    def launch(name, gpus):
        return Launch(name, script(tmp_path, name, body), gpus, tmp_path / f"{name}.log")

    run_all({"a": 1, "b": 1, "c": 2}, ["0", "1"], launch, poll_s=0.02)
    words = {name: (tmp_path / f"{name}.log").read_text().split() for name in "abc"}
    assert {words["a"][0], words["b"][0]} == {"0", "1"}
    assert sorted(words["c"][0].split(",")) == ["0", "1"]
    assert float(words["c"][1]) >= max(float(words["a"][2]), float(words["b"][2]))


def test_a_failing_child_stops_its_siblings_with_everything_they_started(tmp_path):
    marker = tmp_path / "grandchild"
    long = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(marker)!r}, 'w').write(str(p.pid)); time.sleep(60)\n"
    )
    short = (
        "import os, sys, time\n"
        f"while not os.path.exists({str(marker)!r}): time.sleep(0.01)\n"
        "time.sleep(0.1); sys.exit('ValueError: no data')\n"
    )

    def launch(name, gpus):
        return Launch(name, script(tmp_path, name, long if name == "long" else short), gpus, tmp_path / f"{name}.log")

    started = time.monotonic()
    with pytest.raises(TrainError, match="exit code 1: ValueError: no data") as caught:
        run_all({"long": 1, "short": 1}, ["0", "1"], launch, poll_s=0.02)
    assert caught.value.problems[0].code == "CHILD"
    assert time.monotonic() - started < 20
    pid = int(marker.read_text())
    for _ in range(100):
        if not _alive(pid):
            break
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split()[2] != "Z"
    except OSError:
        return False


def test_the_command_of_a_child_is_accelerates_with_its_own_port():
    spec = read_adapter({"objective": "sft", "data": "x", "processes": 2})
    command = command_for("sft", spec, "r.yaml", "out", True, 1234)
    assert command[1:3] == ("-m", "accelerate.commands.launch")
    assert command[command.index("--num_processes") + 1] == "2"
    assert command[command.index("--main_process_port") + 1] == "1234"
    assert command[-6:] == ("-m", "paft_merge.training.launch", "r.yaml", "out", "sft", "--resume")
    ports = free_ports(8)
    assert len(set(ports)) == 8
    assert all(1024 <= port < 65536 for port in ports)


def test_devices_are_the_visible_gpus_those_that_are_named_or_processes_on_the_cpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices_of(None, {"a": 1, "b": 2}) == ("cpu", "cpu")
    assert devices_of("cpu:3", {"a": 1}) == ("cpu", "cpu", "cpu")
    assert devices_of("2, 3", {"a": 2}) == ("2", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert devices_of(None, {"a": 1}) == ("4", "5")
    for nothing in ("gpu", "cpu:x", "0,x", "cpu:0"):
        with pytest.raises(TrainError, match=r"not a list of devices; write 0,1 \(GPUs\) or cpu:2 \(processes\)"):
            devices_of(nothing, {"a": 1})
    with pytest.raises(TrainError, match=r"a: needs 3 processes, but there are 2 devices \(4, 5\)"):
        devices_of(None, {"a": 3})


def test_a_child_sees_its_own_devices_and_on_a_cpu_its_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    gpu = Launch("a", (), ("2", "3"), tmp_path / "a.log").environment
    assert gpu["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert gpu.get("ACCELERATE_USE_CPU") == os.environ.get("ACCELERATE_USE_CPU")
    cpu = Launch("a", (), ("cpu", "cpu"), tmp_path / "a.log", 3).environment
    assert (cpu["ACCELERATE_USE_CPU"], cpu["OMP_NUM_THREADS"]) == ("true", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert Launch("a", (), ("cpu",), tmp_path / "a.log", 3).environment["OMP_NUM_THREADS"] == "7"


def test_what_a_child_says_is_told_on_and_its_own_error_goes_before_the_echoes(tmp_path):
    body = (
        "import sys\n"
        "print('step 1/2 {}'); print('step 2/2 {\"loss\": 3.5}'); print('noise: step 9/9 {}', flush=True)\n"
        "print('[rank1]: RuntimeError: peer closed', flush=True)\n"
        "print('TrainError: x: the data set is empty', flush=True)\n"
        "print('[rank0]: ValueError: later', flush=True); sys.exit(3)\n"
    )
    (tmp_path / "x.log").write_text("TrainError: of an earlier run\n")
    heard = []

    def launch(name, devices):
        return Launch(name, script(tmp_path, name, body), devices, tmp_path / "x.log")

    with pytest.raises(TrainError, match="exit code 3: TrainError: x: the data set is empty; see"):
        run_all({"x": 1}, ["cpu"], launch, lambda *told: heard.append(told), poll_s=0.02)
    assert heard == [("x", 1, 2, {}), ("x", 2, 2, {"loss": 3.5})]


FSDP = """
distributed_type: FSDP
mixed_precision: bf16
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_state_dict_type: FULL_STATE_DICT}
"""


def test_an_adapter_on_several_gpus_is_launched_as_its_accelerate_config_says(tmp_path):
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    (tmp_path / "fsdp.yaml").write_text(FSDP)
    section = {"objective": "sft", "data": "x", "processes": 4, "accelerate_config": "fsdp.yaml"}
    command = command_for("sft", read_adapter(section), tmp_path / "r.yaml", tmp_path / "out", False, 1234)
    parsed = launch_command_parser().parse_args(command[3:])
    assert load_config_from_file(parsed.config_file).fsdp_config["fsdp_version"] == 2
    assert (parsed.num_processes, parsed.main_process_port, parsed.multi_gpu) == (4, 1234, False)
    assert (parsed.mixed_precision, parsed.dynamo_backend) == (None, None)  # what the file says goes
    assert (parsed.module, parsed.training_script) == (True, "paft_merge.training.launch")
    assert parsed.training_script_args == [str(tmp_path / "r.yaml"), str(tmp_path / "out"), "sft"]
    plain = launch_command_parser().parse_args(
        command_for(
            "sft", read_adapter({"objective": "sft", "data": "x", "processes": 2}), Path("r"), Path("o"), True, 1
        )[3:]
    )
    assert (plain.num_processes, plain.multi_gpu, plain.mixed_precision) == (2, True, "no")


def test_an_accelerate_config_that_is_not_there_stops_before_anything_is_launched(tmp_path):
    path = recipe(tmp_path, third={"objective": "sft", "data": "x", "accelerate_config": "fsdp.yaml"})
    with pytest.raises(TrainError, match=r"third: accelerate_config: file fsdp.yaml"):
        train(path, tmp_path / "out", schedule="processes")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_folders_alone_and_draws_progress_on_a_terminal(tmp_path, monkeypatch):
    import io

    from click.testing import CliRunner

    from paft_merge.cli import cli
    from paft_merge.training import launch
    from paft_merge.training.train_options import TrainProgress

    asked = {}

    def fake(path, out, **options):
        asked.update(options)
        if options["progress"]:
            for step, logs in (
                (1, {}),
                (2, {"loss": 3.25, "sparsity/below_1e-5": 0.5, "learning_rate": 1e-3}),
                (2, {}),
            ):
                options["progress"](TrainProgress("sft", step, 2, logs))
        return {"sft": Path(out) / "sft"}

    monkeypatch.setattr(launch, "train", fake)
    shown = CliRunner().invoke(cli, ["train", str(recipe(tmp_path)), "out", "--adapter", "sft", "--resume"])
    assert (shown.exit_code, shown.stdout) == (0, "out/sft\n")
    assert shown.stderr == "sft: step 2/2, loss 3.25, sparse 0.5, rate 0.001\n"
    assert (asked["adapters"], asked["resume"], asked["logs"]) == (("sft",), True, True)
    quiet = CliRunner().invoke(cli, ["train", str(recipe(tmp_path)), "out", "--quiet"])
    assert (quiet.stdout, quiet.stderr, asked["progress"]) == ("out/sft\n", "", None)
    CliRunner().invoke(cli, ["train", str(recipe(tmp_path)), "out", "--devices", "cpu:2"])
    assert asked["devices"] == "cpu:2"
    wrong = CliRunner().invoke(
        cli, ["train", str(recipe(tmp_path)), "out", "--devices", "0", "--schedule", "sequential"]
    )
    assert (wrong.exit_code, "use CUDA_VISIBLE_DEVICES" in wrong.stderr) == (2, True)

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    cli(["train", str(recipe(tmp_path)), "out"], standalone_mode=False)
    assert "loss 3.25, sparse 0.5" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()


def test_the_command_writes_a_log_of_every_adapter_and_names_it(tmp_path):
    from click.testing import CliRunner

    from paft_merge.cli import cli

    out = tmp_path / "out"
    args = ["train", str(recipe(tmp_path)), str(out), "--schedule", "sequential"]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    for name in ("sft", "dpo"):
        log = (out / f"{name}.log").read_text()
        assert re.search(r'^step \d+/\d+ \{"loss": ', log, re.MULTILINE)
        assert f"{name}: log in {out / name}.log" in done.stderr
        assert re.search(rf"^{name}: step \d+/\d+, loss [\d.]+.*, rate ", done.stderr, re.MULTILINE)
    again = CliRunner().invoke(cli, args)
    assert again.exit_code == 1
    assert "the folder exists; skip finished adapters with --resume" in again.stderr
    kept = CliRunner().invoke(cli, [*args, "--resume"])
    assert kept.exit_code == 0, kept.output
    assert f"sft: was finished already, log in {out / 'sft'}.log" in kept.stderr
    assert "TrainError: " in (out / "sft.log").read_text()


def test_trl_is_imported_without_the_search_for_reference_cycles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, searched = "paft_merge.training.trainers", list[bool]()

    class Finder:
        def find_spec(self, module: str, *_: Any) -> None:
            if module == name:
                searched.append(gc.isenabled())

    importlib.import_module(name)
    monkeypatch.setattr(name, sys.modules[name])  # so that the attribute of the package is restored, too
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    launch._one_after_another({}, None, tmp_path, TrainOptions(base_path="x"), False)
    assert searched == [False]
    assert gc.isenabled()
