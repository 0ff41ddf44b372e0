"""Experts with a tensor each in the base's files: in an adapter each is a module, as before transformers 5, and servers read them so."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.\d+\.(?P<leaf>[^.]+)\.weight")
_INNER = ("gate_proj", "up_proj", "w1", "w3")
"""Weights that PEFT joins into `gate_up_proj`. It reads them if it finds factors of both and of `down_proj` (`w2`) beside them."""


def is_expert(name: str) -> bool:
    """Whether a tensor has the name of a weight of one expert."""
    return _EXPERT.fullmatch(name) is not None


def beside(adapted: Collection[str], names: Iterable[str]) -> list[str]:
    """Return the tensors of experts that need factors because other experts of their layer have them.

    PEFT (`utils/transformers_weight_conversion.py` of 0.21) and llama.cpp's converter stack the factors of the experts of a layer. If
    some are missing, the others go to the wrong experts or are refused.

    Args:
        adapted: names of tensors that have factors.
        names: of all tensors.
    """
    found = [one for one in map(_EXPERT.fullmatch, adapted) if one]
    whole = {one["experts"] for one in found if one["leaf"] in _INNER}
    needed = {(one["experts"], one["leaf"]) for one in found}
    others = [one for one in map(_EXPERT.fullmatch, names) if one and one.string not in adapted]
    return [one.string for one in others if one["experts"] in whole or (one["experts"], one["leaf"]) in needed]
