"""Where a model reference leads: a local folder, or a snapshot of a Hub repository in huggingface_hub's own cache.

`resolve` brings the small files of a repository (config, tokenizer, index) and says which weights are not here; `download`
brings those. What the cache holds whole is taken as it is, without asking the Hub whether a branch has moved since:
that is what `refresh` is for, as a merge that is run twice should be the same merge.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from fnmatch import filter as filter_names
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, TypeVar

from paft_merge.errors import HubError
from paft_merge.hub.faults import asking, problem_of, root_of, transport_error
from paft_merge.recipe import ModelRef

log = logging.getLogger(__name__)

T = TypeVar("T")

Kind = Literal["any", "model", "adapter", "side"]
"""What of a repository is wanted: it may hold a model, an adapter, or both; `side` is what stands beside the weights."""

_PINS: ContextVar[Mapping[tuple[str, str | None], str]] = ContextVar("_PINS", default={})  # noqa: B039  # never changed

SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.spm", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
"""What stands beside the weights of a model and belongs to it: config, tokenizer, processor, chat template, licence."""
_TEMPLATES = "additional_chat_templates/"
_SMALL = (*SIDE_FILES, "README.md", "*.py")
_NOT_NEEDED = ("training_args*", "optimizer*", "trainer_state.json", "*_results.json", "*.bin.index.json")
_STEMS = ("model", "diffusion_pytorch_model")
_INDEX = ".index.json"
_ADAPTER = "adapter_model.safetensors"
_REPOSITORY = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_SNAPSHOT = re.compile(r"models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/|$)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE = re.compile(r"^hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<early>[^@/]+))?/(?P<name>[^@]+?)(?:@(?P<late>[^@]+))?$")

HF = "hf://"
"""What the name of a file on the Hub begins with."""

CONNECTIONS = 8
_ATTEMPTS = 5
_CHUNK_BYTES = 4 * 2**20
_UNKNOWN = -1


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository; `etag` is its sha256 where Git LFS (or Xet) keeps it, else git's name of the blob."""

    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class ResolvedRepo:
    """What a reference leads to: a folder that holds every small file, and the weights that are not in it yet."""

    folder: Path
    where: str
    repo_id: str | None = None
    commit: str | None = None
    revision: str | None = None
    missing: tuple[RepoFile, ...] = ()

    @property
    def missing_bytes(self) -> int:
        return sum(file.size for file in self.missing)


def fetch(path: str, revision: str | None = None, *, kind: Kind = "any", unpickle: bool = False) -> Path:
    """The folder that `path` names: itself when it exists here, else the Hub repository's snapshot, whole.

    Args:
        path: a folder (or file) of this machine, or `user/name` of a repository.
        revision: a branch, tag or commit; the default branch when None.
        kind: what of the repository is wanted.
        unpickle: take `pytorch_model*.bin` where there is nothing else.

    Raises:
        HubError: it is neither; or the Hub cannot be reached, does not have it, or does not let us.
    """
    return download([resolve(path, revision, kind=kind, unpickle=unpickle)])[0]


def pull(reference: str, *, unpickle: bool = False) -> list[Path]:
    """Download what a merge needs of a reference into the Hub's cache, at the newest commit of a branch.

    Args:
        reference: `user/name`, `user/name@revision`, `BASE+ADAPTER`, or a file, `hf://user/name/recipe.yaml`.
        unpickle: as for `fetch`.

    Returns:
        The folder of the model, then that of the adapter; or the file.

    Raises:
        HubError: as for `fetch`.
        RecipeError: the reference is invalid.
    """
    if reference.startswith(HF):
        return [fetch_file(reference, refresh=True)]
    ref = ModelRef.parse(reference)
    kind: Kind = "model" if ref.lora else "any"
    found = [resolve(ref.path, ref.revision, kind=kind, unpickle=unpickle, refresh=True)]
    if ref.lora:
        found.append(resolve(ref.lora, ref.lora_revision, kind="adapter", refresh=True))
    return download(found)


