"""What a recipe asks for, in one shape for all three forms: modules of output slices of sources, with their levels.

`models:` is one slice that spans all layers, `slices:` are those of the only module, `modules:` has either by name.
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
    """One of the models that an output slice is made of."""

    ref: ModelRef
    layers: tuple[int, int] | None
    """The first layer and the one after the last; None for all of the model."""
    levels: tuple[Level, ...]
    """Where its parameters may be, most specific first. Places that say nothing are left out."""
    implicit: bool
    """It is the `base_model`, which no list names."""
    spot: SourceLocation


@dataclass(frozen=True, slots=True)
class OutputSlice:
    """Consecutive layers of the output, and what they are made of."""

    sources: tuple[Source, ...]
    """In the order of the recipe; an implicit base comes last."""
    base: ModelRef | None
    levels: tuple[Level, ...]
    """Where shared parameters may be, most specific first."""
    spot: SourceLocation


@dataclass(frozen=True, slots=True)
class OutputModule:
    """A part of the output model."""

    name: str | None
    """None: the whole model."""
    slices: tuple[OutputSlice, ...]
    spot: SourceLocation


def outline(language: Language, method: Method | None, report: Report) -> tuple[OutputModule, ...]:
    """Bring a recipe into that shape, noting faulty parameter settings in `report`."""
    outliner = _Outliner(language, method, report)
    if language.modules:
        return tuple(outliner.module(name, entry) for name, entry in language.modules.items())
    if language.models:
        slices: tuple[OutputSlice, ...] = (outliner.whole((), language.models, ()),)
    else:
        slices = tuple(outliner.slice((), i, entry, ()) for i, entry in enumerate(language.slices or ()))
    return (OutputModule(None, slices, report.located.spot()),)


def all_levels(modules: tuple[OutputModule, ...]) -> Iterator[Level]:
    """Every level once, in the order of the recipe."""
    seen: set[int] = set()
    for output in (output for module in modules for output in module.slices):
        for level in (*(level for source in output.sources for level in source.levels), *output.levels):
            if id(level) not in seen:
                seen.add(id(level))
                yield level


class _Outliner:
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
        """The one slice of a `models:` list. The base belongs to it, named or not."""
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
        """The level that `parameters` make, or none when nothing is written there."""
        steps = (*steps, "parameters")
        settings: dict[str, Setting] = {}
        for name, raw in (parameters or {}).items():
            flat = (
                self.trim(steps, raw)
                if name == "trim" and not self.takes_trim
                else {name: self.setting((*steps, name), raw)}
            )
            for one in (one for one in flat if one in settings):
                spot = flat[one].spot
                self.report.error(spot, f"{one} is also set by {settings[one].spot.path}", "keep one of the two")
            settings |= flat
        return (Level(kind, settings, self.spot(steps)),) if settings else ()

    def trim(self, steps: KeyPath, raw: Any) -> dict[str, Setting]:
        """`trim: {density: 0.2}` says the same as `density: 0.2`."""
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
        return {name: self.setting((*steps, name), raw[name]) for name in TRIM_RULES if name in raw}

    @property
    def takes_trim(self) -> bool:
        return self.method is not None and self.method.parameter("trim") is not None

    def setting(self, steps: KeyPath, raw: Any) -> Setting:
        return read_setting(self.report, steps, raw)

    def spot(self, steps: KeyPath) -> SourceLocation:
        return self.report.located.spot(steps)
