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
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from paft_merge.recipe.reference import ModelRef
from paft_merge.recipe.sections import Section, as_list, exactly_one, refused
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
DtypeName = Annotated[
    Literal["bfloat16", "float16", "float32", "float64"] | None,
    BeforeValidator(
        _read_dtype,
        json_schema_input_type=Literal["bfloat16", "float16", "float32", "float64"]
        | Annotated[str, Field(pattern=r"^torch\.(bfloat16|float16|float32|float64)$")]
        | None,
    ),
]
_Count = Annotated[int, Field(ge=0)]
Layers = Annotated[tuple[int, int], BeforeValidator(_read_layers, json_schema_input_type=tuple[_Count, _Count])]
_TemplateName = Literal["auto", "alpaca", "chatml", "exaone", "llama3", "mistral"]
ChatTemplate = Annotated[
    str | None,
    BeforeValidator(
        _read_template,
        json_schema_input_type=_TemplateName | Annotated[str, Field(min_length=20, pattern=r"\{")] | None,
    ),
]
TokenizerSource = Annotated[
    Annotated[Literal["union", "base"], Tag(f"{_TAG}word")] | Annotated[ModelRef, Tag(f"{_TAG}model")],
    _word_or_reference("union", "base"),
]


class ModelEntry(Section):
    """An item of `models:`."""

    model: ModelRef
    """`PATH[@REVISION][+ADAPTER[@REVISION]]`; a mapping `{model, lora, override_architecture, label}`; the name of a
    document; or one `.safetensors` file (`.pt` with `--lazy-unpickle`). Random drops depend on `label`, or without
    it on the reference as written."""
    last: Annotated[int, Field(gt=0, strict=True)] | None = None
    """With a `*` in `model`, such as `RUN/checkpoint-*`: only the last so many of the checkpoints. Default: all."""
    parameters: Parameters | None = None
    """Parameters of this source: a value, a gradient (a list, interpolated over the layers), or a list of conditions
    `{filter, value}`. A filter is a part of a tensor's name."""


class SourceEntry(Section):
    """An item of a slice's `sources:`."""

    model: ModelRef
    """As `models[].model`. An adapter applies to the layers that `layer_range` selects."""
    last: Annotated[int, Field(gt=0, strict=True)] | None = None
    """As `models[].last`."""
    layer_range: Layers
    """`[first, end]`, counted from 0; `end` is not included."""
    parameters: Parameters | None = None
    """Parameters of this source. Filters match the source's tensor names."""


class SliceEntry(Section):
    """An item of `slices:`: output layers made of equally many layers of each source."""

    sources: Annotated[tuple[SourceEntry, ...], Field(min_length=1)]
    """One entry per model, all with the same number of layers. If the method has a base, list the base too."""
    base_model: ModelRef | None = None
    """Base of this slice, instead of the recipe's."""
    parameters: Parameters | None = None
    """Parameters of this slice. A gradient starts again in each slice."""


class ModuleEntry(Section):
    """A value of `modules:`: a part of a composite model, such as a text decoder."""

    model_config = ConfigDict(json_schema_extra=exactly_one("models", "slices"))

    models: tuple[ModelEntry, ...] | None = None
    """Whole modules to merge."""
    slices: tuple[SliceEntry, ...] | None = None
    """Layers of this module."""
    parameters: Parameters | None = None
    """Parameters of this module."""

    @model_validator(mode="after")
    def one_form(self) -> ModuleEntry:
        if bool(self.models) == bool(self.slices):
            raise refused("a module has one of models and slices", "give one of them")
        return self


class ZeroRow(Section):
    """The zero embedding."""

    kind: Literal["zero"]
    """`zero`: the zero embedding."""


class TokenRow(Section):
    """The embedding of a token of a model."""

    model_config = ConfigDict(json_schema_extra=exactly_one("token", "token_id"))

    kind: Annotated[Literal["model_token"], BeforeValidator(_read_kind)]
    """`model_token`: the embedding of a token of a model."""
    model: ModelRef
    """The model."""
    token: str | None = None
    """The token as text; or give `token_id`."""
    token_id: int | None = None
    """The token's number; or give `token`."""

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
    """A model, `{kind: zero}`, or `{kind: model_token, model, token}` (or `token_id`)."""
    force: bool = False
    """Use this source for every model, also for models that have the token."""


class TokenizerEntry(Section):
    """The output's vocabulary."""

    source: TokenizerSource = "union"
    """As `tokenizer_source` (default `union`)."""
    tokens: Frozen[TokenEntry] | None = None
    """Where the embeddings of single tokens come from."""
    pad_to_multiple_of: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """Round the number of embedding rows up to a multiple of this."""


def _read_rank(value: Any) -> Any:
    if value in ("sum", "auto") or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise refused(
        f"must be a whole number above 0, sum or auto, got {show(value)}", did_you_mean(value, ("sum", "auto"))
    )


