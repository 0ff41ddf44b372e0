"""The value of a parameter for one tensor: gradients over layers, filters by tensor name, and the levels of a recipe.

The rules are mergekit's. A setting is a scalar, a gradient (a list of scalars), or a list of conditions with filters. The most
specific level that sets a parameter wins: source, output slice, module, recipe, and finally the method's default.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from pydantic import TypeAdapter, ValidationError

from paft_merge.errors import Problem, RecipeError
from paft_merge.methods import REQUIRED, Method, Parameter
from paft_merge.methods.parameters import WEIGHT_WORDS
from paft_merge.recipe.diagnostics import IGNORED, Report, UnlocatedError
from paft_merge.recipe.yaml_source import KeyPath, SourceLocation, did_you_mean, show

Scalar: TypeAlias = bool | int | float | str

TRIM_RULES: Final = ("density", "l1_mass", "epsilon")
"""The keys of `trim: {...}`. A method with an `l1_mass` trims by the one that the most specific level sets."""

_DEFAULT = SourceLocation("", None, "")


class SettingError(UnlocatedError):
    """An invalid value of a parameter."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A value or gradient for the tensors whose names contain `filter`."""

    value: Scalar | tuple[Scalar, ...]
    filter: str | None
    """Part of a tensor's name; None or `*`: every tensor."""
    spot: SourceLocation

    def matches(self, tensor_name: str) -> bool:
        """Whether the condition applies to a tensor."""
        return self.filter in (None, "*") or bool(tensor_name and self.filter in tensor_name)

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """The value as a tuple of scalars."""
        return self.value if isinstance(self.value, tuple) else (self.value,)


@dataclass(frozen=True, slots=True)
class Setting:
    """The conditions of one parameter on one level, of which the first that matches applies."""

    conditions: tuple[Condition, ...]
    spot: SourceLocation

    def pick(self, tensor_name: str) -> Condition | None:
        """The condition that applies to a tensor; None if none matches or its value is an empty list."""
        found = next((c for c in self.conditions if c.matches(tensor_name)), None)
        return found if found and found.value != () else None

    @property
    def always(self) -> Condition | None:
        """The first condition if it applies to every tensor, else None."""
        first = self.conditions[0] if self.conditions else None
        return first if first and first.filter in (None, "*") and first.value != () else None


@dataclass(frozen=True, eq=False, slots=True)
class Level:
    """The settings of one `parameters:` mapping."""

    kind: Literal["source", "slice", "module", "recipe"]
    settings: Mapping[str, Setting]
    spot: SourceLocation


class Origin(NamedTuple):
    """The level and the place in the recipe that set a value; `spot` is empty for a default."""

    level: Literal["source", "slice", "module", "recipe", "default"]
    spot: SourceLocation

    def __str__(self) -> str:
        return f"{self.level}: {self.spot}" if self.level != "default" else "default"


class Resolved(NamedTuple):
    """The value of a parameter for one tensor, and its origin."""

    value: Any
    origin: Origin


def layer_t(index: int, count: int) -> float:
    """The place on a gradient, in [0, 1], of layer `index` of an output slice of `count` layers; 1 for a single layer.

    Tensors outside of layers (embeddings, the last norm, the head) use 0.
    """
    return index / (count - 1) if count > 1 else 1.0


def coerce(parameter: Parameter, value: Any) -> Any:
    """Convert a scalar of YAML or of a command line to the type of a parameter, by pydantic's lax rules, and check it.

    Args:
        parameter: its type, choices, bounds and flags.
        value: a scalar, or its text: `"1e-3"` is a float, and `1` and `"yes"` are bools.

    Raises:
        SettingError: the value has another type, is not finite, is out of bounds, or is not one of the choices.
    """
    if parameter.flags and value not in parameter.choices:
        try:
            return parameter.flags[_adapter(bool).validate_python(value)]
        except ValidationError:
            pass
    if isinstance(value, str) and value in parameter.words:
        return value
    try:
        made = _adapter(parameter.type).validate_python(value)
    except ValidationError:
        near = did_you_mean(value, parameter.words)
        if parameter.name == "weight" and value in WEIGHT_WORDS:
            near = "write a number; weights from norms are for methods that add up deltas, such as task_arithmetic and ties"
        raise SettingError(f"must be {_kind(parameter)}, got {show(value)}", near) from None
    if fault := parameter.fault(made):
        if parameter.choices:
            raise SettingError(f"{fault}, got {show(value)}", did_you_mean(made, parameter.choices))
        percent = parameter.high == 1 and 1 < made < math.inf
        raise SettingError(f"{fault}, got {made}", "it is a fraction: write 0.2 for 20 %" if percent else "")
    return made


