"""The kind of each layer (attention, positions, dense or experts) from a config's lists and rules, as transformers reads them.

Some configs list the kinds layer by layer, and a merge moves the entries of such lists with the layers. Others have a rule,
such as every sixth layer, or leave the kinds to the class of the config.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

INDEX_LISTS = frozenset({
    "mlp_only_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs", "moe_layers", "deepstack_visual_indexes",
    "fullatt_block_indexes", "global_attn_indexes", "global_attn_layers", "attention_layers_idx", "hybrid_layer_ids",
    "local_layer_ids", "ple_layer_ids", "window_block_indices", "residual_block_indices", "global_attention_blocks",
    "rope_scaling_layers", "intermediate_layers_indices",
})  # fmt: skip
"""Lists of layer numbers. Every other list by layer has one entry for each layer."""

_NEVER_BY_LAYER = {
    "architectures", "eos_token_id", "pad_token_id", "bos_token_id", "mrope_section", "image_grid_pinpoints", "quantization_config",
    "mlp_multipliers", "ssm_multipliers", "suppress_tokens", "begin_suppress_tokens", "keys_to_ignore_at_inference",
}  # fmt: skip
_WORDS = ("layer", "pattern", "type", "block", "window")

CYCLES = frozenset({"block_types"})
"""Lists that repeat until every layer has an entry."""
NESTED = frozenset({"attention_types"})
"""GPT-Neo's `[[kinds, times], ...]`."""


def is_by_layer(key: str, value: Any, count: int) -> bool:
    """Whether a value has one entry for each layer: a list as long as the stack, or a text with one letter for each."""
    if isinstance(value, str):
        return "pattern" in key and len(value) == count and count > 1
    if not isinstance(value, list | tuple) or len(value) != count or key in _NEVER_BY_LAYER:
        return False
    return count > 4 or any(word in key for word in _WORDS)


def unrolled(key: str, value: Any, count: int) -> list[Any] | None:
    """A list of `CYCLES` or `NESTED` with one entry for each layer; None for any other value."""
    if not isinstance(value, list) or not value:
        return None
    if key in CYCLES:
        return [value[i % len(value)] for i in range(count)]
    if key in NESTED:
        return [kind for kinds, times in value for _ in range(times) for kind in kinds]
    return None


