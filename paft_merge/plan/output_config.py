"""What a merge changes in `config.json`: the dtype, a vocabulary that grew, a tie that was cut, layers that moved."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from paft_merge.errors import Problem, Problems
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.plan import layer_kinds
from paft_merge.plan.layer_stacks import Path, count_place, is_for_all_layers, split, stacks_of, value_at
from paft_merge.plan.output_tensors import Places, Renumbered
from paft_merge.plan.planned import PlannedTensor
from paft_merge.recipe import Recipe


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
    for path in _counted_at(config, renumbered, places):
        _put(result, config, path, len(layers))
    if ("num_decoder_layers",) not in stack.keys and _shares_its_count(config, renumbered, places):
        result.setdefault("num_decoder_layers", stack.count)  # of a T5 that says one number for both sides
    faults, own = list[Problem](), count_place(config, stack.prefix)
    for section in dict.fromkeys(path[:-1] for path in stack.keys or [own]):
        for key, value in _section(config, section).items():
            new = _followed(key, value, section, renumbered)
            if new is not None:
                _put(result, config, (*section, key), new)
        if not stack.keys and renumbered.moved and result == changes:
            _put(result, config, own, len(layers))  # which the config left to the default of its class
        if renumbered.moved:
            faults += _settled(config, result, section, renumbered, places)
    (places.warnings if allow_crimes else problems.found).extend(faults)
    if not allow_crimes:
        _check_kinds(stack.keys, renumbered, places, problems)
    return result


def _counted_at(config: Mapping[str, Any], renumbered: Renumbered, places: Places) -> Sequence[Path]:
    """Where the config has to say how many layers there are now."""
    if _shares_its_count(config, renumbered, places) and "decoder" in renumbered.stack.prefix.split("."):
        return [("num_decoder_layers",)]
    return renumbered.stack.keys


def _shares_its_count(config: Mapping[str, Any], renumbered: Renumbered, places: Places) -> bool:
    """Whether encoder and decoder are counted by one key, which then has to become two."""
    stacks = stacks_of(places.donor.checkpoint.tensors)
    sides = {side for prefix in stacks for side in ("encoder", "decoder") if side in prefix.split(".")}
    return renumbered.stack.keys == (("num_layers",),) and len(sides) == 2 and config.get("num_decoder_layers") is None


def _followed(key: str, value: Any, section: Path, renumbered: Renumbered) -> Any:
    """What a value of a config becomes when layers move; None when it says nothing of single layers."""
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


def _settled(
    config: Mapping[str, Any], changes: dict[str, Any], section: Path, renumbered: Renumbered, places: Places
) -> list[Problem]:
    """See that transformers makes of every layer what it was: by the config as it is, else by lists added to it.

    Returns:
        What neither a list nor a rule can say.
    """
    layers, faults = renumbered.layers, list[str]()
    merged = _section({**config, **changes}, section)
    wanted = _wanted(section, renumbered)
    try:
        lists = layer_kinds.lists_of(merged, len(layers)) or {}
    except layer_kinds.UnreadableError:
        lists = {}
    lacking = {key: own for key, own in wanted.items() if lists.get(key) != own}
    fixed = [key for key in lacking if layer_kinds.is_computed(merged["model_type"], key)]
    if fixed:
        faults.append(
            f"{merged['model_type']} derives {', '.join(fixed)} from the numbers of layers, which change here"
        )
    elif lacking:
        added = {key: layer_kinds.as_written(key, own) for key, own in lacking.items()}
        try:
            found = layer_kinds.lists_of({**merged, **added}, len(layers)) or {}
        except layer_kinds.UnreadableError as error:
            found, faults = lacking, [f"the layers make a config that transformers refuses: {error}"]
        if wrong := [key for key, own in lacking.items() if found.get(key) != own]:
            faults.append(f"{merged['model_type']} derives {', '.join(wrong)} otherwise than the layers were")
        for key, value in added.items():
            _put(changes, config, (*section, key), value)
    faults += _broken(merged, wanted, renumbered)
    merged = _section({**config, **changes}, section)
    faults += _misplaced(merged, wanted, section, renumbered, places)[:1] if not faults else []
    fix = "keep the kinds of layers where they were, or pass allow_crimes=True"
    return [Problem("LAYER_KINDS", places.donor.ref, what, fix) for what in faults]


def _broken(merged: Mapping[str, Any], settled: Mapping[str, Any], renumbered: Renumbered) -> list[str]:
    """Rules that see a layer as of another kind in its new place, where its tensors do not show its kind."""
    rules = layer_kinds.rules_in(merged, settled, structural=False)
    found: dict[str, str] = {}
    for i, (checkpoint, at) in enumerate(renumbered.layers):
        now = layer_kinds.kinds_at(rules, i, len(renumbered.layers))
        was = layer_kinds.kinds_at(rules, at, renumbered.count_of(checkpoint))
        for key in (key for key in rules if now[key] != was[key]):
            what = f"{key}: {rules[key]} tells a layer's kind by its number, and layer {at} becomes layer {i}"
            found.setdefault(key, what)
    return list(found.values())


def _misplaced(
    merged: Mapping[str, Any], settled: Mapping[str, Any], section: Path, renumbered: Renumbered, places: Places
) -> list[str]:
    """Layers whose tensors are not those that the model has in their new place, as far as its own layers show that."""
    donor, layers = places.donor.checkpoint, renumbered.layers
    tails = {id(c): _tails(c, renumbered) for c in dict.fromkeys([donor, *(c for c, _ in layers)])}
    own = tails[id(donor)]
    if all(tails[id(c)][at] == own[0] for c, at in layers) and all(one == own[0] for one in own.values()):
        return []
    rules = layer_kinds.rules_in(merged, settled, structural=True)
    count, said = renumbered.stack.count, layer_kinds.entries_of({**merged, **settled}, len(layers))
    held = _section(donor.config, section)
    before = layer_kinds.entries_of({**held, **(layer_kinds.lists_of(held, count) or {} if settled else {})}, count)
    known = [layer_kinds.kinds_at(rules, j, count) for j in range(count)]
    faults = []
    for i, (checkpoint, at) in enumerate(layers):
        kind, entries = layer_kinds.kinds_at(rules, i, len(layers)), said[i]
        alike = [
            j for j in range(count)
            if known[j] == kind and all(entries[key] == entry for key, entry in before[j].items() if key in entries)
        ]  # fmt: skip
        like = i if i in alike else alike[-1] if alike else None
        if like is None or tails[id(checkpoint)][at] != own[like]:
            why = ", ".join(f"{key}: {value}" for key, value in rules.items()) or "which the config does not explain"
            faults.append(f"layer {at} cannot become layer {i}, because the model has other tensors there ({why})")
    return faults


def _section(config: Mapping[str, Any], section: Path) -> Mapping[str, Any]:
    return (value_at(config, section) or {}) if section else config


def _wanted(section: Path, renumbered: Renumbered) -> dict[str, list[Any]]:
    """For every list that transformers has of all the models: the output layers' entries in their own models."""
    known: dict[int, dict[str, list[Any]]] = {}
    for checkpoint, _ in renumbered.layers:
        if id(checkpoint) not in known:
            try:
                own = layer_kinds.lists_of(_section(checkpoint.config, section), renumbered.count_of(checkpoint))
            except layer_kinds.UnreadableError:  # a config of an old form, which transformers does not load either
                return {}
            known[id(checkpoint)] = own or {}
    keys = [key for key in next(iter(known.values())) if all(key in lists for lists in known.values())]
    return {key: [known[id(c)][key][at] for c, at in renumbered.layers] for key in keys}


