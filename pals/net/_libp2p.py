"""The py-libp2p swarm, with its unsafe defaults replaced.

`MemberSwarm` overrides what py-libp2p 0.8.1 gets wrong for a long-lived private host:

- an accepted connection keeps its slot for ever, so a host refuses everybody after 250;
- an exception in one stream handler ends the whole host;
- dialling waits 250 ms, tries one address, and blocks a peer that failed for 60 s;
- limits per peer are absent or evict the connection that is in use;
- a connection takes 0.2 s to close;
- it dials every peer it ever heard of until it has half its limit of connections.

Only this package sees libp2p types; everything above works with `pals.net.host`.
"""

# pyright: reportMissingTypeStubs=false
# Reason: multiaddr, noise and parts of libp2p ship no types.

from __future__ import annotations

import ipaddress
import logging
import socket
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import cast
from weakref import WeakValueDictionary

import trio
from libp2p.abc import IMuxedConn, INetConn, INetStream, IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import StreamHandlerFn, TMuxerOptions, TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore, PeerStoreError
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr
from multiaddr.utils import get_network_addrs

from pals.errors import PeerUnreachable
from pals.net.mux import MuxLimits
from pals.net.mux_stream import ReceiveBudget
from pals.net.muxer import MUX_PROTOCOL, MuxedConnection, MuxedStream
from pals.net.noise import Allow, NoiseSession, NoiseTransport
from pals.net.raw import limit_greeting
from pals.net.yamux import BoundedYamux, Muxers, YamuxBytes
from pals.types import PeerId

log = logging.getLogger(__name__)

NOISE_PROTOCOL = TProtocol("/noise")
MAX_DIALS = 64
MAX_ADDRESSES_PER_DIAL = 16
"""Addresses that the caller of a dial names, and as many again that are known."""
MAX_ADDRESSES_PER_NAME = 4
ADDRESS_TTL_S = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimits:
    """What one host spends on others.

    Attributes:
        max_connections: Connections in all, both directions.
        max_connections_per_peer: Connections with one peer; a further one is refused.
        max_streams_per_peer: Streams that one peer holds open at this host.
        max_unread_bytes_per_peer: Bytes that one peer may have sent and nobody has read.
        max_handshakes: Inbound handshakes in flight; the oldest makes room for a new one.
        handshake_s: Seconds for one handshake, and for one dial.
        idle_s: Seconds after which a connection that has no stream is closed.
        write_s: Seconds in which a peer must take some of what is written to it.
        ping_after_s: Seconds of silence after which a peer is asked whether it is there.
        pong_s: Seconds in which it must say anything then.
    """

    max_connections: int = 512
    max_connections_per_peer: int = 4
    max_streams_per_peer: int = 64
    max_unread_bytes_per_peer: int = 16 << 20
    max_handshakes: int = 32
    handshake_s: float = 5.0
    idle_s: float = 60.0
    write_s: float = 10.0
    ping_after_s: float = 15.0
    pong_s: float = 10.0

    @property
    def mux(self) -> MuxLimits:
        """What of it one connection keeps to."""
        return MuxLimits(
            max_inbound_streams=self.max_streams_per_peer,
            write_s=self.write_s,
            idle_s=self.idle_s,
            ping_after_s=self.ping_after_s,
            pong_s=self.pong_s,
        )


DETOUR_AFTER_S = 1.0
"""Seconds that a dial has for itself before another way is tried beside it."""
DETOUR_S = 7.0
"""Seconds more that a dial takes where there is another way."""

Detour = Callable[[PeerId, tuple[PeerId, ...]], Awaitable[None]]
"""Connects to a peer that may not be dialled, given members that it may be met at.

Raises `PeerUnreachable` when it cannot.
"""


class DetourFailed(SwarmException):
    """Neither a dial nor the detour reached a peer; ``__cause__`` is the typed error."""


class _NeverConnects(AutoConnector):
    """Stands in for the part of a swarm that dials peers on its own account."""

    async def maybe_connect(self) -> None:
        return


