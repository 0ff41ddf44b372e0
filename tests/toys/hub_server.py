"""A Hub on this machine: a real HTTP server that speaks what huggingface_hub really calls, and misbehaves when told to.

    with HubServer() as hub:
        hub.add("me/model", {"config.json": b"{}"})
        hub.fail("GET .*/resolve/.*", Truncate(1000), times=2)
        ...
        assert hub.requests == []          # what came in, in order

Files of `LFS_FROM` bytes or more, and those that Git LFS would take, are answered by a redirect to another path, as the
Hub's content network does. Tokens: `WRITER` may do all, `READER` may read what is private, nobody else sees that.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"
LFS_FROM = 100_000


# --- faults -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """Answer with this status instead."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Truncate:
    """Close the connection after so many bytes of the body; `reset` aborts it."""

    after: int
    reset: bool = False


@dataclass(frozen=True)
class Lie:
    """Answer with other bytes of the same length, with other headers, or with the whole body where a range was asked for."""

    flip: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    ignore_range: bool = False


Fault = Status | Truncate | Lie


@dataclass
class _Rule:
    pattern: re.Pattern[str]
    fault: Fault
    times: int


@dataclass(frozen=True)
class Request:
    """One request that came in."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent: int = 0

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


# --- repositories -----------------------------------------------------------------------------------------------------


def blob_id(content: bytes) -> str:
    """Git's own name for a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Commits by their name, each a map of path to content; branches, tags and pull requests lead to commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    readonly: bool = False

    def resolve(self, revision: str) -> str | None:
        """The commit that a revision means."""
        for names in (self.branches, self.tags, self.pulls):
            if revision in names:
                return names[revision]
        return revision if revision in self.commits else None

    def commit(self, files: Mapping[str, bytes], message: str, ref: str = "main", parent: str | None = None) -> str:
        """Put `files` under a new commit at `ref`."""
        seed = json.dumps([len(self.commits), message, sorted((p, blob_id(c)) for p, c in files.items())])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid], self.messages[oid] = dict(files), message
        (self.pulls if ref.startswith("refs/pr/") else self.branches)[ref] = oid
        return oid


