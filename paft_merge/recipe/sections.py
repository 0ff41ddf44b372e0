"""Sections of a recipe as frozen pydantic models: their base class, renamed keys, and errors with line numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from paft_merge.errors import Problem, RecipeError
from paft_merge.recipe.yaml_source import KeyPath, Located, did_you_mean, show

log = logging.getLogger(__name__)

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A mapping of a recipe: unknown keys are errors, and values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    RENAMED: ClassVar[Mapping[Any, str]] = {}
    """Former keys and their present names; `read_section` accepts a former key with a warning."""


def as_list(value: Any) -> Any:
    """Wrap a single value or mapping where a section wants a list."""
    return [value] if isinstance(value, str | Mapping | Section) else value


def beside_recipe(path: str, folder: Path) -> Path:
    """A file that a recipe names: relative to the recipe's folder if it exists there, else as written."""
    beside = folder / path
    return beside if beside.exists() else Path(path)


def suggestion(word: object, known: Iterable[str]) -> str:
    """The nearest known word, or all of them when they are few."""
    words = sorted(known)
    return did_you_mean(word, words) or (f"known: {', '.join(words)}" if len(words) <= 24 else "")


def read_section(model: type[S], located: Located) -> S:
    """Read a section into its model; a former key is accepted with one warning that names the present one.

    Raises:
        RecipeError: KEY, VALUE; every fault with its line and, for an unknown key, the nearest known one.
    """

    def tell(path: KeyPath, new: str) -> None:
        _warn(f"{located.spot(path)}: the key `{path[-1]}` was renamed; write `{new}`")

    data = current_keys(model, {} if located.data is None else located.data, tell)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RecipeError([_problem(fault, model, located) for fault in error.errors(include_url=False)]) from None


@cache
def _warn(text: str) -> None:
    """Log a warning once, however often the section is read."""
    log.warning("%s", text)


def current_keys(model: type[Section], data: Any, tell: Callable[[KeyPath, str], None] = lambda path, new: None) -> Any:
    """Replace former keys in a section's data; `tell` takes the path of each former key and its present name."""
    return _with_keys(model, data, lambda section: section.RENAMED, tell, ())


def former_keys(model: type[Section], data: Any) -> Any:
    """Return a section's data with its former keys, so that a renamed key leaves fingerprints unchanged."""
    return _with_keys(model, data, _former, lambda path, new: None, ())


def _former(section: type[Section]) -> Mapping[Any, str]:
    return {new: old for old, new in section.RENAMED.items() if isinstance(old, str)}


def _with_keys(
    model: type[Section],
    data: Any,
    names: Callable[[type[Section]], Mapping[Any, str]],
    tell: Callable[[KeyPath, str], None],
    path: KeyPath,
) -> Any:
    if isinstance(data, list):
        return [_with_keys(model, one, names, tell, (*path, i)) for i, one in enumerate(data)]
    if not isinstance(data, Mapping):
        return data
    found: dict[Any, Any] = {}
    for key, value in data.items():
        new = names(model).get(key, key)
        new = key if new in data else new  # both given: the former one is an unknown key
        here = (*path, "on" if key is True else key)  # YAML 1.1 reads a bare `on` as true
        if new != key:
            tell(here, new)
        field = model.model_fields.get(new) or model.model_fields.get(key)
        inner = _section_in(field.annotation) if field else None
        if inner is None or field is None:
            found[new] = value
        elif get_origin(field.annotation) is dict and isinstance(value, Mapping):
            found[new] = {name: _with_keys(inner, one, names, tell, (*here, name)) for name, one in value.items()}
        else:
            found[new] = _with_keys(inner, value, names, tell, here)
    return found


def _section_in(annotation: Any) -> type[Section] | None:
    """The section class inside an annotation such as `list[DataSpec] | None`."""
    if inside := get_args(annotation):
        return next(filter(None, map(_section_in, inside)), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _problem(fault: Any, model: type[Section], located: Located) -> Problem:
    path = tuple(part for part in fault["loc"] if part not in ("str", "list[str]", "int"))  # branches of unions
    where = str(located.spot(path))
    if fault["type"] == "extra_forbidden":
        owner = _section_at(model, path[:-1])
        if new := owner.RENAMED.get(path[-1]):
            return Problem("KEY", where, f"the former name of `{new}`, which is given too", "remove it")
        known = [field.alias or name for name, field in owner.model_fields.items()]
        return Problem("KEY", where, "unknown key", suggestion(path[-1], known))
    what, given = str(fault["msg"]).removeprefix("Value error, "), fault.get("input")
    of_mapping = fault["type"] == "value_error" and not isinstance(given, str | int | float)
    quiet = fault["type"] == "missing" or of_mapping or "got" in what
    return Problem("VALUE", where, what if quiet else f"{what}, got {show(given)}")


def _section_at(model: type[Section], path: KeyPath) -> type[Section]:
    for part in path:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        model = (_section_in(field.annotation) if field else None) or model
    return model
