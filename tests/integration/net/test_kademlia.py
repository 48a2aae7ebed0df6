"""The DHT over real hosts: what members announce is found, whatever others store."""

from __future__ import annotations

import pytest
import trio
import varint
from libp2p.kad_dht.pb.kademlia_pb2 import Message

from pals.errors import InvalidRecord, PeerUnreachable
from pals.net._libp2p import parse_address
from pals.types import LayerRange
from tests.integration.net.dht import FIND_S, KAD, meet, open_networks, record
from tests.integration.net.harness import identity

pytestmark = pytest.mark.trio


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
    asked = []

    async def silent(stream):
        asked.append(stream)
        await trio.sleep_forever()

    async with (
        open_networks(4) as (members, hosts, networks, clock),
        trio.open_nursery() as nursery,
    ):
        driver, server, connected, vanished = hosts
        connected.handle(KAD, silent)
        await meet(driver, networks[0], server, connected)
        await networks[1].put(record(2, clock))
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, silent, listeners)
        port = listeners[0].socket.getsockname()[1]  # takes a connection, says nothing
        silent_address = parse_address(f"/ip4/127.0.0.1/tcp/{port}")
        driver._swarm.peerstore.add_addr(vanished.libp2p_host.get_id(), silent_address, 3600)
        await networks[0]._dht.add_peer(vanished.libp2p_host.get_id())
        assert networks[0]._dht.routing_table.size() == 3
        with trio.fail_after(30):
            found = await networks[0].find(members, deadline_s=50.0)
        assert list(found) == [server.peer_id]
        before = len(asked)
        assert before >= 2
        assert list(await networks[0].find(members, deadline_s=50.0)) == [server.peer_id]
        assert len(asked) == before, "who was silent is not asked again at once"
        nursery.cancel_scope.cancel()


def _stored(value: bytes) -> tuple[bytes, bytes]:
    return f"/pals/{identity(2).peer_id}".encode(), value
