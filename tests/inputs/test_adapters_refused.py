"""Adapters that have no exact delta are refused by name, all faults at once, before anything is read that is large."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from toys.adapters import Convolutions, Tensors, edit_config, edit_tensors, gemma3, llama, mixtral, train

from paft_merge.errors import AdapterError, Problem
from paft_merge.inputs.adapters import Adapter
from paft_merge.inputs.checkpoint import Checkpoint

PATH = "base_model.model.model.layers.0.self_attn.q_proj"
MODULE = "'model.layers.0.self_attn.q_proj'"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a plain adapter on its q_proj and embed_tokens."""
    folder = tmp_path_factory.mktemp("plain")
    train(llama(), folder, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens"]))
    return folder


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """A copy of the plain adapter, to be spoilt."""
    return Path(shutil.copytree(plain / "adapter", tmp_path / "adapter"))


@pytest.fixture
def refused(plain: Path) -> Callable[..., list[Problem]]:
    """The problems that opening an adapter on the plain base raises."""

    def refused(adapter: Path, base: Path = plain / "base") -> list[Problem]:
        with Checkpoint.open(base) as checkpoint, pytest.raises(AdapterError) as caught:
            Adapter.open(adapter, checkpoint)
        return list(caught.value.problems)

    return refused


def test_names_of_other_programs_are_one_line(adapter: Path, refused: Callable[..., list[Problem]]) -> None:
    edit_tensors(
        adapter, lambda t: {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for key, v in t.items()}
    )
    assert [
        "convert it to PEFT's names" in str(problem) for problem in refused(adapter) if problem.code == "ADAPTER_UNUSED"
    ] == [True]


def test_a_version_of_a_program_changes_nothing(adapter: Path, plain: Path) -> None:
    edit_config(adapter, unsloth_version="2025.1.5")
    with Checkpoint.open(plain / "base") as base, Adapter.open(adapter, base) as opened:
        assert opened.deltas


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "ADAPTER_UNSUPPORTED: peft_type: PROMPT_TUNING prepends trained"),
    "X-LoRA": ({"peft_type": "XLORA"}, "ADAPTER_UNSUPPORTED: peft_type: XLORA mixes several adapters by a router"),
    "an unknown type": ({"peft_type": "NEWLORA"}, "ADAPTER_UNSUPPORTED: peft_type: NEWLORA is not a type that"),
    "no number of ranks": (
        {"peft_type": "ADALORA"},
        "ADAPTER_CONFIG: init_r: must be a whole number above 0, got None",
    ),
    "no type": ({"peft_type": None, "lora_alpha": None}, "ADAPTER_CONFIG: peft_type"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "ADAPTER_UNSUPPORTED: alora_invocation_tokens"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, "ADAPTER_UNSUPPORTED: arrow_config"),
    "QALoRA": ({"use_qalora": True}, "ADAPTER_UNSUPPORTED: use_qalora"),
    "KaSA": ({"kasa_config": {"beta": 1e-4}}, "ADAPTER_UNSUPPORTED: kasa_config"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "ADAPTER_UNSUPPORTED: layer_replication"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "ADAPTER_UNSUPPORTED: init_lora_weights: pissa_niter_4"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "ADAPTER_UNSUPPORTED: init_lora_weights: lora_ga"),
    "CorDA": ({"init_lora_weights": "corda"}, "ADAPTER_UNSUPPORTED: init_lora_weights: corda"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "ADAPTER_UNSUPPORTED: init_lora_weights: loftq"),
    "an unknown start": ({"init_lora_weights": "magic"}, "ADAPTER_UNSUPPORTED: init_lora_weights"),
    "an unknown field": ({"use_newlora": True}, "ADAPTER_UNSUPPORTED: use_newlora"),
    "no alpha": ({"lora_alpha": None}, "ADAPTER_CONFIG: lora_alpha: is missing"),
    "alpha 0": ({"lora_alpha": 0}, "ADAPTER_CONFIG: lora_alpha: must be a finite number other than 0, got 0"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "ADAPTER_CONFIG: lora_alpha"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "ADAPTER_CONFIG: lora_alpha"),
    "alpha a text": ({"lora_alpha": "16"}, "ADAPTER_CONFIG: lora_alpha"),
    "alpha true": ({"lora_alpha": True}, "ADAPTER_CONFIG: lora_alpha"),
    "no r": ({"r": None}, "ADAPTER_CONFIG: r: is missing"),
    "r 0": ({"r": 0}, "ADAPTER_CONFIG: r: must be a whole number above 0, got 0"),
    "a pattern's alpha": ({"alpha_pattern": {"q_proj": 0}}, "ADAPTER_CONFIG: alpha_pattern['q_proj']"),
    "a pattern's rank": ({"rank_pattern": {"q_proj": 2.5}}, "ADAPTER_CONFIG: rank_pattern['q_proj']"),
    "a pattern that is none": ({"rank_pattern": {"q_(": 4}}, "ADAPTER_CONFIG: rank_pattern['q_(']: is not a regular"),
    "patterns in a list": ({"alpha_pattern": ["q_proj"]}, "ADAPTER_CONFIG: alpha_pattern: must be a dict"),
    "a flag as text": ({"use_dora": "yes"}, "ADAPTER_CONFIG: use_dora: must be a bool"),
    "an unknown bias": ({"bias": "some"}, "ADAPTER_CONFIG: bias"),
    "numbers to save": ({"modules_to_save": [1]}, "ADAPTER_CONFIG: modules_to_save"),
    "no blocks": ({"use_bdlora": {"nblocks": 0}}, "ADAPTER_CONFIG: use_bdlora.nblocks"),
    "blocks that do not divide": (
        {"use_bdlora": {"nblocks": 3, "target_modules_bd_a": ["q_proj"]}},
        f"ADAPTER_SHAPE: {MODULE} has factors of rank 0",
    ),
    "an unknown layout": ({"lora_B_layout": "diagonal"}, "ADAPTER_CONFIG: lora_B_layout"),
    "another rank": ({"r": 8}, f"ADAPTER_SHAPE: {MODULE} has factors of rank 4, but"),
    "a pattern of another rank": (
        {"rank_pattern": {"0.self_attn.q_proj": 2}},
        f"ADAPTER_SHAPE: {MODULE} has factors of rank 4, but",
    ),
    "DoRA without magnitudes": (
        {"use_dora": True},
        f"ADAPTER_SHAPE: {MODULE} has no lora_magnitude_vector",
    ),
    "lora_bias without biases": (
        {"lora_bias": True},
        f"ADAPTER_SHAPE: {MODULE} has no lora_B.bias",
    ),
    "PiSSA on an embedding": (
        {"init_lora_weights": "pissa"},
        "ADAPTER_UNSUPPORTED: 'model.embed_tokens' is not a linear",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), CONFIGS.values(), ids=CONFIGS.keys())
