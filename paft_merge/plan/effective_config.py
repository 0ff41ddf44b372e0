"""What a `config.json` means: defaults filled in by transformers' config class, one spelling for every setting.

Two configs are compared as wholes. Passed over are only the fields that change nothing that a merge keeps:

| fields | names |
|---|---|
| names and versions | `NAMES` |
| token ids of text, which belong to the tokenizer | `TOKENS`; `pad_token_id` counts where positions start from it |
| training: dropout, initialisation, losses, masking of spectrograms | `TRAINING` |
| what a call returns, caches, implementations of attention | `RUNTIME` |
| settings of generation in configs of before 2024 | `GENERATION`, unless the config class declares the field |
| labels, where one config has only `LABEL_0`, `LABEL_1`, ... | `id2label` and what follows from it |
| rules that the class has turned into a list by layer | `_RULES` |
| `tie_word_embeddings` of a nested config | the outer one decides |
| fields that neither the class nor the model's code in transformers mentions | |

`LIMITS` are longest sequences. They matter where RoPE is scaled by them, and are reported as a warning elsewhere.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

NAMES = frozenset((
    *("architectures", "auto_map", "_name_or_path", "name_or_path", "transformers_version", "_commit_hash"),
    *("model_name", "tokenizer_class", "processor_class", "unsloth_version", "unsloth_fixed", "_diffusers_version"),
    *("_use_default_values", "dtype", "torch_dtype", "quantization_config", "finetuning_task", "problem_type"),
))  # fmt: skip
TOKENS = frozenset((
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_decoder_ids", "bad_words_ids"),
))  # fmt: skip
RUNTIME = frozenset((
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "output_past", "output_scores"),
    *("return_dict", "use_return_dict", "return_dict_in_generate", "torchscript", "chunk_size_feed_forward"),
    *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    *("_experts_implementation", "_flash_attn_2_enabled", "use_flash_attn", "pretraining_tp", "use_bfloat16"),
    *("keys_to_ignore_at_inference", "gradient_checkpointing", "tf_legacy_loss", "pruned_heads", "use_mamba_kernels"),
))  # fmt: skip
GENERATION = frozenset((
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "num_return_sequences", "remove_invalid_values", "task_specific_params"),
    *("exponential_decay_length_penalty", "prefix"),
))  # fmt: skip
TRAINING = re.compile(
    r"(?!token_dropout$).*(dropout|layerdrop|drop_path|drop_rate|pdrop)|(.*_)?loss(_.*)?|.*initializer.*|.*init_(x.*_)?std"
    r"|logit_scale_init_value|mask_(time|feature)_(prob|length|min_masks)|apply_spec_augment|ctc_zero_infinity"
    r"|label_smoothing|seq_aux|aux_.*_alpha|is_training"
)
LIMITS = frozenset((
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length"),
    *("model_max_length", "max_source_positions", "max_target_positions"),
))  # fmt: skip
SIZES = frozenset((
    *("vocab_size", "unpadded_vocab_size"),
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers", "num_blocks", "layers"),
    *("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "decoder_layers", "num_decoder_layers"),
    *("decoder_num_hidden_layers", "depth", "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers"),
))  # fmt: skip
"""Numbers of layers, which slices change, and of tokens, which a tokenizer changes; tensors show them."""

_RULES = {
    "layer_types": (
        *("max_window_layers", "use_sliding_window", "sliding_window_pattern", "_sliding_window_pattern"),
        *("global_attn_every_n_layers", "full_attention_interval"),
    ),
    "no_rope_layers": ("no_rope_layer_interval",),
}
_FROM_PAD = re.compile(r"roberta|camembert|xmod|data2vec-text|longformer|mpnet|esm|ibert|lilt|layoutlmv3|luke|markuplm|xglm"
                       r"|m2m_100|nllb|fsmt|clap_text|bridgetower_text|altclip_text|speech_to_text|seamless|led")  # fmt: skip
"""Model types whose positions are counted from `pad_token_id`."""
_SCALED_BY_LENGTH = ("dynamic", "yarn", "longrope")
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_LABELS = ("id2label", "label2id", "num_labels")


class Difference(NamedTuple):
    """A field in which two configs differ, by its dotted name."""

    name: str
    theirs: Any
    ours: Any

    @property
    def leaf(self) -> str:
        """The name without the sections around it."""
        return self.name.rpartition(".")[2]

    def __str__(self) -> str:
        if isinstance(self.ours, list) and isinstance(self.theirs, list) and len(self.ours) == len(self.theirs):
            at = next(i for i, pair in enumerate(zip(self.ours, self.theirs, strict=True)) if pair[0] != pair[1])
            return f"{self.name}[{at}] ({_against(self.theirs[at], self.ours[at])})"
        return f"{self.name} ({_against(self.theirs, self.ours)})"


ABSENT = object()
"""The value of a field that a config lacks."""


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    """The fields in which two configs of a model differ in meaning; see the top of this file.

    transformers is imported only if the files themselves differ in more than fields that are passed over.
    """
    if not ours or not theirs or _plain(ours) == _plain(theirs):
        return []
    kinds = [config.get("model_type") for config in (ours, theirs)]
    if kinds[0] != kinds[1] and None not in kinds:
        return [Difference("model_type", kinds[1], kinds[0])]
    strict = "auto_map" in ours and "auto_map" in theirs
    one, other = (_effective(config, kinds[0] or kinds[1], strict) for config in (ours, theirs))
    if one is not None and other is not None:
        return _compared(one, other)
    plain = _compared(_plain(ours), _plain(theirs))  # transformers has no such class, or rejects a config
    return [one for one in plain if not (one.ours in _OFF and one.theirs in _OFF)]


_OFF = (ABSENT, None, False)


def _compared(ours: Mapping[str, Any], theirs: Mapping[str, Any], within: str = "") -> list[Difference]:
    found = list[Difference]()
    for key in dict.fromkeys((*ours, *theirs)):
        one, other = ours.get(key, ABSENT), theirs.get(key, ABSENT)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _compared(one, other, f"{within}{key}.")
        elif key == "id2label" and ABSENT in (one, other):
            continue
        elif one != other or isinstance(one, bool) != isinstance(other, bool):
            found.append(Difference(within + key, other, one))
    return found


def is_limit(found: Difference, config: Mapping[str, Any]) -> bool:
    """Whether a field is only a longest sequence in models like this one."""
    return found.leaf in LIMITS and not _scaled_by_length(config)


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether the output embeddings are the input embeddings: as a config states it, else as its class does."""
    text = config.get("text_config")
    stated = [
        one["tie_word_embeddings"] for one in (config, text) if isinstance(one, dict) and "tie_word_embeddings" in one
    ]
    made = None if stated else _effective(config, config.get("model_type"), strict=True)
    return bool(stated[0] if stated else (made or {}).get("tie_word_embeddings"))


