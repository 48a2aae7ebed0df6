"""The libp2p host as the rest of Pals sees it: members, streams of bytes, typed errors."""

# pyright: reportMissingTypeStubs=false
# Reason: multiaddr, noise and parts of libp2p ship no types.

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import cast

import trio
from libp2p.abc import INetConn, INetStream, IRawConnection
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost
from libp2p.host.ping import ID as PING_PROTOCOL
from libp2p.host.ping import PING_LENGTH
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.exceptions import MuxedStreamEOF
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from pals.errors import InvalidConfig, PalsError, PeerUnreachable, PortInUse
from pals.net._libp2p import (
    MAX_ADDRESSES_PER_DIAL,
    Detour,
    DetourFailed,
    HostLimits,
    MemberSwarm,
    build_host,
    bytes_of,
    host_and_port,
    parse_address,
    raw_of,
)
from pals.net.nat.addresses import Endpoint, endpoints_in, meeting_peers
from pals.net.raw import Path, abort_raw, dial_endpoint, local_endpoint, path_of, remote_endpoint
from pals.swarm.identity import Identity
from pals.types import Buffer, PeerId

__all__ = ["Host", "HostLimits", "Stream", "StreamHandler", "open_host", "ungrouped_errors"]

log = logging.getLogger(__name__)

CLOSE_S = 3.0
CONNECT_S = 8.0
"""Seconds to reach a member: a dial, hole punching, and a relay after it."""
PING_DEADLINE_S = 5.0
MAX_ADDRESSES_READ = 64


class Stream:
    """One ordered, reliable stream of bytes with a member.

    One task reads and any number write; writes do not mix. A cancelled read has taken
    nothing, but a cancelled `read_exactly` may have: `reset` the stream after it.
    """

    def __init__(self, stream: INetStream, *, write_s: float) -> None:
        self._stream = stream
        self._bytes = bytes_of(stream, write_s=write_s)
        self.peer_id = PeerId(stream.muxed_conn.peer_id.to_base58())

    async def read_some(self, limit: int) -> bytes:
        """Return 1 to ``limit`` bytes, or ``b""`` when the peer has closed its side.

        Raises:
            PeerUnreachable: The stream was reset or the connection is gone.
        """
        try:
            return await self._bytes.read(limit)
        except MuxedStreamEOF:
            return b""
        except BaseLibp2pError as error:
            raise self._unreachable(error) from error

    async def read_exactly(self, n: int) -> bytes:
        """Return exactly ``n`` bytes, however many reads that takes.

        Raises:
            PeerUnreachable: The stream ended before that.
        """
        received = bytearray()
        while len(received) < n:
            part = await self.read_some(n - len(received))
            if not part:
                problem = f"the stream ended after {len(received)} of {n} bytes"
                raise PeerUnreachable(peer=self.peer_id, problem=problem)
            received += part
        return bytes(received)

    async def write(self, data: Buffer) -> None:
        """Write all of ``data``; a cancellation takes effect before or after, never within.

        ``data`` must not change until this returns or raises.

        Raises:
            PeerUnreachable: The stream is closed, or the peer takes nothing of it for so
                long that it was reset.
        """
        try:
            await self._bytes.write(data)
        except BaseLibp2pError as error:
            raise self._unreachable(error) from error

    def try_write(self, data: Buffer) -> bool:
        """Write all of ``data`` if that waits for nothing, else none of it; return which.

        Raises:
            PeerUnreachable: The stream is closed.
        """
        try:
            return self._bytes.try_write(data)
        except BaseLibp2pError as error:
            raise self._unreachable(error) from error

    def deliver_to(self, take: Callable[[bytes], None]) -> None:
        """Have ``take`` called with bytes as they come, where the muxer can do that.

        `read_some` goes on to return what it cannot, what came before, and the end.

        Args:
            take: Runs on the task that reads the connection: it raises nothing.
        """
        self._bytes.deliver_to(take)

    async def close(self) -> None:
        """Tell the peer that nothing more will be written."""
        with suppress(BaseLibp2pError, ValueError):
            await self._stream.close()

    async def reset(self) -> None:
        """End both directions at once."""
        with suppress(BaseLibp2pError, ValueError):
            await self._stream.reset()

    def _unreachable(self, error: BaseLibp2pError) -> PeerUnreachable:
        return PeerUnreachable(peer=self.peer_id, problem=f"the stream ended: {error}")


