"""Errors of gcsfs and adlfs, in the forms that merges against emulators of Google's and Azure's stores have met."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from toys.merge import paft

from paft_merge.errors import StoreError
from paft_merge.stores import Store
from paft_merge.stores.client_errors import is_of_store, is_passing, problem_of


def of(module: str, name: str, text: str, base: type[BaseException] = Exception, **attributes: Any) -> BaseException:
    """An error of a package that is not installed here."""
    kind = type(name, (base,), {"__module__": module, **attributes})
    return kind(text)


NO_CONTAINER = of(
    "azure.core.exceptions", "ResourceNotFoundError", "no", error_code="ContainerNotFound", status_code=404
)


def with_cause(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "passing"),
    [
        (OSError("Forbidden: https://storage.googleapis.com/o\nno access"), "STORE_DENIED", False),
        (of("gcsfs.retry", "HttpError", "no, 401", code=401), "STORE_DENIED", False),
        (of("gcsfs.retry", "HttpError", "down, 503", code=503), "STORE_SERVER", True),
        (of("requests.exceptions", "ProxyError", "", OSError), "STORE_SERVER", True),
        (ValueError("Bad Request: https://storage.googleapis.com/o\ninvalid"), "STORE_ERROR", False),
        (ValueError("Bucket is requester pays. Set `requester_pays=True`"), "STORE_ERROR", False),
        (RuntimeError("no message"), "STORE_ERROR", False),
        (with_cause(FileNotFoundError("c"), NO_CONTAINER), "STORE_NOT_FOUND", False),
        (ValueError("unable to connect to account for Must provide a connection_string"), "STORE_CREDENTIALS", False),
    ],
)  # fmt: skip
def test_an_error_of_a_client_is_one_line(error: BaseException, code: str, passing: bool) -> None:
    assert (is_of_store(error), is_passing(error)) == (True, passing)
    (problem,) = problem_of(error, "az://c/o", "az").problems
    assert problem.code == code
    if error.__cause__ is NO_CONTAINER:
        assert problem.what == "the bucket does not exist"


def failing(error: BaseException, calls: list[int]) -> Any:
    def url_to_fs(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise error

    return url_to_fs


@pytest.mark.parametrize(
    ("url", "error", "code", "attempts"),
    [
        ("az://c/o", ValueError("unable to connect to account for Connection string is blank"), "STORE_CREDENTIALS", 1),
        ("az://c/o", ValueError("Protocol not known: az"), "STORE_PACKAGE", 1),
        ("gs://b/o", ConnectionResetError("cut"), "STORE_UNREACHABLE", 2),  # gcsfs has repeated it six times
        ("s3://b/o", ConnectionResetError("cut"), "STORE_UNREACHABLE", 5),
    ],
)
def test_a_store_that_cannot_be_connected(
    url: str, error: BaseException, code: str, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int]()
    monkeypatch.setattr("paft_merge.stores.store.pause", lambda attempt: 0.0)
    monkeypatch.setattr("fsspec.core.url_to_fs", failing(error, calls))
    with pytest.raises(StoreError) as caught:
        Store(url)
    assert (caught.value.problems[0].code, len(calls)) == (code, attempts)


def test_tracebacks_of_clients_are_shown_with_v_alone() -> None:
    paft("methods")
    assert not logging.getLogger("gcsfs").isEnabledFor(logging.ERROR)
    paft("-v", "methods")
    assert logging.getLogger("azure").isEnabledFor(logging.ERROR)