def _tails(checkpoint: Checkpoint, renumbered: Renumbered) -> dict[int, set[str]]:
    """What each layer is made of: the parts of names after its number."""
    found: dict[int, set[str]] = {}
    for name in checkpoint.tensors:
        parts = split(name)
        if parts and parts[0] == renumbered.stacks[id(checkpoint)].prefix and not is_for_all_layers(parts[2]):
            found.setdefault(parts[1], set()).add(parts[2])
    return found


def _check_kinds(keys: Sequence[Path], renumbered: Renumbered, places: Places, problems: Problems) -> None:
    """Layers that a slice pairs must be of one kind where the configs tell kinds by layer."""
    for _, makings in places.makings:
        for making in makings:
            ranges = [(places.models[s.ref].checkpoint, s.layers) for s in making.output.sources if s.layers]
            if len(ranges) < 2 or any(id(c) not in renumbered.stacks for c, _ in ranges):
                continue
            shifted = len({first for _, (first, _) in ranges}) > 1
            for section in dict.fromkeys(path[:-1] for path in keys):
                lists = [_layer_types(c, section, renumbered, shifted=shifted) for c, _ in ranges]
                parts = [own[span[0] : span[1]] for own, (_, span) in zip(lists, ranges, strict=True) if own]
                if any(part != parts[0] for part in parts):
                    what = f"the sources' layers are of different kinds: {' against '.join(map(_short, parts[:2]))}"
                    fix = "pair layers of one kind, or pass allow_crimes=True"
                    problems.add("CONFIG_MISMATCH", making.output.spot, what, fix)


def _layer_types(checkpoint: Checkpoint, section: Path, renumbered: Renumbered, *, shifted: bool) -> list[str]:
    """`layer_types` of a config, or what transformers derives of it (asked where layers of other numbers are paired)."""
    held = _section(checkpoint.config, section)
    if held.get("layer_types") or not shifted:
        return held.get("layer_types") or []
    try:
        return (layer_kinds.lists_of(held, renumbered.count_of(checkpoint)) or {}).get("layer_types", [])
    except layer_kinds.UnreadableError:
        return []


def _short(kinds: Sequence[str]) -> str:
    return ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "")
