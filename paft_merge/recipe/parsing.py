"""Plain data to the schema of the language, with every error of shape and type.

pydantic finds the errors. Faulty values are then removed or replaced, and the rest is validated again, so that one wrong
dtype does not hide errors further down.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from paft_merge.recipe.diagnostics import IGNORED, Report
from paft_merge.recipe.reference import ModelRef
from paft_merge.recipe.schema import Language
from paft_merge.recipe.sections import explain, fields_at, steps_in
from paft_merge.recipe.yaml_source import KeyPath, Located, did_you_mean, dotted, show

_REFERENCE = ("model", "lora", "override_architecture", "label", "path", "revision")
_SHAPES = {"models", "slices", "modules", "tokenizer", "tokenizer_source", "token", "token_id"}
"""When one of these is faulty, an error of the mapping around it is a consequence and is not reported."""


_MERGE_KEYS = {"merge_method", "models", "slices", "modules"}
_RUN_KEYS = {"adapters", "merge", "audit", "evaluate", "compare", "export", "push", "seeds", "tune"}


def kind_of(document: Any) -> Literal["merge", "run"] | None:
    """Whether a document is a recipe for `paft merge` or for `paft run`, by its top-level keys; None if that is unclear."""
    keys = document.keys() if isinstance(document, Mapping) else set[str]()
    is_merge, is_run = bool(keys & _MERGE_KEYS), bool(keys & _RUN_KEYS)
    return None if is_merge == is_run else "merge" if is_merge else "run"


def read_language(located: Located, report: Report, parameters: Collection[str]) -> tuple[Language | None, set[str]]:
    """Validate data as the language, noting errors and unknown keys in `report`.

    Args:
        located: the data with its lines.
        report: receives errors and warnings.
        parameters: parameter names of all methods, to recognise a misplaced parameter.

    Returns:
        The model, or None when a required key is faulty or missing, and the keys with faulty values.
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
        """Note the errors of one validation and remove them from `data`; False when one cannot be removed."""
        self.passes += 1
        located = [(steps_in(data, details), details) for details in found]
        return all([self.settle(data, *one) for one in located])  # noqa: C419, every fault is noted

    def settle(self, data: dict[str, Any], steps: KeyPath, details: ErrorDetails) -> bool:
        """Note one error and remove it from `data`; False when that is not possible."""
        key = steps[-1] if steps else ""
        if self.settled.setdefault(steps, self.passes) < self.passes:
            return False
        if details["type"] == "too_short" and details["input"]:
            return True  # pydantic does not count faulty items
        around = _at(data, steps[:-1])
        if type(around) not in (dict, list):
            return True  # inside a value with an error that is noted, which was replaced or removed
        if details["type"] == "extra_forbidden":
            self.unknown(steps, around)
            around.pop(key, None)
            return True
        spelling = self.located.spelling(steps)
        if spelling is not None and details["type"] in ("string_type", "reference"):
            around[key] = spelling
            return True
        if not any(place[:-1] == steps and place[-1] in _SHAPES for place in self.taken_out):
            self.report.error(self.located.spot(steps), *explain(details, steps))
        return self.take_out(steps, around)

    @property
    def faulty(self) -> set[str]:
        """The keys with faulty values."""
        return {str(place[-1]) for place in self.taken_out}

    def take_out(self, steps: KeyPath, around: Any) -> bool:
        """Replace or remove a faulty value; False when the recipe needs it."""
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
        """Warn that a key is ignored, with the key that was probably meant."""
        key = str(steps[-1])
        known = fields_at(Language, steps[:-1]) or _REFERENCE
        spot = self.located.spot(steps)
        if key == "revision" and "model" in around:
            self.report.warn(spot, "unknown key, so this revision is not used", "write model: PATH@REVISION")
        elif key == "residual_weight":
            self.report.warn(spot, f"mergekit never reads this key{IGNORED}", "remove it")
        elif key in self.parameters and "parameters" in known:
            self.report.warn(
                spot, "ignored, because a parameter belongs under 'parameters'", f"write parameters: {{{key}: ...}}"
            )
        else:
            fix = did_you_mean(key, known)
            if not fix and "parameters" in known and (near := did_you_mean(key, self.parameters)):
                fix = f"{near.removesuffix('?')}, under 'parameters'?"
            self.report.warn(spot, f"unknown key{IGNORED}", fix or f"known here: {', '.join(known)}")


def _at(data: Any, steps: KeyPath) -> Any:
    """The value at a key path, or the first one on the way that is not a mapping or list."""
    for step in steps:
        if isinstance(data, dict):
            data = data.get(step)
        elif isinstance(data, list):
            data = data[int(step)]
    return data
