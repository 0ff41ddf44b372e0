"""`MergeOptions`: every option of a merge. `merge`, `open_plan`, `reproduce` and the command line take this one list."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from paft_merge.engine.worker_number import WorkerNumber
from paft_merge.errors import Problem, deprecated

if TYPE_CHECKING:
    from paft_merge.engine.streaming import Progress


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Every option of a merge beside the recipe and the output folder.

    Merged numbers depend on the recipe only, except with `unsafe_truncate_embeddings`, which cuts embeddings, and `tensor_names`,
    which chooses the tensors of files.
    """

    strict: bool = False
    """Raise an error for a recipe key that has no effect, instead of a warning."""
    imports: Sequence[str] = ()
    """Modules that register methods with mergekit; a recipe may then name those methods too."""
    device: Literal["cpu", "cuda"] | str = "cpu"
    """Device that computes: `cpu`, `cuda` or `cuda:1`."""
    threads: int | None = None
    """Blocks computed at a time. None: one for each core."""
    memory: int | str | None = None
    """Upper bound of the working memory, in bytes or as text (`"800M"`); lowers `threads` where necessary."""
    out_shard_bytes: int | str | None = None
    """Largest size of an output file, in bytes or as text (`"5GB"`). None: the files of the base."""
    resume: bool = False
    """Continue an interrupted merge from `out.part`. A finished merge of the same recipe and inputs is left as it is."""
    overwrite: bool = False
    """Replace an existing model in `out`, which stays complete until the merge has finished."""
    scratch: Path | str | None = None
    """For an output in an object store: folder in which a file grows before its upload. None: as TMPDIR says."""
    force: bool = False
    """With `overwrite`: replace `out` even if it holds no model, and delete whatever it holds."""
    lazy_unpickle: bool = False
    """Read `.bin` checkpoints through a reader that runs no code of them."""
    follow_links: bool = False
    """Follow links of a model's or an adapter's folder to files outside of it. Links into the Hub's cache always are."""
    trust_remote_code: bool = False
    """Copy the base's Python files into the output. They are never run."""
    allow_crimes: bool = False
    """Merge models whose configs differ in fields that tensor shapes do not show."""
    allow_nonfinite: bool = False
    """Merge NaN and infinity instead of raising an error."""
    tensor_names: Literal["intersection", "union"] | None = None
    """For tensor files with different tensors: merge the tensors that all files hold, or that any file holds."""
    unsafe_truncate_embeddings: bool = False
    """Cut embeddings to the smallest vocabulary, by position. For models whose token ids agree up to there."""
    max_error: float | None = None
    """For `output: {kind: adapter}`: largest relative error of all factors together. A larger one raises an error before `out` gets its name."""
    write_model_card: bool = True
    """Write README.md."""
    stream_from_hub: bool = False
    """Read weights from the Hub by byte ranges and store none of them. `open_plan` then reads headers only."""
    output_name: str | None = None
    """Document to write, for a file with several. None: the unnamed one, else every one that no other document uses."""
    worker: str | None = None
    """`"I/N"`: be worker I of N, from 0 to N - 1, that write one output together; see docs/scale.md."""
    distributed: bool = False
    """Be a worker whose number is in the environment, as torchrun, Slurm and Kubernetes set it."""
    finalize: bool = False
    """Complete the output of workers that have written all files, and merge nothing."""
    lease_seconds: float = 60
    """Seconds after which a worker that shows no sign of life is taken for dead."""
    engine: Literal["local", "ray"] = "local"
    """`ray`: write each output file in a task of a Ray cluster, with `threads` CPUs; see docs/scale.md."""
    ray_address: str | None = None
    """Ray cluster: `auto` or `host:port`. None: that of `RAY_ADDRESS`, else Ray is started on this machine."""
    progress: Callable[[Progress], None] | None = None
    """Called after each tensor, in the thread that merges."""
    warn: Callable[[Sequence[Problem]], None] | None = None
    """Receives warnings. None: they are logged."""

    def __post_init__(self) -> None:
        _ = self.memory_bytes, self.shard_bytes, self.worker_number  # raises for text that is not a size or a worker
        if (self.worker is not None) + self.distributed + self.finalize > 1:
            raise ValueError("worker, distributed and finalize exclude each other")
        if self.engine not in ("local", "ray"):
            raise ValueError(f"engine must be local or ray, not {self.engine!r}")
        if self.engine == "ray" and (self.worker is not None or self.distributed or self.finalize):
            raise ValueError(
                "Ray numbers its tasks itself: leave out worker, distributed and finalize with engine='ray'"
            )
        if self.engine == "ray" and self.device not in ("cpu", "cuda"):
            raise ValueError(f"Ray chooses the GPU of each task: write device='cuda', not {self.device!r}")
        if self.engine != "ray" and self.ray_address is not None:
            raise ValueError(f"ray_address={self.ray_address!r} needs engine='ray'")
        if self.max_error is not None and not self.max_error >= 0:
            raise ValueError(f"max_error must be 0 or more, not {self.max_error}")
        if not self.lease_seconds > 0:
            raise ValueError(f"lease_seconds must be positive, not {self.lease_seconds}")

    @property
    def worker_number(self) -> WorkerNumber | None:
        """The number of this worker; None for a merge by one process."""
        if self.worker is not None:
            return WorkerNumber.parse(self.worker)
        return WorkerNumber.from_environment(os.environ) if self.distributed else None

    @property
    def shared(self) -> bool:
        """Whether several processes write the output."""
        return self.worker is not None or self.distributed or self.finalize or self.engine == "ray"

    @property
    def keeps_finished(self) -> bool:
        """Whether a finished merge in `out` is left as it is."""
        return self.resume or self.shared

    @property
    def memory_bytes(self) -> int | None:
        """`memory` as a number."""
        return parse_size(self.memory) if isinstance(self.memory, str) else self.memory

    @property
    def shard_bytes(self) -> int | None:
        """`out_shard_bytes` as a number."""
        return parse_size(self.out_shard_bytes) if isinstance(self.out_shard_bytes, str) else self.out_shard_bytes

    @classmethod
    def of(cls, options: MergeOptions | None, overrides: Mapping[str, Any]) -> MergeOptions:
        """Return `options` (default: all defaults) with `overrides` in place of its fields.

        Raises:
            TypeError: a keyword that is not an option.
        """
        given, known = dict(overrides), [field.name for field in fields(cls)]
        for old, (new, since) in _RENAMED.items():
            if old in given:
                deprecated(f"the option {old!r}", f"use {new!r}", since=since, stacklevel=4)
                given[new] = given.pop(old)
        if unknown := [name for name in given if name not in known]:
            from paft_merge.recipe import did_you_mean

            hint = did_you_mean(unknown[0], known) or f"options are {', '.join(known)}"
            raise TypeError(f"{unknown[0]!r} is not an option of a merge; {hint}")
        return replace(options or cls(), **given)

    def recorded(self) -> dict[str, Any]:
        """Return the options that a manifest records, as JSON: those that `reproduce` needs."""
        found = {name: getattr(self, name) for name in RECORDED}
        names = {"tensor_names": self.tensor_names} if self.tensor_names else {}
        cut = {"unsafe_truncate_embeddings": True} if self.unsafe_truncate_embeddings else {}
        return {**found, "imports": list(self.imports), "out_shard_bytes": self.shard_bytes, **names, **cut}


