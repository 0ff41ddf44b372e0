"""mergekit's language with names of `adapters:` in it: a name means the base with that adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from paft_merge.errors import EvaluateError, RecipeError
from paft_merge.hub import fetch
from paft_merge.methods import METHODS
from paft_merge.pipeline.schema import RunRecipe
from paft_merge.recipe import ModelRef
from paft_merge.recipe.sections import is_pattern


def resolved_merge(
    written: Mapping[str, Any], paths: Mapping[str, Mapping[str, str]], recipe: RunRecipe, seed: int | None = None
) -> dict[str, Any]:
    """A merge recipe for the engine: a name of `adapters:` becomes the base with that adapter.

    The name stays the source's label, so that random drops do not depend on folders.

    Args:
        written: the merge recipe as written.
        paths: each adapter's path and revision, by name.
        recipe: the run's recipe.
        seed: the run's seed, which is also the merge's unless `written` has one.
    """

    def place(value: Any, steps: tuple[str | int, ...] = ()) -> Any:
        if steps and is_reference(steps) and isinstance(value, str | Mapping):
            if isinstance(value, str) and value in paths:
                return {**reference_to(recipe.base, paths[value]), "label": value}
            return _beside(value, recipe.folder)
        if isinstance(value, Mapping):
            return {key: place(inner, (*steps, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [place(inner, (*steps, at)) for at, inner in enumerate(value)]
        return value

    resolved: dict[str, Any] = {**({} if seed is None else {"seed": seed}), **place(written)}
    method = METHODS.get(str(written.get("merge_method")))
    if resolved.get("base_model") or (method and method.base == "ignored"):  # there, a base is one more model
        return resolved
    return {**resolved, "base_model": recipe.base}


def _beside(value: str | Mapping[str, Any], folder: Path) -> Any:
    """A model reference with absolute paths for folders beside the recipe."""

    def absolute(path: str | None) -> str | None:
        if path and is_pattern(path, folder):
            above, _, name = path.rpartition("/")
            return f"{absolute(above or '.')}/{name}"
        return str((folder / path).resolve()) if path and (folder / path).is_dir() else path

    try:
        ref = ModelRef.parse(value)
    except RecipeError:
        return value  # reading the merge reports it with its line
    stacked = tuple((absolute(path) or path, revision) for path, revision in ref.stacked)
    placed = replace(
        ref, path=absolute(ref.path) or ref.path, lora=absolute(ref.lora), stacked=stacked, label=ref.stream
    )
    return value if replace(placed, label=ref.label) == ref else placed.written()


def is_reference(steps: tuple[str | int, ...]) -> bool:
    """Whether the value at this key path of a merge recipe names a model."""
    return steps[-1] in ("model", "base_model") and "parameters" not in steps


def reference_to(base: str, lora: Mapping[str, str]) -> dict[str, Any]:
    return {"model": {"path": base}, "lora": dict(lora)}


def models_outside(recipe: RunRecipe) -> dict[str, tuple[str, ...]]:
    """The parts of the models that `with:` of an evaluation names, for an evaluation outside of a run: the base, and adapters.

    Raises:
        EvaluateError: SOURCE, one is an adapter that a run trains.
    """
    found: dict[str, tuple[str, ...]] = {"base": (recipe.base,)}
    metrics = recipe.evaluate.metrics if recipe.evaluate else {}
    for name, source in ((name, source) for name, of in metrics.items() for source in of.sources or ()):
        if source in recipe.adapters:
            where, what = (
                recipe.where("evaluate", "metrics", name),
                f"with: names the adapter {source!r}, which a run trains",
            )
            raise EvaluateError.of(
                "SOURCE", where, what, f"--set evaluate.metrics.{name}.with=BASE+RUN_DIR/adapters/{source}"
            )
        if source in recipe.existing:
            spec = recipe.existing[source]
            found[source] = (recipe.base, str(fetch(spec.path, spec.revision, kind="adapter")))
    return found


def labels(resolved: Any) -> dict[str, str]:
    """The labels of the sources of a resolved merge recipe, by their full references."""
    if isinstance(resolved, Mapping) and "label" in resolved:
        ref = ModelRef.parse(resolved)
        return {str(ref): ref.stream}
    parts = resolved.values() if isinstance(resolved, Mapping) else resolved if isinstance(resolved, list) else ()
    return {long: short for part in parts for long, short in labels(part).items()}


def references(resolved: Any, steps: tuple[str | int, ...] = ()) -> Iterator[str]:
    """Yield every path that a resolved merge recipe names."""
    if isinstance(resolved, Mapping):
        for key, inner in resolved.items():
            if key == "path" or (isinstance(inner, str) and is_reference((*steps, key))):
                yield str(inner)
            else:
                yield from references(inner, (*steps, key))
    elif isinstance(resolved, list):
        for at, inner in enumerate(resolved):
            yield from references(inner, (*steps, at))


def names_adapter(written: Any, adapter: str, steps: tuple[str | int, ...] = ()) -> bool:
    """Whether a merge recipe names an adapter."""
    if isinstance(written, Mapping):
        return any(names_adapter(inner, adapter, (*steps, key)) for key, inner in written.items())
    if isinstance(written, list):
        return any(names_adapter(inner, adapter, (*steps, at)) for at, inner in enumerate(written))
    return bool(written == adapter and steps and is_reference(steps))
