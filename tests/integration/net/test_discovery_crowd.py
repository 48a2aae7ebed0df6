"""Many members in one process: the table is whole everywhere."""

from __future__ import annotations

import random

import pytest

from pals.net.announce import Announcement
from pals.types import LayerRange
from tests.integration.net.harness import until
from tests.integration.net.swarms import Member, open_swarm

pytestmark = [pytest.mark.trio, pytest.mark.timeout(240)]

CROWD = 60
THIRDS = [LayerRange(0, 10), LayerRange(10, 20), LayerRange(20, 30)]


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


def listed(member: Member) -> set:
    announcements: dict[str, Announcement] = member.discovery.announcements()
    return set(announcements)