class OutputEntry(Section):
    """What the merge writes."""

    kind: Literal["checkpoint", "adapter", "delta"] = "checkpoint"
    """`checkpoint` (default); `adapter`: a LoRA of the base; or `delta`: the entries of the merged delta that are not
    zero, a [sparse delta](adapters-out.md#sparse-deltas)."""
    rank: Annotated[
        int | Literal["sum", "auto"] | None,
        BeforeValidator(_read_rank, json_schema_input_type=Annotated[int, Field(gt=0)] | Literal["sum", "auto"] | None),
    ] = None
    """Rank of the adapter: a number; `sum` (default), the sum of the sources' ranks; or `auto`, the least rank that
    keeps `energy`."""
    energy: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    """Share of the squared norm of each delta that `rank: auto` keeps, such as 0.99."""
    format: Literal["sparse", "shira"] | None = None
    """Of `kind: delta`: `sparse` (default), which paft_merge reads, or `shira`, which PEFT loads where only linear
    layers change."""
    max_rank: Annotated[int, Field(gt=0, strict=True)] | None = None
    """Limit of the ranks that `rank: auto` finds."""
    portable: bool = True
    """`true` (default): only what vLLM, SGLang, llama.cpp and PEFT all read; `false`: also what only PEFT reads."""
    include: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    """Names of the modules that get factors, or ends of names after a dot, such as `q_proj` or `layers.1?.*`; without
    it all. The delta of other modules is left out."""
    exclude: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    """Names of modules whose delta is left out."""
    unfit: Literal["refuse", "leave_out"] = "refuse"
    """Deltas that the adapter cannot hold, such as those of norms: `refuse` (default) or `leave_out`, with a warning."""

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

    model_config = ConfigDict(json_schema_extra=exactly_one("models", "slices", "modules"))

    merge_method: str
    """A method of [the table](methods.md), or one that a module registers with mergekit (`--import`)."""
    models: tuple[ModelEntry, ...] | None = None
    """Whole models to merge; `base_model` is one of them, listed or not."""
    slices: tuple[SliceEntry, ...] | None = None
    """Layers of the output, slice by slice: repeated, overlapping or reordered. See [Slices](#slices)."""
    modules: Frozen[ModuleEntry] | None = None
    """Parts of a composite model, each with `models` or `slices`: `text_decoder`, `vision_tower`,
    `multi_modal_projector`, `encoder`, `decoder`, `shared`, `default`, or a prefix of tensor names. A part that is
    not listed is not written, as in mergekit; you get a warning."""
    base_model: ModelRef | None = None
    """The checkpoint to merge into. The output takes its config, tokenizer and other files from it. Without this key
    the first model is used (mergekit picks one at random)."""
    parameters: Parameters | None = None
    """Parameters for all sources. A more specific place wins: source, then slice, then module, then recipe."""
    dtype: DtypeName = None
    """dtype of the output; with `arithmetic: mergekit` also of the arithmetic."""
    out_dtype: DtypeName = None
    """dtype of the output. Without `dtype` and `out_dtype` the output has the base's dtype."""
    tokenizer_source: TokenizerSource | None = None
    """Vocabulary of the output: `union`, `base` or a model. See [Tokenizers](tokenizers.md)."""
    tokenizer: Annotated[TokenizerEntry | None, BeforeValidator(_read_tokenizer)] = None
    """The same as a mapping with more options."""
    chat_template: ChatTemplate = None
    """`auto`, `alpaca`, `chatml`, `exaone`, `llama3`, `mistral`, or a Jinja template."""

    name: str | None = None
    """Name of this document in a file with several. See [Several documents](#several-documents-in-a-file)."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """`nearest` (default) or `stochastic`. See [Numerics](numerics.md)."""
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    """Seed of random drops and of stochastic rounding (default 0)."""
    arithmetic: Literal["float32", "mergekit"] = "float32"
    """`float32` (default), or `mergekit` for mergekit's results bit for bit."""

    router: Literal["base", "average", "merge"] | None = None
    """Routers of mixtures of experts: `base`, `average`, or `merge` (default, as other tensors). See
    [Routers](#routers)."""

    quantization: Literal["keep"] | None = None
    """`keep`: the output is quantised as the base is. Without this key it has plain weights. See [`quantization:
    keep`](#quantization-keep)."""
    scales: Literal["keep", "refit"] | None = None
    """Of `quantization: keep`: `refit` (default) or `keep`."""

    output: Annotated[OutputEntry | None, BeforeValidator(_read_output)] = None
    """The output: a checkpoint (default), or the merged delta as an adapter or a sparse delta. See [Adapters as
    output](adapters-out.md)."""
    space: Literal["weight", "core", "knots", "ctm"] | None = None
    """Where the method works: on deltas (`weight`, default), or in a common space of the adapters: `core`, `knots` or
    `ctm`. See [Spaces of adapters](methods.md#spaces-of-adapters)."""

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
