"""Variants of adapters, their roles in a comparison, and the merges to compare. `steps.arms_of` makes the arms."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from paft_merge.errors import Problems
from paft_merge.methods import METHODS
from paft_merge.pipeline.named_models import names_adapter
from paft_merge.pipeline.schema import CompareSpec, PolishSpec, RunRecipe
from paft_merge.pipeline.sweeps import at_point, axes_of, check_sweeps, factor_of, named, points_of
from paft_merge.recipe.yaml_source import did_you_mean
from paft_merge.training.schema import SAMPLING


def usual_merge(method: str, count: int) -> Mapping[str, Any]:
    """The weight of each adapter and the parameters that the plain name of a method means under `compare: {methods: ...}`.

    Deltas keep their size, except in methods that take a mean of models by definition. Methods that take no weights use their
    defaults.

    Args:
        method: its name.
        count: the number of adapters that are merged.
    """
    half, pruned = {"density": 0.5}, {"density": 0.9, "gamma": 0.01}  # the latter are those of arXiv:2312.06795
    rows: Mapping[str, Mapping[str, Any]] = {
        "linear": {"weight": 1 / count},
        "nuslerp": {"weight": 1 / count},
        "multislerp": {"weight": 1 / count},
        "slerp": {"parameters": {"t": 0.5}},
        "task_arithmetic": {"weight": 1.0},
        "l1_ties": {"weight": 1.0},
        "sign_election": {"weight": 1.0},
        "ties": {"weight": 1.0, "parameters": half},
        "dare_ties": {"weight": 1.0, "parameters": half},
        "dare_linear": {"weight": 1.0, "parameters": half},
        "della": {"weight": 1.0, "parameters": half},
        "della_linear": {"weight": 1.0, "parameters": half},
        "breadcrumbs": {"weight": 1.0, "parameters": pruned},
        "breadcrumbs_ties": {"weight": 1.0, "parameters": pruned},
        "magmax": {"weight": 1.0},
        "pcb": {"weight": 1.0, "parameters": {"density": 0.5, "lambda": 1.5}},
        # A median is as small as a mean, and its weights are counts.
        "geometric_median": {"parameters": {"lambda": float(count)}},
    }
    return rows.get(method, {})


_LONGEST = 150
"""Characters of the folder of an arm, to which seeds and kinds are added."""


@dataclass(frozen=True)
class Variant:
    """An adapter as in the recipe, or without its `l1` and `trim` (`dense`)."""

    adapter: str
    """Name in the recipe."""
    dense: bool = False
    begin: float = 0.0
    end: float = 1.0
    """The part of its steps that is trained, as shares of them."""
    beta: float | None = None
    """Beta of its objective instead of the recipe's."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        steps = f"-steps{self.begin:g}-{self.end:g}" if (self.begin, self.end) != (0.0, 1.0) else ""
        return f"{self.adapter}{'-dense' * self.dense}{steps}{'' if self.beta is None else f'-beta{self.beta!r}'}"


@dataclass(frozen=True)
class Arm:
    """One model of the table, at one seed."""

    name: str
    group: str
    """`base`, `individual`, `sequential` (in any order), `parallel`, `mixed`, `polish`, or `merge`: the recipe's own."""
    seed: int | None
    parts: tuple[str, ...]
    """The model, or a base and the adapters on it."""
    needs: tuple[str, ...] = ()
    """Names of the steps that make it."""
    frontier: str = ""
    """Name of the frontier that this arm is a point of."""
    point: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The swept values of this point, by name."""

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^\w.-]+", "-", self.name).strip("-")


def writes_adapter(written: Mapping[str, Any]) -> bool:
    """Whether a merge recipe writes an adapter, as data."""
    output = written.get("output")
    return isinstance(output, Mapping) and output.get("kind") == "adapter"


def roles(recipe: RunRecipe) -> tuple[str | None, str | None]:
    """The names of the skill and the preference adapter: those under `compare`, else the first with a fitting objective."""
    compare = recipe.compare or CompareSpec()  # an existing adapter has a role only where `compare` names it
    first = [name for name, spec in recipe.adapters.items() if spec.objective in ("sft", "ift")]
    then = [name for name, spec in recipe.adapters.items() if spec.objective not in ("sft", "ift", "orpo", "mixed")]
    return compare.skill or next(iter(first), None), compare.preference or next(iter(then), None)


def skills(recipe: RunRecipe) -> dict[str, Variant]:
    """The variants of the skill adapter to compare, by `dense` or `l1`."""
    skill, _ = roles(recipe)
    if recipe.compare is None or skill is None or skill not in recipe.names:
        return {}
    if skill in recipe.existing:
        return {"dense": Variant(skill)}
    spec = recipe.adapters[skill]
    sparse = bool(spec.l1 or spec.trim)
    there = {"dense": Variant(skill, dense=sparse), **({"l1": Variant(skill)} if sparse else {})}
    return {key: there[key] for key in (recipe.compare.sft or there) if key in there}


def variants_of(recipe: RunRecipe) -> list[Variant]:
    """Every adapter on the base: those of the recipe, and the dense twin of the skill adapter where it is compared."""
    own = [Variant(name) for name in recipe.names]
    return list(dict.fromkeys([*own, *skills(recipe).values()]))


def arms_wanted(recipe: RunRecipe) -> list[str]:
    """The arms of the comparison. The default leaves out `sequential` where existing adapters make it impossible."""
    if recipe.compare is None:
        return []
    skill, preference = roles(recipe)
    possible = not recipe.existing or (skill is not None and preference in recipe.adapters)
    if possible or "arms" in recipe.compare.model_fields_set:
        return list(recipe.compare.arms)
    return [arm for arm in recipe.compare.arms if arm != "sequential"]


def chains(recipe: RunRecipe) -> dict[str, list[Variant]]:
    """The adapters of `order`, else the skill and the preference, by the skill's variant (`dense` or `l1`); none if a role is open."""
    order, (skill, preference) = recipe.compare.order if recipe.compare else None, roles(recipe)
    names = order or ([skill, preference] if skill and preference else [])
    kinds = skills(recipe) if skill in names else {"": None}
    return {key: [kind if kind and n == skill else Variant(n) for n in names] for key, kind in kinds.items() if names}


