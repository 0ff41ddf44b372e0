"""The errors and warnings of a recipe, collected while it is read and reported together."""

from __future__ import annotations

from dataclasses import replace

from paft_merge.errors import Problem, RecipeError
from paft_merge.recipe.yaml_source import Located, SourceLocation

IGNORED = ", so it is ignored"
"""End of a warning about a key; not of an error, which stops before the key has or lacks an effect."""


class UnlocatedError(Exception):
    """An error whose location only the caller knows: the message `what`, and the `fix`."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


class Report:
    """The errors and warnings of one recipe, each with its line."""

    def __init__(self, located: Located) -> None:
        self.located = located
        self.errors: list[tuple[int, Problem]] = []
        self.warnings: list[tuple[int, Problem]] = [(0, problem) for problem in located.warnings]

    def error(self, spot: SourceLocation, what: str, fix: str = "", code: str = "RECIPE") -> None:
        """Note an error at `spot`."""
        self.errors.append((spot.line or 0, Problem(code, str(spot), what, fix)))

    def warn(self, spot: SourceLocation, what: str, fix: str = "", code: str = "UNKNOWN_KEY") -> None:
        """Note a key or value without effect at `spot`."""
        self.warnings.append((spot.line or 0, Problem(code, str(spot), what, fix)))

    def finish(self, *, strict: bool) -> tuple[Problem, ...]:
        """The warnings, in the order of the file.

        Raises:
            RecipeError: there are errors, or warnings and `strict`.
        """
        if self.errors or (strict and self.warnings):
            raise self.error_of(strict=strict)
        return _in_order(self.warnings)

    def error_of(self, *, strict: bool = False) -> RecipeError:
        """All errors, and the warnings of unknown keys, which are often the cause; with `strict`, all warnings."""
        added = [
            (line, replace(problem, what=problem.what.replace(IGNORED, "")))
            for line, problem in self.warnings
            if strict or problem.code == "UNKNOWN_KEY"
        ]
        return RecipeError(_in_order(self.errors + added))


def _in_order(noted: list[tuple[int, Problem]]) -> tuple[Problem, ...]:
    return tuple(dict.fromkeys(problem for _, problem in sorted(noted, key=lambda pair: pair[0])))
