"""Discovery over real hosts: every member has the table, whatever some of them do."""

from __future__ import annotations

import itertools

import pytest
import trio

from pals.errors import NoChain, PeerUnreachable
from pals.net import exchange, gossip, suspicion
from pals.net.discovery import Sources
from pals.net.gossip import Gossip
from pals.net.route import find_chain
from pals.net.suspicion import Notice, encode_notice
from pals.types import LayerRange
from tests.integration.net.harness import until
from tests.integration.net.swarms import (
    NUM_LAYERS,
    Member,
    is_meshed,
    open_swarm,
    record,
    seen_by,
)

pytestmark = pytest.mark.trio

KADEMLIA_ALONE = Sources(gossip=False, table_requests=False)
TABLES_ALONE = Sources(gossip=False)
GOSSIP_ALONE = Sources(table_requests=False)
THIRDS = [LayerRange(0, 10), LayerRange(10, 20), LayerRange(20, 30)]
ROUTE_S = 1.0
NEW_SHARD_S = 2.0
GONE_S = 5.0


def has_chain(member: Member) -> bool:
    announcements = member.discovery.announcements().values()
    try:
        find_chain(announcements, manifest=bytes(32), num_layers=NUM_LAYERS)
    except NoChain:
        return False
    return True


async def test_without_gossip_and_tables_the_chain_is_found_through_one_that_serves_nothing():
    async with open_swarm() as swarm:
        idle, *shards = await swarm.start_many(4, sources=KADEMLIA_ALONE)
        for shard, layers in zip(shards, THIRDS, strict=True):
            await shard.meet(idle)
            await shard.announce(layers=layers)
        driver = await swarm.start(sources=KADEMLIA_ALONE)
        await driver.meet(idle)
        await driver.discovery.find(swarm.members, deadline_s=5.0)
        assert has_chain(driver)


async def test_without_gossip_and_tables_a_newcomer_s_record_is_seen_through_a_third_member():
    async with open_swarm() as swarm:
        third, newcomer, driver = await swarm.start_many(3, sources=KADEMLIA_ALONE)
        await driver.meet(third)
        await newcomer.meet(third)
        await newcomer.announce()
        found = await driver.discovery.find([newcomer.peer_id], deadline_s=5.0)
        assert list(found) == [newcomer.peer_id]


async def test_a_newcomer_has_the_table_as_soon_as_it_is_connected():
    async with open_swarm() as swarm:
        idle, *shards = await swarm.start_many(4, sources=TABLES_ALONE)
        for shard, layers in zip(shards, THIRDS, strict=True):
            await shard.meet(idle)
            await shard.announce(layers=layers)
        driver = await swarm.start(sources=TABLES_ALONE)
        await driver.meet(idle)
        await until(lambda: has_chain(driver), deadline_s=ROUTE_S)


async def test_an_announcement_reaches_members_that_are_not_connected_to_its_shard():
    async with open_swarm() as swarm:
        line = await swarm.start_many(4, sources=GOSSIP_ALONE)
        for left, right in itertools.pairwise(line):
            await left.meet(right)
        await until(lambda: all(is_meshed(member) for member in line))
        await line[0].announce(seq=7)
        await until(lambda: seen_by(line[-1]) == {line[0].peer_id: 7}, deadline_s=NEW_SHARD_S)


async def test_more_than_ten_announcements_a_second_are_all_passed_on():
    """The default of py-libp2p forwards ten a second of one neighbour and drops the rest."""
    async with open_swarm() as swarm:
        line = await swarm.start_many(3, sources=GOSSIP_ALONE)
        await line[0].meet(line[1])
        await line[1].meet(line[2])
        await until(lambda: all(is_meshed(member) for member in line))
        news: Gossip = line[0].discovery._gossip
        heard = []
        line[2].discovery._gossip._running._judge = lambda _, message: heard.append(message)
        line[1].discovery._gossip._running._judge = lambda *_: True
        for number in range(30):
            await news.publish(bytes([9, number]))
        await until(lambda: len(heard) == 30)


async def test_a_peer_that_is_killed_is_gone_from_every_table():
    async with open_swarm() as swarm:
        hub, victim, *others = await swarm.start_many(5)
        await victim.meet(hub)
        for other in others:
            await other.meet(hub)
        await until(lambda: all(is_meshed(member) for member in swarm.running))
        await victim.announce()
        await until(lambda: all(seen_by(o) == {victim.peer_id: 1} for o in (hub, *others)))
        await victim.stop()
        await until(lambda: all(seen_by(o) == {} for o in (hub, *others)), deadline_s=GONE_S)


async def test_a_peer_that_came_back_is_listed_at_once():
    async with open_swarm() as swarm:
        hub, victim, other = await swarm.start_many(3)
        await victim.meet(hub)
        await other.meet(hub)
        await victim.announce(seq=1)
        await until(lambda: victim.peer_id in seen_by(other))
        await victim.stop()
        await until(lambda: seen_by(other) == {}, deadline_s=GONE_S)
        again = await swarm.start(victim.number)
        await again.meet(hub)
        await again.announce(seq=2)
        await until(lambda: seen_by(other) == {again.peer_id: 2}, deadline_s=NEW_SHARD_S)


async def test_copies_of_a_dead_peer_s_record_do_not_bring_it_back():
    async with open_swarm() as swarm:
        hub, victim = await swarm.start_many(2)
        await victim.meet(hub)
        await victim.announce()
        copy = record(victim.number)
        await victim.stop()
        await until(lambda: seen_by(hub) == {}, deadline_s=GONE_S)
        hub.discovery.offer(copy)
        assert seen_by(hub) == {}


