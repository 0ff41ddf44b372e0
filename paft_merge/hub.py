"""Where a model reference leads: a local folder, or a snapshot of a Hub repository in huggingface_hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from paft_merge.errors import HubError

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.spm", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
"""What stands beside the weights of a model and belongs to it: config, tokenizer, processor, chat template, licence."""
_TEMPLATES = ["additional_chat_templates/*"]
_NEVER = ["consolidated*", "*/*.safetensors", "original/*", "*.bin", "training_args*", "optimizer*"]
_REPOSITORY = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def fetch(path: str, revision: str | None = None) -> Path:
    """The folder that `path` names: itself when it exists here, else the Hub repository's snapshot.

    Only what a merge reads is fetched, and nothing at all when it is in the cache and `HF_HUB_OFFLINE=1`.

    Raises:
        HubError: it is neither; or the Hub cannot be reached, does not have it, or does not let us.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    if not is_repository(path):
        raise HubError.of("NOT_FOUND", path, "is no folder here, and no name of a Hub repository", "check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{path}@{revision}" if revision else path
    try:
        found = snapshot_download(
            path, revision=revision, allow_patterns=[*_WEIGHTS, *SIDE_FILES, *_TEMPLATES], ignore_patterns=_NEVER
        )
    except GatedRepoError as error:
        raise HubError.of(
            "HUB_GATED", where, "is gated", "accept its terms on its page, then log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError.of(
            "HUB_REVISION", where, "the repository has no such revision", "check the part after '@'"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError.of(
            "HUB_NOT_FOUND",
            where,
            "is no folder here and no repository that you can see on the Hub",
            "check the name, or log in with `hf auth login`",
        ) from error
    except LocalEntryNotFoundError as error:
        raise HubError.of(
            "HUB_OFFLINE",
            where,
            "is no folder here, and the Hub cannot be reached (or HF_HUB_OFFLINE is set)",
            "check the path, or download it first",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise HubError.of("HUB_ERROR", where, str(error).split("\n")[0], "try again later") from error
    return Path(found)


def is_repository(path: str) -> bool:
    """Whether `path` could name a Hub repository, and is no path of this machine by its look."""
    return bool(_REPOSITORY.match(path)) and not path.startswith(".")
