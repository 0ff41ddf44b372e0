"""Model references as folders: local ones, and snapshots of Hub repositories in huggingface_hub's cache.

`resolve` downloads the small files of a repository (config, tokenizer, index) and lists the weights that are missing;
`download` downloads those. A complete cached snapshot is used without checking whether a branch has moved, so that a merge
that is run twice is the same merge; `refresh` checks.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from paft_merge.errors import HubError
from paft_merge.hub.faults import asking, meant_folder, problem_of, root_of, transport_error, unreachable
from paft_merge.hub.store_folders import download_weights, resolve_url
from paft_merge.hub.wanted_files import (
    Kind,
    Place,
    RepoFile,
    ResolvedRepo,
    look,
    refuse_names,
    small_files,
    wanted_weights,
)  # fmt: skip
from paft_merge.inputs.links import refuse_links_out
from paft_merge.stores import CONNECTIONS, has_scheme, pause

log = logging.getLogger(__name__)

T = TypeVar("T")

_PINS: ContextVar[Mapping[tuple[str, str | None], str]] = ContextVar("_PINS", default={})  # noqa: B039  # never changed

_REPOSITORY = re.compile(r"^(?P<repo>[\w.-]+(/[\w.-]+)?)(/(?P<folder>[\w.=,-]+(/[\w.=,-]+)*))?$")
_SNAPSHOT = re.compile(r"models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/|$)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE = re.compile(r"^hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<early>[^@/]+))?/(?P<name>[^@]+?)(?:@(?P<late>[^@]+))?$")

HF = "hf://"
"""Prefix of a file on the Hub."""

_ATTEMPTS = 5
_CHUNK_BYTES = 4 * 2**20
_UNKNOWN = -1


def fetch(path: str, revision: str | None = None, *, kind: Kind = "any", unpickle: bool = False) -> Path:
    """The folder that `path` names: a local one, else the complete snapshot of a Hub repository.

    Args:
        path: a local folder (or file), or `user/name` of a repository.
        revision: a branch, tag or commit; the default branch when None.
        kind: the part of the repository to get.
        unpickle: use `pytorch_model*.bin` if there are no safetensors.

    Raises:
        HubError: `path` is neither; or the Hub cannot be reached, does not have it, or denies access.
    """
    return download([resolve(path, revision, kind=kind, unpickle=unpickle)])[0]


def fetch_file(place: str, *, refresh: bool = False) -> Path:
    """A file of a repository: `hf://user/name/path@revision`, or `hf://user/name@revision/path`, as the Hub writes it, as a cached file.

    Raises:
        HubError: as `fetch`; HUB_FILE, the repository has no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = _FILE.match(place)
    if not found or (found["early"] and found["late"]):
        fix = "write hf://user/repository/recipe.yaml, or with @revision behind it"
        raise HubError.of("HUB_FILE", place, "not the address of a file on the Hub", fix)
    repo_id, name, asked = found["repo"], found["name"], found["early"] or found["late"]
    revision = _PINS.get().get((repo_id, asked), asked)
    refuse_names([name], place)
    if not refresh:
        with asking(place), suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(repo_id, name, revision=revision, local_files_only=True))
    return Path(_retried(place, lambda: hf_hub_download(repo_id, name, revision=revision)))


@contextmanager
def pinned(commits: Mapping[tuple[str, str | None], str]) -> Iterator[None]:
    """Within the block, use these commits for the given repositories and revisions."""
    before = _PINS.set(commits)
    try:
        yield
    finally:
        _PINS.reset(before)


def is_repository(path: str) -> bool:
    """Whether `path` has the form of a repository's name or of a folder in one, and not of a local path."""
    return split_repository(path) is not None


def _meant(path: str) -> str:
    """What `base:adapter`, a path with blanks or one with a `*` was probably meant to be; empty for other paths."""
    if "*" in path:
        return "a * stands for the checkpoints of a run only in the models: and sources: of a recipe; name one folder"
    head, colon, tail = path.partition(":")
    if colon and tail and len(head) > 1 and not tail.startswith(("/", "\\")):
        return f"an adapter follows its base after a '+': did you mean {head}+{tail}?"
    return f"did you mean {path.strip()!r}, without blanks?" if path != path.strip() else ""


