"""The keys of `config.json` that a merge changes: dtype, vocabulary size, tied embeddings, and values given by layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from paft_merge.errors import Problem, Problems
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.plan import layer_kinds
from paft_merge.plan.layer_stacks import Path, count_place, stacks_of, tails_of, value_at
from paft_merge.plan.output_tensors import OutputTensors, Renumbered
from paft_merge.plan.planned import PlannedTensor
from paft_merge.recipe import Recipe


def config_changes(
    recipe: Recipe,
    outputs: OutputTensors,
    tensors: Sequence[PlannedTensor],
    problems: Problems,
    allow_crimes: bool,
    truncated: Mapping[int, int],
) -> dict[str, Any]:
    """The keys of the config source's config that change, with their new values.

    Args:
        recipe: the recipe of the merge.
        outputs: iterated to the end, so that its renumbered layers are known.
        tensors: every planned tensor.
        problems: receives what the output's config cannot express.
        allow_crimes: turn those problems into warnings.
        truncated: the new number of embedding rows, by each old one, where embeddings are cut.
    """
    config, old = outputs.config_source.checkpoint.config, outputs.config_source.checkpoint.tensors
    dtype = recipe.out_dtype or recipe.dtype
    grown = [t for t in tensors if t.name in old and t.shape[1:] == old[t.name].shape[1:]]
    rows = {old[t.name].shape[:1]: t.shape[0] for t in grown if t.shape != old[t.name].shape}
    slices = [slice_ for _, slices in outputs.modules for slice_ in slices]
    untied = any(slice_.untied for slice_ in slices)
    changes = _changes(config, dtype, {**truncated, **{count: new for (count,), new in rows.items()}}, untied)
    if dtype and not {"dtype", "torch_dtype"} & config.keys():
        changes["dtype"] = dtype
    if any(model.adapter.unties for slice_ in slices for model in slice_.all_models if model.adapter):
        changes["tie_word_embeddings"] = False
    for renumbered in outputs.renumbered:
        changes = _with_layers(config, changes, renumbered, outputs, problems, allow_crimes)
    return changes


def _changes(config: Mapping[str, Any], dtype: str | None, rows: Mapping[int, int], untied: bool) -> dict[str, Any]:
    """The changed keys of a config and of those nested in it; `rows`: new numbers of embedding rows by old ones."""
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            new: Any = dtype or value
        elif key == "vocab_size":
            new = rows.get(value, value) if isinstance(value, int) else value
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
    outputs: OutputTensors,
    problems: Problems,
    allow_crimes: bool,
) -> dict[str, Any]:
    """`changes`, with the number of layers and every value given by layer adapted to the output's layers."""
    stack, layers = renumbered.stack, renumbered.layers
    result = copy.deepcopy(changes)
    for path in _counted_at(config, renumbered, outputs):
        _put(result, config, path, len(layers))
    if ("num_decoder_layers",) not in stack.keys and _shares_its_count(config, renumbered, outputs):
        result.setdefault("num_decoder_layers", stack.count)  # T5 states one number for both sides
    faults, own = list[Problem](), count_place(config, stack.prefix)
    for section in dict.fromkeys(path[:-1] for path in stack.keys or [own]):
        for key, value in _section(config, section).items():
            new = _followed(key, value, section, renumbered)
            if new is not None:
                _put(result, config, (*section, key), new)
        if not stack.keys and renumbered.moved and result == changes:
            _put(result, config, own, len(layers))  # the config relied on the default of its class
        if renumbered.moved:
            faults += _keep_kinds(config, result, section, renumbered, outputs)
    (outputs.warnings if allow_crimes else problems.found).extend(faults)
    if not allow_crimes:
        _check_kinds(stack.keys, renumbered, outputs, problems)
    return result


def _counted_at(config: Mapping[str, Any], renumbered: Renumbered, outputs: OutputTensors) -> Sequence[Path]:
    """Where the config states the new number of layers."""
    if _shares_its_count(config, renumbered, outputs) and "decoder" in renumbered.stack.prefix.split("."):
        return [("num_decoder_layers",)]
    return renumbered.stack.keys


def _shares_its_count(config: Mapping[str, Any], renumbered: Renumbered, outputs: OutputTensors) -> bool:
    """Whether one key counts the layers of both encoder and decoder, so that a second one is needed."""
    stacks = stacks_of(outputs.config_source.checkpoint.tensors)
    sides = {side for prefix in stacks for side in ("encoder", "decoder") if side in prefix.split(".")}
    return renumbered.stack.keys == (("num_layers",),) and len(sides) == 2 and config.get("num_decoder_layers") is None


