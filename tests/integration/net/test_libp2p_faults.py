"""py-libp2p 0.8.1's faults that a private host cannot live with: a test for each.

| | fault of the stock library | what replaces it |
|---|---|---|
| B1 | an accepted connection keeps its slot until the host stops | `MemberSwarm` |
| B2 | an exception in a stream handler ends the host | `MemberSwarm` |
| B3 | plaintext and secio are accepted | `NoiseTransport` alone; see tests/attacks |
| B4 | every dial waits 250 ms | `MemberSwarm.dial_peer` |
| B5 | one address for each transport is dialled | `MemberSwarm.dial_peer` |
| B6 | a peer that failed is blocked for 60 s | `MemberSwarm.dial_peer` |
| B7 | a writer gives up after 5 s without a window | `Multiplexer`; `YamuxBytes` |
| B8 | a receiver does not enforce the window | `Multiplexer`; `BoundedYamux` |
| B9 | a message of more than 100 short reads fails | `Stream.read_exactly` |
| B10 | a cancelled write leaves half a frame | `MuxedConnection` |
| B11 | a host that leaves does not close its sockets | `open_host` |
| B12 | closing a connection takes 0.2 s | `MemberConn` |
| B13 | limits of its own: 8 streams per peer and a rate | no resource manager |
| B14 | the DHT's protocol id cannot be set | `pals.net.discovery` |
| B15 | GossipSub drops all but 10 messages a second | every GossipSub says another limit |
| B16 | QUIC is slow and dies | TCP is the only transport |
"""

from __future__ import annotations

import ast
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.stream.net_stream import NetStream, StreamState
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.stream_muxer.yamux.yamux import YamuxStream
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from pals.errors import PeerUnreachable
from pals.net.discovery import Discovery
from pals.net.host import Host, HostLimits, open_host
from pals.net.muxer import MuxedStream
from pals.net.yamux import BoundedYamux, YamuxBytes
from pals.swarm.identity import Identity
from pals.types import SwarmId
from tests.integration.net.harness import (
    ECHO,
    LISTEN,
    ask_echo,
    identity,
    open_hosts,
    until,
)

pytestmark = pytest.mark.trio

DEAD_ADDRESS = "/ip4/127.0.0.1/tcp/1"
SOURCES = sorted((Path(__file__).parents[3] / "pals").rglob("*.py"))


async def ask(client: Host, server: Host, protocol: str) -> bytes:
    """Open a stream and read; a refusal may show at either."""
    stream = await client.open_stream(server.peer_id, protocol)
    return await stream.read_some(1)


async def test_connections_in_a_host_s_life_are_not_limited():
    """B1: stock keeps the slot of every accepted connection until the host stops."""
    limits = HostLimits(max_connections=5)
    async with open_hosts(2, limits=limits) as (_, (a, b)):
        for _ in range(15):
            await a.connect(b.peer_id, b.addresses())
            await a.drop_peer(b.peer_id)
            await until(lambda: not b.connected_peers())
        await a.connect(b.peer_id, b.addresses())
        assert await ask_echo(a, b) == b"hello"


async def test_a_handler_that_raises_ends_its_stream_and_nothing_else():
    """B2: stock ends the whole host."""

    async def boom(stream):
        raise RuntimeError("boom")

    async with open_hosts(2) as (_, (a, b)):
        b.handle("/test/boom/1", boom)
        await a.connect(b.peer_id, b.addresses())
        with pytest.raises(PeerUnreachable):
            await ask(a, b, "/test/boom/1")
        assert await ask_echo(a, b) == b"hello"


async def test_connecting_does_not_wait_for_another_transport(monkeypatch):
    """B4: stock waits this long after each connection that it has made."""
    monkeypatch.setattr("libp2p.network.swarm._HAPPY_EYEBALLS_DELAY", 60.0)
    async with open_hosts(2) as (_, (a, b)):
        await a.connect(b.peer_id, b.addresses())