def evaluate(condition: Condition, parameter: Parameter, t: float) -> Any:
    """The value of a condition at `t` in [0, 1].

    Numbers are interpolated linearly. Bools and words are not: each holds up to the next one.

    Raises:
        SettingError: a value is invalid, or an interpolated value of a whole-number parameter is not whole.
    """
    if not isinstance(condition.value, tuple):
        return coerce(parameter, condition.value)
    values = [coerce(parameter, v) for v in condition.value]
    last = len(values) - 1
    place = t * last
    low = int(place)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return values[low]
    part = place - low
    between = (1 - part) * values[low] + part * values[min(low + 1, last)]
    # Both ends are within the bounds, and so is the value between them: only its type is checked.
    try:
        return _adapter(parameter.type).validate_python(between)
    except ValidationError:
        what = f"must be {_kind(parameter)}, and the gradient gives {between:g} here"
        raise SettingError(what, "write one value, or conditions with filters") from None


def resolve(
    levels: Sequence[Level],
    parameter: Parameter,
    tensor_name: str,
    t: float = 0.0,
    *,
    model: object = None,
    rivals: Collection[str] = (),
) -> Resolved:
    """The value of a parameter for one tensor, and its origin.

    Args:
        levels: the levels, most specific first.
        parameter: the parameter.
        tensor_name: the name that filters match: the source's for its own parameters, the output's for shared ones.
        t: place on gradients, see `layer_t`.
        model: the source, for the message about a missing value.
        rivals: parameters of which only one may be set (see `rivals`): the most specific level decides which.

    Raises:
        RecipeError: a required parameter is not set, its value is invalid, or one level sets two rivals.
    """
    for level in levels:
        setting = level.settings.get(parameter.name)
        condition = setting.pick(tensor_name) if setting else None
        rival = _rival(level, parameter, tensor_name, rivals)
        if condition is None and rival is None:
            continue
        if condition is None:
            break
        if rival is not None:
            raise RecipeError([_clash(parameter.name, condition, rival, tensor_name)])
        try:
            return Resolved(evaluate(condition, parameter, t), Origin(level.kind, condition.spot))
        except SettingError as refusal:
            problem = Problem("RECIPE", str(condition.spot), refusal.what, refusal.fix)
            raise RecipeError([problem]) from None
    if parameter.default is REQUIRED:
        whose = f"{model}.{tensor_name}" if model is not None else tensor_name
        where = levels[0].spot if levels else ""
        raise RecipeError.of(
            "RECIPE", where, f"Missing required parameter {parameter.name} for {whose}", _no_match(levels, parameter)
        )
    return Resolved(parameter.default, Origin("default", _DEFAULT))


def resolve_all(
    levels: Sequence[Level],
    method: Method,
    scope: Literal["source", "shared"],
    tensor_name: str,
    t: float = 0.0,
    *,
    model: object = None,
) -> dict[str, Resolved]:
    """Every parameter of `method` with that scope, by name.

    Arguments and errors are those of `resolve`.
    """
    names = rivals(method)
    return {
        p.name: resolve(levels, p, tensor_name, t, model=model, rivals=names if p.name in names else ())
        for p in method.parameters
        if p.scope == scope
    }