class MemberConn(SwarmConn):
    """A connection that closes at once; stock waits 0.1 s for whoever uses its streams."""

    async def _cleanup(self) -> None:
        self.swarm.remove_conn(self)
        for stream in self.get_streams():
            await _reset_quietly(stream)
        await self._notify_disconnected()


class MemberSwarm(Swarm):
    """A swarm that only members may join, and that outlives what its peers do."""

    def __init__(self, key_pair: KeyPair, *, allow: Allow, limits: HostLimits) -> None:
        peer_id = ID.from_pubkey(key_pair.public_key)
        peerstore = PeerStore()
        peerstore.add_key_pair(peer_id, key_pair)
        noise = NoiseTransport(key_pair, allow=allow, write_deadline_s=limits.write_s)
        super().__init__(
            peer_id,
            peerstore,
            TransportUpgrader({NOISE_PROTOCOL: noise}, {}),
            [TCP()],
            RetryConfig(max_retries=0),
            _connection_config(limits),
        )
        self.upgrader.muxer_multistream = self._muxers()
        self.auto_connector = _NeverConnects(self)
        self.allow = allow
        self._limits = limits
        self._handshakes: OrderedDict[int, trio.CancelScope] = OrderedDict()
        self._inbound_streams: defaultdict[ID, int] = defaultdict(int)
        self._budgets: WeakValueDictionary[ID, ReceiveBudget] = WeakValueDictionary()
        self._dial_locks: WeakValueDictionary[tuple[ID | Multiaddr, ...], trio.Lock] = (
            WeakValueDictionary()
        )
        self._dials = trio.CapacityLimiter(MAX_DIALS)
        self.on_connect: list[Callable[[PeerId], None]] = []
        self.detour: Detour | None = None
        self.on_connection: list[Callable[[PeerId], None]] = []
        self.on_disconnect: list[Callable[[PeerId], None]] = []

    def _muxers(self) -> Muxers:
        """Our own muxer first, stock's for members that are not Pals."""

        def make_own(conn: ISecureConn, peer_id: ID) -> MuxedConnection:
            budget = self._budgets.setdefault(
                peer_id, ReceiveBudget(self._limits.max_unread_bytes_per_peer)
            )
            return MuxedConnection(conn, peer_id, limits=self._limits.mux, budget=budget)

        def make_stock(conn: ISecureConn, peer_id: ID) -> BoundedYamux:
            return BoundedYamux(
                conn,
                peer_id,
                max_unread_bytes=self._limits.max_unread_bytes_per_peer,
                idle_s=self._limits.idle_s,
            )

        makers = {MUX_PROTOCOL: make_own, YAMUX_PROTOCOL: make_stock}
        return Muxers(cast("TMuxerOptions", makers))

    def live_connections(self, peer: ID) -> list[INetConn]:
        return [conn for conn in self.get_connections(peer) if not conn.is_closed]

    # --- dialling --------------------------------------------------------------------

    async def dial_peer(
        self,
        peer_id: ID,
        named: Sequence[Multiaddr] = (),
        meeting: tuple[PeerId, ...] = (),
        *,
        detour: bool = True,
    ) -> list[INetConn]:
        """Return the connections to a member, dialling all its addresses at once.

        Replaces the stock method, which is what every part of libp2p calls to dial. Each
        set of ``named`` addresses is dialled without waiting for another: a dial of
        addresses that somebody made up must not hold back that of the true ones.

        Args:
            peer_id: The member.
            named: Addresses of it, beside those that are known.
            meeting: Members that the detour may meet it at.
            detour: Whether to try the detour.

        Raises:
            DetourFailed: No address answers in time, and the detour found no way either.
            SwarmException: The peer is no member, or no address answers in time.
        """
        if not self.allow(PeerId(peer_id.to_base58())):
            raise SwarmException(f"{peer_id} is not a live member")
        way = self.detour if detour else None
        detour_s = 0.0 if way is None else DETOUR_S
        with trio.move_on_after(self._limits.handshake_s + detour_s):
            async with self._dial_locks.setdefault((peer_id, *named), trio.Lock()):
                if not self.live_connections(peer_id):
                    candidates = dict.fromkeys((*named, *self.known_addresses(peer_id)))
                    around = None
                    if way is not None:
                        around = partial(way, PeerId(peer_id.to_base58()), meeting)
                    await self._reach(peer_id, tuple(candidates), around)
        connections = self.live_connections(peer_id)
        if not connections:
            raise SwarmException(f"no address of {peer_id} answers")
        return connections

    async def _reach(
        self,
        peer: ID,
        addresses: Sequence[Multiaddr],
        detour: Callable[[], Awaitable[None]] | None,
    ) -> None:
        """Dial a peer; when that takes long or fails, try the detour beside it."""
        dialled, failure = trio.Event(), None
        async with trio.open_nursery() as nursery:

            async def go_round(detour: Callable[[], Awaitable[None]]) -> None:
                nonlocal failure
                with trio.move_on_after(DETOUR_AFTER_S):
                    await dialled.wait()
                try:
                    await detour()
                except PeerUnreachable as error:
                    failure = error
                else:
                    nursery.cancel_scope.cancel()

            if detour is not None:
                nursery.start_soon(go_round, detour)
            with trio.move_on_after(self._limits.handshake_s):
                await self._dial_addresses(peer, addresses)
            if self.live_connections(peer):
                nursery.cancel_scope.cancel()
            dialled.set()
        if failure is not None and not self.live_connections(peer):
            raise DetourFailed(str(failure)) from failure

    def known_addresses(self, peer: ID) -> list[Multiaddr]:
        """Return the last addresses that were learnt of ``peer``."""
        try:
            return self.peerstore.addrs(peer)[-MAX_ADDRESSES_PER_DIAL:]
        except PeerStoreError:
            return []

    async def _dial_addresses(self, peer: ID, addresses: Sequence[Multiaddr]) -> None:
        async with trio.open_nursery() as nursery:

            async def dial(address: Multiaddr, at: Multiaddr) -> None:
                async with self._dials:
                    try:
                        await self.dial_addr(at, peer)
                    except BaseLibp2pError as error:
                        log.debug("dialling %s failed: %s", at, error)
                    else:
                        self.peerstore.add_addrs(peer, [address], ADDRESS_TTL_S)
                        nursery.cancel_scope.cancel()

            async def dial_all(address: Multiaddr) -> None:
                for at in await resolve_address(address):
                    nursery.start_soon(dial, address, at)

            for address in addresses:
                nursery.start_soon(dial_all, address)

    # --- connections -----------------------------------------------------------------

    async def upgrade_inbound_raw_conn(
        self, raw_conn: IRawConnection, maddr: Multiaddr
    ) -> IMuxedConn:
        """Secure an accepted connection, and hold its slot only while it lives.

        The stock caller keeps slot and task until the swarm stops unless this raises.

        Raises:
            SwarmException: The handshake failed, or the connection has ended.
        """
        muxed: IMuxedConn | None = None
        try:
            with self._handshake():
                greeted = limit_greeting(raw_conn)
                muxed = await super().upgrade_inbound_raw_conn(greeted, maddr)
        finally:
            if muxed is None:
                with trio.CancelScope(shield=True):
                    await raw_conn.close()
        if muxed is None:
            raise SwarmException("too many handshakes in flight")
        assert isinstance(muxed, MuxedConnection | BoundedYamux)
        await muxed.event_closed.wait()
        raise SwarmException("connection closed")

    @contextmanager
    def _handshake(self) -> Generator[None]:
        """Count a handshake; one too many ends the oldest, which a flood fills first."""
        if len(self._handshakes) >= self._limits.max_handshakes:
            self._handshakes.popitem(last=False)[1].cancel()
        with trio.CancelScope() as scope:
            self._handshakes[id(scope)] = scope
            try:
                yield
            finally:
                self._handshakes.pop(id(scope), None)

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> MemberConn:
        """Run a connection and register it, unless its peer was removed or has too many.

        Raises:
            SwarmException: The connection was refused or has ended, and is closed.
        """
        connection = MemberConn(muxed_conn, self, direction=direction)
        connection.set_transport_info(
            muxed_conn.get_transport_addresses(), muxed_conn.get_connection_type()
        )
        try:
            self._check(muxed_conn)
            for part in (muxed_conn, connection):
                self.manager.run_task(part.start)
                await part.event_started.wait()
            self._check(muxed_conn)  # what it may do has changed, or others came first
            is_first = not self.live_connections(muxed_conn.peer_id)
            self.connections.setdefault(muxed_conn.peer_id, []).append(connection)
            await self.notify_connected(connection)
        except BaseException:
            abort(muxed_conn)
            with trio.CancelScope(shield=True):
                await connection.close()
            raise
        if is_first:
            for callback in self.on_connect:
                callback(PeerId(muxed_conn.peer_id.to_base58()))
        for callback in self.on_connection:
            callback(PeerId(muxed_conn.peer_id.to_base58()))
        return connection

    def _check(self, muxed_conn: IMuxedConn) -> None:
        peer = muxed_conn.peer_id
        if not self.allow(PeerId(peer.to_base58())):
            raise SwarmException(f"{peer} is not a live member")
        if muxed_conn.is_closed:
            raise SwarmException(f"{peer} has closed the connection")
        if len(self.live_connections(peer)) >= self._limits.max_connections_per_peer:
            raise SwarmException(f"{peer} has too many connections")
        if len(self.get_connections()) >= self._limits.max_connections:
            raise SwarmException("there are too many connections")

    def remove_conn(self, swarm_conn: SwarmConn) -> None:
        """Forget a connection, and tell when it was the last one to its peer."""
        peer = swarm_conn.muxed_conn.peer_id
        had = peer in self.connections
        super().remove_conn(swarm_conn)
        if had and peer not in self.connections:
            for callback in self.on_disconnect:
                callback(PeerId(peer.to_base58()))

    async def drop(self, peer: ID) -> None:
        """Close every connection to ``peer``: the sockets at once, the rest behind them."""
        connections = self.get_connections(peer)
        for connection in connections:
            assert isinstance(connection, SwarmConn)
            abort(connection.muxed_conn)
            self.remove_conn(connection)
        with trio.move_on_after(1.0, shield=True):
            async with trio.open_nursery() as nursery:
                for connection in connections:
                    nursery.start_soon(connection.close)

    # --- streams ---------------------------------------------------------------------

    def set_stream_handler(self, stream_handler: StreamHandlerFn) -> None:
        """Guard the handler that negotiates and serves every inbound stream."""

        async def guarded(stream: INetStream) -> None:
            peer = stream.muxed_conn.peer_id
            is_full = self._inbound_streams[peer] >= self._limits.max_streams_per_peer
            # What runs may end in its time, when a list expires; nothing new begins.
            if is_full or not self.allow(PeerId(peer.to_base58())):
                await _reset_quietly(stream)
                return
            self._inbound_streams[peer] += 1
            try:
                await stream_handler(stream)
            except Exception:  # a fault while serving one stream must not end the host
                log.warning("a stream of peer %s failed", peer, exc_info=True)
                await _reset_quietly(stream)
            finally:
                self._release_stream(peer)

        super().set_stream_handler(guarded)

    def _release_stream(self, peer: ID) -> None:
        self._inbound_streams[peer] -= 1
        if not self._inbound_streams[peer]:
            del self._inbound_streams[peer]


