"""The Hub: what a reference leads to, tensors read over the network, and a folder sent there in one commit.

| room | what it is |
|---|---|
| pulling | a reference as a folder: here, in huggingface_hub's cache, or fetched into it |
| ranges | a file on the Hub, read by ranges and never stored |
| pushing | a folder on this machine as one commit |
| faults | what the Hub answers, in the words of our errors |

huggingface_hub is imported when something is asked of it, and nowhere else in the package.
"""

from __future__ import annotations

from paft_merge.hub.pulling import (
    HF,
    SIDE_FILES,
    Kind,
    ResolvedRepo,
    cache_folder,
    check_room,
    download,
    fetch,
    fetch_file,
    is_repository,
    pinned,
    pull,
    resolve,
    snapshot_of,
)
from paft_merge.hub.pushing import UploadPlan, prepare_upload, push
from paft_merge.hub.ranges import Remote

__all__ = [
    "HF",
    "SIDE_FILES",
    "Kind",
    "Remote",
    "ResolvedRepo",
    "UploadPlan",
    "cache_folder",
    "check_room",
    "download",
    "fetch",
    "fetch_file",
    "is_repository",
    "pinned",
    "prepare_upload",
    "pull",
    "push",
    "resolve",
    "snapshot_of",
]
