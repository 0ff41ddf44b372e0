"""The language of a merge recipe, mergekit's keys and our additions at the top level, as frozen pydantic models.

The models define keys, shapes and types. `normalized` gives a recipe its meaning; `validation` checks it against the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from paft_merge.recipe.reference import ModelRef
from paft_merge.recipe.sections import Section, as_list, refused
from paft_merge.recipe.yaml_source import did_you_mean, show

DTYPES = ("bfloat16", "float16", "float32", "float64")
"""The values of `dtype` and `out_dtype`."""

CHAT_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""The names of chat templates."""

_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
}
_TAG = "\0"
"""Prefix of the names of union members, which distinguishes them from keys in pydantic's error locations."""

T = TypeVar("T")


def _frozen(value: Any) -> Any:
    """Make plain data immutable."""
    if isinstance(value, Mapping):
        return MappingProxyType({key: _frozen(item) for key, item in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thawed(item) for key, item in value.items()}
    return [_thawed(item) for item in value] if isinstance(value, list | tuple) else value


def _read_dtype(value: Any) -> Any:
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name is None or name in DTYPES:
        return name
    if name == "int64":
        raise refused("int64 would truncate every weight to a whole number", f"use one of {', '.join(DTYPES)}")
    near = did_you_mean(_ALIASES.get(str(name), name), DTYPES)
    raise refused(f"unknown dtype {show(value)}", near or f"use one of {', '.join(DTYPES)}")


def _read_layers(value: Any) -> Any:
    try:
        first, end = _LAYERS.validate_python(value)
    except ValidationError:
        fix = "write [0, 8] for the first eight layers"
        raise refused(f"must be [first, end], two whole numbers, got {_shown_list(value)}", fix) from None
    if first >= 0 > end:
        meant = f"did you mean [{first}, N], with N the number of layers?"
        fix = meant if end == -1 else "count the end from the first layer"
        raise refused(f"[{first}, {end}] contains no layer, because a negative end does not count from the end", fix)
    if not 0 <= first < end:
        raise refused(f"[{first}, {end}] contains no layer", "the first is counted from 0 and the end is not included")
    return first, end


def _shown_list(value: Any) -> str:
    return f"[{', '.join(map(show, value))}]" if isinstance(value, list | tuple) and len(value) < 5 else show(value)


def _read_template(value: Any) -> Any:
    if not isinstance(value, str) or value in ("auto", *CHAT_TEMPLATES) or (len(value) >= 20 and "{" in value):
        return value
    known = f"auto, {', '.join(CHAT_TEMPLATES)}, or a Jinja template"
    raise refused(
        f"{show(value)} is not a chat template", did_you_mean(value, ("auto", *CHAT_TEMPLATES)) or f"use {known}"
    )


def _read_kind(value: Any) -> Any:
    if value != "model_token":
        kinds = ("zero", "model_token")
        raise refused(f"must be one of zero, model_token, got {show(value)}", did_you_mean(value, kinds))
    return value


def _read_tokenizer(value: Any) -> Any:
    if isinstance(value, str):
        raise refused("must be a mapping", f"write tokenizer: {{source: {value}}}, or tokenizer_source: {value}")
    return value


_LAYERS: TypeAdapter[tuple[int, int]] = TypeAdapter(tuple[int, int])


def _word_or_reference(*words: str) -> Discriminator:
    return Discriminator(lambda value: f"{_TAG}word" if value in words else f"{_TAG}model")


def _kind_of_row(value: Any) -> str:
    """The union member of a token's source: `{kind: ...}`, or a model."""
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return _TAG + ("model" if kind is None else "zero" if kind == "zero" else "model_token")


Frozen = Annotated[Mapping[str, T], AfterValidator(_frozen), PlainSerializer(_thawed)]
Parameters = Annotated[
    Mapping[str, Any], BeforeValidator(lambda v: _thawed(v)), AfterValidator(_frozen), PlainSerializer(_thawed)
]
DtypeName = Annotated[Literal["bfloat16", "float16", "float32", "float64"] | None, BeforeValidator(_read_dtype)]
Layers = Annotated[tuple[int, int], BeforeValidator(_read_layers)]
ChatTemplate = Annotated[str | None, BeforeValidator(_read_template)]
TokenizerSource = Annotated[
    Annotated[Literal["union", "base"], Tag(f"{_TAG}word")] | Annotated[ModelRef, Tag(f"{_TAG}model")],
    _word_or_reference("union", "base"),
]


class ModelEntry(Section):
    """An item of `models:`."""

    model: ModelRef
    last: Annotated[int, Field(gt=0, strict=True)] | None = None
    """The number of checkpoints that a `*` in `model` stands for, counted from the last; None: all."""
    parameters: Parameters | None = None


class SourceEntry(Section):
    """An item of a slice's `sources:`."""

    model: ModelRef
    last: Annotated[int, Field(gt=0, strict=True)] | None = None
    """The number of checkpoints that a `*` in `model` stands for, counted from the last; None: all."""
    layer_range: Layers
    """The first layer, and the layer after the last."""
    parameters: Parameters | None = None


class SliceEntry(Section):
    """An item of `slices:`: output layers made of equally many layers of each source."""

    sources: Annotated[tuple[SourceEntry, ...], Field(min_length=1)]
    base_model: ModelRef | None = None
    """Replaces the recipe's `base_model`."""
    parameters: Parameters | None = None


class ModuleEntry(Section):
    """A value of `modules:`: a part of a composite model, such as a text decoder."""

    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[SliceEntry, ...] | None = None
    parameters: Parameters | None = None

    @model_validator(mode="after")
    def one_form(self) -> ModuleEntry:
        if bool(self.models) == bool(self.slices):
            raise refused("a module has one of models and slices", "give one of them")
        return self


class ZeroRow(Section):
    """The zero embedding."""

    kind: Literal["zero"]


class TokenRow(Section):
    """The embedding of a token of a model."""

    kind: Annotated[Literal["model_token"], BeforeValidator(_read_kind)]
    model: ModelRef
    token: str | None = None
    token_id: int | None = None

    @model_validator(mode="after")
    def one_token(self) -> TokenRow:
        if (self.token is None) == (self.token_id is None):
            raise refused("needs exactly one of token and token_id", "name the token whose embedding is taken")
        return self


class TokenEntry(Section):
    """The source of one token's embedding."""

    source: Annotated[
        Annotated[ZeroRow, Tag(f"{_TAG}zero")]
        | Annotated[TokenRow, Tag(f"{_TAG}model_token")]
        | Annotated[ModelRef, Tag(f"{_TAG}model")],
        Discriminator(_kind_of_row),
    ]
    force: bool = False
    """Whether models that have the token use this embedding too."""


class TokenizerEntry(Section):
    """The output's vocabulary."""

    source: TokenizerSource = "union"
    tokens: Frozen[TokenEntry] | None = None
    pad_to_multiple_of: Annotated[int, Field(gt=0, le=100_000)] | None = None


def _read_rank(value: Any) -> Any:
    if value in ("sum", "auto") or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise refused(
        f"must be a whole number above 0, sum or auto, got {show(value)}", did_you_mean(value, ("sum", "auto"))
    )


class OutputEntry(Section):
    """What the merge writes."""

    kind: Literal["checkpoint", "adapter", "delta"] = "checkpoint"
    """`adapter` writes the merged delta as a LoRA of the base; `delta` writes the entries of it that are not zero."""
    rank: Annotated[int | Literal["sum", "auto"] | None, BeforeValidator(_read_rank)] = None
    """Rank of the adapter: a number; `sum` (default), the sum of the sources' ranks; or `auto`, the least that keeps `energy`."""
    energy: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    """Share of each delta's squared norm that `rank: auto` keeps."""
    format: Literal["sparse", "shira"] | None = None
    """Of `kind: delta`: the format of paft_merge (default), or SHiRA, which PEFT loads where only linear layers change."""
    max_rank: Annotated[int, Field(gt=0, strict=True)] | None = None
    """Limit of the ranks that `rank: auto` finds."""
    portable: bool = True
    """Write what vLLM, SGLang, llama.cpp and PEFT all read; false: also what only PEFT reads."""
    include: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    """Names of the modules that get factors, with the wildcards of a shell; empty for all. The delta of others is left out."""
    exclude: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    """Names of modules whose delta is left out."""
    unfit: Literal["refuse", "leave_out"] = "refuse"
    """What happens to deltas that an adapter cannot hold."""

    @model_validator(mode="before")
    @classmethod
    def without_space(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "space" in value:
            raise refused("space is a key of the recipe, not of output", "write space beside merge_method")
        return value

    @model_validator(mode="after")
    def fitting(self) -> OutputEntry:
        if self.format is not None and self.kind != "delta":
            raise refused("format is a key of kind: delta", "write kind: delta, or remove it")
        if self.kind != "adapter":
            fields = type(self).model_fields.items()
            given = [
                name for name, one in fields if name not in ("kind", "format") and getattr(self, name) != one.default
            ]
            if given:
                raise refused(f"{given[0]} is a key of kind: adapter", "write kind: adapter, or remove it")
        elif self.rank == "auto" and self.energy is None:
            raise refused("rank: auto needs energy", "write energy: 0.99, or a number as rank")
        elif self.rank != "auto" and (self.energy is not None or self.max_rank is not None):
            name = "max_rank" if self.energy is None else "energy"
            raise refused(f"{name} is a key of rank: auto", "write rank: auto, or remove it")
        return self


def _read_output(value: Any) -> Any:
    if isinstance(value, str):
        raise refused("must be a mapping", f"write output: {{kind: {value}}}")
    return value


class Language(Section):
    """A merge recipe as written: mergekit's keys, then ours."""

    merge_method: str
    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[SliceEntry, ...] | None = None
    modules: Frozen[ModuleEntry] | None = None
    base_model: ModelRef | None = None
    """The checkpoint to merge into, which also provides config and tokenizer."""
    parameters: Parameters | None = None
    dtype: DtypeName = None
    """The output's dtype without an `out_dtype`; with `arithmetic: mergekit` also the dtype of the arithmetic."""
    out_dtype: DtypeName = None
    tokenizer_source: TokenizerSource | None = None
    """The short form of `tokenizer`."""
    tokenizer: Annotated[TokenizerEntry | None, BeforeValidator(_read_tokenizer)] = None
    chat_template: ChatTemplate = None
    """`auto`, one of `CHAT_TEMPLATES`, or a Jinja template."""

    name: str | None = None
    """The name by which other documents of the file use the result."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How float32 results are rounded to the output's dtype."""
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    """Seed of random drops and of stochastic rounding."""
    arithmetic: Literal["float32", "mergekit"] = "float32"
    """`mergekit` computes in `dtype` as mergekit does, for equal results."""

    router: Literal["base", "average", "merge"] | None = None
    """How routers of mixtures of experts are merged: the base's, the sources' mean, or (default) as other tensors."""

    quantization: Literal["keep"] | None = None
    """`keep`: weights that the base stores as codes with scales are written so again; None: the output has plain weights."""
    scales: Literal["keep", "refit"] | None = None
    """Of `quantization: keep`: the base's scales, or (default) new ones where they are nearer to the merged values."""

    output: Annotated[OutputEntry | None, BeforeValidator(_read_output)] = None
    """What is written: a checkpoint, or the merged delta as an adapter of the base."""
    space: Literal["weight", "core", "knots", "ctm"] | None = None
    """Where the method works: on deltas (`weight`, the default), or in a common space of the adapters' factors."""

    @model_validator(mode="after")
    def one_form(self) -> Language:
        forms = [form for form in (self.models, self.slices, self.modules) if form]
        if len(forms) != 1:
            empty = next((name for name in ("models", "slices", "modules") if getattr(self, name) is not None), None)
            found = f"{empty} is empty: " if empty and not forms else ""
            raise refused(f"{found}a recipe has one of models, slices and modules", "list the models to merge")
        return self

    @model_validator(mode="after")
    def fitting_quantization(self) -> Language:
        if self.scales and not self.quantization:
            raise refused("scales is a key of quantization: keep", "write quantization: keep, or remove it")
        if self.quantization and self.output and self.output.kind != "checkpoint":
            raise refused(
                f"quantization is about a checkpoint, and the output is of kind {self.output.kind}", "remove it"
            )
        if self.quantization and self.arithmetic == "mergekit":
            raise refused("mergekit's arithmetic writes plain weights", "remove quantization or arithmetic")
        return self

    @model_validator(mode="after")
    def one_tokenizer(self) -> Language:
        if self.tokenizer_source and self.tokenizer:
            raise refused("tokenizer_source and tokenizer exclude each other", "keep tokenizer, with its source")
        return self