def _followed(key: str, value: Any, section: Path, renumbered: Renumbered) -> Any:
    """The new value of a config key that describes single layers; None for any other key."""
    stack, layers = renumbered.stack, renumbered.layers
    if key in layer_kinds.INDEX_LISTS and isinstance(value, list):
        lists = [value_at(c.config, (*section, key)) or [] for c, _ in layers]
        return [i for i, ((_, at), own) in enumerate(zip(layers, lists, strict=True)) if at in own]
    if layer_kinds.unrolled(key, value, stack.count):
        lists = [layer_kinds.unrolled(key, value_at(c.config, (*section, key)), at + 1) or [] for c, at in layers]
        own = [one[at] if at < len(one) else None for one, (_, at) in zip(lists, layers, strict=True)]
        return layer_kinds.rolled(key, own)
    if layer_kinds.is_by_layer(key, value, stack.count):
        own = [_entry(c.config, (*section, key), at) for c, at in layers]
        return "".join(map(str, own)) if isinstance(value, str) else own
    return None


def _entry(config: Mapping[str, Any], path: Path, at: int) -> Any:
    """The entry of one layer in a value with one entry for each layer."""
    value = value_at(config, path)
    return value[at] if isinstance(value, list | str) and at < len(value) else None


def _put(changes: dict[str, Any], config: Mapping[str, Any], path: Path, value: Any) -> None:
    """Set the value at `path`, in a copy of the config's nested section."""
    if len(path) == 1:
        if config.get(path[0]) != value:
            changes[path[0]] = value
        return
    section = {**config[path[0]], **changes.get(path[0], {})}
    _put(section, config[path[0]], path[1:], value)
    changes[path[0]] = section


def _keep_kinds(
    config: Mapping[str, Any], changes: dict[str, Any], section: Path, renumbered: Renumbered, outputs: OutputTensors
) -> list[Problem]:
    """Make transformers see every layer as the kind it was, if necessary by adding lists to `changes`.

    Returns:
        The kinds that neither a list nor a rule can express.
    """
    count = len(renumbered.layers)
    merged = _section({**config, **changes}, section)
    wanted = _wanted(section, renumbered)
    try:
        lists = layer_kinds.lists_of(merged, count) or {}
    except layer_kinds.UnreadableError:
        lists = {}
    added, faults = _lists_to_add(merged, {k: own for k, own in wanted.items() if lists.get(k) != own}, count)
    for key, value in added.items():
        _put(changes, config, (*section, key), value)
    faults += _broken(merged, wanted, renumbered)
    faults = faults or _misplaced(_section({**config, **changes}, section), wanted, section, renumbered, outputs)[:1]
    fix = "keep the kinds of layers where they were, or pass allow_crimes=True"
    return [Problem("LAYER_KINDS", outputs.config_source.ref, what, fix) for what in faults]


def _lists_to_add(
    merged: Mapping[str, Any], lacking: Mapping[str, list[Any]], count: int
) -> tuple[dict[str, Any], list[str]]:
    """The lists with which transformers reads a config of `count` layers as `lacking`, and why that fails."""
    kind = merged.get("model_type")
    if fixed := [key for key in lacking if layer_kinds.is_computed(str(kind), key)]:
        return {}, [f"{kind} derives {', '.join(fixed)} from the numbers of layers, which change here"]
    added = {key: layer_kinds.as_written(key, own) for key, own in lacking.items()}
    if not added:
        return {}, []
    try:
        found = layer_kinds.lists_of({**merged, **added}, count) or {}
    except layer_kinds.UnreadableError as error:
        return added, [f"transformers rejects the config of these layers: {error}"]
    wrong = [key for key, own in lacking.items() if found.get(key) != own]
    return added, [f"{kind} derives {', '.join(wrong)} differently from the layers' own models"] if wrong else []


def _broken(merged: Mapping[str, Any], settled: Mapping[str, Any], renumbered: Renumbered) -> list[str]:
    """Rules by which a layer's kind changes with its number, among kinds that have the same tensors."""
    rules = layer_kinds.rules_in(merged, settled, structural=False)
    found: dict[str, str] = {}
    for i, (checkpoint, at) in enumerate(renumbered.layers):
        now = layer_kinds.kinds_at(rules, i, len(renumbered.layers))
        was = layer_kinds.kinds_at(rules, at, renumbered.count_of(checkpoint))
        for key in (key for key in rules if now[key] != was[key]):
            what = f"{key}: {rules[key]} sets a layer's kind by its number, and layer {at} becomes layer {i}"
            found.setdefault(key, what)
    return list(found.values())


