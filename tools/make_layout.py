"""Write the layout of a large model: safetensors files of the full size with headers and holes, which take no disk.

    python tools/make_layout.py kimi-k2 runs/kimi                 # a checkpoint of a trillion parameters
    python tools/make_layout.py llama-3-70b runs/tuned/sft --adapter 16
    python tools/make_layout.py deepseek-v3 runs/deepseek --fp8   # as it is published: FP8 in blocks of 128 x 128

Plans and predictions need no more than that. Shapes are those of the published configurations, in bfloat16 without `--fp8`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from paft_merge.output.shards import plan_shards, split

Row = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""

SHARD_BYTES = 5_000_000_000

ADAPTED = (
    "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
"""Modules with an adapter, except those of routed experts."""


@dataclass(frozen=True)
class Llama:
    """The numbers that fix every tensor's shape."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """`[out, in]` of each linear of one layer, by its name in the layer."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by name, sorted by name as safetensors writes them."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocab, self.hidden),
        }
        for i in range(self.layers):
            at = f"model.layers.{i}."
            shapes |= {f"{at}{name}.weight": shape for name, shape in self.linears().items()}
            shapes |= {f"{at}{name}.weight": (self.hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        return dict(sorted(shapes.items()))

    @property
    def parameters(self) -> int:
        """Elements of the whole checkpoint."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, object]:
        """Its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }


@dataclass(frozen=True)
class DeepSeek:
    """The shapes of DeepSeek-V3 and of its kin: latent attention, and routed experts beside a shared one."""

    layers: int
    dense: int
    """Layers without experts, the first ones."""
    experts: int
    heads: int
    vocab: int
    hidden: int = 7168
    intermediate: int = 18432
    expert: int = 2048
    """Intermediate size of an expert."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by name, sorted by name."""
        hidden, shapes = self.hidden, dict[str, tuple[int, ...]]()
        shapes["model.embed_tokens.weight"] = shapes["lm_head.weight"] = (self.vocab, hidden)
        shapes["model.norm.weight"] = (hidden,)
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            attention = {
                "q_a_proj": (1536, hidden), "q_a_layernorm": (1536,), "q_b_proj": (192 * self.heads, 1536),
                "kv_a_proj_with_mqa": (576, hidden), "kv_a_layernorm": (512,), "kv_b_proj": (256 * self.heads, 512),
                "o_proj": (hidden, 128 * self.heads),
            }  # fmt: skip
            shapes |= {f"{at}self_attn.{name}.weight": shape for name, shape in attention.items()}
            shapes |= {f"{at}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
            parts = {"": self.intermediate}
            if layer >= self.dense:
                shapes[f"{at}mlp.gate.weight"] = (self.experts, hidden)
                shapes[f"{at}mlp.gate.e_score_correction_bias"] = (self.experts,)
                parts = {"shared_experts.": self.expert} | {f"experts.{i}.": self.expert for i in range(self.experts)}
            for part, width in parts.items():
                shapes |= {f"{at}mlp.{part}{name}.weight": (width, hidden) for name in ("gate_proj", "up_proj")}
                shapes[f"{at}mlp.{part}down_proj.weight"] = (hidden, width)
        return dict(sorted(shapes.items()))

    def config(self) -> dict[str, object]:
        """Its config.json."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": self.hidden,
            "num_hidden_layers": self.layers, "n_routed_experts": self.experts, "num_attention_heads": self.heads,
            "vocab_size": self.vocab, "intermediate_size": self.intermediate, "moe_intermediate_size": self.expert,
            "first_k_dense_replace": self.dense, "tie_word_embeddings": False,
        }  # fmt: skip


LAYOUTS: dict[str, Llama | DeepSeek] = {
    "llama-3-70b": Llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": Llama(16384, 53248, 126, 128, 8, 128256),
    "deepseek-v3": DeepSeek(layers=61, dense=3, experts=256, heads=128, vocab=129280),
    "kimi-k2": DeepSeek(layers=61, dense=1, experts=384, heads=64, vocab=163840),
}


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
"""The `quantization_config` of DeepSeek-V3."""


def rows(layout: Llama | DeepSeek, *, fp8: bool = False) -> list[Row]:
    """The tensors of a checkpoint, with `fp8` those of linear layers as codes and a scale for each block."""
    found = list[Row]()
    for name, shape in layout.tensors().items():
        coded = fp8 and "_proj" in name
        found.append((name, "F8_E4M3" if coded else "BF16", shape))
        if coded:
            found.append((f"{name}_scale_inv", "F32", (-(-shape[0] // 128), -(-shape[1] // 128))))
    return found


def factors(layout: Llama | DeepSeek, rank: int) -> Iterator[Row]:
    """The tensors of an adapter on attention and dense layers, as PEFT names them."""
    for name, shape in layout.tensors().items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in ADAPTED and ".experts." not in name:
            yield f"base_model.model.{module}.lora_A.weight", "F32", (rank, shape[1])
            yield f"base_model.model.{module}.lora_B.weight", "F32", (shape[0], rank)


def hollow(folder: Path, tensors: Sequence[Row], config: dict[str, object], shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a checkpoint of headers and holes."""
    folder.mkdir(parents=True)
    shards = plan_shards(split(tensors, shard_bytes))
    for shard in shards:
        write(folder / shard.file, shard.header, shard.size)
    weight_map = {slot.name: shard.file for shard in shards for slot in shard.slots}
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def hollow_adapter(folder: Path, layout: Llama | DeepSeek, rank: int) -> Path:
    """Write a LoRA adapter of headers and holes."""
    folder.mkdir(parents=True)
    (shard,) = plan_shards(split(list(factors(layout, rank)), stem="adapter_model"))
    write(folder / shard.file, shard.header, shard.size)
    modules = [name for name in ADAPTED if any(f".{name}." in row[0] for row in factors(layout, rank))]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": modules}))
    return folder


def write(path: Path, header: bytes, size: int) -> None:
    """Write a file of `size` bytes that begins with a header and is a hole from there on."""
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)


def shortened(layout: Llama | DeepSeek, layers: int | None) -> Llama | DeepSeek:
    """A layout with fewer layers."""
    return replace(layout, layers=layers) if layers else layout


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(list(LAYOUTS)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--adapter", type=click.IntRange(1), metavar="RANK", help="Write an adapter of this rank instead.")
@click.option("--layers", type=click.IntRange(1), help="Write only so many layers.")
@click.option("--fp8", is_flag=True, help="Store the linear layers as FP8 in blocks of 128 x 128.")
def main(name: str, folder: Path, adapter: int | None, layers: int | None, fp8: bool) -> None:
    layout = shortened(LAYOUTS[name], layers)
    if adapter:
        click.echo(hollow_adapter(folder, layout, adapter))
    else:
        config = {**layout.config(), **({"quantization_config": FP8} if fp8 else {})}
        click.echo(hollow(folder, rows(layout, fp8=fp8), config))


if __name__ == "__main__":
    main()
