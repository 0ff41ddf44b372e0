"""Merge recipes: YAML in mergekit's language with our additions, read into frozen models, all errors with their lines.

`load_recipe` returns a `Recipe`: the language as written, and its modules, slices and sources.
`resolve_all` returns a method's parameters for one tensor, and the line that set each.
`load_yaml` returns plain data with its lines, for other YAML files.

| module | contents |
|---|---|
| yaml_source | YAML text as plain data with its lines |
| sections | pydantic sections, and their errors in plain English |
| reference | references to models |
| schema | the language |
| parsing | plain data to the schema, with every error of shape and type |
| resolution | the value of a parameter for one tensor |
| normalized | one form for `models:`, `slices:` and `modules:` |
| validation | the requirements of the method |
| diagnostics | the errors and warnings, in the order of the file |
| documents | the documents of one file |
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from paft_merge.errors import Problem, RecipeError, escape
from paft_merge.methods import METHODS, Method
from paft_merge.recipe.diagnostics import Report
from paft_merge.recipe.normalized import OutputModule, OutputSlice, Source, normalize
from paft_merge.recipe.parsing import kind_of, read_language
from paft_merge.recipe.reference import ModelRef
from paft_merge.recipe.resolution import ParameterCache, Resolved, layer_t, resolve, resolve_all
from paft_merge.recipe.schema import CHAT_TEMPLATES, Language, OutputEntry, TokenizerEntry, TokenRow, ZeroRow
from paft_merge.recipe.validation import check, check_space, find_method
from paft_merge.recipe.yaml_source import (
    Located,
    did_you_mean,
    dotted,
    dump_yaml,
    load_documents,
    load_yaml,
    show,
)

__all__ = [
    "CHAT_TEMPLATES",
    "Language",
    "Located",
    "ModelRef",
    "OutputEntry",
    "OutputModule",
    "OutputSlice",
    "ParameterCache",
    "Recipe",
    "Resolved",
    "Source",
    "TokenRow",
    "TokenizerEntry",
    "ZeroRow",
    "did_you_mean",
    "dotted",
    "dump_yaml",
    "kind_of",
    "layer_t",
    "load_documents",
    "load_recipe",
    "load_yaml",
    "resolve",
    "resolve_all",
    "show",
]

_HTML_LINES = 200
"""Lines of a recipe that a notebook shows."""


@dataclass(frozen=True, repr=False)
class Recipe:
    """A valid recipe, made by `load_recipe`."""

    language: Language
    """Every key as written."""
    method: Method
    """The method that `merge_method` names."""
    modules: tuple[OutputModule, ...]
    """The output's modules: a single one without a name, unless the recipe has `modules:`."""
    warnings: tuple[Problem, ...]
    """Keys and values without effect, in the order of the file."""
    located: Located
    """The data that the recipe was read from, with its lines."""

    def __repr__(self) -> str:
        named = [f", {key}={value!r}" for key, value in (("name", self.name), ("file", self.located.file)) if value]
        return f"Recipe({self.merge_method!r}, {len(self.references)} models{''.join(named)})"

    def _repr_html_(self) -> str:
        lines = self.text.splitlines()
        rest = f"\n... and {len(lines) - _HTML_LINES:,} lines more" if len(lines) > _HTML_LINES else ""
        return f"<pre>{html.escape(escape(chr(10).join(lines[:_HTML_LINES]) + rest, lines=True))}</pre>"

    @property
    def slices(self) -> tuple[OutputSlice, ...]:
        """Every output slice, module by module; a `models:` list is one slice."""
        return tuple(output for module in self.modules for output in module.slices)

    @property
    def references(self) -> tuple[ModelRef, ...]:
        """Every model that is merged, once: the recipe's base, then the others in the order of the recipe."""
        found = [self.base_model]
        for output in self.slices:
            found += [output.base, *(source.ref for source in output.sources)]
        return tuple(dict.fromkeys(ref for ref in found if ref))

    @property
    def text(self) -> str:
        """The YAML as the user wrote it, or equivalent YAML for a recipe without a file."""
        return self.located.text or dump_yaml(self.resolved())

    def resolved(self) -> dict[str, Any]:
        """JSON data that loads as an equal recipe, including the defaults of our keys."""
        return self.language.model_dump(mode="json", exclude_none=True)

    @property
    def merge_method(self) -> str:
        """The name of the method."""
        return self.language.merge_method

    @property
    def base_model(self) -> ModelRef | None:
        """The model that is merged into; None without one."""
        return self.language.base_model

    @property
    def dtype(self) -> str | None:
        """The output's dtype where `out_dtype` is None; the dtype of mergekit's arithmetic."""
        return self.language.dtype

    @property
    def out_dtype(self) -> str | None:
        """The output's dtype."""
        return self.language.out_dtype

    @property
    def rounding(self) -> Literal["nearest", "stochastic"]:
        """How float32 results are rounded to the output's dtype."""
        return self.language.rounding

    @property
    def arithmetic(self) -> Literal["float32", "mergekit"]:
        """Whether to compute in float32, or in `dtype` as mergekit does."""
        return self.language.arithmetic

    @property
    def seed(self) -> int:
        """The seed of random drops and of stochastic rounding."""
        return self.language.seed

    @property
    def router(self) -> Literal["base", "average", "merge"] | None:
        """How routers of mixtures of experts are merged; None merges them as other tensors, as `merge` does."""
        return self.language.router

    @property
    def quantization(self) -> Literal["keep"] | None:
        """Whether weights that the base stores as codes are written as codes; None writes plain weights."""
        return self.language.quantization

    @property
    def scales(self) -> Literal["keep", "refit"]:
        """Of `quantization: keep`: whether the scales are kept, or computed again where that is more exact."""
        return self.language.scales or "refit"

    @property
    def output(self) -> OutputEntry:
        """What is written."""
        return self.language.output or OutputEntry()

    @property
    def space(self) -> Literal["weight", "core", "knots", "ctm"]:
        """Where the method works."""
        return self.language.space or "weight"

    @property
    def name(self) -> str | None:
        """The name by which other documents of the file use the result."""
        return self.language.name

    @property
    def tokenizer(self) -> TokenizerEntry | None:
        """The output's vocabulary, from `tokenizer` or `tokenizer_source`; None keeps the config source's."""
        source = self.language.tokenizer_source
        return TokenizerEntry(source=source) if source else self.language.tokenizer

    @property
    def chat_template(self) -> str | None:
        """`auto`, a name of `CHAT_TEMPLATES`, or a Jinja template; None keeps the config source's."""
        return self.language.chat_template


