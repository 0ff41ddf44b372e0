"""Tiny bases and adapters, made by PEFT itself, and what PEFT's own `merge_and_unload` makes of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.checkpoint import Checkpoint

Tensors = dict[str, Tensor]


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"vocab_size": 40, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    fields = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=40, num_attention_heads=2, max_position_embeddings=8, **fields))


def mixtral(**changes: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    fields = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"vocab_size": 40, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**{**fields, **changes}))


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    fields = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12, "num_hidden_layers": 2}
    fields |= {"vocab_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=12, num_experts_per_tok=2, **fields))


def gpt_oss(intermediate_size: int = 12, hidden_size: int = 16) -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    fields = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return GptOssForCausalLM(
        GptOssConfig(vocab_size=40, num_key_value_heads=1, head_dim=8, num_local_experts=3, **fields)
    )


def gemma3() -> nn.Module:
    """A vision-language model, whose tensors transformers 5 stores under other names than its modules have."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 48}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


class Convolutions(nn.Module):
    """Every kind of convolution that PEFT adapts, linear layers with and without a bias, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv1x1 = nn.Conv2d(4, 6, 1)
        self.conv2 = nn.Conv2d(6, 6, 3, bias=False)
        self.conv3 = nn.Conv3d(4, 6, (2, 3, 3))
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.linear = nn.Linear(6, 10)
        self.square = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.score = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def train(
    model: nn.Module, folder: Path, config: LoraConfig, resize: int | None = None, initial: bool = False
) -> tuple[Path, Path]:
    """Save `model` as a base, and an adapter of `config` on it whose every trained value is random.

    Args:
        model: its weights are overwritten.
        folder: where both go.
        config: of the adapter.
        resize: rows of the vocabulary while it is trained.
        initial: convert the adapter to plain LoRA with the factors that it started from.

    Returns:
        The folders of the base and of the adapter.
    """
    base, adapter = folder / "base", folder / "adapter"
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parameter in model.parameters():
            parameter.data.normal_(std=0.2)
        save(model, base)
        if resize:
            model.resize_token_embeddings(resize)
        peft_model = get_peft_model(model, config)
        start = str(folder / "start") if initial else None
        if start:
            peft_model.peft_config["default"].init_lora_weights = True
            peft_model.save_pretrained(start)
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.data += torch.randn_like(parameter) * 0.2
        peft_model.peft_config["default"].base_model_name_or_path = str(base)
        peft_model.save_pretrained(str(adapter), path_initial_model_for_weight_conversion=start)
    return base, adapter


def save(model: nn.Module, folder: Path) -> None:
    """Save a model as its own library does."""
    folder.mkdir()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(str(folder))
    else:
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
        )


def trained_by_peft(make: Callable[[], nn.Module], base: Path, adapter: Path, resize: int | None = None) -> Any:
    """The model that was trained: the base, loaded in float32, with the adapter on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = make()
        if hasattr(model, "save_pretrained"):
            model = type(model).from_pretrained(base, dtype=torch.float32)
            if resize:
                model.resize_token_embeddings(resize)
        else:
            model.load_state_dict(load_file(base / "model.safetensors"))
        return PeftModel.from_pretrained(model, str(adapter)).eval()


def merged_by_peft(
    make: Callable[[], nn.Module], base: Path, adapter: Path, folder: Path, resize: int | None = None
) -> Tensors:
    """What PEFT merges, as it would be saved: load the base, load the adapter, `merge_and_unload`, save."""
    model = trained_by_peft(make, base, adapter, resize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(model.merge_and_unload(), folder)
    return load_file(folder / "model.safetensors")


def merged_by_us(base: Path, adapter: Path, rows: int | None = None) -> Tensors:
    """Every tensor of the base, and every one that the adapter adds, plus its delta, computed `rows` rows at a time."""
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        base_tensors = {name: checkpoint.tensor(name).float() for name in checkpoint.tensors}
        deltas = opened.deltas.items()
        return base_tensors | {
            name: patched(base_tensors[delta.stored_as or name], delta, rows) for name, delta in deltas
        }


def patched(weight: Tensor, delta: Any, rows: int | None = None) -> Tensor:
    """`weight` plus `delta`, computed `rows` rows at a time."""
    weight = weight.reshape(-1, delta.row_size)
    count = torch.Size(delta.shape).numel() // delta.row_size
    value = torch.zeros(count, delta.row_size)
    value[: len(weight)] = weight[:count]  # a vocabulary may shrink, too
    step = rows or count
    for start in range(0, count, step):
        stop = min(start + step, count)
        out = torch.full((stop - start, delta.row_size), torch.nan)
        delta.compute(start, stop, weight[start:stop].numpy() if start < len(weight) else None, out.numpy())
        value[start:stop] += out
    return value.reshape(delta.shape)


def error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of any entry, relative to the largest entry of its tensor; names and shapes must agree."""
    assert ours.keys() == theirs.keys()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in ours)


def edit_config(adapter: Path, **changes: Any) -> None:
    """Change fields of adapter_config.json; None removes one."""
    path = adapter / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def edit_tensors(adapter: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of an adapter."""
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)
