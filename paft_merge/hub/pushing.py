"""A folder on this machine as one commit on the Hub: checked before, resumed where it stopped, never seen half."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paft_merge.errors import HubError, Problem, Problems, deprecated
from paft_merge.hub.faults import asking
from paft_merge.hub.secret_files import refuse_secrets
from paft_merge.inputs.checkpoint import Checkpoint
from paft_merge.inputs.links import is_inside
from paft_merge.inputs.weight_files import is_unfinished
from paft_merge.output.manifest import MANIFEST, is_merged, read_manifest, verify
from paft_merge.stores import has_scheme, shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

_NOT_SENT = ("*.part", "*.tmp", "*.lock", "lock", "optimizer.pt", "scheduler.pt", "rng_state*", "__pycache__")
_NOT_ENTERED = ("checkpoint-*", "__pycache__", "*.part")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_LOOKED_AT = 4 << 20
"""Characters of a card and of a manifest in which paths of this machine are looked for."""
_HOME_PATH = re.compile(r"(?<![\w/.:-])(?:/(?:home|Users|root|mnt|data|tmp|scratch|workspace)/|[A-Z]:\\)[^\s\"'`)|]*")


@dataclass(frozen=True)
class UploadPlan:
    """What is to be sent: the files by their names in the repository, and what kind of thing they are."""

    folder: Path
    files: dict[str, Path]
    kind: str
    """`merge` (with a manifest that its bytes agree with), `model`, `adapter`, or `report`."""
    warnings: tuple[Problem, ...]


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    """Send a folder to the Hub: a model, an adapter, or a report.

    Large files are uploaded first and belong to no revision until one commit names all of them: a push that is cut off
    changes nothing that anybody sees, and the next one uploads only what is not there yet. Weights of an older model
    that the folder does not have are deleted by the same commit, since the two could not be distinguished.

    Args:
        folder: what `prepare_upload` accepts.
        repo_id: `name` or `user/name`; made when it does not exist.
        private: who may see a repository that is made now; None leaves it to the account's default. One that exists
            and is otherwise is refused, not changed.
        branch: made from `main` when it does not exist; `main` by default.
        create_pr: open a pull request instead of committing.
        message: of the commit.
        tags: that the commit is to have; none of them may be on another commit.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        HubError: why it cannot be sent.
        PaftMergeError: why the folder should not be: see `prepare_upload`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    parcel = prepare_upload(folder)
    for problem in parcel.warnings:
        log.warning("%s", problem)
    api = HfApi()
    repo_id = _repository(api, repo_id, private)
    with asking(repo_id):
        if branch and branch != "main":
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        head = api.model_info(repo_id, revision=branch, files_metadata=bool(tags))
        _refuse_tags(api, repo_id, tags, head.sha if tags and _holds(head.siblings or (), parcel) else None)
        there = [s.rfilename for s in head.siblings or ()]
        adds = [CommitOperationAdd(name, str(path)) for name, path in parcel.files.items()]
        deletes = [CommitOperationDelete(name) for name in _replaced(parcel, there)]
        made = api.create_commit(
            repo_id, [*adds, *deletes], commit_message=message or f"{parcel.kind.capitalize()} sent by paft_merge",
            revision=branch, create_pr=create_pr, parent_commit=head.sha,
        )  # fmt: skip
        for tag in tags:
            api.create_tag(repo_id, tag=tag, revision=made.pr_revision if create_pr else made.oid, exist_ok=True)
    return str(made.pr_url if create_pr and made.pr_url else made.commit_url)


def prepare_upload(folder: Path) -> UploadPlan:
    """See what a folder holds, and that it is whole.

    Raises:
        HubError: PUSH_FOLDER, it is none, holds nothing, or is a merge under way; PUSH_INCOMPLETE, its manifest says
            so; PUSH_CHANGED, its bytes are not those that the merge wrote; PUSH_SECRET, a file holds a token or a private
            key; PUSH_LINK, a link leads out of the folder.
        CheckpointError: it is not a complete checkpoint or adapter.
    """
    from huggingface_hub import get_token

    if has_scheme(folder):
        raise HubError.of("PUSH_FOLDER", shown(str(folder)), "is a URL", "copy it into a folder first")
    folder = Path(folder)
    if not folder.is_dir():
        raise HubError.of("PUSH_FOLDER", folder, "is not a folder", "give the folder that was written")
    if is_unfinished(folder):
        what = "is the output of a merge that did not finish"
        raise HubError.of("PUSH_INCOMPLETE", folder, what, "finish it with `paft merge --resume`")
    files = dict(sorted(_files(folder), key=lambda item: _sending_order(item[0])))
    if not files:
        raise HubError.of("PUSH_FOLDER", folder, "holds nothing to send", "give the folder that was written")
    _refuse_links(folder, files)
    if secrets := refuse_secrets(files, get_token() or ""):
        raise HubError(secrets)
    kind, warnings = _check(folder, files)
    return UploadPlan(folder, files, kind, (*warnings, *_local_paths(files)))


