"""Tiny Llama checkpoints that mergekit can merge, and mergekit's own merge of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State, near, save_checkpoint
from safetensors.torch import load_file

pytest.importorskip("mergekit")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what mergekit imports
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from paft_merge import mergekit_plugin

from paft_merge.methods import METHODS

OURS = frozenset(mergekit_plugin.OURS) | {name for name, method in METHODS.items() if method.core_only}
"""The methods that mergekit does not have."""

HIDDEN, MIDDLE, LAYERS, HEADS, VOCABULARY = 16, 24, 2, 2, 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MIDDLE,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 1, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip


def llama_state(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> State:
    """Every tensor of a small Llama."""
    made = torch.Generator().manual_seed(seed)
    half = HIDDEN // 2
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (half, HIDDEN), "self_attn.v_proj": (half, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MIDDLE, HIDDEN), "mlp.up_proj": (MIDDLE, HIDDEN),
        "mlp.down_proj": (HIDDEN, MIDDLE), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    return {f"{name}.weight": (torch.randn(shape, generator=made) * 0.02).to(dtype) for name, shape in shapes.items()}


def llama_family(
    folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1, layers: int = LAYERS
) -> dict[str, Path]:
    """A base and three fine-tunes of it, of different sizes of change."""
    base, config = llama_state(0, dtype, layers), {**CONFIG, "num_hidden_layers": layers}
    states = {"base": base, "x": near(base, 1), "y": near(base, 2, 2e-3), "z": near(base, 3, 5e-4)}
    return {name: save_checkpoint(folder / name, state, shards, config) for name, state in states.items()}


def mergekit_merge(recipe: Mapping[str, Any], out: Path, **options: Any) -> State:
    """What mergekit makes of a recipe, in `out`."""
    LoaderCache.loaders.clear()  # it never forgets a folder by itself
    settings = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_merge(MergeConfiguration.model_validate(dict(recipe)), str(out), settings)
    return load_state(out)


def raw_merge(recipe: Mapping[str, Any], out: Path, *options: str) -> State:
    """What mergekit-pytorch makes of a recipe of files of tensors, in `out`."""
    from click.testing import CliRunner
    from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache, main

    SimpleLoaderCache().loaders.clear()
    path = out.with_suffix(".json")
    path.write_text(json.dumps(recipe))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = CliRunner().invoke(main, [str(path), str(out), *options])
    assert done.exit_code == 0, done.output
    return load_state(out)


def load_state(folder: Path) -> State:
    """Every tensor of a checkpoint folder."""
    return {
        name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
