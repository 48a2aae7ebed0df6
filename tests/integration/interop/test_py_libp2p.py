"""A member that runs stock py-libp2p: its Noise, its yamux, its ping and its identify."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.host.ping import PingService
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

from pals.net.host import Host, HostLimits
from pals.net.yamux import BoundedYamux
from tests.integration.net.harness import ECHO, LISTEN, identity, open_hosts, until

pytestmark = pytest.mark.trio

OURS, STOCK = 1, 2
STOCK_ID = ID.from_base58(identity(STOCK).peer_id)
# Stock gives up a write after 5 s, and each of its receives is of one record.
SIZES = [5, 1 << 20, 8 << 20]


async def echo(stream: INetStream) -> None:
    while data := await read(stream, 65536):
        await stream.write(data)
    await stream.close()


async def read(stream: INetStream, n: int) -> bytes:
    try:
        return await stream.read(n)
    except EOFError:
        return b""


async def read_exactly(stream: INetStream, n: int) -> bytes:
    received = bytearray()
    while len(received) < n:
        received += await stream.read(n - len(received))
    return bytes(received)


@asynccontextmanager
async def open_pair(limits: HostLimits | None = None) -> AsyncIterator[tuple[Host, IHost]]:
    """Run a host of Pals and a stock host that is a member, both serving `ECHO`."""
    async with open_hosts(1, limits=limits) as (members, (ours,)):
        members.add(identity(STOCK).peer_id)
        stock = new_host(key_pair=create_new_key_pair(identity(STOCK).reveal_seed()))
        stock.set_stream_handler(ECHO, echo)
        async with stock.run([Multiaddr(LISTEN)]):
            yield ours, stock
            await stock.close()


async def test_stock_dials_identifies_and_pings_us():
    async with open_pair() as (ours, stock):
        target = info_from_p2p_addr(Multiaddr(ours.addresses()[0]))
        await stock.connect(target)

        (round_trip_us,) = await PingService(stock).ping(target.peer_id)
        await until(lambda: ECHO in (stock.get_peerstore().get_protocols(target.peer_id) or []))

        assert round_trip_us >= 0
        (connection,) = ours._swarm.get_connections()
        assert isinstance(connection.muxed_conn, BoundedYamux)


async def test_we_dial_identify_and_ping_stock():
    async with open_pair() as (ours, stock):
        await ours.connect(identity(STOCK).peer_id, [str(stock.get_addrs()[0])])
        peerstore = ours.libp2p_host.get_peerstore()

        (round_trip_us,) = await PingService(ours.libp2p_host).ping(STOCK_ID)
        await until(lambda: ECHO in (peerstore.get_protocols(STOCK_ID) or []))

        assert round_trip_us >= 0


@pytest.mark.parametrize("size", SIZES)
async def test_stock_gets_back_what_it_sends_us(size):
    data = bytes(i % 251 for i in range(size))
    async with open_pair() as (ours, stock):
        target = info_from_p2p_addr(Multiaddr(ours.addresses()[0]))
        await stock.connect(target)
        stream = await stock.new_stream(target.peer_id, [ECHO])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, data)
            assert await read_exactly(stream, size) == data


@pytest.mark.parametrize("size", SIZES)
async def test_we_get_back_what_we_send_stock(size):
    data = bytes(i % 251 for i in range(size))
    async with open_pair() as (ours, stock):
        await ours.connect(identity(STOCK).peer_id, [str(stock.get_addrs()[0])])
        stream = await ours.open_stream(identity(STOCK).peer_id, ECHO)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, data)
            assert await stream.read_exactly(size) == data
        await stream.close()
        assert await stream.read_some(1) == b""


async def test_a_connection_with_stock_that_nobody_uses_is_closed():
    async with open_pair(HostLimits(idle_s=0.2)) as (ours, stock):
        await ours.connect(identity(STOCK).peer_id, [str(stock.get_addrs()[0])])

        await until(lambda: not ours.connected_peers())
