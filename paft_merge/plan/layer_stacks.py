"""Layers and modules by tensor names: the numbered stacks of a checkpoint, and the module that a tensor belongs to.

The number of a layer is the first numbered segment of a name, and a stack is the prefix before it: `model.layers.` in
`model.layers.7.mlp.up_proj.weight`. This finds the layers of any architecture without a table of architectures.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paft_merge.recipe.diagnostics import UnlocatedError

_LAYER = re.compile(r"^((?:[^.]*[^.\d][^.]*\.)*?)(\d+)\.(.*)$")

Path = tuple[str, ...]
"""The keys of a value in a nested config, outermost first."""


def split(name: str) -> tuple[str, int, str] | None:
    """Split a name into stack, layer and rest: `("model.layers.", 7, "mlp.up_proj.weight")`; None outside of layers."""
    found = _LAYER.match(name)
    return (found[1], int(found[2]), found[3]) if found else None


def is_for_all_layers(tail: str) -> bool:
    """Whether all layers use this tensor, although it is stored in the first (position biases of T5)."""
    return "relative_attention_bias" in tail


def tails_of(names: Iterable[str], stack: str) -> dict[int, dict[str, None]]:
    """For each layer of a stack the names of its tensors without stack and number, as the keys of a dict, in order."""
    tails: dict[int, dict[str, None]] = {}
    for name in names:
        found = split(name)
        if found and found[0] == stack and not is_for_all_layers(found[2]):
            tails.setdefault(found[1], {})[found[2]] = None
    return tails


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """The number of layers of every stack that is numbered from 0 without a gap."""
    seen: dict[str, set[int]] = {}
    for name in names:
        if found := split(name):
            seen.setdefault(found[0], set()).add(found[1])
    return {stack: len(layers) for stack, layers in seen.items() if max(layers) + 1 == len(layers)}


@dataclass(frozen=True)
class Stack:
    """The stack of layers that a recipe's `layer_range` counts."""

    prefix: str
    count: int
    keys: tuple[Path, ...]
    """Where the config states the number of layers."""
    beyond: int = 0
    """Layers after the last that predict further tokens (DeepSeek-V3). The config does not count them."""


class StackError(UnlocatedError):
    """`layer_range` does not choose one stack."""


def choose_stack(names: Collection[str], config: Mapping[str, Any]) -> Stack:
    """The stack that `layer_range` counts: the only one, or the only one whose length the config states.

    Raises:
        StackError: there is no stack, several match, or the config states another number of layers.
    """
    stacks = stacks_of(names)
    known = {prefix: layer_keys(config, prefix) for prefix in stacks}
    agreeing = [_agreeing(config, prefix, count, known[prefix]) for prefix, count in stacks.items()]
    matching = [stack for stack in agreeing if stack.keys]
    found = matching or _with_predicting(stacks, config, known)
    if len(found) == 1:
        return found[0]
    if matching:
        raise _ambiguous(matching, names)
    if len(stacks) == 1 and not agreeing[0].keys and not known[agreeing[0].prefix]:
        return agreeing[0]
    raise _uncounted(stacks, known, config)


def _agreeing(config: Mapping[str, Any], prefix: str, count: int, keys: Sequence[Path]) -> Stack:
    """A stack with those of `keys` at which the config states its number of layers."""
    return Stack(prefix, count, tuple(path for path in keys if value_at(config, path) == count))


def _ambiguous(stacks: Sequence[Stack], names: Collection[str]) -> StackError:
    listed = ", ".join(f"{stack.prefix.rstrip('.')} ({stack.count})" for stack in stacks)
    modules = sorted(set(modules_of(names).values()))
    fix = f"with slices for one of {', '.join(modules)}" if len(modules) > 1 else "by name"
    return StackError(
        f"has several stacks of layers, {listed}, and layer_range could mean each", f"write modules: {fix}"
    )


def _uncounted(stacks: Mapping[str, int], known: Mapping[str, Sequence[Path]], config: Mapping[str, Any]) -> StackError:
    if not stacks:
        return StackError("has no numbered layers for layer_range to count", "write models: instead of slices:")
    listed = ", ".join(f"{prefix.rstrip('.')} ({count})" for prefix, count in stacks.items())
    stated = ", ".join(f"{'.'.join(p)}: {value_at(config, p)}" for keys in known.values() for p in keys)
    what = f"numbers its tensors by {listed}, and its config states {stated or 'no number of layers'}"
    return StackError(what, "slices need a config with the number of layers; merge it with models:")


_PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")


def _with_predicting(
    stacks: Mapping[str, int], config: Mapping[str, Any], known: Mapping[str, Sequence[Path]]
) -> list[Stack]:
    """Stacks that are longer than the config states by exactly the layers that predict further tokens."""
    found = []
    for prefix, count in stacks.items():
        for path in known[prefix]:
            beyond = count - value_at(config, path)
            if beyond > 0 and beyond in [value_at(config, (*path[:-1], key)) for key in _PREDICTING]:
                found.append(Stack(prefix, count - beyond, (path,), beyond))
    return found


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """The highest layer of each stack, plus one: the length of a gradient over a whole model."""
    last: dict[str, int] = {}
    for name in names:
        if found := split(name):
            last[found[0]] = max(last.get(found[0], 0), found[1] + 1)
    return last


# --- the number of layers in a config ---------------------------------------------------------------------------------

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers", "num_blocks", "layers")
_OF_ENCODER = ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "num_layers", "num_hidden_layers")
_OF_DECODER = ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers")
_OF_VISION = ("num_hidden_layers", "depth", "n_layers", "num_layers", "layers")
_SECTIONS = {"vision": ("vision", "visual"), "audio": ("audio",)}


