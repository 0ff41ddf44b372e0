"""What a merge changes in `config.json`: the dtype, a vocabulary that grew, a tie that was cut, layers that moved."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from paft_merge.errors import Problem, Problems
from paft_merge.plan.places import Places, Renumbered
from paft_merge.plan.planned import PlannedTensor
from paft_merge.plan.stacks import Path, value_at
from paft_merge.recipe import Recipe

_INDEX_LISTS = {
    "mlp_only_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs", "moe_layers", "deepstack_visual_indexes",
    "fullatt_block_indexes", "global_attn_indexes", "global_attn_layers", "attention_layers_idx", "hybrid_layer_ids",
}  # fmt: skip
"""Lists of the numbers of layers; every other list that counts as a layer list has one entry a layer."""

_NEVER_BY_LAYER = {
    "architectures", "eos_token_id", "pad_token_id", "bos_token_id", "mrope_section", "image_grid_pinpoints", "quantization_config",
}  # fmt: skip
_BY_RULE = (
    "sliding_window_pattern", "full_attention_interval", "attn_layer_period", "expert_layer_period", "decoder_sparse_step",
    "first_k_dense_replace", "moe_layer_frequency", "interleave_moe_layer_step", "no_rope_layer_interval", "num_kv_shared_layers",
)  # fmt: skip
"""Whole numbers from which a model derives what kind its layers are."""


def config_changes(
    recipe: Recipe, places: Places, tensors: Sequence[PlannedTensor], problems: Problems, allow_crimes: bool
) -> dict[str, Any]:
    """The keys of the donor's config that change, with their new values; what cannot be said in a config is noted."""
    config, old = places.donor.checkpoint.config, places.donor.checkpoint.tensors
    dtype = recipe.out_dtype or recipe.dtype
    grown = [t for t in tensors if t.name in old and t.shape[1:] == old[t.name].shape[1:]]
    rows = {old[t.name].shape[:1]: t.shape[0] for t in grown if t.shape != old[t.name].shape}
    makings = [making for _, makings in places.makings for making in makings]
    untied = any(making.untied for making in makings)
    changes = _changes(config, dtype, {count: new for (count,), new in rows.items()}, untied)
    if dtype and not {"dtype", "torch_dtype"} & config.keys():
        changes["dtype"] = dtype
    if any(model.adapter.unties for making in makings for model in making.all_models if model.adapter):
        changes["tie_word_embeddings"] = False
    for renumbered in places.renumbered:
        changes = _with_layers(config, changes, renumbered, places, problems, allow_crimes)
    return changes


def _changes(config: Mapping[str, Any], dtype: str | None, rows: Mapping[int, int], untied: bool) -> dict[str, Any]:
    """What has to change in a config, and in the configs inside it; `rows`: an embedding's rows before and after."""
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            new: Any = dtype or value
        elif key == "vocab_size":
            new = rows.get(value, value)
        elif key == "tie_word_embeddings":
            new = value and not untied
        elif key.endswith("_config") and isinstance(value, Mapping):
            new = {**value, **_changes(value, dtype, rows, untied)}
        else:
            continue
        if new != value:
            changes[key] = new
    return changes


def _with_layers(
    config: Mapping[str, Any],
    changes: dict[str, Any],
    renumbered: Renumbered,
    places: Places,
    problems: Problems,
    allow_crimes: bool,
) -> dict[str, Any]:
    """`changes`, with the number of layers and every list that has one entry a layer as the output's layers want them."""
    stack, layers = renumbered.stack, renumbered.layers
    result = copy.deepcopy(changes)
    for path in stack.keys:
        _put(result, config, path, len(layers))
    for section in dict.fromkeys(path[:-1] for path in stack.keys):
        held = value_at(config, section) if section else config
        for key, value in held.items():
            if key in _INDEX_LISTS and isinstance(value, list):
                lists = [value_at(c.config, (*section, key)) or [] for c, _ in layers]
                kept = [i for i, ((_, at), own) in enumerate(zip(layers, lists, strict=True)) if at in own]
                _put(result, config, (*section, key), kept)
            elif _is_by_layer(key, value, stack.count):
                own = [_entry(c.config, (*section, key), at) for c, at in layers]
                _put(result, config, (*section, key), "".join(own) if isinstance(value, str) else own)
            elif key in _BY_RULE and isinstance(value, int) and value > 1 and not held.get("layer_types"):
                _tell_rule(key, value, renumbered, places)
    if not allow_crimes:
        _check_kinds(stack.keys, renumbered, places, problems)
    return result


def _is_by_layer(key: str, value: Any, count: int) -> bool:
    """Whether a value has one entry a layer: a list as long as the stack, or a text of one letter a layer."""
    if isinstance(value, str):
        return "pattern" in key and len(value) == count and count > 1
    if not isinstance(value, list) or len(value) != count or key in _NEVER_BY_LAYER:
        return False
    return count > 4 or any(word in key for word in ("layer", "pattern", "types", "block"))


def _entry(config: Mapping[str, Any], path: Path, at: int) -> Any:
    """What a config says of one layer."""
    value = value_at(config, path)
    return value[at] if isinstance(value, list | str) and at < len(value) else None


def _put(changes: dict[str, Any], config: Mapping[str, Any], path: Path, value: Any) -> None:
    """Set what lies at `path`, inside a copy of the config's own section."""
    if len(path) == 1:
        if config.get(path[0]) != value:
            changes[path[0]] = value
        return
    section = {**config[path[0]], **changes.get(path[0], {})}
    _put(section, config[path[0]], path[1:], value)
    changes[path[0]] = section


def _tell_rule(key: str, value: int, renumbered: Renumbered, places: Places) -> None:
    if any(i % value != at % value for i, (_, at) in enumerate(renumbered.layers)):
        what = f"{key}: {value} tells which kind every layer is by its number, and layers change their numbers here"
        fix = "take layers in multiples of it, or write layer_types into the config"
        places.warnings.append(Problem("LAYER_KINDS", places.donor.ref, what, fix))


def _check_kinds(keys: Sequence[Path], renumbered: Renumbered, places: Places, problems: Problems) -> None:
    """Layers that a slice pairs must be of one kind where the configs tell kinds by layer."""
    for _, makings in places.makings:
        for making in makings:
            ranges = [(places.models[s.ref], s.layers) for s in making.output.sources if s.layers]
            for section in dict.fromkeys(path[:-1] for path in keys):
                lists = [value_at(model.checkpoint.config, (*section, "layer_types")) for model, _ in ranges]
                parts = [own[span[0] : span[1]] for own, (_, span) in zip(lists, ranges, strict=True) if own]
                if any(part != parts[0] for part in parts):
                    what = f"the sources' layers are of different kinds: {' against '.join(map(_short, parts[:2]))}"
                    fix = "pair layers of one kind, or pass --allow-crimes"
                    problems.add("CONFIG_MISMATCH", making.output.spot, what, fix)


def _short(kinds: Sequence[str]) -> str:
    return ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "")
