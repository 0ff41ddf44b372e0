"""Time adapters as output beside PEFT's `ties_svd` and mergekit-extract-lora, and compare their errors with the smallest possible ones.

    python tools/bench_adapter_out.py runs/adapter-out --layers 2         # two layers of Llama 3.2 1B's shapes
    python tools/bench_adapter_out.py runs/adapter-out --params tiny      # does the script work?

Cases: TIES (density 0.5, weights 1) of two rank-16 adapters to rank 32, over all their deltas (`ties`) and in their common core space
(`core`), beside PEFT's full singular value decompositions of the same products; and a LoRA of rank 32 from a fine-tune (`extract`),
which is the base plus an adapter of rank 64, rounded to bfloat16, beside mergekit's. The programs run in turn, each in a fresh process,
with inputs in the page cache. Seconds are wall time of the process; for PEFT also of `add_weighted_adapter` and saving alone.
Private memory is the peak of RssAnon + RssShmem. Errors are ||D - B A|| / ||D|| over the modules of the first layer, with D of the
case computed here, in float64 from the inputs; the best one is that of a full decomposition at rank 32. `core` has its own D, so
its error says how much the merge differs from `ties` over all entries.

The vocabulary is 32,000, since no case changes embeddings (mergekit gets `--exclude-regex` for them). JSON goes to stdout.
Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from bench_data import write_adapter, write_checkpoints
from bench_merge import BIN, CommandError, Run, machine, median, over, run, seconds, versions
from make_layout import Llama
from safetensors import safe_open
from torch import Tensor

PRESETS = {"llama-1b": Llama(2048, 8192, 16, 32, 8, 32000), "tiny": Llama(128, 352, 2, 4, 2, 512)}
RANK = 32
DENSITY = 0.5
ADAPTERS = {"one": 5e-4, "two": 3e-4}
"""Root mean square of the update of each rank-16 adapter."""

Deltas = dict[str, Tensor]
"""Float64 `[out, in]` by module."""


def make(shape: Llama, data: Path, paft: Path) -> None:
    """Make the base, two adapters and a fine-tune, unless they are there."""
    if (data / "tuned").exists():
        return
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    write_checkpoints(shape, data, {})
    for name, rms in ADAPTERS.items():
        write_adapter(shape, data / name, rms, rank=16)
    write_adapter(shape, data / "wide", 1e-3, rank=64)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": f"{data / 'base'}+{data / 'wide'}", "parameters": {"weight": 1}}],
    }
    (data / "tuned.yaml").write_text(yaml.safe_dump(recipe))
    subprocess.run([paft, "merge", data / "tuned.yaml", data / "tuned", "--quiet"], check=True)


def recipe(data: Path, **keys: Any) -> dict[str, Any]:
    """TIES of both adapters to one of rank 32."""
    models = [{"model": f"{data / 'base'}+{data / name}", "parameters": {"weight": 1.0}} for name in ADAPTERS]
    return {
        "merge_method": "ties", "base_model": str(data / "base"), "models": models, "parameters": {"density": DENSITY},
        "out_dtype": "float32", "output": {"kind": "adapter", "rank": RANK}, **keys,
    }  # fmt: skip


def product(folder: Path, module: str) -> Tensor:
    """s B A of one module, float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = {name.removeprefix("base_model.model."): name for name in file.keys()}  # noqa: SIM118
        a, b = (file.get_tensor(names[f"{module}.lora_{part}.weight"]).double() for part in "AB")
    rank = config.get("rank_pattern", {}).get(module, config["r"])
    alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
    return (alpha / rank) * (b @ a)


def ties(deltas: Sequence[Tensor]) -> Tensor:
    """TIES with weights 1: keep the largest entries, elect signs by the sum, average the agreeing entries."""
    kept = []
    for delta in deltas:
        count = int(DENSITY * delta.numel())
        least = delta.abs().flatten().kthvalue(delta.numel() - count + 1).values
        kept.append(torch.where(delta.abs() >= least, delta, 0))
    sign = torch.where(sum(kept) < 0, -1.0, 1.0)  # type: ignore[arg-type]
    agreed = [torch.where(delta * sign > 0, delta, 0) for delta in kept]
    counts = sum((delta != 0).double() for delta in agreed)
    return sum(agreed) / torch.clamp(torch.as_tensor(counts), min=1)  # type: ignore[return-value]


def expected(shape: Llama, data: Path, case: str) -> Deltas:
    """The deltas of the first layer that a case approximates."""
    found = {}
    with (
        safe_open(data / "base" / "model.safetensors", "pt") as base,
        safe_open(data / "tuned" / "model.safetensors", "pt") as tuned,
    ):
        for linear in shape.linears():
            module = f"model.layers.0.{linear}"
            if case == "extract":
                found[module] = (
                    tuned.get_tensor(f"{module}.weight").double() - base.get_tensor(f"{module}.weight").double()
                )
            else:
                found[module] = ties([product(data / name, module) for name in ADAPTERS])
    return found


def best_error(deltas: Deltas) -> float:
    """The smallest relative error that rank 32 allows."""
    lost = norm = 0.0
    for delta in deltas.values():
        squares = torch.linalg.eigvalsh(delta @ delta.T if len(delta) <= delta.shape[1] else delta.T @ delta).clamp(
            min=0
        )
        lost, norm = lost + float(squares[:-RANK].sum()), norm + float(squares.sum())
    return (lost / norm) ** 0.5


