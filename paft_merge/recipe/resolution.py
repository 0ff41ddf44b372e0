"""What a parameter is worth for one tensor: gradients over layers, filters by name, and which level of a recipe wins.

The rules are mergekit's. A setting is a scalar, a gradient (a list of scalars), or conditions with filters. Levels are
asked from the most specific to the least: source, output slice, module, recipe; then the method's default.
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
from paft_merge.recipe.diagnostics import Report
from paft_merge.recipe.yaml_source import KeyPath, SourceLocation, did_you_mean, show

Scalar: TypeAlias = bool | int | float | str

TRIM_RULES: Final = ("density", "l1_mass", "epsilon")
"""What `trim: {...}` may name. A method with an `l1_mass` trims by one of them: the one of the most specific level."""

_DEFAULT = SourceLocation("", None, "")


class SettingError(Exception):
    """A value that a parameter cannot take: `what` is wrong, and the `fix`."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


@dataclass(frozen=True, slots=True)
class Condition:
    """A value, or a gradient of values, for the tensors whose name contains `filter`."""

    value: Scalar | tuple[Scalar, ...]
    filter: str | None
    """None: every tensor."""
    spot: SourceLocation

    def matches(self, tensor_name: str) -> bool:
        """Whether it holds for a tensor; a plain substring, and `*` means every tensor."""
        return self.filter in (None, "*") or bool(tensor_name and self.filter in tensor_name)

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """Every scalar that is written here."""
        return self.value if isinstance(self.value, tuple) else (self.value,)


@dataclass(frozen=True, slots=True)
class Setting:
    """All that one level says of one parameter. The first condition that matches is the one in force."""

    conditions: tuple[Condition, ...]
    spot: SourceLocation

    def pick(self, tensor_name: str) -> Condition | None:
        """The condition in force for a tensor; None when none matches, or it is an empty list."""
        found = next((c for c in self.conditions if c.matches(tensor_name)), None)
        return found if found and found.value != () else None

    @property
    def always(self) -> Condition | None:
        """The condition that holds for every tensor because no filter comes before it; None without one."""
        first = self.conditions[0] if self.conditions else None
        return first if first and first.filter in (None, "*") and first.value != () else None


@dataclass(frozen=True, eq=False, slots=True)
class Level:
    """The parameters written in one place."""

    kind: Literal["source", "slice", "module", "recipe"]
    settings: Mapping[str, Setting]
    spot: SourceLocation


class Origin(NamedTuple):
    """Where a value comes from; `spot` has the file, the line and the path, and is empty for a default."""

    level: Literal["source", "slice", "module", "recipe", "default"]
    spot: SourceLocation

    def __str__(self) -> str:
        return f"{self.level}: {self.spot}" if self.level != "default" else "default"


class Resolved(NamedTuple):
    """A parameter's value for one tensor, and what set it."""

    value: Any
    origin: Origin


def layer_t(index: int, count: int) -> float:
    """Where layer `index` of an output slice of `count` layers lies on a gradient, in [0, 1]; a lone layer is at 1.

    Tensors outside of layers (embeddings, the last norm, the head) are at 0.
    """
    return index / (count - 1) if count > 1 else 1.0


def typed(parameter: Parameter, value: Any) -> Any:
    """`value` as the parameter's type, by pydantic's lax rules (`"1e-3"` is a float, 1 is a bool), within its bounds.

    Raises:
        SettingError: it is not of that type, not finite, out of bounds, or none of the choices.
    """
    if parameter.flags and value not in parameter.choices:
        try:
            return parameter.flags[_adapter(bool).validate_python(value)]
        except ValidationError:
            pass
    try:
        made = _adapter(parameter.type).validate_python(value)
    except ValidationError:
        raise SettingError(f"must be {_kind(parameter)}, got {show(value)}") from None
    if parameter.choices and made not in parameter.choices:
        raise SettingError(f"must be {_kind(parameter)}, got {show(value)}", did_you_mean(made, parameter.choices))
    if isinstance(made, float) and not math.isfinite(made):
        raise SettingError(f"must be finite, got {made}")
    if isinstance(made, int | float) and not parameter.low <= made <= parameter.high:
        raise SettingError(
            f"must be {_bounds(parameter)}, got {show(made)}", _SHARE_FIX if made > 1 and parameter.high == 1 else ""
        )
    return made


_SHARE_FIX = "it is a share: write 0.2 for 20 %"


