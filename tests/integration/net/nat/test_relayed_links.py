"""The links of sessions, end to end through a relay and then past it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import trio

from pals.net import node as node_module
from pals.net.link import LinkSecrets
from pals.net.links import Arrival, Links
from pals.net.node import leave_relay
from pals.net.wire import CONTROL_SHAPE, NO_ROWS, FrameShape, Lane, Outgoing
from pals.types import PeerId, SwarmId
from tests.integration.net.harness import until
from tests.integration.net.nat.members import RELAYS, USES_RELAYS, Member, open_members

pytestmark = pytest.mark.trio


@dataclass(slots=True)
class Taken:
    """Notes what comes, and which links are lost."""

    frames: list[bytes] = field(default_factory=list)
    lost: list[PeerId] = field(default_factory=list)

    def accepted(self, peer: PeerId, lane: Lane) -> tuple[FrameShape, ...]:
        return (CONTROL_SHAPE,)

    def on_frame(self, peer: PeerId, arrival: Arrival) -> None:
        self.frames.append(bytes(arrival.frame.payload))

    def on_link_lost(self, peer: PeerId, problem: str) -> None:
        self.lost.append(peer)


@dataclass(frozen=True, slots=True)
class Linked:
    """A member, its links, and what came over them."""

    member: Member
    links: Links
    taken: Taken

    async def say(self, other: Linked, payload: bytes) -> None:
        await self.links.ensure(other.member.peer_id, ())
        frame = Outgoing(CONTROL_SHAPE, NO_ROWS, (payload,))
        self.links.send(other.member.peer_id, Lane.CONTROL, frame)


@asynccontextmanager
async def open_linked() -> AsyncIterator[tuple[Member, Linked, Linked]]:
    """Run a relay and two members with links, connected through it."""
    async with (
        open_members(RELAYS, USES_RELAYS, USES_RELAYS) as (_, (middle, *ends)),
        trio.open_nursery() as nursery,
    ):
        linked = []
        for end in ends:
            secrets = LinkSecrets(
                swarm_id=SwarmId(bytes(32)), epoch=0, epoch_prk=bytes(32), local=end.peer_id
            )
            taken = Taken()
            links = Links(end.host, secrets, taken)
            await nursery.start(links.run)
            linked.append(Linked(end, links, taken))
        await ends[0].traversal._user.connect(ends[1].peer_id, middle.peer_id)
        yield middle, *linked
        nursery.cancel_scope.cancel()


async def test_a_link_runs_through_a_relay():
    async with open_linked() as (middle, a, b):
        await a.say(b, b"one")
        await until(lambda: b.taken.frames == [b"one"])
        await b.say(a, b"two")
        await until(lambda: a.taken.frames == [b"two"])

        (circuit,) = middle.traversal.relay.book.circuits
        assert circuit.carried_bytes > 0


async def test_a_link_leaves_the_relay_between_two_sessions(monkeypatch):
    monkeypatch.setattr(node_module, "LEAVE_RELAY_S", 0.05)
    in_use = [True]
    async with open_linked() as (middle, a, b), trio.open_nursery() as nursery:
        await a.say(b, b"one")
        await until(lambda: b.taken.frames == [b"one"])
        places = await a.member.traversal._meeter.find(b.member.peer_id, [middle.peer_id])
        assert not await a.member.traversal._try_punch(b.member.peer_id, places)
        node = SimpleNamespace(needs=lambda _: in_use[0], links=a.links)
        nursery.start_soon(leave_relay, node, b.member.peer_id)

        await a.say(b, b"two")
        await until(lambda: b.taken.frames == [b"one", b"two"])
        assert not b.taken.lost
        in_use[0] = False
        await until(lambda: b.taken.lost == [a.member.peer_id])
        (circuit,) = middle.traversal.relay.book.circuits
        carried_bytes = circuit.carried_bytes
        await a.say(b, bytes(50_000))

        await until(lambda: len(b.taken.frames) == 3)
        assert circuit.carried_bytes < carried_bytes + 50_000