def pack(folder: Path) -> UploadPlan:
    """The old name of `prepare_upload`."""
    deprecated("the function 'hub.pack'", "use 'hub.prepare_upload'", since="0.1")
    return prepare_upload(folder)


# --- the folder -------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file that is sent; nothing hidden, nothing that a run leaves for itself, no folder behind a link."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not _any(f, _NOT_ENTERED))
        for name in names:
            path = Path(here) / name
            if not name.startswith(".") and not _any(name, _NOT_SENT) and path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _refuse_links(folder: Path, files: Mapping[str, Path]) -> None:
    """Raise HubError PUSH_LINK for links to files outside the folder and the Hub's cache: they may be private."""
    problems = Problems()
    for name, path in files.items():
        if not is_inside(path, folder):
            what = f"is a link to {path.resolve()}, outside the folder"
            problems.add("PUSH_LINK", folder / name, what, "copy the file into the folder, or remove the link")
    problems.raise_as(HubError)


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _sending_order(name: str) -> tuple[int, str]:
    """Weights first, what says how they belong together last."""
    return (0 if name.endswith(".safetensors") else 1 if not name.endswith((".index.json", MANIFEST)) else 2), name


def _check(folder: Path, files: dict[str, Path]) -> tuple[str, list[Problem]]:
    """What kind of folder this is, once it is sure to be whole."""
    if is_merged(folder):
        manifest = read_manifest(folder / MANIFEST)
        if manifest.get("complete") is not True:
            raise HubError.of(
                "PUSH_INCOMPLETE", folder, f"{MANIFEST} says that the merge is not complete", "merge again"
            )
        checked = verify(folder)
        if not checked.ok:
            changed = [Problem("PUSH_CHANGED", p.where, p.what, p.fix) for p in checked.problems]
            raise HubError(changed)
        return "merge", _nonfinite(folder, manifest)
    if "adapter_config.json" in files:
        with Checkpoint.open(folder / "adapter_model.safetensors"):
            return "adapter", []
    if any(_any(name, _WEIGHTS) for name in files) or "config.json" in files:
        with Checkpoint.open(folder):
            return "model", []
    return "report", []


def _nonfinite(folder: Path, manifest: Any) -> list[Problem]:
    bad = {name: one["nonfinite"] for name, one in manifest["tensors"].items() if one.get("nonfinite")}
    if not bad:
        return []
    what = f"{sum(bad.values()):,} elements of {len(bad)} tensors are NaN or infinite, the first in {next(iter(bad))!r}"
    return [Problem("NONFINITE", str(folder), what, "say so in its card")]


def _local_paths(files: dict[str, Path]) -> list[Problem]:
    """A warning when the card or the manifest names folders of this machine: nobody else can follow them."""
    found = []
    for name in ("README.md", MANIFEST):
        if name in files and (path := _home_path(files[name])):
            what = f"names a place on this machine ({path}), which others will see and cannot use"
            found.append(Problem("PUSH_PATHS", name, what, "name the sources by their Hub ids in the recipe"))
    return found


def _home_path(file: Path) -> str | None:
    """The first path of this machine near the beginning of a text file, where a card and a manifest name their sources."""
    with file.open(encoding="utf-8", errors="replace") as text:
        found = _HOME_PATH.search(text.read(_LOOKED_AT))
    return found[0] if found else None


# --- the repository ---------------------------------------------------------------------------------------------------


def _repository(api: HfApi, repo_id: str, private: bool | None) -> str:
    """The repository's full name, once it is sure to exist and to be seen by whom it should."""
    with asking(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private is not None and bool(api.model_info(repo_id).private) != private:
            now, wanted = ("public", "private") if private else ("private", "public")
            what = f"exists and is {now}, and was to be {wanted}"
            raise HubError.of("HUB_VISIBILITY", repo_id, what, f"change it in its settings, or leave out --{wanted}")
    return repo_id


def _refuse_tags(api: HfApi, repo_id: str, tags: Sequence[str], commit: str | None) -> None:
    """A tag may be there already only on `commit`, where a push of the same files that was cut off has put it."""
    if tags:
        found = {tag.name for tag in api.list_repo_refs(repo_id).tags if tag.target_commit != commit}
        taken = sorted(found & set(tags))
        if taken:
            raise HubError.of("HUB_EXISTS", repo_id, f"has the tag {', '.join(taken)} already", "choose another tag")


def _holds(there: Sequence[Any], parcel: UploadPlan) -> bool:
    """Whether a commit's files are those of the parcel, by the Hub's own digests: sha256, or git's name of a content."""
    digests = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in there}
    return all(
        digests.get(name)
        in (
            _digest(path, hashlib.sha256()),
            _digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)),
        )
        for name, path in parcel.files.items()
    )


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return str(digest.hexdigest())


def _replaced(parcel: UploadPlan, there: Sequence[str]) -> list[str]:
    """Weights in the repository that the folder does not have, when the folder has weights."""
    if not any(_any(name, _WEIGHTS) for name in parcel.files):
        return []
    return [n for n in there if "/" not in n and _any(n, _WEIGHTS) and n not in parcel.files]
