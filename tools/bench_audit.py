"""How long an audit of adapters at the shapes of a 7B model takes, and how much memory of its own; one JSON line.

    python tools/bench_audit.py [--rank 16] [--layers 32] [--sources 2] [--threads 2] [--dtype bfloat16]

Writes random adapters (r x 7 modules x layers, Llama-2-7B's shapes) into a temporary folder, audits them without a base,
checks the counts of one tensor against NumPy, and measures private memory (Private_Clean + Private_Dirty) on the way.
Kernels are compiled before the clock starts: a first use pays about ten seconds more, once an installation.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from paft_merge.auditing import audit

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


def private_bytes() -> int:
    """Memory that belongs to this process alone."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(
        int(line.split()[1]) * 1024
        for line in rollup.splitlines()
        if line.startswith(("Private_Clean:", "Private_Dirty:"))
    )


class Peak(threading.Thread):
    """Looks at the private memory ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.over = private_bytes(), threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.bytes = max(self.bytes, private_bytes())


def check(folder: Path, found: object, rank: int) -> None:
    """The first tensor's counts, from float32 products of its own."""
    factors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.mlp.down_proj"
    delta = 2.0 * factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
    tensor = next(t for t in found.sources[0].tensors if t.name == "model.layers.0.mlp.down_proj.weight")  # type: ignore[attr-defined]
    share = float((delta.abs() < 1e-5).double().mean())
    assert abs(tensor.measure.sparsity(1e-5) - share) < 1e-6, (tensor.measure.sparsity(1e-5), share)
    assert np.isclose(tensor.measure.norm, float(delta.norm()), rtol=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sources", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place, dtype = Path(temporary), getattr(torch, options.dtype)
        tiny = {"mlp.down_proj": (64, 64)}
        audit(*(write_adapter(place / f"warm{i}", i, 4, 1, dtype, tiny) for i in range(options.sources)))
        folders = [
            write_adapter(place / f"adapter{i}", i, options.rank, options.layers, dtype, SHAPES)
            for i in range(options.sources)
        ]
        peak = Peak()
        peak.start()
        began, cpu = time.perf_counter(), time.process_time()
        found = audit(*folders, threads=options.threads)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak.over.set()
        began = time.perf_counter()
        size = len(found.to_html())
        drawn = time.perf_counter() - began
        check(folders[0], found, options.rank)
    entries = sum(s.total.measure.entries for s in found.sources)
    print(json.dumps({
        **vars(options), "audit_s": round(seconds, 1), "audit_cpu_s": round(cpu, 1), "page_s": round(drawn, 1), "page_bytes": size, "entries": entries,
        "ns_per_entry": round(seconds / entries * 1e9, 2), "private_peak_mb": round(peak.bytes / 1e6), "torch": torch.__version__,
        "machine": platform.machine(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
