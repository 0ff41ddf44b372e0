"""One form for the three forms of a recipe: modules of output slices of sources, each with its parameter levels.

`models:` becomes one slice over all layers, `slices:` the slices of a single module; a module of `modules:` has either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from paft_merge.methods import Method
from paft_merge.recipe.diagnostics import Report
from paft_merge.recipe.reference import ModelRef
from paft_merge.recipe.resolution import TRIM_RULES, Level, Setting, read_setting
from paft_merge.recipe.schema import Language, ModelEntry, ModuleEntry, SliceEntry
from paft_merge.recipe.yaml_source import KeyPath, SourceLocation, did_you_mean, show


@dataclass(frozen=True, slots=True)
class Source:
    """A model that an output slice is made of."""

    ref: ModelRef
    layers: tuple[int, int] | None
    """The first layer and the one after the last; None: the whole model."""
    levels: tuple[Level, ...]
    """The levels that set its parameters, most specific first."""
    implicit: bool
    """Whether it is the `base_model` and no list names it."""
    spot: SourceLocation


@dataclass(frozen=True, slots=True)
class OutputSlice:
    """Consecutive layers of the output, and the sources they are made of."""

    sources: tuple[Source, ...]
    """In the order of the recipe; an implicit base comes last."""
    base: ModelRef | None
    levels: tuple[Level, ...]
    """The levels that set shared parameters, most specific first."""
    spot: SourceLocation


@dataclass(frozen=True, slots=True)
class OutputModule:
    """A part of the output model."""

    name: str | None
    """None for the whole model."""
    slices: tuple[OutputSlice, ...]
    spot: SourceLocation


def normalize(language: Language, method: Method | None, report: Report) -> tuple[OutputModule, ...]:
    """Normalize a recipe, noting errors in parameter settings in `report`."""
    normalizer = _Normalizer(language, method, report)
    if language.modules:
        return tuple(normalizer.module(name, entry) for name, entry in language.modules.items())
    if language.models:
        slices: tuple[OutputSlice, ...] = (normalizer.whole((), language.models, ()),)
    else:
        slices = tuple(normalizer.slice((), i, entry, ()) for i, entry in enumerate(language.slices or ()))
    return (OutputModule(None, slices, report.located.spot()),)


def all_levels(modules: tuple[OutputModule, ...]) -> Iterator[Level]:
    """Every level once, in the order of the recipe."""
    seen: set[int] = set()
    for output in (output for module in modules for output in module.slices):
        for level in (*(level for source in output.sources for level in source.levels), *output.levels):
            if id(level) not in seen:
                seen.add(id(level))
                yield level


class _Normalizer:
    def __init__(self, language: Language, method: Method | None, report: Report) -> None:
        self.language, self.method, self.report = language, method, report
        self.recipe_levels = self.level("recipe", (), language.parameters)

    def module(self, name: str, entry: ModuleEntry) -> OutputModule:
        steps = ("modules", name)
        levels = self.level("module", steps, entry.parameters)
        if entry.models:
            slices: tuple[OutputSlice, ...] = (self.whole(steps, entry.models, levels),)
        else:
            slices = tuple(self.slice(steps, i, one, levels) for i, one in enumerate(entry.slices or ()))
        return OutputModule(name, slices, self.spot(steps))

    def whole(self, steps: KeyPath, entries: tuple[ModelEntry, ...], around: tuple[Level, ...]) -> OutputSlice:
        """The slice of a `models:` list, with the base even if the list does not name it."""
        base, shared = self.language.base_model, around + self.recipe_levels
        sources = []
        for i, entry in enumerate(entries):
            place = (*steps, "models", i)
            own = self.level("source", place, entry.parameters)
            sources.append(Source(entry.model, None, own + shared, False, self.spot(place)))
        if base is not None and all(source.ref != base for source in sources):
            sources.append(Source(base, None, shared, True, self.spot(("base_model",))))
        return OutputSlice(tuple(sources), base, shared, self.spot((*steps, "models")))

    def slice(self, steps: KeyPath, i: int, entry: SliceEntry, around: tuple[Level, ...]) -> OutputSlice:
        steps = (*steps, "slices", i)
        shared = self.level("slice", steps, entry.parameters) + around + self.recipe_levels
        sources = []
        for j, source in enumerate(entry.sources):
            place = (*steps, "sources", j)
            own = self.level("source", place, source.parameters)
            sources.append(Source(source.model, source.layer_range, own + shared, False, self.spot(place)))
        return OutputSlice(tuple(sources), entry.base_model or self.language.base_model, shared, self.spot(steps))

    def level(
        self, kind: Literal["source", "slice", "module", "recipe"], steps: KeyPath, parameters: Mapping[str, Any] | None
    ) -> tuple[Level, ...]:
        """The level of a `parameters:` mapping; empty without settings."""
        steps = (*steps, "parameters")
        settings: dict[str, Setting] = {}
        for name, raw in (parameters or {}).items():
            is_trim = name == "trim" and not (self.method and self.method.parameter("trim"))
            flat = self.trim(steps, raw) if is_trim else {name: read_setting(self.report, (*steps, name), raw)}
            for one in (one for one in flat if one in settings):
                spot = flat[one].spot
                self.report.error(spot, f"{one} is also set by {settings[one].spot.path}", "keep one of the two")
            settings |= flat
        return (Level(kind, settings, self.spot(steps)),) if settings else ()

    def trim(self, steps: KeyPath, raw: Any) -> dict[str, Setting]:
        """The setting in `trim: {density: 0.2}`, which means `density: 0.2`."""
        steps = (*steps, "trim")
        known = f"one of {', '.join(TRIM_RULES)}"
        if not isinstance(raw, Mapping):
            self.report.error(self.spot(steps), f"must be a mapping, got {show(raw)}", "write trim: {density: 0.2}")
            return {}
        for name in (name for name in raw if name not in TRIM_RULES):
            fix = did_you_mean(name, TRIM_RULES) or f"write {known}"
            self.report.error(self.spot((*steps, name)), "unknown way to trim", fix)
        if len(raw) != 1:
            self.report.error(self.spot(steps), f"trims by {known}, got {len(raw)}", "write trim: {density: 0.2}")
            return {}
        return {name: read_setting(self.report, (*steps, name), raw[name]) for name in TRIM_RULES if name in raw}

    def spot(self, steps: KeyPath) -> SourceLocation:
        return self.report.located.spot(steps)
