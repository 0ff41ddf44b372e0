"""Errors of fsspec, s3fs, gcsfs and adlfs as `StoreError`: one line with a fix, without credentials."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Any

from paft_merge.errors import StoreError, first_line
from paft_merge.stores.urls import shown

_CLIENTS = ("aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "s3fs", "adlfs", "urllib3")
"""Packages whose errors are translated; every other error is a bug."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AGAIN = (408, 429, 500, 502, 503, 504)
_NO_CREDENTIALS = re.compile(r"Credential|ProfileNotFound|TokenRetrieval|SSO|ClientAuthentication|RefreshError")
_NO_ACCOUNT = re.compile("connect to account")
"""In the message of adlfs without an account, or with an invalid connection string."""
_BROKEN = re.compile(
    r"Connect|Timeout|Disconnected|Payload|IncompleteRead|HTTPClientError|ResponseParser|Streaming|Transport|Service(Request|Response)Error"
)
_QUERY = re.compile(r"(\?|\bsig=|\bX-Amz-[\w-]+=|\bAWSAccessKeyId=)[^\s\"'>)]*", re.IGNORECASE)


def is_of_store(error: BaseException) -> bool:
    """Whether an error comes from a store, its client, the network or the system."""
    module = type(error).__module__.partition(".")[0]
    # gcsfs and adlfs raise ValueError and RuntimeError for some answers, and for a connection without credentials.
    return isinstance(error, OSError | ImportError | ValueError | RuntimeError) or module in _CLIENTS


def is_passing(error: BaseException) -> bool:
    """Whether a request is worth a second attempt: the server failed, or the connection broke."""
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError | ImportError):
        return False
    names = " ".join(type(one).__name__ for one in _chain(error))
    broken = isinstance(error, ConnectionError | TimeoutError) or _BROKEN.search(names)
    if broken and not _response(error):
        return not _NO_CREDENTIALS.search(names)
    return _status(error) in _AGAIN


def problem_of(error: BaseException, where: str, extra: str) -> StoreError:
    """The `StoreError` that says what `error` means.

    Args:
        error: what the client raised.
        where: URL of the folder or the file.
        extra: of this package, which installs the client.
    """
    where, said, status, code = shown(where), _said(error), _status(error), _code(error)
    if isinstance(error, ImportError):
        fix = f"pip install 'paft-merge[{extra}]'" if extra else "pip install fsspec"
        return StoreError.of("STORE_PACKAGE", where, f"a package for this store is missing ({said})", fix)
    if isinstance(error, OSError) and error.errno in _FULL:
        return StoreError.of("DISK", error.filename or where, error.strerror or said, "free some space and run again")
    unnamed = isinstance(error, ValueError) and _NO_ACCOUNT.search(said)
    if unnamed or any(_NO_CREDENTIALS.search(type(one).__name__) for one in _chain(error)):
        fix = "log in with the store's own tool, or set its variables of the environment"
        return StoreError.of("STORE_CREDENTIALS", where, f"there are no valid credentials for it: {said}", fix)
    if code in ("NoSuchBucket", "ContainerNotFound") or "bucket does not exist" in said.lower():
        return StoreError.of("STORE_NOT_FOUND", where, "the bucket does not exist", "check its name and the endpoint")
    if isinstance(error, FileNotFoundError) or status == 404:
        return StoreError.of("STORE_NOT_FOUND", where, "does not exist", "check the path and the bucket")
    if isinstance(error, FileExistsError) or status == 412:
        return StoreError.of("STORE_EXISTS", where, "exists already", "choose another folder")
    if isinstance(error, PermissionError) or status in (401, 403) or said.startswith("Forbidden:"):  # gcsfs
        fix = "use credentials that may do this; a merge lists, reads, writes and deletes files below its folder"
        return StoreError.of("STORE_DENIED", where, f"the store refuses access: {said}", fix)
    if code == "NotImplemented" or status == 501:
        return StoreError.of("STORE_UNSUPPORTED", where, f"the store does not support this request: {said}")
    if status == 416:
        return StoreError.of("STORE_RANGE", where, "has become shorter", "run again when no other process writes to it")
    if status in _AGAIN and not _BROKEN.search(type(error).__name__):
        what = f"the store failed (status {status}): {said}"
        return StoreError.of("STORE_SERVER", where, what, "run again later; finished files are kept")
    if is_passing(error):
        what = f"the connection failed: {said}"
        return StoreError.of("STORE_UNREACHABLE", where, what, "check the network and the endpoint, or try again later")
    return StoreError.of("STORE_ERROR", where, said)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that caused it."""
    seen = set[int]()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _response(error: BaseException) -> dict[str, Any]:
    """The parsed answer in an error of botocore; {} in others."""
    answers = (getattr(one, "response", None) for one in _chain(error))
    return next((answer for answer in answers if isinstance(answer, dict)), {})


def _status(error: BaseException) -> int:
    """The HTTP status of an answer; 0 if there was none."""
    found = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    numbers = [found, *(getattr(one, name, None) for one in _chain(error) for name in ("status_code", "status"))]
    # gcsfs has a `code`; aiohttp's is deprecated
    numbers += [getattr(one, "code", None) for one in _chain(error) if type(one).__module__.startswith("gcsfs")]
    numbers += [502 for one in _chain(error) if type(one).__name__ == "ProxyError"]  # what gcsfs raises for it
    return next((int(n) for n in numbers if isinstance(n, int) or (isinstance(n, str) and n.isdigit())), 0)


def _code(error: BaseException) -> str:
    of_azure = (getattr(one, "error_code", None) for one in _chain(error))
    return str(_response(error).get("Error", {}).get("Code") or next(filter(None, of_azure), "") or "")


def _said(error: BaseException) -> str:
    """The first line of a message, without queries, which may be signed."""
    answer = _response(error).get("Error", {}).get("Message")
    said = answer if isinstance(answer, str) and answer else None
    if said is None:
        said = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return re.sub(r"\w+://\S+", lambda found: shown(found[0]), _QUERY.sub("", said.strip().partition("\n")[0]))[:300]
