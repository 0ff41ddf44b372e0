"""Stacks of layers of several kinds: the config follows them as transformers reads it, or the stack is refused."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys.merge import bits_equal, tensors_of

from paft_merge import merge
from paft_merge.engine.api import open_plan
from paft_merge.errors import PaftMergeError
from paft_merge.plan.layer_kinds import rolled, unrolled

TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEAD = {**TEXT, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2,
}  # fmt: skip
LATENT = {
    **TEXT, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers warns of its own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Case:
    architecture: str
    config: str
    fields: dict[str, Any]
    told_by: str
    """What of transformers' config says of every layer."""
    unsaid: list[str] = field(default_factory=list)
    """Keys that configs on the Hub do not have, from before transformers wrote them."""


CASES = {
    "GPT-Neo": Case(
        "GPTNeoForCausalLM", "GPTNeoConfig",
        {"hidden_size": 16, "num_layers": 4, "num_heads": 2, "vocab_size": 40, "attention_types": [[["global", "local"], 2]],
         "max_position_embeddings": 32, "window_size": 2, "bos_token_id": 1, "eos_token_id": 2}, "attention_layers",
    ),
    "Gemma 2": Case("Gemma2ForCausalLM", "Gemma2Config", HEAD, "layer_types", ["layer_types"]),
    "Cohere 2": Case("Cohere2ForCausalLM", "Cohere2Config", HEAD, "layer_types", ["layer_types"]),
    "SmolLM 3": Case("SmolLM3ForCausalLM", "SmolLM3Config", TEXT, "no_rope_layers", ["layer_types", "no_rope_layers"]),
    "Qwen 2 with windows": Case(
        "Qwen2ForCausalLM", "Qwen2Config", {**TEXT, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 2},
        "layer_types", ["layer_types"],
    ),
    "Qwen 3 Next": Case(
        "Qwen3NextForCausalLM", "Qwen3NextConfig",
        {**HEAD, **EXPERTS, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 2,
         "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 8},
        "layer_types",
    ),
    "Qwen 3 MoE with dense layers": Case(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**HEAD, **EXPERTS, "mlp_only_layers": [1]}, "mlp_only_layers"
    ),
    "LFM 2": Case("Lfm2ForCausalLM", "Lfm2Config", {**TEXT, "full_attn_idxs": [1, 3]}, "layer_types", ["layer_types"]),
    "Llama 4": Case(
        "Llama4ForCausalLM", "Llama4TextConfig",
        {**HEAD, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 2, "num_local_experts": 2}, "no_rope_layers", ["layer_types"],
    ),
    "Bamba": Case("BambaForCausalLM", "BambaConfig", {**TEXT, **MAMBA, "attn_layer_indices": [1, 3]}, "layers_block_type"),
    "Nemotron-H": Case(
        "NemotronHForCausalLM", "NemotronHConfig",
        {**HEAD, "layers_block_type": ["mamba", "attention", "mamba", "mlp"], "mamba_num_heads": 4, "mamba_head_dim": 8,
         "n_groups": 1, "ssm_state_size": 4, "conv_kernel": 2}, "layers_block_type",
    ),
    "RecurrentGemma": Case(
        "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", {**TEXT, "lru_width": 16, "attention_window_size": 4},
        "layers_block_type",
    ),
    "ModernBERT": Case(
        "ModernBertForMaskedLM", "ModernBertConfig",
        {**TEXT, "global_attn_every_n_layers": 2, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2}, "layer_types", ["layer_types"],
    ),
    "Longformer": Case(
        "LongformerForMaskedLM", "LongformerConfig",
        {**TEXT, "attention_window": [4, 4, 8, 8], "sep_token_id": 2, "max_position_embeddings": 64}, "attention_window",
    ),
    "DeepSeek-V3": Case("DeepseekV3ForCausalLM", "DeepseekV3Config", {**LATENT, "first_k_dense_replace": 1}, "rope_interleave"),
}  # fmt: skip


