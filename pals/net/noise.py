"""Noise as the only secure transport: the stock handshake, our record layer, the peer gate.

The handshake (Noise_XX_25519_ChaChaPoly_SHA256 with libp2p's signed payload) is
py-libp2p's. The record layer is our own (`pals.net.noise_records`), on the same wire
format: one receive takes many records, one write is one send, and a send is never cut
half-way, because half a record on the wire stalls every stream of the connection.

Source: libp2p specs, noise/README.md.
"""

# pyright: reportMissingTypeStubs=false
# Reason: multiaddr, noise and parts of libp2p ship no types.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, cast

import trio
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.io.exceptions import ConnectionClosedError, IncompleteReadError
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.security.base_session import BaseSession
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.noise.transport import Transport
from libp2p.security.secure_session import SecureSession
from multiaddr import Multiaddr

from pals.net.noise_records import RecordError, RecordOpener, RecordSealer
from pals.net.pipe import PipeBroken, open_pipe
from pals.types import Buffer, PeerId

MAX_READ_BYTES = 16 << 20

Allow = Callable[[PeerId], bool]


class _CipherState(Protocol):
    k: bytes
    n: int


class _HandshakeKeys(Protocol):
    """What a finished handshake of `noiseprotocol` holds."""

    cipher_state_encrypt: _CipherState
    cipher_state_decrypt: _CipherState


class NoiseTransport(Transport):
    """The stock Noise handshake, with the peer gate on both sides of it.

    Inbound, a peer off the list gets its connection closed as soon as Noise has proved
    its id, before a muxer or any protocol is named. Outbound, it is not even greeted.
    """

    def __init__(
        self,
        key_pair: KeyPair,
        *,
        allow: Allow,
        write_deadline_s: float,
        max_read_bytes: int = MAX_READ_BYTES,
    ) -> None:
        super().__init__(key_pair, noise_privkey=create_x25519_key_pair().private_key)
        self._allow = allow
        self._write_deadline_s = write_deadline_s
        self._max_read_bytes = max_read_bytes

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
        return NoiseSession(
            session,
            conn,
            write_deadline_s=self._write_deadline_s,
            max_read_bytes=self._max_read_bytes,
        )


class NoiseSession(BaseSession):
    """The secured connection.

    Either the stock muxer and negotiations use it through `read` and `write`, or our muxer
    through `send_now`, `send_rest` and `receive`, which wait for nothing they need not.
    """

    def __init__(
        self,
        session: SecureSession,
        raw: IRawConnection,
        *,
        write_deadline_s: float,
        max_read_bytes: int = MAX_READ_BYTES,
    ) -> None:
        super().__init__(
            local_peer=session.local_peer,
            local_private_key=session.local_private_key,
            remote_peer=session.remote_peer,
            remote_permanent_pubkey=session.remote_permanent_pubkey,
            is_initiator=session.is_initiator,
        )
        assert isinstance(session.conn, NoiseTransportReadWriter)
        keys = cast("_HandshakeKeys", session.conn.noise_state.noise_protocol)
        self._sealer = RecordSealer(keys.cipher_state_encrypt.k, keys.cipher_state_encrypt.n)
        self._opener = RecordOpener(keys.cipher_state_decrypt.k, keys.cipher_state_decrypt.n)
        self._raw = raw
        self._pipe = open_pipe(raw)
        self._write_deadline_s = write_deadline_s
        self._max_read_bytes = max_read_bytes
        self._write_lock = trio.Lock()
        self._plaintext = bytearray()
        self._unsent: list[Buffer] = []

    # --- for negotiations and the stock muxer ------------------------------------------

    async def write(self, data: bytes) -> None:
        """Send ``data`` as one or more records, all of them or the connection closes.

        Raises:
            ConnectionClosedError: The peer is gone, or did not take the bytes in time.
        """
        async with self._write_lock:
            try:
                self.send_now([data])
                with trio.CancelScope(shield=True):
                    while self.has_unsent:
                        await self.send_rest()
            except PipeBroken as error:
                raise ConnectionClosedError(str(error)) from error

    async def read(self, n: int | None = None) -> bytes:
        """Return exactly ``n`` bytes, or with ``None`` what one receive brings.

        Raises:
            IncompleteReadError: The connection ended first.
            RawConnError: A record does not open, or the muxer was told to expect more
                than ``max_read_bytes`` at once; the connection is closed.
        """
        if n == 0:
            return b""
        if n is not None and n > self._max_read_bytes:
            self.abort()
            raise RawConnError(f"peer announced {n} bytes at once")
        while len(self._plaintext) < (n or 1):
            await self._receive_more(n or 1)
        taken = bytes(memoryview(self._plaintext)[:n])
        del self._plaintext[: len(taken)]
        return taken

    async def _receive_more(self, wanted: int) -> None:
        try:
            opened = await self._receive()
        except RecordError as error:
            raise RawConnError(str(error)) from error
        except PipeBroken:
            opened = None
        if opened is None:
            raise IncompleteReadError(
                "connection closed", expected_bytes=wanted, received_bytes=len(self._plaintext)
            )
        for plaintext in opened:
            self._plaintext += plaintext

    # --- for our muxer -----------------------------------------------------------------

    @property
    def has_unsent(self) -> bool:
        """Whether sealed bytes wait; nothing may be sealed before they are sent."""
        return bool(self._unsent)

    def send_now(self, pieces: Iterable[Buffer]) -> None:
        """Seal bytes and send what goes out at once; the rest is `has_unsent`.

        Raises:
            PipeBroken: The connection is gone.
        """
        assert not self._unsent
        self._unsent = self._pipe.send_now(self._sealer.seal(pieces))

    async def send_rest(self) -> None:
        """Wait until more of the sealed bytes is sent; do not cancel it and go on.

        Raises:
            PipeBroken: The connection is gone, or the peer took nothing in time; then it
                is closed, since half a record is on the wire.
        """
        with trio.move_on_after(self._write_deadline_s) as scope:
            self._unsent = await self._pipe.send(self._unsent)
        if scope.cancelled_caught:
            self.abort()
            raise PipeBroken(f"peer took no bytes for {self._write_deadline_s} s")

    async def receive(self) -> Sequence[bytes] | None:
        """Wait for bytes and return the plaintexts of the records that they complete.

        ``None`` is the end of the connection.

        Raises:
            PipeBroken: The connection is gone.
            RecordError: A record does not open; the connection is closed.
        """
        if self._plaintext:
            left, self._plaintext = bytes(self._plaintext), bytearray()
            return [left]
        return await self._receive()

    async def _receive(self) -> Sequence[bytes] | None:
        count = await self._pipe.receive(self._opener.space)
        if not count:
            return None
        try:
            return self._opener.received(count)
        except RecordError:
            self.abort()
            raise

    # --- for both ----------------------------------------------------------------------

    async def close(self) -> None:
        await self._raw.close()

    @property
    def raw(self) -> IRawConnection:
        """The connection beneath."""
        return self._raw

    def abort(self) -> None:
        """Close the connection at once, without waiting for anything."""
        self._pipe.abort()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._raw.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._raw.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self._raw.get_connection_type()
