"""`reproduce`: a merge repeated from its manifest, with every source at its commit, and compared with the manifest."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paft_merge.engine.api import merge, open_plan
from paft_merge.engine.options import RECORDED, RECORDED_IF_SET, MergeKeywords, MergeOptions
from paft_merge.engine.sidefiles import TIMES, identity
from paft_merge.errors import MergeError, PaftMergeError, Problems
from paft_merge.hub import pinned, resolve
from paft_merge.hub.merged_folders import manifest_at, verify_at
from paft_merge.hub.store_folders import named_by_url
from paft_merge.output.manifest import MANIFEST, read_manifest
from paft_merge.plan import MergePlan
from paft_merge.recipe import dump_yaml
from paft_merge.stores import is_url, place_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


NOT_FOUND = ("NOT_FOUND", "HUB_OFFLINE", "HUBNOT_FOUND")
"""Codes of a source that is not where its reference says."""


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a repeated merge with its manifest."""

    where: str
    tensors: int
    nbytes: int
    differing: tuple[str, ...]
    """Tensors whose bytes differ, or that only one of the two merges has."""
    files: tuple[str, ...]
    """Other files that differ: config, tokenizer."""
    versions: Mapping[str, tuple[str, str]]
    """Packages whose versions differ: recorded and installed."""

    @property
    def identical(self) -> bool:
        """Whether every tensor and every other file has the same bytes."""
        return not self.differing and not self.files

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        versions = {name: list(pair) for name, pair in self.versions.items()}
        return {
            "where": self.where, "identical": self.identical, "tensors": self.tensors, "bytes": self.nbytes,
            "differing": list(self.differing), "files": list(self.files), "versions": versions,
        }  # fmt: skip


def reproduce(
    place: Path | str,
    out: Path | str | None = None,
    options: MergeOptions | None = None,
    **overrides: Unpack[MergeKeywords],
) -> Reproduction:
    """Merge again what the manifest at `place` describes, and compare.

    Args:
        place: a folder that `merge` wrote, or a repository (`user/name@revision`), of which only the manifest is read.
        out: folder to write; by default a temporary one.
        options: see `MergeOptions`; options that the manifest records come from there, except those that trust the
            sources (`imports`, `trust_remote_code`, `lazy_unpickle`): those that it needs must be given again.
        overrides: single options, which replace those of `options`.

    Raises:
        MergeError: REPRODUCE_INPUT, a source changed since; REPRODUCE_IMPORT, a module is missing in `imports`;
            REPRODUCE_TRUST, an option that trusts the sources is missing; REPRODUCE_OPTION, the manifest has an option that this version does not know.
        PaftMergeError: the manifest cannot be read; and as for `merge`.
    """
    place, given = os.fspath(place), MergeOptions.of(options, overrides)
    manifest = manifest_of(place)
    asked = _options(manifest, place, given)
    with pinned(_pins(manifest)), _place_for(out) as target:
        recipe = recorded_recipe(manifest)
        with _explaining_paths(manifest), open_plan(recipe, replace(asked, stream_from_hub=True)) as plan:
            _refuse_other_inputs(manifest, identity(plan, asked.device)["inputs"])
        merge(recipe, target, asked)
        checked = verify_at(target, manifest=manifest)
        made = manifest_at(target)
    differing = dict.fromkeys(problem.where.removeprefix(f"{target}: ") for problem in checked.problems)
    before, after = manifest.get("files", {}), made.get("files", {})
    files = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)] if before else []
    was, has = manifest.get("versions", {}), made["versions"]
    versions = {n: (was.get(n, "none"), has.get(n, "none")) for n in {**was, **has} if was.get(n) != has.get(n)}
    return Reproduction(place, checked.tensors, checked.nbytes, tuple(differing), tuple(files), versions)


def manifest_of(place: str) -> dict[str, Any]:
    """Return the manifest of a merged folder, of one at a URL, or of a repository on the Hub (`user/name@revision`).

    Raises:
        AuditError: MANIFEST, it is missing or cannot be read.
    """
    path, _, revision = place.partition("@")
    if is_url(place) or Path(place).expanduser().exists():
        path, revision = place, ""
    found = resolve(path, revision or None, kind="side")
    with named_by_url(found):
        return read_manifest(found.folder / MANIFEST)