def abort(muxed_conn: IMuxedConn) -> None:
    """Close a muxed connection at once, without a word to its peer."""
    if isinstance(muxed_conn, MuxedConnection):
        muxed_conn.abort()
        return
    assert isinstance(muxed_conn, BoundedYamux)
    assert isinstance(muxed_conn.secured_conn, NoiseSession)
    muxed_conn.secured_conn.abort()


def bytes_of(stream: INetStream, *, write_s: float) -> MuxedStream | YamuxBytes:
    """Return what a stream is read and written by, past libp2p's locks and states."""
    assert isinstance(stream, NetStream)
    if isinstance(stream.muxed_stream, MuxedStream):
        return stream.muxed_stream
    return YamuxBytes(stream, write_s=write_s)


def raw_of(connection: INetConn) -> IRawConnection:
    """Return the socket or circuit under a connection of this swarm."""
    assert isinstance(connection, SwarmConn)
    muxed_conn = connection.muxed_conn
    assert isinstance(muxed_conn, MuxedConnection | BoundedYamux)
    assert isinstance(muxed_conn.secured_conn, NoiseSession)
    return muxed_conn.secured_conn.raw


def build_host(seed: bytes, *, allow: Allow, limits: HostLimits) -> tuple[BasicHost, MemberSwarm]:
    """Return a host for the Ed25519 key ``seed`` (32 bytes), not yet running."""
    # It logs every refused stranger and every closed stream as an error, with values
    # that a peer chose; what matters reaches the caller as an exception.
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    logging.getLogger("libp2p.network.auto_connector").setLevel(logging.CRITICAL)
    swarm = MemberSwarm(create_new_key_pair(seed), allow=allow, limits=limits)
    host = BasicHost(swarm, addrs_factory=expand_wildcards, disable_identify_address_discovery=True)
    return host, swarm


