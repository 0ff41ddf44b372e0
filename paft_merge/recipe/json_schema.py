"""A JSON Schema (draft 2020-12) of merge recipes, from the models of the language and the table of methods.

It is as strict as `paft merge --strict`: an unknown key is an error. It is stricter where a value has the wrong type and the
parser can see what is meant: a number in quotes, or a name without them that is a number. What depends on files or on several
places of a recipe is left to the parser.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeAlias

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from paft_merge.errors import DOCS
from paft_merge.methods import Method, Parameter
from paft_merge.recipe.resolution import TRIM_RULES
from paft_merge.recipe.schema import Language
from paft_merge.recipe.sections import Section, as_list

Json: TypeAlias = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_TYPES: Mapping[type, Json] = {
    bool: {"enum": [True, False, 0, 1]},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
}


class RecipeSchema(GenerateJsonSchema):
    """Adds to pydantic's schema what only the parser knows: docstrings of fields, former keys, single items for lists."""

    def model_schema(self, schema: core_schema.ModelSchema) -> Json:
        """The schema of a section, with a description and a default for every key."""
        made: Json = super().model_schema(schema)
        model: type[BaseModel] = schema["cls"]
        made.pop("title", None)
        made["description"] = inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0]
        texts = documentation(model)
        for name, field in model.model_fields.items():
            one = made["properties"][field.alias or name]
            one.pop("title", None)
            if name in texts:
                one["description"] = _LINK.sub(_absolute, texts[name])
            if field.default_factory is not None:
                one["default"] = field.get_default(call_default_factory=True, validated_data={})
        for former, name in model.RENAMED.items() if issubclass(model, Section) else ():
            if isinstance(former, str):
                present = made["properties"][name]
                made["properties"][former] = {
                    **present, "description": f"Former name of `{name}`.", "deprecated": True,
                }  # fmt: skip
        return made

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> Json:
        """A union whose members may overlap: the word `base` is also the name of a model."""
        made: Json = super().tagged_union_schema(schema)
        if "oneOf" in made:
            made["anyOf"] = made.pop("oneOf")
        made.pop("discriminator", None)
        return made

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> Json:
        """A list that may be written as its only item."""
        made: Json = super().function_before_schema(schema)
        if schema["function"]["function"] is not as_list:
            return made
        return {"anyOf": [made["items"], made]}


_LINK = re.compile(r"\]\((?:([\w-]+\.md))?(#[\w-]+)?\)")


def _absolute(link: re.Match[str]) -> str:
    """A link of a docstring, which is relative to the page of recipes, with its whole address."""
    return f"]({DOCS}/{link[1] or 'recipe.md'}{link[2] or ''})"


