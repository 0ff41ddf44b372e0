"""Configs are compared by what they mean: every field of every family, and no field that changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import near, random_state, save_checkpoint

from paft_merge import merge, open_plan
from paft_merge.errors import PaftMergeError
from paft_merge.plan.effective_config import ABSENT, differences

Config = dict[str, Any]

FAMILIES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3"),
    *("gpt2", "gpt_neox", "gptj", "gpt_oss", "falcon", "mpt", "bloom", "opt", "t5", "bart", "whisper", "bert", "roberta"),
    *("deepseek_v3", "olmo2", "cohere", "starcoder2", "stablelm", "granite", "modernbert", "mamba", "clip", "vit"),
    *("gemma3", "mistral3", "llava", "qwen2_5_vl"),
)  # fmt: skip
OFF = {"sliding_window", "max_window_layers", "use_sliding_window", "_sliding_window_pattern", "sliding_window_pattern"}
"""Settings of a window that the defaults turn off."""
IGNORED_BY_CLASS = {"gemma": {"hidden_act"}, "t5": {"tie_word_embeddings"}}
"""Fields that the class or the model overrules."""


def default(kind: str) -> Config:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made: Config = json.loads(json.dumps(CONFIG_MAPPING[kind]().to_dict()))
    return made


def resaved(config: Config) -> Config:
    """The config as `save_pretrained` of the installed transformers writes it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return json.loads(CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config))).to_json_string())  # type: ignore[no-any-return]


def names(ours: Config, theirs: Config) -> list[str]:
    return [one.name for one in differences(ours, theirs)]