async def test_lying_that_a_peer_is_gone_removes_it_nowhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(suspicion, "PAUSE_S", 0.0)
    async with open_swarm() as swarm:
        hub, victim, liar, other = await swarm.start_many(4)
        for member in (victim, liar, other):
            await member.meet(hub)
        await until(lambda: all(is_meshed(member) for member in swarm.running))
        await victim.announce()
        await until(lambda: victim.peer_id in seen_by(other))
        gone = []
        original = other.discovery._table.drop
        other.discovery._table.drop = lambda *said: gone.append(said) or original(*said)
        probed = trio.Event()
        answers = other.discovery._answers

        async def watch(announcement):
            answered = await answers(announcement)
            probed.set()
            return answered

        other.discovery._answers = watch
        for _ in range(3):
            notice = encode_notice(Notice(victim.peer_id, 1))
            await liar.discovery._gossip.publish(b"\x02" + notice)
        with trio.fail_after(GONE_S):
            await probed.wait()
        assert not gone
        assert seen_by(other) == seen_by(hub) == {victim.peer_id: 1}


async def test_the_accused_is_told_to_announce_anew_and_is_not_even_asked():
    async with open_swarm() as swarm:
        hub, victim, liar = await swarm.start_many(3)
        await victim.meet(hub)
        await liar.meet(hub)
        await until(lambda: all(is_meshed(member) for member in swarm.running))
        await victim.announce()
        await until(lambda: victim.peer_id in seen_by(liar))
        accused = trio.Event()
        victim.discovery.on_doubt(accused.set)
        await liar.discovery._gossip.publish(b"\x02" + encode_notice(Notice(victim.peer_id, 1)))
        with trio.fail_after(2):
            await accused.wait()


async def test_a_shard_that_leaves_is_gone_at_once_and_its_older_records_stay_out():
    async with open_swarm() as swarm:
        hub, shard, other = await swarm.start_many(3)
        await shard.meet(hub)
        await other.meet(hub)
        await shard.announce(seq=1)
        await until(lambda: shard.peer_id in seen_by(other))
        await shard.announce(seq=2, state="leaving")
        await until(lambda: seen_by(other) == seen_by(hub) == {})
        other.discovery.offer(record(shard.number, seq=1))
        assert seen_by(other) == {}


async def test_a_record_expires_where_nobody_noticed_anything():
    async with open_swarm() as swarm:
        hub, shard = await swarm.start_many(2)
        await shard.meet(hub)
        await shard.announce()
        await until(lambda: shard.peer_id in seen_by(hub))
        swarm.clock.offset_s = 181.0
        assert seen_by(hub) == {}


async def test_a_flood_of_one_member_s_news_is_cut_and_others_are_still_heard():
    async with open_swarm() as swarm:
        hub, flooder, shard = await swarm.start_many(3)
        await flooder.meet(hub)
        await shard.meet(hub)
        await until(lambda: all(is_meshed(member) for member in swarm.running))
        for seq in range(1, 201):
            await flooder.discovery._gossip.publish(b"\x01" + record(flooder.number, seq=seq))
        await until(lambda: flooder.peer_id in seen_by(hub))
        await shard.announce()
        await until(lambda: shard.peer_id in seen_by(flooder), deadline_s=NEW_SHARD_S)
        assert seen_by(hub)[flooder.peer_id] < 100


async def test_a_message_that_breaks_its_handling_ends_nothing():
    """A task of the library that fails ends all of its service, and the node with it."""
    async with open_swarm() as swarm:
        hub, liar, shard = await swarm.start_many(3)
        await liar.meet(hub)
        await shard.meet(hub)
        await until(lambda: all(is_meshed(member) for member in swarm.running))
        pubsub = liar.discovery._gossip._running
        stream = pubsub.peers[hub.host.libp2p_host.get_id()]
        message = gossip.rpc_pb2.Message(
            data=b"x",
            topicIDs=[liar.discovery._gossip._topic],
            from_id=b"\x12\x20" + bytes(32),
            seqno=b"1",
            signature=b"x",
            key=b"no key",
        )
        await pubsub.write_msg(stream, gossip.rpc_pb2.RPC(publish=[message]))
        await shard.announce()
        await until(lambda: shard.peer_id in seen_by(hub), deadline_s=NEW_SHARD_S)
        assert hub.discovery._gossip._running is not None


@pytest.mark.parametrize(
    "request_bytes",
    [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"\x00\x00\x00\x02\x81\x01", b"\x00\x00"],
    ids=["too long", "no msgpack", "no map of peers", "cut"],
)
async def test_a_malformed_table_request_is_refused(request_bytes: bytes):
    async with open_swarm() as swarm:
        server = await swarm.start()
        client = await swarm.start(sources=KADEMLIA_ALONE)
        await client.meet(server)
        stream = await client.host.open_stream(server.peer_id, exchange.PROTOCOL)
        await stream.write(request_bytes)
        await stream.close()
        with trio.fail_after(3), pytest.raises(PeerUnreachable):
            await stream.read_exactly(2)
        stream = await client.host.open_stream(server.peer_id, exchange.PROTOCOL)
        await stream.write(b"\x00\x00\x00\x01\x80")
        with trio.fail_after(3):
            assert await stream.read_exactly(2) == bytes(2)


async def test_a_table_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    async with open_swarm() as swarm:
        client, liar = await swarm.start_many(2)
        one = record(liar.number)

        async def flood(stream) -> None:
            while True:
                await stream.write(len(one).to_bytes(2, "big") + one)

        liar.host.handle(exchange.PROTOCOL, flood)
        await client.meet(liar)
        assert not await client.discovery._exchange.ask(liar.peer_id)
