"""The Hub on this machine as huggingface_hub sees it, a cache of its own, and small repositories in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from toys.hub_server import WRITER, HubServer

UPLOADS = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""huggingface_hub 2.4 uploads in a way that its own HTTP client advises against."""


def online(monkeypatch: pytest.MonkeyPatch, url: str, home: Path, token: str | None = WRITER) -> None:
    """Point huggingface_hub, which reads its environment once, to a server and a cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    fields = {
        "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True, "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token"), "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }  # fmt: skip
    for name, value in fields.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("huggingface_hub.utils._http.REPO_API_REGEX", _plain_http(_http.REPO_API_REGEX.pattern))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)


def _plain_http(pattern: str) -> object:
    """The client knows a repository's address by `https`; ours is on plain `http`."""
    import re

    return re.compile(pattern.replace("https:", "https?:"), re.VERBOSE)


def environment(url: str, home: Path, token: str | None = WRITER) -> dict[str, str]:
    """What a process of its own needs to find the server."""
    found = {
        "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    return {**found, **({"HF_TOKEN": token} if token else {})}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A server that the client of this process talks to, with the token of somebody who may write."""
    with HubServer() as server:
        online(monkeypatch, server.url, tmp_path / "home")
        monkeypatch.setattr("paft_merge.hub.pulling.pause", lambda attempt: 0.01)
        monkeypatch.setattr("paft_merge.hub.ranges.pause", lambda attempt: 0.01)
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, as a repository holds it."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
