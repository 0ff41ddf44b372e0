"""Sections of a recipe as frozen pydantic models: their base class, renamed keys, and errors with line numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from paft_merge.errors import Problem, RecipeError
from paft_merge.recipe.yaml_source import KeyPath, Located, did_you_mean, show

log = logging.getLogger(__name__)

S = TypeVar("S", bound="Section")


_TYPES = {
    "string_type": ("text", "quote it"),
    "bool_type": ("true or false", ""),
    "bool_parsing": ("true or false", ""),
    "int_type": ("a whole number", ""),
    "int_parsing": ("a whole number", ""),
    "int_from_float": ("a whole number", ""),
    "float_type": ("a number", ""),
    "float_parsing": ("a number", ""),
    "list_type": ("a list", "begin every item with '- '"),
    "tuple_type": ("a list", "begin every item with '- '"),
    "dict_type": ("a mapping", "write key: value"),
    "mapping_type": ("a mapping", "write key: value"),
    "model_type": ("a mapping", "write key: value"),
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


class Section(BaseModel):
    """A mapping of a recipe: unknown keys are errors, and values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    RENAMED: ClassVar[Mapping[Any, str]] = {}
    """Former keys and their present names; `read_section` accepts a former key with a warning."""


def as_list(value: Any) -> Any:
    """Wrap a single value or mapping where a section wants a list."""
    return [value] if isinstance(value, str | Mapping | Section) else value


def exactly_one(*keys: str) -> dict[str, Any]:
    """The rule of a JSON Schema that one of `keys` is given and not empty."""
    given: dict[str, Any] = {"not": {"enum": [None, [], {}]}}
    return {"oneOf": [{"required": [key], "properties": {key: given}} for key in keys]}


def refused(what: str, fix: str = "") -> PydanticCustomError:
    """The error that a validator raises to choose the user's message itself."""
    return PydanticCustomError("recipe", "{what}", {"what": what, "fix": fix})


def beside_recipe(path: str, folder: Path) -> Path:
    """A file that a recipe names: relative to the recipe's folder if it exists there, else as written."""
    beside = folder / path
    return beside if beside.exists() else Path(path)


def is_pattern(path: str, folder: Path) -> bool:
    """Whether a path has a `*` and means the checkpoints of a run, because no folder has exactly this name."""
    return "*" in path and not beside_recipe(path, folder).is_dir()


def not_found(folder: Path) -> str:
    """Where a relative path was looked for in vain, as the end of a sentence: "it is ..."."""
    here = Path.cwd()
    if folder.resolve() == here:
        return f"not in the working directory ({here})"
    return f"neither beside the recipe ({folder.resolve()}) nor in the working directory ({here})"


def refuse_merge_recipe(located: Located) -> None:
    """Raise RecipeError RECIPE if a recipe that is to be run is one for `paft merge`."""
    if "merge_method" in located.data:
        where = located.spot(("merge_method",))
        raise RecipeError.of("RECIPE", where, "this is a merge recipe, not a run recipe", "use paft merge")


def suggestion(word: object, known: Iterable[str]) -> str:
    """The nearest known word, or all of them when they are few."""
    words = sorted(known)
    return did_you_mean(word, words) or (f"known: {', '.join(words)}" if len(words) <= 24 else "")


def read_section(model: type[S], located: Located) -> S:
    """Read a section into its model; a former key is accepted with one warning that names the present one.

    Raises:
        RecipeError: KEY for every unknown key, with the nearest known one; VALUE for every other error.
    """

    def on_former_key(path: KeyPath, new: str) -> None:
        _warn(f"{located.spot(path)}: the key `{path[-1]}` was renamed; write `{new}`")

    data = current_keys(model, {} if located.data is None else located.data, on_former_key)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RecipeError(tuple(problems_of(error, model, data, located.spot))) from None


@cache
def _warn(text: str) -> None:
    """Log a warning once, however often the section is read."""
    log.warning("%s", text)


def current_keys(
    model: type[Section], data: Any, on_former_key: Callable[[KeyPath, str], None] = lambda path, new: None
) -> Any:
    """Replace former keys in a section's data; `on_former_key` takes the path of each former key and its present name."""
    return _with_keys(model, data, lambda section: section.RENAMED, on_former_key, ())


def former_keys(model: type[Section], data: Any) -> Any:
    """Return a section's data with its former keys, so that a renamed key leaves fingerprints unchanged."""
    return _with_keys(model, data, _former, lambda path, new: None, ())


def _former(section: type[Section]) -> Mapping[Any, str]:
    return {new: old for old, new in section.RENAMED.items() if isinstance(old, str)}


def _with_keys(
    model: type[Section],
    data: Any,
    names: Callable[[type[Section]], Mapping[Any, str]],
    on_former_key: Callable[[KeyPath, str], None],
    path: KeyPath,
) -> Any:
    if isinstance(data, list):
        return [_with_keys(model, one, names, on_former_key, (*path, i)) for i, one in enumerate(data)]
    if not isinstance(data, Mapping):
        return data
    found: dict[Any, Any] = {}
    for key, value in data.items():
        new = names(model).get(key, key)
        new = key if new in data else new  # both given: the former one is an unknown key
        here = (*path, "on" if key is True else key)  # YAML 1.1 reads a bare `on` as true
        if new != key:
            on_former_key(here, new)
        field = model.model_fields.get(new) or model.model_fields.get(key)
        inner = _section_in(field.annotation) if field else None
        if inner is None or field is None:
            found[new] = value
        elif isinstance(value, Mapping) and _is_by_name(field.annotation):
            found[new] = {
                name: _with_keys(inner, one, names, on_former_key, (*here, name)) for name, one in value.items()
            }
        else:
            found[new] = _with_keys(inner, value, names, on_former_key, here)
    return found


