"""P11 to P13: what members announce cannot be forged, and liars hide nobody."""

from __future__ import annotations

import pytest
import trio
import varint
from libp2p.kad_dht.pb.kademlia_pb2 import Message

from pals.errors import NoChain, PeerUnreachable
from pals.net import exchange
from pals.net.announce import sign_announcement
from pals.net.host import Host, open_host
from pals.net.route import Chain, find_chain
from pals.types import LayerRange
from tests.integration.net import dht
from tests.integration.net.harness import LISTEN, identity, until
from tests.integration.net.swarms import (
    NUM_LAYERS,
    Member,
    Swarm,
    is_meshed,
    numbered,
    open_swarm,
    record,
    seen_by,
)

pytestmark = [pytest.mark.trio, pytest.mark.timeout(240)]

LIARS = 20
THIRDS = [LayerRange(0, 10), LayerRange(10, 20), LayerRange(20, 30)]


# --- P11: forged announcements -----------------------------------------------------------


async def test_p11_what_is_forged_foreign_or_expired_is_not_found_in_the_dht():
    async with dht.open_networks(2) as (members, hosts, (a, b), clock):
        await dht.meet(hosts[0], a, hosts[1])
        stranger = identity(77)
        outsider = sign_announcement(stranger, dht.announcement(77, clock, peer=stranger.peer_id))
        forged = bytearray(dht.record(1, clock))
        forged[-1] ^= 1
        for key, value in {
            f"/pals/{hosts[0].peer_id}": bytes(forged),
            f"/pals/{stranger.peer_id}": outsider,
            f"/pals/{hosts[1].peer_id}": dht.record(1, clock),
        }.items():
            b._dht.value_store.put(key.encode(), value)
        assert await a.find({*members, stranger.peer_id}, deadline_s=dht.FIND_S) == {}
        await b.put(dht.record(2, clock, seq=2))
        assert list(await a.find(members, deadline_s=dht.FIND_S)) == [hosts[1].peer_id]
        clock.now += 301
        assert await a.find(members, deadline_s=dht.FIND_S) == {}


async def test_p11_what_is_forged_foreign_expired_or_older_changes_no_table():
    async with open_swarm() as swarm:
        hub, shard, liar = await swarm.start_many(3)
        await shard.meet(hub)
        await liar.meet(hub)
        await until(lambda: all(is_meshed(member) for member in swarm.running))
        await shard.announce(seq=5)
        await until(lambda: seen_by(liar) == {shard.peer_id: 5})
        forged = bytearray(record(shard.number, seq=9))
        forged[-1] ^= 1
        bad = [
            bytes(forged),
            record(77, seq=9),
            record(shard.number, seq=4),
            record(liar.number, swarm.clock, expires_at=swarm.clock() - 1),
            b"",
            bytes(9000),
        ]
        for data in bad:
            await liar.discovery._gossip.publish(b"\x01" + data)
        await liar.discovery._gossip.publish(b"\x07" + record(liar.number))
        await liar.discovery._gossip.publish(b"")
        await liar.announce(seq=1)
        await until(lambda: liar.peer_id in seen_by(hub))
        assert seen_by(hub) == seen_by(shard) == {shard.peer_id: 5, liar.peer_id: 1}
        assert numbered(77).peer_id not in hub.discovery.known()


# --- P12: keys of the DHT that nobody checks ----------------------------------------------


@pytest.mark.parametrize(
    "key", ["/pals/{other}", "/pk/{own}", "/pals/", "plain", "/pals/{own}/more"]
)
async def test_p12_a_member_cannot_store_under_a_key_that_is_not_its_own(key):
    async with dht.open_networks(2) as (_, hosts, (a, b), clock):
        await dht.meet(hosts[0], a, hosts[1])
        key = key.format(own=hosts[0].peer_id, other=hosts[1].peer_id).encode()
        value = dht.record(1, clock)
        target = hosts[1].libp2p_host.get_id()
        assert not await a._dht.value_store._store_at_peer(target, key, value)
        assert b._dht.value_store.get(key) is None
        own = f"/pals/{hosts[0].peer_id}".encode()
        assert await a._dht.value_store._store_at_peer(target, own, value)


