"""A merge made again from its manifest, with every source at its commit, and compared with what the manifest says."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paft_merge.engine.api import merge, open_plan
from paft_merge.engine.sidefiles import identity
from paft_merge.errors import MergeError, Problem, Problems
from paft_merge.hub import pinned, resolve
from paft_merge.output.manifest import MANIFEST, read_manifest, verify
from paft_merge.recipe import dump_yaml

if TYPE_CHECKING:
    from paft_merge.engine.streaming import Progress


@dataclass(frozen=True)
class Reproduction:
    """What became of a merge that was made again."""

    where: str
    tensors: int
    nbytes: int
    differing: tuple[str, ...]
    """Tensors with other bytes, or that only one of the two has."""
    files: tuple[str, ...]
    """What stands beside the weights and is not the same: config, tokenizer."""
    versions: Mapping[str, tuple[str, str]]
    """Packages that are not the same: then and now."""

    @property
    def identical(self) -> bool:
        """Whether every byte of every tensor, and what stands beside them, is what it was."""
        return not self.differing and not self.files

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        versions = {name: list(pair) for name, pair in self.versions.items()}
        return {
            "where": self.where, "identical": self.identical, "tensors": self.tensors, "bytes": self.nbytes,
            "differing": list(self.differing), "files": list(self.files), "versions": versions,
        }  # fmt: skip


def reproduce(
    place: Path | str,
    out: Path | None = None,
    *,
    imports: Sequence[str] = (),
    threads: int | None = None,
    stream_from_hub: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    warn: Callable[[Sequence[Problem]], None] | None = None,
) -> Reproduction:
    """Merge again what lies at `place`, and compare.

    Args:
        place: a folder that `paft merge` wrote, or a repository (`user/name@revision`); of it only the manifest is read.
        out: where to write; a folder that is removed afterwards by default.
        imports: modules that register methods; a manifest names those it needs, and cannot make us import them.
        threads, stream_from_hub, progress, warn: as for `api.merge`.

    Raises:
        MergeError: REPRODUCE_INPUT, a source is not what was merged; REPRODUCE_IMPORT.
        PaftMergeError: the manifest cannot be read; and as `api.merge`.
    """
    path, _, revision = str(place).partition("@")
    found = resolve(str(place)) if Path(place).expanduser().exists() else resolve(path, revision or None, kind="side")
    manifest = read_manifest(found.folder / MANIFEST)
    options = dict(manifest.get("options", {}))
    needed = [name for name in options.pop("imports", ()) if name not in imports]
    if needed:
        fix = f"read them, and pass {' '.join(f'--import {name}' for name in needed)}"
        raise MergeError.of("REPRODUCE_IMPORT", place, f"its methods came from {', '.join(needed)}", fix)
    with pinned(_pins(manifest)), _place_for(out) as target:
        recipe = _recipe(manifest)
        planning = {k: v for k, v in options.items() if k not in ("device", "trust_remote_code")}
        with open_plan(recipe, imports=imports, remote=True, **planning) as plan:
            now = identity(plan, options.get("device", "cpu"))
            _refuse_other_inputs(manifest, now["inputs"])
        merge(
            recipe, target, imports=imports, threads=threads, stream_from_hub=stream_from_hub, progress=progress,
            warn=warn, **options,
        )  # fmt: skip
        checked = verify(target, manifest=manifest)
        made = read_manifest(target / MANIFEST)
    differing = dict.fromkeys(problem.where.removeprefix(f"{target}: ") for problem in checked.problems)
    before, after = manifest.get("files", {}), made.get("files", {})
    files = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)] if before else []
    was, has = manifest.get("versions", {}), made["versions"]
    versions = {n: (was.get(n, "none"), has.get(n, "none")) for n in {**was, **has} if was.get(n) != has.get(n)}
    return Reproduction(str(place), checked.tensors, checked.nbytes, tuple(differing), tuple(files), versions)


def _pins(manifest: Mapping[str, Any]) -> dict[tuple[str, str | None], str]:
    """Which commit every repository of the recipe stands for."""
    return {(s["path"], s["revision"]): s["commit"] for s in manifest.get("sources", ()) if s.get("commit")}


def _recipe(manifest: Mapping[str, Any]) -> str | dict[str, Any]:
    """The recipe, with the other documents of its file before it. Its names stay as they were: random drops go by them."""
    before = manifest.get("documents", ())
    if not before:
        return dict(manifest["recipe"])
    return "\n---\n".join(dump_yaml(one) for one in (*before, manifest["recipe"]))


def _refuse_other_inputs(manifest: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Every source must be what the manifest says that it was, as far as both tell."""
    problems = Problems()
    for ref, was in manifest.get("inputs", {}).items():
        if different := sorted(dict.fromkeys(_differences(was, now.get(ref, {})))):
            what = f"is not what was merged: its {', '.join(different[:3])} is another"
            fix = "get it as it was; a source on the Hub is pinned to its commit, a folder is not"
            problems.add("REPRODUCE_INPUT", ref, what, fix)
    problems.raise_as(MergeError)


def _differences(was: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in was.keys() & now.keys() - {"mtime_ns"}:
            yield from _differences(was[key], now[key], key)
        if name == "files" and was.keys() != now.keys():
            yield "list of files"
    elif was != now:
        yield name or "content"


@contextmanager
def _place_for(out: Path | None) -> Iterator[Path]:
    """Where to write: `out`, or a folder that is removed in the end."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="paft-reproduce-") as folder:
        yield Path(folder) / "merged"
