"""The space of a search: key paths of `merge:`, each with a range or a list of choices, for all tensors or by groups.

A key path may have a value for each kind of module (`attention`, `mlp`, or a part of tensor names), which becomes
mergekit's conditions with filters, and values for several layers, which become a gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from paft_merge.errors import PaftMergeError, Problems
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.quantized import dequantized
from paft_merge.methods import METHODS, REQUIRED
from paft_merge.pipeline.overrides import parse_key_path, put
from paft_merge.pipeline.preflight import check_merge
from paft_merge.pipeline.schema import RunRecipe
from paft_merge.recipe.yaml_source import did_you_mean, show

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

KINDS: Final[Mapping[str, tuple[str, ...]]] = {
    "attention": ("self_attn", "self_attention", ".attn.", ".attention.", "linear_attn"),
    "mlp": ("mlp", "feed_forward", ".ffn", "block_sparse_moe", ".experts.", ".fc1.", ".fc2."),
    "embeddings": ("embed", "lm_head", ".wte.", ".wpe.", "wte.", "wpe."),
}
"""Kinds of modules, and parts of the names of their tensors in the architectures of transformers."""

REST = "rest"
"""The tensors that are in no other group."""

_RANGE = ("range", "layers")


def is_range(choices: list[Any]) -> bool:
    """Whether choices are the ends of a range: `[low, high]`, or `[low, high, log]`."""
    numbers = [isinstance(one, int | float) and not isinstance(one, bool) for one in choices]
    return (len(choices) == 2 and all(numbers)) or (len(choices) == 3 and all(numbers[:2]) and choices[2] == "log")


@dataclass(frozen=True)
class Dimension:
    """One number or choice that is searched."""

    name: str
    """`parameters.lambda`, `models[0].parameters.weight.attention`, `models[0].parameters.weight[2]` of a gradient."""
    choices: list[Any]
    key: str
    """The key path of `merge:`."""
    group: str = ""
    """Empty: all tensors."""
    anchor: int | None = None
    """Place in a gradient; None without one."""

    def distribution(self) -> BaseDistribution:
        """The values as Optuna's distribution."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        choices = self.choices
        if not is_range(choices):
            return CategoricalDistribution(choices)
        low, high = choices[:2]
        if isinstance(low, int) and isinstance(high, int) and len(choices) == 2:
            return IntDistribution(low, high)
        return FloatDistribution(float(low), float(high), log=len(choices) == 3)