def error(deltas: Deltas, adapter: Path) -> float:
    """The relative error of an adapter."""
    lost = sum(float((delta - product(adapter, module)).square().sum()) for module, delta in deltas.items())
    return (lost / sum(float(delta.square().sum()) for delta in deltas.values())) ** 0.5


def merge_by_peft(data: Path, out: Path) -> None:
    """Merge both adapters by `ties_svd`, and print the seconds without imports and loading the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(data / "base", dtype=torch.float32)
    start = time.perf_counter()
    names = list(ADAPTERS)
    model = PeftModel.from_pretrained(base, str(data / names[0]), adapter_name=names[0])
    model.load_adapter(str(data / names[1]), adapter_name=names[1])
    model.add_weighted_adapter(names, [1.0, 1.0], "merged", "ties_svd", svd_rank=RANK, density=DENSITY)
    model.save_pretrained(str(out), selected_adapters=["merged"])
    (out / "seconds").write_text(str(time.perf_counter() - start))


def programs(
    case: str, data: Path, work: Path, paft: Path
) -> tuple[list[str | Path], list[str | Path], Callable[[Path], Path]]:
    """Our command, the other program's without its output folder, and where that one's adapter is in its output."""
    if case == "extract":
        mergekit = BIN / "mergekit-extract-lora"
        other: list[str | Path] = [
            mergekit, "--model", data / "tuned", "--base-model", data / "base", "--max-rank", str(RANK),
            "--exclude-regex", "embed_tokens", "--exclude-regex", "lm_head", "--skip-undecomposable", "--out-path",
        ]  # fmt: skip
        ours = [paft, "extract", data / "tuned", work / "ours", "--base", data / "base", "--rank", str(RANK), "--quiet"]
        return (
            [*ours, "--exclude", "lm_head", "--exclude", "embed_tokens", "--dtype", "float32"],
            other,
            lambda out: out,
        )
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe(data, **({"space": "core"} if case == "core" else {}))))
    ours = [paft, "merge", work / "recipe.yaml", work / "ours", "--quiet"]
    return ours, [sys.executable, __file__, "--peft", data], lambda out: out / "merged"


def measure(case: str, shape: Llama, data: Path, work: Path, paft: Path, runs: int, other_runs: int) -> dict[str, Any]:
    """Run one case, both programs in turn."""
    deltas = expected(shape, data, case)
    ours, other, inside = programs(case, data, work, paft)
    took: dict[str, list[Run]] = {"paft": [], "other": []}
    found: dict[str, Any] = {"case": case, "best_error": best_error(deltas)}
    alone = []
    for turn in range(1 + max(runs, other_runs)):  # the first of ours compiles kernels, and is not counted
        shutil.rmtree(work / "ours", ignore_errors=True)
        shutil.rmtree(work / "other", ignore_errors=True)
        if turn <= runs:
            one = run(ours, work)
            took["paft"] += [one] * bool(turn)
            found["paft_error"] = error(deltas, work / "ours")
        if 0 < turn <= other_runs:
            try:
                took["other"].append(run([*other, work / "other"], work))
                found["other_error"] = error(deltas, inside(work / "other"))
            except CommandError as failed:
                found["other_failed"] = str(failed)[-500:]
                continue
            if (work / "other" / "seconds").exists():
                alone.append(float((work / "other" / "seconds").read_text()))
    for name, all_runs in took.items():
        found[name] = {"seconds": seconds(all_runs), "private_mb": [round(one.private_bytes / 1e6) for one in all_runs]}
    found["other"]["seconds_without_start"] = alone
    found["ratio"] = over(median(seconds(took["other"])), median(seconds(took["paft"])))
    found["ratio_without_start_of_other"] = over(median(alone), median(seconds(took["paft"])))
    found["paft_over_best"] = over(found.get("paft_error"), found["best_error"])
    return found


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--params", type=click.Choice(list(PRESETS)), default="llama-1b", show_default=True, help="Shapes.")
@click.option("--layers", type=click.IntRange(1), help="Fewer layers than the model has; the record says how many.")
@click.option(
    "--case", "cases", type=click.Choice(["ties", "core", "extract"]), multiple=True, help="Only this; may be repeated."
)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Timed runs of paft.")
@click.option(
    "--other-runs", type=click.IntRange(0), default=1, show_default=True, help="Timed runs of PEFT and mergekit."
)
@click.option("--paft", type=click.Path(path_type=Path), default=BIN / "paft", help="The paft to time [this Python's].")
@click.option("--peft", type=click.Path(path_type=Path), hidden=True, help="Be the process that merges with PEFT.")
def main(
    work: Path,
    params: str,
    layers: int | None,
    cases: tuple[str, ...],
    runs: int,
    other_runs: int,
    paft: Path,
    peft: Path | None,
) -> None:
    """Run the benchmark."""
    if peft is not None:
        merge_by_peft(peft, work)
        return
    work = work.resolve()
    shape = replace(PRESETS[params], layers=layers or PRESETS[params].layers)
    data = work / f"{params}-{shape.layers}"
    make(shape, data, paft)
    about = {"shape": params, "layers": shape.layers, "machine": machine(), "versions": versions()}
    found = [measure(case, shape, data, work, paft, runs, other_runs) for case in cases or ("ties", "core", "extract")]
    click.echo(json.dumps({**about, "cases": found}, indent=1))


if __name__ == "__main__":
    main()
