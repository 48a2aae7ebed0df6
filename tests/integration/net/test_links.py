"""Links over real hosts, with a member that behaves badly on the other side."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
import trio

from pals.errors import PalsError, PeerUnreachable, QueueFull
from pals.net.handshake import LinkSecrets
from pals.net.host import Host, Stream
from pals.net.links import LINK_PROTOCOL, MAX_LINKS_PER_PEER, OUTBOX_FRAMES, Arrival, Links
from pals.net.wire import CONTROL_SHAPE, NO_ROWS, FrameShape, Lane, Outgoing
from pals.types import PeerId, SwarmId
from tests.integration.net.harness import Members, open_hosts, until

pytestmark = pytest.mark.trio


@dataclass(slots=True)
class Events:
    """Notes what comes and what is lost."""

    taken: list[bytes] = field(default_factory=list)
    lost: list[PeerId] = field(default_factory=list)

    def accepted(self, peer: PeerId, lane: Lane) -> tuple[FrameShape, ...]:
        return (CONTROL_SHAPE,)

    def on_frame(self, peer: PeerId, arrival: Arrival) -> None:
        self.taken.append(bytes(arrival.frame.payload))

    def on_link_lost(self, peer: PeerId, problem: str) -> None:
        self.lost.append(peer)


@dataclass(frozen=True, slots=True)
class Side:
    """One of two hosts and its links."""

    host: Host
    links: Links
    events: Events

    async def dial(self, other: Side) -> None:
        """Make one more link with the other side."""
        await self.links._dial(other.host.peer_id, other.host.addresses())

    def say(self, other: Side, payload: bytes, lane: Lane = Lane.CONTROL) -> None:
        self.links.send(other.host.peer_id, lane, Outgoing(CONTROL_SHAPE, NO_ROWS, (payload,)))

    def count(self, other: Side) -> int:
        return len(self.links._links_with(other.host.peer_id))


@asynccontextmanager
async def open_sides() -> AsyncIterator[tuple[Members, Side, Side]]:
    async with open_hosts(2) as (members, hosts), trio.open_nursery() as nursery:
        sides: list[Side] = []
        for host in hosts:
            secrets = LinkSecrets(
                swarm_id=SwarmId(bytes(32)), epoch=0, epoch_prk=bytes(32), local=host.peer_id
            )
            events = Events()
            sides.append(Side(host, Links(host, secrets, events), events))
            await nursery.start(sides[-1].links.run)
        yield members, sides[0], sides[1]
        nursery.cancel_scope.cancel()


async def hold_link(side: Side, stream: Stream) -> None:
    """Shake hands and wait until the other side ends the link."""
    await side.links._shake_hands("initiator", stream)
    await stream.read_some(1)


async def test_the_loss_of_one_of_two_links_is_told_and_the_other_is_used() -> None:
    async with open_sides() as (_, one, other):
        for _ in range(2):
            await one.dial(other)
        await until(lambda: other.count(one) == 2)
        one.links._links[other.host.peer_id][0].end("cut")
        await until(lambda: other.count(one) == 1)
        one.say(other, b"next")
        await until(lambda: other.events.taken == [b"next"])
        assert (one.events.lost, other.events.lost) == ([other.host.peer_id], [one.host.peer_id])


@pytest.mark.parametrize("lane", Lane)
async def test_a_lane_that_overflows_ends_the_link_unless_it_carries_prompts(lane: Lane) -> None:
    async with open_sides() as (_, one, other):
        await one.dial(other)
        for _ in range(OUTBOX_FRAMES[lane]):
            one.say(other, b"x", lane)
        with pytest.raises(QueueFull):
            one.say(other, b"x", lane)
        if lane is Lane.PREFILL:
            await until(lambda: len(other.events.taken) == OUTBOX_FRAMES[lane])
            one.say(other, b"next")
            await until(lambda: other.events.taken[-1] == b"next")
        else:
            await until(lambda: one.events.lost == [other.host.peer_id])
            with pytest.raises(PeerUnreachable):
                one.say(other, b"next")


async def test_handshakes_at_the_same_time_make_no_more_links_than_allowed() -> None:
    async with open_sides() as (_, one, other):
        await one.host.connect(other.host.peer_id, other.host.addresses())
        streams = [await one.host.open_stream(other.host.peer_id, LINK_PROTOCOL) for _ in range(12)]

        async def shake(stream: Stream) -> None:
            with suppress(PalsError):
                await hold_link(one, stream)

        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(shake, stream)
            await until(lambda: other.count(one) >= MAX_LINKS_PER_PEER)
            await until(lambda: len(nursery.child_tasks) == MAX_LINKS_PER_PEER)
            assert other.count(one) == MAX_LINKS_PER_PEER
            nursery.cancel_scope.cancel()


async def test_former_member_makes_no_link_on_a_connection_that_lives() -> None:
    async with open_sides() as (members, one, other):
        await one.host.connect(other.host.peer_id, other.host.addresses())
        stream = await one.host.open_stream(other.host.peer_id, LINK_PROTOCOL)
        members.discard(one.host.peer_id)
        with pytest.raises(PalsError):
            await hold_link(one, stream)
        assert other.count(one) == 0
        assert one.host.peer_id in other.host.connected_peers()
