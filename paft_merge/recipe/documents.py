"""The documents of one recipe file: which are intermediate, which are results, and in which order they are merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from paft_merge.errors import Problem, Problems, RecipeError
from paft_merge.methods import METHODS, Method
from paft_merge.recipe import Located, Recipe, did_you_mean, dump_yaml, load_documents, load_recipe


@dataclass(frozen=True)
class Documents:
    """The recipes of one file."""

    recipes: tuple[Recipe, ...]

    @cached_property
    def named(self) -> dict[str, Recipe]:
        """The recipes that others may use as models, by name."""
        return {recipe.name: recipe for recipe in self.recipes if recipe.name} if len(self.recipes) > 1 else {}

    def used_by(self, recipe: Recipe) -> list[str]:
        """Return the names of the documents that a recipe merges."""
        return [name for name in dict.fromkeys(ref.path for ref in recipe.references) if name in self.named]

    @property
    def finals(self) -> list[Recipe]:
        """The recipes to write: the one without a name, else every one that no other uses."""
        used = {name for recipe in self.recipes for name in self.used_by(recipe)}
        unnamed = [recipe for recipe in self.recipes if not recipe.name]
        return unnamed or [recipe for recipe in self.recipes if recipe.name not in used]

    def unused(self, finals: Sequence[Recipe]) -> list[Problem]:
        """Return a warning for every document that no result uses."""
        needed = {one.name for final in finals for one in self.parts_of(final)}
        left = [recipe for recipe in self.recipes if recipe.name not in needed]
        return [
            Problem(
                "UNUSED",
                str(r.located.spot(("name",))),
                f"no result uses {r.name}, so it is not merged",
                f"write it with output_name={r.name!r}, or remove it",
            )
            for r in left
        ]

    def only(self, name: str | None) -> Recipe:
        """Return the recipe to write: the one called `name`, or the only one of `finals`.

        Raises:
            RecipeError: no document has that name, or there are several results.
        """
        names = [recipe.name for recipe in self.recipes if recipe.name]
        if name is None:
            if len(self.finals) > 1:
                results = [r.name for r in self.finals]
                what = f"the file has several results: {', '.join(map(str, results))}"
                raise RecipeError.of("DOCUMENTS", "", what, f"choose one with output_name={results[0]!r}")
            return self._with_text(self.finals[0])
        found = next((recipe for recipe in self.recipes if recipe.name == name), None)
        if found is None:
            fix = did_you_mean(name, names) or f"the file names {', '.join(names) or 'none'}"
            raise RecipeError.of("DOCUMENTS", name, "is not a document of this file", fix)
        return self._with_text(found)

    def _with_text(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the text of all documents that it uses, for the manifest and the model card."""
        made_of = self.parts_of(recipe)
        if len(made_of) == 1:
            return recipe
        text = "---\n".join(dump_yaml(one.resolved()) for one in made_of)
        return replace(recipe, located=replace(recipe.located, text=text))

    def parts_of(self, recipe: Recipe) -> list[Recipe]:
        """Return the documents that a recipe uses, each after those it uses itself, and the recipe last."""
        found: dict[str, Recipe] = {}
        for name in self.used_by(recipe):
            found |= {one.name or "": one for one in self.parts_of(self.named[name])}
        return [*found.values(), recipe]


def load_recipes(
    source: Path | str | Mapping[str, Any] | Located | Recipe, *, strict: bool = False,
    methods: Mapping[str, Method] = METHODS,
    expand: Callable[[Located], tuple[Located, tuple[Problem, ...]]] = lambda located: (located, ()),
    named: str | None = None,
) -> Documents:  # fmt: skip
    """Read every document of a file.

    Args:
        source, strict, methods: as for `load_recipe`.
        expand: replaces each item that names several models, and returns warnings about them.
        named: the URL of a recipe that is given as text.

    Raises:
        RecipeError: problems of all documents; two have the same name or none; documents use each other.
    """

    def load(document: Located) -> Recipe:
        expanded, notes = expand(document)
        if isinstance(source, Recipe) and expanded is document:
            return source
        recipe = load_recipe(expanded, strict=strict, methods=methods)
        return replace(recipe, warnings=(*notes, *recipe.warnings))

    if isinstance(source, Recipe):
        return Documents((load(source.located),))
    if not isinstance(source, Path | str):
        return Documents((load(source if isinstance(source, Located) else Located.of(source)),))
    located, problems, recipes = load_documents(source, named), Problems(), list[Recipe]()
    if len(located) == 1:
        return Documents((load(located[0]),))
    for document in located:
        with problems.catching():
            recipes.append(load(document))
    _check_names(located, problems)
    documents = Documents(tuple(recipes))
    if not problems.found:
        _check_circles(documents, problems)
        _check_uses(documents, problems)
    problems.raise_as(RecipeError)
    return documents


def _check_names(located: Sequence[Located], problems: Problems) -> None:
    """At most one document without a name, and no name twice."""
    seen: dict[str, Located] = {}
    for document in located:
        name = document.data.get("name") if isinstance(document.data, Mapping) else None
        where = document.spot(("name",) if name else ())
        if not isinstance(name, str | None):
            continue
        if name in seen or (not name and "" in seen):
            first = seen[name or ""].spot(("name",) if name else ())
            what = (
                f"the name {name} is already on line {first.line}"
                if name
                else f"a second document without a name; the first is on line {first.line}"
            )
            problems.add("DOCUMENTS", where, what, "give every document but the result its own name")
        seen.setdefault(name or "", document)
        if name and ("/" in name or "@" in name or "+" in name or name in (".", "..")):
            problems.add("DOCUMENTS", where, f"{name!r} cannot be the name of a document", "use a plain word")


def _check_circles(documents: Documents, problems: Problems) -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            circle = " -> ".join((*way[way.index(name) :], name))
            where = documents.named[name].located.spot(("name",))
            problems.add("DOCUMENTS", where, f"uses itself: {circle}", "remove one of these uses")
        elif name not in done:
            for other in documents.used_by(documents.named[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in documents.named:
        visit(name, ())


def _check_uses(documents: Documents, problems: Problems) -> None:
    """Add a problem for a name that looks like a misspelt document."""
    for recipe in documents.recipes:
        for ref in recipe.references:
            if ref.path not in documents.named and "/" not in ref.path and not Path(ref.path).expanduser().exists():
                near = did_you_mean(ref.path, documents.named)
                if near:
                    where = recipe.located.spot()
                    problems.add(
                        "DOCUMENTS", where, f"{ref.path} is not a document of this file and not a folder", near
                    )
            if ref.path in documents.named and ref.revision:
                what = f"{ref.path} is a document of this file, which has no revision {ref.revision}"
                problems.add("DOCUMENTS", recipe.located.spot(), what, f"write {ref.path}")
