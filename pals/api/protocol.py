"""HTTP connections that cannot be held open for nothing.

uvicorn gives a client all the time it wants to send the head of a request and to take a
response, and counts connections only when their requests are complete: a few hundred
half requests would close a server to everybody, without credentials.
"""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import dataclass
from typing import ClassVar, cast

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What one connection, one client address and all of them may take.

    At a limit the connection that has waited longest for a request is closed for the new
    one, so that a client that asks at once is served also while others only hold on.

    Attributes:
        head_s: Seconds for the head of a request, from the connection or its first byte.
        write_s: Seconds in which a client takes what was written to it.
        per_address: Connections from one IPv4 address or IPv6 /64.
        per_loopback: The same for this machine, whose address all local clients share,
            and a reverse proxy with all of its own clients.
        total: Connections from everywhere.
    """

    head_s: float = 10.0
    write_s: float = 30.0
    per_address: int = 64
    per_loopback: int = 256
    total: int = 512


def guarded_protocol(limits: ConnectionLimits) -> type[GuardedProtocol]:
    """Return the protocol class that uvicorn makes an instance of for each connection."""
    return type("LimitedProtocol", (GuardedProtocol,), {"limits": limits})


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol within `ConnectionLimits`.

    Attributes:
        network: Whose connection it is, as far as an address tells.
        waiting_since: When it was made or last answered, on the event loop's clock.
    """

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    network: str = ""
    waiting_since: float = 0.0

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(  # pyright: ignore[reportIncompatibleMethodOverride] as uvicorn does
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        # Each unsent byte then pauses writing, and `write_s` runs until all are taken.
        transport.set_write_buffer_limits(high=0)
        self.network = _network_of(self.client[0] if self.client else "")
        self.waiting_since = self.loop.time()
        self._start_head_timer()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        if not self.in_request:
            self._start_head_timer()
        super().data_received(data)
        if self.in_request:
            self._stop_head_timer()

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
        return cycle is not None and not cycle.response_complete

    def _make_room(self) -> None:
        """Close the connection that waited longest when there is one too many.

        This one waits too, though shorter than any other: it goes when all others work.
        """
        everyone = cast("list[GuardedProtocol]", list(self.connections))
        neighbours = [other for other in everyone if other.network == self.network]
        local = self.network == _LOOPBACK
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


_LOOPBACK = "loopback"


def _close_longest_waiting(connections: list[GuardedProtocol]) -> None:
    oldest = min((c for c in connections if not c.in_request), key=lambda c: c.waiting_since)
    # The transport tells of its end later; until then it would be counted still.
    oldest.connections.discard(oldest)
    oldest.transport.abort()


def _network_of(host: str) -> str:
    """Return what one client can be expected to own: an IPv4 address, an IPv6 /64."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_loopback:
        return _LOOPBACK
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
