"""How long an audit of adapters at the shapes of a 7B model takes, and how much memory of its own; one JSON line.

    python tools/bench_audit.py [--rank 16] [--layers 32] [--sources 2] [--threads 2] [--dtype bfloat16] [--with-base] [--merge]

Writes random adapters (r x 7 modules x layers, Llama-2-7B's shapes) into a temporary folder, audits them without a base (or
with one, bfloat16, 0.4 GB a layer on that disk), checks the counts of one tensor against NumPy, and measures private memory
(Private_Clean + Private_Dirty) on the way.
With --merge it then merges the sources by TIES into a bfloat16 checkpoint, which takes another 0.4 GB a layer, to compare time and memory.
Before the clock starts, kernels are compiled (a first use pays about ten seconds more, once an installation), and the inputs are written to the
disk and read once, so that the audit does not pay for what the merge then finds in the disk cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import paft_merge
from paft_merge.auditing import Audit, audit
from paft_merge.compute import kernels

T = TypeVar("T")

SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096), "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008),
}  # fmt: skip


def write_adapter(
    folder: Path, seed: int, rank: int, layers: int, dtype: torch.dtype, shapes: dict[str, tuple[int, int]]
) -> Path:
    """A LoRA adapter with Gaussian factors whose delta has an rms of about 1e-5."""
    folder.mkdir(parents=True)
    made, factors = torch.Generator().manual_seed(seed), {}
    for layer in range(layers):
        for module, (rows, columns) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            factors[f"{stem}.lora_A.weight"] = (torch.randn(rank, columns, generator=made) * 5e-3).to(dtype)
            factors[f"{stem}.lora_B.weight"] = (torch.randn(rows, rank, generator=made) * 1e-3 / rank**0.5).to(dtype)
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [m.split(".")[-1] for m in shapes],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_base(folder: Path, layers: int, shapes: dict[str, tuple[int, int]]) -> Path:
    """A bfloat16 checkpoint with an rms of 0.02, a file a layer; every tensor begins elsewhere in the same random numbers."""
    folder.mkdir(parents=True)
    largest, made, index = max(r * c for r, c in shapes.values()), torch.Generator().manual_seed(99), {}
    drawn = (torch.randn(largest + 7 * layers, generator=made) * 0.02).bfloat16()
    for layer in range(layers):
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        tensors = {
            f"model.layers.{layer}.{module}.weight": drawn[7 * layer + i :][: rows * columns]
            .reshape(rows, columns)
            .clone()
            for i, (module, (rows, columns)) in enumerate(shapes.items())
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    return folder


def private_bytes() -> int:
    """Memory that belongs to this process alone."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(
        int(line.split()[1]) * 1024
        for line in rollup.splitlines()
        if line.startswith(("Private_Clean:", "Private_Dirty:"))
    )


class Peak(threading.Thread):
    """Looks at the private memory five times a second; `cpu` is what that costs, 8 ms each time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.over, self.cpu = private_bytes(), threading.Event(), 0.0

    def run(self) -> None:
        while not self.over.wait(0.2):
            self.bytes = max(self.bytes, private_bytes())
            self.cpu = time.thread_time()


def settle(folders: list[Path]) -> None:
    """Wait until files are on the disk, and read them: the first reader of pages that were just written pays for moving them in the cache."""
    os.sync()
    for folder in folders:
        for file in folder.iterdir():
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 24):
                    pass


def measured(run: Callable[[], T]) -> tuple[T, float, float, int]:
    """What `run` returns, its seconds, its processor seconds, and the bytes of private memory at its peak."""
    peak = Peak()
    peak.start()
    began, cpu = time.perf_counter(), time.process_time()
    found = run()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak.over.set()
    peak.join()
    return found, seconds, cpu - peak.cpu, peak.bytes


def check(folder: Path, base: Path | None, found: Audit) -> None:
    """One tensor's counts, from a float64 product of its own."""
    factors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.mlp.down_proj"
    delta = 2.0 * factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
    tensor = next(t for t in found.sources[0].tensors if t.name == "model.layers.0.mlp.down_proj.weight")
    share = float((delta.abs() < 1e-5).double().mean())
    assert abs(tensor.measure.sparsity(1e-5) - share) < 1e-6, (tensor.measure.sparsity(1e-5), share)
    assert np.isclose(tensor.measure.norm, float(delta.norm()), rtol=1e-6)
    if base:
        weight = load_file(next(base.glob("model-00001-*.safetensors")))[tensor.name]
        same = ((weight.float() + delta.float()).bfloat16() == weight).double().mean()
        assert tensor.measure.bf16_sparsity is not None
        assert np.isclose(tensor.measure.bf16_sparsity, float(same), atol=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sources", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--with-base", action="store_true", help="what needs the weights too: bfloat16, relative norms")
    parser.add_argument("--merge", action="store_true", help="merge the same sources too; implies --with-base")
    options = parser.parse_args()
    options.with_base |= options.merge
    kernels.prepare()
    with tempfile.TemporaryDirectory() as temporary:
        place, dtype = Path(temporary), getattr(torch, options.dtype)
        tiny = {"mlp.down_proj": (64, 64)}
        warm = write_base(place / "warm", 1, tiny) if options.with_base else None
        audit(*(write_adapter(place / f"warm{i}", i, 4, 1, dtype, tiny) for i in range(options.sources)), base=warm)
        base = write_base(place / "base", options.layers, SHAPES) if options.with_base else None
        folders = [
            write_adapter(place / f"adapter{i}", i, options.rank, options.layers, dtype, SHAPES)
            for i in range(options.sources)
        ]
        settle([*folders, *([base] if base else [])])
        found, seconds, cpu, peak = measured(lambda: audit(*folders, base=base, threads=options.threads))
        began = time.perf_counter()
        size = len(found.to_html())
        drawn = time.perf_counter() - began
        check(folders[0], base, found)
        merged = {}
        if options.merge:
            models = [
                {"model": f"{base}+{folder}", "parameters": {"weight": 1.0, "density": 0.2}} for folder in folders
            ]
            recipe = {"merge_method": "ties", "base_model": str(base), "models": models, "out_dtype": "bfloat16"}
            _, merge_s, merge_cpu, merge_peak = measured(
                lambda: paft_merge.merge(recipe, place / "merged", threads=options.threads)
            )
            merged = {
                "merge_s": round(merge_s, 1),
                "merge_cpu_s": round(merge_cpu, 1),
                "merge_private_peak_mb": round(merge_peak / 1e6),
            }
    entries = sum(s.total.measure.entries for s in found.sources)
    print(json.dumps({
        **vars(options), **merged, "audit_s": round(seconds, 1), "audit_cpu_s": round(cpu, 1), "page_s": round(drawn, 1), "page_bytes": size, "entries": entries,
        "ns_per_entry": round(seconds / entries * 1e9, 2), "private_peak_mb": round(peak / 1e6), "torch": torch.__version__,
        "machine": platform.machine(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