def _misplaced(
    merged: Mapping[str, Any], settled: Mapping[str, Any], section: Path, renumbered: Renumbered, outputs: OutputTensors
) -> list[str]:
    """Layers whose tensors differ from those that the config source has in layers of the same kind."""
    source, layers = outputs.config_source.checkpoint, renumbered.layers
    tails = {
        id(c): tails_of(c.tensors, renumbered.stacks[id(c)].prefix)
        for c in dict.fromkeys([source, *(c for c, _ in layers)])
    }
    own = tails[id(source)]
    if all(tails[id(c)][at] == own[0] for c, at in layers) and all(one == own[0] for one in own.values()):
        return []
    rules = layer_kinds.rules_in(merged, settled, structural=True)
    held, count = _section(source.config, section), renumbered.stack.count
    lists = layer_kinds.lists_of(held, count) or {} if settled else {}
    before = _described(rules, {**held, **lists}, count)
    after = _described(rules, {**merged, **settled}, len(layers))
    why = ", ".join(f"{key}: {value}" for key, value in rules.items()) or "the config does not explain why"
    faults = []
    for i, (checkpoint, at) in enumerate(layers):
        alike = [j for j, layer in enumerate(before) if _is_alike(layer, after[i])]
        like = i if i in alike else alike[-1] if alike else None
        if like is None or tails[id(checkpoint)][at] != own[like]:
            faults.append(f"layer {at} cannot become layer {i}, because the model has other tensors there ({why})")
    return faults


_Described = tuple[dict[str, Any], dict[str, Any]]
"""A layer's kind by every rule, and its entry in every list."""


def _described(rules: Mapping[str, int], config: Mapping[str, Any], count: int) -> list[_Described]:
    kinds = [layer_kinds.kinds_at(rules, i, count) for i in range(count)]
    return list(zip(kinds, layer_kinds.entries_of(config, count), strict=True))


def _is_alike(old: _Described, new: _Described) -> bool:
    """Whether two layers are of one kind by the rules and by every list that both configs have."""
    return old[0] == new[0] and all(new[1][key] == entry for key, entry in old[1].items() if key in new[1])


def _section(config: Mapping[str, Any], section: Path) -> Mapping[str, Any]:
    return (value_at(config, section) or {}) if section else config


def _wanted(section: Path, renumbered: Renumbered) -> dict[str, list[Any]]:
    """The output layers' entries, by their own models, of every list that transformers has for all the models."""
    known: dict[int, dict[str, list[Any]]] = {}
    for checkpoint, _ in renumbered.layers:
        if id(checkpoint) not in known:
            try:
                own = layer_kinds.lists_of(_section(checkpoint.config, section), renumbered.count_of(checkpoint))
            except layer_kinds.UnreadableError:  # an old form, which transformers cannot load either
                return {}
            known[id(checkpoint)] = own or {}
    keys = [key for key in next(iter(known.values())) if all(key in lists for lists in known.values())]
    return {key: [known[id(c)][key][at] for c, at in renumbered.layers] for key in keys}


def _check_kinds(keys: Sequence[Path], renumbered: Renumbered, outputs: OutputTensors, problems: Problems) -> None:
    """Check that the layers that a slice pairs are of one kind by the configs."""
    for _, slices in outputs.modules:
        for slice_ in slices:
            ranges = [(outputs.models[s.ref].checkpoint, s.layers) for s in slice_.output.sources if s.layers]
            if len(ranges) < 2 or any(id(c) not in renumbered.stacks for c, _ in ranges):
                continue
            shifted = len({first for _, (first, _) in ranges}) > 1
            for section in dict.fromkeys(path[:-1] for path in keys):
                lists = [_layer_types(c, section, renumbered, shifted=shifted) for c, _ in ranges]
                parts = [own[span[0] : span[1]] for own, (_, span) in zip(lists, ranges, strict=True) if own]
                if any(part != parts[0] for part in parts):
                    what = f"the sources' layers are of different kinds: {' against '.join(map(_short, parts[:2]))}"
                    fix = "pair layers of one kind, or pass allow_crimes=True"
                    problems.add("CONFIG_MISMATCH", slice_.output.spot, what, fix)


def _layer_types(checkpoint: Checkpoint, section: Path, renumbered: Renumbered, *, shifted: bool) -> list[str]:
    """`layer_types` of a config, derived by transformers where the config lacks it and `shifted` layers are paired."""
    held = _section(checkpoint.config, section)
    if held.get("layer_types") or not shifted:
        return held.get("layer_types") or []
    try:
        return (layer_kinds.lists_of(held, renumbered.count_of(checkpoint)) or {}).get("layer_types", [])
    except layer_kinds.UnreadableError:
        return []


def _short(kinds: Sequence[str]) -> str:
    return ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "")
