"""Real architectures from transformers' own configurations: merged on disk and loaded again, they compute what they should.

For each: a base and two adapters by PEFT. One adapter merged alone must give the logits of PEFT's own merge in memory; two,
by task arithmetic, those of the base with both deltas added in float64; and a stack of layers must load, where there is one.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from toys.adapters import gemma3, gpt2, llama, mixtral, opt, qwen3_moe
from toys.merge import on, recipe, tensors_of

from paft_merge import merge
from paft_merge.plan.layer_stacks import modules_of

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9]])


def by_name(architecture: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    """A model of transformers with random weights."""

    def make() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, architecture)(getattr(transformers, config)(**fields))
        return made

    return make


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(**{**GROUPED, "vocab_size": 48})
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=47, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def t5() -> nn.Module:
    fields = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    return by_name("T5ForConditionalGeneration", "T5Config", decoder_start_token_id=0, pad_token_id=0, **fields)()


def whisper() -> nn.Module:
    fields = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    fields |= {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 40, "num_mel_bins": 8}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    fields |= {"max_source_positions": 8, "max_target_positions": 16, **ids}
    return by_name("WhisperForConditionalGeneration", "WhisperConfig", **fields)()


def text(model: Any) -> Tensor:
    return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


def both_sides(model: Any) -> Tensor:
    return model(input_ids=TOKENS, decoder_input_ids=TOKENS[:, :3]).logits  # type: ignore[no-any-return]


def sound(model: Any) -> Tensor:
    features = torch.linspace(-1, 1, 8 * 16).reshape(1, 8, 16)
    return model(input_features=features, decoder_input_ids=TOKENS[:, :3]).logits  # type: ignore[no-any-return]


def picture(model: Any) -> Tensor:
    """An image of as many tokens as the model makes of it, and words."""
    config = model.config
    token, count = (config.image_token_id, getattr(config, "mm_tokens_per_image", 4))
    ids = torch.tensor([[*[token] * count, 3, 1, 4]])
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    kinds = (
        {"token_type_ids": (ids == token).long()}
        if "token_type_ids" in inspect.signature(model.forward).parameters
        else {}
    )
    return model(input_ids=ids, pixel_values=pixels, **kinds).logits  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    targets: list[str]
    logits: Callable[[Any], Tensor] = text
    stack: str | None = "default"
    """The module of which a stack of layers is made, and None where layers are not made again."""
    peft: Mapping[str, Any] | None = None


ALL = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
"""Every expert of a layer in one parameter, as transformers has them; on disk each expert has tensors of its own."""
CASES = {
    "Llama": Case(llama, ALL),
    "Mistral": Case(by_name("MistralForCausalLM", "MistralConfig", **GROUPED), ALL),
    "Qwen2": Case(by_name("Qwen2ForCausalLM", "Qwen2Config", **GROUPED), ALL),
    "Qwen3": Case(by_name("Qwen3ForCausalLM", "Qwen3Config", head_dim=8, **GROUPED), ALL),
    "Gemma 2": Case(by_name("Gemma2ForCausalLM", "Gemma2Config", head_dim=8, **GROUPED), ALL),
    "Gemma 3": Case(gemma3, ALL[:3], picture, "text_decoder"),
    "Phi-3": Case(by_name("Phi3ForCausalLM", "Phi3Config", **GROUPED), ["qkv_proj", "gate_up_proj", "down_proj"]),
    "GPT-2": Case(gpt2, ["c_attn", "c_fc"], peft={"fan_in_fan_out": True}),
    "GPT-NeoX": Case(by_name("GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL), ["query_key_value", "dense_h_to_4h"]),
    "OPT": Case(opt, ["q_proj", "fc1"]),
    "BERT": Case(by_name("BertForMaskedLM", "BertConfig", **SMALL), ["query", "value", "intermediate.dense"]),
    "T5": Case(t5, ["q", "v", "wi"], both_sides, "encoder"),
    "Whisper": Case(whisper, ["q_proj", "fc1"], sound, "encoder"),
    "LLaVA": Case(llava, ["q_proj", "up_proj", "fc1", "linear_1"], picture, "text_decoder"),
    "Mixtral": Case(mixtral, ["q_proj", "v_proj"], peft={"target_parameters": EXPERTS}),
    "Qwen3-MoE": Case(qwen3_moe, ["q_proj", "v_proj"], peft={"target_parameters": EXPERTS}),
    "Mamba": Case(
        by_name("MambaForCausalLM", "MambaConfig", hidden_size=16, num_hidden_layers=2, vocab_size=40, state_size=4),
        ["in_proj", "x_proj"],
    ),
}  # fmt: skip


def quietly(work: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()


def trained(case: Case, folder: Path) -> tuple[Path, Path, Path]:
    """The folders of a base and of two adapters on it, every value random."""
    torch.manual_seed(0)
    base = case.make()
    for parameter in base.parameters():
        parameter.data.normal_(std=0.2)
    base.save_pretrained(str(folder / "base"))  # type: ignore[operator]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=case.targets, **(case.peft or {}))
    model = get_peft_model(base, config)  # type: ignore[arg-type]
    for name in ("one", "two"):
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.2)
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(str(folder / name))
    return folder / "base", folder / "one", folder / "two"


def logits(case: Case, folder: Path, *adapters: tuple[Path, float]) -> Tensor:
    """What the model in a folder computes, with adapters merged into it by PEFT, each times a factor."""
    model, loading = type(case.make()).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    for at, (adapter, factor) in enumerate(adapters):
        merged = PeftModel.from_pretrained(model, str(adapter), adapter_name=f"a{at}")
        for module in merged.modules():
            if isinstance(getattr(module, "scaling", None), dict) and f"a{at}" in module.scaling:
                module.scaling[f"a{at}"] *= factor
        model = merged.merge_and_unload()
    with torch.no_grad():
        return case.logits(model.eval())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_merge_computes_what_peft_s_merge_in_memory_computes(case: Case, tmp_path: Path) -> None:
    base, one, two = quietly(lambda: trained(case, tmp_path))
    alone = merge(recipe("passthrough", None, on(base, one)), tmp_path / "alone", warn=lambda _: None)
    both = recipe("task_arithmetic", base, (on(base, one), {"weight": 0.5}), (on(base, two), {"weight": 0.25}))
    summed = merge(both, tmp_path / "summed", warn=lambda _: None)
    assert tensors_of(alone).keys() == tensors_of(summed).keys() == tensors_of(base).keys()
    expected = quietly(lambda: logits(case, base, (one, 1.0)))
    torch.testing.assert_close(quietly(lambda: logits(case, alone)), expected, rtol=1e-4, atol=1e-5)
    expected = quietly(lambda: logits(case, base, (one, 0.5), (two, 0.25)))
    torch.testing.assert_close(quietly(lambda: logits(case, summed)), expected, rtol=1e-4, atol=1e-5)
    assert (quietly(lambda: logits(case, base)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_an_adapter_on_the_experts_changes_each_of_them_where_it_lies_on_disk(name: str, tmp_path: Path) -> None:
    base, one, _ = quietly(lambda: trained(CASES[name], tmp_path))
    before, after = (tensors_of(f) for f in (base, merge(recipe("passthrough", None, on(base, one)), tmp_path / "out")))
    experts = [key for key in before if ".experts." in key]
    assert len(experts) == 2 * 3 * CASES[name].make().config.num_local_experts  # type: ignore[union-attr]
    assert all(before[key].ndim == 2 and before[key].shape == after[key].shape for key in experts)
    assert all((before[key] != after[key]).all() for key in experts)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_stack_of_its_layers_loads_and_computes(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = case.make()
    base = tmp_path / "base"
    quietly(lambda: model.save_pretrained(base))
    slices = [
        {"sources": [{"model": str(base), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(base), "layer_range": [1, 2]}]},
    ]
    stacked: dict[str, Any] = {"slices": slices}
    if case.stack != "default":
        names = sorted(set(modules_of(list(tensors_of(base))).values()) - {case.stack})
        stacked = {"modules": {case.stack: stacked, **{n: {"models": [{"model": str(base)}]} for n in names}}}
    out = merge({"merge_method": "passthrough", **stacked}, tmp_path / "out", warn=lambda _: None)
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, out))
    assert before != after
    result = quietly(lambda: logits(case, out))
    assert torch.isfinite(result).all()
    assert len(tensors_of(out)) > len(tensors_of(base))