def merged_together(recipe: RunRecipe) -> dict[str, list[Variant]]:
    """The adapters that `parallel` merges: those of `chains`, else all of the recipe that have one objective."""
    mixed = [name for name, spec in recipe.adapters.items() if spec.objective == "mixed"]
    return chains(recipe) or {"": [Variant(name) for name in recipe.names if name not in mixed]}


def polished(recipe: RunRecipe) -> str | None:
    """The adapter that `polish` trains after the merge."""
    spec = (recipe.compare and recipe.compare.polish) or PolishSpec()
    skill, preference = roles(recipe)
    return {"skill": skill, "preference": preference}.get(spec.trained, spec.trained)


def check_compare(recipe: RunRecipe, problems: Problems) -> None:
    """Add the problems of `compare`: unknown adapters, and arms that the recipe's adapters do not allow."""
    compare = recipe.compare
    if compare is None:
        return
    names = list(recipe.names)
    for key in ("skill", "preference"):
        named = getattr(compare, key)
        if named is not None and named not in names:
            fix = did_you_mean(named, names) or f"adapters are {', '.join(names)}"
            problems.add("COMPARE", recipe.where("compare", key), f"no adapter {named!r}", fix)
    check_sweeps(compare.weights, compare.methods, names, roles(recipe)[1], recipe.where, problems)
    with problems.catching(recipe.where("compare", "methods")):
        _check_folders(recipe, problems)
    if recipe.evaluate is not None and not recipe.evaluate.needs_lm_eval:
        for at, metric in enumerate(compare.frontier or ()):
            if metric not in recipe.evaluate.metrics:
                known = list(recipe.evaluate.metrics)
                fix = did_you_mean(metric, known) or f"evaluations are {', '.join(known)}"
                problems.add("COMPARE", recipe.where("compare", "frontier", at), f"no evaluation {metric!r}", fix)
    for at, name in enumerate(compare.order or ()):
        if name not in names:
            fix = did_you_mean(name, names) or f"adapters are {', '.join(names)}"
            problems.add("COMPARE", recipe.where("compare", "order", at), f"no adapter {name!r}", fix)
    skill, _ = roles(recipe)
    arms, where = arms_wanted(recipe), recipe.where("compare")
    _check_trained_arms(recipe, arms, problems)
    if "parallel" in arms and len(names) < 2:
        problems.add("COMPARE", where, "parallel merges adapters, and there is only one", "leave parallel out of arms")
    elif skill in recipe.adapters and "l1" in (compare.sft or ()):
        spec = recipe.adapters[str(skill)]
        if not (spec.l1 or spec.trim):
            fix = f"add l1: to adapters.{skill}, or leave l1 out"
            problems.add("COMPARE", recipe.where("compare", "sft"), f"{skill} is not trained sparse", fix)


_TRAINED = {
    "sequential": "sequential trains the preference adapter on the merged skill model",
    "sequential_reversed": "sequential_reversed trains the skill adapter on the merged preference model",
    "mixed": "mixed trains one adapter on the objectives of all",
    "polish": "polish trains one adapter further after the merge",
}
"""The arms that train, and what they do."""


