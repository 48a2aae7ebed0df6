"""Noise as the only secure transport: the stock handshake, our record layer, the peer gate.

The handshake (Noise_XX_25519_ChaChaPoly_SHA256 with libp2p's signed payload) is
py-libp2p's. The record layer is our own, on the same wire format: one receive takes
many records, one write is one send, and a send is never cut half-way, because half a
record on the wire stalls every stream of the connection.

Source: libp2p specs, noise/README.md.
"""

# pyright: reportMissingTypeStubs=false
# Reason: multiaddr, noise and parts of libp2p ship no types.

from __future__ import annotations

import struct
from collections.abc import Callable

import trio
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.io.exceptions import ConnectionClosedError, IncompleteReadError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.base_session import BaseSession
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.noise.transport import Transport
from libp2p.security.secure_session import SecureSession
from multiaddr import Multiaddr
from noise.exceptions import NoiseInvalidMessage

from pals.types import PeerId

MAX_PLAINTEXT_BYTES = 65535 - 16
RECEIVE_BYTES = 1 << 18
MAX_READ_BYTES = 16 << 20
_LENGTH = struct.Struct(">H")

Allow = Callable[[PeerId], bool]


class NoiseTransport(Transport):
    """The stock Noise handshake, with the peer gate on both sides of it.

    Inbound, a peer off the list gets its connection closed as soon as Noise has proved
    its id, before a muxer or any protocol is named. Outbound, it is not even greeted.
    """

    def __init__(self, key_pair: KeyPair, *, allow: Allow, write_deadline_s: float) -> None:
        super().__init__(key_pair, noise_privkey=create_x25519_key_pair().private_key)
        self._allow = allow
        self._write_deadline_s = write_deadline_s

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        session = await super().secure_inbound(conn)
        await self._check(session.get_remote_peer(), conn)
        return self._wrap(session, conn)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        await self._check(peer_id, conn)
        return self._wrap(await super().secure_outbound(conn, peer_id), conn)

    async def _check(self, peer: ID, conn: IRawConnection) -> None:
        if not self._allow(PeerId(peer.to_base58())):
            await conn.close()
            raise HandshakeFailure(f"peer {peer} is not a live member")

    def _wrap(self, session: ISecureConn, conn: IRawConnection) -> NoiseSession:
        assert isinstance(session, SecureSession)
        return NoiseSession(session, conn, write_deadline_s=self._write_deadline_s)


class NoiseSession(BaseSession):
    """The record layer of one connection; what the muxer reads and writes."""

    def __init__(
        self, session: SecureSession, raw: IRawConnection, *, write_deadline_s: float
    ) -> None:
        super().__init__(
            local_peer=session.local_peer,
            local_private_key=session.local_private_key,
            remote_peer=session.remote_peer,
            remote_permanent_pubkey=session.remote_permanent_pubkey,
            is_initiator=session.is_initiator,
        )
        assert isinstance(session.conn, NoiseTransportReadWriter)
        self._cipher = session.conn.noise_state
        self._raw = raw
        self._write_deadline_s = write_deadline_s
        self._write_lock = trio.Lock()
        self._received = bytearray()
        self._plaintext = bytearray()

    async def write(self, data: bytes) -> None:
        """Send ``data`` as one or more records, all of them or the connection closes.

        Raises:
            ConnectionClosedError: The peer is gone, or did not take the bytes in time.
        """
        async with self._write_lock:
            await self._send(self._seal(data))

    async def read(self, n: int | None = None) -> bytes:
        """Return exactly ``n`` bytes, or with ``None`` what one receive brings.

        Raises:
            IncompleteReadError: The connection ended first.
            RawConnError: A record does not open, or the muxer was told to expect more
                than 16 MiB at once; the connection is closed.
        """
        if n == 0:
            return b""
        if n is not None and n > MAX_READ_BYTES:
            self.abort()
            raise RawConnError(f"peer announced {n} bytes at once")
        while len(self._plaintext) < (n or 1):
            await self._receive(n or 1)
        taken = bytes(memoryview(self._plaintext)[:n])
        del self._plaintext[: len(taken)]
        return taken

    async def close(self) -> None:
        await self._raw.close()

    def abort(self) -> None:
        """Close the socket at once, without waiting for anything."""
        assert isinstance(self._raw, RawConnection)
        assert isinstance(self._raw.stream, TrioTCPStream)
        self._raw.stream.stream.socket.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._raw.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._raw.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self._raw.get_connection_type()

    def _seal(self, data: bytes) -> bytes:
        records: list[bytes] = []
        for start in range(0, len(data), MAX_PLAINTEXT_BYTES):
            record = self._cipher.encrypt(bytes(data[start : start + MAX_PLAINTEXT_BYTES]))
            records += (_LENGTH.pack(len(record)), record)
        return b"".join(records)

    async def _send(self, sealed: bytes) -> None:
        with trio.move_on_after(self._write_deadline_s, shield=True) as scope:
            await self._raw.write(sealed)
        if scope.cancelled_caught:
            self.abort()
            raise ConnectionClosedError(f"peer took no bytes for {self._write_deadline_s} s")

    async def _receive(self, wanted: int) -> None:
        received = await self._raw.read(RECEIVE_BYTES)
        if not received:
            raise IncompleteReadError(
                "connection closed", expected_bytes=wanted, received_bytes=len(self._plaintext)
            )
        self._received += received
        try:
            self._open_records()
        except NoiseInvalidMessage as error:
            self.abort()
            raise RawConnError("a record does not open") from error

    def _open_records(self) -> None:
        """Move every complete record of ``_received`` to ``_plaintext``."""
        start, end = 0, len(self._received)
        while end - start >= _LENGTH.size:
            body = start + _LENGTH.size
            stop = body + _LENGTH.unpack_from(self._received, start)[0]
            if stop > end:
                break
            self._plaintext += self._cipher.decrypt(bytes(self._received[body:stop]))
            start = stop
        del self._received[:start]