def parse_address(text: str) -> Multiaddr:
    """Read a multiaddr and drop its ``/p2p/`` part; the peer id is known apart.

    Raises:
        ValueError: ``text`` is not a TCP multiaddr.
    """
    address = Multiaddr(text)
    names = [protocol.name for protocol in address.protocols()]
    if len(names) < 2 or names[0] not in ("ip4", "ip6", "dns", "dns4", "dns6"):
        raise ValueError("not a TCP address")
    if names[1:] not in (["tcp"], ["tcp", "p2p"]):
        raise ValueError("not a TCP address")
    return address.decapsulate_code(_P2P_CODE) if names[-1] == "p2p" else address


_P2P_CODE = 0x01A5


async def resolve_address(address: Multiaddr) -> list[Multiaddr]:
    """Return the IP addresses that a name stands for on this machine, at most a few.

    libp2p asks a DNS server itself, which knows nothing of the system's own names.
    """
    protocol = next(iter(address.protocols())).name
    if protocol not in _FAMILIES:
        return [address]
    host, port = host_and_port(address)
    family = _FAMILIES[protocol]
    try:
        found = await trio.socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        log.debug("resolving %s failed: %s", address, error)
        return []
    versions = {socket.AF_INET: 4, socket.AF_INET6: 6}
    resolved = {f"/ip{versions[f]}/{at[0]}/tcp/{port}": None for f, _, _, _, at in found}
    return [Multiaddr(text) for text in resolved if "%" not in text][:MAX_ADDRESSES_PER_NAME]


