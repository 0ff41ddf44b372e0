"""Time merges of adapters into a quantised mixture of experts beside the same merges into its bfloat16 twin.

    python tools/bench_quantised.py runs/quantised                      # FP8: 14 GB of disk for inputs, 9 GB for outputs; MXFP4: 21 and 16 GB
    python tools/bench_quantised.py runs/quantised --size small         # does the script work? 0.9 GB
    python tools/bench_quantised.py runs/quantised --format fp8 --record tools/benchmarks/quantised_MACHINE_YYYYMM.md

Two random models: experts one by one in FP8 blocks of 128 x 128 (names of Qwen3-MoE), and experts in one tensor in MXFP4 (gpt-oss).
Their twins are the outputs of `paft dequantize`, whose time is that of the widening; beside it transformers loads the model with
`dequantize=True` and saves it, where it can. Two adapters of rank 16 on attention and experts are merged by task arithmetic and by TIES
(density 0.5), with a plain output in bfloat16. The programs run in turn, each in a fresh process, with inputs in the page cache as far as they fit.

A merge of the twin reads and writes as many parameters, so the ratio of their times is that per parameter. Private memory is
the peak of RssAnon + RssShmem. The output of the task arithmetic is compared with a float64 sum in one weight.
Nothing else should run on the machine meanwhile. JSON goes to stdout.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from bench_merge import BIN, CommandError, Run, log, machine, median, over, run, seconds, versions
from safetensors import safe_open
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
RANK = 16
METHODS: dict[str, dict[str, Any]] = {"task_arithmetic": {}, "ties": {"density": 0.5}}
_POOL = 1 << 24
"""Random numbers that all tensors are cut from, each from another place."""
_SPREAD = 0.02
"""Root mean square of the weights."""


@dataclass(frozen=True)
class Moe:
    """The numbers that fix every tensor's shape."""

    layers: int
    hidden: int
    experts: int
    width: int
    heads: int
    vocab: int = 32000

    @property
    def attention(self) -> dict[str, tuple[int, int]]:
        """`[out, in]` of the matrices of attention, with heads of 64 and a key for each 8 queries."""
        wide, narrow = 64 * self.heads, 8 * self.heads
        shapes = {"q_proj": (wide, self.hidden), "k_proj": (narrow, self.hidden), "v_proj": (narrow, self.hidden)}
        return {**shapes, "o_proj": (self.hidden, wide)}

    @property
    def expert(self) -> dict[str, tuple[int, int]]:
        """`[out, in]` of the matrices of an expert that is stored alone."""
        wide = (self.width, self.hidden)
        return {"gate_proj": wide, "up_proj": wide, "down_proj": (self.hidden, self.width)}


SIZES = {
    ("fp8", "full"): Moe(14, 2048, 64, 768, 64),
    ("fp8", "small"): Moe(3, 1024, 16, 512, 16, 512),
    ("mxfp4", "full"): Moe(10, 2880, 32, 2880, 64),
    ("mxfp4", "small"): Moe(4, 1024, 8, 1024, 16, 512),
}


# --- inputs -----------------------------------------------------------------------------------------------------------


