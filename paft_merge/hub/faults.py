"""Errors of huggingface_hub and of the network as `HubError`."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from paft_merge.errors import HubError

_LOGIN = "log in with `hf auth login`"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOKEN = re.compile(r"hf_\w{8,}")


@contextmanager
def asking(where: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into a `HubError` about `where`: one line with a fix, without tokens."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HfHubHTTPError, errors.EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise problem_of(error, where) from error
    except transport_error() as error:
        raise problem_of(error, where) from error


def meant_folder(path: str) -> str:
    """Ask about the local folder with the most similar name; empty if none is similar."""
    at = Path()
    with suppress(OSError):
        for part in Path(path).expanduser().parts:
            if not (at / part).exists():
                near = get_close_matches(part, [one.name for one in at.iterdir() if one.is_dir()], 1)
                part = near[0] if near else part
            at /= part
        return f"did you mean {at}?" if at.is_dir() else ""
    return ""


def unreachable(where: str) -> HubError:
    """The error for a name that is not a local folder, when the Hub cannot be reached."""
    what = "not a local folder, not in the Hub's cache, and the Hub cannot be reached (or HF_HUB_OFFLINE is set)"
    fix = meant_folder(where) or "check the path, or pull it first where there is a network"
    return HubError.of("HUB_OFFLINE", where, what, fix)


def problem_of(error: BaseException, where: str) -> HubError:
    """The `HubError` that says what `error` means."""
    from huggingface_hub import errors

    error = root_of(error)
    if isinstance(error, errors.GatedRepoError):
        fix = f"accept its terms on its page, then {_LOGIN}"
        return HubError.of("HUB_GATED", where, "is gated, and this account may not read it", fix)
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError.of("HUB_REVISION", where, "the repository has no such revision", "check the part after '@'")
    if isinstance(error, errors.RepositoryNotFoundError):
        what = "not a local folder, and not a repository on the Hub that you can see"
        return HubError.of("HUB_NOT_FOUND", where, what, meant_folder(where) or f"check the name, or {_LOGIN}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError.of("HUB_OFFLINE", where, "HF_HUB_OFFLINE is set, and this needs the Hub", "unset it")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return unreachable(where)
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubError.of("HUB_FILE", where, "the repository has no such file", "check the name of the file")
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, where)
    if isinstance(error, OSError) and error.errno in _FULL:
        return HubError.of("DISK", error.filename or where, f"{error.strerror}", "free some space and run again")
    if isinstance(error, transport_error()):
        what = f"the connection failed: {_line(error) or type(error).__name__}"
        return HubError.of("HUB_UNREACHABLE", where, what, "try again later; finished files are kept")
    said = "; ".join(_line(line) for line in str(error).splitlines() if line.strip())[:500]
    return HubError.of("HUB_ERROR", where, said or type(error).__name__, "")


def root_of(error: BaseException) -> BaseException:
    """The error inside those in which huggingface_hub wraps others, as from upload threads."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def transport_error() -> type[Exception]:
    """The base error of huggingface_hub's HTTP client; versions differ in the client."""
    from huggingface_hub.errors import HfHubHTTPError

    kinds = [kind for kind in HfHubHTTPError.__bases__ if kind is not OSError]
    return kinds[0] if kinds else OSError


def retry_after(response: Any) -> float | None:
    """Seconds to wait as the response's Retry-After says (a number or a date); None without that header."""
    import time
    from email.utils import parsedate_to_datetime

    asked = response.headers.get("Retry-After")
    if asked is None:
        return None
    try:
        return max(float(asked), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(asked).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _refused(error: Any, where: str) -> HubError:
    """The `HubError` for an HTTP status."""
    status, said = error.response.status_code, _line(error.server_message or error)
    if status == 401:
        return HubError.of("HUB_LOGIN", where, "the Hub does not accept the token", _LOGIN)
    if status == 403:
        fix = f"use a token with write permission for it, or {_LOGIN} as somebody who has it"
        return HubError.of("HUB_FORBIDDEN", where, f"no permission: {said}", fix)
    if status == 409:
        return HubError.of("HUB_EXISTS", where, f"exists already: {said}", "choose another name")
    if status == 412:
        what = "somebody committed meanwhile; nothing was changed"
        return HubError.of(
            "HUB_CONFLICT", where, what, "look at the new commit, and push again; uploaded files are kept"
        )
    if status == 429:
        wait = retry_after(error.response)
        fix = f"try again in {wait:.0f} seconds" if wait is not None else "try again in a few minutes"
        return HubError.of("HUB_RATE_LIMIT", where, "too many requests", f"{fix}, or {_LOGIN} for a higher limit")
    if status >= 500:
        what = f"the Hub failed (status {status})"
        return HubError.of("HUB_SERVER", where, what, "run again later; finished transfers are kept")
    return HubError.of("HUB_ERROR", where, said or f"the Hub answered with status {status}", "")


def _line(error: object) -> str:
    """The first line of a message that is not empty, without tokens."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _TOKEN.sub("hf_***", lines[0]) if lines else ""
