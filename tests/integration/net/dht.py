"""Members of one DHT on 127.0.0.1, and the announcements that they store."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from pals.net.announce import Announcement, open_announcement, sign_announcement
from pals.net.host import Host
from pals.net.kademlia import Kademlia
from pals.types import LayerRange, SwarmId
from tests.integration.net.harness import Members, identity, open_hosts

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
        free_tokens=4096,
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
