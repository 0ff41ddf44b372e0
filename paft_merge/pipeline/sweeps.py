"""Sweeps of a comparison: a method with several values of its weights or parameters gives an arm for each combination."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

from pydantic import Field

from paft_merge.errors import Problems, RecipeError
from paft_merge.methods import METHODS, Parameter
from paft_merge.methods import Method as MergeMethod
from paft_merge.pipeline.overrides import parse_key_path, put
from paft_merge.recipe.yaml_source import did_you_mean, show

Weights = Annotated[list[float], Field(min_length=1)] | dict[str, Annotated[list[float], Field(min_length=1)]]
"""The weights of one adapter, or those of several by name."""

_MOST = 1000
"""Points of one method."""


@dataclass(frozen=True)
class Axis:
    """One swept quantity and its values."""

    name: str
    """In the names of the arms: `weight`, the adapter whose weight it is, or the parameter."""
    values: tuple[Any, ...]
    adapter: str | None = None
    """The adapter whose weight is swept; None for a parameter of the method."""


def check_sweep(sweep: Any) -> None:
    """Check the form of a `sweep`: lists of different values by key; those of `weight` may be lists by adapter.

    Raises:
        ValueError: it has another form.
    """
    if not isinstance(sweep, dict) or not sweep:
        raise ValueError("a sweep is a mapping of lists: {weight: [0.5, 1.0]}")
    for key, values in sweep.items():
        if key != "weight":
            _check_key(key)
        lists = values if key == "weight" and isinstance(values, dict) else {key: values}
        for name, one in lists.items():
            if not isinstance(one, list) or not one:
                raise ValueError(f"{name} is not a list of values, got {show(one)}")
            if any(isinstance(v, float) and not math.isfinite(v) for v in one):
                raise ValueError(f"{name} has a value that is not finite")
            if len({str(_shown(v)) for v in one}) < len(one):
                raise ValueError(f"{name} has the same value twice")
            if key == "weight" and not all(isinstance(v, int | float) and not isinstance(v, bool) for v in one):
                raise ValueError(f"the weights of {name} must be numbers, got {show(one)}")
        if not lists:
            raise ValueError(f"{key} names no values")
    if math.prod(len(v) for one in sweep.values() for v in (one.values() if isinstance(one, dict) else [one])) > _MOST:
        raise ValueError(f"a sweep has at most {_MOST} points")


Method = str | Mapping[str, Any]
"""An entry of `compare: {methods: ...}`: the name of a method, or a merge recipe."""


def axes_of(given: Method, weights: Weights | None, names: Sequence[str], preference: str | None) -> list[Axis]:
    """The axes of one entry of `compare: {methods: ...}`; none if it is not swept.

    Args:
        given: the entry, whose `sweep` was checked.
        weights: those of the section, for entries that have weights and set none.
        names: the adapters that are merged.
        preference: the adapter that a plain list of weights is about.
    """
    own = dict(given.get("sweep") or {}) if isinstance(given, Mapping) else {}
    if "weight" not in own and weights is not None and takes_weights(given):
        own = {"weight": weights, **own}
    axes = []
    for key, values in own.items():
        if key == "weight":
            several = isinstance(values, Mapping)
            for adapter, each in (values if several else {preference: values}).items():
                if adapter in names:
                    axes.append(Axis(str(adapter) if several else "weight", tuple(each), str(adapter)))
        else:
            axes.append(Axis(str(key), tuple(values)))
    return axes


def takes_weights(given: Method) -> bool:
    """Whether a method has weights and its entry sets none, so that `compare: {weights: ...}` applies to it."""
    entry = given if isinstance(given, Mapping) else {"merge_method": given}
    method = METHODS.get(str(entry["merge_method"]))
    parameters = entry.get("parameters")
    fixed = "models" in entry or "slices" in entry or (isinstance(parameters, Mapping) and "weight" in parameters)
    return method is not None and factor_of(method) is not None and not fixed


def factor_of(method: MergeMethod) -> Parameter | None:
    """Its parameter `weight` if that is a factor, as it is in all methods but the geometric median: a count is not negative."""
    weight = method.parameter("weight")
    return weight if weight is not None and weight.low < 0 else None


def points_of(axes: Sequence[Axis]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of every point, one for each axis, the last axis fastest; none without axes."""
    yield from product(*(axis.values for axis in axes)) if axes else ()


