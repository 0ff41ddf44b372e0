"""What this machine has of the Hub: a token or none, the cache, and the settings of the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LocalState:
    """The Hub as seen from this machine, without a request."""

    token: bool
    """Whether there is a token. Its value is nowhere in this object."""
    cache: Path
    """The folder of downloaded repositories."""
    offline: bool
    endpoint: str


def local_state() -> LocalState:
    """The state by the environment and the files of huggingface_hub."""
    from huggingface_hub import constants, get_token

    return LocalState(
        get_token() is not None, Path(constants.HF_HUB_CACHE), bool(constants.HF_HUB_OFFLINE), constants.ENDPOINT
    )


def size_of(folder: Path) -> int:
    """Bytes of the regular files below a folder, each counted once; links are not followed."""
    total, open_folders = 0, [folder]
    while open_folders:
        try:
            entries = list(os.scandir(open_folders.pop()))
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                open_folders.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                total += entry.stat(follow_symlinks=False).st_size
    return total