StreamHandler = Callable[[Stream], Awaitable[None]]


class Host:
    """A running libp2p node; `open_host` makes it."""

    def __init__(self, host: BasicHost, swarm: MemberSwarm, limits: HostLimits) -> None:
        self._host = host
        self._swarm = swarm
        self._limits = limits
        self._advertised: tuple[str, ...] | None = None
        self.advertised = trio.Event()
        self.peer_id = PeerId(host.get_id().to_base58())

    @property
    def libp2p_host(self) -> BasicHost:
        """The host beneath, for the protocols of libp2p itself (discovery)."""
        return self._host

    def addresses(self) -> tuple[str, ...]:
        """Return the multiaddrs to tell others, each with ``/p2p/`` and this id."""
        if self._advertised is not None:
            return self._advertised
        return tuple(map(str, self._host.get_addrs()))

    def advertise(self, addresses: Sequence[str]) -> None:
        """Tell others ``addresses`` from now on; ``advertised`` is set when they differ.

        Args:
            addresses: Multiaddrs, most useful first, with or without this peer's id.
        """
        own = f"/p2p/{self.peer_id}"
        named = tuple(a if a.endswith(own) else a + own for a in addresses)
        if set(named) != set(self.addresses()):
            self.advertised.set()
            self.advertised = trio.Event()
        self._advertised = named

    def listening(self) -> tuple[Endpoint, ...]:
        """Return the endpoints of this machine's interfaces at which it listens."""
        return endpoints_in(map(str, self._host.get_addrs()))

    def bound(self) -> tuple[Endpoint, ...]:
        """Return the endpoints of the listening sockets, which may be unspecified addresses."""
        return endpoints_in(map(str, self._host.get_transport_addrs()))

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve ``protocol``: one call of ``handler`` for each stream a member opens.

        The stream is closed when the handler returns and reset when it raises.
        """

        async def serve(net_stream: INetStream) -> None:
            stream = Stream(net_stream, write_s=self._limits.write_s)
            try:
                await handler(stream)
            except PalsError as error:
                log.info("%s with peer %s ended: %r", protocol, stream.peer_id, error)
                await stream.reset()
            else:
                await stream.close()

        self._host.set_stream_handler(TProtocol(protocol), serve)

    def is_member(self, peer: PeerId) -> bool:
        """Return whether ``peer`` is a live member now."""
        return self._swarm.allow(peer)

    async def connect(
        self, peer: PeerId, addresses: Sequence[str], *, deadline_s: float = CONNECT_S
    ) -> None:
        """Connect to a member, trying ``addresses`` and some already known at once.

        Of ``addresses``, which anybody may have made up, the first `MAX_ADDRESSES_PER_DIAL`
        usable ones are tried, and only one that the member answers at is remembered.

        Raises:
            PeerUnreachable: It is no member, no address is usable, or none answers.
        """
        target = _libp2p_id(peer)
        meeting = meeting_peers(addresses[:MAX_ADDRESSES_READ], peer)
        with trio.move_on_after(deadline_s):
            try:
                await self._swarm.dial_peer(target, _usable(target, addresses), meeting)
            except BaseLibp2pError as error:
                raise _unreachable(peer, error) from error
            return
        raise PeerUnreachable(peer=peer, problem=f"no answer within {deadline_s} s")

    async def connect_directly(self, peer: PeerId) -> None:
        """Connect to a member at the addresses that are known, and by no detour.

        Raises:
            PeerUnreachable: It is no member, or no known address answers in time.
        """
        try:
            await self._swarm.dial_peer(_libp2p_id(peer), detour=False)
        except BaseLibp2pError as error:
            raise _unreachable(peer, error) from error

    async def open_stream(
        self,
        peer: PeerId,
        protocol: str,
        *,
        deadline_s: float = CONNECT_S,
        connected_only: bool = False,
    ) -> Stream:
        """Open a stream to a member, connecting first where needed.

        Args:
            peer: The member.
            protocol: What to speak.
            deadline_s: Seconds for all of it.
            connected_only: Fail rather than dial.

        Raises:
            PeerUnreachable: It cannot be reached or does not serve ``protocol``.
        """
        target = _libp2p_id(peer)
        if connected_only and not self._swarm.live_connections(target):
            raise PeerUnreachable(peer=peer, problem="not connected")
        with trio.move_on_after(deadline_s):
            try:
                await self._swarm.dial_peer(target, detour=not connected_only)
                stream = await self._host.new_stream(target, [TProtocol(protocol)])
            except BaseLibp2pError as error:
                raise _unreachable(peer, error) from error
            return Stream(stream, write_s=self._limits.write_s)
        raise PeerUnreachable(peer=peer, problem=f"no answer within {deadline_s} s")

    # --- other ways than dialling ----------------------------------------------------

    def set_detour(self, detour: Detour | None) -> None:
        """Ask ``detour`` for a connection wherever dialling fails or takes long."""
        self._swarm.detour = detour

    async def connect_from_port(self, peer: PeerId) -> None:
        """Connect to a connected member once more, from the port at which this one listens.

        Raises:
            PeerUnreachable: It cannot be dialled where it is connected.
        """
        ports = {endpoint.port for endpoint in self.bound()}
        raws = [raw_of(connection) for connection in self._connections(peer)]
        if any(own.port in ports for own in map(local_endpoint, raws) if own is not None):
            return
        pairs = ((source, to) for to in self.observed(peer) for source in self.bound())
        pair = next((p for p in pairs if p[0].is_ipv6 == p[1].is_ipv6), None)
        if pair is None:
            raise PeerUnreachable(peer=peer, problem="no connection to copy")
        try:
            with trio.fail_after(self._limits.handshake_s):
                raw = await dial_endpoint(pair[1], source=pair[0])
        except (OSError, trio.TooSlowError) as error:
            raise PeerUnreachable(peer=peer, problem=str(error)) from error
        await self.secure_outbound(raw, peer)

    async def open_on_each(self, peer: PeerId, protocol: str) -> list[Stream]:
        """Open a stream on each connection with a peer.

        Raises:
            PeerUnreachable: One of them is lost, or it does not serve ``protocol``.
        """
        streams: list[Stream] = []
        for connection in self._connections(peer):
            try:
                with trio.fail_after(self._limits.handshake_s):
                    opened = await connection.new_stream()
                    opened.set_protocol(TProtocol(protocol))
                    await self._host.multiselect_client.select_one_of(
                        [TProtocol(protocol)], MultiselectCommunicator(opened)
                    )
            except (BaseLibp2pError, trio.TooSlowError) as error:
                raise PeerUnreachable(peer=peer, problem=str(error)) from error
            streams.append(Stream(opened, write_s=self._limits.write_s))
        return streams

    async def secure_outbound(self, raw: IRawConnection, peer: PeerId) -> None:
        """Make a connection to a member out of a socket or circuit, as its initiator.

        Raises:
            PeerUnreachable: Somebody else is there, or the handshake failed.
        """
        try:
            with trio.fail_after(self._limits.handshake_s):
                await self._swarm.upgrade_outbound_raw_conn(raw, _libp2p_id(peer))
        except BaseException as error:
            abort_raw(raw)
            if isinstance(error, BaseLibp2pError | trio.TooSlowError):
                raise PeerUnreachable(peer=peer, problem=f"no handshake: {error}") from error
            raise

    async def serve_inbound(self, raw: IRawConnection, remote: str) -> None:
        """Make a connection out of a socket or circuit, as its responder.

        Returns when the connection has ended, or none came of it.

        Args:
            raw: The socket or circuit.
            remote: Multiaddr to name it by.
        """
        with suppress(BaseLibp2pError):
            await self._swarm.upgrade_inbound_raw_conn(raw, Multiaddr(remote))

    async def is_at(self, peer: PeerId, endpoint: Endpoint) -> bool:
        """Dial an endpoint and return whether ``peer`` proves to be there; keep nothing."""
        try:
            raw = await dial_endpoint(endpoint)
        except OSError:
            return False
        try:
            await self._swarm.upgrader.upgrade_security(raw, True, _libp2p_id(peer))
        except BaseLibp2pError:
            return False
        finally:
            with trio.CancelScope(shield=True):
                await raw.close()
        return True

    # --- connections -----------------------------------------------------------------

    def path(self, peer: PeerId) -> Path | None:
        """Return the best way by which ``peer`` is connected, which new streams take."""
        paths = [path_of(raw_of(c)) for c in self._connections(peer)]
        return min(paths, key=lambda path: path.relay is not None, default=None)

    def observed(self, peer: PeerId) -> tuple[Endpoint, ...]:
        """Return the endpoints that a directly connected peer comes from."""
        found = (remote_endpoint(raw_of(c)) for c in self._connections(peer))
        return tuple(endpoint for endpoint in found if endpoint is not None)

    async def round_trip_s(self, peer: PeerId, *, deadline_s: float = PING_DEADLINE_S) -> float:
        """Return the seconds that one small message takes to a connected peer and back.

        Raises:
            PeerUnreachable: It is not connected, or does not answer in time.
        """
        stream = await self.open_stream(peer, PING_PROTOCOL, connected_only=True)
        try:
            with trio.move_on_after(deadline_s):
                started_s = time.perf_counter()
                await stream.write(bytes(PING_LENGTH))
                await stream.read_exactly(PING_LENGTH)
                return time.perf_counter() - started_s
            raise PeerUnreachable(peer=peer, problem=f"no answer within {deadline_s} s")
        finally:
            with trio.move_on_after(1.0, shield=True):
                await stream.reset()

    def _connections(self, peer: PeerId) -> list[INetConn]:
        return self._swarm.live_connections(_libp2p_id(peer))

    async def drop_idle_relayed(self, peer: PeerId) -> None:
        """Close relayed connections with ``peer`` that carry no stream."""
        for connection in self._connections(peer):
            relayed = path_of(raw_of(connection)).kind == "relayed"
            if relayed and not connection.get_streams():
                await connection.close()

    async def drop_peer(self, peer: PeerId) -> None:
        """Close every connection to ``peer`` at once, as after its removal."""
        await self._swarm.drop(ID.from_base58(peer))

    def connected_peers(self) -> frozenset[PeerId]:
        peers = self._swarm.connections
        return frozenset(PeerId(p.to_base58()) for p in peers if self._swarm.live_connections(p))

    def known_addresses(self, peer: PeerId) -> tuple[str, ...]:
        """Return where a peer was reached or said that it listens, latest last."""
        return tuple(map(str, self._swarm.known_addresses(_libp2p_id(peer))))

    def on_connect(self, callback: Callable[[PeerId], None]) -> None:
        """Call back when there is a first connection to a peer; it must not block or raise."""
        self._swarm.on_connect.append(callback)

    def on_connection(self, callback: Callable[[PeerId], None]) -> None:
        """Call back at each new connection to a peer; it must not block or raise."""
        self._swarm.on_connection.append(callback)

    def on_disconnect(self, callback: Callable[[PeerId], None]) -> None:
        """Call back when the last connection to a peer ends; it must not block or raise."""
        self._swarm.on_disconnect.append(callback)


@asynccontextmanager
async def open_host(
    identity: Identity,
    *,
    listen: str,
    allow: Callable[[PeerId], bool],
    limits: HostLimits | None = None,
) -> AsyncGenerator[Host]:
    """Run a host that speaks Noise over TCP with members only.

    Args:
        identity: This machine's Ed25519 identity.
        listen: Multiaddr to listen on, such as ``/ip4/0.0.0.0/tcp/0``.
        allow: Says whether a peer is a live member; asked at every handshake and dial.
        limits: What the host spends on others.

    Raises:
        InvalidConfig: ``listen`` is not a TCP multiaddr.
        PortInUse: The address cannot be bound.
    """
    async with _running(identity, [check_listen_address(listen)], allow, limits) as host:
        yield host


@asynccontextmanager
async def open_caller(
    identity: Identity, *, allow: Callable[[PeerId], bool], limits: HostLimits | None = None
) -> AsyncGenerator[Host]:
    """Run a host that listens nowhere, to call a member that ``allow`` knows."""
    async with _running(identity, [], allow, limits) as host:
        yield host


@asynccontextmanager
async def _running(
    identity: Identity,
    addresses: list[Multiaddr],
    allow: Callable[[PeerId], bool],
    limits: HostLimits | None,
) -> AsyncGenerator[Host]:
    limits = limits or HostLimits()
    host, swarm = build_host(identity.reveal_seed(), allow=allow, limits=limits)
    with ungrouped_errors():
        async with host.run(addresses):
            try:
                if len(swarm.listeners) < len(addresses):
                    raise port_in_use(addresses[0], "the address cannot be bound")
                yield Host(host, swarm, limits)
            finally:
                with trio.move_on_after(CLOSE_S, shield=True):
                    await _close(host, swarm)


@contextmanager
def ungrouped_errors() -> Generator[None]:
    """Raise the one typed error of a group instead of the group.

    A nursery wraps whatever its block raises in an ``ExceptionGroup``, even when nothing
    else failed; a caller of a context manager that holds one expects the typed error.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        leaves = _leaves(group)
        if len(leaves) == 1 and isinstance(leaves[0], PalsError):
            raise leaves[0] from leaves[0].__cause__
        raise


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    group = cast("BaseExceptionGroup[BaseException]", error)
    return [leaf for member in group.exceptions for leaf in _leaves(member)]