def split_repository(path: str) -> tuple[str, str] | None:
    """The repository and the folder inside it (or "") of `name`, `user/name` or `user/name/folder`; None for a local path.

    A path of three parts or more is local if its first folder exists here.
    """
    found = _REPOSITORY.match(path)
    if not found or {".", ".."} & set(path.split("/")) or path.startswith("."):
        return None
    folder = found["folder"] or ""
    return None if folder and Path(path.partition("/")[0]).is_dir() else (found["repo"], folder)


def snapshot_of(folder: Path) -> tuple[str, str] | None:
    """The repository and the commit of a folder in the Hub's cache; None for any other folder."""
    found = _SNAPSHOT.search(folder.absolute().as_posix())
    return (found["repo"].replace("--", "/", 1), found["commit"]) if found else None


def cache_folder() -> Path:
    """huggingface_hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def resolve(
    path: str, revision: str | None = None, *, kind: Kind = "any", unpickle: bool = False, refresh: bool = False
) -> ResolvedRepo:
    """Resolve a reference without downloading weights.

    Args:
        path, revision, kind, unpickle: as for `fetch`.
        refresh: check on the Hub whether a branch has moved, also if the cache has a complete snapshot.

    Raises:
        HubError: as `fetch`; HUB_PATH, a file has a name that would leave its folder.
        CheckpointError: LINK_OUTSIDE, a link leaves the local folder.
    """
    if has_scheme(path) and not path.startswith(HF):
        return resolve_url(path, revision, kind=kind, unpickle=unpickle)
    local = Path(path).expanduser()
    if local.exists():
        if not (local.is_dir() or local.is_file()):
            raise HubError.of("NOT_FOUND", path, "is neither a folder nor a regular file", "check the path")
        refuse_links_out(local)
        return ResolvedRepo(local, path)
    if local.is_symlink():
        raise HubError.of("NOT_FOUND", path, f"is a link to {local.readlink()}, which does not exist", "check the path")
    named = split_repository(path)
    if named is None:
        what = "not a local folder, and not a valid Hub repository name"
        raise HubError.of("NOT_FOUND", path, what, _meant(path) or meant_folder(path) or "check the path")
    revision = _PINS.get().get((path, revision), revision)
    where = f"{path}@{revision}" if revision else path
    place = Place(*named, where, kind, unpickle)
    cached = _cached(place, revision)
    if cached and not cached.missing and not (refresh and not _is_commit(revision)):
        return cached
    if _is_offline():
        if cached is None or not cached.missing:
            raise unreachable(where)
        names = ", ".join(file.name for file in cached.missing[:3]) + (", ..." if len(cached.missing) > 3 else "")
        what = f"the cache does not have all of it: {names} of commit {cached.commit} are missing, and HF_HUB_OFFLINE is set"
        raise HubError.of("HUB_OFFLINE", where, what, f"run `paft pull {where}` where there is a network")
    return _ask(place, revision)


def download(repos: Sequence[ResolvedRepo]) -> list[Path]:
    """Download missing files into huggingface_hub's cache, several at a time, and check their sha256.

    Those of object stores are downloaded into the folders that `resolve` made.

    Complete files are kept when another fails, so that a second call continues with the rest.

    Raises:
        HubError: DISK, too little room, before anything is downloaded; and as `fetch`.
    """
    check_room(repos)
    for repo in repos:
        if repo.store is not None:
            download_weights(repo)
    hub = [repo for repo in repos if repo.store is None]
    files = dict.fromkeys((repo.repo_id, repo.commit, repo.where, file) for repo in hub for file in repo.missing)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        waiting = [
            pool.submit(_bring, str(repo_id), str(commit), where, file) for repo_id, commit, where, file in files
        ]
        try:
            for one in waiting:
                one.result()
        except BaseException:
            for one in waiting:
                one.cancel()
            raise
    for repo in repos:
        _remember(repo)
    return [repo.folder for repo in repos]


def check_room(repos: Iterable[ResolvedRepo], also: int = 0, beside: Path | None = None) -> None:
    """Raise HubError DISK if the cache's disk has no room for the missing files (and `also` bytes, if `beside` is on it)."""
    needed = sum(
        {(one.commit, file.etag): file.size for one in repos if not one.store for file in one.missing}.values()
    )
    if not needed:
        return
    place = cache_folder()
    above = next(p for p in (place, *place.parents) if p.exists())
    text = f"{needed:,} bytes are to be downloaded"
    if also and beside is not None:
        there = next(p for p in (beside.absolute(), *beside.absolute().parents) if p.exists())
        if os.stat(there).st_dev == os.stat(above).st_dev:
            needed, text = needed + also, f"{text} and {also:,} to be written on the same disk"
    free = shutil.disk_usage(above).free
    if free < needed:
        fix = "free some space, set HF_HOME to another disk, or merge with stream_from_hub=True, which stores nothing"
        raise HubError.of("DISK", place, f"{text}, and {free:,} are free", fix)


