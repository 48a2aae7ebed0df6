"""The checks that every HTTP request passes before any route is looked up.

A browser can be made to send requests to localhost by any web page (DNS rebinding,
cross-site POST), so a loopback bind is not a protection by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from litestar.types import (
    ASGIApp,
    HTTPReceiveMessage,
    HTTPRequestEvent,
    HTTPScope,
    Receive,
    Scope,
    Send,
    WebSocketReceiveMessage,
)

from pals.api.problems import problem_headers, problem_json
from pals.config import API_KEY_VARIABLE
from pals.errors import (
    BodyTooLarge,
    HostRefused,
    InvalidApiKey,
    InvalidConfig,
    InvalidRequest,
    OriginRefused,
    PalsError,
    ReceiveTimeout,
    UnsupportedMediaType,
)

MAX_BODY_BYTES = 4 << 20
MAX_JSON_DEPTH = 64
BODY_DEADLINE_S = 15.0
MIN_API_KEY_CHARS = 16
OPEN_PATHS = frozenset({"/health", "/healthz"})
JSON_TYPE = "application/json"

_BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})
_SAME_SITE_SCHEMES = ("http://", "https://")
# It always matches once it has begun, an unterminated string too: linear time on any input.
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SAME_BRACKETS = bytes.maketrans(b"{}", b"[]")


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """What one listener lets through.

    Attributes:
        hosts: Exact values of the `Host` header, in lower case.
        any_ip_host: Also accept an address literal as host. For a wildcard bind, whose
            addresses are not known; rebinding needs a name, so a literal is safe.
        key_digests: SHA-256 of each accepted API key; empty asks for none.
        content_types: Media types of request bodies.
    """

    hosts: frozenset[str]
    any_ip_host: bool = False
    key_digests: tuple[bytes, ...] = ()
    content_types: frozenset[str] = frozenset({JSON_TYPE})

    @classmethod
    def for_bind(
        cls,
        host: str,
        port: int,
        *,
        api_key: str | None = None,
        content_types: Iterable[str] = (JSON_TYPE,),
    ) -> GateSettings:
        """Return the settings of a listener on ``host`` (an address literal) and ``port``.

        Raises:
            InvalidConfig: The API key is too short to resist guessing.
        """
        address = ipaddress.ip_address(host)
        return cls(
            hosts=_host_headers(address, port),
            any_ip_host=address.is_unspecified,
            key_digests=() if api_key is None else (_key_digest(api_key),),
            content_types=frozenset(content_types),
        )


class Gate:
    """ASGI middleware that answers refused requests itself."""

    def __init__(self, app: ASGIApp, settings: GateSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008, "reason": ""})
            return
        try:
            body = await self._admit(scope, receive)
        except PalsError as error:
            await _send_problem(send, error)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _admit(self, scope: HTTPScope, receive: Receive) -> bytes:
        check_host(scope, self._settings)
        check_origin(scope, self._settings)
        if scope["path"] not in OPEN_PATHS:
            check_api_key(scope, self._settings)
        if scope["method"] not in _BODY_METHODS:
            return b""
        media_type = check_content(scope, self._settings)
        body = await read_body(receive)
        if media_type == JSON_TYPE:
            check_json_depth(body)
        return body


def check_host(scope: HTTPScope, settings: GateSettings) -> None:
    """Raise `HostRefused` unless there is one `Host` header and it is the listener's own."""
    values = _header(scope, b"host")
    if len(values) != 1 or not _is_own_host(values[0].lower(), settings):
        raise HostRefused


def check_origin(scope: HTTPScope, settings: GateSettings) -> None:
    """Raise `OriginRefused` when a page that this listener did not serve sent the request."""
    for value in _header(scope, b"origin"):
        scheme = next((s for s in _SAME_SITE_SCHEMES if value.startswith(s)), None)
        if scheme is None or not _is_own_host(value.removeprefix(scheme).lower(), settings):
            raise OriginRefused


