"""The DHT over real hosts: what members announce is found, whatever others store."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import varint
from libp2p.kad_dht.pb.kademlia_pb2 import Message

from pals.errors import InvalidRecord, PeerUnreachable
from pals.net._libp2p import parse_address
from pals.net.announce import Announcement, open_announcement, sign_announcement
from pals.net.host import Host
from pals.net.kademlia import Kademlia
from pals.types import LayerRange, SwarmId
from tests.integration.net.harness import Members, identity, open_hosts

pytestmark = pytest.mark.trio

SWARM_ID = SwarmId(bytes(range(32)))
KAD = "/pals/00010203/kad/1.0.0"
FIND_S = 5.0


class Clock:
    """Unix time that a test moves."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def open_networks(
    count: int,
) -> AsyncIterator[tuple[Members, list[Host], list[Kademlia], Clock]]:
    """Run ``count`` members of one DHT; none knows another yet."""
    clock = Clock()
    async with open_hosts(count) as (members, hosts), trio.open_nursery() as nursery:

        def open_record(data: bytes) -> Announcement:
            return open_announcement(data, now_unix=clock.now, is_member=members.allow)

        networks = [Kademlia(h, SWARM_ID, open_record) for h in hosts]
        for network in networks:
            await nursery.start(network.run)
        yield members, hosts, networks, clock
        nursery.cancel_scope.cancel()


async def meet(host: Host, dht: Kademlia, *others: Host) -> None:
    """Connect to others, and let the DHT know of it at once instead of a second later."""
    for other in others:
        await host.connect(other.peer_id, other.addresses())
    await dht.learn_connected()


def announcement(number: int, clock: Clock, **changes) -> Announcement:
    basis = Announcement(
        peer=identity(number).peer_id,
        model_id="org/model",
        manifest=bytes(32),
        layers=LayerRange(0, 10),
        num_layers=30,
        layer_hashes=(bytes(16),) * 10,
        dtype="bf16",
        free_sessions=4,
        max_context_tokens=2048,
        step_ms=1.0,
        addresses=(),
        seq=1,
        expires_at=clock.now + 300,
    )
    changed = replace(basis, **changes)
    return replace(changed, layer_hashes=(bytes(16),) * len(changed.layers))


def record(number: int, clock: Clock, **changes) -> bytes:
    return sign_announcement(identity(number), announcement(number, clock, **changes))


async def test_announcements_are_found_through_one_member_that_serves_nothing():
    async with open_networks(5) as (members, hosts, networks, clock):
        idle, *shards = hosts[:4]
        for n in (1, 2, 3):
            await meet(hosts[n], networks[n], idle)
        for n in (1, 2, 3):
            await networks[n].put(record(n + 1, clock, layers=LayerRange(n, n + 1)))
        await meet(hosts[4], networks[4], idle)
        found = await networks[4].find(members, deadline_s=FIND_S)
        assert {peer: a.layers.start for peer, a in found.items()} == {
            shard.peer_id: n for n, shard in enumerate(shards, start=1)
        }


async def test_a_newer_announcement_replaces_the_one_found_before():
    """Stock would return the copy that the first look-up left behind."""
    async with open_networks(2) as (members, hosts, (a, b), clock):
        await meet(hosts[0], a, hosts[1])
        await b.put(record(2, clock, seq=1))
        assert (await a.find(members, deadline_s=FIND_S))[hosts[1].peer_id].seq == 1
        await b.put(record(2, clock, seq=2))
        a._dht.value_store.put(*_stored(record(2, clock, seq=1)))
        assert (await a.find(members, deadline_s=FIND_S))[hosts[1].peer_id].seq == 2


async def test_an_older_announcement_changes_nothing():
    async with open_networks(3) as (members, hosts, (a, b, c), clock):
        await meet(hosts[0], a, hosts[1], hosts[2])
        await meet(hosts[1], b, hosts[2])
        await b.put(record(2, clock, seq=5))
        c._dht.value_store.put(*_stored(record(2, clock, seq=4)))
        assert (await a.find(members, deadline_s=FIND_S))[hosts[1].peer_id].seq == 5
        with pytest.raises(InvalidRecord, match="older"):
            await b.put(record(2, clock, seq=4))