class ParameterCache:
    """`resolve_all` for many tensors: results are cached by level, place on gradients, and matching filters."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self._filters: dict[int, tuple[str, ...]] = {}
        self._answers: dict[Any, dict[str, Any]] = {}

    def values(
        self,
        levels: Sequence[Level],
        scope: Literal["source", "shared"],
        tensor_name: str,
        t: float = 0.0,
        *,
        model: object = None,
    ) -> dict[str, Any]:
        """The values without their origins; callers must not change the mapping.

        Args:
            levels: the cache key is the identity of this object. The other arguments are those of `resolve_all`.
        """
        if id(levels) not in self._filters:
            conditions = (c for level in levels for setting in level.settings.values() for c in setting.conditions)
            self._filters[id(levels)] = tuple({c.filter for c in conditions if c.filter not in (None, "*")})
        parts = tuple(part in tensor_name for part in self._filters[id(levels)]) if tensor_name else ()
        asked = id(levels), scope, t, parts
        if asked not in self._answers:
            found = resolve_all(levels, self.method, scope, tensor_name, t, model=model)
            self._answers[asked] = {name: one.value for name, one in found.items()}
        return self._answers[asked]


def rivals(method: Method) -> tuple[str, ...]:
    """The parameters of which a recipe sets one; empty for a method without such a choice."""
    return TRIM_RULES if method.parameter("l1_mass") else ()


def read_setting(report: Report, steps: KeyPath, raw: Any) -> Setting:
    """Read the setting at `steps` from plain data, noting errors in `report`."""
    if isinstance(raw, Mapping):
        conditions = [_condition(report, steps, raw)]
    elif isinstance(raw, list | tuple) and any(isinstance(item, Mapping) for item in raw):
        conditions = [_condition(report, (*steps, i), item) for i, item in enumerate(raw)]
    elif isinstance(raw, list | tuple) and not raw:
        conditions = []
    else:
        conditions = [Condition(_value(report, steps, raw), None, report.located.spot(steps))]
    return Setting(tuple(conditions), report.located.spot(steps))


def _condition(report: Report, steps: KeyPath, raw: Any) -> Condition:
    spot = report.located.spot(steps)
    if not isinstance(raw, Mapping):
        report.error(
            spot, f"must be a condition like the other items, got {show(raw)}", "write {value: ..., filter: ...}"
        )
        return Condition((), None, spot)
    for key in (key for key in raw if key not in ("value", "filter")):
        fix = did_you_mean(key, ("value", "filter")) or "a condition has value and filter"
        report.warn(report.located.spot((*steps, key)), f"unknown key{IGNORED}", fix)
    if "value" not in raw:
        report.error(spot, "a condition needs a value", "write {value: ..., filter: ...}")
        return Condition((), None, spot)
    name = raw.get("filter")
    if isinstance(name, float):
        name = report.located.spelling((*steps, "filter")) or name
    if not isinstance(name, str | None):
        what = f"a filter is part of a tensor's name, got {show(name)}"
        report.error(report.located.spot((*steps, "filter")), what, "quote it, and write one name for each condition")
        name = None
    return Condition(_value(report, (*steps, "value"), raw["value"]), name, spot)


def _value(report: Report, steps: KeyPath, raw: Any) -> Scalar | tuple[Scalar, ...]:
    """A scalar or a gradient; empty if faulty."""
    listed = isinstance(raw, list | tuple)
    items = raw if listed else [raw]
    before = len(report.errors)
    for i, item in enumerate(items):
        spot = report.located.spot((*steps, i) if listed else steps)
        if not isinstance(item, bool | int | float | str):
            fix = "remove it" if item is None else "write a scalar, a list of scalars, or conditions {value, filter}"
            report.error(spot, f"must be a number, text, true or false, got {show(item)}", fix)
        elif isinstance(item, float) and not math.isfinite(item):
            report.error(spot, f"must be finite, got {item}")
    if len(report.errors) > before:
        return ()
    return tuple(items) if listed else raw


def _rival(level: Level, parameter: Parameter, tensor_name: str, rivals: Collection[str]) -> Condition | None:
    """The condition of another one of `rivals` on the level."""
    settings = (level.settings.get(name) for name in rivals if name != parameter.name)
    return next((found for s in settings if s and (found := s.pick(tensor_name))), None)


def _clash(name: str, one: Condition, other: Condition, tensor_name: str) -> Problem:
    what = f"{name} and {other.spot.path} both apply to {tensor_name}"
    return Problem("RECIPE", str(one.spot), what, f"keep one of {', '.join(TRIM_RULES)} at a level")


def _no_match(levels: Sequence[Level], parameter: Parameter) -> str:
    """The fix for a parameter that no level sets, or whose filters all miss the tensor."""
    found = next((s for level in levels if (s := level.settings.get(parameter.name))), None)
    if found:
        return f"no filter of {found.spot} matches; add a last `- value: ...` without a filter"
    return "write it under parameters, of this model or at the top"


def _kind(parameter: Parameter) -> str:
    if parameter.choices:
        return "one of " + ", ".join(parameter.choices)
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return " or one of ".join(
        [kinds.get(parameter.type, "another type"), *([", ".join(parameter.words)] * bool(parameter.words))]
    )


@lru_cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