async def test_p12_a_stranger_stores_nothing():
    async with dht.open_networks(1) as (_, (server,), (network,), clock):
        stranger = identity(77)
        key = f"/pals/{stranger.peer_id}".encode()
        value = dht.record(77, clock)
        message = Message(type=Message.MessageType.PUT_VALUE, key=key)
        message.record.key, message.record.value = key, value
        data = message.SerializeToString()
        async with open_host(stranger, listen=LISTEN, allow=lambda _: True) as outsider:
            with pytest.raises(PeerUnreachable), trio.fail_after(5):
                await put(outsider, server, varint.encode(len(data)) + data)
        assert network._dht.value_store.get(key) is None


async def put(client: Host, server: Host, request: bytes) -> None:
    await client.connect(server.peer_id, server.addresses())
    stream = await client.open_stream(server.peer_id, dht.KAD)
    await stream.write(request)
    await stream.read_exactly(1)


# --- P13: Sybils ---------------------------------------------------------------------------


async def test_p13_among_twenty_liars_the_honest_chain_is_found() -> None:
    """The liars announce all layers, of other bytes, and say nothing of the honest ones."""
    async with open_swarm() as swarm:
        honest = await start_honest(swarm, THIRDS)
        liars = await start_liars(swarm)
        client = await swarm.start()
        await client.meet(*liars, honest[0])
        await until(lambda: {m.peer_id for m in honest} <= seen_by(client).keys())
        chain = chain_by_trial(client, {member.peer_id for member in honest})
        assert [hop.layers for hop in chain.hops] == THIRDS


async def test_p13_among_twenty_liars_the_layers_that_no_honest_one_serves_are_named() -> None:
    async with open_swarm() as swarm:
        honest = await start_honest(swarm, [THIRDS[0], THIRDS[2]])
        liars = await start_liars(swarm)
        client = await swarm.start()
        await client.meet(*liars, honest[0])
        await until(lambda: {m.peer_id for m in honest} <= seen_by(client).keys())
        with pytest.raises(NoChain) as caught:
            chain_by_trial(client, {member.peer_id for member in honest})
        assert "10:20" in str(caught.value)


async def start_honest(swarm: Swarm, ranges: list[LayerRange]) -> list[Member]:
    """Start five honest members that know each other; the first serve ``ranges``."""
    honest = await swarm.start_many(5)
    for member in honest[1:]:
        await member.meet(honest[0])
    for member, layers in zip(honest, ranges, strict=False):
        await member.announce(layers=layers)
    return honest[: len(ranges)]


async def start_liars(swarm: Swarm) -> list[Member]:
    """Start liars; each answers every question with nothing but itself, and forwards nothing."""
    liars = await swarm.start_many(LIARS)
    for liar in liars:
        everything = LayerRange(0, NUM_LAYERS)
        said = record(liar.number, layers=everything, step_ms=0.1, layer_hash=b"\xff" * 16)

        async def answer(stream, said: bytes = said) -> None:
            await stream.write(len(said).to_bytes(2, "big") + said + bytes(2))

        async def say_nothing(stream) -> None:
            await stream.reset()

        liar.host.handle(exchange.PROTOCOL, answer)
        liar.host.handle(dht.KAD, say_nothing)
        await until(lambda gossip=liar.discovery._gossip: gossip._running is not None)
        liar.discovery._gossip._running._judge = lambda *_: False
    return liars


def chain_by_trial(client: Member, honest: set) -> Chain:
    """Take chains as a driver does: what fails is left out of the next one."""
    failed: set = set()
    announced = list(client.discovery.announcements().values())
    while True:
        chain = find_chain(
            [a for a in announced if a.peer not in failed],
            manifest=bytes(32),
            num_layers=NUM_LAYERS,
        )
        lying = {hop.peer for hop in chain.hops} - honest
        if not lying:
            return chain
        failed |= lying
