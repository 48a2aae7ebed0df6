"""The host over real sockets: each test fails on py-libp2p 0.8.1's defaults."""

from __future__ import annotations

import contextlib

import pytest
import trio
from libp2p.network.exceptions import SwarmException
from libp2p.utils.varint import encode_uvarint

from pals.errors import InvalidConfig, PeerUnreachable, PortInUse
from pals.net.host import Host, HostLimits, open_host
from tests.integration.net.harness import ECHO, ask_echo, identity, open_hosts, until

pytestmark = pytest.mark.trio

DEAD_ADDRESS = "/ip4/127.0.0.1/tcp/1"


async def ask(client: Host, server: Host, protocol: str) -> bytes:
    """Open a stream and read; a refusal may show at either."""
    stream = await client.open_stream(server.peer_id, protocol)
    return await stream.read_some(1)


async def connect_and_ask(client: Host, server: Host) -> None:
    """Connect and use it; a refusal may show at either."""
    await client.connect(server.peer_id, server.addresses())
    await ask_echo(client, server)


async def test_a_stream_carries_bytes_both_ways_and_ends_cleanly():
    async with open_hosts(2) as (_, (a, b)):
        await a.connect(b.peer_id, b.addresses())
        stream = await a.open_stream(b.peer_id, ECHO)
        await stream.write(b"hello")
        assert await stream.read_exactly(5) == b"hello"
        await stream.close()
        assert await stream.read_some(1) == b""
        assert stream.peer_id == b.peer_id
        assert a.connected_peers() == {b.peer_id}
        assert b.connected_peers() == {a.peer_id}


async def test_a_host_connects_to_nobody_on_its_own_account():
    """Stock dials every peer it has heard of until it has half its limit."""
    async with open_hosts(2) as (_, (a, b)):
        b_id = b.libp2p_host.get_id()
        a._swarm.peerstore.add_addrs(b_id, b.libp2p_host.get_addrs(), 3600)
        await a._swarm.auto_connector.maybe_connect()
        assert not a.connected_peers()


async def test_addresses_that_were_made_up_do_not_crowd_out_the_true_ones():
    async with open_hosts(2) as (_, (a, b)):
        made_up = [f"/ip4/127.0.0.1/tcp/{port}" for port in range(1, 17)]
        with pytest.raises(PeerUnreachable):
            await a.connect(b.peer_id, made_up)
        assert a._swarm.known_addresses(b.libp2p_host.get_id()) == []
        await a.connect(b.peer_id, b.addresses())
        assert a.connected_peers() == {b.peer_id}


async def test_an_address_that_answered_is_known_afterwards():
    async with open_hosts(2) as (_, (a, b)):
        await a.connect(b.peer_id, [DEAD_ADDRESS, *b.addresses()])
        await a.drop_peer(b.peer_id)
        await until(lambda: not b.connected_peers())
        await a.connect(b.peer_id, [])
        known = a._swarm.known_addresses(b.libp2p_host.get_id())
        assert DEAD_ADDRESS not in map(str, known)


async def test_a_dial_of_few_addresses_does_not_wait_for_one_that_hangs():
    async with open_hosts(2) as (_, (a, b)), trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        silent = [f"/ip4/127.0.0.1/tcp/{port}"]

        async def fail_to_connect():
            with contextlib.suppress(PeerUnreachable):
                await a.connect(b.peer_id, silent)

        nursery.start_soon(fail_to_connect)
        async with listeners[0], await listeners[0].accept():
            with trio.fail_after(3):
                await a.connect(b.peer_id, b.addresses())
        nursery.cancel_scope.cancel()


async def test_no_more_addresses_are_dialled_than_a_dial_may_cost(monkeypatch):
    dialled = []

    async def dial(address, peer):
        dialled.append(str(address))
        raise SwarmException("nobody there")

    async with open_hosts(2) as (_, (a, b)):
        monkeypatch.setattr(a._swarm, "dial_addr", dial)
        with pytest.raises(PeerUnreachable):
            await a.connect(b.peer_id, [f"/ip4/127.0.0.1/tcp/{port}" for port in range(1, 101)])
    assert set(dialled) == {f"/ip4/127.0.0.1/tcp/{port}" for port in range(1, 17)}


