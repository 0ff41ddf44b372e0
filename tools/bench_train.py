"""Time and memory of a training step: plain TRL, ours, and ours with the product penalty, each in a process of its own.

    python tools/bench_train.py                      # a small Llama on this CPU
    python tools/bench_train.py --device cuda --hidden 4096 --layers 32 --heads 32 --vocab 32000 --dtype bfloat16
    python tools/bench_train.py --penalty 4          # the penalty alone, on 4 layers of Mistral-7B's shapes

The three processes take turns step by step, so that what slows the machine for a while slows all of them; ratios are medians over
paired steps, of wall and of processor time, with the interval that holds them with 95 % confidence. The answer is checked:
without L1 the losses are TRL's to the last bit. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

VARIANTS = ("trl", "ours", "ours_l1")
WARMUP_STEPS = 3
MISTRAL_LAYER = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
"""Out and in features of the adapted matrices of one layer of Mistral-7B."""


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("hidden", 512), ("layers", 4), ("heads", 8), ("vocab", 4096), ("length", 512), ("batch", 4), ("rank", 16),
        ("steps", 34), ("rounds", 2), ("threads", 1), ("penalty", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", help="of the frozen base")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, or be one of the measured processes."""
    given = options()
    if given.penalty:
        print(json.dumps(penalty_alone(given)))
    elif given.variant:
        print(json.dumps(one_variant(given)))
    else:
        print(json.dumps(compare(given)))


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Run the variants in lockstep, `rounds` times, and put the paired steps together."""
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for turn in range(given.rounds):
        for variant, run in lockstep(turn).items():
            found[variant].append(run)
    losses = {variant: runs[0]["losses"] for variant, runs in found.items()}
    assert losses["ours"] == losses["trl"], "without L1 the losses must be TRL's"
    assert losses["ours_l1"][0] == losses["trl"][0], "the first loss must not know of the penalty"
    wall = {v: [lap["wall_s"] for run in runs for lap in run["laps"]] for v, runs in found.items()}
    cpu = {v: [lap["cpu_s"] for run in runs for lap in run["laps"]] for v, runs in found.items()}
    penalty_s = statistics.median(run["penalty_s"] for run in found["ours_l1"])
    peak = {v: statistics.median(run["peak_bytes"] for run in runs) for v, runs in found.items()}
    return {
        "bench": "train",
        "steps": len(wall["trl"]),
        "step_s": {v: round(statistics.median(laps), 4) for v, laps in wall.items()},
        "cpu_s": {v: round(statistics.median(laps), 4) for v, laps in cpu.items()},
        "speed_vs_trl": ratio(wall["trl"], wall["ours"]),
        "speed_vs_trl_cpu": ratio(cpu["trl"], cpu["ours"]),
        "speed_vs_trl_in_all": round(sum(cpu["trl"]) / sum(cpu["ours"]), 4),
        "speed_of_l1_vs_ours": ratio(cpu["ours"], cpu["ours_l1"]),
        "penalty_share_of_step": round(penalty_s / statistics.median(wall["ours_l1"]), 4),
        "peak_bytes": peak,
        "peak_vs_trl": round(peak["ours"] / peak["trl"], 4),
        "peak_of_l1": peak["ours_l1"] - peak["ours"],
        "dense_delta_bytes": found["ours"][0]["delta_entries"] * 4,
        "shape": {k: getattr(given, k) for k in ("hidden", "layers", "vocab", "length", "batch", "rank", "dtype")},
        **surroundings(given),
    }  # fmt: skip


def lockstep(turn: int) -> dict[str, dict[str, Any]]:
    """Run every variant in a process of its own, one step of one at a time: whatever slows the machine slows all alike."""
    command = [sys.executable, __file__, *sys.argv[1:], "--variant"]
    running = {
        v: subprocess.Popen([*command, v], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for v in VARIANTS
    }
    laps: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    lines = {variant: heard(process) for variant, process in running.items()}
    waiting = [variant for variant in VARIANTS if "lap" in next(lines[variant])]  # all stand at the end of step 1
    while waiting:
        turn += 1
        order = (*VARIANTS[turn % 3 :], *VARIANTS[: turn % 3])  # none is always the first
        for variant in [v for v in order if v in waiting]:
            print(file=running[variant].stdin, flush=True)
            lap = next(lines[variant])["lap"]
            laps[variant].append(lap)
            if lap["last"]:
                waiting.remove(variant)
    results = {variant: next(lines[variant]) for variant in VARIANTS}
    assert all(process.wait() == 0 for process in running.values())
    return {variant: results[variant] | {"laps": laps[variant][WARMUP_STEPS:]} for variant in VARIANTS}


def heard(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """The JSON lines of a process; whatever else it prints is passed over."""
    assert process.stdout
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median of the ratios of paired steps, and between what it lies with 95 % confidence (by order statistics)."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    half = 0.98 * len(ratios) ** 0.5
    low, high = max(0, int(len(ratios) / 2 - half)), min(len(ratios) - 1, int(len(ratios) / 2 + half))
    return {
        "median": round(statistics.median(ratios), 4),
        "low": round(ratios[low], 4),
        "high": round(ratios[high], 4),
    }


def spread(values: list[float]) -> list[float]:
    """Smallest and largest."""
    return [round(min(values), 4), round(max(values), 4)]


def one_variant(given: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps one way, telling each; then the losses and the peak memory of the process."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(given.threads)
    began: list[tuple[float, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Tells each step's time, from the end of the one before it (its log included), and waits for leave to go on."""

        def on_step_end(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
            if given.device == "cuda":
                torch.cuda.synchronize()
            wall, cpu = (
                (time.perf_counter() - began[-1][0], time.process_time() - began[-1][1]) if began else (0.0, 0.0)
            )
            last = state.global_step == state.max_steps
            print(json.dumps({"lap": {"wall_s": wall, "cpu_s": cpu, "last": last}}), flush=True)
            if not last:
                sys.stdin.readline()
            began.append((time.perf_counter(), time.process_time()))

    model, rows, tokenizer = materials(given)
    fields = {
        "per_device_train_batch_size": given.batch, "max_steps": given.steps, "learning_rate": 1e-3,
        "max_length": given.length, "save_strategy": "no", "logging_steps": 1, "bf16": given.device == "cuda",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if given.variant == "trl":
            losses, entries, penalty_s = plain_trl(given, model, rows, tokenizer, fields, folder, Clock()), 0, 0.0
        else:
            losses, entries, penalty_s = ours(given, model, rows, tokenizer, fields, folder, Clock())
    cuda = given.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "losses": losses, "peak_bytes": peak, "delta_entries": entries, "penalty_s": penalty_s,
    }  # fmt: skip


def materials(given: argparse.Namespace) -> tuple[Any, Any, Any]:
    """A random Llama, rows of random words of full length, and a word tokenizer."""
    import datasets
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=given.vocab, hidden_size=given.hidden, intermediate_size=int(given.hidden * 3.5) // 64 * 64,
        num_hidden_layers=given.layers, num_attention_heads=given.heads, num_key_value_heads=max(1, given.heads // 4),
        max_position_embeddings=given.length, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    with torch.device(given.device):
        model = LlamaForCausalLM(config).to(getattr(torch, given.dtype))
    core = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, given.vocab)}}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    words = torch.randint(2, given.vocab, (given.batch * given.steps, given.length - 1))
    rows = datasets.Dataset.from_list([{"text": " ".join(f"w{w}" for w in row) + " </s>"} for row in words.tolist()])
    return model, rows, tokenizer