class Pool:
    """Random tensors, cut from the same numbers."""

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(0)
        self.normals, self.bytes, self.at = (
            torch.randn(_POOL, generator=made),
            torch.randint(0, 256, (_POOL,), generator=made, dtype=torch.uint8),
            0,
        )
        self.fp8 = (self.normals * 64).to(torch.float8_e4m3fn).view(torch.uint8)

    def cut(self, numbers: torch.Tensor, *shape: int) -> torch.Tensor:
        """A tensor of these numbers, from another place than the last one."""
        count = torch.Size(shape).numel()
        self.at = (self.at + 7919) % _POOL
        turned = torch.cat([numbers[self.at :], numbers[: self.at]])
        return turned.repeat(-(-count // _POOL))[:count].reshape(shape)

    def plain(self, *shape: int) -> torch.Tensor:
        """A bfloat16 weight."""
        return (self.cut(self.normals, *shape) * _SPREAD).bfloat16()


def layer(form: str, shape: Moe, at: str, pool: Pool) -> State:
    """The stored tensors of one layer."""
    found = {
        f"{at}{name}.weight": torch.ones(shape.hidden).bfloat16()
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    if form == "mxfp4":
        found[f"{at}mlp.router.weight"] = pool.plain(shape.experts, shape.hidden)
        found[f"{at}mlp.router.bias"] = pool.plain(shape.experts)
        found[f"{at}self_attn.sinks"] = pool.plain(shape.heads)
        for name, (out, inside) in shape.attention.items():
            found |= {
                f"{at}self_attn.{name}.weight": pool.plain(out, inside),
                f"{at}self_attn.{name}.bias": pool.plain(out),
            }
        for name, out, inside in (
            ("gate_up_proj", 2 * shape.width, shape.hidden),
            ("down_proj", shape.hidden, shape.width),
        ):
            stem = f"{at}mlp.experts.{name}"
            found[f"{stem}_blocks"] = pool.cut(pool.bytes, shape.experts, out, inside // 32, 16)
            found[f"{stem}_scales"] = 119 + pool.cut(pool.bytes, shape.experts, out, inside // 32) % 3
            found[f"{stem}_bias"] = pool.plain(shape.experts, out)
        return found
    found[f"{at}mlp.gate.weight"] = pool.plain(shape.experts, shape.hidden)
    matrices = {f"self_attn.{name}": held for name, held in shape.attention.items()}
    for expert in range(shape.experts):
        matrices |= {f"mlp.experts.{expert}.{name}": held for name, held in shape.expert.items()}
    found |= {f"{at}self_attn.{name}.weight": torch.ones(64).bfloat16() for name in ("q_norm", "k_norm")}
    for name, (out, inside) in matrices.items():
        found[f"{at}{name}.weight"] = pool.cut(pool.fp8, out, inside).view(torch.float8_e4m3fn)
        scales = pool.cut(pool.normals, -(-out // 128), -(-inside // 128)).abs() + 0.5
        found[f"{at}{name}.weight_scale_inv"] = scales * (_SPREAD / 64)
    return found


def config(form: str, shape: Moe) -> dict[str, Any]:
    """The config.json of a model."""
    both = {
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "head_dim": 64,
        "num_key_value_heads": shape.heads // 8, "vocab_size": shape.vocab, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    if form == "mxfp4":
        return {
            **both, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": shape.experts,
            "intermediate_size": shape.width, "quantization_config": {"quant_method": "mxfp4"},
        }  # fmt: skip
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    return {
        **both, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": shape.experts,
        "moe_intermediate_size": shape.width, "quantization_config": quantization,
    }  # fmt: skip


def write_model(form: str, shape: Moe, folder: Path) -> None:
    """Write the quantised model, a file for each layer."""
    pool, index = Pool(), dict[str, str]()

    def write(file: str, state: State) -> None:
        save_file(state, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(state, file))

    folder.mkdir(parents=True)
    ends = {f"{name}.weight": pool.plain(shape.vocab, shape.hidden) for name in ("model.embed_tokens", "lm_head")}
    write("ends.safetensors", {**ends, "model.norm.weight": torch.ones(shape.hidden).bfloat16()})
    for number in range(shape.layers):
        write(f"layer-{number}.safetensors", layer(form, shape, f"model.layers.{number}.", pool))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config(form, shape)))


def factors(form: str, shape: Moe) -> Iterator[tuple[str, int, int, int]]:
    """Module, outputs, inputs and rank of each pair of factors, as PEFT names them."""
    for number in range(shape.layers):
        at = f"model.layers.{number}."
        for name, (out, inside) in shape.attention.items():
            yield f"{at}self_attn.{name}", out, inside, RANK
        if form == "mxfp4":  # PEFT wraps the first parameter innermost
            many = RANK * shape.experts
            yield f"{at}mlp.experts.base_layer", 2 * shape.width, shape.hidden, many
            yield f"{at}mlp.experts", shape.hidden, shape.width, many
            continue
        for expert in range(shape.experts):
            for name, (out, inside) in shape.expert.items():
                yield f"{at}mlp.experts.{expert}.{name}", out, inside, RANK


def write_adapter(form: str, shape: Moe, folder: Path, seed: int) -> None:
    """Write a LoRA whose delta has a root mean square of 5e-4."""
    made, state = torch.Generator().manual_seed(seed), State()
    for module, out, inside, rank in factors(form, shape):
        stem = f"base_model.model.{module}"
        state[f"{stem}.lora_A.weight"] = (torch.randn(rank, inside, generator=made) * 0.02).bfloat16()
        state[f"{stem}.lora_B.weight"] = (torch.randn(out, rank, generator=made) * (0.025 / RANK**0.5)).bfloat16()
    targets: dict[str, Any] = {"target_modules": [*shape.attention, *({} if form == "mxfp4" else shape.expert)]}
    if form == "mxfp4":
        targets["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {"peft_type": "LORA", "peft_version": "0.19.1", "r": RANK, "lora_alpha": RANK, "bias": "none", **targets}
    (folder / "adapter_config.json").write_text(json.dumps(about))


def stored_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def parameters(folder: Path) -> int:
    """Entries of a plain checkpoint in bfloat16."""
    return stored_bytes(folder) // 2


def make(form: str, shape: Moe, data: Path) -> None:
    """Make the quantised model and the adapters, unless they are there."""
    if (data / "two").exists():
        return
    shutil.rmtree(data, ignore_errors=True)
    log.print(f"writing {data}")
    write_model(form, shape, data / "coded")
    for seed, name in enumerate(("one", "two")):
        write_adapter(form, shape, data / name, seed)


# --- measurements -----------------------------------------------------------------------------------------------------


def recipe(base: Path, data: Path, method: str) -> dict[str, Any]:
    """A merge of both adapters into a base."""
    models = [
        {"model": f"{base}+{data / name}", "parameters": {"weight": 0.5, **METHODS[method]}} for name in ("one", "two")
    ]
    return {"merge_method": method, "base_model": str(base), "models": models, "out_dtype": "bfloat16"}


def tensor_in(folder: Path, name: str) -> torch.Tensor:
    """A stored tensor."""
    listing = folder / "model.safetensors.index.json"
    held = json.loads(listing.read_text())["weight_map"][name] if listing.exists() else "model.safetensors"
    with safe_open(folder / held, "pt") as file:
        found: torch.Tensor = file.get_tensor(name)
    return found


def expected(form: str, data: Path) -> tuple[str, torch.Tensor]:
    """A weight of attention, and its values after the task arithmetic, float64."""
    module = "model.layers.0.self_attn.q_proj"
    codes = tensor_in(data / "coded", f"{module}.weight").double()
    if form == "fp8":
        scales = tensor_in(data / "coded", f"{module}.weight_scale_inv").double()
        codes *= scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: codes.shape[0], : codes.shape[1]]
    for name in ("one", "two"):
        with safe_open(data / name / "adapter_model.safetensors", "pt") as file:
            a, b = (file.get_tensor(f"base_model.model.{module}.lora_{part}.weight").double() for part in "AB")
        codes += 0.5 * (b @ a)
    return f"{module}.weight", codes


def check(form: str, data: Path, out: Path) -> None:
    """Compare one weight of an output of the task arithmetic with float64."""
    name, wanted = expected(form, data)
    error = (tensor_in(out, name).double() - wanted).abs()
    assert bool((error <= wanted.abs() * 2**-8 + 1e-9).all()), f"{name} differs by {error.max()}"


def widen_by_transformers(form: str, base: Path, out: Path) -> None:
    """Load a quantised model as bfloat16 and save it."""
    import transformers

    how = transformers.FineGrainedFP8Config if form == "fp8" else transformers.Mxfp4Config
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=how(dequantize=True), dtype=torch.bfloat16, low_cpu_mem_usage=True
    )
    model.save_pretrained(out)


def numbers(runs: Sequence[Run]) -> dict[str, Any]:
    """Seconds and private memory of some runs."""
    return {
        "seconds": [round(s, 2) for s in seconds(runs)],
        "private_mb": [round(one.private_bytes / 1e6) for one in runs],
    }


def widening(form: str, data: Path, work: Path, paft: Path, runs: int, other_runs: int) -> dict[str, Any]:
    """Time `paft dequantize`, whose output is the twin, and transformers."""
    took: dict[str, list[Run]] = {"paft": [], "transformers": []}
    found: dict[str, Any] = {"case": "widening"}
    for _ in range(max(runs, not (data / "twin").exists())):
        shutil.rmtree(data / "twin", ignore_errors=True)
        took["paft"].append(run([paft, "dequantize", data / "coded", data / "twin", "--quiet"], work))
    for _ in range(other_runs):
        try:
            took["transformers"].append(
                run([sys.executable, __file__, work / "out", "--widen", data / "coded", "--format", form], work)
            )
        except CommandError as failed:
            found["transformers_failed"] = str(failed).strip().splitlines()[-1][-300:]
            break
        finally:
            shutil.rmtree(work / "out", ignore_errors=True)
    found |= {name: numbers(held) for name, held in took.items() if held}
    return {**found, "ratio": over(median(seconds(took["transformers"])), median(seconds(took["paft"])))}


def merging(form: str, method: str, data: Path, work: Path, paft: Path, runs: int) -> dict[str, Any]:
    """Time a merge of the quantised base and of its twin, in turn."""
    took: dict[str, list[Run]] = {"coded": [], "twin": []}
    for name in took:
        (work / f"{name}.yaml").write_text(yaml.safe_dump(recipe(data / name, data, method)))
    for turn in range(runs):
        for name, held in took.items():
            shutil.rmtree(work / "out", ignore_errors=True)
            held.append(run([paft, "merge", work / f"{name}.yaml", work / "out", "--quiet"], work))
            if method == "task_arithmetic" and not turn and name == "coded":
                check(form, data, work / "out")
    shutil.rmtree(work / "out", ignore_errors=True)
    shares = {name: numbers(held) for name, held in took.items()}
    return {"case": method, **shares, "ratio": over(median(seconds(took["coded"])), median(seconds(took["twin"])))}


def measure(form: str, shape: Moe, data: Path, work: Path, paft: Path, runs: int, other_runs: int) -> dict[str, Any]:
    """All cases of one format."""
    make(form, shape, data)
    work.mkdir(exist_ok=True)
    cases = [widening(form, data, work, paft, runs, other_runs)]
    cases += [merging(form, method, data, work, paft, runs) for method in METHODS]
    return {
        "format": form, "stored_gb": round(stored_bytes(data / "coded") / 1e9, 2),
        "parameters_e9": round(parameters(data / "twin") / 1e9, 2), "cases": cases,
    }  # fmt: skip


def _shown(held: dict[str, Any] | None) -> tuple[str, str]:
    if held is None:
        return "–", "–"
    times = held["seconds"]
    return f"{median(times):.1f} s ± {(max(times) - min(times)) / 2:.1f}", f"{max(held['private_mb'])} MB"


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The results as tables."""
    lines = list[str]()
    for one in found:
        widened, *merges = one["cases"]
        lines += [f"## {one['format'].upper()}: {one['stored_gb']} GB, {one['parameters_e9']} billion parameters", ""]
        lines += ["| merge | quantised | private | bfloat16 twin | private | ratio |", "|---|---|---|---|---|---|"]
        for case in merges:
            ours, twin = _shown(case["coded"]), _shown(case["twin"])
            lines.append(f"| {case['case']} | {ours[0]} | {ours[1]} | {twin[0]} | {twin[1]} | {case['ratio']} |")
        ours, theirs = _shown(widened.get("paft")), _shown(widened.get("transformers"))
        lines += ["", "| widening to bfloat16 | time | private |", "|---|---|---|"]
        lines += [f"| `paft dequantize` | {ours[0]} | {ours[1]} |", f"| transformers | {theirs[0]} | {theirs[1]} |", ""]
        if failed := widened.get("transformers_failed"):
            lines += [f"transformers failed: {failed}", ""]
    return "\n".join(lines)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--size", type=click.Choice(["full", "small"]), default="full", show_default=True, help="Of the models.")
@click.option(
    "--format", "forms", type=click.Choice(["fp8", "mxfp4"]), multiple=True, help="Only this; may be repeated."
)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Timed runs of paft.")
@click.option("--other-runs", type=click.IntRange(0), default=1, show_default=True, help="Timed runs of transformers.")
@click.option(
    "--record", type=click.Path(dir_okay=False, path_type=Path), help="Append the results to this file, as Markdown."
)
@click.option("--paft", type=click.Path(path_type=Path), default=BIN / "paft", help="The paft to time [this Python's].")
@click.option(
    "--widen", type=click.Path(path_type=Path), hidden=True, help="Be the process that widens with transformers."
)
def main(
    work: Path,
    size: str,
    forms: tuple[str, ...],
    runs: int,
    other_runs: int,
    record: Path | None,
    paft: Path,
    widen: Path | None,
) -> None:
    """Run the benchmark."""
    if widen is not None:
        widen_by_transformers(forms[0], widen, work)
        return
    work, found = work.resolve(), []
    for form in forms or ("fp8", "mxfp4"):
        data = work / f"{form}-{size}"
        data.parent.mkdir(parents=True, exist_ok=True)
        found.append(measure(form, SIZES[form, size], data, work / "run", paft, runs, other_runs))
    about = {"size": size, "machine": machine(), "versions": versions()}
    if record is not None:
        with record.open("a", encoding="utf-8") as file:
            file.write(f"{markdown(found)}\n{json.dumps(about)}\n")
    click.echo(json.dumps({**about, "formats": found}, indent=1))


if __name__ == "__main__":
    main()