def fetch_file(place: str, *, refresh: bool = False) -> Path:
    """A file of a repository: `hf://user/name/path@revision`, or `hf://user/name@revision/path`, as the Hub writes it.

    Raises:
        HubError: as `fetch`; HUB_FILE, the repository has no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = _FILE.match(place)
    if not found or (found["early"] and found["late"]):
        fix = "write hf://user/repository/recipe.yaml, or with @revision behind it"
        raise HubError.of("HUB_FILE", place, "is no file on the Hub", fix)
    repo_id, name, asked = found["repo"], found["name"], found["early"] or found["late"]
    revision = _PINS.get().get((repo_id, asked), asked)
    _refuse_names([name], place)
    with asking(place):
        try:
            return Path(hf_hub_download(repo_id, name, revision=revision, local_files_only=not refresh))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(repo_id, name, revision=revision))


@contextmanager
def pinned(commits: Mapping[tuple[str, str | None], str]) -> Iterator[None]:
    """Let a repository at a revision mean one commit, wherever it is asked for in the block."""
    before = _PINS.set(commits)
    try:
        yield
    finally:
        _PINS.reset(before)


def is_repository(path: str) -> bool:
    """Whether `path` could name a Hub repository, and is no path of this machine by its look."""
    return bool(_REPOSITORY.match(path)) and not path.startswith(".")


def snapshot_of(folder: Path) -> tuple[str, str] | None:
    """The repository and the commit of a folder in the Hub's cache; None for any other folder."""
    found = _SNAPSHOT.search(folder.absolute().as_posix())
    return (found["repo"].replace("--", "/", 1), found["commit"]) if found else None


def cache_folder() -> Path:
    """Where huggingface_hub keeps what was fetched."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def resolve(
    path: str, revision: str | None = None, *, kind: Kind = "any", unpickle: bool = False, refresh: bool = False
) -> ResolvedRepo:
    """See what `path` leads to, fetching no weights.

    Args:
        path, revision, kind, unpickle: as for `fetch`.
        refresh: ask the Hub where a branch stands now, even if the cache holds the one of last time.

    Raises:
        HubError: as `fetch`; HUB_PATH, a file of it has a name that would leave the folder.
    """
    local = Path(path).expanduser()
    if local.exists():
        return ResolvedRepo(local, path)
    if not is_repository(path):
        raise HubError.of("NOT_FOUND", path, "is no folder here, and no name of a Hub repository", "check the path")
    revision = _PINS.get().get((path, revision), revision)
    where = f"{path}@{revision}" if revision else path
    cached = _cached(path, revision, where, kind, unpickle)
    if cached and not cached.missing and not (refresh and not _is_commit(revision)):
        return cached
    if _is_offline():
        if cached is None or not cached.missing:
            what = "is no folder here, and the Hub cannot be reached (or HF_HUB_OFFLINE is set)"
            raise HubError.of("HUB_OFFLINE", where, what, "check the path, or pull it first where there is a network")
        names = ", ".join(file.name for file in cached.missing[:3]) + (", ..." if len(cached.missing) > 3 else "")
        what = f"the cache does not have all of it: {names} of commit {cached.commit} are missing, and HF_HUB_OFFLINE is set"
        raise HubError.of("HUB_OFFLINE", where, what, f"run `paft pull {where}` where there is a network")
    return _ask(path, revision, where, kind, unpickle)


def download(looks: Sequence[ResolvedRepo]) -> list[Path]:
    """Fetch what is missing into huggingface_hub's cache, several files at a time, and check what came by its sha256.

    Files that are whole are kept when another fails, so a second call goes on with the rest.

    Raises:
        HubError: DISK, there is too little room, told before anything is fetched; and as `fetch`.
    """
    check_room(looks)
    files = dict.fromkeys(
        (resolve.repo_id, resolve.commit, resolve.where, file) for resolve in looks for file in resolve.missing
    )
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        waiting = [pool.submit(_bring, str(repo), str(commit), where, file) for repo, commit, where, file in files]
        try:
            for one in waiting:
                one.result()
        except BaseException:
            for one in waiting:
                one.cancel()
            raise
    for seen in looks:
        _remember(seen)
    return [seen.folder for seen in looks]


def check_room(looks: Iterable[ResolvedRepo], also: int = 0, beside: Path | None = None) -> None:
    """Raise HubError DISK when the cache's disk has too little room for what is missing (and `also` bytes at `beside`)."""
    needed = sum({(one.commit, file.etag): file.size for one in looks for file in one.missing}.values())
    if not needed:
        return
    place = cache_folder()
    above = next(p for p in (place, *place.parents) if p.exists())
    text = f"{needed:,} bytes are to be fetched"
    if also and beside is not None:
        there = next(p for p in (beside.absolute(), *beside.absolute().parents) if p.exists())
        if os.stat(there).st_dev == os.stat(above).st_dev:
            needed, text = needed + also, f"{text} and {also:,} to be written on the same disk"
    free = shutil.disk_usage(above).free
    if free < needed:
        fix = "free some space, set HF_HOME to another disk, or merge with stream_from_hub=True, which stores nothing"
        raise HubError.of("DISK", place, f"{text}, and {free:,} are free", fix)


