"""Both ends of a connection in one process: sockets, secured sessions, muxed connections."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.transport import Transport

from pals.net.mux import MuxLimits
from pals.net.mux_stream import ReceiveBudget
from pals.net.muxer import MuxedConnection, MuxedStream
from pals.net.noise import NoiseTransport

DIALLER = create_new_key_pair(bytes([1]) * 32)
LISTENER = create_new_key_pair(bytes([2]) * 32)
LISTENER_ID = ID.from_pubkey(LISTENER.public_key)


def ours(key_pair, *, allow=lambda _: True, write_deadline_s=5.0):
    return NoiseTransport(key_pair, allow=allow, write_deadline_s=write_deadline_s)


def stock(key_pair):
    return Transport(key_pair, noise_privkey=create_x25519_key_pair().private_key)


def raw_pair():
    left, right = trio.socket.socketpair()
    return tuple(
        RawConnection(TrioTCPStream(trio.SocketStream(sock)), initiator)
        for sock, initiator in ((left, True), (right, False))
    )


@asynccontextmanager
async def sessions(dialling, listening, raws=None) -> AsyncIterator[tuple]:
    left, right = raws or raw_pair()
    ends = {}
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:

            async def listen():
                ends["listener"] = await listening.secure_inbound(right)

            nursery.start_soon(listen)
            ends["dialler"] = await dialling.secure_outbound(left, LISTENER_ID)
        try:
            yield ends["dialler"], ends["listener"]
        finally:
            await left.close()
            await right.close()


@asynccontextmanager
async def muxed(
    raws=None, *, write_deadline_s=5.0, **limits: float
) -> AsyncIterator[tuple[MuxedConnection, MuxedConnection]]:
    """Run the dialling and the listening end of one muxed connection."""
    ends = (ours(key_pair, write_deadline_s=write_deadline_s) for key_pair in (DIALLER, LISTENER))
    async with sessions(*ends, raws) as pair, trio.open_nursery() as nursery:
        connections = [
            MuxedConnection(
                session,
                session.remote_peer,
                limits=MuxLimits(**limits),
                budget=ReceiveBudget(16 << 20),
            )
            for session in pair
        ]
        for connection in connections:
            nursery.start_soon(connection.start)
        await trio.testing.wait_all_tasks_blocked()
        yield connections[0], connections[1]
        nursery.cancel_scope.cancel()


async def open_stream(
    dialler: MuxedConnection, listener: MuxedConnection
) -> tuple[MuxedStream, MuxedStream]:
    """Open a stream and accept it."""
    stream = await dialler.open_stream()
    return stream, await listener.accept_stream()
