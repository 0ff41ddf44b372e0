"""A recipe: YAML in mergekit's language, and ours, read into frozen models, with every error at once and its line.

`load_recipe` gives a `Recipe`: the language as written, and the modules, slices and sources that it asks for.
`resolve_all` gives a method's parameters for one tensor, and the line that set each.
`load_yaml` gives plain data that knows its lines, for other YAML files of ours.

| room | what it is |
|---|---|
| text | YAML text as plain data that knows its lines |
| reference | what a recipe calls a model |
| language | what may be written |
| reading | plain data to those models, with every fault of shape and type |
| settings | what a parameter is worth for one tensor |
| outline | one shape for `models:`, `slices:` and `modules:` |
| checks | what the method can take |
| report | the faults, in the order of the file |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from paft_merge.errors import Problem
from paft_merge.methods import METHODS, Method
from paft_merge.recipe.diagnostics import Report
from paft_merge.recipe.normalized import OutputModule, OutputSlice, Source, outline
from paft_merge.recipe.parsing import read_language
from paft_merge.recipe.reference import ModelRef
from paft_merge.recipe.resolution import Level, Origin, ParameterCache, Resolved, layer_t, resolve, resolve_all
from paft_merge.recipe.schema import CHAT_TEMPLATES, DTYPES, Language, TokenEntry, TokenizerEntry, TokenRow, ZeroRow
from paft_merge.recipe.validation import check, find_method
from paft_merge.recipe.yaml_source import (
    Located,
    SourceLocation,
    did_you_mean,
    dotted,
    dump_yaml,
    load_documents,
    load_yaml,
    show,
)

__all__ = [
    "CHAT_TEMPLATES",
    "DTYPES",
    "Language",
    "Level",
    "Located",
    "ModelRef",
    "Origin",
    "OutputModule",
    "OutputSlice",
    "ParameterCache",
    "Recipe",
    "Resolved",
    "Source",
    "SourceLocation",
    "TokenEntry",
    "TokenRow",
    "TokenizerEntry",
    "ZeroRow",
    "did_you_mean",
    "dotted",
    "dump_yaml",
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
    modules: tuple[OutputModule, ...]
    """The output modules; one without a name, unless the recipe has `modules:`."""
    warnings: tuple[Problem, ...]
    """Keys that have no effect, in the order of the file."""
    located: Located
    """The data it was read from, with its lines."""

    def __repr__(self) -> str:
        named = [f", {key}={value!r}" for key, value in (("name", self.name), ("file", self.located.file)) if value]
        return f"Recipe({self.merge_method!r}, {len(self.references)} models{''.join(named)})"

    def _repr_html_(self) -> str:
        lines = self.text.splitlines()
        rest = f"\n... and {len(lines) - _HTML_LINES:,} lines more" if len(lines) > _HTML_LINES else ""
        return f"<pre>{escape(chr(10).join(lines[:_HTML_LINES]) + rest)}</pre>"

    @property
    def slices(self) -> tuple[OutputSlice, ...]:
        """Every output slice, module by module; `models:` is one slice."""
        return tuple(output for module in self.modules for output in module.slices)

    @property
    def references(self) -> tuple[ModelRef, ...]:
        """Every model, once: the base of the recipe, then the others in the order of the recipe."""
        found = [self.base_model]
        for output in self.slices:
            found += [output.base, *(source.ref for source in output.sources)]
        return tuple(dict.fromkeys(ref for ref in found if ref))

    @property
    def text(self) -> str:
        """The YAML as written, or equivalent YAML if the recipe did not come from its own file."""
        return self.located.text or dump_yaml(self.resolved())

    def resolved(self) -> dict[str, Any]:
        """Return plain data (JSON) that loads as an equal recipe, with our defaults written out."""
        return self.language.model_dump(mode="json", exclude_none=True)

    @property
    def merge_method(self) -> str:
        return self.language.merge_method

    @property
    def base_model(self) -> ModelRef | None:
        return self.language.base_model

    @property
    def dtype(self) -> str | None:
        return self.language.dtype

    @property
    def out_dtype(self) -> str | None:
        return self.language.out_dtype

    @property
    def rounding(self) -> Literal["nearest", "stochastic"]:
        return self.language.rounding

    @property
    def arithmetic(self) -> Literal["float32", "mergekit"]:
        return self.language.arithmetic

    @property
    def seed(self) -> int:
        return self.language.seed

    @property
    def name(self) -> str | None:
        return self.language.name

    @property
    def tokenizer(self) -> TokenizerEntry | None:
        """The output's vocabulary, from `tokenizer_source` or `tokenizer`; None keeps the base's."""
        source = self.language.tokenizer_source
        return TokenizerEntry(source=source) if source else self.language.tokenizer

    @property
    def chat_template(self) -> str | None:
        return self.language.chat_template


def load_recipe(
    source: Path | str | Mapping[str, Any] | Located, *, strict: bool = False, methods: Mapping[str, Method] = METHODS
) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a file, YAML text (a str with a line break or `: ` in it; any other is a path), data, or part of a file.
        strict: raise an error for keys that have no effect, instead of a warning.
        methods: the methods that a recipe may name.

    Raises:
        RecipeError: all problems, in the order of the file.
    """
    located = _located(source)
    report = Report(located)
    names = {p.name for method in methods.values() for p in method.parameters} | {"trim"}
    language, faulty = read_language(located, report, names)
    if language is None:
        raise report.error_of()
    method = find_method(language.merge_method, methods, report)
    modules = outline(language, method, report)
    if method is None:
        raise report.error_of()
    check(modules, method, methods, report, faulty)
    return Recipe(language, method, modules, report.finish(strict=strict), located)


def _located(source: Path | str | Mapping[str, Any] | Located) -> Located:
    if isinstance(source, Located):
        return source
    return Located.of(source) if isinstance(source, Mapping) else load_yaml(source)