def saved(case: Case, folder: Path) -> tuple[Path, Any]:
    """A checkpoint with random weights, and the model."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, case.architecture)(getattr(transformers, case.config)(**case.fields))
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in case.unsaid}))
    return folder, model.eval()


def loaded(folder: Path, architecture: str) -> Any:
    """The model in a folder, of which every tensor was found and none was left."""
    import transformers

    model, loading = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return (
            model(input_ids=TOKENS, use_cache=False).logits
            if "use_cache" in model.forward.__code__.co_varnames
            else model(input_ids=TOKENS).logits
        )  # type: ignore[no-any-return]


def stacked(model: Path, *ranges: tuple[int, int], method: str = "passthrough") -> dict[str, Any]:
    slices = [{"sources": [{"model": str(model), "layer_range": list(span)}]} for span in ranges]
    return {"merge_method": method, "slices": slices}


def refusal(recipe: dict[str, Any]) -> str:
    with pytest.raises(PaftMergeError) as caught, open_plan(recipe):
        pass
    assert [p.code for p in caught.value.problems] == ["LAYER_KINDS"]
    with open_plan(recipe, allow_crimes=True) as plan:
        assert "LAYER_KINDS" in [w.code for w in plan.warnings]
    return str(caught.value)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_kinds_of_layers_follow_them(case: Case, tmp_path: Path) -> None:
    base, model = saved(case, tmp_path / "base")
    layers = [0, 1, 1, 2, 3]
    out = merge(stacked(base, (0, 2), (1, 4)), tmp_path / "out", warn=lambda _: None)
    made = loaded(out, case.architecture)
    assert torch.isfinite(logits(made)).all()
    before, after = (getattr(one.config, case.told_by) for one in (model, made))
    if case.told_by == "mlp_only_layers":
        before, after = [i in before for i in range(4)], [i in after for i in range(5)]
    if isinstance(before, list | tuple):
        assert list(after) == [before[at] for at in layers]
        assert len(set(before)) > 1
    assert made.config.num_hidden_layers == 5


def test_a_stack_of_gpt_neo_computes_what_its_layers_compute(tmp_path: Path) -> None:
    case = CASES["GPT-Neo"]
    base, model = saved(case, tmp_path / "base")
    out = merge(stacked(base, (0, 2), (1, 4), (0, 1)), tmp_path / "out")
    by_hand = model.transformer.h
    model.transformer.h = nn.ModuleList([by_hand[at] for at in (0, 1, 1, 2, 3, 0)])
    torch.testing.assert_close(logits(loaded(out, case.architecture)), logits(model))


def test_the_kinds_of_a_text_model_inside_another_follow_in_its_own_section(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**HEAD, "num_hidden_layers": 7, "vocab_size": 48}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
    }
    config = Gemma3Config(text_config=text, vision_config={**vision, "patch_size": 4}, mm_tokens_per_image=4)
    base = tmp_path / "base"
    Gemma3ForConditionalGeneration(config).save_pretrained(base)
    written = json.loads((base / "config.json").read_text())
    before = written["text_config"].pop("layer_types")
    (base / "config.json").write_text(json.dumps(written))
    parts = {n: {"models": [{"model": str(base)}]} for n in ("vision_tower", "multi_modal_projector")}
    stack = {"slices": stacked(base, (0, 3), (4, 7))["slices"]}
    out = merge(
        {"merge_method": "passthrough", "modules": {"text_decoder": stack, **parts}},
        tmp_path / "out",
        warn=lambda _: None,
    )
    made = loaded(out, "Gemma3ForConditionalGeneration")
    assert made.config.text_config.layer_types == [before[at] for at in (0, 1, 2, 4, 5, 6)]
    assert torch.isfinite(logits(made)).all()
    after = json.loads((out / "config.json").read_text())
    assert set(after["text_config"]) - set(written["text_config"]) == {"layer_types"}
    assert {**after, "text_config": 0} == {**written, "text_config": 0}


def test_whole_periods_need_no_list(tmp_path: Path) -> None:
    """A config without `layer_types` stays without where its rule says the same as before."""
    case = CASES["Gemma 2"]
    base, _ = saved(case, tmp_path / "base")
    out = merge(stacked(base, (0, 4), (2, 4)), tmp_path / "out")
    config = json.loads((base / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == {**config, "num_hidden_layers": 6}


def test_gpt_neo_s_nested_list_is_written_by_its_period() -> None:
    assert unrolled("attention_types", [[["global", "local"], 2], [["local"], 1]], 5) == ["global", "local"] * 2 + [
        "local"
    ]
    assert rolled("attention_types", ["global", "local"] * 6) == [[["global", "local"], 6]]
    assert rolled("attention_types", ["global", "global", "local"]) == [[["global", "global", "local"], 1]]


def test_what_no_config_can_say_is_refused(tmp_path: Path) -> None:
    jamba = Case(
        "JambaForCausalLM", "JambaConfig",
        {**TEXT, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4,
         "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_dt_rank": 2, "use_mamba_kernels": False}, "layers_block_type",
    )  # fmt: skip
    base, _ = saved(jamba, tmp_path / "jamba")
    told = refusal(stacked(base, (0, 2), (1, 4)))
    assert "jamba derives layer_types, layers_block_type, layers_num_experts from the numbers of layers" in told
    assert len(tensors_of(merge(stacked(base, (0, 4), (2, 4)), tmp_path / "whole"))) > len(tensors_of(base))
    assert torch.isfinite(logits(loaded(tmp_path / "whole", "JambaForCausalLM"))).all()

    base, _ = saved(CASES["DeepSeek-V3"], tmp_path / "deepseek")
    told = refusal(stacked(base, (0, 4), (0, 4)))
    assert "layer 0 cannot become layer 4, because the model has other tensors there (first_k_dense_replace: 1)" in told

    inverse = {"n_embd": 16, "n_layer": 4, "n_head": 2, "vocab_size": 40, "scale_attn_by_inverse_layer_idx": True}
    base, _ = saved(Case("GPT2LMHeadModel", "GPT2Config", inverse, ""), tmp_path / "gpt2")
    assert (
        "scale_attn_by_inverse_layer_idx: True sets a layer's kind by its number, and layer 1 becomes layer 2"
        in refusal(stacked(base, (0, 2), (1, 4)))
    )

    base, _ = saved(CASES["ModernBERT"], tmp_path / "modernbert")
    assert (
        "layer 0 cannot become layer 4, because the model has other tensors there (the config does not explain why)"
        in refusal(stacked(base, (0, 4), (0, 4)))
    )


def test_layers_whose_kinds_only_transformers_knows_are_not_paired(tmp_path: Path) -> None:
    base, _ = saved(CASES["Gemma 2"], tmp_path / "base")
    sources = [{"model": str(base), "layer_range": [0, 2]}, {"model": f"{base}/", "layer_range": [1, 3]}]
    recipe = {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": {"weight": 1}}
    with (
        pytest.raises(
            PaftMergeError, match="sliding_attention, full_attention against full_attention, sliding_attention"
        ),
        open_plan(recipe),
    ):
        pass


# --- layers behind the last, which predict further tokens -------------------------------------------------------------


def with_prediction(folder: Path, seed: int, layers: int = 4) -> Path:
    """DeepSeek-V3 with a layer behind its last, of other tensors, which the config does not count."""
    torch.manual_seed(seed)
    case = CASES["DeepSeek-V3"]
    base, _ = saved(Case(case.architecture, case.config, {**case.fields, "num_hidden_layers": layers}, ""), folder)
    state = load_file(base / "model.safetensors")
    extra = {"eh_proj": (16, 32), "enorm": (16,), "shared_head.norm": (16,), "self_attn.o_proj": (16, 16)}
    state |= {f"model.layers.{layers}.{name}.weight": torch.randn(shape) for name, shape in extra.items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config.pop("num_mtp_layers", None)
    (base / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return base


def test_prediction_layers_stay_behind_the_last_layer(tmp_path: Path) -> None:
    base = with_prediction(tmp_path / "base", 1)
    out = merge(stacked(base, (0, 4), (1, 4)), tmp_path / "out", warn=lambda _: None)
    made, state = tensors_of(out), tensors_of(base)
    extra = [name for name in state if name.startswith("model.layers.4.")]
    assert len(extra) == 4
    for name in extra:
        assert bits_equal(made[name.replace("layers.4.", "layers.7.")], state[name])
    assert "model.layers.4.eh_proj.weight" not in made
    assert bits_equal(made["model.layers.4.mlp.gate.weight"], state["model.layers.1.mlp.gate.weight"])
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (7, 1)


def test_prediction_layers_are_merged_like_the_head(tmp_path: Path) -> None:
    a, b = with_prediction(tmp_path / "a", 1), with_prediction(tmp_path / "b", 2, layers=5)
    pair = [
        {"model": str(a), "layer_range": [1, 4], "parameters": {"weight": 0.25}},
        {"model": str(b), "layer_range": [2, 5], "parameters": {"weight": 0.75}},
    ]
    first = [{**pair[0], "layer_range": [0, 1]}, {**pair[1], "layer_range": [0, 1]}]
    recipe = {"merge_method": "linear", "slices": [{"sources": first}, {"sources": pair}]}
    made, one, two = (tensors_of(f) for f in (merge(recipe, tmp_path / "out"), a, b))
    wanted = 0.25 * one["model.layers.4.eh_proj.weight"] + 0.75 * two["model.layers.5.eh_proj.weight"]
    torch.testing.assert_close(made["model.layers.4.eh_proj.weight"], wanted)


def test_a_range_that_takes_a_prediction_layer_and_a_source_without_it_are_told(tmp_path: Path) -> None:
    base = with_prediction(tmp_path / "base", 1)
    with (
        pytest.raises(
            PaftMergeError, match=r"goes to layer 4, and \S+ has 4, 0 to 3; those for multi-token prediction \(1\)"
        ),
        open_plan(stacked(base, (0, 5))),
    ):
        pass
    plain, _ = saved(CASES["DeepSeek-V3"], tmp_path / "plain")
    pair = [{"model": str(model), "layer_range": [0, 4], "parameters": {"weight": 1}} for model in (base, plain)]
    with open_plan({"merge_method": "linear", "slices": [{"sources": pair}]}) as plan:
        told = [str(warning) for warning in plan.warnings if warning.code == "NOT_LOADED"]
    assert len(told) == 1
    assert re.search(r"plain: lacks .*which transformers does not load and \S+base has; the output gets those", told[0])