def _is_by_name(annotation: Any) -> bool:
    """Whether an annotation is a mapping of sections by name, or that and None."""
    return any(get_origin(one) is dict for one in (annotation, *get_args(annotation)))


def _section_in(annotation: Any) -> type[Section] | None:
    """The section class inside an annotation such as `list[DataSpec] | None`."""
    if inside := get_args(annotation):
        return next(filter(None, map(_section_in, inside)), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def problems_of(
    error: ValidationError, model: type[BaseModel], data: Any, where: Callable[[KeyPath], object]
) -> Iterator[Problem]:
    """One problem for each key path of an error. If members of a union failed at different depths, the deepest counts.

    Args:
        error: raised by the validation of `data`.
        model: the model that was to be made.
        data: the validated data.
        where: makes the location of a message from a key path.
    """
    at: dict[KeyPath, list[ErrorDetails]] = {}
    for fault in error.errors(include_url=False):
        at.setdefault(steps_in(data, fault), []).append(fault)
    above = {steps[:end] for steps in at for end in range(len(steps))}
    for steps, faults in at.items():
        if steps in above:
            continue
        if faults[0]["type"] == "extra_forbidden":
            renamed = next((s.RENAMED for s in models_at(model, steps[:-1]) if issubclass(s, Section)), {})
            if new := renamed.get(steps[-1]):
                yield Problem("KEY", str(where(steps)), f"the former name of `{new}`, which is given too", "remove it")
            else:
                fix = suggestion(steps[-1], fields_at(model, steps[:-1]))
                yield Problem("KEY", str(where(steps)), "unknown key", fix)
            continue
        what, fix = explain(faults[0], steps)
        wanted = dict.fromkeys(_TYPES[fault["type"]][0] for fault in faults if fault["type"] in _TYPES)
        if len(wanted) > 1:
            what, fix = f"must be {' or '.join(wanted)}, got {show(faults[0]['input'])}", ""
        fields = [item for one in models_at(model, steps) for item in one.model_fields.items()]
        if fields and faults[0]["type"] == "model_type":
            keys = [field.alias or name for name, field in fields if field.is_required()] or [fields[0][0]]
            fix = f"write {{{', '.join(f'{key}: ...' for key in keys)}}}"
        yield Problem("VALUE", str(where(steps)), what, fix)


def explain(fault: ErrorDetails, steps: KeyPath) -> tuple[str, str]:
    """A pydantic error as the message and its fix (which may be empty), in the words a user of YAML knows."""
    kind, context, value = fault["type"], fault.get("ctx", {}), fault["input"]
    if kind in ("recipe", "reference"):
        return context["what"], context["fix"]
    if kind == "value_error":
        return str(context["error"]), ""
    if kind == "missing":
        return "missing", f"add {steps[-1]}: ..."
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        wanted = "one of " * (len(choices) > 1) + ", ".join(choices)
        return f"must be {wanted}, got {show(value)}", did_you_mean(value, choices)
    if kind in _TYPES:
        wanted, fix = _TYPES[kind]
        if steps and steps[-2:-1] in (("models",), ("sources",)) and isinstance(value, str):
            fix = f"write - model: {value}"
        return f"must be {wanted}, got {show(value)}", fix
    if kind in ("too_short", "string_too_short"):
        return "is empty", "list what is merged" if steps[-1:] == ("sources",) else ""
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"must be {words} {context[bound]:g}, got {show(value)}", ""
    if kind == "string_pattern_mismatch":
        return f"must match the pattern {context['pattern']}, got {show(value)}", ""
    return fault["msg"], ""


def steps_in(data: Any, fault: ErrorDetails) -> KeyPath:
    """The key path of a pydantic error in the data, without the names pydantic gives to the members of a union."""
    steps: list[str | int] = []
    for i, part in enumerate(fault["loc"]):
        is_missing = fault["type"] == "missing" and i == len(fault["loc"]) - 1
        if isinstance(data, Mapping) and (part in data or is_missing):
            data = data.get(part)
        elif isinstance(data, list | tuple) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        steps.append(part)
    return tuple(steps)


def fields_at(annotation: Any, steps: KeyPath) -> list[str]:
    """The keys that the mapping at `steps` may have; none if it is not a section."""
    fields = (item for model in models_at(annotation, steps) for item in model.model_fields.items())
    return list(dict.fromkeys(field.alias or name for name, field in fields))


def models_at(annotation: Any, steps: KeyPath) -> list[type[BaseModel]]:
    """The pydantic models that a value at `steps` may be by an annotation: a model, or a list, mapping or union of models.

    An index may be left out of `steps`, as for a key that takes one item or several.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = {field.alias or name: field.annotation for name, field in annotation.model_fields.items()}
        return models_at(fields.get(steps[0]), steps[1:]) if steps else [annotation]  # type: ignore[arg-type]
    origin, options = get_origin(annotation), get_args(annotation)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return models_at(options[1], steps[1:]) if steps else []
    if isinstance(origin, type) and issubclass(origin, list | tuple):
        steps = steps[1:] if steps and isinstance(steps[0], int) else steps
    return [model for option in options for model in models_at(option, steps)]
