"""`MergeResult`: what `merge` returns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from paft_merge.errors import Problem
from paft_merge.hub.merged_folders import manifest_at
from paft_merge.output.manifest import MANIFEST
from paft_merge.plan import MergePlan
from paft_merge.plan.formatting import html_table, show_bytes


@dataclass(frozen=True, repr=False)
class MergeResult(os.PathLike[str]):
    """A finished merge. It can be used as a path: `open(result / "README.md")`, `from_pretrained(result)`.

    A recipe file with several results gives one `MergeResult` whose `results` holds each of them by its name. Its `path`
    is the folder above theirs, its `warnings`, `seconds` and `bytes_written` are those of all; it has no plan and no
    manifest.
    """

    path: Path | str
    """The folder that was written, as given; a URL is text."""
    plans: tuple[MergePlan, ...] = field(repr=False)
    """The plan, or none for several results; see `plan`."""
    warnings: tuple[Problem, ...]
    """Warnings before, during and after the merge."""
    seconds: float
    """Wall time, with planning and downloads."""
    bytes_written: int
    """Size of the weight files."""
    results: Mapping[str, MergeResult] = field(default_factory=dict)
    """The results by name, where the recipe file has several; else empty."""

    @classmethod
    def of_several(cls, path: Path | str, results: Mapping[str, MergeResult]) -> MergeResult:
        """Return one result that holds several."""
        each = results.values()
        warnings = dict.fromkeys(problem for one in each for problem in one.warnings)
        seconds, written = sum(one.seconds for one in each), sum(one.bytes_written for one in each)
        return cls(path, (), tuple(warnings), seconds, written, dict(results))

    def to_json(self) -> dict[str, Any]:
        """The result as plain data; that of a file with several results has those by name."""
        return {
            "out": str(self.path),
            "manifest": None if self.results else f"{self.path}/{MANIFEST}",
            "seconds": self.seconds,
            "bytes_written": self.bytes_written,
            "warnings": [asdict(problem) for problem in self.warnings],
            "results": {name: one.to_json() for name, one in self.results.items()},
        }

    @property
    def plan(self) -> MergePlan:
        """The plan; its input files are closed.

        Raises:
            ValueError: there are several results.
        """
        if self.results:
            raise ValueError(f"there are several results, each with its plan: .results[{next(iter(self.results))!r}]")
        return self.plans[0]

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """`merge_manifest.json`, read from `path` on first use.

        Raises:
            ValueError: there are several results.
            AuditError: the folder was moved or changed.
        """
        if self.results:
            raise ValueError(f"there are several manifests, one for each result: {', '.join(self.results)}")
        return manifest_at(self.path)

    @property
    def error(self) -> float | None:
        """Of an adapter: the norm of the difference from the merged deltas, relative to their norm; None for a checkpoint."""
        found = self.manifest.get("adapter")
        return None if found is None else float(found["relative_error"])

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __deepcopy__(self, memo: object) -> MergeResult:
        return self  # frozen; transformers copies the path that it is given, and the locks of a plan have no copy

    def __truediv__(self, name: str | os.PathLike[str]) -> Path | str:
        return f"{self.path}/{os.fspath(name)}" if isinstance(self.path, str) else self.path / name

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"MergeResult({str(self.path)!r}, {', '.join(value for _, value in self._facts())})"

    def _repr_html_(self) -> str:
        return html_table([("folder", str(self.path)), *self._facts()])

    def _facts(self) -> Sequence[tuple[str, str]]:
        made = f"{len(self.results)} results" if self.results else f"{len(self.plan.tensors):,} tensors"
        facts = [("merged", made), ("written", show_bytes(self.bytes_written)), ("time", f"{self.seconds:.1f} s")]
        count = len(self.warnings)
        return [*facts, ("warnings", f"{count} warning{'s' * (count != 1)}")] if count else facts