async def test_a_stream_that_nobody_reads_costs_that_stream_alone():
    async def never_read(stream):
        await trio.sleep_forever()

    async with open_hosts(2, limits=HostLimits(write_s=0.2)) as (_, (a, b)):
        b.handle("/test/deaf/1", never_read)
        await a.connect(b.peer_id, b.addresses())
        stream = await a.open_stream(b.peer_id, "/test/deaf/1")
        with pytest.raises(PeerUnreachable, match=r"took no bytes for 0\.2 s"):
            await stream.write(bytes(16 << 20))
        assert await ask_echo(a, b) == b"hello"


async def test_a_silent_peer_costs_its_connection():
    limits = HostLimits(ping_after_s=0.2, pong_s=0.2)
    async with open_hosts(2, limits=limits) as (_, (a, b)):
        gone = []
        a.on_disconnect(gone.append)
        await a.connect(b.peer_id, b.addresses())
        await trio.sleep(0.5)  # two pings, to which it answers
        assert not gone
        (connection,) = b._swarm.get_connections()
        connection.muxed_conn.pump = lambda *_: None
        await until(lambda: gone == [b.peer_id])


async def test_a_connection_that_nobody_uses_is_closed():
    async with open_hosts(2, limits=HostLimits(idle_s=0.5)) as (_, (a, b)):
        await a.connect(b.peer_id, b.addresses())
        stream = await a.open_stream(b.peer_id, ECHO)
        await trio.sleep(0.8)
        await stream.write(b"hello")
        assert await stream.read_exactly(5) == b"hello"
        await stream.close()
        await until(lambda: not a.connected_peers() and not b.connected_peers())
        assert await ask_echo(a, b) == b"hello"


@pytest.mark.parametrize("waiting", [True, False], ids=["while it reads", "before it reads"])
async def test_a_lost_connection_is_not_read_as_an_end(waiting):
    async with open_hosts(2) as (_, (a, b)):
        await a.connect(b.peer_id, b.addresses())
        stream = await a.open_stream(b.peer_id, ECHO)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                if not waiting:
                    await b.drop_peer(a.peer_id)
                else:
                    nursery.start_soon(b.drop_peer, a.peer_id)
                with pytest.raises(PeerUnreachable):
                    await stream.read_some(1)


async def test_a_reset_is_not_read_as_an_end():
    async def reset(stream):
        await stream.reset()

    async with open_hosts(2) as (_, (a, b)):
        b.handle("/test/reset/1", reset)
        await a.connect(b.peer_id, b.addresses())
        with pytest.raises(PeerUnreachable):
            await ask(a, b, "/test/reset/1")


async def test_a_protocol_that_nobody_serves_is_unreachable():
    async with open_hosts(2) as (_, (a, b)):
        await a.connect(b.peer_id, b.addresses())
        with pytest.raises(PeerUnreachable):
            await a.open_stream(b.peer_id, "/test/none/1")


async def test_an_address_with_another_peer_behind_it_is_refused():
    async with open_hosts(3) as (_, (a, b, c)):
        with pytest.raises(PeerUnreachable):
            await a.connect(b.peer_id, [c.addresses()[0].partition("/p2p/")[0]])
        assert not a.connected_peers()


