"""Which modules a pair of lists of patterns selects (`--include`, `--exclude`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from paft_merge.errors import Problems
from paft_merge.inputs.safetensors_header import quote


@dataclass(frozen=True)
class Selection:
    """Patterns of module names. `*`, `?` and `[...]` are those of a shell; a pattern matches a whole name or the end of one after a dot.

    Attributes:
        include: a module must match one of these; none selects all.
        exclude: a module must match none of these.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def __contains__(self, module: str) -> bool:
        included = not self.include or any(_matches(module, pattern) for pattern in self.include)
        return included and not any(_matches(module, pattern) for pattern in self.exclude)

    def check(self, modules: Iterable[str], where: object, problems: Problems) -> None:
        """Note every pattern that matches none of `modules`, which is likely a typing error."""
        names = list(modules)
        for field in ("include", "exclude"):
            for pattern in getattr(self, field):
                if not any(_matches(name, pattern) for name in names):
                    fix = f"its modules are named like {quote(names[0])}" if names else ""
                    problems.add("SELECTION", where, f"{field}: no module matches {quote(pattern)}", fix)


def _matches(module: str, pattern: str) -> bool:
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")
