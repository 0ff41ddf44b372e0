"""The names of an adapter's tensors, taken apart: which module each belongs to, and which part of it each is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from paft_merge.errors import Problems

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<path>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?P<adapter>\.(?!weight$|bias$)[^.]+)?(?P<leaf>\.weight|\.bias)?"
)
_INERT = re.compile(r".+\.(lora_(monteclora|velora)_.+|original_module\..+|trainable_tokens_original(\..+)?)")
"""State of training and copies of the base that no merge uses: MonteCLoRA and VeLoRA merge as plain LoRA."""

_TOKENS = re.compile(r"(?P<path>.+)\.token_adapter\.trainable_tokens_delta(\.[^.]+)?")
_SPARSE = re.compile(r"(?P<path>.+)\.shira_(?P<part>weight|indices)(\.[^.]+)?")
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<rest>.+)")
_WRAPPED = ".base_layer"


@dataclass
class Module:
    """The factors of one adapted module.

    Attributes:
        path: the module in the model that was trained, without PEFT's wrappers.
        depth: how many wrappers lie around it; above 0 only when several parameters of one module are targeted.
        parts: tensor names by part: `A`, `B`, `B.bias`, `embedding_A`, `embedding_B`, `magnitude_vector`.
        attention: the module is the `out_proj` inside a wrapped `nn.MultiheadAttention`.
    """

    path: str
    depth: int = 0
    attention: bool = False
    parts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A full tensor: `key` in the adapter, to replace the parameter of the first of `names` that there is.

    Attributes:
        beneath: it is the value beneath an adapter on the same parameter (`.base_layer.`).
        wrapped: it was trained in a copy of its module (`.modules_to_save.`), which shares nothing with others.
    """

    key: str
    names: tuple[str, ...]
    beneath: bool = False
    wrapped: bool = False


@dataclass
class Keys:
    """All tensor names of an adapter, sorted out. Whatever fits none of these is a problem."""

    modules: dict[tuple[str, int], Module] = field(default_factory=dict)
    saved: list[Saved] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    sparse: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of SHiRA: tensor names by part (`weight`, `indices`), by module."""


def sort_keys(keys: Iterable[str], where: object, problems: Problems) -> Keys:
    """Take every tensor name apart.

    Accepted: with or without `base_model.model.`, the adapter's name (`.lora_A.default.weight`), `.weight`.

    Args:
        keys: the tensor names.
        where: the file, for messages.
        problems: receives ADAPTER_UNUSED for names of a form that PEFT's LoRA and SHiRA do not write, ADAPTER_CONFIG when two
            tensors are the same part of one module.
    """
    found = Keys()
    for key in keys:
        name = key.removeprefix(_PREFIX)
        if _INERT.fullmatch(name):
            continue
        if match := _FACTOR.fullmatch(name):
            _add_factor(found, key, match, where, problems)
        elif match := _TOKENS.fullmatch(name):
            found.tokens[_unwrapped(match["path"])] = key
        elif match := _SPARSE.fullmatch(name):
            found.sparse.setdefault(_unwrapped(match["path"]), {})[match["part"]] = key
        elif ".lora_" in name or ".shira_" in name:
            what = f"tensor {key!r} is of no form that LoRA has, so it would be left out"
            problems.add("ADAPTER_UNUSED", where, what, "merge the adapter with PEFT instead")
        else:
            found.saved.append(_saved(key, name))
    plain = {name for one in found.saved if not one.wrapped for name in one.names}
    found.saved = [one for one in found.saved if not (one.wrapped and plain.intersection(one.names))]
    return found


def _add_factor(found: Keys, key: str, match: re.Match[str], where: object, problems: Problems) -> None:
    path = _unwrapped(match["path"])
    depth = len(re.search(r"(\.base_layer)*$", match["path"])[0]) // len(_WRAPPED)  # type: ignore[index]
    module = found.modules.setdefault((path, depth), Module(path, depth))
    module.attention = match["path"].endswith(".base_layer.out_proj")
    part = match["part"] + (".bias" if match["leaf"] == ".bias" else "")
    if part in module.parts:
        what = f"tensors {module.parts[part]!r} and {key!r} are the same part of one module"
        problems.add("ADAPTER_CONFIG", where, what, "save one adapter per folder")
    module.parts[part] = key


def _saved(key: str, name: str) -> Saved:
    """A tensor that replaces a parameter; PEFT drops `.modules_to_save.<adapter>`, other writers do not."""
    if match := _SAVED.fullmatch(name):
        path, rest = _unwrapped(match["path"]), match["rest"]
        return Saved(key, (f"{path}.{rest}", f"{path}.{rest.partition('.')[2]}"), wrapped=True)
    name = name.replace(".token_adapter.base_layer.", ".base_layer.")
    return Saved(key, (_unwrapped(name),), beneath=f"{_WRAPPED}." in name)


def _unwrapped(path: str) -> str:
    """`path` without PEFT's `base_layer` segments."""
    return re.sub(r"\.base_layer(?=\.|$)", "", path)