def evaluate(condition: Condition, parameter: Parameter, t: float) -> Any:
    """The value at `t` in [0, 1]: numbers are interpolated, and of bools and words the last is taken at `t = 1` only.

    Raises:
        SettingError: a value does not suit the parameter, or an interpolated one is not integral where it must be.
    """
    if not isinstance(condition.value, tuple):
        return typed(parameter, condition.value)
    values = [typed(parameter, v) for v in condition.value]
    last = len(values) - 1
    place = t * last
    low = int(place)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return values[low]
    part = place - low
    between = (1 - part) * values[low] + part * values[min(low + 1, last)]
    # Within the bounds up to a rounding, because both ends are; so only the type is asked for again.
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
    """The value of a parameter for one tensor, and what set it.

    Args:
        levels: most specific first.
        tensor_name: for filters. A source's own name of the tensor for its parameters, the output's for shared ones.
        t: place on gradients, `layer_t`.
        model: named in the message when a required value is missing.
        rivals: parameters of which only one can hold (see `rivals`); a more specific level that gives another one wins.

    Raises:
        RecipeError: no level gives a required parameter, a value does not suit it, or two rivals meet on one level.
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
    """Every parameter of `method` with that scope, by name; arguments and errors are those of `resolve`."""
    names = rivals(method)
    return {
        p.name: resolve(levels, p, tensor_name, t, model=model, rivals=names if p.name in names else ())
        for p in method.parameters
        if p.scope == scope
    }


class ParameterCache:
    """`resolve_all` for the many tensors of one recipe: a name matters only by the filters that are part of it."""

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
        """The values alone, not to be changed; arguments and errors are those of `resolve_all`.

        Args:
            levels: the very object that was given before, where its answers are to be used again.
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
    """The ways to trim among which a recipe chooses one; none for a method that has no such choice."""
    return TRIM_RULES if method.parameter("l1_mass") else ()


def read_setting(report: Report, steps: KeyPath, raw: Any) -> Setting:
    """A setting from plain data at `steps`; what is wrong with it is noted in `report`."""
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
            spot, f"must be a condition like its neighbours, got {show(raw)}", "write {value: ..., filter: ...}"
        )
        return Condition((), None, spot)
    for key in (key for key in raw if key not in ("value", "filter")):
        fix = did_you_mean(key, ("value", "filter")) or "a condition has value and filter"
        report.warn(report.located.spot((*steps, key)), "unknown key, so it is ignored", fix)
    if "value" not in raw:
        report.error(spot, "a condition needs a value", "write {value: ..., filter: ...}")
        return Condition((), None, spot)
    name = raw.get("filter")
    if isinstance(name, float):
        name = report.located.spelling((*steps, "filter")) or name
    if not isinstance(name, str | None):
        what = f"a filter is part of a tensor's name, got {show(name)}"
        report.error(report.located.spot((*steps, "filter")), what, "quote it, one name a condition")
        name = None
    return Condition(_value(report, (*steps, "value"), raw["value"]), name, spot)


def _value(report: Report, steps: KeyPath, raw: Any) -> Scalar | tuple[Scalar, ...]:
    """A scalar or a gradient; an empty one where it was faulty."""
    listed = isinstance(raw, list | tuple)
    items = raw if listed else [raw]
    before = len(report.errors)
    for i, item in enumerate(items):
        spot = report.located.spot((*steps, i) if listed else steps)
        if not isinstance(item, bool | int | float | str):
            fix = "remove it" if item is None else "write a scalar, a list of scalars, or conditions {value, filter}"
            report.error(spot, f"must be a number, a word, true or false, got {show(item)}", fix)
        elif isinstance(item, float) and not math.isfinite(item):
            report.error(spot, f"must be finite, got {item}")
    if len(report.errors) > before:
        return ()
    return tuple(items) if listed else raw


def _rival(level: Level, parameter: Parameter, tensor_name: str, rivals: Collection[str]) -> Condition | None:
    """What the level says of another one of `rivals`."""
    settings = (level.settings.get(name) for name in rivals if name != parameter.name)
    return next((found for s in settings if s and (found := s.pick(tensor_name))), None)


def _clash(name: str, one: Condition, other: Condition, tensor_name: str) -> Problem:
    what = f"{name} and {other.spot.path} both hold for {tensor_name}"
    return Problem("RECIPE", str(one.spot), what, f"keep one of {', '.join(TRIM_RULES)} at a level")


def _no_match(levels: Sequence[Level], parameter: Parameter) -> str:
    """How to give a parameter that every filter leaves out, or that is nowhere."""
    found = next((s for level in levels if (s := level.settings.get(parameter.name))), None)
    if found:
        return f"no filter of {found.spot} matches; add a last `- value: ...` without a filter"
    return "write it under parameters, of this model or once for all"


def _kind(parameter: Parameter) -> str:
    if parameter.choices:
        return "one of " + ", ".join(parameter.choices)
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
        parameter.type, "another type"
    )


def _bounds(parameter: Parameter) -> str:
    if math.isinf(parameter.high):
        return f"at least {parameter.low:g}"
    return f"at most {parameter.high:g}" if math.isinf(parameter.low) else f"in [{parameter.low:g}, {parameter.high:g}]"


@lru_cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