class HubServer:
    """The server and what it holds; a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        """Large files by sha256, whether a commit names them or not."""
        self.xet: str | None = None
        """A folder that hf_xet may keep its chunks in; large files are then sent there, and only named here."""
        self.lists_sizes = True
        """Whether the listing of a repository names the size of each file."""
        self.metadata_faults: list[str] = []
        """What is wrong with the metadata of any card."""
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self.rules: list[_Rule] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.cdn = self.url.replace("127.0.0.1", "localhost")
        """Large files come from another host, which must not see a token."""
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> HubServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def add(self, repo_id: str, files: Mapping[str, bytes], **fields: Any) -> str:
        """A repository with one commit on `main`, or one more commit; gives its name."""
        repository = self.repositories.setdefault(repo_id, Repository())
        for key, value in fields.items():
            setattr(repository, key, value)
        for content in files.values():
            self.stored[hashlib.sha256(content).hexdigest()] = content
        before = repository.commits.get(repository.branches.get("main", ""), {})
        return repository.commit({**before, **files}, "added")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.resolve(revision) or ""]

    def fail(self, pattern: str, fault: Fault, times: int = 1) -> None:
        """Let the next `times` requests whose `METHOD /path` matches fail so."""
        self.rules.append(_Rule(re.compile(pattern), fault, times))

    def fault_of(self, request: str) -> Fault | None:
        """The fault that this request meets."""
        with self.lock:
            for rule in self.rules:
                if rule.times > 0 and rule.pattern.search(request):
                    rule.times -= 1
                    return rule.fault
        return None

    def count(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(bool(re.search(pattern, str(r))) for r in self.requests)


# --- HTTP -------------------------------------------------------------------------------------------------------------


class _RefusedError(Exception):
    def __init__(self, code: int, error: str = "", message: str = "") -> None:
        self.code, self.error, self.message = code, error, message


_MODEL = re.compile(r"^/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(.*))?$")
_RESOLVE = re.compile(r"^/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
_BATCH = re.compile(r"^/([^/]+/[^/]+)\.git/info/lfs/objects/batch$")


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the bytes before a reset may wait for an acknowledgement, and are lost

    def log_message(self, *_: object) -> None:
        pass

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _handle(self) -> None:
        hub = self.server_hub
        self.body = (
            self.rfile.read(int(self.headers.get("Content-Length") or 0)) if not self._chunked() else self._all()
        )
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        self.fault = hub.fault_of(f"{self.command} {split.path}")
        with hub.lock:
            hub.requests.append(Request(self.command, self.path, self.headers.get("Range"), self.token))
        try:
            if isinstance(self.fault, Status):
                self._send(self.fault.code, b'{"error": "on purpose"}', dict(self.fault.headers))
                return
            with hub.lock:
                self._route(split.path)
        except _RefusedError as refused:
            headers = {"X-Error-Code": refused.error} if refused.error else {}
            headers |= {"X-Error-Message": refused.message} if refused.message else {}
            self._send(refused.code, json.dumps({"error": refused.message or refused.error}).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding", "").lower() == "chunked"

    def _all(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, code: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        if isinstance(self.fault, Lie):
            headers |= self.fault.headers
            content = bytes(b ^ 1 for b in content) if self.fault.flip else content
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(self.fault, Truncate) and self.fault.after < len(content):
            self.wfile.write(content[: self.fault.after])
            self.wfile.flush()
            if self.fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(content)

    def _json(self, data: Any, code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(code, json.dumps(data).encode(), headers)

    # --- the Hub ------------------------------------------------------------------------------------------------------

    def _route(self, path: str) -> None:
        if path == "/api/whoami-v2":
            if self.token not in (WRITER, READER):
                raise _RefusedError(401, message="Invalid username or password.")
            role = "write" if self.token == WRITER else "read"
            self._json({"type": "user", "name": "me", "auth": {"accessToken": {"displayName": "t", "role": role}}})
        elif path == "/api/repos/create":
            self._create()
        elif path == "/api/validate-yaml":
            errors = [{"message": text} for text in self.server_hub.metadata_faults]
            self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif path.startswith("/lfs/"):
            self._lfs(path)
        elif path.startswith("/cdn/"):
            self._content(self.server_hub.stored[path.split("/")[2]], {"ETag": f'"cdn-{path.split("/")[2][:12]}"'})
        elif found := _BATCH.match(path):
            self._batch(unquote(found[1]))
        elif found := _RESOLVE.match(path):
            self._resolve(found[1], unquote(found[2]), unquote(found[3]))
        elif found := _MODEL.match(path):
            self._model(found[1], [unquote(part) for part in (found[2] or "").split("/") if part])
        else:
            raise _RefusedError(404, message=f"no such page: {path}")

    def _repository(self, repo_id: str, *, write: bool = False, data: bool = False) -> Repository:
        repository = self.server_hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.token not in (WRITER, READER)):
            raise _RefusedError(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if repository.gated and data and self.token != WRITER:
            raise _RefusedError(403, "GatedRepo", "Access to this model is restricted")
        if write and self.token is None:
            raise _RefusedError(401, message="Invalid username or password.")
        if write and (self.token != WRITER or repository.readonly):
            raise _RefusedError(403, message="You do not have the rights to write here")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if self.token != WRITER:
            raise _RefusedError(403 if self.token else 401, message="You do not have the rights to create a model")
        answer = {"url": f"{self.server_hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server_hub.repositories:
            self._json({**answer, "error": "You already created this model repo"}, 409)
            return
        if repo_id.split("/")[0] not in ("me", "team"):
            raise _RefusedError(403, message="You do not have the rights to create a model under that namespace")
        repository = self.server_hub.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        repository.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit")
        self._json(answer)

    def _model(self, repo_id: str, parts: list[str]) -> None:
        what = parts[0] if parts else "revision"
        if what == "revision":
            repository = self._repository(repo_id)
            self._info(repo_id, repository, self._commit_of(repository, "/".join(parts[1:]) or "main"))
        elif what == "tree":
            repository = self._repository(repo_id, data=True)
            self._tree(repository.commits[self._commit_of(repository, parts[1])])
        elif what == "paths-info":
            repository = self._repository(repo_id)
            files = repository.commits[self._commit_of(repository, parts[1])]
            wanted = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
            self._json([_entry(path, files[path]) for path in wanted if path in files])
        elif what == "refs":
            self._refs(self._repository(repo_id))
        elif what == "preupload":
            self._preupload(self._repository(repo_id, write=True), parts[1])
        elif what == "commit":
            self._commit(repo_id, self._repository(repo_id, write=True), parts[1])
        elif what == "branch":
            repository = self._repository(repo_id, write=True)
            if parts[1] in repository.branches:
                raise _RefusedError(409, message="Reference already exists")
            start = json.loads(self.body or b"{}").get("startingPoint", "main")
            repository.branches[parts[1]] = self._commit_of(repository, start)
            self._json({}, 201)
        elif what == "tag":
            repository, asked = self._repository(repo_id, write=True), json.loads(self.body)
            if asked["tag"] in repository.tags:
                raise _RefusedError(409, message="Reference already exists")
            repository.tags[asked["tag"]] = self._commit_of(repository, parts[1])
            self._json({}, 201)
        elif what == "xet-write-token" and self.server_hub.xet:
            self._repository(repo_id, write=True)
            answer = {"casUrl": f"local://{self.server_hub.xet}", "accessToken": "x", "exp": 4_000_000_000}
            headers = {
                "X-Xet-Cas-Url": answer["casUrl"],
                "X-Xet-Access-Token": "x",
                "X-Xet-Token-Expiration": "4000000000",
            }
            self._json(answer, headers=headers)
        elif what == "settings":
            self._repository(repo_id, write=True).private = json.loads(self.body).get("visibility") == "private"
            self._json({})
        else:
            raise _RefusedError(404, message=f"no such page of a model: {what}")

    def _info(self, repo_id: str, repository: Repository, commit: str) -> None:
        files = repository.commits[commit]
        blobs = "blobs" in self.query
        siblings = [{"rfilename": p, **(_sibling(p, c) if blobs else {})} for p, c in sorted(files.items())]
        if not self.server_hub.lists_sizes:
            siblings = [{key: value for key, value in one.items() if key != "size"} for one in siblings]
        gated = "manual" if repository.gated else False
        answer = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "tags": []}
        self._json({**answer, "private": repository.private, "gated": gated, "downloads": 0, "likes": 0})

    def _tree(self, files: Mapping[str, bytes]) -> None:
        """In pages of 4, as the Hub pages at 1,000."""
        after = int(self.query.get("cursor", ["0"])[0])
        entries = [_entry(path, content) for path, content in sorted(files.items())]
        headers = {}
        if after + 4 < len(entries):
            path = urlsplit(self.path).path
            headers["Link"] = f'<{self.server_hub.url}{path}?recursive=true&cursor={after + 4}>; rel="next"'
        self._json(entries[after : after + 4], headers=headers)

    def _refs(self, repository: Repository) -> None:
        def listed(names: Mapping[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in names.items()]

        found = {"branches": listed(repository.branches, "heads"), "tags": listed(repository.tags, "tags")}
        pulls = [{"name": n, "ref": n, "targetCommit": c} for n, c in repository.pulls.items()]
        self._json({**found, "converts": [], "pullRequests": pulls})

    def _preupload(self, repository: Repository, revision: str) -> None:
        held = repository.commits[self._commit_of(repository, revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            large = _is_lfs(path, file["size"])
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in held:
                content = held[path]
                same_kind = large == _is_lfs(path, len(content))
                oid = hashlib.sha256(content).hexdigest() if large else blob_id(content)
                answer |= {"oid": oid} if same_kind else {}
            answers.append(answer)
        self._json({"files": answers})

    def _batch(self, repo_id: str) -> None:
        self._repository(repo_id, write=True)
        objects = []
        for one in json.loads(self.body)["objects"]:
            known = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.server_hub.stored:
                href = f"{self.server_hub.url}/lfs"
                known |= {"actions": {"upload": {"href": f"{href}/{one['oid']}"}, "verify": {"href": f"{href}/verify"}}}
            objects.append(known)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs(self, path: str) -> None:
        if path == "/lfs/verify":
            asked = json.loads(self.body)
            if len(self.server_hub.stored.get(asked["oid"], b"")) != asked["size"]:
                raise _RefusedError(404, message="no such object")
            self._json({})
            return
        oid = path.rsplit("/", 1)[1]
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _RefusedError(400, message="the bytes do not have this name")
        self.server_hub.stored[oid] = self.body
        self._send(200, b"", {"ETag": f'"{oid}"'})

    def _commit(self, repo_id: str, repository: Repository, revision: str) -> None:
        head = self._commit_of(repository, revision)
        files, message = dict(repository.commits[head]), ""
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise _RefusedError(412, message="A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if self.server_hub.xet:
                    self.server_hub.stored.setdefault(value["oid"], b"kept elsewhere")
                if value["oid"] not in self.server_hub.stored:
                    raise _RefusedError(400, message="LFS pointer pointed to a file that does not exist")
                files[value["path"]] = self.server_hub.stored[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
        for content in files.values():
            self.server_hub.stored.setdefault(hashlib.sha256(content).hexdigest(), content)
        answer = {"success": True}
        ref = revision
        if self.query.get("create_pr") == ["1"]:
            ref = f"refs/pr/{len(repository.pulls) + 1}"
            answer["pullRequestUrl"] = f"{self.server_hub.url}/{repo_id}/discussions/{len(repository.pulls) + 1}"
        oid = repository.commit(files, message, ref)
        self._json({**answer, "commitOid": oid, "commitUrl": f"{self.server_hub.url}/{repo_id}/commit/{oid}"})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self._repository(repo_id, data=True)
        commit = self._commit_of(repository, revision)
        files = repository.commits[commit]
        if path not in files:
            self.fault = None
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        content, headers = files[path], {"X-Repo-Commit": commit}
        if _is_lfs(path, len(content)):
            sha = hashlib.sha256(content).hexdigest()
            headers |= {
                "X-Linked-Etag": f'"{sha}"',
                "X-Linked-Size": str(len(content)),
                "ETag": f'"{blob_id(content)}"',
            }
            headers |= {"Location": f"{self.server_hub.cdn}/cdn/{sha}/{path}?signed=yes"}
            self._send(302, b"", headers)
        else:
            self._content(content, {**headers, "ETag": f'"{blob_id(content)}"'})

    def _content(self, content: bytes, headers: Mapping[str, str]) -> None:
        headers = {**headers, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked is None or (isinstance(self.fault, Lie) and self.fault.ignore_range):
            self._send(200, content, headers)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
        if start >= len(content):
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        self._send(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


def _is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith((".safetensors", ".bin")) or size >= LFS_FROM)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if _is_lfs(path, len(content)):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    entry = _entry(path, content)
    lfs = {"sha256": entry["lfs"]["oid"], "size": len(content), "pointerSize": 130} if "lfs" in entry else None
    return {"size": len(content), "blobId": entry["oid"], **({"lfs": lfs} if lfs else {})}