@cache
def documentation(model: type[BaseModel]) -> Mapping[str, str]:
    """The docstring of every field of a model, from its source and that of the models that it extends."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    above = [one for one in model.__bases__ if issubclass(one, BaseModel) and one.model_fields]
    found = {name: text for one in above for name, text in documentation(one).items()}
    for field, text in zip(body.body, body.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                found[name] = " ".join(words.split())
    return found


def definitions(model: type[BaseModel]) -> tuple[Json, Json]:
    """The schema of a model, and the schemas of the sections in it by name."""
    made = model.model_json_schema(ref_template="#/$defs/{model}", schema_generator=RecipeSchema)
    return made, made.pop("$defs", {})


def merge_schema(methods: Mapping[str, Method], *, in_run: bool = False) -> tuple[Json, Json]:
    """The schema of a merge recipe, and the definitions that it refers to.

    Args:
        methods: the methods that a recipe may name.
        in_run: the recipe is a section of a run, which has the base.
    """
    made, defs = definitions(Language)
    names = sorted(methods)
    made["properties"]["merge_method"] |= {
        "enum": names, "enumDescriptions": [f"{methods[name].title} ({methods[name].paper})" for name in names],
    }  # fmt: skip
    parameters = _Parameters(defs)
    rules = [
        {"if": _is_method(name), "then": _of_method(methods[name], parameters)} for name in names
    ]  # fmt: skip
    defs["ByMethod"] = {"description": "The parameters of each method.", "allOf": rules}
    made["allOf"] = [{"$ref": "#/$defs/ByMethod"}]
    if not in_run:
        with_base = [name for name in names if methods[name].base == "required"]
        places = [{"required": [key]} for key in ("base_model", "slices", "modules")]
        made["allOf"].append({"if": _is_method(*with_base), "then": {"anyOf": places}})
    return made, defs


def _is_method(*names: str) -> Json:
    return {"required": ["merge_method"], "properties": {"merge_method": {"enum": list(names)}}}


class _Parameters:
    """The definitions of parameters; methods share those that are equal."""

    def __init__(self, defs: Json) -> None:
        self.defs = defs
        self.names: dict[str, str] = {}

    def ref(self, parameter: Parameter) -> Json:
        key = repr(parameter)  # a default of another package's method may have no hash
        if key not in self.names:
            name = f"parameter.{parameter.name}"
            count = sum(one.partition(f"{name}.")[2].isdecimal() or one == name for one in self.names.values())
            self.names[key] = f"{name}.{count + 1}" if count else name
            self.defs[self.names[key]] = setting_schema(parameter)
        return {"$ref": f"#/$defs/{self.names[key]}"}

    def level(self, method: Method, scopes: tuple[str, ...], name: str) -> Json:
        """A reference to the schema of a `parameters:` mapping."""
        of_method = [one for one in method.parameters if one.scope in scopes]
        properties = {one.name: self.ref(one) for one in of_method}
        trims = {rule: properties[rule] for rule in TRIM_RULES if rule in properties}
        if trims and "trim" not in properties:
            properties["trim"] = {
                "type": "object", "properties": trims, "additionalProperties": False, "minProperties": 1,
                "maxProperties": 1, "description": f"How deltas are trimmed: by one of {', '.join(trims)}.",
            }  # fmt: skip
        self.defs[name] = {"type": ["object", "null"], "properties": properties, "additionalProperties": False}
        return {"$ref": f"#/$defs/{name}"}


def _of_method(method: Method, parameters: _Parameters) -> Json:
    """What a recipe with this method must also fulfil."""
    shared = {"parameters": parameters.level(method, ("source", "shared"), f"{method.name}.parameters")}
    own = {"items": {"properties": {"parameters": parameters.level(method, ("source",), f"{method.name}.source")}}}
    slices = {"items": {"properties": {**shared, "sources": own}}}
    places = {**shared, "models": own, "slices": slices}
    made: Json = {"properties": {**places, "modules": {"additionalProperties": {"properties": places}}}}
    if method.core_only:
        made["required"] = ["space"]
        made["properties"]["space"] = {"enum": ["core", "ctm"]}
    return made


def setting_schema(parameter: Parameter) -> Json:
    """The forms of a parameter: a value, a gradient over the layers, or conditions with filters."""
    scalar = _scalar(parameter)
    value = {"anyOf": [scalar, {"type": "array", "items": scalar}]}
    condition = {
        "type": "object",
        "required": ["value"],
        "properties": {
            "value": {**value, "description": "A value, or a gradient: a list that is interpolated over the layers."},
            "filter": {
                "type": ["string", "null"],
                "description": "Part of the names of the tensors that the value is for; without it all.",
            },
        },
        "additionalProperties": False,
    }
    made = {
        "description": parameter.doc,
        "anyOf": [*value["anyOf"], condition, {"type": "array", "items": condition}],
    }
    return {**made, "default": parameter.default} if type(parameter.default) in _TYPES else made


def _scalar(parameter: Parameter) -> Json:
    if parameter.choices:
        return {"enum": [*parameter.choices, *([False, True, 0, 1] if parameter.flags else [])]}
    made = dict(_TYPES[parameter.type])
    for bound, key in ((parameter.low, "minimum"), (parameter.high, "maximum")):
        if abs(bound) != float("inf"):
            made[key] = bound
    return {"anyOf": [made, {"enum": list(parameter.words)}]} if parameter.words else made
