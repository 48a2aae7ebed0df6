"""How many requests run at once, how many wait, and what the others are told.

`Admitting` is an ASGI layer inside the gate: it gives each POST a place before its route is
looked up, and takes the place back when the request has ended, however that comes. So
routes need not know about it, and no spelling of a path gets around it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pals.api.clients import client_in
from pals.api.gate.body import replaying
from pals.api.problems import send_problem
from pals.api.waiting_line import LineLimits, WaitingLine
from pals.errors import EndpointLeaving, PalsError

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Receive, Scope, Send

WAIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How many requests an endpoint has now: those that ``run`` and those that ``wait``."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a request has of an `Admission`; whether it may run at once, or must wait."""

    ticket: int
    runs: bool


class Admission:
    """The places of one endpoint, shared by all of its applications.

    All but `leave` and `standing` is for the thread of the event loop.

    Args:
        limits: How many requests may run and wait.
        wait_s: Longest wait for a place, in seconds.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        limits: LineLimits | None = None,
        *,
        wait_s: float = WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._line = WaitingLine(limits or LineLimits())
        self._wait_s = wait_s
        self._clock = clock
        self._tickets = itertools.count()
        self._futures: dict[int, asyncio.Future[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_leaving = False

    def standing(self) -> Standing:
        """Return how many requests run and wait, as for telling what a drain waits for."""
        return Standing(running=self._line.running, waiting=self._line.waiting)

    def leave(self) -> None:
        """Take no more requests, and refuse those that wait; from any thread or signal."""
        self._is_leaving = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._refuse_waiting)

    def start(self, client: str) -> Place:
        """Return a place that the request may have at once, or must wait for.

        Args:
            client: Whose request it is; places are shared fairly between clients.

        Raises:
            RateLimitExceeded: There is no place, and none to wait for.
            EndpointLeaving: The endpoint is about to stop.
        """
        if self._is_leaving:
            raise EndpointLeaving
        self._loop = asyncio.get_running_loop()
        ticket = next(self._tickets)
        arrival = self._line.arrive(ticket, client, self._clock())
        if arrival.displaced is not None:
            self._refuse(arrival.displaced, self._line.refusal())
        if not arrival.runs:
            self._futures[ticket] = self._loop.create_future()
        return Place(ticket=ticket, runs=arrival.runs)

    async def wait(self, place: Place) -> None:
        """Wait until a place that was not free is.

        Raises:
            RateLimitExceeded: It did not become free in time, or others had more right to it.
            EndpointLeaving: The endpoint is about to stop.
        """
        try:
            async with asyncio.timeout(self._wait_s):
                await self._futures[place.ticket]
        except TimeoutError:
            raise self._line.refusal() from None

    def end(self, place: Place) -> None:
        """Give a place back, had or not; the next request in line gets it."""
        self._futures.pop(place.ticket, None)
        following = self._line.leave(place.ticket, self._clock())
        if following is not None and not (future := self._futures[following]).done():
            future.set_result(None)

    def _refuse(self, ticket: int, error: PalsError) -> None:
        if not (future := self._futures[ticket]).done():
            future.set_exception(error)

    def _refuse_waiting(self) -> None:
        for ticket in list(self._futures):
            self._refuse(ticket, EndpointLeaving())


class Admitting:
    """ASGI middleware that lets requests for work in as an `Admission` has places."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        client = client_in(scope)
        try:
            place = self._admission.start(f"{client.key} {client.network}")
        except PalsError as error:
            await send_problem(send, error)
            return
        try:
            message = await receive()
            body = message["body"] if message["type"] == "http.request" else b""
            if place.runs or await self._is_let_in(place, receive, send):
                await self._app(scope, replaying(body, receive), send)
        finally:
            self._admission.end(place)

    async def _is_let_in(self, place: Place, receive: Receive, send: Send) -> bool:
        """Wait for a place; answer the request, if there is still anybody, when it gets none."""
        waiting = asyncio.ensure_future(self._admission.wait(place))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                waiting.result()
            return waiting.done()
        except PalsError as error:
            await send_problem(send, error)
            return False
        finally:
            waiting.cancel()
            leaving.cancel()
            await asyncio.gather(waiting, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