# --- what a repository holds ------------------------------------------------------------------------------------------


def _ask(path: str, revision: str | None, where: str, kind: Kind, unpickle: bool) -> ResolvedRepo:
    """Ask the Hub what the revision is and what it holds, and bring the small files."""
    from huggingface_hub import HfApi, snapshot_download

    info = _retried(where, lambda: HfApi().model_info(path, revision=revision, files_metadata=True))
    files = {
        s.rfilename: RepoFile(
            s.rfilename, _UNKNOWN if s.size is None else s.size, s.lfs.sha256 if s.lfs else s.blob_id or ""
        )
        for s in info.siblings or ()
    }
    _refuse_names(files, where)
    commit, small = str(info.sha), [glob.escape(name) for name in _small(files)] or ["config.json"]
    # A repository may have been renamed; the Hub's client chooses the folder.
    folder = Path(_retried(where, lambda: snapshot_download(path, revision=commit, allow_patterns=small)))
    folder.mkdir(parents=True, exist_ok=True)
    found = _look(folder, where, path, commit, revision, files, kind, unpickle)
    return replace(found, missing=tuple(_with_size(file, path, commit, where) for file in found.missing))


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


def _look(
    folder: Path, where: str, repo_id: str, commit: str, revision: str | None, files: Mapping[str, RepoFile],
    kind: Kind, unpickle: bool,
) -> ResolvedRepo:  # fmt: skip
    wanted = _weights(folder, files, kind, unpickle)
    pickles = [name for name in files if "/" not in name and name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if kind == "model" and not wanted and pickles:
        what = f"holds only pickles ({', '.join(pickles[:3])}), which can run code when they are loaded"
        fix = "convert it to safetensors, or read it through mergekit's restricted unpickler with lazy_unpickle=True"
        raise HubError.of("PICKLE_REFUSED", where, what, fix)
    missing = tuple(files[name] for name in wanted if not (folder / name).exists())
    return ResolvedRepo(folder, where, repo_id, commit, revision, missing)


def _cached(path: str, revision: str | None, where: str, kind: Kind, unpickle: bool) -> ResolvedRepo | None:
    """What the cache knows of a reference, without the network; `missing` says what it knows to be missing.

    A listing of the repository, which newer versions of huggingface_hub keep, tells all. Without one, as left by others,
    weights and their index must agree; the small files are then trusted to be there only where nobody can be asked.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with asking(where):
        try:
            folder = Path(
                snapshot_download(path, revision=revision, local_files_only=True, allow_patterns=["config.json"])
            )
        except LocalEntryNotFoundError:
            return None
    files = _listing(path, folder)
    if files is None:
        if not _is_offline():
            return None
        files = {f.name: RepoFile(f.name, f.stat().st_size, "") for f in folder.iterdir() if f.is_file()}
        weights = [n for n in _weights(folder, files, kind, unpickle, absent=True) if n not in files]
        found = _look(folder, where, path, folder.name, revision, files, kind, unpickle)
        return ResolvedRepo(
            folder, where, path, folder.name, revision, (*found.missing, *(RepoFile(n, 0, "") for n in weights))
        )
    found = _look(folder, where, path, folder.name, revision, files, kind, unpickle)
    lost = tuple(files[name] for name in _small(files) if not (folder / name).exists())
    return ResolvedRepo(folder, where, path, folder.name, revision, (*lost, *found.missing))


def _listing(repo_id: str, folder: Path) -> dict[str, RepoFile] | None:
    """The files of a cached commit as huggingface_hub noted them; None when it did not."""
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


def _small(files: Iterable[str]) -> list[str]:
    top = [n for n in files if "/" not in n and any(fnmatch(n, p) for p in _SMALL)]
    templates = [n for n in files if n.startswith(_TEMPLATES) and n.endswith(".jinja") and n.count("/") == 1]
    return [n for n in (*top, *templates) if not any(fnmatch(n, p) for p in _NOT_NEEDED)]


def _weights(folder: Path, files: Collection[str], kind: Kind, unpickle: bool, *, absent: bool = False) -> list[str]:
    """The files that hold the tensors, as `Checkpoint.open` chooses them; `absent` adds those that only the index names."""
    top = [name for name in files if "/" not in name]
    adapter = [_ADAPTER] if _ADAPTER in top else []
    if kind == "side":
        return []
    if kind == "adapter" or (kind == "any" and adapter and "config.json" not in top):
        return adapter
    found = _model_files(folder, top, unpickle)
    found = [name for name in found if absent or name in files]
    # An adapter in place of the wanted model is fetched too, so that the message can name it.
    return found if found and kind == "model" else [*adapter, *found]


def _model_files(folder: Path, top: Sequence[str], unpickle: bool) -> list[str]:
    """The weights of a model: files with a standard name, else any other safetensors, else pickles with `unpickle`."""
    for stem in _STEMS:
        index, single = f"{stem}.safetensors{_INDEX}", f"{stem}.safetensors"
        if index in top or single in top:
            shards = _shards(folder / index) if index in top else []
            return list(dict.fromkeys([*shards, *(name for name in top if name == single)]))
    tensors = [n for n in top if n.endswith(".safetensors") and not n.startswith(("consolidated", "adapter_model"))]
    if tensors or not unpickle:
        return tensors
    index = f"pytorch_model.bin{_INDEX}"
    shards = filter_names(top, "pytorch_model-*.bin") if index in top else []
    return [index, *shards] if shards else filter_names(top, "pytorch_model.bin")


def _shards(index: Path) -> list[str]:
    """The files that an index names; what is wrong with it is told when it is opened."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({name for name in named if isinstance(name, str)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _refuse_names(files: Iterable[str], where: str) -> None:
    """No file may have a name that leads out of the folder it is put in, on any system."""
    for name in files:
        parts = name.split("/")
        plain = all(p.isprintable() and p.strip(" .") and len(p.encode()) <= 255 for p in parts)
        if not plain or re.search(r"[\\:]", name):
            what = f"holds a file named {name[:200]!r}, which would leave its folder"
            raise HubError.of("HUB_PATH", where, what, "do not use this repository")


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


def pause(attempt: int) -> float:
    """Seconds to wait before the next attempt: they double, up to half a minute."""
    return min(0.25 * 2.0**attempt, 30.0)


def _is_whole(path: Path, file: RepoFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    if len(file.etag) != 64:  # a small file, by git's name of it
        return True
    digest, held = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as stored:
        while count := stored.readinto(held):
            digest.update(held[:count])
    return digest.hexdigest() == file.etag


def _remember(resolve: ResolvedRepo) -> None:
    """Note which commit a branch or tag led to, as the Hub's client does, now that all of it is there."""
    if resolve.commit is None or _is_commit(resolve.revision):
        return
    ref = resolve.folder.parent.parent / "refs" / (resolve.revision or "main")
    try:
        if ref.is_file() and ref.read_text() == resolve.commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        made = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        made.write_text(resolve.commit)
        os.replace(made, ref)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):  # a cache that others keep
            log.info("%s cannot be written: %s", ref, error.strerror)
            return
        raise problem_of(error, resolve.where) from error