def other(value: Any) -> Any:
    """Another value of the same type; None for values that the test does not change."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2 + 3
    if isinstance(value, float):
        return value * 2 + 0.5
    return ("gelu" if value != "gelu" else "relu") if isinstance(value, str) else None


def is_harmless(key: str) -> bool:
    """Written again by hand, so that the list in the package cannot grow unseen."""
    parts = (
        "dropout",
        "drop_path",
        "layerdrop",
        "pdrop",
        "initializer",
        "init_std",
        "_loss",
        "loss_",
        "output_",
        "mask_time_",
    )
    alone = {
        *("architectures", "_name_or_path", "transformers_version", "dtype", "use_cache", "return_dict", "problem_type"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id"),
        *("decoder_start_token_id", "forced_eos_token_id", "chunk_size_feed_forward", "pretraining_tp", "model_type"),
        *("logit_scale_init_value", "apply_spec_augment", "use_mamba_kernels", "init_device", "mask_feature_min_masks"),
        *("mask_feature_length", "mask_feature_prob", "label_smoothing", "tie_word_embeddings.nested", "loss"),
    }  # fmt: skip
    return key in alone or any(part in key for part in parts)


def fields_of(section: Config, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in section.items():
        if isinstance(value, dict) and key.endswith("_config"):
            found += fields_of(value, (*path, key))
        elif other(value) is not None and not is_harmless(key) and not (path and key == "tie_word_embeddings"):
            found.append((*path, key))
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_field_of_a_family_that_changes_is_found_by_its_name(kind: str) -> None:
    base = default(kind)
    checked = 0
    for path in fields_of(base):
        changed = json.loads(json.dumps(base))
        section = changed
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = other(section[path[-1]])
        found = differences(base, changed)
        if path[-1] not in OFF | IGNORED_BY_CLASS.get(kind, set()):
            assert found, f"a change of {path} is passed over"
            assert any(path[-1] in str(one) for one in found) or path[-1] in ("rotary_pct", "hidden_size"), (
                path,
                found,
            )
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_config_saved_again_means_the_same(kind: str) -> None:
    base = default(kind)
    assert names(base, resaved(base)) == names(resaved(base), base) == []
    assert names({"model_type": kind}, base) == []


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 500000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
QWEN = {
    "model_type": "qwen2",
    "rope_theta": 1e6,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
FACTORS = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PHI = {"model_type": "phi3", "original_max_position_embeddings": 4096, "max_position_embeddings": 131072}
VISION = {"depth": 2, "hidden_size": 32}
SAME = {
    "type and rope_type": (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}, LLAMA | {"rope_scaling": LINEAR}),
    "both of them": (LLAMA | {"rope_scaling": LINEAR}, LLAMA | {"rope_scaling": {"type": "linear", **LINEAR}}),
    "rope of transformers 5": (
        LLAMA | {"rope_scaling": LINEAR},
        {**LLAMA, "rope_theta": None, "rope_parameters": {**LINEAR, "rope_theta": 500000.0}},
    ),
    "no scaling": (LLAMA | {"rope_scaling": None}, LLAMA | {"rope_scaling": {"rope_type": "default"}}),
    "default theta": ({**LLAMA, "rope_theta": 10000.0}, {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}),
    "head_dim": (LLAMA | {"head_dim": None}, LLAMA | {"head_dim": 16}),
    "mixtral leaves head_dim empty": (
        {"model_type": "mixtral", "hidden_size": 64, "num_attention_heads": 4},
        {"model_type": "mixtral", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16},
    ),
    "key-value heads": (LLAMA, LLAMA | {"num_key_value_heads": 4}),
    "a window that is off": (QWEN, QWEN | {"sliding_window": None}),
    "layers of a window that is off": (QWEN, QWEN | {"max_window_layers": 21, "sliding_window": 4096}),
    "su": (
        PHI | {"rope_scaling": {"type": "su", **FACTORS}},
        PHI | {"rope_scaling": {"type": "longrope", **FACTORS}},
    ),
    "yarn's defaults": (
        LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0}},
    ),
    "names of attributes": (
        {"model_type": "gpt2", "n_head": 4, "n_embd": 64},
        {"model_type": "gpt2", "num_attention_heads": 4, "hidden_size": 64},
    ),
    "gemma 3 of two ages": (
        {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "num_hidden_layers": 6},
        {
            "model_type": "gemma3_text", "num_hidden_layers": 6,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
                                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        },
    ),
    "flat and nested": (
        {"model_type": "qwen2_5_vl", "hidden_size": 64, "num_hidden_layers": 2, "rope_theta": 1e6, "vision_config": VISION,
         "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "use_sliding_window": False, "sliding_window": 32768},
        {"model_type": "qwen2_5_vl", "vision_config": {"model_type": "qwen2_5_vl", **VISION},
         "text_config": {"hidden_size": 64, "num_hidden_layers": 2, "sliding_window": None, "rope_theta": 1e6,
                         "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3]}}},
    ),
    "labels that were never named": (LLAMA, LLAMA | {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}),
    "fields of trainers": (LLAMA, LLAMA | {"unsloth_version": "2026.1", "mystery_of_a_trainer": 3, "use_mrope": False}),
    "settings of generation": (LLAMA, LLAMA | {"temperature": 0.6, "top_p": 0.9, "max_length": 4096}),
    "another head of classes": (LLAMA | {"architectures": ["A"]}, LLAMA | {"architectures": ["B"], "torch_dtype": "float16"}),
    "a model that transformers does not know": (
        {"model_type": "odd", "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}, "use_cache": True},
        {"model_type": "odd", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "bias": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_two_spellings_of_one_config_are_equal(case: str) -> None:
    one, other = SAME[case]
    assert names(one, other) == names(other, one) == []


BERT = {"model_type": "bert", "id2label": {"0": "good", "1": "bad"}}
DIFFERENT = {
    "factor in two spellings": (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {**LLAMA, "rope_theta": None, "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0}},
        ["rope_parameters.factor (8.0 against 4.0)"],
    ),
    "absent theta": (
        {"model_type": "llama"}, LLAMA | {"hidden_size": 4096, "num_attention_heads": 32},
        ["rope_parameters.rope_theta (500000.0 against 10000.0)"],
    ),
    "heads of GPT-2": ({"model_type": "gpt2"}, {"model_type": "gpt2", "n_head": 6}, ["n_head (6 against 12)"]),
    "caps of Gemma": (
        {"model_type": "gemma2"}, {"model_type": "gemma2", "final_logit_softcapping": None},
        ["final_logit_softcapping (None against 30.0)"],
    ),
    "experts for each token": (
        {"model_type": "mixtral"}, {"model_type": "mixtral", "num_experts_per_tok": 1}, ["num_experts_per_tok (1 against 2)"],
    ),
    "activation of T5": (
        {"model_type": "t5"}, {"model_type": "t5", "feed_forward_proj": "gated-gelu"}, ["feed_forward_proj"],
    ),
    "scale of T5's decoder": (
        {"model_type": "t5"}, {"model_type": "t5", "tie_word_embeddings": False}, ["scale_decoder_outputs"],
    ),
    "a window that is on": (QWEN, QWEN | {"use_sliding_window": True}, ["sliding_window (131072 against not set)", "layer_types[28] (sliding_attention against full_attention)"]),
    "yarn": (
        LLAMA, LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["rope_type (yarn against default)"],
    ),
    "length where RoPE is scaled by it": (
        LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
        ["max_position_embeddings (64 against 2048)"],
    ),
    "labels in another order": (BERT, BERT | {"id2label": {"0": "bad", "1": "good"}}, ["id2label.0 (bad against good)"]),
    "where positions start": ({"model_type": "roberta"}, {"model_type": "roberta", "pad_token_id": 0}, ["pad_token_id (0 against 1)"]),
    "nested": (
        {"model_type": "llava", "text_config": {"model_type": "llama"}},
        {"model_type": "llava", "text_config": {"model_type": "llama", "rms_norm_eps": 1e-5}},
        ["text_config.rms_norm_eps (1e-05 against 1e-06)"],
    ),
    "another model": (LLAMA, {**LLAMA, "model_type": "mistral"}, ["model_type (mistral against llama)"]),
    "a model that transformers does not know": (
        {"model_type": "odd", "heads": 4}, {"model_type": "odd", "heads": 8, "gate": 1}, ["heads (8 against 4)", "gate (1 against not set)"],
    ),
    "a model type that is not a name": ({"model_type": ["llama"], "heads": 4}, {"model_type": ["llama"], "heads": 8}, ["heads (8 against 4)"]),
    "RoPE that is not a mapping": (LLAMA | {"rope_parameters": 1.5}, LLAMA | {"rope_parameters": 2.5}, ["rope_parameters (2.5 against 1.5)"]),
    "a number that is text": ({"model_type": "odd", "vocab_size": 40}, {"model_type": "odd", "vocab_size": "40"}, ["vocab_size ('40' against 40)"]),
    "long texts with one beginning": (
        {"model_type": "odd", "rule": "a" * 100 + "b"}, {"model_type": "odd", "rule": "a" * 100 + "c"}, [f"rule (...{'a' * 20}c against ...{'a' * 20}b)"],
    ),
    "a config that transformers rejects": (LLAMA, LLAMA | {"hidden_size": "wide"}, ["hidden_size (wide against 64)"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_difference_in_meaning_is_named_with_both_values(case: str) -> None:
    one, other, said = DIFFERENT[case]
    found = ", ".join(map(str, differences(one, other)))
    assert all(text in found for text in said), found
    assert names(other, one)


def test_an_absent_field_is_told_from_null() -> None:
    assert differences({"model_type": "odd"}, {"model_type": "odd", "gate": 2})[0].ours is ABSENT


def pair_of(tmp_path: Path, base: Config, x: Config) -> dict[str, Path]:
    state = random_state(0)
    return {
        "base": save_checkpoint(tmp_path / "base", state, config=base),
        "x": save_checkpoint(tmp_path / "x", near(state, 1), config=x),
    }


def asked(made: dict[str, Path]) -> dict[str, Any]:
    source = {"model": str(made["x"]), "parameters": {"weight": 0.5}}
    return {"merge_method": "task_arithmetic", "base_model": str(made["base"]), "models": [source]}


def test_a_merge_is_refused_in_one_line_and_allowed_as_a_crime(tmp_path: Path) -> None:
    made = pair_of(tmp_path, {}, {"rope_theta": 1e6, "rms_norm_eps": 1e-5})
    with pytest.raises(PaftMergeError) as caught:
        merge(asked(made), tmp_path / "out")
    assert [one.code for one in caught.value.problems] == ["CONFIG_MISMATCH"]
    assert "rms_norm_eps (1e-05 against 1e-06), rope_parameters.rope_theta (1000000.0 against 10000.0)" in str(
        caught.value
    )
    merge(asked(made), tmp_path / "out", allow_crimes=True)


def test_a_longer_limit_is_a_warning_and_the_output_has_the_base_s(tmp_path: Path) -> None:
    made = pair_of(tmp_path, {"max_position_embeddings": 64}, {"max_position_embeddings": 128})
    with open_plan(asked(made)) as plan:
        assert [(one.code, "(128 against 64)" in one.what) for one in plan.warnings] == [("CONFIG_LIMIT", True)]


def test_configs_that_differ_in_harmless_fields_alone_need_no_transformers(tmp_path: Path) -> None:
    made = pair_of(tmp_path, {"torch_dtype": "float16"}, {"dtype": "float32", "use_cache": False, "_name_or_path": "x"})
    (tmp_path / "r.json").write_text(json.dumps(asked(made)))
    code = (
        "import json, sys; from paft_merge import merge\n"
        f"merge(json.load(open({str(tmp_path / 'r.json')!r})), {str(tmp_path / 'out')!r})\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