def test_configurations_without_an_exact_delta(
    changes: dict[str, Any], expected: str, adapter: Path, refused: Callable[..., list[Problem]]
) -> None:
    edit_config(adapter, **changes)
    found = [f"{problem.code}: {problem.what}" for problem in refused(adapter)]
    assert any(text.startswith(expected) for text in found), found


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if part not in key}


def spoilt(key: str, value: float) -> Callable[[Tensors], Tensors]:
    def spoil(tensors: Tensors) -> Tensors:
        tensors[key].view(-1)[5] = value
        return tensors

    return spoil


def with_(**extra: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {f"{PATH}.{name}": tensor for name, tensor in extra.items()}


TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no lora_B": (without("0.self_attn.q_proj.lora_B"), f"ADAPTER_SHAPE: {MODULE} has lora_A without lora_B"),
    "no lora_A": (without("0.self_attn.q_proj.lora_A"), f"ADAPTER_SHAPE: {MODULE} has lora_B without lora_A"),
    "half an embedding": (without("embedding_B"), "ADAPTER_SHAPE: 'model.embed_tokens' has lora_embedding_A without"),
    "no tensors": (lambda tensors: {}, "CHECKPOINT_MISSING: holds no tensors"),
    "other inputs": (
        lambda t: t | {f"{PATH}.lora_A.weight": torch.zeros(4, 25)},
        f"ADAPTER_SHAPE: {MODULE} has lora_A (4, 25) and lora_B (16, 4), which do not make the base's (16, 16)",
    ),
    "other ranks": (
        lambda t: t | {f"{PATH}.lora_B.weight": torch.zeros(16, 3)},
        f"ADAPTER_SHAPE: {MODULE} has lora_A (4, 16) and lora_B (16, 3), which do not make",
    ),
    "a flat factor": (lambda t: t | {f"{PATH}.lora_B.weight": torch.zeros(64)}, f"ADAPTER_SHAPE: {MODULE} has lora_A"),
    "a single number": (lambda t: t | {f"{PATH}.lora_A.weight": torch.tensor(1.0)}, f"ADAPTER_SHAPE: {MODULE} has factors"),
    "a single number too": (lambda t: t | {f"{PATH}.lora_B.weight": torch.tensor(1.0)}, f"ADAPTER_SHAPE: {MODULE} has lo"),
    "integers": (
        lambda t: t | {f"{PATH}.lora_A.weight": torch.zeros(4, 16, dtype=torch.int8)},
        f"DTYPE_UNSUPPORTED: tensor '{PATH}.lora_A.weight' is I8",
    ),
    "another part of LoRA": (with_(lora_E=torch.zeros(4, 1)), f"ADAPTER_CONFIG: tensor '{PATH}.lora_E' is of type ADALORA"),
    "KaSA's diagonal": (with_(lora_diag=torch.zeros(4)), f"ADAPTER_UNUSED: has names that no supported adapter type uses, so that they would be left out: '{PATH}.lora_diag'"),
    "kohya's names": (with_(**{"lora_up.weight": torch.ones(16, 4)}), f"ADAPTER_UNUSED: has names that no supported adapter type uses, so that they would be left out: '{PATH}.lora_up.weight'"),
    "a value head": (
        lambda t: t | {"v_head.summary.weight": torch.ones(1, 16)},
        "ADAPTER_TARGET: holds trained weights that the base lacks: 'v_head.summary.weight'",
    ),
    "a magnitude without DoRA": (
        with_(lora_magnitude_vector=torch.ones(16)),
        f"ADAPTER_UNUSED: {MODULE} has a lora_magnitude_vector, but use_dora is false",
    ),
    "a bias without lora_bias": (
        with_(**{"lora_B.bias": torch.ones(16)}),
        f"ADAPTER_UNUSED: {MODULE} has a lora_B.bias, but lora_bias is false",
    ),
    "a weight beside factors": (with_(weight=torch.zeros(16, 16)), f"ADAPTER_UNUSED: tensor '{PATH}.weight' is a full weight beside"),
    "two adapters": (
        lambda t: t | {f"{PATH}.lora_A.second.weight": torch.zeros(4, 16)},
        f"ADAPTER_CONFIG: tensors '{PATH}.lora_A.second.weight' and '{PATH}.lora_A.weight' are the same part",
    ),
    "a full tensor of another shape": (
        lambda t: t | {"base_model.model.model.norm.weight": torch.zeros(17)},
        "ADAPTER_SHAPE: tensor 'base_model.model.model.norm.weight' is (17,), the base has (16,)",
    ),
    "tokens without indices": (
        lambda t: t | {"base_model.model.lm_head.token_adapter.trainable_tokens_delta": torch.zeros(2, 16)},
        "ADAPTER_CONFIG: 'lm_head' has token rows whose indices adapter_config.json does not give",
    ),
    "a head of another size": (
        lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(41, 16)},
        "ADAPTER_SHAPE: resizes some embeddings and not others",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_do_not_fit(
    change: Callable[[Tensors], Tensors], expected: str, adapter: Path, refused: Callable[..., list[Problem]]
) -> None:
    edit_tensors(adapter, change)
    found = [f"{problem.code}: {problem.what}" for problem in refused(adapter)]
    assert any(text.startswith(expected) for text in found), found


def test_modules_that_are_not_in_the_base_are_counted_and_the_first_five_named(
    adapter: Path, refused: Callable[..., list[Problem]]
) -> None:
    def rename(tensors: Tensors) -> Tensors:
        factors = {key: tensor for key, tensor in tensors.items() if "q_proj" in key}
        return {k.replace("q_proj", f"q_{at}_proj"): t.clone() for k, t in factors.items() for at in range(6)}

    edit_tensors(adapter, rename)
    (problem,) = refused(adapter)
    assert problem.code == "ADAPTER_TARGET"
    assert problem.what.startswith("12 of its modules are not in the base: 'model.layers.0.self_attn.q_0_proj'")
    assert problem.what.count("q_") == 5
    assert "another base" in problem.fix


def test_all_faults_are_told_at_once(adapter: Path, refused: Callable[..., list[Problem]]) -> None:
    edit_tensors(adapter, without("lora_B"))
    assert [problem.code for problem in refused(adapter)] == ["ADAPTER_SHAPE", "ADAPTER_SHAPE"]
    edit_config(adapter, use_qalora=True, lora_alpha=0, r="8", peft_extra=1)
    assert len(refused(adapter)) == 4
    (adapter / "adapter_model.safetensors").write_bytes(b"1234567")
    assert [problem.code for problem in refused(adapter)][-1] == "SHARD_TRUNCATED"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_told_when_they_are_first_needed(
    value: float, adapter: Path, plain: Path
) -> None:
    edit_tensors(adapter, spoilt(f"{PATH}.lora_A.weight", value))
    with Checkpoint.open(plain / "base") as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        delta = opened.deltas["model.layers.0.self_attn.q_proj.weight"]
        with pytest.raises(
            AdapterError, match=r"lora_A.weight.*: 1 of the 64 values read are NaN or infinite, the first at 5"
        ):
            delta.compute(0, 16, None, np.empty((16, 16), np.float32))


def test_saved_tensors_that_are_not_finite_are_told_when_they_are_read(adapter: Path, plain: Path) -> None:
    key = "base_model.model.lm_head.weight"
    edit_tensors(adapter, lambda tensors: spoilt(key, float("-inf"))(tensors | {key: torch.zeros(40, 16)}))
    with Checkpoint.open(plain / "base") as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        with pytest.raises(AdapterError) as caught:
            opened.deltas["lm_head.weight"].compute(0, 2, np.zeros((2, 16), np.float32), np.empty((2, 16), np.float32))
    assert caught.value.problems[0].code == "NONFINITE"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"LORA"', "[" * 100_000, "\x00"], ids=["empty", "cut", "list", "text", "deep", "binary"]
)
def test_a_configuration_that_is_no_json_object(
    text: str, adapter: Path, refused: Callable[..., list[Problem]]
) -> None:
    (adapter / "adapter_config.json").write_text(text)
    assert [problem.code for problem in refused(adapter)] == ["ADAPTER_CONFIG"]


