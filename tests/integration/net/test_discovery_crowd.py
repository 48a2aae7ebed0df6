"""Many members in one process: the table is whole everywhere, and liars hide nobody."""

from __future__ import annotations

import random

import pytest

from pals.errors import NoChain
from pals.net import exchange
from pals.net.announce import Announcement
from pals.net.route import Chain, find_chain
from pals.types import LayerRange
from tests.integration.net.harness import until
from tests.integration.net.swarms import NUM_LAYERS, Member, Swarm, open_swarm, record

pytestmark = [pytest.mark.trio, pytest.mark.timeout(240)]

CROWD = 60
LIARS = 20
THIRDS = [LayerRange(0, 10), LayerRange(10, 20), LayerRange(20, 30)]
KAD = "/pals/00010203/kad/1.0.0"


@pytest.mark.slow
async def test_sixty_members_hold_the_same_whole_table_and_forget_the_dead() -> None:
    chance = random.Random(0)
    async with open_swarm() as swarm:
        crowd = await swarm.start_many(CROWD)
        shards, to_stop = crowd[::4], crowd[::12]
        for n, member in enumerate(crowd[1:], start=1):
            met = [other for other in crowd[1:n] if other not in to_stop] or crowd[:1]
            await member.meet(*chance.sample(met, k=min(len(met), 2)))
        for n, shard in enumerate(shards):
            await shard.announce(layers=THIRDS[n % 3])
        serving = {shard.peer_id for shard in shards}
        await until(lambda: all(listed(m) == serving for m in crowd), deadline_s=60.0)
        for shard in to_stop:
            await shard.stop()
        alive = [member for member in crowd if not member.stopped.is_set()]
        left = serving - {shard.peer_id for shard in to_stop}
        await until(lambda: all(listed(m) == left for m in alive), deadline_s=60.0)
        newcomer = await swarm.start()
        await newcomer.meet(alive[0])
        await until(lambda: listed(newcomer) == left)


async def test_among_twenty_liars_the_honest_chain_is_found() -> None:
    """The liars announce all layers, of other bytes, and say nothing of the honest ones."""
    async with open_swarm() as swarm:
        honest = await start_honest(swarm, THIRDS)
        liars = await start_liars(swarm)
        client = await swarm.start()
        await client.meet(*liars, honest[0])
        await until(lambda: {m.peer_id for m in honest} <= listed(client))
        chain = chain_by_trial(client, {member.peer_id for member in honest})
        assert [hop.layers for hop in chain.hops] == THIRDS


async def test_among_twenty_liars_the_layers_that_no_honest_one_serves_are_named() -> None:
    async with open_swarm() as swarm:
        honest = await start_honest(swarm, [THIRDS[0], THIRDS[2]])
        liars = await start_liars(swarm)
        client = await swarm.start()
        await client.meet(*liars, honest[0])
        await until(lambda: {m.peer_id for m in honest} <= listed(client))
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
        liar.host.handle(KAD, say_nothing)
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


def listed(member: Member) -> set:
    announcements: dict[str, Announcement] = member.discovery.announcements()
    return set(announcements)
