"""HTTP connections that cannot be held open for nothing.

uvicorn gives a client all the time it wants to send the head of a request and to take a
response, and counts connections only when their requests are complete: a few hundred
half requests would close a server to everybody, without credentials.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import ClassVar, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from pals.api.clients import LOOPBACK, network_of
from pals.api.heads import MAX_HEAD_BYTES, check_head
from pals.api.problems import JSON_TYPE, problem_json
from pals.errors import InvalidRequest, PalsError

MAX_CHUNKS = 16384

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What one connection, one client address and all of them may take.

    At a limit the connection that has waited longest for a request is closed for the new
    one, so that a client that asks at once is served also while others only hold on.

    Attributes:
        head_s: Seconds for the head of a request, from the connection or its first byte.
        write_s: Seconds in which a client takes what was written to it.
        per_address: Connections from one IPv4 address or IPv6 /64; more than may run and wait,
            so that a busy client is told that it is one.
        per_loopback: The same for this machine, whose address all local clients share,
            and a reverse proxy with all of its own clients.
        total: Connections from everywhere.
    """

    head_s: float = 10.0
    write_s: float = 30.0
    per_address: int = 160
    per_loopback: int = 256
    total: int = 512


def guarded_protocol(limits: ConnectionLimits) -> type[GuardedProtocol]:
    """Return the protocol class that uvicorn makes an instance of for each connection."""
    return type("LimitedProtocol", (GuardedProtocol,), {"limits": limits})


class StrictConnection(h11.Connection):
    """h11's connection, whose requests have heads as `check_head` wants them.

    Attributes:
        refusal: Why a request was refused.
    """

    refusal: PalsError | None = None

    _checked: int = 0
    _chunks: int = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            if self.their_state is h11.IDLE:
                self._checked = check_head(self.trailing_data[0], self._checked)
            event = super().next_event()
            self._count_chunks(event)
        except PalsError as error:
            self.refusal = error
            raise h11.RemoteProtocolError(str(error), error.http_status) from error
        return event

    def _count_chunks(self, event: h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]) -> None:
        """Bound the work that a body of tiny chunks is, of which each takes as long as a large."""
        if isinstance(event, h11.Request):
            self._chunks = 0
        elif isinstance(event, h11.Data) and event.chunk_start:
            self._chunks += 1
            if self._chunks > MAX_CHUNKS:
                raise InvalidRequest(problem=f"the body is in more than {MAX_CHUNKS} chunks")


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol within `ConnectionLimits`, with `StrictConnection`.

    Attributes:
        network: Whose connection it is, as far as an address tells.
        waiting_since: When it was made or last answered, on the event loop's clock.
    """

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    network: str = ""
    waiting_since: float = 0.0

    _is_refused: bool = False
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(  # pyright: ignore[reportIncompatibleMethodOverride] as uvicorn does
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        self.conn: h11.Connection = StrictConnection(
            h11.SERVER, self.config.h11_max_incomplete_event_size or MAX_HEAD_BYTES
        )
        # Each unsent byte then pauses writing, and `write_s` runs until all are taken.
        transport.set_write_buffer_limits(high=0)
        self.network = network_of(self.client[0] if self.client else "")
        self.waiting_since = self.loop.time()
        self._start_head_timer()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if not self.in_request:
            self._start_head_timer()
        super().data_received(data)
        if self.in_request:
            self._stop_head_timer()
            self._go_on_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP with the error object, and hear no more of the client.

        uvicorn calls it for whatever h11 refuses. What still comes is thrown away until the
        head's deadline: to hang up on it could take the answer back.
        """
        was_in_request, self._is_refused = self.in_request, True
        refusal = _refusal_of(self.conn)
        if was_in_request:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        self.transport.write(_last_answer(refusal))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._start_head_timer()
        _log.info("request refused", extra={"fields": {"status": refusal.http_status}})

    def on_response_complete(self) -> None:
        self.waiting_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    @property
    def in_request(self) -> bool:
        """Whether a request is being answered; if not, the client owes the next one."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return cycle is not None and not cycle.response_complete and not self._is_refused

    def _go_on_reading(self) -> None:
        """Undo that uvicorn reads nothing more once it has a part of the next request.

        It would not see either that the client went away, while the answer is being made.
        """
        is_whole = self.conn.their_state is h11.DONE
        if is_whole and len(self.conn.trailing_data[0]) <= MAX_HEAD_BYTES:
            self.flow.resume_reading()

    def _make_room(self) -> None:
        """Close the connection that waited longest when there is one too many.

        This one waits too, though shorter than any other: it goes when all others work.
        """
        everyone = cast("list[GuardedProtocol]", list(self.connections))
        neighbours = [other for other in everyone if other.network == self.network]
        local = self.network == LOOPBACK
        if len(neighbours) > (self.limits.per_loopback if local else self.limits.per_address):
            _close_longest_waiting(neighbours)
        elif len(everyone) > self.limits.total:
            _close_longest_waiting(everyone)

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.head_s, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _close_longest_waiting(connections: list[GuardedProtocol]) -> None:
    oldest = min((c for c in connections if not c.in_request), key=lambda c: c.waiting_since)
    # The transport tells of its end later; until then it would be counted still.
    oldest.connections.discard(oldest)
    oldest.transport.abort()


def _refusal_of(connection: h11.Connection) -> PalsError:
    refusal = connection.refusal if isinstance(connection, StrictConnection) else None
    return refusal or InvalidRequest(problem="this is no HTTP request")


def _last_answer(refusal: PalsError) -> bytes:
    """Return a whole answer, after which the connection ends."""
    body = problem_json(refusal)
    head = (
        f"HTTP/1.1 {refusal.http_status} {HTTPStatus(refusal.http_status).phrase}\r\n"
        f"content-type: {JSON_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
