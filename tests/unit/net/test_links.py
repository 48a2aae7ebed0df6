from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import cast

import pytest
import trio
import trio.testing

from pals.errors import InvalidFrame, PeerUnreachable
from pals.net.handshake import LinkSecrets
from pals.net.host import Host, StreamHandler
from pals.net.links import LANE_PROTOCOL, LINK_PROTOCOL, Arrival, Links
from pals.net.wire import CONTROL_SHAPE, NO_ROWS, FrameShape, Lane, Outgoing
from pals.types import PeerId, SwarmId

LOCAL = PeerId("local")


class FakeHost:
    """A host that nobody dials."""

    peer_id = LOCAL

    def __init__(self) -> None:
        self.handlers: dict[str, StreamHandler] = {}

    def connected_peers(self) -> frozenset[PeerId]:
        return frozenset()

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()
        raise PeerUnreachable(peer=peer, problem="nobody dials")

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        self.handlers[protocol] = handler


class FakeStream:
    """Takes all that is written, and has nothing to say."""

    def __init__(self, resets: list[FakeStream]) -> None:
        self.peer_id = PeerId("peer")
        self._resets = resets

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def read_exactly(self, n: int) -> bytes:
        await trio.lowlevel.checkpoint()
        raise PeerUnreachable(peer=self.peer_id, problem="the stream ended")

    async def reset(self) -> None:
        self._resets.append(self)


class FarHost(FakeHost):
    """A host whose peers answer once the test says so; some streams are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.answered = trio.Event()
        self.refused: set[int] = set()
        self.resets: list[FakeStream] = []

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()

    async def open_stream(self, peer: PeerId, protocol: str) -> FakeStream:
        self.asked.append(protocol)
        number = len(self.asked)
        if number not in self.refused:
            await self.answered.wait()
            return FakeStream(self.resets)
        raise PeerUnreachable(peer=peer, problem="refused")


class Events:
    """Refuses the frames that say so, and notes the others."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []

    def accepted(self, peer: PeerId, lane: Lane) -> tuple[FrameShape, ...]:
        return (CONTROL_SHAPE,)

    def on_frame(self, peer: PeerId, arrival: Arrival) -> None:
        payload = bytes(arrival.frame.payload)
        if payload == b"stale":
            raise InvalidFrame(peer=peer, problem="stale")
        self.taken.append(payload)

    def on_link_lost(self, peer: PeerId, problem: str) -> None:
        raise AssertionError("there was no link")


def make_links(events: Events, host: FakeHost | None = None) -> Links:
    secrets = LinkSecrets(swarm_id=SwarmId(bytes(32)), epoch=0, epoch_prk=bytes(32), local=LOCAL)
    return Links(cast("Host", host or FakeHost()), secrets, events)


@pytest.mark.trio
async def test_refused_frame_of_the_process_to_itself_ends_nothing(nursery: trio.Nursery) -> None:
    events = Events()
    links = make_links(events)
    await nursery.start(links.run)
    for payload in (b"stale", b"next"):
        links.send(LOCAL, Lane.CONTROL, Outgoing(CONTROL_SHAPE, NO_ROWS, (payload,)))
    await trio.testing.wait_all_tasks_blocked()
    assert events.taken == [b"next"]


@pytest.mark.trio
async def test_nothing_is_kept_of_peers_that_were_only_named(nursery: trio.Nursery) -> None:
    links = make_links(Events())
    await nursery.start(links.run)
    for number in range(5):
        named = PeerId(f"peer-{number}")
        links.drop(named, "gone")
        with pytest.raises(PeerUnreachable, match="no link"):
            links.send(named, Lane.CONTROL, Outgoing(CONTROL_SHAPE, NO_ROWS, (b"",)))
        with pytest.raises(PeerUnreachable, match="nobody dials"):
            await links.ensure(named, ())
    gc.collect()
    assert (len(links._links), len(links._dialling)) == (0, 0)


@pytest.mark.trio
async def test_the_streams_of_a_link_are_asked_for_in_one_round_trip_and_all_are_freed(
    nursery: trio.Nursery,
) -> None:
    host = FarHost()
    links = make_links(Events(), host)
    await nursery.start(links.run)

    async def fail_to_link() -> None:
        with pytest.raises(PeerUnreachable, match="the stream ended"):
            await links.ensure(PeerId("peer"), ())

    async with trio.open_nursery() as dialling:
        dialling.start_soon(fail_to_link)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(host.asked) == [LANE_PROTOCOL, LANE_PROTOCOL, LINK_PROTOCOL]
        host.answered.set()
    assert len(host.resets) == 3


@pytest.mark.trio
@pytest.mark.parametrize("refused", [{1}, {2}, {3}, {1, 2, 3}])
async def test_a_stream_that_is_refused_ends_the_dial_at_once(
    nursery: trio.Nursery, refused: set[int]
) -> None:
    host = FarHost()
    host.refused = refused
    links = make_links(Events(), host)
    await nursery.start(links.run)
    with pytest.raises(PeerUnreachable, match="refused"):
        await links.ensure(PeerId("peer"), ())
    assert not links.linked_peers()


@pytest.mark.trio
async def test_epoch_that_is_not_later_is_refused() -> None:
    links = make_links(Events())
    links.rekey(5, bytes(32))
    for epoch in (5, 4, 0):
        with pytest.raises(ValueError, match=f"epoch {epoch} does not follow 5"):
            links.rekey(epoch, bytes(32))