RECORDED = (
    "device", "imports", "out_shard_bytes", "lazy_unpickle", "allow_crimes", "allow_nonfinite", "trust_remote_code",
)  # fmt: skip
"""Options that every manifest records, in its order; those of `RECORDED_IF_SET` follow where they are set."""

RECORDED_IF_SET = ("tensor_names", "unsafe_truncate_embeddings")

_RENAMED = {"remote": ("stream_from_hub", "0.1")}
"""Old name of an option to its new name and the version that renamed it."""


class MergeKeywords(TypedDict, total=False):
    """The fields of `MergeOptions` as keywords, for type checkers and editors. A test compares the two."""

    strict: bool
    imports: Sequence[str]
    device: Literal["cpu", "cuda"] | str
    threads: int | None
    memory: int | str | None
    out_shard_bytes: int | str | None
    resume: bool
    overwrite: bool
    scratch: Path | str | None
    force: bool
    lazy_unpickle: bool
    follow_links: bool
    trust_remote_code: bool
    allow_crimes: bool
    allow_nonfinite: bool
    tensor_names: Literal["intersection", "union"] | None
    unsafe_truncate_embeddings: bool
    max_error: float | None
    write_model_card: bool
    stream_from_hub: bool
    output_name: str | None
    worker: str | None
    distributed: bool
    finalize: bool
    lease_seconds: float
    engine: Literal["local", "ray"]
    ray_address: str | None
    progress: Callable[[Progress], None] | None
    warn: Callable[[Sequence[Problem]], None] | None


_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


def parse_size(text: str) -> int:
    """Return a size in bytes: `800M`, `5GB` or, in mergekit's spelling, `5B`; units are decimal.

    Raises:
        ValueError: the text is not a positive size.
    """
    number = text.strip().lower()
    number = number[:-1] if number[-2:] in ("kb", "mb", "gb", "tb") else number
    try:
        size = int(float(number.rstrip("kmgbt")) * _UNITS.get(number[-1:], 1))
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"{text!r} is not a size; write for example 800M or 5GB")
    return size


def size_text(size: int) -> str:
    """Return a size as `parse_size` reads it: `1.4GB`."""
    factor, unit = next(((f, u) for f, u in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")) if size >= f), (1, ""))
    return f"{size / factor:g}{unit}"
