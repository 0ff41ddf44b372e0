"""The checkpoints of a training run as sources: `run/checkpoint-*` in a recipe is one source for each of these folders."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from paft_merge.errors import PaftMergeError, Problem, Problems, RecipeError
from paft_merge.hub.pulling import file_names, split_repository
from paft_merge.inputs.safetensors_header import join_first
from paft_merge.recipe import Located, ModelRef
from paft_merge.recipe.sections import beside_recipe, is_pattern
from paft_merge.recipe.yaml_source import KeyPath
from paft_merge.stores import Store, folder_of, is_url, joined


def expand(located: Located) -> tuple[Located, tuple[Problem, ...]]:
    """Replace each item of `models:` and `sources:` whose reference has a `*` by one item for each checkpoint.

    Args:
        located: a merge recipe; faulty references are not changed.

    Returns:
        The recipe, whose new items have the keys and the lines of the old one; and notes about what `*` matched.

    Raises:
        PaftMergeError: RECIPE, a `*` where it has no meaning; NOT_FOUND, nothing matches; and as for `hub.fetch`.
    """
    problems, notes, moved = Problems(), list[Problem](), dict[KeyPath, list[int]]()

    def items(steps: KeyPath, listed: list[Any]) -> list[Any]:
        found, order = list[Any](), list[int]()
        for at, entry in enumerate(listed):
            made: list[Any] = [entry]
            with problems.catching():
                made = _expanded(entry, located, (*steps, at), notes)
            found += made
            order += [at] * len(made)
        if len(found) > len(listed) or any(new is not old for new, old in zip(found, listed, strict=False)):
            moved[located.prefix + steps] = order
        return found

    def inside(value: Any, steps: KeyPath) -> Any:
        if isinstance(value, Mapping):
            return {key: inside(inner, (*steps, key)) for key, inner in value.items()}
        if isinstance(value, list):
            value = items(steps, value) if steps[-1:] in (("models",), ("sources",)) else value
            return [inside(inner, (*steps, at)) for at, inner in enumerate(value)]
        return value

    data = inside(located.data, ())
    problems.raise_as(RecipeError)
    if not moved:
        return located, tuple(notes)
    lines, spellings = _moved(located.lines, moved), _moved(located.spellings, moved)
    return replace(located, data=data, text="", lines=lines, spellings=spellings), tuple(notes)


def checkpoints(ref: ModelRef, *, refresh: bool = False) -> list[ModelRef]:
    """The references that a reference with a `*` stands for, by step number; the reference itself without a `*`.

    A folder whose name has a `*` is itself.

    Args:
        ref: at most one of its paths has a `*`, the place of a number.
        refresh: as for `hub.resolve`.

    Raises:
        PaftMergeError: as for `expand`.
    """
    return _found(ref, refresh=refresh)[0]


def _found(ref: ModelRef, beside: Path | str = Path(), *, refresh: bool = False) -> tuple[list[ModelRef], list[str]]:
    """What a reference stands for, and the folders that would match if `*` stood for any text.

    `beside`: the recipe's folder, where relative paths are looked for first.
    """
    starred = [place for place in ((ref.path, ref.revision), *ref.adapters) if is_pattern(place[0], Path(beside))]
    if not starred:
        return [ref], []
    path, revision = starred[0]
    if len(starred) > 1 or path.count("*") > 1:
        raise RecipeError.of("RECIPE", ref, "has more than one '*'", "write one *, for the step numbers of one run")
    number, text = (re.compile(re.escape(path).replace(r"\*", part)) for part in (r"(\d+)", "[^/]*"))
    held = _folders(path, revision, beside, refresh=refresh)
    steps = sorted((found[1] for name in held if (found := number.fullmatch(name))), key=lambda step: (int(step), step))
    if not steps:
        fix = f"a * stands for a step number; beside it are {join_first(held)}" if held else "check the path"
        raise RecipeError.of("NOT_FOUND", path, "no folder matches", fix)
    others = [name for name in held if text.fullmatch(name) and not number.fullmatch(name)]
    return [_at_step(ref, path, step) for step in steps], others


def _expanded(entry: Any, located: Located, steps: KeyPath, notes: list[Problem]) -> list[Any]:
    """The items in place of one item; the item alone if its reference has no `*` or is faulty."""
    if not isinstance(entry, Mapping) or "model" not in entry:
        return [entry]
    last, spot = entry.get("last"), located.spot((*steps, "model"))
    try:
        ref = ModelRef.parse(entry["model"])
    except RecipeError:
        return [entry]
    beside = folder_of(located.file)
    if not any(is_pattern(path, Path(beside)) for path in (ref.path, *(path for path, _ in ref.adapters))):
        if last is not None:
            what, fix = "counts the checkpoints of a run, and this model is one folder", "write model: RUN/checkpoint-*"
            raise RecipeError.of("RECIPE", located.spot((*steps, "last")), what, fix)
        return [entry]
    if last is not None and (not isinstance(last, int) or isinstance(last, bool) or last < 1):
        return [entry]
    try:
        found, others = _found(ref, beside)
    except PaftMergeError as error:
        raise type(error)([replace(one, where=f"{spot}: {one.where}") for one in error.problems]) from None
    if last is not None and len(found) < last:
        notes.append(Problem("CHECKPOINTS", str(spot), f"{ref} has {len(found)} of the last {last} checkpoints"))
    elif len(found) == 1:
        notes.append(Problem("CHECKPOINTS", str(spot), f"{ref} is a single checkpoint, {found[0]}"))
    if others:
        what = f"{ref} leaves out {join_first(others)}, whose names have no step number"
        notes.append(Problem("CHECKPOINTS", str(spot), what, "list them too if they are to be merged"))
    rest = {key: value for key, value in entry.items() if key != "last"}
    return [{**rest, "model": one.written()} for one in found[-last if last else 0 :]]


def _folders(path: str, revision: str | None, beside: Path | str, *, refresh: bool) -> list[str]:
    """The folders in place of `path`: on this machine if the folder before the `*` is here, else on the Hub; sorted."""
    above, star, below = re.fullmatch(r"(.*/|)([^/]*\*[^/]*)(/.*|)", path, re.DOTALL).groups()  # type: ignore[union-attr]
    tail = below.strip("/")
    at = joined(str(beside), above or ".") if is_url(beside) else above
    if is_url(at):
        inside = (name.partition("/") for name in Store(at).list())
        stored = {first for first, _, rest in inside if rest.startswith(f"{tail}/" if tail else "") and rest}
        if stored or is_url(path):
            return sorted(f"{above}{name}{below}" for name in stored)
    root = beside_recipe(above or ".", Path(beside)).expanduser()
    if root.is_dir():
        folders = (one for one in root.iterdir() if (one / tail).is_dir() or (one.is_symlink() and not one.exists()))
        return sorted(f"{above}{one.name}{below}" for one in folders)
    named = split_repository(path.replace("*", "0"))
    if named is None or above.count("/") <= named[0].count("/"):
        what = f"there is no folder {above!r} here, and {star!r} is not in a repository of the Hub"
        raise RecipeError.of("NOT_FOUND", path, what, "check the path")
    repo_id, depth = named[0], path.count("/") + 1
    names = (f"{repo_id}/{name}".split("/") for name in file_names(repo_id, revision, refresh=refresh))
    found = {"/".join(parts[:depth]) for parts in names if len(parts) > depth}
    return sorted(name for name in found if name.startswith(above) and name.endswith(below))


def _at_step(ref: ModelRef, pattern: str, step: str) -> ModelRef:
    """The reference with a step number in place of the `*` of `pattern`, one of its paths; and in its label."""

    def put(path: str) -> str:
        return path.replace("*", step) if path == pattern else path

    stacked = tuple((put(path), revision) for path, revision in ref.stacked)
    label = ref.label and ref.label.replace("*", step)
    return replace(ref, path=put(ref.path), lora=ref.lora and put(ref.lora), stacked=stacked, label=label)


def _moved(known: Mapping[KeyPath, Any], moved: Mapping[KeyPath, list[int]]) -> dict[KeyPath, Any]:
    """The values of `known`, by the key paths that its keys have after items were inserted into the lists `moved`."""

    def places(path: KeyPath) -> Iterator[KeyPath]:
        for listed, order in moved.items():
            if path[: len(listed)] == listed and len(path) > len(listed):
                for new, old in enumerate(order):
                    if old == path[len(listed)]:
                        yield (*listed, new, *path[len(listed) + 1 :])
                return
        yield path

    return {place: value for path, value in known.items() for place in places(path)}