async def test_what_is_forged_foreign_or_expired_is_not_found():
    async with open_networks(2) as (members, hosts, (a, b), clock):
        await meet(hosts[0], a, hosts[1])
        stranger = identity(77)
        outsider = sign_announcement(stranger, announcement(77, clock, peer=stranger.peer_id))
        forged = bytearray(record(1, clock))
        forged[-1] ^= 1
        for key, value in {
            f"/pals/{hosts[0].peer_id}": bytes(forged),
            f"/pals/{stranger.peer_id}": outsider,
            f"/pals/{hosts[1].peer_id}": record(1, clock),
        }.items():
            b._dht.value_store.put(key.encode(), value)
        assert await a.find({*members, stranger.peer_id}, deadline_s=FIND_S) == {}
        await b.put(record(2, clock, seq=2))
        assert list(await a.find(members, deadline_s=FIND_S)) == [hosts[1].peer_id]
        clock.now += 301
        assert await a.find(members, deadline_s=FIND_S) == {}


@pytest.mark.parametrize(
    "key", ["/pals/{other}", "/pk/{own}", "/pals/", "plain", "/pals/{own}/more"]
)
async def test_a_member_cannot_store_under_a_key_that_is_not_its_own(key):
    async with open_networks(2) as (_, hosts, (a, b), clock):
        await meet(hosts[0], a, hosts[1])
        key = key.format(own=hosts[0].peer_id, other=hosts[1].peer_id).encode()
        value = record(1, clock)
        target = hosts[1].libp2p_host.get_id()
        assert not await a._dht.value_store._store_at_peer(target, key, value)
        assert b._dht.value_store.get(key) is None
        own = f"/pals/{hosts[0].peer_id}".encode()
        assert await a._dht.value_store._store_at_peer(target, own, value)


async def test_a_member_cannot_store_provider_records():
    """The library takes ADD_PROVIDER although providers are off, and keeps it for days."""
    async with open_networks(2) as (_, hosts, (_, b), _):
        await hosts[0].connect(hosts[1].peer_id, hosts[1].addresses())
        message = Message(type=Message.MessageType.ADD_PROVIDER, key=b"anything")
        address = parse_address(hosts[0].addresses()[0]).to_bytes()
        message.providerPeers.add(id=hosts[0].libp2p_host.get_id().to_bytes(), addrs=[address])
        stream = await hosts[0].open_stream(hosts[1].peer_id, KAD)
        data = message.SerializeToString()
        await stream.write(varint.encode(len(data)) + data)
        with trio.fail_after(3), pytest.raises(PeerUnreachable):
            await stream.read_exactly(1)
        assert b._dht.provider_store.get_providers(b"anything") == []


async def test_announcing_what_does_not_verify_is_refused():
    async with open_networks(1) as (_, _, (a,), clock):
        with pytest.raises(InvalidRecord):
            await a.put(record(1, clock, expires_at=clock.now - 1))


async def test_the_protocol_is_the_swarm_s_own():
    async with open_networks(1) as (_, (host,), _, _):
        protocols = set(map(str, host.libp2p_host.get_mux().get_protocols()))
        assert KAD in protocols
        assert "/ipfs/kad/1.0.0" not in protocols


async def test_members_that_never_answer_do_not_hold_up_the_others():
    async def silent(stream):
        await trio.sleep_forever()

    async with open_networks(4) as (members, hosts, networks, clock):
        driver, server, connected, vanished = hosts
        connected.handle(KAD, silent)
        await meet(driver, networks[0], server, connected)
        await networks[1].put(record(2, clock))
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]  # takes a connection, says nothing
        silent_address = parse_address(f"/ip4/127.0.0.1/tcp/{port}")
        driver._swarm.peerstore.add_addr(vanished.libp2p_host.get_id(), silent_address, 3600)
        await networks[0]._dht.add_peer(vanished.libp2p_host.get_id())
        assert networks[0]._dht.routing_table.size() == 3
        started = trio.current_time()
        found = await networks[0].find(members, deadline_s=6.0)
        assert list(found) == [server.peer_id]
        assert trio.current_time() - started < 5.0
        started = trio.current_time()
        assert list(await networks[0].find(members, deadline_s=6.0)) == [server.peer_id]
        assert trio.current_time() - started < 1.0
        await listeners[0].aclose()


def _stored(value: bytes) -> tuple[bytes, bytes]:
    return f"/pals/{identity(2).peer_id}".encode(), value
