"""The door: a libp2p host that serves one protocol to strangers, and nothing else.

The members' gate never opens to a stranger, so whoever wants to become a member knocks at
another port, which has an identity of its own. Neither side runs what a host of libp2p runs by
itself (identify, ping): a stranger learns the door's peer id and one protocol's name. A
connection carries one stream, which carries one request, and ends after some seconds; how many
there are, and how often they begin, is bounded for each address before a handshake costs
anything.
"""

# pyright: reportMissingTypeStubs=false
# Reason: multiaddr, noise and parts of libp2p ship no types.

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import cast
from weakref import WeakSet

import trio
from libp2p.abc import IMuxedConn, INetStream, IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TMuxerOptions, TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import IOException
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from pals.errors import PalsError, PeerUnreachable
from pals.net._libp2p import (
    NOISE_PROTOCOL,
    HostLimits,
    MemberSwarm,
    abort,
    expand_wildcards,
    parse_address,
    raw_of,
)
from pals.net.host import Stream, check_listen_address, port_in_use, ungrouped_errors
from pals.net.mux_frames import INITIAL_WINDOW_BYTES
from pals.net.mux_stream import ReceiveBudget
from pals.net.muxer import MUX_PROTOCOL, MuxedConnection
from pals.net.nat.addresses import neighbourhood
from pals.net.noise import NoiseTransport
from pals.net.rates import RateLimit
from pals.net.raw import GREETING_BYTES, GreetedConnection, remote_endpoint
from pals.net.yamux import Muxers
from pals.swarm.addresses import peer_in_address
from pals.swarm.identity import Identity
from pals.types import PeerId

_log = logging.getLogger(__name__)

MAX_SOURCES = 10_000
CLOSE_S = 3.0

