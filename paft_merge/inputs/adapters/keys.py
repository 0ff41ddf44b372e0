"""Sorts the tensors of an adapter by name: the module that each belongs to, and its part in that module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from paft_merge.errors import Problems
from paft_merge.inputs.safetensors_header import join_first, without_wrappers

_PREFIX = re.compile(r"((?:[^.]+\.)*?(?:base_model\.model\.)+|(?:module\.)*)")
"""Twice where a wrapped model was wrapped again; after the segments of what wraps PEFT's model (DDP, Lightning)."""
_FOREIGN = re.compile(r"(^|[._])lora[._](up|down|mid|a|b)(\.|$)|^lora_(unet|te\d?)_")
"""Names in adapters of kohya's scripts, LyCORIS, older diffusers and torchtune."""
_INERT = re.compile(r".+\.(lora_(monteclora|velora)_.+|original_module\..+|trainable_tokens_original(\..+)?)")
"""Training state and copies of the base, which no merge uses: MonteCLoRA and VeLoRA merge as plain LoRA."""

_TOKENS = re.compile(r"(?P<path>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?")
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<rest>.+)")
_WRAPPED = ".base_layer"

SHARED = "base_model"
"""Path of tensors that all modules share, such as the random projections of VeRA."""


class TensorNames(NamedTuple):
    """How one PEFT type names the tensors of a module: `{module}.{prefix}{part}`, perhaps with the adapter's name.

    Without `parts`, everything after the prefix is the part.
    """

    prefix: str
    parts: tuple[str, ...] = ()

    def match(self, name: str) -> re.Match[str] | None:
        """Match a tensor name; the groups are `path`, `part` and `leaf`."""
        if not self.parts:
            return re.fullmatch(rf"(?P<path>.+?)\.{self.prefix}(?P<part>.+)(?P<leaf>)", name)
        parts = "|".join(self.parts)
        adapter, leaf = r"(\.(?!weight$|bias$)[^.]+)?", r"(?P<leaf>\.weight|\.bias)?"
        return re.fullmatch(rf"(?P<path>.+)\.{self.prefix}(?P<part>{parts}){adapter}{leaf}", name)


@dataclass
class Module:
    """The tensors of one adapted module.

    Attributes:
        peft_type: the type whose tensor names these are.
        path: the module in the trained model, without PEFT's wrappers.
        depth: number of PEFT wrappers around it; above 0 only if several parameters of one module are targeted.
        parts: tensor names by part, e.g. `A`, `B`, `B.bias`, `magnitude_vector` of LoRA.
        attention: whether the module is the `out_proj` inside a wrapped `nn.MultiheadAttention`.
    """

    peft_type: str
    path: str
    depth: int = 0
    attention: bool = False
    parts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A full tensor `key` of the adapter. It replaces the first parameter of `names` that the base has.

    Attributes:
        is_base_layer: whether it is the weight under an adapter on the same parameter (`.base_layer.`).
        wrapped: whether it was trained in a copy of its module (`.modules_to_save.`), which is not tied to others.
    """

    key: str
    names: tuple[str, ...]
    is_base_layer: bool = False
    wrapped: bool = False


@dataclass
class Keys:
    """All tensor names of an adapter, sorted.

    Attributes:
        modules: by path and depth.
        saved: full tensors.
        tokens: tensors of `trainable_token_indices`, by module path.
    """

    modules: dict[tuple[str, int], Module] = field(default_factory=dict)
    saved: list[Saved] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)


def sort_by_name(keys: Iterable[str], types: Mapping[str, TensorNames], where: object, problems: Problems) -> Keys:
    """Sort tensor names, with or without `base_model.model.`, the adapter's name and `.weight`.

    Args:
        keys: the tensor names.
        types: the tensor names of every known PEFT type; the first that matches counts.
        where: the file, for messages.
        problems: receives ADAPTER_UNUSED for names that no known type writes, and ADAPTER_CONFIG if two tensors are
            the same part of one module.
    """
    found, unknown = Keys(), list[str]()
    for key in keys:
        name = _PREFIX.sub("", without_wrappers(key), count=1)
        if _INERT.fullmatch(name):
            continue
        matches = {kind: match for kind, names in types.items() if (match := names.match(name))}
        if match := _TOKENS.fullmatch(name):
            found.tokens[_unwrapped(match["path"])] = key
        elif matches:
            _add_part(found, key, *next(iter(matches.items())), where, problems)
        elif _FOREIGN.search(name) or any(f".{names.prefix}" in name for names in types.values()):
            unknown.append(key)
        else:
            found.saved.append(_saved(key, name))
    if unknown:
        what = f"has names that no supported adapter type uses, so that they would be left out: {join_first(unknown)}"
        foreign = any(map(_FOREIGN.search, unknown))
        fix = (
            "they are not PEFT's: convert it to PEFT's names, with its scales"
            if foreign
            else "merge it with PEFT instead"
        )
        problems.add("ADAPTER_UNUSED", where, what, fix)
    plain = {name for one in found.saved if not one.wrapped for name in one.names}
    found.saved = [one for one in found.saved if not (one.wrapped and plain.intersection(one.names))]
    return found


def _add_part(found: Keys, key: str, kind: str, match: re.Match[str], where: object, problems: Problems) -> None:
    path = _unwrapped(match["path"])
    depth = len(re.search(r"(\.base_layer)*$", match["path"])[0]) // len(_WRAPPED)  # type: ignore[index]
    module = found.modules.setdefault((path, depth), Module(kind, path, depth))
    module.attention = match["path"].endswith(".base_layer.out_proj")
    part = match["part"] + (".bias" if match["leaf"] == ".bias" else "")
    if part in module.parts:
        what = f"tensors {module.parts[part]!r} and {key!r} are the same part of one module"
        problems.add("ADAPTER_CONFIG", where, what, "save one adapter per folder")
    if module.peft_type != kind:
        what = f"tensor {key!r} is of type {kind}, and its module has tensors of type {module.peft_type}"
        problems.add("ADAPTER_CONFIG", where, what, "save one adapter per folder")
    module.parts[part] = key


def _saved(key: str, name: str) -> Saved:
    """A tensor that replaces a parameter. PEFT drops `.modules_to_save.<adapter>` from the name, other writers do not."""
    if match := _SAVED.fullmatch(name):
        path, rest = _unwrapped(match["path"]), match["rest"]
        return Saved(key, (f"{path}.{rest}", f"{path}.{rest.partition('.')[2]}"), wrapped=True)
    name = name.replace(".token_adapter.base_layer.", ".base_layer.")
    return Saved(key, (_unwrapped(name),), is_base_layer=f"{_WRAPPED}." in name)


def _unwrapped(path: str) -> str:
    """`path` without PEFT's `base_layer` segments."""
    return re.sub(r"\.base_layer(?=\.|$)", "", path)
