"""The JSON Schema of the recipes of `paft merge`, `paft train` and `paft run`, for editors and other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from paft_merge.methods import METHODS, Method
from paft_merge.output.report_files import write_file
from paft_merge.pipeline.schema import RunLanguage
from paft_merge.recipe.json_schema import DIALECT, Json, definitions, merge_schema
from paft_merge.training.trl_configs import BASE, CONFIG_OF, ConfigField, config_fields

Kind = Literal["merge", "run", "train"]
KINDS: tuple[Kind, ...] = ("merge", "run", "train")


def schema_of(kind: Kind | None = None, methods: Mapping[str, Method] = METHODS) -> Json:
    """The JSON Schema of a kind of recipe.

    Args:
        kind: `merge`, `run` or `train`; None: one for all of them, which chooses by the key `merge_method`.
        methods: the methods that a recipe may name.
    """
    made: Json = {"$schema": DIALECT, "title": f"{kind or 'any'} recipe of paft_merge"}
    if kind == "merge":
        schema, defs = merge_schema(methods)
        return _with_defaults({**made, **schema, "$defs": defs})
    run, defs = _run_schema(methods)
    if kind == "train":
        run["required"] = [*run["required"], "adapters"]
    if kind is not None:
        return _with_defaults({**made, **run, "$defs": defs})
    defs |= {"MergeRecipe": merge_schema(methods)[0], "RunRecipe": run}
    chosen = {"then": {"$ref": "#/$defs/MergeRecipe"}, "else": {"$ref": "#/$defs/RunRecipe"}}
    return _with_defaults({**made, "if": {"required": ["merge_method"]}, **chosen, "$defs": defs})


def _with_defaults(schema: Json) -> Json:
    """Add the default of every key to its description, because editors show no other place of it."""
    seen, waiting = set[int](), [schema]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # sections share parts
            continue
        seen.add(id(node))
        default = node.get("default")
        if isinstance(node.get("description"), str) and default not in (None, "", [], {}):
            node["description"] += f" Default: {json.dumps(default)}."
        for one in node.values():
            waiting += [item for item in (one if isinstance(one, list) else [one]) if isinstance(item, dict)]
    return schema


SCHEMA_FILE = "paft.schema.json"
"""The file that `paft init` writes beside a recipe."""


def with_schema(text: str, recipe: Path) -> tuple[str, Path | None]:
    """The text of a recipe with the line that names its schema to editors, and the schema's file, which is written beside it.

    Without them where another program's file has that name.

    Raises:
        OutputError: OUTPUT, the file cannot be written.
    """
    file = recipe.parent / SCHEMA_FILE
    schema = schema_of()
    head = json.dumps({"$schema": schema["$schema"], "title": schema["title"]})[:-1]
    with suppress(FileNotFoundError), open(file, encoding="utf-8", errors="replace") as former:
        if former.read(len(head)) != head:
            return text, None
    write_file(file, json.dumps(schema) + "\n")
    return f"# yaml-language-server: $schema={SCHEMA_FILE}\n{text}", file


def _run_schema(methods: Mapping[str, Method]) -> tuple[Json, Json]:
    run, defs = definitions(RunLanguage)
    merge, more = merge_schema(methods, in_run=True)
    arm = {key: value for key, value in merge.items() if key != "oneOf"}  # without models it has all adapters
    arm["properties"] = {
        **merge["properties"],
        "sweep": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {"type": ["array", "object"]},
            "description": "Lists of values by parameter; every combination is an arm. Those of `weight` may be by adapter.",
        },
    }
    defs |= {**more, "MergeSection": merge, "Arm": arm}
    named = {"type": "string", "enum": merge["properties"]["merge_method"]["enum"]}
    _replace(run["properties"]["merge"], {"$ref": "#/$defs/MergeSection"})
    run["properties"]["adapters"] |= {
        "anyOf": [{"type": "object", "minProperties": 1, "additionalProperties": _ADAPTER}, {"const": False}]
    }
    methods_key = defs["CompareSpec"]["properties"]["methods"]
    one = {"if": {"type": "string"}, "then": named, "else": {"$ref": "#/$defs/Arm"}}
    methods_key["anyOf"] = [named, {"$ref": "#/$defs/Arm"}, {"type": "array", "items": one}]
    _replace(defs["PolishSpec"]["properties"]["merge"], {"$ref": "#/$defs/Arm"})
    _add_training(defs)
    return run, defs


_TYPES = {
    "bool": ["boolean"], "int": ["integer"], "float": ["number"], "str": ["string"], "dict": ["object"],
    "list": ["array", "string"], "None": ["null"],
}  # fmt: skip
"""Types of JSON by the names in annotations; a list may be written as its only text, and other classes are written as text."""


def _add_training(defs: Json) -> None:
    """Describe `training:` by the TRL that is installed; without TRL it is any mapping."""
    shared: dict[str, list[ConfigField]] = {}  # equal fields of several configs are one definition

    def ref(name: str, field: ConfigField) -> Json:
        known = shared.setdefault(name, [])
        if field not in known:
            known.append(field)
        number = known.index(field)
        place = f"training.{name}.{number + 1}" if number else f"training.{name}"
        types = sorted({kind for one in field.types for kind in _TYPES.get(one, ["string"])})
        defs[place] = {"type": types, "description": field.text or "A field of TRL's config.", "default": field.default}
        return {"$ref": f"#/$defs/{place}"}

    rules = []
    for config in dict.fromkeys(CONFIG_OF.values()):
        if fields := config_fields(config):
            properties = {name: ref(name, field) for name, field in fields.items()}
            about = f"The fields of {config} of the TRL that wrote this schema."
            defs[config] = {"description": about, "properties": properties, "additionalProperties": False}
            objectives = [objective for objective, name in CONFIG_OF.items() if name == config]
            condition = {"required": ["objective"], "properties": {"objective": {"enum": objectives}}}
            rules.append({"if": condition, "then": {"properties": {"training": {"$ref": f"#/$defs/{config}"}}}})
    if rules:
        defs["AdapterSpec"]["allOf"] = [*defs["AdapterSpec"].get("allOf", ()), *rules]
        of_all = {name: ref(name, field) for name, field in config_fields(BASE).items()}
        defs["MixedSpec"]["properties"]["training"]["properties"] = of_all


def _replace(place: Json, schema: Json) -> None:
    """Replace the member of a union that is any mapping."""
    place["anyOf"] = [schema if one.get("type") == "object" else one for one in place["anyOf"]]


_ADAPTER: dict[str, Any] = {
    "type": ["object", "string"],
    "if": {"type": "string"},
    "else": {
        "if": {"required": ["path"]},
        "then": {"$ref": "#/$defs/ExistingAdapter"},
        "else": {"$ref": "#/$defs/AdapterSpec"},
    },
}
"""An entry of `adapters:`. Editors show better problems for conditions than for a union."""
