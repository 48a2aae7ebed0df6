"""A hub on this machine: the part of its API that a model is downloaded with.

Two servers, as on the real one: the hub's own and the storage that it redirects to, which
has another host name so that a client must not send it the token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test_token"
_INFO = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/]+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)?")


@dataclass(frozen=True)
class Request:
    """What one request asked for; ``range`` is half-open."""

    server: str
    method: str
    path: str
    range: tuple[int, int] | None
    has_token: bool
    if_range: str


@dataclass
class Fault:
    """What goes wrong with requests to one of the servers, ``times`` times.

    Attributes:
        server: "hub" or "storage".
        path: Part of the path of the requests that it hits.
        status: Answer this instead.
        body: The body of that answer.
        headers: Headers that replace or join those of the answer.
        cut: Bytes of the body before the connection breaks; with ``chunked`` it ends there.
        extra: Bytes too many.
        ignore_range: Send the whole file with status 200.
        hang_after: Send this many bytes, set ``reached`` and wait for ``release``.
        drip_s: While it waits, send one more byte whenever so long has passed.
        skip: Requests to let through first.
    """

    server: str = "storage"
    path: str = ""
    method: str = "GET"
    times: int = 1
    skip: int = 0
    status: int = 0
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    extra: int = 0
    chunked: bool = False
    ignore_range: bool = False
    hang_after: int | None = None
    drip_s: float | None = None
    release: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)

    def hits(self, server: str, method: str, path: str) -> bool:
        if (server, method) != (self.server, self.method) or self.path not in path:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return self.times >= 0


@dataclass
class Repo:
    """A model on the hub: a folder for each revision, and who may have it."""

    folders: dict[str, Path]
    needs_token: bool = False
    gated: bool = False
    tags: list[str] = field(default_factory=list)

    def commit_of(self, revision: str) -> str | None:
        for name, folder in self.folders.items():
            commit = hashlib.sha1(f"{name} {folder}".encode()).hexdigest()
            if revision in (name, commit):
                return commit
        return None

    def folder_of(self, commit: str) -> Path:
        return next(f for name, f in self.folders.items() if self.commit_of(name) == commit)


class HubServer:
    """Serves ``repos``; ``requests`` lists what was asked for, in order.

    ``lfs`` replaces what the hub states of a file, and ``denied`` are tokens without rights.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.servers = {name: _Server(self, name) for name in ("hub", "storage")}
        self.tokens = {TOKEN}
        self.denied: set[str] = set()
        self.lfs: dict[str, dict[str, object]] = {}

    def __enter__(self) -> Self:
        for server in self.servers.values():
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fault in self.faults:
            fault.release.set()
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    @cached_property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.servers['hub'].server_port}"

    @cached_property
    def storage_url(self) -> str:
        return f"http://localhost:{self.servers['storage'].server_port}"

    def add(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def fault_of(self, server: str, method: str, path: str) -> Fault | None:
        with self.lock:
            return next((f for f in self.faults if f.hits(server, method, path)), None)

    def ranges(self, file: Path) -> list[tuple[int, int]]:
        """Return the byte ranges of a weight file that the storage was asked for."""
        sha256 = _sha256(file)
        return [
            request.range or (0, file.stat().st_size)
            for request in self.requests
            if request.server == "storage" and sha256 in request.path
        ]

    def forget(self) -> None:
        self.requests.clear()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, name: str) -> None:
        self.hub = hub
        self.name = name
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        span = None if match is None else (int(match[1]), int(match[2] or 1 << 60) + 1)
        has_token = "Authorization" in self.headers
        with hub.lock:
            hub.requests.append(
                Request(
                    self.server.name,
                    self.command,
                    path,
                    span,
                    has_token,
                    self.headers.get("If-Range", ""),
                )
            )
        fault = hub.fault_of(self.server.name, self.command, path) or Fault()
        if fault.status:
            self._send(fault.status, fault.body, fault.headers, fault)
        elif self.server.name == "storage":
            self._storage(path, span, fault)
        else:
            self._hub(path, span, fault)

    # --- the hub's own ---------------------------------------------------------------

    def _hub(self, path: str, span: tuple[int, int] | None, fault: Fault) -> None:
        info, resolve = _INFO.fullmatch(path), _RESOLVE.fullmatch(path)
        name = (info or resolve or [None, ""])[1]
        repo = self.server.hub.repos.get(name)
        problem = self._refusal(repo, is_file=resolve is not None)
        if repo is None or problem is not None:
            status, code = problem or (404, "RepoNotFound")
            self._send(status, b"", {"X-Error-Code": code} if code else {}, fault)
            return
        commit = repo.commit_of(unquote(((info or resolve) or [""] * 3)[2] or "main"))
        if commit is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, fault)
        elif info is not None:
            self._send(200, _info(name, repo, commit, self.server.hub.lfs), {}, fault)
        elif resolve is not None:
            self._resolve(repo.folder_of(commit) / resolve[3], commit, span, fault)

    def _refusal(self, repo: Repo | None, *, is_file: bool) -> tuple[int, str] | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        known = given in self.server.hub.tokens
        if given and not known:
            return 401, ""
        if repo is None:
            return (404 if known else 401), "RepoNotFound"
        if repo.gated and is_file:
            return (403 if known else 401), "GatedRepo"
        if repo.needs_token and not known:
            return 401, "RepoNotFound"
        return (403, "") if given in self.server.hub.denied else None

    def _resolve(self, file: Path, commit: str, span: tuple[int, int] | None, fault: Fault) -> None:
        headers = {"X-Repo-Commit": commit}
        if not file.is_file():
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"}, fault)
        elif file.suffix == ".safetensors":
            sha256 = _sha256(file)
            headers |= {"X-Linked-Size": str(file.stat().st_size), "X-Linked-ETag": f'"{sha256}"'}
            headers["Location"] = f"{self.server.hub.storage_url}/{sha256}?signature=1"
            self._send(302, b"", headers, fault)
        else:
            data = file.read_bytes()
            git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            self._send_range(data, span, headers | {"ETag": f'"{git}"'}, fault)

    # --- the storage -----------------------------------------------------------------

    def _storage(self, path: str, span: tuple[int, int] | None, fault: Fault) -> None:
        folders = [f for repo in self.server.hub.repos.values() for f in repo.folders.values()]
        files = [p for folder in folders for p in folder.glob("*.safetensors")]
        found = next((p for p in files if _sha256(p) == path.strip("/")), None)
        if found is None:
            self._send(404, b"", {}, fault)
            return
        etag = f'"storage-{path[1:9]}"'
        if self.headers.get("If-Range", etag) != fault.headers.get("ETag", etag):
            span = None
        self._send_range(found.read_bytes(), span, {"ETag": etag}, fault)

    def _send_range(
        self, data: bytes, span: tuple[int, int] | None, headers: dict[str, str], fault: Fault
    ) -> None:
        if span is None or fault.ignore_range:
            self._send(200, data, headers, fault)
            return
        start, stop = span[0], min(span[1], len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send(206, data[start:stop], headers, fault)

    def _send(self, status: int, body: bytes, headers: dict[str, str], fault: Fault) -> None:
        body += b"x" * fault.extra
        sent = body if fault.cut is None else body[: fault.cut]
        length = {} if fault.chunked else {"Content-Length": str(len(body))}
        if fault.chunked:
            length = {"Transfer-Encoding": "chunked"}
            sent = (b"%x\r\n%b\r\n" % (len(sent), sent) if sent else b"") + b"0\r\n\r\n"
        self.send_response(status)
        for name, value in (length | headers | fault.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self._send_body(sent, fault)
        if fault.cut is not None and not fault.chunked:
            self.close_connection = True

    def _send_body(self, body: bytes, fault: Fault) -> None:
        if fault.hang_after is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: fault.hang_after])
        self.wfile.flush()
        fault.reached.set()
        sent = fault.hang_after
        while not fault.release.wait(fault.drip_s):
            self.wfile.write(body[sent : sent + 1])
            self.wfile.flush()
            sent += 1
        self.wfile.write(body[sent:])


def _info(name: str, repo: Repo, commit: str, lfs: dict[str, dict[str, object]]) -> bytes:
    siblings: list[dict[str, object]] = []
    for file in sorted(repo.folder_of(commit).iterdir()):
        size = file.stat().st_size
        entry: dict[str, object] = {"rfilename": file.name, "size": size}
        if file.suffix == ".safetensors":
            stated: dict[str, object] = {"sha256": _sha256(file), "size": size, "pointerSize": 134}
            entry["lfs"] = lfs.get(file.name, stated)
        siblings.append(entry)
    document = {"id": name, "sha": commit, "siblings": siblings, "tags": repo.tags}
    return json.dumps(document).encode()


_HASHES: dict[tuple[Path, int], str] = {}


def _sha256(file: Path) -> str:
    key = (file, file.stat().st_mtime_ns)
    if key not in _HASHES:
        _HASHES[key] = hashlib.sha256(file.read_bytes()).hexdigest()
    return _HASHES[key]
