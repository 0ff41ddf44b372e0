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
        return {**made, **schema, "$defs": defs}
    run, defs = _run_schema(methods)
    if kind == "train":
        run["required"] = [*run["required"], "adapters"]
    if kind is not None:
        return {**made, **run, "$defs": defs}
    defs |= {"MergeRecipe": merge_schema(methods)[0], "RunRecipe": run}
    chosen = {"then": {"$ref": "#/$defs/MergeRecipe"}, "else": {"$ref": "#/$defs/RunRecipe"}}
    return {**made, "if": {"required": ["merge_method"]}, **chosen, "$defs": defs}


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
    return run, defs


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