def load_recipe(
    source: Path | str | Mapping[str, Any] | Located, *, strict: bool = False, methods: Mapping[str, Method] = METHODS
) -> Recipe:
    """Read and check a merge recipe.

    Args:
        source: a path; YAML text (a str with a line break or a colon and a space; any other is a path); data; or part of a file.
        strict: raise for keys that mergekit would ignore, instead of warning.
        methods: the methods that a recipe may name.

    Raises:
        RecipeError: every error of the recipe, in the order of the file.
    """
    located = _located(source)
    if kind_of(located.data) == "run":
        fix = "use paft run" + (", or write its merge: section to a file" if "merge" in located.data else "")
        raise RecipeError.of("RECIPE", located.spot(), "this is a recipe for paft run, not a merge recipe", fix)
    report = Report(located)
    names = {p.name for method in methods.values() for p in method.parameters} | {"trim"}
    language, faulty = read_language(located, report, names)
    if language is None:
        raise report.error_of()
    method = find_method(language.merge_method, methods, report)
    modules = normalize(language, method, report)
    if method is None:
        raise report.error_of()
    check_space(language, method, report, faulty)
    check(modules, method, methods, report, faulty)
    return Recipe(language, method, modules, report.finish(strict=strict), located)


def _located(source: Path | str | Mapping[str, Any] | Located) -> Located:
    if isinstance(source, Located):
        return source
    return Located.of(source) if isinstance(source, Mapping) else load_yaml(source)