async def test_all_addresses_are_tried():
    """B5: stock dials one address for each transport."""
    async with open_hosts(2) as (_, (a, b)):
        addresses = [DEAD_ADDRESS, "not an address", "/ip4/127.0.0.1/udp/9/quic-v1", *b.addresses()]
        await a.connect(b.peer_id, addresses)
        assert await ask_echo(a, b) == b"hello"


async def test_a_peer_that_failed_can_be_reached_as_soon_as_it_runs():
    """B6: stock blocks a peer that failed for 60 s."""
    async with open_hosts(2) as (_, (a, b)):
        with pytest.raises(PeerUnreachable) as caught:
            await a.connect(b.peer_id, [DEAD_ADDRESS])
        assert caught.value.fields["peer"] == b.peer_id
        await a.connect(b.peer_id, b.addresses())


async def test_a_reader_may_pause_for_longer_than_stock_waits(autojump_clock):
    """B7: stock gives up a write after 5 s without a window."""
    frames = []

    async def take(frame):
        frames.append(frame)

    muxed = YamuxStream(1, SimpleNamespace(_write_frame=take), is_initiator=True)
    muxed.send_window = 0
    net_stream = NetStream(muxed, None, None)
    await net_stream.set_state(StreamState.OPEN)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(YamuxBytes(net_stream, write_s=10.0).write, b"late")
        await trio.sleep(9.0)
        assert not frames
        muxed.send_window = 100
    assert [frame[-4:] for frame in frames] == [b"late"]


@pytest.mark.parametrize("muxer", ["ours", "stock"])
async def test_a_peer_that_ignores_windows_is_closed_out(muxer):
    """B8: stock keeps all that comes, 92 MiB and more."""
    finished = trio.Event()

    async def never_read(stream):
        await finished.wait()

    async with open_hosts(1) as (members, (server,)):
        server.handle("/test/deaf/1", never_read)
        attacker = identity(9)
        members.add(attacker.peer_id)
        async with open_attacker(muxer, attacker, server) as stream:
            with pytest.raises(BaseLibp2pError), trio.fail_after(20):
                await flood(stream, server)
        await until(lambda: not server.connected_peers())
        finished.set()


async def flood(stream: MuxedStream | NetStream, server: Host) -> None:
    while True:
        await stream.write(bytes(1 << 20))
        assert unread_bytes(server) <= 16 << 20


@asynccontextmanager
async def open_attacker(
    muxer: str, attacker: Identity, server: Host
) -> AsyncIterator[MuxedStream | NetStream]:
    """Open a stream whose sender believes that it has a window of 1 GiB."""
    if muxer == "ours":
        async with open_host(attacker, listen=LISTEN, allow=lambda _: True) as host:
            await host.connect(server.peer_id, server.addresses())
            stream = (await host.open_stream(server.peer_id, "/test/deaf/1"))._bytes
            stream.state.allowance = 1 << 30
            yield stream
        return
    host = new_host(key_pair=create_new_key_pair(attacker.reveal_seed()))
    async with host.run([]):
        await host.connect(info_from_p2p_addr(Multiaddr(server.addresses()[0])))
        stream = await host.new_stream(ID.from_base58(server.peer_id), ["/test/deaf/1"])
        stream.muxed_stream.send_window = 1 << 30
        yield stream
        await host.close()


def unread_bytes(host: Host) -> int:
    """Return what all peers have sent and nobody has read."""
    total = 0
    for connection in host._swarm.get_connections():
        muxed = connection.muxed_conn
        if isinstance(muxed, BoundedYamux):
            total += sum(map(len, muxed.stream_buffers.values()))
        else:
            total += sum(state.unread_bytes for state in muxed._streams)
    return total


async def test_a_message_arrives_whole_in_more_than_100_short_reads():
    """B9: stock gives up after 100 short reads."""
    message = bytes(range(256)) * 4096

    async def send_slowly(stream):
        for start in range(0, len(message), 8192):
            await stream.write(message[start : start + 8192])

    async with open_hosts(2) as (_, (a, b)):
        b.handle("/test/send/1", send_slowly)
        await a.connect(b.peer_id, b.addresses())
        stream = await a.open_stream(b.peer_id, "/test/send/1")
        assert await stream.read_exactly(len(message)) == message


