"""Counts, times and logs every request, whoever answers it."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import cast

from litestar.types import ASGIApp, Message, Receive, Scope, Send

from pals.backend.metrics import BackendMetrics

NO_ROUTE = "none"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_SWARM_ID = re.compile(r"[0-9a-f]{64}")
_SHOWN_CHARS = 8
_TYPE = re.compile(r":\w+\}")

_log = logging.getLogger(__name__)


class Observed:
    """ASGI middleware around everything else.

    A request is named by its method and its route's template, never by what was asked: a
    path or a query may hold anything. Of a swarm's id the log shows the first characters.

    Args:
        app: What answers.
        metrics: Where it is counted.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: BackendMetrics,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status = self._clock(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if scope["type"] == "http":
                self._note(scope, status, self._clock() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        routed = cast("Mapping[str, object]", scope)
        method = str(routed["method"])
        template = _TYPE.sub("}", str(routed.get("path_template") or NO_ROUTE))
        route = f"{method if method in _METHODS else 'other'} {template}"
        self._metrics.observe(transport="http", route=route, status=status, seconds=seconds)
        fields = {"route": route, "status": status, "ms": round(1000 * seconds, 1)}
        parameters = cast("Mapping[str, object]", routed.get("path_params") or {})
        swarm = str(parameters.get("swarm", ""))
        if _SWARM_ID.fullmatch(swarm):
            fields["swarm"] = swarm[:_SHOWN_CHARS]
        _log.info("request", extra={"fields": fields})