def test_folders_without_their_files(adapter: Path, refused: Callable[..., list[Problem]], tmp_path: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    assert [problem.where for problem in refused(adapter)] == [str(adapter / "adapter_config.json")]
    (adapter / "adapter_model.safetensors").unlink()
    assert [str(problem) for problem in refused(adapter)] == [
        f"{adapter}: is not an adapter: it has neither adapter_config.json nor adapter_model.safetensors; "
        "give the folder that PEFT's save_pretrained wrote"
    ]
    assert len(refused(tmp_path / "nowhere")) == 1


class _Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        import os

        return os.mkdir, ("sentinel",)


def test_a_pickled_adapter_is_refused_and_not_opened(
    adapter: Path, refused: Callable[..., list[Problem]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(_Evil()))
    (problem,) = refused(adapter)
    assert problem.code == "PICKLE_REFUSED"
    assert "lazy_unpickle=True, or convert it" in problem.fix
    assert "torch.load('adapter_model.bin', weights_only=True)" in problem.fix
    assert not (tmp_path / "sentinel").exists()


def test_remote_code_of_the_base_is_not_run(
    adapter: Path, plain: Path, refused: Callable[..., list[Problem]], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(plain / "base", tmp_path / "base"))
    edit_tensors(adapter, without("q_proj"))
    code = f"open({str(tmp_path / 'sentinel')!r}, 'w')"
    (base / "configuration_new.py").write_text(code)
    (base / "config.json").write_text(
        '{"model_type": "newest", "vocab_size": 40, "auto_map": {"AutoConfig": "configuration_new.NewConfig"}}'
    )
    (problem,) = refused(adapter, base)
    assert problem.code == "ADAPTER_UNSUPPORTED"
    assert "tie_word_embeddings" in problem.fix
    assert not (tmp_path / "sentinel").exists()


def test_convolutions_in_groups(tmp_path: Path, refused: Callable[..., list[Problem]]) -> None:
    folders = train(Convolutions(), tmp_path, LoraConfig(r=4, lora_alpha=6, target_modules=["grouped", "conv2"]))
    (problem,) = refused(folders[1], folders[0])
    assert problem.code == "ADAPTER_UNSUPPORTED"
    assert "'grouped' is a grouped convolution" in problem.what


def test_square_experts_of_an_unknown_version(tmp_path: Path, refused: Callable[..., list[Problem]]) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=[], target_parameters=EXPERTS)
    base, adapter = train(mixtral(intermediate_size=8), tmp_path, config)
    for version in (None, "0.18.2", "0.19.1.dev0"):
        edit_config(adapter, peft_version=version)
        problems = refused(adapter, base)
        assert [problem.code for problem in problems] == ["ADAPTER_UNSUPPORTED"] * 2
        assert "gate_up_proj' has square experts (3, 16, 16)" in problems[0].what


def test_experts_of_unsloth_without_a_record_of_their_layout(
    tmp_path: Path, refused: Callable[..., list[Problem]]
) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=[], target_parameters=EXPERTS)
    base, adapter = train(mixtral(), tmp_path, config)
    edit_config(adapter, base_model_name_or_path="unsloth/mixtral")
    assert {problem.code for problem in refused(adapter, base)} == {"ADAPTER_UNSUPPORTED"}
    edit_config(adapter, lora_B_layout="rank_major")
    with Checkpoint.open(base) as checkpoint, Adapter.open(adapter, checkpoint) as opened:
        assert len(opened.deltas) == 18


