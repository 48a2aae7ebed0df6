"""Both ends of `benchmarks.transport`'s connections; as a program, the end that answers.

A request is its kind (1 byte), the bytes that follow it (4) and the bytes of the reply
that it asks for (4). The reply to a `CPU` request is the seconds of processor time that
the answering process has used.
"""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

import msgspec
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from pals.net.host import Stream, open_host
from pals.swarm.identity import Identity

PROTOCOL = "/pals/benchmark/1"
LISTEN = "/ip4/127.0.0.1/tcp/0"
REQUEST = struct.Struct(">BII")
SECONDS = struct.Struct(">d")
ANSWER, CPU = 0, 1
SERVER, CLIENT = (Identity.from_seed(bytes([number]) * 32) for number in (1, 2))


class Addresses(msgspec.Struct):
    """Where the answering process listens, for each system."""

    raw_trio: int
    stock: str
    pals: str


class Pipe(Protocol):
    """A stream of bytes of any of the systems."""

    async def write(self, data: bytes) -> None: ...

    async def read_exactly(self, n: int) -> bytes: ...


class RawPipe:
    """A TCP connection, with nothing around it."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def write(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def read_exactly(self, n: int) -> bytes:
        return await _read_exactly(self._stream.receive_some, n)


class StockPipe:
    """A stream of py-libp2p with its own Noise and yamux."""

    def __init__(self, stream: INetStream) -> None:
        self._stream = stream

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def read_exactly(self, n: int) -> bytes:
        return await _read_exactly(self._stream.read, n)


async def _read_exactly(read: Callable[[int], Awaitable[bytes]], n: int) -> bytes:
    received = bytearray()
    while len(received) < n:
        part = await read(n - len(received))
        if not part:
            raise EOFError
        received += part
    return bytes(received)


async def answer(pipe: Pipe) -> None:
    """Answer requests until the other side closes the stream."""
    while True:
        try:
            kind, size, reply = REQUEST.unpack(await pipe.read_exactly(REQUEST.size))
        except Exception:  # each system has its own way to say that the stream has ended
            return
        await pipe.read_exactly(size)
        await pipe.write(SECONDS.pack(time.process_time()) if kind == CPU else bytes(reply))


def stock_host(identity: Identity) -> IHost:
    """Return a py-libp2p host with Noise and yamux alone, which is its fastest pair."""
    key_pair = create_new_key_pair(identity.reveal_seed())
    noise = Transport(key_pair, noise_privkey=create_x25519_key_pair().private_key)
    return new_host(key_pair=key_pair, sec_opt={NOISE: noise}, muxer_opt={TProtocol(YAMUX): Yamux})


@asynccontextmanager
async def open_pipes(addresses: Addresses) -> AsyncGenerator[dict[str, Pipe]]:
    """Connect to the answering process by every system."""
    stock = stock_host(CLIENT)
    stock_server = info_from_p2p_addr(Multiaddr(addresses.stock))
    async with (
        stock.run([]),
        open_host(CLIENT, listen=LISTEN, allow=lambda _: True) as host,
    ):
        await stock.connect(stock_server)
        await host.connect(SERVER.peer_id, [addresses.pals])
        yield {
            "pals": await host.open_stream(SERVER.peer_id, PROTOCOL),
            "stock": StockPipe(await stock.new_stream(stock_server.peer_id, [PROTOCOL])),
            "raw-trio": RawPipe(await trio.open_tcp_stream("127.0.0.1", addresses.raw_trio)),
        }
        await stock.close()


async def serve() -> None:
    """Listen for every system, print where, and answer until killed."""
    stock = stock_host(SERVER)

    async def answer_pals(stream: Stream) -> None:
        await answer(stream)

    async def answer_stock(stream: INetStream) -> None:
        await answer(StockPipe(stream))

    async def answer_raw(stream: trio.SocketStream) -> None:
        await answer(RawPipe(stream))

    stock.set_stream_handler(TProtocol(PROTOCOL), answer_stock)
    async with (
        stock.run([Multiaddr(LISTEN)]),
        open_host(SERVER, listen=LISTEN, allow=lambda _: True) as host,
        trio.open_nursery() as nursery,
    ):
        host.handle(PROTOCOL, answer_pals)
        serve_tcp = partial(trio.serve_tcp, answer_raw, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve_tcp)
        addresses = Addresses(
            raw_trio=listener.socket.getsockname()[1],
            stock=str(stock.get_addrs()[0]),
            pals=host.addresses()[0],
        )
        print(msgspec.json.encode(addresses).decode(), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(serve)
