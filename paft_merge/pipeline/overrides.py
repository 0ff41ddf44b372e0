"""`--set key=value`: changes the value at a dotted key path of a recipe before the recipe is read."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from paft_merge.errors import Problems, RecipeError
from paft_merge.recipe.yaml_source import Located, did_you_mean, dotted, load_yaml, refuse_secrets, show

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def parse_key_path(text: str) -> tuple[str | int, ...]:
    """`merge.models[0].parameters.weight` (or `merge.models.0...`) as keys and indices.

    Raises:
        RecipeError: SET, it is not a dotted key path.
    """
    found = [int(index) if index else int(word) if word.isdigit() else word for word, index in _STEP.findall(text)]
    if not found or re.sub(r"[.\[\]]", "", text) != "".join(map(str, found)) or ".." in text:
        raise RecipeError.of("SET", text, "is not a key path", "write for example merge.parameters.density")
    return tuple(found)


def overridden(located: Located, overrides: Sequence[str]) -> Located:
    """The recipe with every `key=value` applied; values are YAML.

    Raises:
        RecipeError: SET, every override that cannot be applied; SECRET, those that hold an access token.
    """
    if not overrides:
        return located
    data, problems = copy.deepcopy(located.data), Problems()
    for override in overrides:
        key, equals, value = override.partition("=")
        with problems.catching():
            refuse_secrets({key.rpartition(".")[2].strip(): value.strip()})
            if not equals:
                raise RecipeError.of("SET", override, "has no '='", "write KEY=VALUE")
            steps = parse_key_path(key.strip())
            if len(steps) > 1 and str(steps[0]) not in data:
                raise RecipeError.of("SET", key, "the recipe has no such section", did_you_mean(steps[0], data))
            put(data, steps, _value(override, value))
    problems.raise_as(RecipeError)
    return replace(located, data=data, text="")


def _value(override: str, text: str) -> Any:
    try:
        return load_yaml(f"value: {text}\n").data["value"]
    except RecipeError as error:
        raise RecipeError.of(
            "SET", override, f"the value is not valid YAML: {error.problems[0].what}", "quote it"
        ) from error


def put(data: Any, steps: Sequence[str | int], value: Any) -> None:
    """Set a value in nested data; missing mappings are added, missing items of lists are errors.

    Raises:
        RecipeError: SET, the data has no place for the key path.
    """
    here = data
    for at, step in enumerate(steps[:-1]):
        here = _enter(here, step, steps[: at + 1])
    last = steps[-1]
    if isinstance(here, list):
        _item(here, last, steps)
        here[int(last)] = value
    elif isinstance(here, dict):
        here[str(last)] = value
    else:
        raise RecipeError.of("SET", dotted(steps), f"{dotted(steps[:-1])} is {show(here)}", "it has no keys")


def _enter(here: Any, step: str | int, so_far: Sequence[str | int]) -> Any:
    if isinstance(here, list):
        return _item(here, step, so_far)
    if not isinstance(here, dict):
        raise RecipeError.of("SET", dotted(so_far), f"{dotted(so_far[:-1])} is {show(here)}", "it has no keys")
    return here.setdefault(str(step), {})


def _item(here: list[Any], step: str | int, so_far: Sequence[str | int]) -> Any:
    if not isinstance(step, int) or step >= len(here):
        what = f"{dotted(so_far[:-1])} is a list of {len(here)}"
        raise RecipeError.of("SET", dotted(so_far), what, f"give a number from 0 to {len(here) - 1}")
    return here[step]
