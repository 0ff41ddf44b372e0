"""Folders of object stores as resolved references: their small files are fetched, and weights stay in the store."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import xxhash

from paft_merge.errors import CheckpointError, PaftMergeError, StoreError
from paft_merge.hub.wanted_files import Kind, Place, RepoFile, ResolvedRepo, look, refuse_names, small_files
from paft_merge.inputs.weight_files import UNFINISHED
from paft_merge.output.manifest import MANIFEST
from paft_merge.stores import CONNECTIONS, Store, shown, split_file

_RECIPE_BYTES = 16 * 2**20


def resolve_url(url: str, revision: str | None, *, kind: Kind, unpickle: bool) -> ResolvedRepo:
    """Resolve the URL of a folder, or of one `.safetensors` file, without downloading weights.

    The folder of the result is temporary: it is removed when the process ends. It has the files of one listing, so that
    a second call sees what has changed.

    Raises:
        StoreError: the store cannot be read, or has no such folder.
        CheckpointError: CHECKPOINT_UNFINISHED, a merge into the folder has not finished.
        HubError: as for `hub.resolve`.
    """
    if revision is not None:
        fix = "write the URL without the part after '@'"
        raise StoreError.of("STORE_URL", shown(f"{url}@{revision}"), "an object store has no revisions", fix)
    at, single = split_file(url) if url.endswith(".safetensors") else (url, "")
    store = Store(at)
    found = store.list()
    if not found or (single and single not in found):
        raise StoreError.of("STORE_NOT_FOUND", shown(url), "there is no such folder or file", "check the path")
    if UNFINISHED in found and MANIFEST not in found:
        what = "is the output of a merge that did not finish"
        raise CheckpointError.of("CHECKPOINT_UNFINISHED", store.url, what, "finish it with resume=True")
    refuse_names(found, store.url)
    files = {name: RepoFile(name, one.size, one.etag, one.version) for name, one in found.items() if name != UNFINISHED}
    digest = xxhash.xxh3_64_hexdigest(repr((store.url, sorted(found.values(), key=lambda one: one.name))).encode())
    folder = _temporary() / digest / (store.url.rpartition("/")[2] or "root")
    folder.mkdir(parents=True, exist_ok=True)
    small = [name for name in small_files(files, kind) if not (folder / name).exists()]
    _fetch(store, folder, [files[name] for name in small])
    if single:
        listing = {name: file.size for name, file in files.items()}
        return ResolvedRepo(folder / single, shown(url), missing=(files[single],), listing=listing, store=store)
    looked = look(Place("", "", store.url, kind, unpickle), folder, None, None, files)
    return replace(looked, repo_id=None, store=store)


def download_weights(repo: ResolvedRepo) -> None:
    """Download the missing files of a folder in a store.

    Raises:
        StoreError: they cannot be read; DISK, the disk of temporary files has too little room.
    """
    assert repo.store is not None
    free = shutil.disk_usage(_temporary()).free
    if free < repo.missing_bytes:
        what = f"{repo.missing_bytes:,} bytes are to be downloaded, and {free:,} are free"
        raise StoreError.of("DISK", _temporary(), what, "free some space, or set TMPDIR to another disk")
    _fetch(repo.store, repo.snapshot if repo.folder.is_dir() else repo.folder.parent, repo.missing)


def fetch_text(url: str) -> str:
    """The text of a file in a store, such as a recipe.

    Raises:
        StoreError: it cannot be read; STORE_FILE, it is larger than 16 MB or not UTF-8.
    """
    folder, name = split_file(url)
    held = Store(folder).read(name, 0, _RECIPE_BYTES + 1)
    try:
        if len(held) <= _RECIPE_BYTES:
            return held.decode()
        what = "is larger than 16 MB"
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text at byte {error.start}"
    raise StoreError.of("STORE_FILE", shown(url), what, "give the URL of a recipe")


@contextmanager
def named_by_url(repo: ResolvedRepo) -> Iterator[None]:
    """Name a folder in an object store by its URL in errors, in place of the temporary folder of its small files."""
    try:
        yield
    except PaftMergeError as error:
        if repo.store is None:
            raise
        here, url = str(repo.snapshot), repo.store.url
        found = [
            replace(
                one,
                where=one.where.replace(here, url),
                what=one.what.replace(here, url),
                fix=one.fix.replace(here, url),
            )
            for one in error.problems
        ]
        raise type(error)(found, error.warnings) from error


def _fetch(store: Store, folder: Path, files: list[RepoFile] | tuple[RepoFile, ...]) -> None:
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(lambda file: store.fetch(file.name, folder / file.name, file.size), files))


@cache
def _temporary() -> Path:
    """The folder of this process for files of stores."""
    made = Path(tempfile.mkdtemp(prefix="paft-stores-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