def _check_trained_arms(recipe: RunRecipe, arms: Sequence[str], problems: Problems) -> None:
    """Add the arms that train adapters that exist already or are not known, and settings of arms that are not asked for."""
    compare, (skill, preference), where = recipe.compare or CompareSpec(), roles(recipe), recipe.where("compare")
    order = compare.order or [name for name in (skill, preference) if name]
    for arm, does in _TRAINED.items():
        if arm not in arms:
            if getattr(compare, arm, None) is not None:
                place = recipe.where("compare", arm)
                problems.add("COMPARE", place, f"{arm} is not among the arms", f"add {arm} to arms, or remove this")
            continue
        of: dict[str, Sequence[str | None]] = {
            "sequential": order[1:], "sequential_reversed": order[:-1], "mixed": order, "polish": [polished(recipe)],
        }  # fmt: skip
        trained = of[arm] if len(order) > 1 else [skill if arm == "sequential_reversed" else preference]
        existing = [name for name in trained if name is None or name in recipe.existing]
        if recipe.existing and existing:
            done = existing[0] or "each adapter of this recipe"
            problems.add("COMPARE", where, f"{does}, and {done} exists already", f"leave {arm} out of arms")
        elif len(order) < 2:
            what = f"{arm} needs an adapter for the skill and one for the preference"
            problems.add("COMPARE", where, what, "name them with skill: and preference:")
        elif arm == "polish" and trained[0] not in order:
            place, what = recipe.where("compare", arm, "with"), f"{trained[0]} is not among the merged adapters"
            problems.add("COMPARE", place, what, did_you_mean(trained[0], order) or f"these are {', '.join(order)}")
        elif all(name in recipe.adapters for name in trained):
            _check_settings(recipe, arm, order, problems)


def _check_settings(recipe: RunRecipe, arm: str, order: Sequence[str], problems: Problems) -> None:
    """Add the settings of an arm that its adapters do not allow."""
    compare = recipe.compare or CompareSpec()

    def check_steps(name: str, shares: Sequence[float], *path: str) -> None:
        spec, place = recipe.adapters[name], recipe.where("compare", *path)
        if spec.objective in SAMPLING:
            what = f"{name} is trained in rounds ({spec.objective}), which cannot be shortened by steps"
            problems.add("COMPARE", place, what, f"use another adapter, or leave {path[0]} out")
        steps = spec.training.get("max_steps", -1)
        for share in shares:
            if isinstance(steps, int) and steps > 0 and not 0 < round(steps * share) < steps:
                what = f"{share:g} of {steps} steps of {name} is {round(steps * share)} steps"
                problems.add("COMPARE", place, what, "leave at least one step on each side")

    if arm == "sequential" and compare.sequential:
        if compare.sequential.beta and (objective := recipe.adapters[order[-1]].objective) not in _WITH_BETA:
            place, what = recipe.where("compare", arm, "beta"), f"{order[-1]} ({objective}) has no beta"
            problems.add("COMPARE", place, what, "remove beta")
        if compare.sequential.steps:
            check_steps(order[-1], compare.sequential.steps, arm, "steps")
    if arm == "polish":
        merge = merge_before_polish(recipe)
        for name in order:
            if not names_adapter(merge.written, name):
                place, what = recipe.where(*merge.steps), f"the merge before the polish does not have {name}"
                problems.add("COMPARE", place, what, "add it to models, or leave it out of order")
        check_steps(str(polished(recipe)), (compare.polish or PolishSpec()).share, arm, "share")


_WITH_BETA = ("dpo", "orpo", "on_policy", "rloo", "grpo")
"""Objectives that have a beta."""


def _check_folders(recipe: RunRecipe, problems: Problems) -> None:
    """Add the merges of `parallel` whose folders would have long names or the same name."""
    folders = dict[str, str]()
    for name, _, steps, *_ in merges_of(recipe):
        slug = Arm(f"parallel {name}", "", None, ()).slug
        if len(slug) > _LONGEST:
            what, fix = f"the name of the arm has {len(name)} characters", f"at most {_LONGEST - 9} are possible"
            problems.add("COMPARE", recipe.where(*steps), what, fix)
        elif slug in folders:
            what = f"the arms {folders[slug]!r} and {name!r} would have one folder, {slug}"
            problems.add("COMPARE", recipe.where(*steps), what, "let their names differ in letters or digits")
        folders.setdefault(slug, name)


class ComparedMerge(NamedTuple):
    """A merge of `parallel`."""

    name: str
    written: Mapping[str, Any]
    """The merge recipe, with adapters by name."""
    steps: tuple[str | int, ...]
    """Its key path in the run's recipe."""
    frontier: str = ""
    """The name of its method if that is swept."""
    point: Mapping[str, Any] = {}
    """The swept values, by name."""


