"""The body of a request: of what type, how long, how deep, and in what time."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from pals.errors import BodyTooLarge, InvalidRequest, ReceiveTimeout

if TYPE_CHECKING:
    from litestar.types import (
        HTTPReceiveMessage,
        HTTPRequestEvent,
        Receive,
        WebSocketReceiveMessage,
    )

MAX_BODY_BYTES = 4 << 20
MAX_JSON_DEPTH = 64
BODY_DEADLINE_S = 15.0

# It always matches once it has begun, an unterminated string too: linear time on any input.
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SAME_BRACKETS = bytes.maketrans(b"{}", b"[]")


async def read_body(
    receive: Receive, *, limit_bytes: int = MAX_BODY_BYTES, deadline_s: float = BODY_DEADLINE_S
) -> bytes:
    """Read a whole request body, counting while it arrives.

    Raises:
        BodyTooLarge: It is longer than ``limit_bytes``.
        ReceiveTimeout: It took longer than ``deadline_s``.
        InvalidRequest: The client went away.
    """
    body = bytearray()
    more = True
    try:
        async with asyncio.timeout(deadline_s):
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    raise InvalidRequest(problem="the client went away")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > limit_bytes:
                    raise BodyTooLarge(limit_bytes=limit_bytes)
    except TimeoutError:
        raise ReceiveTimeout(deadline_s=deadline_s) from None
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


def replaying(body: bytes, receive: Receive) -> Receive:
    """Return a receive that first gives the body that was read already."""
    pending: list[HTTPRequestEvent] = [
        {"type": "http.request", "body": body, "more_body": False},
    ]

    async def replayed() -> HTTPReceiveMessage | WebSocketReceiveMessage:
        return pending.pop() if pending else await receive()

    return replayed