_FAMILIES = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}


def host_and_port(address: Multiaddr) -> tuple[str, int]:
    _, host, _, port = str(address).strip("/").split("/")
    return host, int(port)


def expand_wildcards(addresses: list[Multiaddr]) -> list[Multiaddr]:
    """Replace ``0.0.0.0`` and ``::`` by the addresses of this machine's interfaces.

    Loopback is given only by a machine that has nothing else.
    """
    expanded: dict[str, None] = {}
    for address in addresses:
        host, port = host_and_port(address)
        ip = ipaddress.ip_address(host)
        hosts = [host]
        if ip.is_unspecified:
            hosts = get_network_addrs(ip.version) or ["127.0.0.1" if ip.version == 4 else "::1"]
        expanded |= dict.fromkeys(f"/ip{ip.version}/{h}/tcp/{port}" for h in hosts)
    return [Multiaddr(text) for text in expanded]


def _connection_config(limits: HostLimits) -> ConnectionConfig:
    return ConnectionConfig(
        max_connections=limits.max_connections,
        min_connections=0,
        low_watermark=0,
        high_watermark=limits.max_connections,
        max_connections_per_peer=limits.max_connections_per_peer,
        dial_timeout=limits.handshake_s,
        inbound_upgrade_timeout=limits.handshake_s,
        outbound_upgrade_timeout=limits.handshake_s,
        outbound_stream_protocol_negotiation_timeout=limits.handshake_s,
        inbound_stream_protocol_negotiation_timeout=limits.handshake_s,
    )


async def _reset_quietly(stream: INetStream) -> None:
    with suppress(BaseLibp2pError):
        await stream.reset()
