"""The scripts that set up, check and measure: the reference goes red on a wrong merge, and versions are pinned."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from paft_merge import open_plan
from paft_merge.engine.prediction import predicted_peak

ROOT = Path(__file__).parent.parent
TOOLS = ROOT / "tools"
SCRIPTS = [TOOLS / "venv", TOOLS / "test", TOOLS / "check", TOOLS / "quickstart", ROOT / ".ci" / "run"]

import bench_prediction  # noqa: E402
import make_layout  # noqa: E402
import scale_table  # noqa: E402
from bench_data import PRESETS, Llama, headers, make  # noqa: E402
from bench_reference import CASES, check  # noqa: E402


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_every_dependency_that_a_test_run_installs_is_pinned() -> None:
    pinned, seen = pins(), set()
    waiting = [("paft-merge", frozenset({"dev"}))]
    while waiting:
        name, extras = waiting.pop()
        for text in metadata.requires(name) or ():
            requirement, _, condition = text.partition(";")
            found = re.match(r"([\w.-]+)(?:\[(.*?)\])?", requirement)
            wanted = re.search(r"extra == ['\"](.*?)['\"]", condition)
            assert found
            if (wanted and wanted[1] not in extras) or (condition and not wanted):
                continue
            step = normal(found[1]), frozenset(filter(None, (found[2] or "").split(",")))
            if step not in seen:
                seen.add(step)
                waiting.append(step)
    assert len(seen) > 50
    assert {name for name, _ in seen} - set(pinned) - {"paft-merge", "setuptools"} == set()


def test_pins_leave_out_the_local_part_of_a_version() -> None:
    assert pins()["torch"] == "2.13.0"
    assert not [name for name, version in pins().items() if not re.fullmatch(r"[\w.]+", version)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_leave_the_source_of_packages_to_pip(script: Path) -> None:
    subprocess.run(["sh", "-n", script], check=True)
    assert not re.findall(r"https?:|index-url|find-links|trusted-host", script.read_text())


def test_continuous_integration_runs_the_test_command_of_the_readme() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if "tools/" in line]
    assert commands == ["exec tools/test"]
    assert re.search(r"^tools/test\b", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    assert make(PRESETS["tiny"], folder)
    assert not make(PRESETS["tiny"], folder), "the second time it is there"
    return folder


def test_a_large_checkpoint_is_sharded_and_counts_its_parameters() -> None:
    shape = Llama(4096, 11008, 32, 32, 32, 32000)
    assert shape.parameters == 6_738_415_616, "Llama 2 7B"
    assert list(headers(shape.tensors())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def merged(data: Path, name: str, out: Path) -> Path:
    """A merge in plain float32 torch, for two cases whose rules fit a line."""
    case = CASES[name]
    base = load_file(data / "base" / "model.safetensors")
    deltas = [delta_of(data / source, base) for source in case.sources]
    out.mkdir()
    result = {}
    for tensor, values in base.items():
        first, second = (delta.get(tensor, torch.zeros(values.shape)) for delta in deltas)
        if case.method == "ties":
            first, second = trim(first, case.density), trim(second, case.density)
            parts = case.weights[0] * first, case.weights[1] * second
            sign = torch.where(parts[0] + parts[1] >= 0, 1.0, -1.0)
            agree = [(part * sign > 0).float() for part in parts]
            share = sum(w * a for w, a in zip(case.weights, agree, strict=True))
            mixed = (parts[0] * agree[0] + parts[1] * agree[1]) / torch.where(share == 0, 1.0, share)
        else:
            mixed = case.weights[0] * first + case.weights[1] * second
        result[tensor] = (values.float() + mixed).bfloat16()
    save_file(result, out / "model.safetensors")
    return out


def delta_of(folder: Path, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if (folder / "model.safetensors").exists():
        return {n: t.float() - base[n].float() for n, t in load_file(folder / "model.safetensors").items()}
    factors = load_file(folder / "adapter_model.safetensors")
    stems = [key.removesuffix(".lora_A.weight") for key in factors if key.endswith(".lora_A.weight")]
    return {
        f"{stem.removeprefix('base_model.model.')}.weight": factors[f"{stem}.lora_B.weight"]
        @ factors[f"{stem}.lora_A.weight"]
        for stem in stems
    }


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    order = delta.abs().flatten().sort(descending=True, stable=True).indices
    keep = torch.zeros(delta.numel())
    keep[order[: max(1, int(density * delta.numel()))]] = 1
    return delta * keep.view_as(delta)


@pytest.mark.parametrize("name", ["ties/checkpoints", "ties/adapters", "task_arithmetic/adapters"])
def test_the_reference_accepts_float32_and_sees_one_element_that_is_off(name: str, data: Path, tmp_path: Path) -> None:
    out = merged(data, name, tmp_path / "out")
    found = check(CASES[name], data, out, exact_trim=True)
    assert found.passed, found
    assert found.elements > 100_000
    with safe_open(out / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state["model.layers.0.self_attn.q_proj.weight"].view(torch.int16)[5, 7] += 1
    save_file(state, out / "model.safetensors")
    assert check(CASES[name], data, out, exact_trim=True).wrong == 1


def test_the_reference_sees_a_trim_that_keeps_too_many(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generous = trim
    monkeypatch.setattr(sys.modules[__name__], "trim", lambda delta, density: generous(delta, density + 0.001))
    found = check(CASES["ties/checkpoints"], data, merged(data, "ties/checkpoints", tmp_path / "out"), exact_trim=True)
    assert not found.passed
    assert found.wrong + found.loose > 0


def test_a_tensor_that_no_adapter_touches_must_be_copied(data: Path, tmp_path: Path) -> None:
    out = merged(data, "task_arithmetic/adapters", tmp_path / "out")
    state = load_file(out / "model.safetensors")
    state["model.norm.weight"].view(torch.int16)[0] ^= 1
    save_file(state, out / "model.safetensors")
    found = check(CASES["task_arithmetic/adapters"], data, out, exact_trim=True)
    assert found.faults == ("model.norm.weight: not copied",)


def test_the_benchmark_prints_one_json_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        TOOLS / "bench_merge.py",
        tmp_path,
        "--params",
        "tiny",
        "--case",
        "dare_ties/checkpoints",
    ]
    done = subprocess.run(
        [*command, "--runs", "1", "--mergekit-runs", "0", "--no-fill"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(done.stdout)["cases"]
    assert case["paft"]["check"]["passed"]
    assert case["identical_outputs"]
    assert case["paft"]["private_mb"] > 1
    assert case["mergekit"] == {"runs": 0, "check": None}
    assert str(tmp_path) not in done.stdout
    assert not (tmp_path / "run").exists()


def test_the_benchmark_of_a_gpu_runs_without_one(tmp_path: Path) -> None:
    command = [
        sys.executable,
        TOOLS / "bench_gpu.py",
        "--out",
        tmp_path / "gpu",
        "--device",
        "cpu",
        "--only",
        "ties/adapters",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert "failed" not in json.dumps(found)
    assert [name for name, one in found["equality"].items() if one["different"] == 0 < one["elements"]] == [
        "ties/adapters",
        "ties/adapters, stochastic rounding",
        "ties/adapters, global trim",
        "ties/adapters, float32",
    ]
    assert found["bus"]["pinned_to_device_gb_s"] > 0
    assert found["large"]["ties/checkpoints, paft --device cpu"]["seconds"] > 0
    assert not (tmp_path / "gpu" / "data").exists()


def test_the_trial_of_workers_kills_some(tmp_path: Path) -> None:
    command = [sys.executable, TOOLS / "trial_workers.py", tmp_path, "--kills", "2", "--case", "slerp/checkpoints"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = map(json.loads, done.stdout.splitlines())
    assert row["kill"] >= 2
    assert row["faults"] == []


# --- layouts and predictions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3-70b", 70.55), ("llama-3.1-405b", 405.85), ("deepseek-v3", 671.03), ("kimi-k2", 1026.4)],
)
def test_layouts_have_the_published_sizes(name: str, billions: float) -> None:
    sizes = [math.prod(shape) for _, _, shape in make_layout.rows(make_layout.LAYOUTS[name])]
    assert sum(sizes) / 1e9 == pytest.approx(billions, rel=1e-4)


def test_a_layout_in_fp8_is_planned_with_and_without_its_codes(tmp_path: Path) -> None:
    """Also quickly: the time of a plan grows with the number of tensors, and not with its square."""
    base, adapter = tmp_path / "base", tmp_path / "sft"
    for more in (["deepseek-v3", str(base), "--fp8"], ["deepseek-v3", str(adapter), "--adapter", "16"]):
        done = CliRunner().invoke(make_layout.main, [*more, "--layers", "5"])
        assert done.exit_code == 0, done.output
    models = [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    start = time.process_time()
    with open_plan(recipe) as plain, open_plan({**recipe, "quantization": "keep"}) as kept:
        assert {tensor.dtype for tensor in plain.tensors} == {"BF16"}
        copied = [tensor for tensor in kept.tensors if tensor.method == "copy" and ".experts." in tensor.name]
        assert len(copied) == 2 * 2 * 256 * 3
        assert len([tensor for tensor in kept.tensors if tensor.coded]) == 2 * (5 * 5 + 3 * 3 + 2 * 3)
    assert time.process_time() - start < 10


def test_a_layout_takes_no_disk_and_can_be_planned(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "sft"
    for folder, more in ((base, []), (adapter, ["--adapter", "16"])):
        done = CliRunner().invoke(make_layout.main, ["kimi-k2", str(folder), "--layers", "2", *more])
        assert done.exit_code == 0, done.output
    files = list(base.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 30e9
    assert sum(512 * file.stat().st_blocks for file in files) < 2e6
    with open_plan(
        {"merge_method": "linear", "models": [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}]}
    ) as plan:
        merged = [tensor.name for tensor in plan.tensors if tensor.method == "linear"]
        assert not [name for name in merged if ".experts." in name]
        assert len(merged) == 2 * 5 + 3 + 3  # attention, a dense layer, a shared expert
        assert predicted_peak(plan, 2) < 1e9


def test_the_table_of_large_models_is_up_to_date(tmp_path: Path) -> None:
    page = scale_table.PAGE.read_text(encoding="utf-8")
    assert [line for line in scale_table.lines("llama-3-70b", tmp_path) if line not in page] == [], (
        "python tools/scale_table.py"
    )
    for name in scale_table.NAMES.values():
        assert page.count(f"| {name} |") == 2 * len(scale_table.WORKERS)


def test_predictions_are_compared_with_merges(data: Path, tmp_path: Path) -> None:
    arguments = [
        str(tmp_path / "work"),
        "--data",
        str(data),
        "--case",
        "l1_ties/adapters",
        "--seconds",
        "0.01",
        "--no-fill",
    ]
    done = CliRunner().invoke(bench_prediction.main, arguments)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])["cases"]
    assert [(row["case"], row["cold"]) for row in rows] == [("l1_ties/adapters", False), ("l1_ties/adapters", True)]
    for row in rows:
        assert row["measured_s"] > 0.1
        assert row["predicted_s"] > 0.1
        assert row["predicted_mb"] == pytest.approx(row["measured_mb"], rel=1.0)
    assert not list((tmp_path / "work").glob("run*"))