def rolled(key: str, kinds: list[Any]) -> list[Any]:
    """The inverse of `unrolled`: the shortest period of `kinds`, in the form that `key` has."""
    count = len(kinds)
    period = next(p for p in range(1, count + 1) if count % p == 0 and kinds == kinds[:p] * (count // p))
    return [[kinds[:period], count // period]] if key in NESTED else kinds[:period]


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A config key from which transformers derives the kinds of layers."""

    by: Literal["period", "from", "until", "last", "number"]
    """`period`: the place in a period of `value` layers; `from`, `until`: whether the number is at least, at most `value`;
    `last`: whether the layer is among the last `value`; `number`: every layer is different."""
    listed: str = ""
    """The list that overrides the rule where a config has it."""
    structural: bool = False
    """Whether layers of different kinds have different tensors."""

    def kind(self, i: int, n: int, value: int) -> int:
        """The kind of layer `i` of `n` where the key has this value; equal kinds have equal numbers."""
        kinds = {"period": i % value, "from": i >= value, "until": i <= value, "last": i >= n - value, "number": i}
        return kinds[self.by]


RULES = {
    "sliding_window_pattern": Rule("period", "layer_types"),
    "global_attn_every_n_layers": Rule("period", "layer_types"),
    "full_attention_interval": Rule("period", "layer_types", structural=True),
    "layer_group_size": Rule("period", "layer_types", structural=True),
    "no_rope_layer_interval": Rule("period", "no_rope_layers"),
    "attn_layer_period": Rule("period", "layers_block_type", structural=True),
    "expert_layer_period": Rule("period", "layers_num_experts", structural=True),
    "decoder_sparse_step": Rule("period", structural=True),
    "encoder_sparse_step": Rule("period", structural=True),
    "moe_layer_freq": Rule("period", structural=True),
    "moe_layer_frequency": Rule("period", structural=True),
    "moe_layer_interval": Rule("period", structural=True),
    "interleave_moe_layer_step": Rule("period", "moe_layers", structural=True),
    "cross_layer_interval": Rule("period"),
    "cross_attention_frequency": Rule("period", structural=True),
    "n_layers_per_attn_res_block": Rule("period"),
    "num_mem_blocks": Rule("period"),
    "first_k_dense_replace": Rule("from", "mlp_layer_types", structural=True),
    "num_dense_layers": Rule("from", "mlp_layer_types", structural=True),
    "moe_layer_start_index": Rule("from", structural=True),
    "moe_layer_end_index": Rule("until", structural=True),
    "num_kv_shared_layers": Rule("last"),
    "scale_attn_by_inverse_layer_idx": Rule("number"),
}
"""Every known rule by its config key. A rule of value 0, or of another type than int, does not apply."""


def rules_in(config: Mapping[str, Any], settled: Collection[str], *, structural: bool) -> dict[str, int]:
    """The rules that apply to a config, with their values.

    Args:
        config: the config.
        settled: lists that are known to be right, which their rules need not confirm.
        structural: the rules whose kinds differ in their tensors, or the others.
    """
    rules = {key: rule for key, rule in RULES.items() if rule.structural == structural and key in config}
    open_rules = [key for key, rule in rules.items() if rule.listed not in settled and not config.get(rule.listed)]
    return {key: config[key] for key in open_rules if isinstance(config[key], int) and config[key] > 0}


def kinds_at(rules: Mapping[str, int], i: int, n: int) -> dict[str, Any]:
    """The kind of layer `i` of `n` by each rule."""
    return {key: RULES[key].kind(i, n, value) for key, value in rules.items()}


def entries_of(config: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """For each of `count` layers its entry in every list of a config."""
    found: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, value in config.items():
        own = unrolled(key, value, count)
        if key in INDEX_LISTS and isinstance(value, list):
            is_by_flag = len(value) == count and all(isinstance(one, bool) for one in value)  # as `lists_of` has it
            own = value if is_by_flag else [i in value for i in range(count)]
        elif own is None and is_by_layer(key, value, count):
            own = list(value)
        for entries, entry in zip(found, own or (), strict=False):
            entries[key] = entry
    return found


# --- lists as transformers reads them --------------------------------------------------------------------------------

_PLAIN = {"llama", "mistral", "mixtral", "phi3", "gpt2", "gpt_neox", "opt", "bert", "falcon", "stablelm"}
"""Models whose layers are all of one kind, for which the import of transformers (seconds) is skipped."""
_DERIVED = ("layer_types", "layers_block_type", "layers_num_experts")
"""Lists that some config classes compute as properties."""


class UnreadableError(Exception):
    """transformers rejects a config."""


def lists_of(config: Mapping[str, Any], count: int) -> dict[str, list[Any]] | None:
    """The lists by layer that transformers' config class makes of a config of `count` layers.

    Returns:
        Each list with one entry for each layer; of a list of layer numbers, whether it has the layer. None for a model
        type that transformers does not know, or that has layers of one kind only.

    Raises:
        UnreadableError: the class rejects the config.
    """
    kind = config.get("model_type")
    if kind is None or kind in _PLAIN:
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        return None
    try:
        made = CONFIG_MAPPING[kind].from_dict(_with_floats(dict(config)))
        held = {**{name: getattr(made, name, None) for name in _DERIVED}, **vars(made)}
    except Exception as error:  # config classes raise anything
        raise UnreadableError(" ".join(str(error).split())) from error
    found: dict[str, list[Any]] = {}
    for key, value in held.items():
        if key in INDEX_LISTS and isinstance(value, list | tuple):
            found[key] = [i in value for i in range(count)]
        elif is_by_layer(key, value, count) and not isinstance(value, str) and key not in CYCLES | NESTED:
            found[key] = list(value)
    return found


def is_computed(model_type: str, key: str) -> bool:
    """Whether transformers computes a list from other keys and ignores it in a config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return isinstance(getattr(CONFIG_MAPPING[model_type], key, None), property)


def _with_floats(value: Any) -> Any:
    """Replace `{"__float__": "Infinity"}`, as transformers writes infinities, by a float."""
    if isinstance(value, dict):
        return (
            float(value["__float__"])
            if value.keys() == {"__float__"}
            else {k: _with_floats(v) for k, v in value.items()}
        )
    return [_with_floats(one) for one in value] if isinstance(value, list) else value


def as_written(key: str, entries: list[Any]) -> list[Any]:
    """A list of `lists_of` in the form that a config has."""
    return [i for i, held in enumerate(entries) if held] if key in INDEX_LISTS else entries
