"""Object stores (S3, Google Cloud Storage, Azure, memory) through fsspec: folders at a URL, read by ranges and written file by file.

urls       addresses of folders and files, without credentials
store      one folder of a store: listed, read, written, deleted
windows    a remote file read by ranges, with a cache of windows
client_errors  errors of fsspec, s3fs, gcsfs and adlfs as `StoreError`

fsspec is imported when a function needs it, and nowhere else in the package.
"""

from __future__ import annotations

from paft_merge.stores.store import Found, Store, StoreFile
from paft_merge.stores.urls import folder_of, has_scheme, inside, is_url, joined, place_of, shown, split_file
from paft_merge.stores.windows import CONNECTIONS, RangedFile, Windows, pause

__all__ = [
    "CONNECTIONS",
    "Found",
    "RangedFile",
    "Store",
    "StoreFile",
    "Windows",
    "folder_of",
    "has_scheme",
    "inside",
    "is_url",
    "joined",
    "pause",
    "place_of",
    "shown",
    "split_file",
]
