"""What lies under a secured connection: a socket, or a stream through a relaying member."""

# pyright: reportMissingTypeStubs=false
# Reason: multiaddr and parts of libp2p ship no types.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import trio
from libp2p.abc import IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from multiaddr import Multiaddr

from pals.errors import PeerUnreachable
from pals.net.nat.addresses import Endpoint
from pals.types import PeerId

GREETING_BYTES = 16 << 10
"""What one side may say before a protocol is agreed on: more than it takes by far."""
RELAYED_READ_BYTES = 1 << 18
RELAYED_WRITE_BYTES = 1 << 16
"""One write through a relay, so that its deadline is one of few bytes."""


@dataclass(frozen=True, slots=True)
class Path:
    """How two members are connected.

    Attributes:
        kind: Dialled; dialled by both at once through their NATs; or through a member.
        relay: That member.
    """

    kind: Literal["direct", "punched", "relayed"]
    relay: PeerId | None = None


DIRECT = Path("direct")
PUNCHED = Path("punched")


class ByteStream(Protocol):
    """The part of `pals.net.host.Stream` that a circuit runs on."""

    @property
    def peer_id(self) -> PeerId: ...

    async def read_some(self, limit: int) -> bytes: ...

    async def write(self, data: bytes) -> None: ...

    async def reset(self) -> None: ...


class RelayedStream(ReadWriteCloser):
    """A circuit as the bytes under a connection: what a socket is to a direct one.

    Whoever made it waits for ``ended`` and then resets the stream to the relay.
    """

    def __init__(self, stream: ByteStream) -> None:
        self.relay = stream.peer_id
        self.ended = trio.Event()
        self._stream = stream
        self._reading = trio.CancelScope()

    async def read(self, n: int | None = None) -> bytes:
        """Return 1 to ``n`` bytes, or ``b""`` when the circuit ended on purpose.

        Raises:
            ConnectionClosedError: The circuit was cut.
        """
        if self.ended.is_set():
            return b""
        with trio.CancelScope() as self._reading:
            try:
                return await self._stream.read_some(n or RELAYED_READ_BYTES)
            except PeerUnreachable as error:
                raise ConnectionClosedError(str(error)) from error
        return b""

    async def write(self, data: bytes) -> None:
        """Send all of ``data``.

        Raises:
            ConnectionClosedError: The circuit has ended.
        """
        view = memoryview(data)
        for start in range(0, len(data), RELAYED_WRITE_BYTES):
            if self.ended.is_set():
                raise ConnectionClosedError("the circuit has ended")
            try:
                await self._stream.write(bytes(view[start : start + RELAYED_WRITE_BYTES]))
            except PeerUnreachable as error:
                raise ConnectionClosedError(str(error)) from error

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        """End it at once: a read returns, a write fails, the owner resets the stream."""
        self.ended.set()
        self._reading.cancel()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return nothing: the relay alone knows from where the peer comes."""
        return None


class PunchedConnection(RawConnection):
    """A socket that both sides opened by dialling each other at the same time."""


class GreetedConnection(RawConnection):
    """An accepted socket, of which only so much is read before it is secured.

    What libp2p reads whole has no limit of its own. After the handshake the session reads
    the socket itself.
    """

    def __init__(self, raw: RawConnection) -> None:
        super().__init__(raw.stream, raw.is_initiator)
        self._left = GREETING_BYTES

    async def read(self, n: int | None = None) -> bytes:
        if n is None or n > self._left:
            raise IOException("too long a greeting")
        data = await super().read(n)
        self._left -= len(data)
        return data


def limit_greeting(raw: IRawConnection) -> IRawConnection:
    """Bound what an accepted socket may say before it is secured.

    A circuit has bounds of its own, and a punched connection is with somebody chosen.
    """
    assert isinstance(raw, RawConnection)
    is_accepted = type(raw) is RawConnection and isinstance(raw.stream, TrioTCPStream)
    return GreetedConnection(raw) if is_accepted else raw


async def dial_endpoint(endpoint: Endpoint, *, source: Endpoint | None = None) -> RawConnection:
    """Open a TCP connection.

    Args:
        endpoint: Where to.
        source: Bind to this endpoint first, at which this machine listens: behind a NAT
            the connection then leaves by the mapping that a peer dials.

    Raises:
        OSError: Nobody answers there, or the source cannot be bound.
    """
    family = trio.socket.AF_INET6 if endpoint.is_ipv6 else trio.socket.AF_INET
    socket = trio.socket.socket(family, trio.socket.SOCK_STREAM)
    try:
        if source is not None:
            socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
            socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEPORT, 1)
            await socket.bind((source.ip, source.port))
        await socket.connect((endpoint.ip, endpoint.port))
    except BaseException:
        socket.close()
        raise
    stream = TrioTCPStream(trio.SocketStream(socket))
    return RawConnection(stream, True) if source is None else PunchedConnection(stream, True)


def relayed_connection(stream: RelayedStream, *, initiator: bool) -> RawConnection:
    """Return a circuit as a raw connection, to secure like any other."""
    return RawConnection(
        stream,
        initiator,
        ConnectionType.RELAYED,
        [Multiaddr(f"/p2p/{stream.relay}/p2p-circuit")],
    )


def path_of(raw: IRawConnection) -> Path:
    """Return how the peer behind a raw connection is reached."""
    assert isinstance(raw, RawConnection)
    if isinstance(raw.stream, RelayedStream):
        return Path("relayed", raw.stream.relay)
    return PUNCHED if isinstance(raw, PunchedConnection) else DIRECT


def remote_endpoint(raw: IRawConnection) -> Endpoint | None:
    """Return from where a peer comes, or None when it is relayed or already gone."""
    return _named(raw, lambda socket: socket.getpeername())


def local_endpoint(raw: IRawConnection) -> Endpoint | None:
    """Return by which endpoint a connection leaves this machine, or None as above."""
    return _named(raw, lambda socket: socket.getsockname())


def _named(
    raw: IRawConnection, name_of: Callable[[trio.socket.SocketType], tuple[str, int]]
) -> Endpoint | None:
    assert isinstance(raw, RawConnection)
    if not isinstance(raw.stream, TrioTCPStream):
        return None
    try:
        ip, port = name_of(raw.stream.stream.socket)[:2]
        return Endpoint.of(ip, port)
    except (OSError, ValueError):
        return None


def abort_raw(raw: IRawConnection) -> None:
    """Close the socket or the circuit under a connection, without waiting for anything."""
    assert isinstance(raw, RawConnection)
    if isinstance(raw.stream, RelayedStream):
        raw.stream.abort()
        return
    assert isinstance(raw.stream, TrioTCPStream)
    raw.stream.stream.socket.close()
