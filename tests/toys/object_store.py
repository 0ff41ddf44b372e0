"""A real S3 server on this machine (moto), behind a layer that fails as stores do: by status, by a cut connection, slowly."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Environ = dict[str, Any]

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",
}


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match, after `after` that are answered."""

    method: str
    path: str
    """A pattern, searched for in the path and the query."""
    how: int | str
    """A status, or `reset`: the connection is cut in the middle of the body; or `slow`; or a function that is called first."""
    times: int = 1
    after: int = 0
    call: Callable[[], Any] | None = None


@dataclass
class S3:
    """The server. Faults are taken in their order; `seen` has every request."""

    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def client(self) -> Any:
        """A client of the server."""
        return boto3.client("s3", endpoint_url=self.url, **KEYS)

    def put(self, bucket: str, folder: Path, prefix: str = "") -> None:
        """Upload a folder, past the layer of faults."""
        with self.quiet() as client:
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                client.put_object(Bucket=bucket, Key=f"{prefix}{file.relative_to(folder)}", Body=file.read_bytes())

    def files(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """The objects below a prefix by relative name."""
        with self.quiet() as client:
            listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", [])
            names = [one["Key"] for one in listed]
            return {n.removeprefix(f"{prefix}/"): client.get_object(Bucket=bucket, Key=n)["Body"].read() for n in names}

    def quiet(self) -> _Quiet:
        """A client whose requests meet no faults."""
        return _Quiet(self)

    def wrap(self, app: Any) -> Any:
        def served(environ: Environ, start: Any) -> Iterable[bytes]:
            asked = f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
            fault = self._next(environ["REQUEST_METHOD"], asked)
            if fault is None:
                return app(environ, start)  # type: ignore[no-any-return]
            if fault.call:
                fault.call()
                return app(environ, start)  # type: ignore[no-any-return]
            if fault.how == "other tag":  # as where a bucket encrypts with a key of its own

                def tagged(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
                    return start(
                        status, [(k, f'"{"a" * 32}"' if k.lower() == "etag" else v) for k, v in headers], *rest
                    )

                return app(environ, tagged)  # type: ignore[no-any-return]
            if fault.how == "slow":
                time.sleep(0.3)
                return app(environ, start)  # type: ignore[no-any-return]
            if fault.how == "reset":
                return self._reset(app, environ, start)
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code = {403: "AccessDenied", 503: "SlowDown", 500: "InternalError"}.get(int(fault.how), "Oops")
            text = f"<Error><Code>{code}</Code><Message>made to fail</Message></Error>".encode()
            start(f"{fault.how} X", [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
            return [text] if environ["REQUEST_METHOD"] != "HEAD" else []

        return served

    def _next(self, method: str, asked: str) -> Fault | None:
        with self._lock:
            self.seen.append(f"{method} {asked}")
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, asked):
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    if fault.times <= 0:
                        self.faults.remove(fault)
                    return fault
        return None

    @staticmethod
    def _reset(app: Any, environ: Environ, start: Any) -> Iterator[bytes]:
        connection: socket.socket = environ["werkzeug.socket"]
        if environ["REQUEST_METHOD"] == "GET":
            whole = b"".join(app(environ, start))
            yield whole[: len(whole) // 2]
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
        connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError


KEYS = {
    "aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1",
}  # fmt: skip


class _Quiet:
    def __init__(self, s3: S3) -> None:
        self.s3 = s3

    def __enter__(self) -> Any:
        self.held, self.s3.faults = self.s3.faults, []
        return self.s3.client

    def __exit__(self, *_: object) -> None:
        self.s3.faults = self.held


class _Silent(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.server.log = lambda *_: None  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def server() -> Iterator[S3]:
    """The server of a module."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # they know the server of another module
    s3 = S3()
    made = make_server(
        "127.0.0.1", 0, s3.wrap(DomainDispatcherApplication(create_backend_app)), threaded=True, request_handler=_Silent
    )
    made.daemon_threads = True  # type: ignore[attr-defined]
    s3.url = f"http://127.0.0.1:{made.server_address[1]}"
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield s3
    s3.client.close()
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server with an empty bucket `bkt`, and the environment that leads to it; waits are short."""
    import s3fs

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr("paft_merge.stores.store.pause", lambda attempt: 0.01)
    server.faults.clear()
    with server.quiet() as client:
        client.create_bucket(Bucket="bkt")
    server.seen.clear()
    yield server
    server.faults.clear()
    with server.quiet() as client:
        while listed := client.list_objects_v2(Bucket="bkt").get("Contents"):
            client.delete_objects(Bucket="bkt", Delete={"Objects": [{"Key": one["Key"]} for one in listed]})
        client.delete_bucket(Bucket="bkt")