# --- the listing of a repository --------------------------------------------------------------------------------------


def _ask(place: Place, revision: str | None) -> ResolvedRepo:
    """Get the commit and the file list of a revision from the Hub, and download the small files."""
    from huggingface_hub import snapshot_download

    path, where = place.repo_id, place.where
    commit, every = _ask_listing(path, revision, where)
    files = place.inside(every)
    if not files:
        raise _no_folder(place, every)
    small = [glob.escape(files[name].name) for name in small_files(files, place.kind)] or ["config.json"]
    # A repository may have been renamed; the Hub's client chooses the folder.
    root = Path(_retried(where, lambda: snapshot_download(path, revision=commit, allow_patterns=small)))
    (root / place.subfolder).mkdir(parents=True, exist_ok=True)
    found = look(place, root, commit, revision, files)
    return replace(found, missing=tuple(_with_size(file, path, commit, where) for file in found.missing))


def _ask_listing(repo_id: str, revision: str | None, where: str) -> tuple[str, dict[str, RepoFile]]:
    """The commit of a revision and its files by name, from the Hub."""
    from huggingface_hub import HfApi

    info = _retried(where, lambda: HfApi().model_info(repo_id, revision=revision, files_metadata=True))
    every = {
        s.rfilename: RepoFile(
            s.rfilename, _UNKNOWN if s.size is None else s.size, s.lfs.sha256 if s.lfs else s.blob_id or ""
        )
        for s in info.siblings or ()
    }
    refuse_names(every, where)
    return str(info.sha), every


def file_names(repo_id: str, revision: str | None = None, *, refresh: bool = False) -> list[str]:
    """The names of all files of a repository, by the list in the cache if there is one; offline, those in the cache.

    Args:
        repo_id: `user/name`.
        revision: a branch, tag or commit; the default branch when None.
        refresh: ask the Hub also if the cache has a list.

    Raises:
        HubError: as for `fetch`.
    """
    where = f"{repo_id}@{revision}" if revision else repo_id
    root = _cached_root(repo_id, revision, where)
    listed = _listing(repo_id, root) if root and not refresh else None
    if listed is not None:
        return list(listed)
    if not _is_offline():
        return list(_ask_listing(repo_id, revision, where)[1])
    if root is None:
        what = "is not in the cache, and the Hub cannot be reached (or HF_HUB_OFFLINE is set)"
        raise HubError.of("HUB_OFFLINE", where, what, "pull it first where there is a network")
    return [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]


def _no_folder(place: Place, files: Iterable[str]) -> HubError:
    """The error of a folder that a repository does not have, with those that it has; or of an empty repository."""
    above = {name.rpartition("/")[0] for name in files} - {""}
    shown = ", ".join(sorted(above, key=lambda name: (len(name), name))[:8]) or "no folders"
    what = f"{place.repo_id} has no folder {place.subfolder!r}" if place.subfolder else "the repository has no files"
    return HubError.of("HUB_FILE", place.where, what, f"it has {shown}" if place.subfolder else "check the name")