def _scaled_by_length(config: Any) -> bool:
    """Whether a config, or one nested in it, has RoPE that depends on the longest sequence."""
    if not isinstance(config, Mapping):
        return False
    kind = config.get("rope_type", config.get("type"))
    return kind in (*_SCALED_BY_LENGTH, "su") or any(map(_scaled_by_length, config.values()))


# --- by transformers' class -------------------------------------------------------------------------------------------


def _effective(config: Mapping[str, Any], kind: object, strict: bool) -> dict[str, Any] | None:
    """The config that transformers' class makes, without what is passed over; None if it has no class or rejects it.

    Args:
        config: a `config.json`, not modified.
        kind: its `model_type`.
        strict: also keep fields that transformers does not know, because the model comes with code of its own.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    loud = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        made = CONFIG_MAPPING[kind].from_dict(_renamed_rope(copy.deepcopy(dict(config))))
        return _meaning(made, "" if strict else _code_of(made))
    except Exception:  # config classes raise anything
        return None
    finally:
        logging.set_verbosity(loud)


def _meaning(made: Any, code: str, nested: bool = False) -> dict[str, Any]:
    """A config object as plain data. `code`: the model's source; fields that it does not mention are left out."""
    from dataclasses import fields, is_dataclass

    from transformers import PreTrainedConfig

    held: dict[str, Any] = json.loads(json.dumps(made.to_dict(), default=str))
    known = {one.name for one in fields(made)} if is_dataclass(made) else set(held)
    known |= {*getattr(made, "attribute_map", {}), *getattr(made, "attribute_map", {}).values(), "model_type"}
    inner = {key: value for key in held if isinstance(value := getattr(made, key, None), PreTrainedConfig)}
    named = {key for key in held.keys() - known if not code or re.search(rf"[.\"']{re.escape(key)}\b", code)}
    result = {}
    for key, value in held.items():
        if isinstance(value, dict) and key.endswith("_config") and key not in known and key not in inner:
            result[key] = _plain(value)
        elif key in known or key in inner or (key in named and key not in GENERATION):
            result[key] = value
    result = _settled(result)
    if nested:
        result.pop("tie_word_embeddings", None)
    return result | {key: _meaning(value, code and code + _code_of(value), nested=True) for key, value in inner.items()}


