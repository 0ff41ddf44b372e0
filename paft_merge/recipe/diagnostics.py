"""The faults of one recipe, gathered while it is read, so that all are told at once and in the order of the file."""

from __future__ import annotations

from paft_merge.errors import Problem, RecipeError
from paft_merge.recipe.yaml_source import Located, SourceLocation


class Report:
    """Errors and warnings of the recipe `located`."""

    def __init__(self, located: Located) -> None:
        self.located = located
        self.errors: list[tuple[int, Problem]] = []
        self.warnings: list[tuple[int, Problem]] = [(0, problem) for problem in located.warnings]

    def error(self, spot: SourceLocation, what: str, fix: str = "", code: str = "RECIPE") -> None:
        """Note what the recipe cannot be run with."""
        self.errors.append((spot.line or 0, Problem(code, str(spot), what, fix)))

    def warn(self, spot: SourceLocation, what: str, fix: str = "", code: str = "UNKNOWN_KEY") -> None:
        """Note what has no effect."""
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
        """All errors as one. Unknown keys are told with them, being often their cause; with `strict`, every warning."""
        told = [(line, problem) for line, problem in self.warnings if strict or problem.code == "UNKNOWN_KEY"]
        return RecipeError(_in_order(self.errors + told))


def _in_order(noted: list[tuple[int, Problem]]) -> tuple[Problem, ...]:
    return tuple(dict.fromkeys(problem for _, problem in sorted(noted, key=lambda pair: pair[0])))
