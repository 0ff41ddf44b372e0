"""Plain data to the frozen models of the language, with every fault of shape and type at once.

pydantic finds the faults. A faulty value is then taken out or replaced by a stand-in, and the rest is read again, so
that one wrong dtype does not hide what is wrong further down.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from paft_merge.recipe.diagnostics import Report
from paft_merge.recipe.reference import ModelRef
from paft_merge.recipe.schema import (
    Language,
    ModelEntry,
    ModuleEntry,
    SliceEntry,
    SourceEntry,
    TokenEntry,
    TokenizerEntry,
    TokenRow,
)
from paft_merge.recipe.yaml_source import KeyPath, Located, did_you_mean, dotted, show

_KNOWN: Mapping[str, Collection[str]] = {
    "": Language.model_fields,
    "models": ModelEntry.model_fields,
    "slices": SliceEntry.model_fields,
    "sources": SourceEntry.model_fields,
    "tokenizer": TokenizerEntry.model_fields,
    "source": TokenRow.model_fields,
}
"""The keys of a mapping, by the last key around it. Anything else that has keys is a model reference."""

_REFERENCE = ("model", "lora", "override_architecture", "label", "path", "revision")
_SHAPES = {"models", "slices", "modules", "tokenizer", "tokenizer_source", "token", "token_id"}
"""When one of these was faulty, what is wrong with the mapping around it follows from that."""

_TYPES = {
    "string_type": ("text", "quote it"),
    "bool_type": ("true or false", ""),
    "bool_parsing": ("true or false", ""),
    "int_type": ("a whole number", ""),
    "int_parsing": ("a whole number", ""),
    "int_from_float": ("a whole number", ""),
    "tuple_type": ("a list", "begin every item with '- '"),
    "dict_type": ("a mapping", "write key: value"),
    "mapping_type": ("a mapping", "write key: value"),
    "model_type": ("a mapping", "write key: value"),
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than": ("lt", "below"),
}


def read_language(located: Located, report: Report, parameters: Collection[str]) -> tuple[Language | None, set[str]]:
    """Read data as the language, noting faults and unknown keys in `report`.

    Args:
        parameters: names that methods know, to tell a misplaced parameter from a misspelt key.

    Returns:
        The model, or None when too little is left to make one, and the keys whose values were faulty.
    """
    data = copy.deepcopy(located.data)
    if not isinstance(data, dict):
        what = "the recipe is empty" if data is None else f"a recipe is a mapping, got {show(data)}"
        report.error(located.spot(), what, "begin with merge_method: ...")
        return None, set()
    reader = _Reader(located, report, parameters)
    while True:
        try:
            return Language.model_validate(data), reader.faulty
        except ValidationError as error:
            if not reader.settle_all(data, error.errors()):
                return None, reader.faulty


class _Reader:
    def __init__(self, located: Located, report: Report, parameters: Collection[str]) -> None:
        self.located, self.report, self.parameters = located, report, parameters
        self.settled: dict[KeyPath, int] = {}
        self.passes = 0
        self.taken_out: set[KeyPath] = set()

    def settle_all(self, data: dict[str, Any], found: list[ErrorDetails]) -> bool:
        """Note the faults of one reading and take them out of `data`; False when one has to stay."""
        self.passes += 1
        return all([self.settle(data, details) for details in found])  # noqa: C419, every one is to be told

    def settle(self, data: dict[str, Any], details: ErrorDetails) -> bool:
        """Note one fault and take it out of `data`; False when it has to stay."""
        steps = _steps(details["loc"], data)
        key = steps[-1] if steps else ""
        if self.settled.setdefault(steps, self.passes) < self.passes:
            return False
        if details["type"] == "too_short" and details["input"]:
            return True  # pydantic counts faulty items as none
        around = _at(data, steps[:-1])
        if details["type"] == "extra_forbidden":
            self.unknown(steps, around)
            around.pop(key, None)
            return True
        spelling = self.located.spelling(steps)
        if spelling is not None and details["type"] in ("string_type", "reference"):
            around[key] = spelling
            return True
        if not any(place[:-1] == steps and place[-1] in _SHAPES for place in self.taken_out):
            self.fault(steps, details)
        return self.take_out(steps, around)

    @property
    def faulty(self) -> set[str]:
        """The keys whose values were faulty."""
        return {str(place[-1]) for place in self.taken_out}

    def fault(self, steps: KeyPath, details: ErrorDetails) -> None:
        what, fix = _words(details, steps)
        self.report.error(self.located.spot(steps), what, fix)

    def take_out(self, steps: KeyPath, around: Any) -> bool:
        """Replace a faulty value by a stand-in, or remove it, where a recipe is still a recipe without it."""
        key = steps[-1] if steps else None
        if not isinstance(key, str):
            return False
        if steps in self.taken_out:
            return True
        if key in ("model", "base_model"):
            around[key] = ModelRef(dotted(steps))
        elif key == "layer_range":
            around[key] = [0, 1]
        elif key in around:
            del around[key]
            if not around and len(steps) > 1:
                self.taken_out.add(steps[:-1])
        else:
            return False
        self.taken_out.add(steps)
        return True

    def unknown(self, steps: KeyPath, around: Mapping[str, Any]) -> None:
        """Say that a key is ignored, and what was probably meant."""
        key = str(steps[-1])
        known = _known(steps[:-1])
        spot = self.located.spot(steps)
        if key == "revision" and "model" in around:
            self.report.warn(spot, "unknown key, so this revision is not used", "write model: PATH@REVISION")
        elif key == "residual_weight":
            self.report.warn(spot, "mergekit declares this key and never reads it, so it is ignored", "remove it")
        elif key in self.parameters and "parameters" in known:
            self.report.warn(
                spot, "ignored, because a parameter belongs under 'parameters'", f"write parameters: {{{key}: ...}}"
            )
        else:
            fix = did_you_mean(key, known)
            if not fix and "parameters" in known and (near := did_you_mean(key, self.parameters)):
                fix = f"{near.removesuffix('?')}, under 'parameters'?"
            self.report.warn(spot, "unknown key, so it is ignored", fix or f"known here: {', '.join(known)}")


def _steps(location: tuple[str | int, ...], data: Any) -> KeyPath:
    """The place of a pydantic error in the data, as far as the data goes."""
    steps: list[str | int] = []
    for part in location:
        if isinstance(part, str) and part.startswith("\0"):
            continue
        if isinstance(data, Mapping) and isinstance(part, str):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            break
        steps.append(part)
    return tuple(steps)


def _at(data: Any, steps: KeyPath) -> Any:
    for step in steps:
        data = data.get(step) if isinstance(data, dict) else data[step]
    return data


def _known(steps: KeyPath) -> Collection[str]:
    """The keys that a mapping at `steps` may have."""
    words = [step for step in steps if isinstance(step, str)]
    if len(words) > 1 and words[-2] in ("modules", "tokens"):
        return ModuleEntry.model_fields if words[-2] == "modules" else TokenEntry.model_fields
    return _KNOWN.get(words[-1] if words else "", _REFERENCE)


def _words(details: ErrorDetails, steps: KeyPath) -> tuple[str, str]:
    """What is wrong and what mends it."""
    kind, context, value = details["type"], details.get("ctx", {}), details["input"]
    if kind in ("recipe", "reference"):
        return context["what"], context["fix"]
    if kind == "missing":
        return "missing", f"add {steps[-1]}: ..."
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"must be one of {', '.join(choices)}, got {show(value)}", did_you_mean(value, choices)
    if kind in _TYPES:
        wanted, fix = _TYPES[kind]
        if steps and steps[-2:-1] in (("models",), ("sources",)) and isinstance(value, str):
            fix = f"write - model: {value}"
        return f"must be {wanted}, got {show(value)}", fix
    if kind == "too_short":
        return "is empty", "list what is merged"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"must be {words} {context[bound]}, got {show(value)}", ""
    return details["msg"], ""