def check_api_key(scope: HTTPScope, settings: GateSettings) -> None:
    """Raise `InvalidApiKey` unless the bearer key is one of the listener's.

    Digests are compared, every one of them, so that the time depends on no key.
    """
    if not settings.key_digests:
        return
    values = _header(scope, b"authorization")
    scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
    matches = [hmac.compare_digest(digest, known) for known in settings.key_digests]
    if scheme.lower() != "bearer" or not any(matches):
        raise InvalidApiKey


def check_content(scope: HTTPScope, settings: GateSettings) -> str:
    """Return the body's media type.

    A simple content type would let any web page post without a preflight.

    Raises:
        UnsupportedMediaType: It is none of the listener's, or the body is compressed.
    """
    if any(value.lower() != "identity" for value in _header(scope, b"content-encoding")):
        raise UnsupportedMediaType(header="Content-Encoding", expected="an uncompressed body")
    values = _header(scope, b"content-type")
    media_type = values[0].partition(";")[0].strip().lower() if len(values) == 1 else ""
    if media_type not in settings.content_types:
        expected = ", ".join(sorted(settings.content_types))
        raise UnsupportedMediaType(header="Content-Type", expected=f"Content-Type: {expected}")
    return media_type


async def read_body(receive: Receive) -> bytes:
    """Read a whole request body, counting while it arrives.

    Raises:
        BodyTooLarge: It is longer than `MAX_BODY_BYTES`.
        ReceiveTimeout: It took longer than `BODY_DEADLINE_S`.
    """
    body = bytearray()
    more = True
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    raise InvalidRequest(problem="the client went away")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BODY_BYTES:
                    raise BodyTooLarge(limit_bytes=MAX_BODY_BYTES)
    except TimeoutError:
        raise ReceiveTimeout(deadline_s=BODY_DEADLINE_S) from None
    return bytes(body)


def check_json_depth(body: bytes) -> None:
    """Raise `InvalidRequest` when arrays and objects nest deeper than `MAX_JSON_DEPTH`.

    Works on the brackets alone: each round of removals takes away one level.
    """
    brackets = _JSON_STRING.sub(b"", body).translate(_SAME_BRACKETS, _NOT_BRACKETS)
    for _ in range(MAX_JSON_DEPTH):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        problem = f"the JSON nests deeper than {MAX_JSON_DEPTH}, or its brackets do not match"
        raise InvalidRequest(problem=problem)


def _host_headers(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> frozenset[str]:
    names = [_bracketed(address)]
    if address.is_loopback or address.is_unspecified:
        names += ["127.0.0.1", "localhost", "[::1]"]
    if not address.is_loopback:
        names.append(socket.gethostname().lower())
    with_port = {f"{name}:{port}" for name in names}
    return frozenset(with_port | set(names) if port == 80 else with_port)


def _bracketed(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)


def _is_own_host(value: str, settings: GateSettings) -> bool:
    return value in settings.hosts or (settings.any_ip_host and _is_ip_host(value))


def _is_ip_host(value: str) -> bool:
    name, _, _ = value.rpartition(":")
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _key_digest(api_key: str) -> bytes:
    if len(api_key) < MIN_API_KEY_CHARS:
        raise InvalidConfig(
            source=API_KEY_VARIABLE,
            problem=f"the key has {len(api_key)} characters",
            advice=f"use at least {MIN_API_KEY_CHARS} random characters",
        )
    return hashlib.sha256(api_key.encode()).digest()


def _header(scope: HTTPScope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key == name]


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receive that first gives the body that was read already."""
    pending: list[HTTPRequestEvent] = [
        {"type": "http.request", "body": body, "more_body": False},
    ]

    async def replayed() -> HTTPReceiveMessage | WebSocketReceiveMessage:
        return pending.pop() if pending else await receive()

    return replayed


async def _send_problem(send: Send, error: PalsError) -> None:
    body = problem_json(error)
    headers = {
        **problem_headers(error),
        "content-type": JSON_TYPE,
        "content-length": str(len(body)),
    }
    await send(
        {
            "type": "http.response.start",
            "status": error.http_status,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})
