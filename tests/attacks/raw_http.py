"""HTTP as an attacker writes it: bytes on a socket, whatever they mean."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

DEADLINE_S = 10.0
CHAT_PATH = "/v1/chat/completions"
CHAT: dict[str, Any] = {"model": "test/tiny", "messages": [{"role": "user", "content": "hi"}]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The code of the error object, which every refusal must have."""
        error = json.loads(self.body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error["code"]


class Endpoint:
    """Where a server listens.

    Attributes:
        netloc: Its host and port, as a `Host` header has them.
    """

    def __init__(self, url: str) -> None:
        self.netloc = urlsplit(url).netloc
        self._address = (urlsplit(url).hostname or "", urlsplit(url).port or 0)

    def connect(self) -> socket.socket:
        return socket.create_connection(self._address, timeout=DEADLINE_S)

    def send(self, data: bytes) -> Answer:
        """Send bytes, ``%H`` standing for the right host, and return the first answer."""
        with self.connect() as raw:
            # It may refuse and hang up before it has everything.
            with suppress(ConnectionError):
                raw.sendall(data.replace(b"%H", self.netloc.encode()))
            return answer_on(raw, data)

    def ask(
        self, method: str, path: str, *headers: str, body: bytes = b"", host: str | None = "%H"
    ) -> Answer:
        """Send one request; the length of a body is said, and the host unless it is None."""
        lines = [f"{method} {path} HTTP/1.1", *([] if host is None else [f"Host: {host}"])]
        lines += headers
        if body:
            lines.append(f"Content-Length: {len(body)}")
        return self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def post(self, body: object, *headers: str, path: str = CHAT_PATH) -> Answer:
        """Post a JSON document, or the bytes of one."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, "Content-Type: application/json", *headers, body=data)


def answer_on(raw: socket.socket, request: bytes = b"") -> Answer:
    """Read one answer from a connection."""
    response = http.client.HTTPResponse(raw, method=request.partition(b" ")[0].decode("latin-1"))
    with response:
        response.begin()
        return Answer(
            status=response.status,
            headers={name.lower(): value for name, value in response.getheaders()},
            body=response.read(),
        )


def is_cut(raw: socket.socket) -> bool:
    """Return whether the server ends a connection, whatever it says before."""
    try:
        while raw.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return True
