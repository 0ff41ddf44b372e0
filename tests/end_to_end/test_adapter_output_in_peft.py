"""Adapters that a merge writes, loaded by PEFT: every weight is that of the merged checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from toys.adapters import (
    Convolutions,
    error,
    gpt2,
    gpt_oss,
    llama,
    merged_by_peft,
    mixtral,
    opt,
    qwen3_moe,
    train,
    trained_by_peft,
)
from toys.merge import on, tensors_of

from paft_merge import merge
from paft_merge.errors import RecipeError

LAYERS = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A model, the configuration of its two adapters, and what the recipe has beside task arithmetic."""

    make: Callable[[], Any]
    config: dict[str, Any]
    other: dict[str, Any] = field(default_factory=dict)
    """Fields in which the second adapter differs."""
    output: dict[str, Any] = field(default_factory=dict)
    portable: bool = True
    exact: bool = True
    merged: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    """Whether the adapted layer is tied: PEFT merges its delta into both, and logits show what was trained."""


WIDE = {"target_modules": LAYERS}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
CASES = {
    "plain": Case(llama, WIDE, {"r": 3}),
    "rsLoRA": Case(llama, {**WIDE, "use_rslora": True, "lora_alpha": 5}),
    "patterns": Case(llama, {**WIDE, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.down_proj": 9}}),
    "other modules": Case(llama, WIDE, {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}),
    "Conv1D": Case(gpt2, {"target_modules": ["c_attn", "c_proj", "mlp.c_fc"]}),
    "Conv1D beside a tied head": Case(gpt2, {"target_modules": ["c_attn", "lm_head"]}, portable=False, tied=True),
    "a tied head": Case(partial(llama, tie_word_embeddings=True), {"target_modules": ["q_proj", "lm_head"]}, portable=False, tied=True),
    "an untied head": Case(llama, {"target_modules": ["q_proj", "lm_head"]}),
    "embeddings": Case(llama, {"target_modules": ["q_proj", "embed_tokens"]}, portable=False),
    "a tied embedding": Case(gpt2, {"target_modules": ["c_attn", "wte"]}, portable=False, tied=True),
    "convolutions": Case(Convolutions, {"target_modules": ["conv1", "conv1x1", "conv2", "conv3", "linear"]}, portable=False),
    "trained norms": Case(llama, {**WIDE, "modules_to_save": ["norm", "input_layernorm"]}, portable=False),
    "trained biases": Case(opt, {"target_modules": ["q_proj", "fc1"], "bias": "all"}, portable=False),
    "lora_bias": Case(opt, {"target_modules": ["q_proj", "fc1"], "lora_bias": True}, portable=False),
    "DoRA": Case(llama, {**WIDE, "use_dora": True}, output={"rank": 16}, exact=False),
    "trained tokens": Case(llama, {**WIDE, "trainable_token_indices": [1, 5]}, portable=False),
    "trained embeddings": Case(llama, {**WIDE, "modules_to_save": ["embed_tokens", "lm_head"]}, output={"rank": 16}, portable=False, exact=False),
    "ranks of modules": Case(llama, {**WIDE, "rank_pattern": {"layers.1.self_attn.q_proj": 2}}, {"target_modules": ["q_proj"]}, output={"portable": False}),
    "PiSSA": Case(llama, {**WIDE, "init_lora_weights": "pissa"}, output={"rank": 16}),
    "experts of Mixtral": Case(mixtral, EXPERTS, {"target_parameters": ["mlp.experts.down_proj"]}),
    "experts of Qwen3-MoE": Case(qwen3_moe, EXPERTS, output={"rank": 16}, exact=False, merged={"merge_method": "ties", "parameters": {"density": 0.4}}),
    "experts of GPT-OSS": Case(gpt_oss, EXPERTS, portable=False),
    "experts of GPT-OSS, ties": Case(gpt_oss, {**EXPERTS, "target_parameters": EXPERTS["target_parameters"][:1]}, output={"rank": 16}, portable=False, exact=False, merged={"merge_method": "ties", "parameters": {"density": 0.4}}),
    "routers of GPT-OSS": Case(gpt_oss, {"target_modules": ["q_proj"], "target_parameters": ["mlp.router.weight"]}, portable=False),
    "ties": Case(llama, WIDE, output={"rank": 16}, exact=False, merged={"merge_method": "ties", "parameters": {"density": 0.4}}),
}  # fmt: skip


def recipe_of(base: Path, one: Path, other: Path, **more: Any) -> dict[str, Any]:
    models = [{"model": on(base, path), "parameters": {"weight": w}} for path, w in ((one, 0.8), (other, -0.3))]
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, **more}


def adapters(case: Case, folder: Path) -> tuple[Path, Path, Path]:
    """A base and two adapters of it."""
    for name in ("one", "other"):
        (folder / name).mkdir()
    fields = {"r": 4, "lora_alpha": 6, **case.config}
    base, one = train(case.make(), folder / "one", LoraConfig(**fields))
    _, other = train(case.make(), folder / "other", LoraConfig(**{**fields, **case.other}))
    tensors = {
        n: t if "base_layer.weight" in n else t + 0.1 * torch.randn(t.shape) for n, t in tensors_of(other).items()
    }
    from safetensors.torch import save_file

    save_file(tensors, other / "adapter_model.safetensors")
    return base, one, other


@pytest.mark.parametrize("name", CASES)
def test_base_and_adapter_are_the_merged_checkpoint(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, one, other = adapters(case, tmp_path)
    dense = merge(recipe_of(base, one, other, **case.merged), tmp_path / "dense")
    asked = recipe_of(base, one, other, **case.merged, output={"kind": "adapter", **case.output})
    if not case.portable:
        with pytest.raises(RecipeError, match="portable: false"):
            merge(asked, tmp_path / "refused")
        asked["output"]["portable"] = False
    made = merge(asked, tmp_path / "out")
    assert (made.error == 0) == case.exact
    approximated = [problem for problem in made.manifest["warnings"] if "is that of DoRA" in problem]
    assert len(approximated) == 2 * (name == "DoRA")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|fan_in_fan_out).*")
        if case.tied:
            ids = torch.arange(8)[None]
            found = {"logits": trained_by_peft(case.make, base, made.path)(ids).logits.detach()}
            whole = type(case.make()).from_pretrained(dense, dtype=torch.float32).eval()
            wanted = {"logits": whole(ids).logits.detach()}
        else:
            found, wanted = merged_by_peft(case.make, base, made.path, tmp_path / "found"), tensors_of(dense)
    assert error(found, wanted) < 2e-6


def test_one_expert_of_a_layer_does_not_move_the_others(tmp_path: Path) -> None:
    """PEFT stacks the factors of a layer's experts in their order, and joins those of `w1` and `w3`."""
    base, one, other = adapters(CASES["experts of Mixtral"], tmp_path)
    dense, start = tensors_of(merge(recipe_of(base, one, other), tmp_path / "dense")), tensors_of(base)
    output = {"kind": "adapter", "include": ["layers.*.experts.1.w1"], "portable": False}
    made = merge(recipe_of(base, one, other, output=output), tmp_path / "out")
    wanted = {name: dense[name] if ".experts.1.w1." in name else start[name] for name in start}
    assert error(merged_by_peft(mixtral, base, made.path, tmp_path / "found"), wanted) < 2e-6