def _with_size(file: RepoFile, repo_id: str, commit: str, where: str) -> RepoFile:
    """The file with its size, asked for where the listing has none."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if file.size != _UNKNOWN:
        return file
    url, where = hf_hub_url(repo_id, file.name, revision=commit), f"{where}: {file.name}"
    size = _retried(where, lambda: get_hf_file_metadata(url)).size
    if size is None:
        raise HubError.of("HUB_ERROR", where, "the Hub does not report its size", "try again later")
    return replace(file, size=size)


def _cached(place: Place, revision: str | None) -> ResolvedRepo | None:
    """Resolve a reference from the cache alone; None if it has no snapshot, or its file list is unknown while online.

    Newer versions of huggingface_hub cache the file list of a repository. Without it, weights are compared with their
    index, and the small files are assumed to be complete; this is done only offline.
    """
    root = _cached_root(place.repo_id, revision, place.where)
    if root is None:
        return None
    listed, folder = _listing(place.repo_id, root), root / place.subfolder
    if listed is None:
        if not _is_offline() or not folder.is_dir():
            return None
        files = {
            f.name: RepoFile(f.relative_to(root).as_posix(), f.stat().st_size, "")
            for f in folder.iterdir()
            if f.is_file()
        }
        names = wanted_weights(folder, files, place.kind, place.unpickle, absent=True)
        found = look(place, root, root.name, revision, files)
        prefix = f"{place.subfolder}/" if place.subfolder else ""
        absent = (RepoFile(f"{prefix}{name}", 0, "") for name in names if name not in files)
        return replace(found, missing=(*found.missing, *absent))
    files = place.inside(listed)
    if not files:
        if not (_is_offline() or _is_commit(revision)):
            return None  # a newer commit may have the folder
        raise _no_folder(place, listed)
    found = look(place, root, root.name, revision, files)
    lost = tuple(files[name] for name in small_files(files, place.kind) if not (folder / name).exists())
    return replace(found, missing=(*lost, *found.missing))


def _cached_root(repo_id: str, revision: str | None, where: str) -> Path | None:
    """The folder of a revision in the cache, which may lack files; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with asking(where):
        try:
            held = snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=["config.json"])
        except LocalEntryNotFoundError:
            return None
    return Path(held)


def _listing(repo_id: str, folder: Path) -> dict[str, RepoFile] | None:
    """The cached file list of a commit; None if there is none."""
    try:
        from huggingface_hub import get_cached_repo_tree  # version 2 and later
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return None
    try:
        entries = get_cached_repo_tree(repo_id, revision=folder.name)
    except CachedRepoTreeNotFoundError:
        return None
    return {f.path: RepoFile(f.path, f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in entries}


def _is_commit(revision: str | None) -> bool:
    return revision is not None and bool(_COMMIT.fullmatch(revision))


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


# --- fetching ---------------------------------------------------------------------------------------------------------


def _bring(repo_id: str, commit: str, where: str, file: RepoFile) -> None:
    """Fetch one file into the cache and check it; one that is not as listed is removed and fetched again."""
    from huggingface_hub import hf_hub_download

    where = f"{where}: {file.name}"
    for _ in range(_ATTEMPTS):
        path = Path(_retried(where, lambda: hf_hub_download(repo_id, file.name, revision=commit)))
        if _is_whole(path, file):
            return
        with suppress(FileNotFoundError):
            path.resolve().unlink()
        path.unlink(missing_ok=True)
    what = "the bytes received differ from what the Hub lists (sha256)"
    raise HubError.of("HUB_CORRUPT", where, what, "try again later, or through another network")


def _retried(where: str, call: Callable[[], T]) -> T:
    """Ask the Hub; again, with growing pauses, after a broken connection or a status of 500 and above."""
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(_ATTEMPTS - 1):
        try:
            with asking(where):
                return call()
        except HubError as error:
            cause = root_of(error.__cause__ or error)
            status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
            broken = isinstance(cause, transport_error()) and not isinstance(cause, HfHubHTTPError)
            if not (broken or status >= 500 or "Consistency check failed" in str(cause)):
                raise
            log.info("%s", error)
            time.sleep(pause(attempt))
    with asking(where):
        return call()


def _is_whole(path: Path, file: RepoFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    if len(file.etag) != 64:  # git's id of a small file
        return True
    digest, held = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as stored:
        while count := stored.readinto(held):
            digest.update(held[:count])
    return digest.hexdigest() == file.etag


def _remember(repo: ResolvedRepo) -> None:
    """Record the commit of a branch or tag in the cache, as the Hub's client does, once the snapshot is complete."""
    if repo.commit is None or _is_commit(repo.revision):
        return
    ref = repo.snapshot.parent.parent / "refs" / (repo.revision or "main")
    try:
        if ref.is_file() and ref.read_text() == repo.commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        made = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        made.write_text(repo.commit)
        os.replace(made, ref)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):  # a shared, read-only cache
            log.info("%s cannot be written: %s", ref, error.strerror)
            return
        raise problem_of(error, repo.where) from error