def layer_keys(config: Mapping[str, Any], prefix: str) -> list[Path]:
    """Where a config states the number of layers of the stack `prefix`."""
    nested, words = _nested(config), _SECTIONS.get(role_of(prefix), ())
    if own := [(key,) for key in nested if any(word in key for word in words)]:
        return _counts_at(config, own, _OF_VISION)
    sections = [(), *((key,) for key in nested if not any(w in key for words in _SECTIONS.values() for w in words))]
    two_sided = any(value_at(config, (*section, key)) is not None for section in sections for key in _OF_DECODER)
    sides = {"encoder": _OF_ENCODER, "decoder": _OF_DECODER} if two_sided else {}
    keys = next((keys for side, keys in sides.items() if side in prefix.split(".")), _COUNTS)
    return _counts_at(config, sections, keys)


def _counts_at(config: Mapping[str, Any], sections: Sequence[Path], keys: Sequence[str]) -> list[Path]:
    """Those of `keys` in `sections` whose value is a whole number."""
    paths = [(*section, key) for section in sections for key in keys]
    return [path for path in paths if type(value_at(config, path)) is int]


def _nested(config: Mapping[str, Any]) -> list[str]:
    """The keys of the configs nested in a config."""
    return [key for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]


def with_nested(config: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A config and all configs nested in it, each with the dotted prefix of its keys."""
    yield within, config
    for key in _nested(config):
        yield from with_nested(config[key], f"{within}{key}.")


def count_place(config: Mapping[str, Any], prefix: str) -> Path:
    """Where to state the number of layers of the stack `prefix` in a config that does not state it."""
    words = _SECTIONS.get(role_of(prefix), ("text", "llm", "language"))
    own = next((key for key in _nested(config) if any(word in key for word in words)), None)
    return (own, "num_hidden_layers") if own else ("num_hidden_layers",)


def value_at(config: Mapping[str, Any], path: Path) -> Any:
    """The value at `path`, or None."""
    found: Any = config
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


# --- modules of a model -----------------------------------------------------------------------------------------------

_PROJECTOR = {
    "multi_modal_projector", "mm_projector", "projector", "connector", "merger", "deepstack_merger_list",
    "modality_projection", "aligner", "mlp1", "embed_vision", "embed_audio",
}  # fmt: skip
_VISION = {"vision_tower", "vision_model", "visual", "vision_encoder", "vision", "image_encoder", "vit"}
_AUDIO = {"audio_tower", "audio_model", "audio_encoder"}
_ALIASES = {
    **dict.fromkeys(("text_decoder", "language_model", "text_model", "llm"), "text_decoder"),
    **dict.fromkeys(_VISION, "vision_tower"),
    **dict.fromkeys(_AUDIO, "audio_tower"),
    **dict.fromkeys(("multi_modal_projector", "mm_projector", "projector", "connector"), "multi_modal_projector"),
    **{name: name for name in ("encoder", "decoder", "shared")},
}


def role_of(name: str) -> str:
    """The role of a tensor in a multimodal model: projector, vision, audio, or text."""
    parts = set(name.split("."))
    if parts & _PROJECTOR:
        return "projector"
    return "vision" if parts & _VISION else "audio" if parts & _AUDIO else "text"


_MODULES = {"projector": "multi_modal_projector", "vision": "vision_tower", "audio": "audio_tower"}


def modules_of(names: Collection[str]) -> dict[str, str]:
    """The module that each name belongs to, by mergekit's names of modules.

    `text_decoder`, `vision_tower`, `audio_tower` and `multi_modal_projector` where a model has several of them; `encoder`,
    `decoder` and `shared` where the text has two stacks; else `default`.
    """
    roles = {name: role_of(name) for name in names}
    texts = [name for name, role in roles.items() if role == "text"]
    sides = {name: next((p for p in name.split(".")[:2] if p in ("encoder", "decoder")), "shared") for name in texts}
    several = len(set(roles.values())) > 1
    two_sided = {"encoder", "decoder"} <= set(sides.values())
    plain = "text_decoder" if several else "default"
    return {
        name: sides[name] if role == "text" and two_sided else _MODULES.get(role, plain) for name, role in roles.items()
    }


def parts(names: Collection[str], wanted: Sequence[str]) -> dict[str, str]:
    """Which of the `wanted` modules each name belongs to, without the names that belong to none.

    A module is named as by `modules_of`, by a usual alias of that name, or by a prefix of its tensors (the longest wins).
    `default` takes everything that no other wanted module takes.
    """
    own = modules_of(names)
    present = set(own.values())
    of_part = {_ALIASES[w]: w for w in reversed(wanted) if _ALIASES.get(w) in present}
    by_prefix = sorted((w for w in wanted if w not in of_part.values() and w != "default"), key=len, reverse=True)
    found = {}
    for name, part in own.items():
        module = next((w for w in by_prefix if name.startswith(f"{w}.") or name == w), None) or of_part.get(part)
        if module or "default" in wanted:
            found[name] = module or "default"
    return found


_BEFORE = re.compile(
    r"embed(?!_out)|(^|\.)wte\.|(^|\.)wpe\.|(^|\.)shared\.|rotary|relative_pe|pos_|position|patch|(^|\.)conv\d"
    r"|class_token|cls_token|project_in|layernorm_pre|ln_pre|pre_layernorm|pre_layrnorm"
)


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside of layers is used before the first layer (an embedding) and not after the last."""
    return bool(_BEFORE.search(name))