def merges_of(recipe: RunRecipe) -> Iterator[ComparedMerge]:
    """Yield every merge recipe under `compare: {methods: ...}`; a method that is swept gives one for each point."""
    together = list(merged_together(recipe).values())
    if recipe.compare is None or "parallel" not in arms_wanted(recipe) or not together:
        return
    names = [variant.adapter for variant in together[0]]
    seen = dict[str, int]()
    for at, given in enumerate(recipe.compare.methods):
        if given == "slerp" and len(names) != 2 and "methods" not in recipe.compare.model_fields_set:
            continue  # a default that takes exactly two models
        written: dict[str, Any] = dict(given) if isinstance(given, dict) else {"merge_method": given}
        method = str(written["merge_method"])
        name = str(written.pop("name", None) or method)
        seen[name] = seen.get(name, 0) + 1
        name = f"{name} {seen[name]}" if seen[name] > 1 else name
        axes = axes_of(given, recipe.compare.weights, names, roles(recipe)[1])
        swept = {axis.adapter for axis in axes if axis.adapter}
        plain = isinstance(given, str) or (written.pop("sweep", None) is not None and "parameters" not in given)
        known = usual_merge(method, len(names)) if plain else {}
        if "models" not in written and "slices" not in written:
            written["models"] = _models(recipe, names, method, written.get("parameters"), swept)
        if known.get("parameters"):
            written["parameters"] = dict(known["parameters"])
        if method == "slerp" and "base_model" not in written:
            written["base_model"] = names[0]
        for key in ("out_dtype", "dtype", "rounding", "seed"):
            if recipe.merge is not None and key in recipe.merge.data and key not in written:
                written[key] = recipe.merge.data[key]
        steps = ("compare", "methods", at)
        if not axes:
            yield ComparedMerge(name, written, steps)
        for values in points_of(axes):
            point = named(axes, values)
            label = " ".join(f"{axis}={value}" for axis, value in point.items())
            yield ComparedMerge(f"{name} {label}", at_point(written, axes, values), steps, name, point)


def merge_before_polish(recipe: RunRecipe) -> ComparedMerge:
    """The merge recipe of the arm `polish`: the one that it names, else that of `merge:` if it has all adapters, else `task_arithmetic`."""
    compare = recipe.compare or CompareSpec()
    given = compare.polish.merge if compare.polish else None
    names = [variant.adapter for chain in chains(recipe).values() for variant in chain]
    if given is None and recipe.merge is not None and all(names_adapter(recipe.merge.data, name) for name in names):
        return ComparedMerge("merge", recipe.merge.data, ("merge",))
    alone = compare.model_copy(update={"arms": ["parallel"], "methods": [given or "task_arithmetic"], "weights": None})
    return next(merges_of(replace(recipe, compare=alone)))._replace(steps=("compare", "polish", "merge"))


def _models(
    recipe: RunRecipe, names: list[str], method: str, parameters: Any, swept: Collection[str]
) -> list[dict[str, Any]]:
    """The models of a merge under `compare: {methods: ...}` that lists none.

    Their weights are those of `merge:`, which may balance deltas of different sizes. If it has none for these adapters,
    they are those of `usual_merge`. A weight in the `parameters` of the method holds instead of both. Beside swept weights,
    a method that divides by the sum of the weights has weights of 1 too, so that a swept weight means the same in each.
    """
    weights: dict[str, Any] = {}
    known = METHODS.get(method)
    if "weight" not in (parameters if isinstance(parameters, dict) else {}):
        default = 1.0 if swept else usual_merge(method, len(names)).get("weight")
        weights = {} if default is None else dict.fromkeys(names, default)
        taken, balance = known and factor_of(known), _weights_of_merge(recipe, names)
        if taken and balance and (taken.words or not any(isinstance(weight, str) for weight in balance.values())):
            weights = balance
    return [{"model": n, **({"parameters": {"weight": weights[n]}} if n in weights else {})} for n in names]


def _weights_of_merge(recipe: RunRecipe, names: list[str]) -> dict[str, Any]:
    """The weight that `merge:` gives each adapter, 1 where it gives none; empty if it gives none to any."""
    data: Any = recipe.merge.data if recipe.merge is not None else {}
    models = data.get("models")
    mappings = [m for m in models if isinstance(m, dict)] if isinstance(models, list) else []
    entries = {m["model"]: m for m in mappings if isinstance(m.get("model"), str)}
    found: dict[str, Any] = {}
    for name in names:
        for holder in (entries.get(name), data if name in entries else None):
            given = holder.get("parameters") if isinstance(holder, dict) else None
            weight = given.get("weight") if isinstance(given, dict) else None
            if isinstance(weight, int | float | list | str) and not isinstance(weight, bool):
                found.setdefault(name, weight)
    return {name: found.get(name, 1.0) for name in names} if found else {}
