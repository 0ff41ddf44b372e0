"""Compare merges on a GPU with those on the CPU: the same bits, and the time beside that of the bus and of `mergekit-yaml --cuda`.

    python tools/bench_gpu.py --out runs/gpu                      # on a machine with a GPU, under 8 minutes
    python tools/bench_gpu.py --out runs/gpu --device cpu         # does the script work? seconds, without a GPU

Stages: the operations of tests/compute on the device; the rate of the bus, from pinned and pageable memory, both ways; every
method on tiny models, on the CPU and on the device, compared bit for bit; then TIES, DARE-TIES and task arithmetic at the shapes
of an 8 B model (as many layers as disk and time allow; the result says how many), each in a process of its own, with inputs in
the page cache. OUT holds `gpu.json` and `gpu.txt`, which are written after every step, so that a run that is cut short has
measured something. The models are made in OUT/data and deleted at the end, unless `--keep`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_data import PRESETS, Llama, make
from bench_merge import CommandError, digest, disk_bytes_of_weights, machine, run, settle, versions
from bench_reference import CASES
from safetensors import safe_open

from paft_merge import merge
from paft_merge.compute import devices
from paft_merge.compute.torch_ops import TorchOps

ROOT = Path(__file__).parents[1]
SMALL = Llama(256, 704, 2, 4, 2, 2000)
LARGE = replace(PRESETS["8b-layer"], layers=32)
LAYERS = (32, 24, 16, 12, 8, 6, 4, 2, 1)
LARGE_CASES = ("ties/checkpoints", "dare_ties/checkpoints", "task_arithmetic/checkpoints")
COPIED = 256 << 20
"""Bytes of one copy over the bus."""

Recipe = dict[str, Any]


def recipes(data: Path) -> Iterator[tuple[str, Recipe]]:
    """What is compared bit for bit: a name, and the recipe."""
    base, every = str(data / "base"), ("ties", "dare_ties")
    kinds = {
        "checkpoints": [str(data / name) for name in ("sft", "dpo")],
        "adapters": [f"{base}+{data / name}" for name in ("sft_lora", "dpo_lora")],
    }
    trimmed = {"weight": 0.5, "density": 0.4}
    methods: dict[str, tuple[Recipe, Recipe]] = {
        "linear": ({"weight": 0.5}, {}),
        "task_arithmetic": ({"weight": 0.5}, {}),
        "ties": (trimmed, {}),
        "l1_ties": ({"weight": 0.5}, {"rescale": "none"}),
        "sign_election": (trimmed, {}),
        "dare_linear": (trimmed, {}),
        "dare_ties": (trimmed, {}),
        "breadcrumbs": (trimmed | {"gamma": 0.05}, {}),
        "breadcrumbs_ties": (trimmed | {"gamma": 0.05}, {}),
        "della": (trimmed, {}),
        "della_linear": (trimmed, {}),
        "nearswap": ({}, {"t": 1e-3}),
        "ram": ({}, {"epsilon": 1e-4}),
        "ramplus_tl": ({}, {"epsilon": 1e-4}),
        "sce": ({}, {"select_topk": 0.5}),
        "slerp": ({}, {"t": 0.4}),
        "nuslerp": ({"weight": 0.5}, {}),
        "multislerp": ({"weight": 0.5}, {}),
        "model_stock": ({}, {}),
    }
    for kind, sources in kinds.items():
        for method, (own, shared) in methods.items():
            names = sources[:1] if method in ("slerp", "nearswap") else sources
            models = [{"model": name, **({"parameters": own} if own else {})} for name in names]
            made = {"merge_method": method, "models": models, **({"parameters": shared} if shared else {})}
            if method != "linear":
                made["base_model"] = base
            yield f"{method}/{kind}", made
            if method in every:
                yield f"{method}/{kind}, stochastic rounding", {**made, "rounding": "stochastic", "seed": 7}
            if method == "ties":
                yield f"{method}/{kind}, global trim", {**made, "parameters": {"trim_scope": "global"}}
                yield f"{method}/{kind}, float32", {**made, "out_dtype": "float32"}


class Report:
    """The results, on disk after every step."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.began, self.limit_s = folder, time.monotonic(), 60 * minutes
        self.found: dict[str, Any] = {}
        self.lines: list[str] = []

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self.limit_s - (time.monotonic() - self.began)

    def note(self, stage: str, value: Any, line: str) -> None:
        """Add to a stage: one value, or one of several by name."""
        if isinstance(value, dict):
            self.found.setdefault(stage, {}).update(value)
        else:
            self.found[stage] = value
        self.lines.append(f"{time.monotonic() - self.began:5.0f} s  {stage}: {line}")
        print(self.lines[-1], flush=True)
        (self.folder / "gpu.json").write_text(json.dumps(self.found, indent=1) + "\n")
        (self.folder / "gpu.txt").write_text("\n".join(self.lines) + "\n")

    def stage(self, name: str, work: Callable[[Report], None], needs_s: float) -> None:
        """Run a stage if there is time; a failure is noted, and the next stage runs."""
        if self.left_s < needs_s:
            self.note(name, {"skipped": f"{self.left_s:.0f} s were left"}, "skipped, for want of time")
            return
        try:
            work(self)
        except (Exception, KeyboardInterrupt) as error:
            self.note(name, {"failed": repr(error)}, f"failed: {error!r}")