async def test_streams_of_one_peer_are_limited():
    limits = HostLimits(max_streams_per_peer=3)
    held = []

    async def hold(stream):
        held.append(stream.peer_id)
        await stream.write(b"x")
        await stream.read_some(1)

    async with open_hosts(3, limits=limits) as (_, (a, b, c)):
        b.handle("/test/hold/1", hold)
        await a.connect(b.peer_id, b.addresses())
        await c.connect(b.peer_id, b.addresses())
        await until(lambda: not b._swarm._inbound_streams)
        for _ in range(3):
            await ask(a, b, "/test/hold/1")
        with pytest.raises(PeerUnreachable):
            await ask(a, b, "/test/hold/1")
        assert held == [a.peer_id] * 3
        assert await ask_echo(c, b) == b"hello"
        await b.drop_peer(a.peer_id)
        await until(lambda: not b._swarm._inbound_streams)


async def test_a_handshake_that_takes_too_long_is_dropped():
    async with open_hosts(1, limits=HostLimits(handshake_s=0.3)) as (_, (server,)):
        port = int(server.addresses()[0].split("/")[4])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            with trio.fail_after(5):
                while await stream.receive_some():
                    pass
        await until(lambda: not server._swarm._handshakes)
        await until(lambda: server._swarm._inbound_limiter.borrowed_tokens == 0)


async def test_connections_in_all_are_limited():
    async with open_hosts(4, limits=HostLimits(max_connections=2)) as (_, hosts):
        server, *clients = hosts
        for client in clients[:2]:
            await client.connect(server.peer_id, server.addresses())
        with pytest.raises(PeerUnreachable):
            await connect_and_ask(clients[2], server)
        assert server.connected_peers() == {client.peer_id for client in clients[:2]}


async def test_garbage_and_endless_bytes_are_survived():
    async with open_hosts(2) as (_, (a, b)):
        port = int(b.addresses()[0].split("/")[4])
        for junk in (
            b"GET / HTTP/1.1\r\n\r\n",
            bytes(100_000),
            b"\x13/multistream/1.0.0\n\xff\xff\xff",
        ):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(junk)
            await stream.aclose()
        await a.connect(b.peer_id, b.addresses())
        assert await ask_echo(a, b) == b"hello"


@pytest.mark.parametrize(
    "claim",
    [encode_uvarint(1 << 40), b"\x13/multistream/1.0.0\n" + encode_uvarint(1 << 40)],
    ids=["greeting", "protocol"],
)
async def test_a_stranger_that_never_ends_its_greeting_is_cut(claim):
    async with open_hosts(1) as (_, (host,)):
        port = int(host.addresses()[0].split("/")[4])
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(claim)
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(4):
                await send_for_ever(stream)  # sooner than the deadline of the handshake


async def send_for_ever(stream):
    while True:
        await stream.send_all(bytes(1 << 16))


async def test_both_sides_may_dial_at_once():
    async with open_hosts(2) as (_, (a, b)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.connect, b.peer_id, b.addresses())
            nursery.start_soon(b.connect, a.peer_id, a.addresses())
        assert await ask_echo(a, b) == b"hello"
        assert await ask_echo(b, a) == b"hello"


@pytest.mark.parametrize(
    "listen",
    [
        *("", "nonsense", "127.0.0.1:80"),
        *("/ip4/127.0.0.1", "/ip4/127.0.0.1/udp/1", "/ip4/300.1.1.1/tcp/1"),
    ],
)
async def test_a_listen_address_that_is_no_tcp_multiaddr_is_refused(listen):
    with pytest.raises(InvalidConfig):
        async with open_host(identity(1), listen=listen, allow=lambda _: True):
            pass


async def test_a_port_that_another_host_serves_is_refused():
    async with open_hosts(1) as (_, (a,)):
        taken = a.addresses()[0].partition("/p2p/")[0]
        with pytest.raises(PortInUse):
            async with open_host(identity(2), listen=taken, allow=lambda _: True):
                pass


async def test_wildcard_addresses_are_expanded():
    async with open_host(identity(1), listen="/ip4/0.0.0.0/tcp/0", allow=lambda _: True) as host:
        assert host.addresses()
        assert all(f"/p2p/{host.peer_id}" in address for address in host.addresses())
        assert not any("0.0.0.0" in address for address in host.addresses())
