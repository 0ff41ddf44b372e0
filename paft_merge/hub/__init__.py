"""The Hub: repositories as folders, tensors read over the network, and a folder pushed as one commit.

wanted_files     the files of a repository or of a folder that a merge wants
store_folders    folders of object stores as resolved references
pulling    a reference as a folder: local, in huggingface_hub's cache, or downloaded into it
run_checkpoints  `run/checkpoint-*` as the checkpoints of a run
prefetching      what a merge reads of a reference, downloaded before it
ranges     a file on the Hub, read by ranges and never stored
pushing    a local folder as one commit
secret_files  access tokens and private keys in the files of a push
faults     errors of huggingface_hub as `HubError`

huggingface_hub is imported when a function needs it, and nowhere else in the package.
"""

from __future__ import annotations

from paft_merge.hub.prefetching import pull
from paft_merge.hub.pulling import (
    HF,
    cache_folder,
    check_room,
    download,
    fetch,
    fetch_file,
    is_repository,
    pinned,
    resolve,
    snapshot_of,
    split_repository,
)
from paft_merge.hub.pushing import UploadPlan, pack, prepare_upload, push
from paft_merge.hub.ranges import Remote
from paft_merge.hub.store_folders import fetch_text
from paft_merge.hub.wanted_files import SIDE_FILES, Kind, ResolvedRepo

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
    "fetch_text",
    "is_repository",
    "pack",
    "pinned",
    "prepare_upload",
    "pull",
    "push",
    "resolve",
    "snapshot_of",
    "split_repository",
]