async def test_a_cancelled_write_leaves_the_connection_whole():
    """B10: stock leaves half a frame on the wire, and every stream hangs."""
    reading = trio.Event()
    received = []

    async def drain(stream):
        received.append(len(await stream.read_some(1)))
        await reading.wait()
        while data := await stream.read_some(65536):
            received.append(len(data))

    async with open_hosts(2) as (_, (a, b)):
        b.handle("/test/drain/1", drain)
        await a.connect(b.peer_id, b.addresses())
        stream = await a.open_stream(b.peer_id, "/test/drain/1")
        size = 16 << 20  # more than the window and the sockets hold: it stops half-way
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, bytes(size))
            await until(lambda: received == [1])
            nursery.cancel_scope.cancel()
            reading.set()
        assert await ask_echo(a, b) == b"hello"
        await stream.close()
        await until(lambda: sum(received) == size)


async def test_a_host_that_leaves_closes_its_connections():
    """B11: stock leaves ghost peers behind."""
    async with open_hosts(1) as (members, (a,)):
        gone = []
        a.on_disconnect(gone.append)
        leaver = identity(9)
        members.add(leaver.peer_id)
        async with open_host(leaver, listen=LISTEN, allow=members.allow) as b:
            await b.connect(a.peer_id, a.addresses())
        await until(lambda: gone == [leaver.peer_id])
        assert not a.connected_peers()


async def test_closing_a_connection_does_not_sleep(monkeypatch):
    """B12: stock sleeps 0.1 s in the muxer and again in the connection."""
    async with open_hosts(2) as (_, (a, b)):
        await a.connect(b.peer_id, b.addresses())
        await trio.testing.wait_all_tasks_blocked()

        async def no_sleep(seconds):
            raise AssertionError(f"slept {seconds} s")

        with monkeypatch.context() as patch:
            patch.setattr(trio, "sleep", no_sleep)
            await a.drop_peer(b.peer_id)
        await until(lambda: not b.connected_peers())


async def test_as_many_streams_as_are_allowed_are_served_at_once():
    """B13: stock's resource manager allows 8 streams of a peer, and a rate of them."""
    async with open_hosts(2) as (_, (a, b)):
        assert a._swarm._resource_manager is None
        await a.connect(b.peer_id, b.addresses())
        streams = [await a.open_stream(b.peer_id, ECHO) for _ in range(60)]
        for stream in streams:
            await stream.write(b"hello")
        assert {await stream.read_exactly(5) for stream in streams} == {b"hello"}


async def test_the_dht_speaks_the_swarm_s_own_protocol():
    """B14: stock speaks /ipfs/kad/1.0.0 whatever prefix it is given."""
    async with open_hosts(1) as (_, (host,)), trio.open_nursery() as nursery:
        discovery = Discovery(host, SwarmId(bytes(32)), lambda _: True)
        await nursery.start(discovery.run)
        protocols = set(map(str, host.libp2p_host.get_mux().get_protocols()))
        assert any(p.startswith("/pals/") and "/kad/" in p for p in protocols)
        assert not any(p.startswith("/ipfs/kad") for p in protocols)
        nursery.cancel_scope.cancel()


async def test_no_gossip_runs_with_stock_s_limit_of_messages():
    """B15: stock drops what a peer forwards beyond 10 messages a second, and says nothing."""
    assert GossipSub(["/meshsub/1.1.0"], 6, 4, 12).max_messages_per_topic_per_second == 10.0
    for call in calls_of("GossipSub"):
        assert "max_messages_per_topic_per_second" in {keyword.arg for keyword in call.keywords}


def calls_of(name: str) -> list[ast.Call]:
    """Return the calls of a class or function anywhere in Pals."""
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == name]


async def test_tcp_is_the_only_transport():
    """B16: stock's QUIC carries 3 MB/s and ends the host."""
    async with open_hosts(1) as (_, (host,)):
        transports = host._swarm.transport_manager.get_transports()
        assert [type(transport) for transport in transports] == [TCP]
        assert all("/tcp/" in address for address in host.addresses())