async def _close(host: BasicHost, swarm: MemberSwarm) -> None:
    """Close all connections at the same time: one after another costs 0.2 s each."""
    async with trio.open_nursery() as nursery:
        for peer in list(swarm.connections):
            nursery.start_soon(swarm.drop, peer)
    await host.close()


def _usable(peer: ID, addresses: Sequence[str]) -> list[Multiaddr]:
    """Return the first different addresses that can be dialled."""
    usable: dict[Multiaddr, None] = {}
    for text in addresses[:MAX_ADDRESSES_READ]:
        try:
            usable[parse_address(text)] = None
        except (MultiaddrError, ValueError) as error:
            log.debug("address %r of peer %s is not usable: %s", text, peer, error)
    return list(usable)[:MAX_ADDRESSES_PER_DIAL]


def _unreachable(peer: PeerId, error: BaseLibp2pError) -> PeerUnreachable:
    if isinstance(error, DetourFailed) and isinstance(error.__cause__, PeerUnreachable):
        return error.__cause__
    return PeerUnreachable(peer=peer, problem=str(error))


def _libp2p_id(peer: PeerId) -> ID:
    try:
        return ID.from_base58(peer)
    except ValueError as error:
        raise PeerUnreachable(peer=peer, problem="that is not a peer id") from error


def check_listen_address(listen: str) -> Multiaddr:
    """Read an address to listen on, at which nobody listens yet.

    Raises:
        InvalidConfig: It is not a TCP multiaddr of an IP address.
        PortInUse: Another process serves its port.
    """
    try:
        address = parse_address(listen)
        ipaddress.ip_address(host_and_port(address)[0])
    except (MultiaddrError, ValueError) as error:
        raise InvalidConfig(
            source=f"listen address `{listen}`",
            problem="not a TCP multiaddr",
            advice="write it as `/ip4/0.0.0.0/tcp/4001`",
        ) from error
    _probe_port(address)
    return address


def _probe_port(address: Multiaddr) -> None:
    """Refuse a port that another process serves: libp2p binds with SO_REUSEPORT.

    Two processes would then share the port, and each get half of the connections.
    """
    host, port = host_and_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise port_in_use(address, error.strerror or str(error)) from error


def port_in_use(address: Multiaddr, problem: str) -> PortInUse:
    """Return the error of an address that cannot be bound."""
    host, port = host_and_port(address)
    return PortInUse(host=host, port=port, problem=problem)