@contextmanager
def open_recorded(
    manifest: Mapping[str, Any], place: str, options: MergeOptions, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[MergePlan]:
    """Plan the merge of a manifest with a changed recipe, with every source at its commit and as it was merged.

    Args:
        manifest: of the merge.
        place: its folder, for messages.
        options: as for `reproduce`.
        change: returns the recipe to plan for the recorded one; the other documents of its file stay.

    Raises:
        PaftMergeError: as for `reproduce`.
    """
    asked = replace(_options(manifest, place, options), stream_from_hub=True)
    recipe = recorded_recipe({**manifest, "recipe": change(dict(manifest["recipe"]))})
    with pinned(_pins(manifest)), ExitStack() as opened:
        with _explaining_paths(manifest):
            plan = opened.enter_context(open_plan(recipe, asked))
        _refuse_other_inputs(manifest, identity(plan, asked.device)["inputs"])
        yield plan


@contextmanager
def _explaining_paths(manifest: Mapping[str, Any]) -> Iterator[None]:
    """Add to the error of a local source that is not found where its relative path starts."""
    local = {str(s.get("path")) for s in manifest.get("sources", ()) if not s.get("commit")}
    relative = {path for path in local if not Path(path).expanduser().is_absolute()}
    try:
        yield
    except PaftMergeError as error:
        fix = "a relative path starts beside the recipe, or where the merge ran: give this command there"
        found = [
            replace(problem, fix=fix) if problem.code in NOT_FOUND and problem.where in relative else problem
            for problem in error.problems
        ]
        raise type(error)(found, error.warnings) from error


def _options(manifest: Mapping[str, Any], place: str, options: MergeOptions) -> MergeOptions:
    """Return `options` with those that the manifest records."""
    recorded = dict(manifest.get("options", {}))
    if missing := [name for name in recorded.pop("imports", ()) if name not in options.imports]:
        fix = f"read them, and pass imports=[{', '.join(map(repr, missing))}]"
        raise MergeError.of("REPRODUCE_IMPORT", place, f"its methods came from {', '.join(missing)}", fix)
    untold = [
        name for name in ("trust_remote_code", "lazy_unpickle") if recorded.get(name) and not getattr(options, name)
    ]
    if untold:
        what = f"was merged with {' and '.join(f'{name}=True' for name in untold)}, which a manifest cannot switch on"
        fix = f"look at its sources, then pass {', '.join(f'{name}=True' for name in untold)}"
        raise MergeError.of("REPRODUCE_TRUST", place, what, fix)
    # A manifest may come from anyone: it must not be able to set any other option, such as `overwrite`.
    if unknown := sorted(recorded.keys() - {*RECORDED, *RECORDED_IF_SET}):
        what = f"its manifest has the option {unknown[0]!r}, which this version does not know"
        raise MergeError.of("REPRODUCE_OPTION", place, what, "use the version of paft-merge that wrote it")
    return replace(options, **recorded)


def _pins(manifest: Mapping[str, Any]) -> dict[tuple[str, str | None], str]:
    """Return the commit of every repository of the recipe."""
    return {(s["path"], s["revision"]): s["commit"] for s in manifest.get("sources", ()) if s.get("commit")}


def recorded_recipe(manifest: Mapping[str, Any]) -> str | dict[str, Any]:
    """Return the recipe after the other documents of its file. Model names stay, because random masks depend on them."""
    before = manifest.get("documents", ())
    if not before:
        return dict(manifest["recipe"])
    return "\n---\n".join(dump_yaml(one) for one in (*before, manifest["recipe"]))


def _refuse_other_inputs(manifest: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise MergeError for every source that differs from the manifest, where both record it."""
    problems = Problems()
    for ref, was in manifest.get("inputs", {}).items():
        if different := sorted(dict.fromkeys(_differences(was, now.get(ref, {})))):
            what = f"is not the source that was merged: {', '.join(different[:3])} differs"
            fix = "restore it; a source on the Hub is pinned to its commit, a folder is not"
            problems.add("REPRODUCE_INPUT", ref, what, fix)
    problems.raise_as(MergeError)


def _differences(was: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in was.keys() & now.keys() - {*TIMES}:
            yield from _differences(was[key], now[key], key)
        if name == "files" and was.keys() != now.keys():
            yield "list of files"
    elif was != now:
        yield name or "content"


@contextmanager
def _place_for(out: Path | str | None) -> Iterator[Path | str]:
    """Yield `out`, or a temporary folder."""
    if out is not None:
        yield place_of(out)
        return
    with tempfile.TemporaryDirectory(prefix="paft-reproduce-") as folder:
        yield Path(folder) / "merged"
