"""References to models in a recipe: a folder or Hub repository, a revision, and an optional adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from paft_merge.errors import RecipeError
from paft_merge.recipe.sections import Section, problems_of, refused
from paft_merge.recipe.yaml_source import dotted, show
from paft_merge.stores.urls import is_url


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model as a recipe names it; references that are spelled differently are different models.

    `str()` is `path@revision+lora@revision`, which is ambiguous for a path with an `@` or `+`; see `written`.
    """

    path: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None
    override_architecture: str | None = None
    label: str | None = field(default=None, compare=False)
    """A name that seeds random drops in place of the path; it does not distinguish models."""
    stacked: tuple[tuple[str, str | None], ...] = ()
    """Adapters after `lora`, each a path and a revision."""

    @classmethod
    def parse(cls, value: ModelRef | str | Mapping[str, Any]) -> ModelRef:
        """Read `path@revision+lora@revision` or `{model: ..., lora: ..., override_architecture: ..., label: ...}`.

        Several adapters, `path+lora+lora` or `lora: [..., ...]`, are added in their order.

        A `model:` before the path (old model cards) is dropped.

        Raises:
            RecipeError: the value has neither form.
        """
        try:
            return _ADAPTER.validate_python(value)
        except ValidationError as error:
            first = next(problems_of(error, _Form, value, dotted))
            raise RecipeError([replace(first, code="RECIPE")]) from None

    def __str__(self) -> str:
        return "+".join(_part(*place) for place in ((self.path, self.revision), *self.adapters))

    @property
    def adapters(self) -> tuple[tuple[str, str | None], ...]:
        """The path and revision of every adapter, in the order in which they are added."""
        return ((self.lora, self.lora_revision), *self.stacked) if self.lora else ()

    @property
    def base(self) -> ModelRef:
        """The same model without its adapters."""
        return ModelRef(self.path, self.revision, override_architecture=self.override_architecture)

    @property
    def stream(self) -> str:
        """The name that seeds this source's random drops: its label, else the reference as written."""
        return self.label or str(self)

    def written(self) -> str | dict[str, Any]:
        """The string form, or the object form where the string would not parse as an equal reference."""
        places = [self.path, self.revision, *(part for adapter in self.adapters for part in adapter)]
        marked = any(mark in place for place in places if place for mark in "+@") or self.path.startswith("model:")
        marked |= bool(self.adapters) and any(place != place.strip() for place in places if place)
        if not marked and self.override_architecture is None and self.label is None:
            return str(self)
        form: dict[str, Any] = {"model": {"path": self.path, "revision": self.revision}}
        adapters = [{"path": path, "revision": revision} for path, revision in self.adapters]
        if adapters:
            form["lora"] = adapters if self.stacked else adapters[0]
        return form | {
            "override_architecture": self.override_architecture,
            **({"label": self.label} if self.label else {}),
        }

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            _Form.reference,
            handler.generate_schema(_Form),
            serialization=core_schema.plain_serializer_function_ser_schema(ModelRef.written),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        place = {"type": ["string", "object"]}
        return {
            "type": ["string", "object"],
            "minLength": 1,
            "required": ["model"],
            "properties": {
                "model": {**place, "description": "`PATH[@REVISION]`, or `{path, revision}`."},
                "lora": {
                    "type": [*place["type"], "array", "null"],
                    "description": "`PATH[@REVISION]` of an adapter, or a list of them, which are added in their order.",
                    "default": None,
                },
                "override_architecture": {
                    "type": ["string", "null"],
                    "description": "The architecture that the model has in place of that of its config.",
                    "default": None,
                },
                "label": {
                    "type": ["string", "null"],
                    "minLength": 1,
                    "description": "A name that seeds random drops in place of the path.",
                    "default": None,
                },
            },
            "additionalProperties": False,
        }


def _part(path: str, revision: str | None) -> str:
    return f"{path}@{revision}" if revision else path


class _Place(Section):
    """`path@revision`, or `{path, revision}` for a path that has an `@` or `+` in it."""

    path: str
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def split(cls, value: Any) -> Any:
        if isinstance(value, str):
            # abfss://container@account.dfs.core.windows.net/path: the @ of a host starts no revision
            host = re.match(r"(?:[A-Za-z0-9]+://[^/]*)?", value)[0] if is_url(value) else ""  # type: ignore[index]
            path, *revision = value.removeprefix(host).split("@")
            path = host + path
            if len(revision) > 1:
                raise refused(f"more than one '@' in {show(value)}", "write {path: ..., revision: ...}")
            value = {"path": path, "revision": revision[0]} if revision else {"path": path}
        if isinstance(value, Mapping) and "" in (value.get("path"), value.get("revision")):
            raise refused("a model reference with an empty path or revision", "write PATH or PATH@REVISION")
        return value


class _Form(Section):
    """The object form, into which the string form is converted."""

    model: _Place
    lora: _Place | None = None
    stacked: tuple[_Place, ...] = ()
    override_architecture: str | None = None
    label: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def split(cls, value: Any) -> Any:
        if isinstance(value, ModelRef):
            lora = {"path": value.lora, "revision": value.lora_revision} if value.lora else None
            model = {"path": value.path, "revision": value.revision}
            stacked = [{"path": path, "revision": revision} for path, revision in value.stacked]
            more = {"stacked": stacked, "override_architecture": value.override_architecture, "label": value.label}
            return {"model": model, "lora": lora, **more}
        if isinstance(value, str):
            path, *adapters = value.removeprefix("model:").split("+")
            if adapters and any(part != part.strip() for part in (path, *adapters)):
                raise refused(f"blanks around '+' in {show(value)}", "write BASE+ADAPTER")
            return {"model": path, **_split_adapters(adapters)}
        if isinstance(value, Mapping) and "path" in value and "model" not in value:
            raise refused("a model reference needs the key model", "write {model: {path: ..., revision: ...}}")
        if isinstance(value, Mapping) and isinstance(value.get("lora"), list | tuple):
            return {**value, **_split_adapters(value["lora"])}
        if not isinstance(value, Mapping):
            context = {"what": f"must name a model, got {show(value)}", "fix": "write PATH or PATH@REVISION"}
            raise PydanticCustomError("reference", "{what}", context)
        return value

    def reference(self) -> ModelRef:
        """The flat form."""
        lora, lora_revision = (self.lora.path, self.lora.revision) if self.lora else (None, None)
        return ModelRef(
            self.model.path, self.model.revision, lora, lora_revision, self.override_architecture, self.label,
            tuple((one.path, one.revision) for one in self.stacked),
        )  # fmt: skip


def _split_adapters(adapters: Sequence[Any]) -> dict[str, Any]:
    """The keys of the object form for a list of adapters."""
    return {"lora": adapters[0], "stacked": list(adapters[1:])} if adapters else {}


_ADAPTER: TypeAdapter[ModelRef] = TypeAdapter(ModelRef)
