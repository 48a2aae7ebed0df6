"""The gate itself: an ASGI middleware around an application."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pals.api.clients import Client, client_of_address, note_client
from pals.api.gate.body import check_json_depth, read_body, replaying
from pals.api.gate.checks import (
    BODY_METHODS,
    check_api_key,
    check_content,
    check_host,
    check_no_content,
    check_origin,
)
from pals.api.gate.cors import answer_preflight, is_preflight, letting_read
from pals.api.gate.settings import GateSettings
from pals.api.problems import JSON_TYPE, send_problem
from pals.errors import PalsError

if TYPE_CHECKING:
    from litestar.types import ASGIApp, HTTPScope, Receive, Scope, Send

OPEN_PATHS = frozenset({"/health", "/healthz"})


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
            check_host(scope, self._settings)
            origin = check_origin(scope, self._settings)
            if origin is not None:
                send = letting_read(origin, send)
            if origin is not None and is_preflight(scope):
                await answer_preflight(scope, send)
                return
            body = await self._admit(scope, receive)
        except PalsError as error:
            await send_problem(send, error)
            return
        await self._app(scope, replaying(body, receive), send)

    async def _admit(self, scope: HTTPScope, receive: Receive) -> bytes:
        has_body = scope["method"] in BODY_METHODS
        # A body can be sent slowly, which nobody may do who has no key.
        if has_body or scope["path"] not in OPEN_PATHS:
            self._identify(scope)
        if not has_body:
            check_no_content(scope)
            return b""
        media_type = check_content(scope, self._settings)
        limits = self._settings
        body = await read_body(receive, limit_bytes=limits.max_body_bytes, deadline_s=limits.body_s)
        if media_type == JSON_TYPE:
            check_json_depth(body)
        return body

    def _identify(self, scope: HTTPScope) -> None:
        """Note who asks: the key's name, or where the request comes from."""
        name = check_api_key(scope, self._settings)
        address = scope["client"][0] if scope["client"] else ""
        note_client(scope, Client(key=name) if name else client_of_address(address))
