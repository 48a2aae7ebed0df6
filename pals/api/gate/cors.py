"""What a browser is told when the page of an allowed site asks.

Source: the Fetch standard (CORS protocol) and its draft for private networks.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pals.api.gate.checks import header

if TYPE_CHECKING:
    from litestar.types import HTTPScope, Message, Send

PREFLIGHT_AGE_S = 600
METHODS = "GET, POST"
_EXPOSED = "retry-after, server-timing, x-pals-route, x-request-id"
# OpenAI's own client for browsers tells its version and settings in some of these.
_ASKED_HEADERS = re.compile(
    r"accept|authorization|content-type|(?:openai|x-stainless)-[a-z-]{1,40}"
)

_Headers = list[tuple[bytes, bytes]]


def is_preflight(scope: HTTPScope) -> bool:
    """Return whether a browser asks what a page may send."""
    return scope["method"] == "OPTIONS" and bool(header(scope, b"access-control-request-method"))


async def answer_preflight(scope: HTTPScope, send: Send) -> None:
    """Say what a page may send that `letting_read` lets read; it needs no key yet."""
    asked = ",".join(header(scope, b"access-control-request-headers")).lower().split(",")
    names = [name.strip() for name in asked]
    allowed = ", ".join(name for name in names if _ASKED_HEADERS.fullmatch(name))
    headers: _Headers = [
        (b"access-control-allow-methods", METHODS.encode()),
        (b"access-control-allow-headers", allowed.encode()),
        (b"access-control-max-age", str(PREFLIGHT_AGE_S).encode()),
    ]
    if header(scope, b"access-control-request-private-network"):
        headers.append((b"access-control-allow-private-network", b"true"))
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def letting_read(origin: str, send: Send) -> Send:
    """Return a send whose answer the page of that one site can read."""
    allowing: _Headers = [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", _EXPOSED.encode()),
        (b"vary", b"Origin"),
    ]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *allowing]
        await send(message)

    return sending
