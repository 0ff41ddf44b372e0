"""Adapters are applied as PEFT's own merge_and_unload applies them, and as the model that was trained computes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys.adapters import (
    Convolutions,
    Tensors,
    edit_config,
    edit_tensors,
    error,
    gemma3,
    gpt2,
    gpt_oss,
    llama,
    merged_by_peft,
    merged_by_us,
    mixtral,
    opt,
    patched,
    qwen3_moe,
    train,
    trained_by_peft,
)

from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.adapters.deltas import LowRank
from paft_merge.inputs.checkpoint import Checkpoint

LINEAR = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONVOLUTIONS = ["conv1", "conv1x1", "conv2", "conv3", "linear"]


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    config: dict[str, Any]
    resize: int | None = None


CASES = {
    "alpha over r": Case(llama, {"target_modules": LINEAR, "lora_alpha": 12}),
    "rsLoRA": Case(llama, {"target_modules": LINEAR, "use_rslora": True}),
    "rank and alpha patterns": Case(
        llama,
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "o_proj": 5.5},
        },
    ),
    "rsLoRA with patterns": Case(
        llama,
        {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 1}},
    ),
    "all linear": Case(llama, {"target_modules": "all-linear"}),
    "DoRA": Case(llama, {"target_modules": LINEAR, "use_dora": True}),
    "embedding": Case(llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding and head": Case(llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "DoRA on embedding": Case(llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True}),
    "Conv1D": Case(gpt2, {"target_modules": CONV1D}),
    "Conv1D, wrong flag": Case(gpt2, {"target_modules": CONV1D, "fan_in_fan_out": True}),
    "DoRA on Conv1D": Case(gpt2, {"target_modules": CONV1D, "use_dora": True}),
    "square linear with bias": Case(opt, {"target_modules": ["q_proj", "fc1"]}),
    "lora_bias": Case(opt, {"target_modules": ["q_proj", "fc2"], "lora_bias": True, "lora_alpha": 3}),
    "lora_bias on Conv1D": Case(gpt2, {"target_modules": CONV1D, "lora_bias": True}),
    "bias all": Case(opt, {"target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": Case(opt, {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"}),
    "bias lora_only and lora_bias": Case(opt, {"target_modules": ["q_proj"], "bias": "lora_only", "lora_bias": True}),
    "modules_to_save": Case(llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "modules_to_save, embedding": Case(llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "trainable tokens": Case(llama, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 39]}),
    "trainable tokens of both ends": Case(
        llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 0], "lm_head": [5]}}
    ),
    "trainable tokens, tied": Case(
        partial(llama, tie_word_embeddings=True), {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}
    ),
    "resized vocabulary": Case(llama, {"target_modules": ["q_proj"]}, resize=43),
    "smaller vocabulary": Case(llama, {"target_modules": ["q_proj"]}, resize=37),
    "resized, tied": Case(partial(llama, tie_word_embeddings=True), {"target_modules": ["q_proj"]}, resize=43),
    "resized, embedding adapted": Case(llama, {"target_modules": ["embed_tokens", "lm_head"]}, resize=43),
    "resized, embedding with DoRA": Case(
        llama, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}, resize=43
    ),
    "resized, trainable tokens": Case(
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [2, 41], "lm_head": [42]}},
        resize=43,
    ),
    "resized, modules_to_save": Case(
        llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, resize=43
    ),
    "PiSSA": Case(llama, {"target_modules": LINEAR, "init_lora_weights": "pissa"}),
    "PiSSA on Conv1D": Case(gpt2, {"target_modules": CONV1D, "init_lora_weights": "pissa"}),
    "PiSSA with DoRA": Case(llama, {"target_modules": LINEAR, "init_lora_weights": "pissa", "use_dora": True}),
    "PiSSA with rsLoRA": Case(llama, {"target_modules": LINEAR, "init_lora_weights": "pissa", "use_rslora": True}),
    "PiSSA on the head": Case(llama, {"target_modules": ["lm_head", "q_proj"], "init_lora_weights": "pissa"}),
    "OLoRA": Case(llama, {"target_modules": LINEAR, "init_lora_weights": "olora", "lora_alpha": 8}),
    "orthogonal": Case(llama, {"target_modules": LINEAR, "init_lora_weights": "orthogonal"}),
    "MiCA": Case(llama, {"target_modules": LINEAR, "init_lora_weights": "mica"}),
    "MonteCLoRA": Case(llama, {"target_modules": LINEAR, "monteclora_config": MontecloraConfig()}),
    "VeLoRA": Case(llama, {"target_modules": LINEAR, "velora_config": VeloraConfig(num_groups=2)}),
    "BD-LoRA": Case(
        llama,
        {
            "target_modules": LINEAR,
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=["o_proj", "down_proj"],
                target_modules_bd_b=["q_proj", "up_proj"],
                nblocks=2,
                match_strict=False,
            ),
        },
    ),
    "convolutions": Case(Convolutions, {"target_modules": CONVOLUTIONS}),
    "convolutions with DoRA": Case(Convolutions, {"target_modules": CONVOLUTIONS, "use_dora": True}),
    "convolutions with bias": Case(Convolutions, {"target_modules": ["conv1", "conv3", "linear"], "lora_bias": True}),
    "attention, all biases, a saved head": Case(
        Convolutions, {"target_modules": ["attention", "square"], "bias": "all", "modules_to_save": ["score"]}
    ),
    "fused experts of Mixtral": Case(mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "fused experts, one of two": Case(mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "fused experts, patterns": Case(
        mixtral,
        {
            "target_modules": [],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"experts.gate_up_proj": 3},
            "use_rslora": True,
        },
    ),
    "square fused experts": Case(
        partial(mixtral, intermediate_size=8), {"target_modules": [], "target_parameters": EXPERTS}
    ),
    "fused experts of Qwen3-MoE": Case(
        qwen3_moe, {"target_modules": ["v_proj"], "target_parameters": [*EXPERTS, "mlp.gate.weight"]}
    ),
    "transposed experts of GPT-OSS": Case(gpt_oss, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "square transposed experts": Case(
        partial(gpt_oss, intermediate_size=16), {"target_modules": [], "target_parameters": EXPERTS}
    ),
    "saved experts": Case(mixtral, {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
    "Conv1D targeted as a parameter": Case(
        gpt2, {"target_modules": [], "target_parameters": ["attn.c_proj.weight"], "rank_pattern": {"c_proj.weight": 2}}
    ),
    "renamed tensors of a vision-language model": Case(gemma3, {"target_modules": ["q_proj", "fc1", "o_proj"]}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_merge_is_pefts(case: Case, tmp_path: Path) -> None:
    folders = train(case.make(), tmp_path, lora(**case.config), case.resize)
    theirs = merged_by_peft(case.make, *folders, tmp_path / "merged", case.resize)
    assert changed(*folders)
    assert error(merged_by_us(*folders), theirs) < 1e-6
    assert error(merged_by_us(*folders, rows=3), theirs) < 1e-6


TIED = {
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "LoRA on the head": {"target_modules": ["lm_head"]},
    "LoRA on both": {"target_modules": ["embed_tokens", "lm_head"]},
    "LoRA on both, kept tied": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "DoRA on both": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "PiSSA on the head": {"target_modules": ["lm_head"], "init_lora_weights": "pissa"},
    "a saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "a saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "both saved, kept tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]},
    "other tokens on each": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 1], "lm_head": [2]},
    },
    "tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [2]}},
}
KEPT = {"LoRA on both, kept tied", "both saved, kept tied", "tokens"}


@pytest.mark.parametrize("resize", [None, 43])
@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings_compute_what_was_trained(name: str, resize: int | None, tmp_path: Path) -> None:
    make = partial(llama, tie_word_embeddings=True)
    if resize and name == "PiSSA on the head":
        pytest.skip("PEFT starts PiSSA from the random rows of the resized head")
    folders = train(make(), tmp_path, lora(**TIED[name]), resize)
    check_logits(make, *folders, tmp_path, resize, untied=name not in KEPT)


@pytest.mark.parametrize(
    ("make", "targets"), [(gpt2, ["wte"]), (opt, ["embed_tokens", "lm_head"]), (gemma3, ["embed_tokens"])]
)
def test_tied_embeddings_of_other_architectures_are_untied_by_their_own_names(
    make: Callable[[], nn.Module], targets: list[str], tmp_path: Path
) -> None:
    check_logits(make, *train(make(), tmp_path, lora(target_modules=targets)), tmp_path, None, untied=True)


def test_a_tied_head_that_is_stored_all_the_same_is_untied_too(tmp_path: Path) -> None:
    make = partial(llama, tie_word_embeddings=True)
    base, adapter = train(make(), tmp_path, lora(target_modules=["embed_tokens"]))
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        assert opened.unties == {"lm_head.weight": "lm_head.weight"}
        assert opened.deltas.keys() == {"model.embed_tokens.weight"}


def test_peft_adds_both_deltas_to_tied_embeddings_and_we_do_not(tmp_path: Path) -> None:
    make = partial(llama, tie_word_embeddings=True)
    config = lora(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    base, adapter = train(make(), tmp_path, config)
    weight = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    theirs = merged_by_peft(make, base, adapter, tmp_path / "merged")["model.embed_tokens.weight"] - weight
    ours = merged_by_us(base, adapter)["model.embed_tokens.weight"] - weight
    torch.testing.assert_close(theirs, 2 * ours)


# Older and other writers


FORMS: dict[str, Callable[[str], str]] = {
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "the adapter's name": lambda key: (
        key.replace(".weight", ".default.weight") if ".lora_" in key else f"{key}.default"
    ),
    "no .weight": lambda key: key.removesuffix(".weight") if ".lora_" in key else key,
    "an older modules_to_save": lambda key: key.replace("lm_head.", "lm_head.modules_to_save.default."),
    "DDP": lambda key: f"module.{key}",
    "DDP without PEFT's prefix": lambda key: f"module.{key.removeprefix('base_model.model.')}",
    "Lightning, compiled": lambda key: f"model._orig_mod.{key}",
    "compiled inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "FSDP": lambda key: re.sub(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", key),
    "a newer magnitude": lambda key: f"{key}.weight" if key.endswith("magnitude_vector") else key,
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_the_same_names_are_the_same_adapter(form: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}
    if "modules" in form:
        fields["modules_to_save"] = ["lm_head"]
    base, adapter = train(llama(), tmp_path, lora(**fields))
    edit_tensors(adapter, lambda tensors: {key: t for key, t in tensors.items() if "base_layer" not in key})
    expected = merged_by_us(base, adapter)
    edit_tensors(adapter, lambda tensors: {FORMS[form](key): tensor for key, tensor in tensors.items()})
    assert error(merged_by_us(base, adapter), expected) == 0


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_on_single_experts_is_as_it_was_trained(rslora: bool, tmp_path: Path) -> None:
    """Before transformers 5 each expert was a module. PEFT fuses such adapters now: rank and alpha double.

    For rsLoRA that makes its scale sqrt(2) too large; ours stays alpha / sqrt(r), as it was trained.
    """
    base, adapter = train(mixtral(), tmp_path, lora(target_modules=["q_proj"], use_rslora=rslora))
    shapes = {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)}
    tensors: Tensors = {}
    for name, (rows, row) in shapes.items():
        for at in range(6):
            path = f"base_model.model.model.layers.{at // 3}.block_sparse_moe.experts.{at % 3}.{name}"
            tensors |= {f"{path}.lora_A.weight": torch.randn(4, row), f"{path}.lora_B.weight": torch.randn(rows, 4)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    edit_config(adapter, target_modules=list(shapes))
    stored = load_file(base / "model.safetensors")
    theirs = merged_by_peft(mixtral, base, adapter, tmp_path / "merged")
    for name, ours in merged_by_us(base, adapter).items():
        factor = math.sqrt(2) if rslora and (".w1." in name or ".w3." in name) else 1
        torch.testing.assert_close(theirs[name], stored[name] + factor * (ours - stored[name]), rtol=1e-5, atol=1e-5)


def test_experts_that_old_unsloth_packed_one_by_one_are_read_as_their_layout_says(tmp_path: Path) -> None:
    base, adapter = train(mixtral(), tmp_path, lora(target_modules=[], target_parameters=EXPERTS))
    expected = merged_by_us(base, adapter)

    def repack(tensors: Tensors) -> Tensors:
        return {
            key: t.reshape(len(t), 4, 3).transpose(1, 2).reshape(len(t), 12) if ".lora_B" in key else t
            for key, t in tensors.items()
        }

    edit_tensors(adapter, repack)
    assert error(merged_by_us(base, adapter), expected) > 0.1
    edit_config(adapter, lora_B_layout="grouped_by_expert")
    assert error(merged_by_us(base, adapter), expected) == 0


def test_experts_that_old_peft_read_the_other_way_round_are_told_by_their_shapes(tmp_path: Path) -> None:
    base, adapter = train(mixtral(), tmp_path, lora(target_modules=[], target_parameters=EXPERTS[1:]))
    expected = merged_by_us(base, adapter)

    def turn(tensors: Tensors) -> Tensors:
        turned: Tensors = {}
        for key in [key for key in tensors if ".lora_A" in key]:
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            turned[key] = b.reshape(16, 4, 3).permute(2, 1, 0).reshape(12, 16)
            turned[key.replace("lora_A", "lora_B")] = a.reshape(3, 4, 24).permute(2, 1, 0).reshape(24, 12)
        return turned

    edit_tensors(adapter, turn)
    edit_config(adapter, peft_version="0.18.1")
    assert error(merged_by_us(base, adapter), expected) < 1e-6


def test_a_vision_language_adapter_of_transformers_4_is_the_same_adapter(tmp_path: Path) -> None:
    base, adapter = train(gemma3(), tmp_path, lora(target_modules="model.language_model.*.(q_proj|down_proj)"))
    expected = merged_by_us(base, adapter)
    edit_tensors(
        adapter,
        lambda ts: {k.replace("model.model.language_model.", "model.language_model.model."): t for k, t in ts.items()},
    )
    assert error(merged_by_us(base, adapter), expected) == 0


@pytest.mark.parametrize(
    ("make", "fields"),
    [(llama, {"target_modules": ["q_proj"]}), (mixtral, {"target_modules": [], "target_parameters": EXPERTS})],
)
def test_an_adapter_on_a_model_without_a_head_finds_its_layers_in_one_that_has_a_head(
    make: Callable[[], nn.Module], fields: dict[str, Any], tmp_path: Path
) -> None:
    base, adapter = train(make(), tmp_path, lora(**fields))
    expected = merged_by_us(base, adapter)
    edit_tensors(
        adapter, lambda ts: {k.replace("base_model.model.model.", "base_model.model."): t for k, t in ts.items()}
    )
    assert error(merged_by_us(base, adapter), expected) == 0


def test_of_two_copies_of_a_saved_tensor_the_plain_one_counts(tmp_path: Path) -> None:
    """With `bias: all`, and with resized embeddings, PEFT writes both; it loads the plain one."""
    base, adapter = train(llama(), tmp_path, lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    expected = merged_by_us(base, adapter)
    copy = {"base_model.model.lm_head.modules_to_save.weight": torch.ones(40, 16).bfloat16()}  # last in the file
    edit_tensors(adapter, lambda tensors: {**tensors, **copy})
    assert error(merged_by_us(base, adapter), expected) == 0


def test_a_saved_embedding_that_was_kept_tied_counts_for_a_head_that_was_not_saved(tmp_path: Path) -> None:
    make = partial(llama, tie_word_embeddings=True)
    base, adapter = train(make(), tmp_path, lora(**TIED["both saved, kept tied"]))
    edit_tensors(adapter, lambda tensors: {key: t for key, t in tensors.items() if "lm_head" not in key})
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        assert not opened.unties
        assert "lm_head.weight" not in opened.deltas


def test_pissa_saved_with_its_initial_factors_is_plain_lora(tmp_path: Path) -> None:
    base, adapter = train(llama(), tmp_path, lora(target_modules=LINEAR, init_lora_weights="pissa"), initial=True)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 8
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        assert {delta.kind for delta in opened.deltas.values()} == {"lora"}
    assert error(merged_by_us(base, adapter), merged_by_peft(llama, base, adapter, tmp_path / "merged")) < 1e-6


def test_factors_in_bfloat16_are_multiplied_in_float32(tmp_path: Path) -> None:
    base, adapter = train(llama(), tmp_path, lora(target_modules=LINEAR, modules_to_save=["lm_head"]))
    edit_tensors(adapter, lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()})
    assert error(merged_by_us(base, adapter), merged_by_peft(llama, base, adapter, tmp_path / "merged")) < 1e-6


# The delta itself


def test_factors_lie_row_by_row_and_multiply_to_the_delta(tmp_path: Path) -> None:
    fields = {"target_parameters": EXPERTS, "use_rslora": True}
    for make, config in ((gpt_oss, lora(target_modules=["q_proj"], **fields)), (gpt2, lora(target_modules=CONV1D))):
        folder = tmp_path / make.__name__
        folder.mkdir()
        base, adapter = train(make(), folder, config)
        with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
            for delta in opened.deltas.values():
                assert all(b.flags.c_contiguous and a.flags.c_contiguous for b, a in delta.factors() or ())
                product = torch.from_numpy(np.concatenate([b @ a for b, a in delta.factors() or ()]))
                torch.testing.assert_close(product.reshape(delta.shape), delta_of(delta))


def test_a_delta_that_depends_on_the_weight_has_no_factors(tmp_path: Path) -> None:
    base, adapter = train(
        llama(), tmp_path, lora(target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"])
    )
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        assert all(delta.needs_weight and delta.factors() is None for delta in opened.deltas.values())


@pytest.mark.parametrize("init", [True, "pissa"])
def test_a_released_patch_gives_the_same_delta_again(init: bool | str, tmp_path: Path) -> None:
    base, adapter = train(llama(), tmp_path, lora(target_modules=LINEAR, init_lora_weights=init))
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        for delta in opened.deltas.values():
            first = delta_of(delta)
            delta.release()
            assert torch.equal(delta_of(delta), first)


def test_a_delta_that_was_computed_has_the_same_factors_and_holds_them_once(tmp_path: Path) -> None:
    base, adapter = train(llama(), tmp_path, lora(target_modules=["q_proj"], r=8))
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        delta = next(d for d in opened.deltas.values() if isinstance(d, LowRank))
        ((left, right),) = [(b.copy(), a.copy()) for b, a in delta.factors()]
        delta_of(delta)
        assert delta.pair.held is None
        ((same_left, same_right),) = delta.factors()
        assert np.array_equal(same_left, left)
        assert np.array_equal(same_right, right)
        assert delta.entries == left.size + right.size


def test_experts_share_their_factors_until_the_last_of_them_is_released(tmp_path: Path) -> None:
    base, adapter = train(mixtral(), tmp_path, lora(target_modules=[], target_parameters=EXPERTS[1:]))
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        first, second, third = [p for name, p in opened.deltas.items() if "layers.0." in name]
        before = second.factors()[0][0]
        first.release()
        second.release()
        assert np.shares_memory(third.factors()[0][0].base, before.base)
        third.release()
        assert not np.shares_memory(third.factors()[0][0].base, before.base)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_threads_get_the_delta_that_one_thread_gets(fields: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = train(gpt2(), tmp_path, lora(target_modules=CONV1D, **fields))
    expected = merged_by_us(base, adapter, rows=1)
    with (
        Checkpoint.open(base) as checkpoint,
        Adapter.open(adapter, checkpoint) as opened,
        ThreadPoolExecutor(4) as pool,
    ):
        name, delta = next(iter(opened.deltas.items()))
        weight = checkpoint.tensor(name)
        rows = list(pool.map(lambda at: row_of(delta, weight, at), range(len(weight)), timeout=60))
    assert torch.equal(torch.stack(rows), expected[name])


def test_new_rows_of_a_vocabulary_need_no_weight(tmp_path: Path) -> None:
    base, adapter = train(llama(), tmp_path, lora(target_modules=["embed_tokens", "lm_head"]), resize=43)
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        assert opened.vocab_size == 43
        delta = opened.deltas["model.embed_tokens.weight"]
        assert delta.shape == (43, 16)
        out = torch.empty(3, 16)
        delta.compute(40, 43, None, out.numpy())
        zeros = torch.empty(3, 16)
        delta.compute(40, 43, np.zeros((3, 16), np.float32), zeros.numpy())
    assert torch.equal(out, zeros)
    torch.testing.assert_close(out, merged_by_us(base, adapter)["model.embed_tokens.weight"][40:])


def test_dora_leaves_a_row_of_zeros_at_zero(tmp_path: Path) -> None:
    base, adapter = train(llama(), tmp_path, lora(target_modules=["q_proj"], use_dora=True))
    edit_tensors(adapter, lambda ts: {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in ts.items()})
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        delta = next(iter(opened.deltas.values()))
        assert not patched(torch.zeros(16, 16), delta).any()


def test_a_plain_adapter_is_bound_without_transformers(tmp_path: Path) -> None:
    base, adapter = train(llama(), tmp_path, lora(target_modules=[*LINEAR, "embed_tokens"]))
    code = (
        "import sys; from pathlib import Path; from paft_merge.inputs.adapters import Adapter;"
        "from paft_merge.inputs.checkpoint import Checkpoint;"
        "adapter = Adapter.open(Path(sys.argv[2]), Checkpoint.open(Path(sys.argv[1])));"
        "assert len(adapter.deltas) == 11; assert 'transformers' not in sys.modules and 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(base), str(adapter)], check=True)


# What is only odd


def test_another_name_of_the_base_is_a_warning(tmp_path: Path) -> None:
    base, adapter = train(llama(), tmp_path, lora(target_modules=["q_proj"]))
    assert warnings_of(base, adapter) == []
    edit_config(adapter, base_model_name_or_path="someone/another-model")
    (warning,) = warnings_of(base, adapter)
    assert "someone/another-model" in warning
    edit_config(adapter, base_model_name_or_path="~/.cache/huggingface/hub/models--someone--base/snapshots/1234")
    assert warnings_of(base, adapter) == []


def test_a_target_without_factors_is_a_warning(tmp_path: Path) -> None:
    base, adapter = train(llama(), tmp_path, lora(target_modules=["q_proj", "v_proj"]))
    edit_tensors(adapter, lambda tensors: {key: tensor for key, tensor in tensors.items() if "v_proj" not in key})
    (warning,) = warnings_of(base, adapter)
    assert "'v_proj'" in warning


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **fields})


def changed(base: Path, adapter: Path) -> set[str]:
    """The last parts of the names of tensors that the adapter changes."""
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        return {name.rpartition(".")[2] for name in opened.deltas}


def delta_of(delta: Any) -> Tensor:
    return patched(torch.zeros(delta.shape), delta)


def row_of(delta: Any, weight: Tensor, at: int) -> Tensor:
    out = torch.empty(1, delta.row_size)
    delta.compute(at, at + 1, weight[at : at + 1].numpy(), out.numpy())
    return weight[at] + out[0]


def warnings_of(base: Path, adapter: Path) -> list[str]:
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        return [str(warning) for warning in opened.warnings]


def check_logits(
    make: Callable[[], nn.Module], base: Path, adapter: Path, folder: Path, resize: int | None, untied: bool
) -> None:
    """A checkpoint written as the deltas and `unties` say computes what the base with the adapter on it computes."""
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        assert bool(opened.unties) == untied
        assert opened.unties.keys() <= opened.deltas.keys()
        assert opened.vocab_size == resize
    ours = folder / "ours"
    ours.mkdir()
    save_file(merged_by_us(base, adapter), ours / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    changes: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    changes |= {"vocab_size": resize} if resize else {}
    (ours / "config.json").write_text(json.dumps({**config, **changes}))
    tokens = torch.arange(8)[None]
    theirs = trained_by_peft(make, base, adapter, resize)(input_ids=tokens).logits
    loaded, info = type(make()).from_pretrained(ours, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded(input_ids=tokens).logits, theirs, rtol=1e-4, atol=1e-4)