def plain_trl(
    given: argparse.Namespace, model: Any, rows: Any, tokenizer: Any, fields: dict[str, Any], folder: str, clock: Any
) -> list[float]:
    """TRL as its manual has it."""
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=folder, report_to="none", disable_tqdm=True, **fields),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=given.rank, lora_alpha=given.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def ours(
    given: argparse.Namespace, model: Any, rows: Any, tokenizer: Any, fields: dict[str, Any], folder: str, clock: Any
) -> tuple[list[float], int, float]:
    """The same through `paft_merge.training`, with the penalty's own seconds per step."""
    import torch

    from paft_merge.training import train_adapter
    from paft_merge.training.callbacks import L1

    spent: list[float] = []
    original = L1.penalty

    def timed(self: L1, factors: Any) -> torch.Tensor:
        started = time.perf_counter()
        total = original(self, factors)
        if given.device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
        return total

    L1.penalty = timed  # type: ignore[method-assign]
    l1 = {"l1": {"strength": 1e-4}} if given.variant == "ours_l1" else {}
    section = {"objective": "sft", "data": "memory", "lora": {"r": given.rank, "lora_alpha": given.rank}, **l1}
    out = train_adapter(
        model, section | {"training": fields}, Path(folder) / "adapter", rows=rows, tokenizer=tokenizer,
        base_name="bench", callbacks=[clock],
    )  # fmt: skip
    record = json.loads((out / "paft_train.json").read_text())
    losses = [line["loss"] for line in record["run"]["log"] if "loss" in line]
    entries = sum(matrix["entries"] for matrix in record["delta"]["matrices"])
    return losses, entries, statistics.median(spent[WARMUP_STEPS:]) if spent else 0.0


def penalty_alone(given: argparse.Namespace) -> dict[str, Any]:
    """The product penalty and its gradient on `--penalty` layers of Mistral-7B's shapes: seconds, peak, a check."""
    import torch

    from paft_merge.training.factors import Factors
    from paft_merge.training.l1 import product_l1

    torch.set_num_threads(given.threads)
    cuda = given.device == "cuda"
    factors = []
    for index, (o, i) in enumerate(MISTRAL_LAYER * given.penalty):
        a = torch.rand(given.rank, i, device=given.device).sub_(0.5).mul_(2 / i**0.5)
        factors.append(
            Factors(
                str(index),
                a.requires_grad_(),
                torch.randn(o, given.rank, device=given.device).mul_(1e-3).requires_grad_(),
                1.0,
            )
        )
    entries = sum(f.numel for f in factors)
    before = torch.cuda.memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = []
    for _ in range(given.rounds + 1):
        started = time.perf_counter()
        total = product_l1(factors)
        total.backward()  # type: ignore[no-untyped-call]
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    first = factors[0]
    dense = (first.b_OR @ first.a_RI).abs().sum().item()
    assert abs(product_l1([first]).item() / dense - 1) < 1e-4
    median = statistics.median(seconds[1:])
    return {
        "bench": "penalty", "seconds": round(median, 4), "spread_s": spread(seconds[1:]),
        "seconds_for_7b": round(median * 32 / given.penalty, 3), "entries": entries,
        "gflops": round(6 * entries * given.rank / median / 1e9, 1), "rank": given.rank,
        "peak_extra_bytes": peak - before, "dense_delta_bytes": entries * 4, **surroundings(given),
    }  # fmt: skip


def surroundings(given: argparse.Namespace) -> dict[str, Any]:
    """Hardware and versions."""
    import torch

    from paft_merge.training.adapter_record import versions

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if given.device == "cuda" else cpu_name()
    return {"device": device, "threads": given.threads, "versions": versions(), "commit": commit.stdout.strip()}


def cpu_name() -> str:
    """The processor's name as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