def test_one_of_two_wrapped_parameters(tmp_path: Path, refused: Callable[..., list[Problem]]) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=[], target_parameters=EXPERTS)
    base, adapter = train(mixtral(), tmp_path, config)
    edit_tensors(adapter, without("experts.base_layer"))
    problems = refused(adapter, base)
    assert "has 1 pairs of factors for the targeted parameters gate_up_proj, down_proj" in problems[0].what


def test_a_quantised_base(adapter: Path, plain: Path, refused: Callable[..., list[Problem]], tmp_path: Path) -> None:
    base = Path(shutil.copytree(plain / "base", tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, base / "model.safetensors")
    (problem,) = refused(adapter, base)
    assert problem.code == "DTYPE_UNSUPPORTED"
    assert "dequantise" in problem.fix


def test_token_indices_that_repeat_or_lie_outside(adapter: Path, refused: Callable[..., list[Problem]]) -> None:
    key = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    edit_tensors(adapter, lambda tensors: tensors | {key: torch.zeros(2, 16)})
    for indices in ([3, 3], [0, 40], [-1, 1], [1, 2, 3]):
        edit_config(adapter, trainable_token_indices={"lm_head": indices})
        assert [problem.code for problem in refused(adapter)] == ["ADAPTER_SHAPE"], indices


def test_an_adapter_of_another_base_names_both_shapes(
    adapter: Path, tmp_path: Path, refused: Callable[..., list[Problem]]
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    base, _ = train(llama(hidden_size=32), folder, LoraConfig(r=4, target_modules=["q_proj"]))
    problems = refused(adapter, base)
    assert {problem.code for problem in problems} == {"ADAPTER_SHAPE"}
    told = [problem.what for problem in problems if "another base" in problem.fix]
    assert len(told) == 1, "one cause, one line"
    assert all(shape in told[0] for shape in ("4 of its tensors", "(4, 40)", "(16, 4)", "(40, 32)"))


def test_a_parameter_that_transformers_computes_from_others(
    tmp_path: Path, refused: Callable[..., list[Problem]]
) -> None:
    """One checkpoint tensor is missing for an expert, so that the fused parameter cannot be put together."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=[], target_parameters=EXPERTS[:1])
    base, adapter = train(mixtral(), tmp_path, config)
    tensors = load_file(base / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "0.block_sparse_moe.experts.1.w3" not in n}, base / "model.safetensors"
    )
    problems = refused(adapter, base)
    assert problems[0].code == "ADAPTER_UNSUPPORTED"
    assert "a delta cannot reproduce" in problems[0].what


def test_an_adapter_of_a_vision_tower_that_the_base_lacks(
    adapter: Path, tmp_path: Path, refused: Callable[..., list[Problem]]
) -> None:
    folder = tmp_path / "vision"
    folder.mkdir()
    _, other = train(gemma3(), folder, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
    assert refused(other)[-1].code == "ADAPTER_TARGET"
