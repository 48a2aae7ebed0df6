"""Names, times and logs every request, whoever answers it."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pals.api.clients import client_in
from pals.api.problems import problem_of, send_problem
from pals.errors import EndpointLeaving

if TYPE_CHECKING:
    from litestar.types import (
        ASGIApp,
        HTTPReceiveMessage,
        Message,
        Receive,
        Scope,
        Send,
        WebSocketReceiveMessage,
    )

NO_ROUTE = "none"
ID_BYTES = 12
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_SWARM_ID = re.compile(r"[0-9a-f]{64}")
_SHOWN_CHARS = 8
_TYPE = re.compile(r":\w+\}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What there is to count about one request.

    Attributes:
        route: Its method and its route's template.
        status: HTTP status of the answer.
        seconds: From its head to the end of the answer.
    """

    route: str
    status: int
    seconds: float


@dataclass(slots=True, kw_only=True)
class _Watched:
    """One request as it goes on."""

    request_id: str
    started_s: float
    status: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0


class Observed:
    """ASGI middleware around everything else.

    A request is named by its method and its route's template, never by what was asked: a
    path or a query may hold anything. Of a swarm's id the log shows the first characters.
    Each gets an id, in the log line and in the header `x-request-id`. What raises is
    answered, and logged without its text, which may quote what people wrote.

    Args:
        app: What answers.
        observe: Told of each request at its end.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        observe: Callable[[Seen], None] = lambda _: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app = app
        self._observe = observe
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watched = _Watched(request_id=f"req_{secrets.token_hex(ID_BYTES)}", started_s=self._clock())
        sending = _sending(watched, send)
        try:
            await self._app(scope, _receiving(watched, receive), sending)
        except Exception as error:
            problem = problem_of("", "", error)
            # What has begun is cut short by the server: it could be taken for the whole.
            if not watched.status:
                await send_problem(sending, problem)
        except asyncio.CancelledError:
            # The server's drain is over, and it would answer with plain text.
            if watched.status:
                raise
            await send_problem(sending, EndpointLeaving())
        finally:
            if scope["type"] == "http":
                self._note(scope, watched)

    def _note(self, scope: Scope, watched: _Watched) -> None:
        routed = cast("Mapping[str, object]", scope)
        method = str(routed["method"])
        template = _TYPE.sub("}", str(routed.get("path_template") or NO_ROUTE))
        route = f"{method if method in _METHODS else 'other'} {template}"
        seconds, status = self._clock() - watched.started_s, watched.status or 500
        self._observe(Seen(route=route, status=status, seconds=seconds))
        fields: dict[str, str | int | float] = {
            "id": watched.request_id,
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 1),
            "received_bytes": watched.received_bytes,
            "sent_bytes": watched.sent_bytes,
        }
        if key := client_in(scope).key:
            fields["key"] = key
        parameters = cast("Mapping[str, object]", routed.get("path_params") or {})
        swarm = str(parameters.get("swarm", ""))
        if _SWARM_ID.fullmatch(swarm):
            fields["swarm"] = swarm[:_SHOWN_CHARS]
        _log.info("request", extra={"fields": fields})


def _sending(watched: _Watched, send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            watched.status = message["status"]
            named = (b"x-request-id", watched.request_id.encode())
            message["headers"] = [*message.get("headers", []), named]
        elif message["type"] == "http.response.body":
            watched.sent_bytes += len(message["body"])
        await send(message)

    return sending


def _receiving(watched: _Watched, receive: Receive) -> Receive:
    async def receiving() -> HTTPReceiveMessage | WebSocketReceiveMessage:
        message = await receive()
        if message["type"] == "http.request":
            watched.received_bytes += len(message["body"])
        return message

    return receiving
