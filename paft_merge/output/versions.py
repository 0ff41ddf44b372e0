"""Versions of installed packages, as records, logs and `paft --version` name them."""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution


@cache
def version_of(package: str) -> str:
    """Return the installed version, with the commit of an installation from a repository (PEP 610); cached.

    A package without metadata, such as a source tree that is not installed, has the version `unknown`.
    """
    try:
        found = distribution(package)
    except PackageNotFoundError:
        return "unknown"
    commit = json.loads(found.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id", "")
    return f"{found.version}+{commit[:12]}" if commit else found.version
