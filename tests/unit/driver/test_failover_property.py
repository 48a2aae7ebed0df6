"""Shards that die, leave, stand still and come back at random give the unfailed answers."""

from __future__ import annotations

import trio
import trio.testing
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pals.driver.recovery import Patience
from tests.unit.driver.virtual_shards import (
    RANGES,
    World,
    make_request,
    open_world,
    peer,
    unfailed,
)

ACTIONS = st.sampled_from(
    ["kill", "reported", "silence", "drain", "hang", "cut", "revive", "preempt"]
)
NAMES = st.sampled_from([f"{name}-{n}" for name in RANGES for n in range(2)])
SCRIPTS = st.lists(st.tuples(st.floats(0.0, 4.0), ACTIONS, NAMES, NAMES), min_size=1, max_size=8)


def act(world: World, action: str, name: str, other: str) -> None:
    """Do one thing to a shard, in whatever state it is."""
    shards = world.shards
    victim = peer(name)
    if action == "revive":
        shards.revive(name)
    elif victim in shards.dead:
        return
    elif action in ("kill", "reported"):
        shards.kill(victim, told_first=action == "reported")
    elif action == "silence":
        shards.silent.add(victim)
    elif action == "drain":
        shards.drain(victim)
    elif action == "preempt":
        shards.preempt(victim)
    elif action == "hang":
        shards.hung.add(victim)
    elif name != other:
        shards.cut_between(victim, peer(other))


A_SHARD_DIES_BETWEEN_LINK_AND_OPEN = [
    (0.0, "kill", "tail-0", "head-0"),
    (0.0, "silence", "tail-1", "head-0"),
    (1.0, "kill", "middle-0", "head-0"),
]
"""The others are told at once that the session is over, which they have just been asked for."""


@settings(max_examples=150)
@example(A_SHARD_DIES_BETWEEN_LINK_AND_OPEN, 1)
@given(SCRIPTS, st.integers(1, 3))
def test_answers_are_whole_whatever_happens_to_the_shards(
    script: list[tuple[float, str, str, str]], count: int
) -> None:
    """Everything comes back in the end, so every answer ends, and each is the unfailed one."""
    requests = [make_request(count=40 + 20 * n, seed=n) for n in range(count)]

    async def main() -> None:
        async with open_world(patience=Patience(wait_for_peers_s=600.0)) as world:
            readers = [await world.ask(request) for request in requests]
            for pause_s, action, name, other in script:
                await trio.sleep(pause_s)
                act(world, action, name, other)
            await trio.sleep(1)
            world.shards.cut.clear()
            for name in RANGES:
                for number in range(2):
                    world.shards.revive(f"{name}-{number}")
            for reader, request in zip(readers, requests, strict=True):
                assert await reader.read() == unfailed(request)
            await trio.sleep(1)
            assert [world.shards.sessions_at(p) for p in world.shards.members()] == [0] * 6

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