DoorHandler = Callable[[Stream, str], Awaitable[None]]
"""Serves one stream, given the address literal from which the stranger comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorLimits:
    """What a door spends on strangers.

    Attributes:
        max_connections: Connections in all.
        max_connections_per_source: Connections from one address; an IPv6 /64 is one.
        max_handshakes: Handshakes in flight; the oldest makes room for a new one.
        handshake_s: Seconds for one handshake.
        call_s: Seconds in which a stranger must have said what it wants.
        connection_s: Seconds after which a connection ends, whatever it is doing.
        write_s: Seconds in which a stranger must take some of what is written to it.
        connections_per_s: New connections a second from one address in the long run.
        connection_burst: New connections from one address at once.
    """

    max_connections: int = 64
    max_connections_per_source: int = 4
    max_handshakes: int = 16
    handshake_s: float = 5.0
    call_s: float = 5.0
    connection_s: float = 20.0
    write_s: float = 5.0
    connections_per_s: float = 0.5
    connection_burst: float = 30.0

    @property
    def host(self) -> HostLimits:
        return HostLimits(
            max_connections=self.max_connections,
            max_connections_per_peer=1,
            max_streams_per_peer=1,
            max_unread_bytes_per_peer=INITIAL_WINDOW_BYTES,
            max_handshakes=self.max_handshakes,
            handshake_s=self.handshake_s,
            idle_s=self.connection_s,
            write_s=self.write_s,
        )


class Door:
    """A running door; `open_door` makes it."""

    def __init__(self, swarm: _DoorSwarm) -> None:
        self._swarm = swarm
        self.peer_id = PeerId(swarm.get_peer_id().to_base58())

    def addresses(self) -> tuple[str, ...]:
        """Return the multiaddrs at which it listens, each with ``/p2p/`` and its id."""
        listening = [
            at for listener in self._swarm.listeners.values() for at in listener.get_addrs()
        ]
        return tuple(f"{at}/p2p/{self.peer_id}" for at in expand_wildcards(listening))


@asynccontextmanager
async def open_door(
    identity: Identity,
    *,
    listen: str,
    protocol: str,
    handler: DoorHandler,
    limits: DoorLimits | None = None,
) -> AsyncGenerator[Door]:
    """Serve one protocol to anybody until the block ends.

    Args:
        identity: The door's own Ed25519 identity, which is no member's.
        listen: Multiaddr to listen on, such as ``/ip4/0.0.0.0/tcp/8471``.
        protocol: What it speaks.
        handler: Called for each stream; the stream ends when it returns.
        limits: What it spends on strangers.

    Raises:
        InvalidConfig: ``listen`` is not a TCP multiaddr.
        PortInUse: The address cannot be bound.
    """
    address = check_listen_address(listen)
    swarm = _DoorSwarm(identity, limits or DoorLimits(), lambda _: True)
    swarm.serve(protocol, handler)
    with ungrouped_errors():
        async with _running(swarm):
            if not await swarm.listen(address):
                raise port_in_use(address, "the address cannot be bound")
            yield Door(swarm)


@asynccontextmanager
async def knock(
    address: str, protocol: str, *, limits: DoorLimits | None = None
) -> AsyncGenerator[Stream]:
    """Open a stream to a door under an identity that nobody sees again.

    Args:
        address: The door's multiaddr; whoever answers must prove the peer id in it.
        protocol: What to speak.
        limits: What is spent on it.

    Raises:
        PeerUnreachable: Nobody answers there in time, or somebody else does.
    """
    limits, peer = limits or DoorLimits(), peer_in_address(address)
    swarm = _DoorSwarm(Identity.generate(), limits, lambda candidate: candidate == peer)
    with ungrouped_errors():
        async with _running(swarm):
            yield await swarm.call(peer, parse_address(address), protocol)


@asynccontextmanager
async def _running(swarm: _DoorSwarm) -> AsyncGenerator[None]:
    async with background_trio_service(swarm):
        await swarm.listen()
        try:
            yield
        finally:
            with trio.move_on_after(CLOSE_S, shield=True):
                async with trio.open_nursery() as nursery:
                    for peer in list(swarm.connections):
                        nursery.start_soon(swarm.drop, peer)
                await swarm.close()


class _DoorSwarm(MemberSwarm):
    """A swarm without a host around it."""

    def __init__(
        self, identity: Identity, limits: DoorLimits, allow: Callable[[PeerId], bool]
    ) -> None:
        key_pair = create_new_key_pair(identity.reveal_seed())
        super().__init__(key_pair, allow=allow, limits=limits.host)
        noise = NoiseTransport(
            key_pair,
            allow=allow,
            write_deadline_s=limits.write_s,
            max_read_bytes=GREETING_BYTES,
        )
        muxers = self.upgrader.muxer_multistream
        self.upgrader = TransportUpgrader({NOISE_PROTOCOL: noise}, {})
        self.upgrader.muxer_multistream = muxers
        self._door_limits = limits
        self._seats = Counter[str]()
        self._arrivals = RateLimit(per_s=limits.connections_per_s, burst=limits.connection_burst)
        self._served: WeakSet[IMuxedConn] = WeakSet()
        self.set_stream_handler(_refuse)

    def _muxers(self) -> Muxers:
        """Our own muxer alone: only Pals knocks here."""

        def make_own(conn: ISecureConn, peer_id: ID) -> MuxedConnection:
            budget = ReceiveBudget(self._limits.max_unread_bytes_per_peer)
            return MuxedConnection(conn, peer_id, limits=self._limits.mux, budget=budget)

        return Muxers(cast("TMuxerOptions", {MUX_PROTOCOL: make_own}))

    # --- serving ---------------------------------------------------------------------

    def serve(self, protocol: str, handler: DoorHandler) -> None:
        """Serve the first stream of each connection, if it is for ``protocol``."""

        async def serve_first(net_stream: INetStream) -> None:
            connection = net_stream.muxed_conn
            if connection in self._served:
                await net_stream.reset()
                return
            self._served.add(connection)
            try:
                await self._negotiate(net_stream, protocol)
                stream = Stream(net_stream, write_s=self._door_limits.write_s)
                await handler(stream, self._source(connection))
                await stream.close()
            except (BaseLibp2pError, PalsError, UnicodeDecodeError) as error:
                _log.debug("a stranger's stream ended: %s", type(error).__name__)
                with suppress(BaseLibp2pError):
                    await net_stream.reset()

        self.set_stream_handler(serve_first)

    async def _negotiate(self, net_stream: INetStream, protocol: str) -> None:
        name = TProtocol(protocol)
        multiselect = Multiselect({name: None})
        greeting = MultiselectCommunicator(_Greeting(net_stream))
        await multiselect.negotiate(greeting, max(1, int(self._door_limits.handshake_s)))
        net_stream.set_protocol(name)

    def _source(self, connection: IMuxedConn) -> str:
        own = [c for c in self.get_connections(connection.peer_id) if c.muxed_conn is connection]
        endpoint = remote_endpoint(raw_of(own[0])) if own else None
        return "" if endpoint is None else endpoint.ip

    async def upgrade_inbound_raw_conn(
        self, raw_conn: IRawConnection, maddr: Multiaddr
    ) -> IMuxedConn:
        """Serve an accepted connection for a few seconds, if its address may have one.

        Raises:
            SwarmException: Always, so that libp2p gives its slot back: it has ended.
        """
        assert isinstance(raw_conn, RawConnection)
        endpoint = remote_endpoint(raw_conn)
        source = "" if endpoint is None else neighbourhood(endpoint.ip)
        greeted = GreetedConnection(raw_conn)
        try:
            with self._seat(source), trio.move_on_after(self._door_limits.connection_s):
                await super().upgrade_inbound_raw_conn(greeted, maddr)
        finally:
            self._end(greeted)
            with trio.CancelScope(shield=True):
                await raw_conn.close()
        raise SwarmException("its time is over")

    @contextmanager
    def _seat(self, source: str) -> Generator[None]:
        if self._seats[source] >= self._door_limits.max_connections_per_source:
            raise SwarmException("too many connections from one address")
        now = trio.current_time()
        if self._arrivals.size > MAX_SOURCES:
            self._arrivals.purge(now)
        if not self._arrivals.allows(source, now):
            raise SwarmException("too many connections from one address in a short time")
        self._seats[source] += 1
        try:
            yield
        finally:
            self._seats[source] -= 1
            if not self._seats[source]:
                del self._seats[source]

    def _end(self, raw: IRawConnection) -> None:
        for connection in self.get_connections():
            if raw_of(connection) is raw:
                abort(connection.muxed_conn)

    # --- knocking --------------------------------------------------------------------

    async def call(self, peer: PeerId, address: Multiaddr, protocol: str) -> Stream:
        """Connect to a door and open the one stream.

        Raises:
            PeerUnreachable: Nobody answers there in time, or somebody else does.
        """
        try:
            with trio.fail_after(2 * self._door_limits.handshake_s):
                connections = await self.dial_peer(ID.from_base58(peer), (address,), detour=False)
                opened = await connections[0].new_stream()
                opened.set_protocol(TProtocol(protocol))
                await MultiselectClient().select_one_of(
                    [TProtocol(protocol)], MultiselectCommunicator(_Greeting(opened))
                )
        except (BaseLibp2pError, UnicodeDecodeError, trio.TooSlowError) as error:
            raise PeerUnreachable(peer=peer, problem=str(error) or "no answer") from error
        return Stream(opened, write_s=self._door_limits.write_s)


async def _refuse(net_stream: INetStream) -> None:
    await net_stream.reset()


class _Greeting(ReadWriteCloser):
    """A stream of which only so much is read; what libp2p reads whole has no limit of its own."""

    def __init__(self, stream: INetStream) -> None:
        self._stream = stream
        self._left = GREETING_BYTES

    async def read(self, n: int | None = None) -> bytes:
        if n is None or n > self._left:
            raise IOException("too long a greeting")
        data = await self._stream.read(n)
        self._left -= len(data)
        return data

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def close(self) -> None:
        await self._stream.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._stream.get_remote_address()