def _code_of(made: Any) -> str:
    """The source of the package in transformers that a config's class is from, and of what all models share."""
    import inspect

    return _sources(Path(inspect.getfile(type(made))).parent)


@cache
def _sources(folder: Path) -> str:
    shared = [folder.parents[1] / name for name in ("modeling_rope_utils.py", "masking_utils.py", "cache_utils.py")]
    files = [*sorted(folder.glob("*.py")), *(file for file in shared if file.is_file())]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


# --- by names alone ---------------------------------------------------------------------------------------------------


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` in one spelling, without what is passed over, and without defaults."""
    held = _renamed_rope(copy.deepcopy(dict(config)))
    scaling, theta = held.pop("rope_scaling", None), held.pop("rope_theta", None)
    rope = held.get("rope_parameters") or scaling or {}
    if isinstance(rope, dict):
        rope = {"rope_type": "default", **({} if theta is None else {"rope_theta": theta}), **rope}
        held["rope_parameters"] = rope if rope != {"rope_type": "default"} else None
    else:  # not a mapping, which every config class rejects
        held["rope_parameters"] = rope
    result = {key: value for key, value in held.items() if key not in GENERATION}
    for key, value in result.items():
        if key.endswith("_config") and isinstance(value, dict):
            result[key] = _plain(value)
    return _settled(result)


def _settled(held: dict[str, Any]) -> dict[str, Any]:
    """The fields of one section that count, in one spelling."""
    skipped = NAMES | RUNTIME | TOKENS
    if _FROM_PAD.search(str(held.get("model_type"))):
        skipped -= {"pad_token_id"}
    found = {k: v for k, v in held.items() if k not in skipped and not TRAINING.fullmatch(k)}
    labels = found.get("id2label")
    named = isinstance(labels, dict) and any(value != f"LABEL_{key}" for key, value in labels.items())
    for key in _LABELS[0 if not named else 1 :]:
        found.pop(key, None)
    for by_layer, rules in _RULES.items():
        if isinstance(found.get(by_layer), list):
            found = {key: value for key, value in found.items() if key not in rules}
    kinds = found.get("layer_types")
    if found.get("use_sliding_window") is False or (isinstance(kinds, list) and set(kinds) == {"full_attention"}):
        found = {
            k: v for k, v in found.items() if k not in ("sliding_window", "max_window_layers", "use_sliding_window")
        }
    if "rope_parameters" in found:
        found["rope_parameters"] = _rope(found["rope_parameters"])
    heads = found.get("num_attention_heads", found.get("n_head"))
    width = found.get("hidden_size", found.get("n_embd"))
    if isinstance(heads, int) and heads:
        if found.get("head_dim") is None and isinstance(width, int):
            found["head_dim"] = width // heads
        if "num_key_value_heads" in found and found["num_key_value_heads"] is None:
            found["num_key_value_heads"] = heads
    return found


def _rope(held: Any) -> Any:
    """RoPE in one spelling: without `type`, nulls, and values that its kind does not use."""
    if not isinstance(held, dict):
        return held
    if any(isinstance(value, dict) for value in held.values()):  # one for each kind of layer
        return {key: _rope(value) for key, value in held.items() if key != "rope_theta"}
    kind = held.get("rope_type", held.get("type", "default"))
    unused = {"type", "finetuned"} | ({"original_max_position_embeddings"} if kind in ("default", "linear") else set())
    unused |= {"factor"} if kind == "default" else set()
    defaults = _YARN if kind == "yarn" else {}
    return {**defaults, **{key: value for key, value in held.items() if key not in unused and value is not None}}


def _renamed_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Write `rope_type` for `type`, `longrope` for `su` and `default` for `mrope`, in a config and those nested in it."""
    for key, value in config.items():
        if not isinstance(value, dict):
            continue
        if key in ("rope_scaling", "rope_parameters") and ("type" in value or "rope_type" in value):
            kind = value.get("rope_type", value.get("type"))
            renamed = {"su": "longrope", "mrope": "default"}.get(str(kind), kind)
            value.pop("type", None)
            value["rope_type"] = renamed
        else:
            _renamed_rope(value)
    return config


def _against(*values: Any) -> str:
    """Two values that differ: with quotes where they read the same without them, and from their difference on where they are long."""
    texts = ["not set" if value is ABSENT else str(value) for value in values]
    if len(set(texts)) == 1:
        texts = ["not set" if value is ABSENT else repr(value) for value in values]
    equal = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    if equal > 60:
        texts = [f"...{text[equal - 20 :]}" for text in texts]
    return " against ".join(text if len(text) <= 80 else f"{text[:77]}..." for text in texts)
