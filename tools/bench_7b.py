"""Merge and fold at the shapes of a 7 B model, beside mergekit and PEFT on the same disk, in one run.

    python tools/bench_7b.py runs/7b                        # 13.5 GB a checkpoint, 43 GB of disk
    python tools/bench_7b.py runs/7b --params tiny          # does the script work? a minute

Makes base, fine-tune and adapters (`bench_data.py`, Llama 2 7B), then runs each step in a process of its own: the plan of a TIES
merge of the fine-tune and an adapter (`--dry-run`), that merge by paft and by mergekit, and the fold of an adapter into the base by
paft, by PEFT (`merge_and_unload` and `save_pretrained`) and by mergekit. mergekit writes the adapter merged into its base first, so
its TIES merge takes 57 GB, and is left out where there are fewer. Outputs are deleted between the steps, and the fine-tune before the
fold. Prints one JSON line, and writes it after every step to `7b.json` in the folder.

Seconds are wall time from the start of the process to its end, private memory is the peak of RssAnon + RssShmem; see
`bench_merge.py`, whose functions these are. `warm` inputs were read before the step, which fills the page cache as far as memory
goes; with `--cold` they were dropped from it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_data import PRESETS, TUNED_RMS, make
from bench_merge import BIN, CommandError, digest, disk_bytes_of_weights, machine, plain, run, settle, versions

FOLD = """import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--params", choices=["7b", "tiny"], default="7b")
    parser.add_argument("--layers", type=int, help="another number than the 32 of the model")
    parser.add_argument("--limit-s", type=float, default=2400, help="stop a step after so many seconds [2400]")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before each step")
    parser.add_argument("--without-others", action="store_true", help="paft only")
    parser.add_argument("--keep", action="store_true", help="keep the models for another run")
    options = parser.parse_args()
    began, folder = time.monotonic(), options.folder.resolve()
    whole = replace(PRESETS["7b-layer"], layers=32) if options.params == "7b" else PRESETS["tiny"]
    shape = replace(whole, layers=options.layers or whole.layers)
    checkpoint = 2 * shape.parameters
    data = folder / f"{options.params}-{shape.layers}"
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free + there
    if free < 3.2 * checkpoint:
        sys.exit(f"{folder}: needs {3.2 * checkpoint / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free")
    made = time.monotonic()
    make(shape, data, {"sft": TUNED_RMS["sft"]})
    made = time.monotonic() - made
    base, tuned, adapter, other = (data / name for name in ("base", "sft", "sft_lora", "dpo_lora"))
    given = {"weight": 0.5, "density": 0.2}
    ties = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": given}, {"model": f"{base}+{other}", "parameters": given}],
        "out_dtype": "bfloat16",
    }
    fold = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}],
        "out_dtype": "bfloat16",
    }
    (folder / "ties.yaml").write_text(json.dumps(ties))
    (folder / "fold.yaml").write_text(json.dumps(fold))
    out, paft, mergekit = folder / "run" / "out", BIN / "paft", BIN / "mergekit-yaml"
    cache = ["--lora-merge-cache", folder / "run" / "cache", "--copy-tokenizer", "--quiet"]
    three, two = ("base", "sft", "dpo_lora"), ("base", "sft_lora")
    steps: dict[str, tuple[tuple[str, ...], list[str | Path]]] = {
        "plan, paft": (three, [paft, "merge", folder / "ties.yaml", out, "--dry-run", "--quiet"]),
        "ties, paft": (three, [paft, "merge", folder / "ties.yaml", out, "--quiet"]),
        "ties, mergekit": (three, [mergekit, folder / "ties.yaml", out, *cache]),
        "fold, paft": (two, [paft, "merge", folder / "fold.yaml", out, "--quiet"]),
        "fold, peft": (two, [sys.executable, "-c", FOLD, base, adapter, out]),
        "fold, mergekit": (two, [mergekit, folder / "fold.yaml", out, *cache]),
    }
    found: dict[str, Any] = {
        "benchmark": "7b",
        "date": time.strftime("%Y-%m-%d"),
        "layers": shape.layers,
        "parameters": shape.parameters,
        "page_cache": "cold" if options.cold else "warm",
        "machine": machine(),
        "versions": versions(),
        "made_s": round(made, 1),
    }
    for name, (sources, command) in steps.items():
        if options.without_others and not name.endswith("paft"):
            continue
        if name == "ties, mergekit" and free < 4.2 * checkpoint:
            found[name] = {"skipped": f"needs {4.2 * checkpoint / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free"}
            continue
        if name == "fold, paft" and not options.keep:  # only the base and an adapter are read from here on
            (data / "made.json").unlink()
            shutil.rmtree(tuned)
        files = [path for source in sources for path in sorted((data / source).glob("*.safetensors"))]
        shutil.rmtree(folder / "run", ignore_errors=True)
        (folder / "run").mkdir()
        settle(files, None, cold=options.cold)
        row: dict[str, Any]
        try:
            if name in ("ties, paft", "fold, paft"):
                once, durable = plain(files, checkpoint, folder / "run" / "plain")
                found[f"{name.split(',')[0]}, plain copy"] = {
                    "seconds": round(once, 2),
                    "with_fsync": round(durable, 2),
                }
                settle(files, None, cold=options.cold)
            done = run(command, folder / "run", options.limit_s)
            row = {"seconds": round(done.seconds, 2), "private_mb": round(done.private_bytes / 1e6)}
            row["scratch_mb"] = round(done.scratch_bytes / 1e6)
            if out.is_dir():
                row |= {"written_bytes": disk_bytes_of_weights(out), "digest": digest(out)}
        except (CommandError, subprocess.TimeoutExpired) as error:
            row = {"failed": str(error)[-1500:]}
        shutil.rmtree(folder / "run")
        found[name] = row
        print(f"{name}: {row.get('failed', row)}", file=sys.stderr, flush=True)
        found["total_s"] = round(time.monotonic() - began, 1)
        (folder / "7b.json").write_text(json.dumps(found) + "\n")
    if not options.keep:
        shutil.rmtree(data)
    print(json.dumps(found))
    sys.exit(any("failed" in row for row in found.values() if isinstance(row, dict)))


if __name__ == "__main__":
    main()
