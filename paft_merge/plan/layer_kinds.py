"""Which kind a layer is by its number: what a config says in lists, in rules, and what transformers makes of both.

Sliding or full attention, with or without rotary positions, dense or with experts: some configs list it layer by layer, and
those lists follow the layers. Some have a rule instead (every sixth layer), or leave it to the class of the config.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

INDEX_LISTS = frozenset({
    "mlp_only_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs", "moe_layers", "deepstack_visual_indexes",
    "fullatt_block_indexes", "global_attn_indexes", "global_attn_layers", "attention_layers_idx", "hybrid_layer_ids",
    "local_layer_ids", "ple_layer_ids", "window_block_indices", "residual_block_indices", "global_attention_blocks",
    "rope_scaling_layers", "intermediate_layers_indices",
})  # fmt: skip
"""Lists of the numbers of layers; every other list that counts as a layer list has one entry a layer."""

_NEVER_BY_LAYER = {
    "architectures", "eos_token_id", "pad_token_id", "bos_token_id", "mrope_section", "image_grid_pinpoints", "quantization_config",
    "mlp_multipliers", "ssm_multipliers", "suppress_tokens", "begin_suppress_tokens", "keys_to_ignore_at_inference",
}  # fmt: skip
_WORDS = ("layer", "pattern", "type", "block", "window")

CYCLES = frozenset({"block_types"})
"""Lists that begin again at their end."""
NESTED = frozenset({"attention_types"})
"""GPT-Neo's `[[kinds, times], ...]`."""


def is_by_layer(key: str, value: Any, count: int) -> bool:
    """Whether a value has one entry a layer: a list as long as the stack, or a text of one letter a layer."""
    if isinstance(value, str):
        return "pattern" in key and len(value) == count and count > 1
    if not isinstance(value, list | tuple) or len(value) != count or key in _NEVER_BY_LAYER:
        return False
    return count > 4 or any(word in key for word in _WORDS)


def unrolled(key: str, value: Any, count: int) -> list[Any] | None:
    """A list that says a layer's kind in another way than by its place, as one entry a layer; None for all others."""
    if not isinstance(value, list) or not value:
        return None
    if key in CYCLES:
        return [value[i % len(value)] for i in range(count)]
    if key in NESTED:
        return [kind for kinds, times in value for _ in range(times) for kind in kinds]
    return None


def rolled(key: str, kinds: list[Any]) -> list[Any]:
    """The inverse of `unrolled`: `kinds` by their shortest period, in the form of `key`."""
    count = len(kinds)
    period = next(p for p in range(1, count + 1) if count % p == 0 and kinds == kinds[:p] * (count // p))
    return [[kinds[:period], count // period]] if key in NESTED else kinds[:period]


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A key from which a model derives what kind its layers are."""

    kind: Callable[[int, int, int], Any]
    """(layer, layers in all, value of the key) -> the kind"""
    listed: str = ""
    """The list that says the same, and wins where there is one."""
    structural: bool = False
    """The kinds differ in their tensors, so that these tell whether a layer is in the right place."""


def _every(i: int, n: int, value: int) -> int:
    return i % value


def _from(i: int, n: int, value: int) -> bool:
    return i >= value


def _until(i: int, n: int, value: int) -> bool:
    return i <= value


def _last(i: int, n: int, value: int) -> bool:
    return i >= n - value


def _number(i: int, n: int, value: int) -> int:
    return i


RULES = {
    "sliding_window_pattern": Rule(_every, "layer_types"),
    "global_attn_every_n_layers": Rule(_every, "layer_types"),
    "full_attention_interval": Rule(_every, "layer_types", structural=True),
    "layer_group_size": Rule(_every, "layer_types", structural=True),
    "no_rope_layer_interval": Rule(_every, "no_rope_layers"),
    "attn_layer_period": Rule(_every, "layers_block_type", structural=True),
    "expert_layer_period": Rule(_every, "layers_num_experts", structural=True),
    "decoder_sparse_step": Rule(_every, structural=True),
    "encoder_sparse_step": Rule(_every, structural=True),
    "moe_layer_freq": Rule(_every, structural=True),
    "moe_layer_frequency": Rule(_every, structural=True),
    "moe_layer_interval": Rule(_every, structural=True),
    "interleave_moe_layer_step": Rule(_every, "moe_layers", structural=True),
    "cross_layer_interval": Rule(_every),
    "cross_attention_frequency": Rule(_every, structural=True),
    "n_layers_per_attn_res_block": Rule(_every),
    "num_mem_blocks": Rule(_every),
    "first_k_dense_replace": Rule(_from, "mlp_layer_types", structural=True),
    "num_dense_layers": Rule(_from, "mlp_layer_types", structural=True),
    "moe_layer_start_index": Rule(_from, structural=True),
    "moe_layer_end_index": Rule(_until, structural=True),
    "num_kv_shared_layers": Rule(_last),
    "scale_attn_by_inverse_layer_idx": Rule(_number),
}


def rules_in(config: Mapping[str, Any], settled: Collection[str], *, structural: bool) -> dict[str, int]:
    """The rules of a config that hold, with their values; `settled`: lists of which it is known that they are right."""
    found = {key: config.get(key) for key, rule in RULES.items() if rule.structural == structural}
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, int)
        and value > 0
        and RULES[key].listed not in settled
        and not config.get(RULES[key].listed)
    }


def kinds_at(rules: Mapping[str, int], i: int, n: int) -> dict[str, Any]:
    """What each rule says of layer `i` of `n`."""
    return {key: RULES[key].kind(i, n, value) for key, value in rules.items()}


def entries_of(config: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """For each of `count` layers what the lists of a config say of it."""
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


# --- what transformers makes of a config ------------------------------------------------------------------------------

_PLAIN = {"llama", "mistral", "mixtral", "phi3", "gpt2", "gpt_neox", "opt", "bert", "falcon", "stablelm"}
"""Models whose layers are of one kind: nothing to ask, and transformers takes seconds to import."""
_DERIVED = ("layer_types", "layers_block_type", "layers_num_experts")
"""Lists that some configs compute when they are asked."""


class UnreadableError(Exception):
    """transformers refuses a config."""


def lists_of(config: Mapping[str, Any], count: int) -> dict[str, list[Any]] | None:
    """What transformers' own class says of every layer, for a config of `count` layers, by the name of the list.

    Returns:
        One entry a layer each, lists of numbers as a bool a layer; None for a model that it does not know.

    Raises:
        UnreadableError: the class refuses the config.
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
    except Exception as error:  # whatever a config's own checks raise
        raise UnreadableError(" ".join(str(error).split())) from error
    found: dict[str, list[Any]] = {}
    for key, value in held.items():
        if key in INDEX_LISTS and isinstance(value, list | tuple):
            found[key] = [i in value for i in range(count)]
        elif is_by_layer(key, value, count) and not isinstance(value, str) and key not in CYCLES | NESTED:
            found[key] = list(value)
    return found


def is_computed(model_type: str, key: str) -> bool:
    """Whether transformers computes a list from other keys, so that a config cannot state it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return isinstance(getattr(CONFIG_MAPPING[model_type], key, None), property)


def _with_floats(value: Any) -> Any:
    """The infinities that transformers writes as `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        return (
            float(value["__float__"])
            if value.keys() == {"__float__"}
            else {k: _with_floats(v) for k, v in value.items()}
        )
    return [_with_floats(one) for one in value] if isinstance(value, list) else value


def as_written(key: str, entries: list[Any]) -> list[Any]:
    """A list of `lists_of` as a config has it."""
    return [i for i, held in enumerate(entries) if held] if key in INDEX_LISTS else entries
