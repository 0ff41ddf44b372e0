"""Options of a training run, and its progress. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paft_merge.errors import TrainError


@dataclass(frozen=True)
class TrainProgress:
    """One optimizer step, for progress bars and logs."""

    name: str
    """The adapter."""
    step: int
    steps: int
    logs: dict[str, float]
    """Values that were logged at this step; empty between logs."""


@dataclass(frozen=True)
class TrainOptions:
    """Everything that `train_adapter` takes besides the base, the section and the output folder."""

    name: str = "adapter"
    """Name of the adapter in messages."""
    rows: Any = None
    """A `datasets.Dataset`, or a list of dicts, instead of the section's `data`."""
    eval_rows: Any = None
    """The same for `eval_data`."""
    tokenizer: Any = None
    """Replaces the base's tokenizer."""
    prepared: Any = None
    """What `prepared_rows.prepare` made of this section and these options; it is not made again."""
    resume: bool = False
    """Continue from the last checkpoint of an interrupted run; a finished adapter is left unchanged."""
    folder: Path = Path()
    """Folder where relative paths of the section start."""
    base_name: str | None = None
    """Name of the base in the adapter's files; default: the folder or name that it was loaded from."""
    base_path: str | None = None
    """Folder or Hub name of the tokenizer of a base given in memory; default: `base_name`."""
    spots: Mapping[str, str] = field(default_factory=dict)
    """File, line and key of each adapter of the recipe, for messages."""
    base_digest: str | None = None
    """`digest_of` the base, if known."""
    progress: Callable[[TrainProgress], None] | None = None
    """Called after every optimizer step and with every log."""
    trust_code: bool = False
    """Run code that the section names, also where it does not lie in `folder`: see docs/trust.md."""
    callbacks: Sequence[Any] = ()
    """Further `transformers.TrainerCallback`s."""


def need_extras() -> None:
    """Raise TrainError MISSING unless the packages of the extra `train` are installed."""
    missing = [package for package in ("trl", "datasets", "psutil") if find_spec(package) is None]
    if missing:
        fix = "pip install 'paft-merge[train]'"
        raise TrainError.of("MISSING", "train", f"{' and '.join(missing)} not installed", fix)
