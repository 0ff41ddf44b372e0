"""Layers and modules by the names of tensors: the numbered stacks of a checkpoint, and which part of a model a name belongs to.

A layer is the first numbered segment of a name, and a stack is what shares the part before it: `model.layers.` in
`model.layers.7.mlp.up_proj.weight`. So any architecture has layers without anybody having described it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"^((?:[^.]*[^.\d][^.]*\.)*?)(\d+)\.(.*)$")

Path = tuple[str, ...]
"""Keys that lead to a value in a config."""


def split(name: str) -> tuple[str, int, str] | None:
    """A name as stack, layer and rest, `("model.layers.", 7, "mlp.up_proj.weight")`; None outside of layers."""
    found = _LAYER.match(name)
    return (found[1], int(found[2]), found[3]) if found else None


def is_for_all_layers(tail: str) -> bool:
    """Whether the tensor `tail` of a layer serves them all, though it stands in the first (T5's position biases)."""
    return "relative_attention_bias" in tail


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """Every numbered stack among `names` that counts from 0 without a gap, with its number of layers."""
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
    """Where the config says how many layers it has."""
    beyond: int = 0
    """Layers behind the last, which predict further tokens (DeepSeek-V3); the config does not count them."""


class StackError(Exception):
    """No one stack can be meant: `what` is wrong, and the `fix`."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def choose_stack(names: Collection[str], config: Mapping[str, Any]) -> Stack:
    """The stack that `layer_range` counts: the only one, or the only one as long as the config says.

    Raises:
        StackError: there is none, several can be meant, or the config knows another number of layers.
    """
    stacks = stacks_of(names)
    known = {prefix: layer_keys(config, prefix) for prefix in stacks}
    agreeing = [p for p, count in stacks.items() if any(value_at(config, path) == count for path in known[p])]
    if not agreeing and (longer := _with_predicting(stacks, config, known)):
        return longer
    if len(agreeing) > 1:
        listed = ", ".join(f"{prefix.rstrip('.')} ({stacks[prefix]})" for prefix in agreeing)
        parts = sorted(set(modules_of(names).values()))
        fix = (
            f"write modules: with slices for one of {', '.join(parts)}" if len(parts) > 1 else "write modules: by name"
        )
        raise StackError(f"has several stacks of layers, {listed}, and layer_range could mean each", fix)
    if agreeing:
        prefix = agreeing[0]
        keys = tuple(path for path in known[prefix] if value_at(config, path) == stacks[prefix])
        return Stack(prefix, stacks[prefix], keys)
    if not stacks:
        raise StackError("has no numbered layers, so layer_range means nothing", "write models: instead of slices:")
    if len(stacks) > 1 or known[next(iter(stacks))]:
        listed = ", ".join(f"{prefix.rstrip('.')} ({count})" for prefix, count in stacks.items())
        said = ", ".join(f"{'.'.join(p)}: {value_at(config, p)}" for keys in known.values() for p in keys)
        what = f"numbers its tensors by {listed}, and its config says {said or 'nothing of layers'}"
        raise StackError(what, "slices need a config that knows the number of layers; merge it with models:")
    ((prefix, count),) = stacks.items()
    return Stack(prefix, count, ())


_PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")


def _with_predicting(
    stacks: Mapping[str, int], config: Mapping[str, Any], known: Mapping[str, Sequence[Path]]
) -> Stack | None:
    """The one stack that is longer than the config says by the layers that predict further tokens."""
    found = []
    for prefix, count in stacks.items():
        for path in known[prefix]:
            beyond = count - value_at(config, path)
            if beyond > 0 and beyond in [value_at(config, (*path[:-1], key)) for key in _PREDICTING]:
                found.append(Stack(prefix, count - beyond, (path,), beyond))
    return found[0] if len(found) == 1 else None


def layer_t_of(names: Iterable[str]) -> dict[str, int]:
    """The number of layers of each stack by its highest layer, for gradients over whole models."""
    last: dict[str, int] = {}
    for name in names:
        if found := split(name):
            last[found[0]] = max(last.get(found[0], 0), found[1] + 1)
    return last


# --- what a config says of layers -------------------------------------------------------------------------------------

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers", "num_blocks", "layers")
_OF_ENCODER = ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "num_layers", "num_hidden_layers")
_OF_DECODER = ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers")
_OF_VISION = ("num_hidden_layers", "depth", "n_layers", "num_layers", "layers")
_SECTIONS = {"vision": ("vision", "visual"), "audio": ("audio",)}


def layer_keys(config: Mapping[str, Any], prefix: str) -> list[Path]:
    """Where a config states the number of layers of the stack `prefix`."""
    role = role_of(prefix)
    nested = [key for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    if role in _SECTIONS:
        own = [key for key in nested if any(word in key for word in _SECTIONS[role])]
        if own:
            return [(key, count) for key in own for count in _OF_VISION if _is_count(config[key].get(count))]
    text = [key for key in nested if not any(word in key for words in _SECTIONS.values() for word in words)]
    places: list[Path] = [(), *((key,) for key in text)]
    parts = prefix.split(".")
    if any(value_at(config, (*place, key)) is not None for place in places for key in _OF_DECODER):
        counts: Sequence[str] = _OF_ENCODER if "encoder" in parts else _OF_DECODER if "decoder" in parts else _COUNTS
    else:
        counts = _COUNTS
    return [(*place, key) for place in places for key in counts if _is_count(value_at(config, (*place, key)))]


def count_place(config: Mapping[str, Any], prefix: str) -> Path:
    """Where a config that does not state the number of layers of the stack `prefix` would."""
    words = _SECTIONS.get(role_of(prefix), ("text", "llm", "language"))
    nested = [key for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    own = next((key for key in nested if any(word in key for word in words)), None)
    return (own, "num_hidden_layers") if own else ("num_hidden_layers",)


def value_at(config: Mapping[str, Any], path: Path) -> Any:
    """The value at `path`, or None."""
    found: Any = config
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# --- parts of a model -------------------------------------------------------------------------------------------------

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
    """What of a multimodal model a name is of: projector, vision, audio, or text."""
    parts = set(name.split("."))
    if parts & _PROJECTOR:
        return "projector"
    return "vision" if parts & _VISION else "audio" if parts & _AUDIO else "text"


_MODULES = {"projector": "multi_modal_projector", "vision": "vision_tower", "audio": "audio_tower"}


def modules_of(names: Collection[str]) -> dict[str, str]:
    """The part of the model that each name belongs to, as mergekit calls the parts.

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
    """Which of the `wanted` modules each name belongs to; names of none are left out.

    A module is a part as `modules_of` calls it (or a usual other name of it), or what the names of its tensors begin with
    (the longest wins); `default` is everything that no other wanted module takes.
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
    """Whether a tensor outside of layers is used before the first of them (embeddings), rather than after the last."""
    return bool(_BEFORE.search(name))