def kernels(report: Report) -> None:
    """The tests of the operations that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests" / "compute", "-k", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=report.left_s, check=False)
    last = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"])[-1]
    report.note("kernels", {"passed": done.returncode == 0, "said": done.stdout[-3000:]}, last)


def bus(device: torch.device) -> Callable[[Report], None]:
    """GB/s of copies to and from the device; each the best of five."""

    def once(to: torch.Tensor, source: torch.Tensor) -> float:
        best = 0.0
        for _ in range(5):
            wait(device)
            begun = time.perf_counter()
            to.copy_(source, non_blocking=True)
            wait(device)
            best = max(best, source.nbytes / (time.perf_counter() - begun) / 1e9)
        return round(best, 2)

    def measure(report: Report) -> None:
        far = torch.ones(COPIED, dtype=torch.uint8, device=device)
        for kind in ("pinned", "pageable"):
            near = torch.ones(COPIED, dtype=torch.uint8, pin_memory=kind == "pinned" and device.type == "cuda")
            rates = {f"{kind}_to_device_gb_s": once(far, near), f"{kind}_from_device_gb_s": once(near, far)}
            report.note("bus", rates, ", ".join(f"{name} {rate}" for name, rate in rates.items()))

    return measure


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def equality(device: torch.device, data: Path, only: str) -> Callable[[Report], None]:
    """Merge tiny models on the CPU and on the device."""

    def measure(report: Report) -> None:
        make(SMALL, data)
        on_cpu, on_device = data / "cpu", data / "device"
        for name, recipe in recipes(data):
            if not name.startswith(only):
                continue
            if report.left_s < 30:
                report.note("equality", {"skipped": f"from {name} on"}, "the rest is skipped, for want of time")
                return
            usual, given = devices.ops_for, torch.device(device)
            try:
                merge(recipe, on_cpu, warn=lambda _: None)
                devices.ops_for = lambda *_, at=given: TorchOps(at)
                merge(recipe, on_device, warn=lambda _: None)
                found = difference(on_cpu, on_device)
            except Exception as error:
                found = {"failed": repr(error)}
            finally:
                devices.ops_for = usual
                for folder in (on_cpu, on_device):
                    shutil.rmtree(folder, ignore_errors=True)
            line = found.get("failed") or (
                "equal" if not found["different"] else f"{found['different']} elements differ"
            )
            report.note("equality", {name: found}, f"{name}: {line}")

    return measure


def difference(one: Path, other: Path) -> dict[str, Any]:
    """How many elements of two checkpoints differ in their bits, and the largest difference beside the largest element."""
    different, total, largest, size = 0, 0, 0.0, 0.0
    for file in sorted(one.glob("*.safetensors")):
        with safe_open(file, "pt") as first, safe_open(other / file.name, "pt") as second:
            for key in first.keys():  # noqa: SIM118
                a, b = first.get_tensor(key), second.get_tensor(key)
                kind = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
                different += int((a.view(kind) != b.view(kind)).sum())
                total += a.numel()
                largest = max(largest, float((a.double() - b.double()).abs().max()))
                size = max(size, float(a.double().abs().max()))
    return {"elements": total, "different": different, "largest_difference": largest, "largest_element": size}


def layers_within(folder: Path, seconds: float) -> tuple[int, str]:
    """As many layers as the disk holds four times (base, two fine-tunes, an output), and as can be made in `seconds`."""
    probe, begun = folder / "probe", time.monotonic()
    make(replace(LARGE, layers=1, vocab=2000), probe)
    per_byte = (time.monotonic() - begun) / (3 * disk_bytes_of_weights(probe / "base"))
    shutil.rmtree(probe)
    free = shutil.disk_usage(folder).free
    for layers in LAYERS:
        nbytes = 2 * replace(LARGE, layers=layers).parameters
        if 4.3 * nbytes < free and 3 * nbytes * per_byte < seconds:
            return (
                layers,
                f"{layers} of {LARGE.layers} layers: {free / 1e9:.0f} GB of disk, {1 / per_byte / 1e9:.2f} GB/s of making models",
            )
    return 1, "1 layer: there is little room or time"


def large(device: torch.device, data: Path, shape: Llama, said: str) -> Callable[[Report], None]:
    """Time merges of a large model."""

    def measure(report: Report) -> None:
        begun = time.monotonic()
        make(shape, data)
        made = {"shape": vars(shape) | {"parameters": shape.parameters}, "made_s": round(time.monotonic() - begun, 1)}
        report.note("large", made, f"{said}; {shape.parameters:,} parameters, made in {made['made_s']} s")
        files = sorted(data.glob("*/*.safetensors"))
        names = LARGE_CASES if device.type == "cuda" else LARGE_CASES[:1]
        for kind in ("paft", "mergekit"):
            for name in names:
                case = CASES[name]
                path = data / "recipe.yaml"
                path.write_text(json.dumps(case.recipe(data)))
                moved = sum(f.stat().st_size for f in files if f.parent.name in case.folders)
                moved += disk_bytes_of_weights(data / "base")
                for label, command in commands(kind, path, device):
                    settle([f for f in files if f.parent.name in case.folders], None, cold=False)
                    timed(report, f"{name}, {label}", command, data / "run", moved)

    return measure


def commands(kind: str, recipe: Path, device: torch.device) -> Iterator[tuple[str, list[str]]]:
    """The commands of one program, by label; OUT is replaced."""
    if kind == "paft":
        for where in dict.fromkeys(("cpu", str(device))):
            command = [sys.executable, "-m", "paft_merge", "merge", str(recipe), "OUT", "--quiet", "--device", where]
            yield f"paft --device {where}", command
    elif device.type == "cuda" and importlib.util.find_spec("mergekit"):
        command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(recipe), "OUT", "--quiet", "--copy-tokenizer"]
        yield "mergekit --cuda", [*command, "--cuda"]


def timed(report: Report, name: str, command: list[str], folder: Path, moved: int) -> None:
    """Run a command once, and note its time; its output is deleted."""
    if report.left_s < 20:
        report.note("large", {name: {"skipped": f"{report.left_s:.0f} s were left"}}, f"{name}: skipped")
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        done = run([str(folder / "out") if part == "OUT" else part for part in command], folder, report.left_s)
        found: dict[str, Any] = {
            "seconds": round(done.seconds, 2),
            "gb_per_s": round(moved / done.seconds / 1e9, 2),
            "private_mb": round(done.private_bytes / 1e6),
            "digest": digest(folder / "out"),
        }
        line = (
            f"{name}: {found['seconds']} s, {found['gb_per_s']} GB/s, {found['private_mb']} MB, {found['digest'][:8]}"
        )
    except (CommandError, subprocess.TimeoutExpired) as error:
        found = {"failed": str(error)[-1500:]}
        line = f"{name}: failed: {str(error).strip().splitlines()[-1]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report.note("large", {name: found}, line)


def about(device: torch.device) -> dict[str, Any]:
    """The machine."""
    found = {**machine(), **versions(), "device": str(device), "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1)}
        with suppress(OSError):
            text = Path("/proc/driver/nvidia/version").read_text()
            found["driver"] = (re.findall(r"\b\d{3}\.[\d.]+", text) or [None])[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5, help="stop after so many [7.5]")
    parser.add_argument("--layers", type=int, help="of the large model [as many as disk and time allow]")
    parser.add_argument("--data", type=Path, help="folder for the models [OUT/data]")
    parser.add_argument("--only", default="", help="compare the merges whose names begin with this text [all]")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    options = parser.parse_args()
    device, out = torch.device(options.device), options.out.resolve()
    data = (options.data or out / "data").resolve()
    for folder in (out, data):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    report = Report(out, options.minutes)
    found = about(device)
    report.note("machine", found, ", ".join(str(found.get(key)) for key in ("gpu", "cpu", "cores", "torch", "commit")))
    if device.type == "cuda":
        report.stage("kernels", kernels, 60)
    report.stage("bus", bus(device), 20)
    report.stage("equality", equality(device, data / "small", options.only), 40)
    shape, said = SMALL, "the shapes of the tiny model"
    if device.type == "cuda":
        with ThreadPoolExecutor(1) as alone:  # make() sets torch's number of threads
            layers, said = alone.submit(layers_within, data, report.left_s / 4).result()
        shape = replace(LARGE, layers=options.layers or layers)
    report.stage("large", large(device, data / "large", shape, said), 60)
    if not options.keep:
        shutil.rmtree(data, ignore_errors=True)
    report.note("end", {"seconds": round(time.monotonic() - report.began)}, "done")


if __name__ == "__main__":
    main()