def named(axes: Sequence[Axis], values: Sequence[Any]) -> dict[str, Any]:
    """The values of a point by the names of the axes, 1 for 1.0."""
    return {axis.name: _shown(value) for axis, value in zip(axes, values, strict=True)}


def _shown(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def at_point(written: Mapping[str, Any], axes: Sequence[Axis], values: Sequence[Any]) -> dict[str, Any]:
    """A merge recipe with the values of a point.

    Args:
        written: the merge recipe, with adapters by name.
        axes: the axes of its sweep.
        values: one for each axis.

    Raises:
        RecipeError: SET, the recipe has no place for a parameter.
    """
    data: dict[str, Any] = copy.deepcopy(dict(written))
    for axis, value in zip(axes, values, strict=True):
        if axis.adapter is None:
            put(data, ("parameters", *parse_key_path(axis.name)), value)
        for entry in data.get("models") or ():
            if axis.adapter is not None and isinstance(entry, dict) and entry.get("model") == axis.adapter:
                entry["parameters"] = {**(entry.get("parameters") or {}), "weight": value}
    return data


def check_sweeps(
    weights: Weights | None, methods: Sequence[Method], names: Sequence[str], preference: str | None,
    where: Callable[..., str], problems: Problems,
) -> None:  # fmt: skip
    """Add the problems of the sweeps of a comparison.

    Args:
        weights: those of the section.
        methods: the entries of `methods`.
        names: the adapters of the recipe.
        preference: the adapter that a plain list of weights is about.
        where: file, line and path of a key path of the recipe.
        problems: where problems are added.
    """

    def check(swept: Any, place: str, models: Any = None) -> None:
        given = list(swept) if isinstance(swept, Mapping) else [preference]
        listed = [m.get("model") for m in models if isinstance(m, dict)] if isinstance(models, list) else names
        for adapter in given:
            if adapter is None:
                fix = f"name it with preference:, or write {{{names[-1] if names else 'NAME'}: [...]}}"
                problems.add(
                    "COMPARE", place, "a list of weights is for the preference adapter, which is not known", fix
                )
            elif adapter not in listed:
                known = f"adapters are {', '.join(map(str, listed))}" if listed else f"write {{model: {adapter}}}"
                fix = did_you_mean(adapter, map(str, listed)) or known
                problems.add("COMPARE", place, f"no adapter {adapter!r} is merged", fix)

    if weights is not None:
        check(weights, where("compare", "weights"))
        if not any(map(takes_weights, methods)):
            what = "none of the methods takes these weights: they have none, or set their own"
            problems.add("COMPARE", where("compare", "weights"), what, "leave weights out, or add a method")
    for at, given in enumerate(methods):
        sweep = given.get("sweep") if isinstance(given, dict) else None
        if not isinstance(given, dict) or not sweep or "weight" not in sweep:
            continue
        method, place = METHODS.get(str(given["merge_method"])), where("compare", "methods", at)
        if method is not None and method.parameter("weight") is None:
            problems.add("COMPARE", place, f"{method.name} has no weights", "sweep another parameter")
        elif "slices" in given:
            problems.add("COMPARE", place, "a sweep cannot set weights inside slices", "write models:")
        else:
            check(sweep["weight"], place, given.get("models"))


def _check_key(key: Any) -> None:
    try:
        parse_key_path(str(key))
    except RecipeError as error:
        raise ValueError(f"{show(key)} is not the key path of a parameter, for example trim.l1_mass") from error