@dataclass(frozen=True)
class SearchSpace:
    """What a search varies in the section `merge:` of a recipe."""

    recipe: RunRecipe
    dimensions: tuple[Dimension, ...]
    filters: Mapping[str, tuple[str, ...]]
    """Of each group: parts of names of its tensors."""

    @classmethod
    def of(cls, recipe: RunRecipe, problems: Problems) -> SearchSpace:
        """Read `tune: {space: ...}`, noting every problem.

        Args:
            recipe: a recipe with `merge:` and `tune:`.
            problems: where problems are added; those of the recipe as it is are there already.
        """
        assert recipe.merge is not None
        assert recipe.tune is not None
        alone, found = set(problems.found), list[Dimension]()
        for key, given in recipe.tune.space.items():
            if key.startswith("merge."):
                where, fix = recipe.where("tune", "space", key), f"write {key.removeprefix('merge.')}"
                problems.add("TUNE", where, "a key is a path inside merge:", fix)
            else:
                found += _dimensions(recipe, key, given, problems)
        groups = dict.fromkeys(one.group for one in found if one.group not in ("", REST))
        space = cls(recipe, tuple(found), {group: KINDS.get(group, (group,)) for group in groups})
        if groups:
            space = space._in_base(problems)
            space._check_rest(problems)
        for one in found:
            where = recipe.where("tune", "space", one.key)
            for end in one.choices[:2] if is_range(one.choices) else one.choices:
                fault = Problems()
                with problems.catching(where):
                    firsts = {d.name: d.choices[0] for d in found if d.key == one.key}
                    check_merge(recipe, space.merge_with({**firsts, one.name: end}), ("merge",), fault)
                problems.found += [replace(p, where=where) for p in fault.found if p not in alone]
        problems.found = list(dict.fromkeys(problems.found))
        return space

    def _in_base(self, problems: Problems) -> SearchSpace:
        """The space with the filters that match tensors of the base; groups without any are problems."""
        if not Path(self.recipe.base).is_dir():
            return self  # on the Hub: every filter is written
        with suppress(PaftMergeError):  # the check of the base reports it
            with Checkpoint.open(Path(self.recipe.base)) as checkpoint:
                names = list(dequantized(checkpoint).tensors)
            kept = {group: tuple(f for f in fs if any(f in n for n in names)) for group, fs in self.filters.items()}
            for group in (group for group, filters in kept.items() if not filters):
                key = next(one.key for one in self.dimensions if one.group == group)
                fix = did_you_mean(group, (*KINDS, REST)) or f"write {', '.join(KINDS)}, {REST}, or a part of a name"
                problems.add(
                    "TUNE", self.recipe.where("tune", "space", key), f"no tensor of the base belongs to {group!r}", fix
                )
            return replace(self, filters={group: filters or self.filters[group] for group, filters in kept.items()})
        return self

    def _check_rest(self, problems: Problems) -> None:
        """Note the parameters that have no value for the tensors outside of their groups, and no default."""
        assert self.recipe.merge is not None
        data = self.recipe.merge.data
        method = METHODS.get(str(data.get("merge_method")))
        for key in dict.fromkeys(one.key for one in self.dimensions if one.group):
            steps = parse_key_path(key)
            parameter = method.parameter(str(steps[-1])) if method else None
            known = value_at(data, steps) is not None or value_at(data, ("parameters", steps[-1])) is not None
            has_rest = any(one.group == REST for one in self.dimensions if one.key == key)
            if parameter and parameter.default is REQUIRED and not known and not has_rest:
                what, fix = "has no value for the other tensors", f"add {REST}: [low, high], or a value in merge:"
                problems.add("TUNE", self.recipe.where("tune", "space", key), what, fix)

    def distributions(self) -> dict[str, BaseDistribution]:
        """The dimensions as Optuna's distributions, by name."""
        return {one.name: one.distribution() for one in self.dimensions}

    def merge_with(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The section `merge:` with chosen values at their key paths.

        Args:
            chosen: values by the name of a dimension; of a key path all or none.

        Raises:
            RecipeError: SET, the recipe has no place for a key path. TUNE, a value for the rest is missing.
        """
        assert self.recipe.merge is not None
        data: dict[str, Any] = copy.deepcopy(self.recipe.merge.data)
        for key in dict.fromkeys(one.key for one in self.dimensions if one.name in chosen):
            steps, groups = parse_key_path(key), dict[str, Any]()
            for one in self.dimensions:
                if one.key == key and one.anchor is None:
                    groups[one.group] = chosen[one.name]
                elif one.key == key:
                    groups.setdefault(one.group, []).append(chosen[one.name])
            put(data, steps, groups[""] if "" in groups else self._conditions(groups, value_at(data, steps)))
        return data

    def _conditions(self, groups: Mapping[str, Any], own: Any) -> list[Any]:
        """Values by group as mergekit's conditions, of which the first that matches a tensor applies.

        Parts of names are before kinds of modules, which may include them. The recipe's own value is that of the other
        tensors.
        """
        found: list[Any] = [
            {"filter": text, "value": groups[group]}
            for group in sorted(groups.keys() - {REST}, key=lambda group: (group in KINDS, [*groups].index(group)))
            for text in self.filters[group]
        ]
        if REST in groups:
            return [*found, {"value": groups[REST]}]
        if isinstance(own, list) and any(isinstance(one, Mapping) for one in own):
            return [*found, *own]
        return [*found, own] if isinstance(own, Mapping) else [*found, *([] if own is None else [{"value": own}])]

    def as_it_is(self) -> dict[str, Any]:
        """The values that the recipe has, by the name of a dimension; None where it leaves one out, or has another form."""
        data = self.recipe.merge.data if self.recipe.merge else None
        found = {}
        for one in self.dimensions:
            value = value_at(data, parse_key_path(one.key))
            if one.anchor is not None and isinstance(value, list):
                count = sum(d.key == one.key and d.group == one.group for d in self.dimensions)
                value = value[one.anchor] if len(value) == count else None
            alone = isinstance(value, Mapping | list) and (one.group or one.anchor is not None)
            found[one.name] = None if alone else value
        return found


def value_at(data: Any, steps: Iterable[str | int]) -> Any:
    """The value at a key path of plain data; None if there is none."""
    for step in steps:
        inside = step in data if isinstance(data, dict) else isinstance(data, list) and isinstance(step, int)
        data = data[step] if inside and not (isinstance(data, list) and int(step) >= len(data)) else None
    return data


def _dimensions(recipe: RunRecipe, key: str, given: Any, problems: Problems) -> list[Dimension]:
    """The dimensions of one key path."""
    where, found = recipe.where("tune", "space", key), list[Dimension]()
    grouped = isinstance(given, Mapping) and bool(given) and not given.keys() & set(_RANGE)
    given = given or []
    for group, one in given.items() if grouped else [("", given)]:
        name, layers, choices = f"{key}.{group}" if group else key, None, one
        if isinstance(one, Mapping):
            layers, choices = one.get("layers"), one.get("range")
            unknown = [str(k) for k in one if k not in _RANGE]
            if unknown:
                fix = did_you_mean(unknown[0], _RANGE) or f"known: {', '.join(_RANGE)}"
                problems.add("TUNE", where, f"unknown key {unknown[0]!r}", fix)
                continue
            if type(layers) is not int or layers < 2:
                what = f"layers is the number of values of a gradient, got {show(layers)}"
                problems.add("TUNE", where, what, "write for example {range: [0.2, 1.5], layers: 4}")
                continue
        if _is_sound(choices, where, problems):
            places = [None] if layers is None else list(range(layers))
            found += [
                Dimension(name if at is None else f"{name}[{at}]", list(choices), key, str(group), at) for at in places
            ]
    return found


def _is_sound(choices: Any, where: str, problems: Problems) -> bool:
    found = len(problems.found)
    if not isinstance(choices, list):
        what, fix = f"must be a range or a list of choices, got {show(choices)}", "write [low, high]"
        problems.add("TUNE", where, what, fix)
    elif not choices:
        problems.add("TUNE", where, "has nothing to choose from", "write [low, high], or a list of choices")
    elif is_range(choices) and choices[0] >= choices[1]:
        problems.add("TUNE", where, f"{choices[0]} is not below {choices[1]}", "write [low, high]")
    elif is_range(choices) and len(choices) == 3 and choices[0] <= 0:
        problems.add("TUNE", where, "a logarithmic range starts above 0", "raise the lower end")
    return len(problems.found) == found
