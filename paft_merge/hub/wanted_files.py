"""The files of a remote folder that a merge wants: small ones, which are fetched first, and weights, which may stay where they are."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import filter as filter_names
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from paft_merge.errors import CheckpointError, HubError
from paft_merge.inputs.adapter_places import CONFIG, MLX_FILE
from paft_merge.inputs.side_file_kinds import DEPTH, kind_of
from paft_merge.inputs.weight_files import module_files
from paft_merge.stores import Store

Kind = Literal["any", "model", "adapter", "side"]
"""The part of a repository to get: a model, an adapter, both (`any`), or only the files beside the weights (`side`)."""

SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.spm", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
"""Files beside the weights of a model: config, tokenizer, processor, chat template, licence."""
_SMALL_BYTES = 16 * 2**20
_SMALL = (*SIDE_FILES, "README.md", "*.py")
_NOT_NEEDED = ("training_args*", "optimizer*", "trainer_state.json", "*_results.json", "*.bin.index.json")
_STEMS = ("model", "diffusion_pytorch_model")
_INDEX = ".index.json"
_ADAPTER, _PICKLED = "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository; `etag` is the sha256 of a file in Git LFS (or Xet), else git's id of the blob."""

    name: str
    size: int
    etag: str
    version: str = ""
    """Of a file in an object store: time of the last change, and the number of the version."""


@dataclass(frozen=True)
class ResolvedRepo:
    """A reference as a folder with every small file, and the weights that are not in it yet."""

    folder: Path
    where: str
    repo_id: str | None = None
    commit: str | None = None
    revision: str | None = None
    missing: tuple[RepoFile, ...] = ()
    listing: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    """Sizes of all files of the repository by name; empty for a local folder."""
    subfolder: str = ""
    """The folder inside the repository, of a reference such as `me/run/checkpoint-500`."""

    store: Store | None = field(default=None, compare=False, repr=False)
    """The folder in an object store; None for one on this machine or on the Hub."""

    @property
    def key(self) -> str:
        """Distinguishes its remote files from those of other folders."""
        return f"{self.store.url}:{self.folder}" if self.store else str(self.commit)

    @property
    def snapshot(self) -> Path:
        """The folder of the whole repository."""
        return self.folder.parents[self.subfolder.count("/")] if self.subfolder else self.folder

    @property
    def missing_bytes(self) -> int:
        """Bytes to download."""
        return sum(file.size for file in self.missing)


@dataclass(frozen=True)
class Place:
    """The part of a repository that a reference names, and what of it is wanted."""

    repo_id: str
    subfolder: str
    where: str
    kind: Kind
    unpickle: bool

    def inside(self, files: Mapping[str, RepoFile]) -> dict[str, RepoFile]:
        """The files of the folder, by their names in it; their own names stay those in the repository."""
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        return {name.removeprefix(prefix): file for name, file in files.items() if name.startswith(prefix)}


def look(
    place: Place, root: Path, commit: str | None, revision: str | None, files: Mapping[str, RepoFile]
) -> ResolvedRepo:
    """What of the files in the folder is wanted and not in the snapshot at `root`."""
    folder, unpickle = root / place.subfolder, place.unpickle
    wanted = wanted_weights(folder, files, place.kind, unpickle)
    pickles = [name for name in files if "/" not in name and name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if place.kind == "adapter":
        pickles = [name for name in pickles if name == _PICKLED]
    if place.kind in ("model", "adapter") and not wanted and pickles:
        what = f"holds only pickles ({', '.join(pickles[:3])}), which can run code when they are loaded"
        fix = "convert it to safetensors, or read it, without running its code, with lazy_unpickle=True"
        raise HubError.of("PICKLE_REFUSED", place.where, what, fix)
    missing = tuple(files[name] for name in wanted if not (folder / name).exists())
    sizes = {name: max(file.size, 0) for name, file in files.items()}
    return ResolvedRepo(folder, place.where, place.repo_id, commit, revision, missing, sizes, place.subfolder)


def small_files(files: Mapping[str, RepoFile], kind: Kind) -> list[str]:
    """The files beside the weights that are downloaded: those of `_SMALL`, and of a model what else is small enough."""
    top = [n for n in files if "/" not in n and any(fnmatch(n, p) for p in _SMALL)]
    rest = [n for n, file in files.items() if kind != "adapter" and file.size <= _SMALL_BYTES and _is_side_file(n)]
    return [n for n in dict.fromkeys((*top, *rest)) if not any(fnmatch(n, p) for p in _NOT_NEEDED)]


def _is_side_file(name: str) -> bool:
    """Whether a merge copies a file of this name; any safetensors file may be the model's weights."""
    return name.count("/") <= DEPTH and (
        kind_of(name) == "side" or (kind_of(name) == "weights" and not name.endswith(".safetensors"))
    )


def wanted_weights(
    folder: Path, files: Collection[str], kind: Kind, unpickle: bool, *, absent: bool = False
) -> list[str]:
    """The files that hold the tensors, as `Checkpoint.open` chooses them; `absent` adds those that only the index names."""
    top = [name for name in files if "/" not in name]
    adapter = [_ADAPTER] if _ADAPTER in top else [_PICKLED] if _PICKLED in top and unpickle else []
    adapter = adapter or ([MLX_FILE] if {MLX_FILE, CONFIG} <= set(top) else [])
    if kind == "side":
        return []
    if kind == "adapter" or (kind == "any" and adapter and "config.json" not in top):
        return adapter
    found = [*_model_files(folder, top, unpickle), *_of_modules(folder, files, unpickle)]
    found = [name for name in found if absent or name in files]
    # An adapter in place of the wanted model is fetched too, so that the message can name it.
    return found if found and kind == "model" else [*adapter, *found]


def _of_modules(folder: Path, files: Collection[str], unpickle: bool) -> list[str]:
    """The weights of modules; `Checkpoint.open` reports a broken list of modules."""
    with suppress(CheckpointError):
        return [name for name in module_files(folder, files) if unpickle or name.endswith(".safetensors")]
    return []


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
    """The files that an index names; `Checkpoint.open` reports a broken index."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({name for name in named if isinstance(name, str)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def refuse_names(files: Iterable[str], where: str) -> None:
    """Raise HubError HUB_PATH for a name that leaves its folder on some operating system."""
    for name in files:
        parts = name.split("/")
        plain = all(p.isprintable() and p.strip(" .") and len(p.encode()) <= 255 for p in parts)
        if not plain or re.search(r"[\\:]", name):
            what = f"has a file named {name[:200]!r}, which would leave its folder"
            raise HubError.of("HUB_PATH", where, what, "do not use this repository")
