"""Addresses of folders and files in an object store: `s3://bucket/folder`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from paft_merge.errors import StoreError

SCHEMES: Final = {
    "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az", "memory": "",
}  # fmt: skip
"""Schemes, each with the extra of this package that installs what reads it."""

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_AZURE_HOST = re.compile(r"[\w$-]+@[\w-]+\.(dfs|blob)\.[\w.-]+")


def has_scheme(text: object) -> bool:
    """Whether a text begins as a URL does, of whatever scheme."""
    return isinstance(text, str) and _URL.match(text) is not None


def is_url(text: object) -> bool:
    """Whether a text is an address in an object store; `hf://` and URLs of the web are not."""
    found = _URL.match(text) if isinstance(text, str) else None
    return found is not None and found["scheme"].lower() in SCHEMES


def shown(text: str) -> str:
    """A URL without its credentials: a user and a password before the host, and everything after a `?`."""
    found = _URL.match(text)
    if not found:
        return text
    host, slash, path = found["rest"].partition("/")
    host = host if "@" not in host or _AZURE_HOST.fullmatch(host) else f"***@{host.rpartition('@')[2]}"
    path, mark, _ = path.partition("?")
    return f"{found['scheme']}://{host}{slash}{path}{'?***' if mark else ''}"


def checked(url: str) -> str:
    """A URL in one spelling: its scheme in lower case, without `.`, `..`, doubled and closing slashes.

    Raises:
        StoreError: STORE_URL, it has no bucket, or leaves it; SECRET, it has credentials.
    """
    found = _URL.match(url)
    if not found or found["scheme"].lower() not in SCHEMES:
        fix = f"write one of {', '.join(f'{scheme}://' for scheme in SCHEMES)}, or a path"
        raise StoreError.of("STORE_URL", shown(url), "is not an address in an object store", fix)
    host, _, path = found["rest"].partition("/")
    if ("@" in host and not _AZURE_HOST.fullmatch(host)) or "?" in found["rest"] or "#" in host:
        fix = "take it out, and set the variables of the environment that the store's tools read, such as AWS_PROFILE"
        raise StoreError.of(
            "SECRET", shown(url), "has credentials or a query in it, and URLs are copied into records", fix
        )
    scheme = found["scheme"].lower()
    if not host and scheme != "memory":
        raise StoreError.of("STORE_URL", url, "names no bucket", f"write {scheme}://BUCKET/FOLDER")
    parts = list[str]()
    for part in path.split("/"):
        if part == ".." and not parts:
            raise StoreError.of("STORE_URL", url, "leaves its bucket", "write the URL in full")
        parts = parts[:-1] if part == ".." else [*parts, part] if part not in ("", ".") else parts
    return f"{scheme}://{'/'.join(filter(None, (host, *parts)))}"


def place_of(out: str | os.PathLike[str]) -> Path | str:
    """A folder as a path, or a URL in one spelling; raises as `checked`."""
    text = os.fspath(out)
    scheme, colon, _ = text.partition(":")
    if colon and scheme.lower() in SCHEMES and not has_scheme(text) and not Path(f"{scheme}:").exists():
        raise StoreError.of("STORE_URL", text, "is neither a URL nor a folder", f"write {scheme}://BUCKET/FOLDER")
    return checked(text) if has_scheme(text) else Path(out)


def joined(folder: str, path: str) -> str:
    """A path relative to the folder of a URL as a URL; an absolute one and a URL are returned as they are.

    Raises:
        StoreError: STORE_URL, the path leaves the bucket.
    """
    return path if has_scheme(path) or path.startswith(("/", "~")) else checked(f"{folder.rstrip('/')}/{path}")


def split_file(url: str) -> tuple[str, str]:
    """The URL of a file's folder, and the name of the file."""
    folder, _, name = checked(url).rpartition("/")
    if folder.endswith("/"):
        raise StoreError.of("STORE_URL", shown(url), "names a bucket, not a file", "write the URL of the file")
    return folder, name


def folder_of(file: str) -> Path | str:
    """The folder of a local file, or of a file at a URL."""
    return split_file(file)[0] if is_url(file) else Path(file).parent


def inside(one: str, other: str) -> bool:
    """Whether a checked URL is another one, or a folder in it."""
    return f"{one}/".startswith(f"{other}/")
