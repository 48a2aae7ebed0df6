"""Links over real hosts, with a member that behaves badly on the other side."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest
import trio
import trio.testing

from pals.errors import InvalidFrame, OtherEpoch, PalsError, PeerUnreachable, QueueFull
from pals.net import link as link_module
from pals.net import links as links_module
from pals.net.handshake import LinkSecrets
from pals.net.host import Host, Stream
from pals.net.links import LINK_PROTOCOL, MAX_LINKS_PER_PEER, Arrival, Links
from pals.net.live_link import OUTBOX_FRAMES
from pals.net.wire import (
    CONTROL_SHAPE,
    NO_ROWS,
    Codec,
    FrameShape,
    Lane,
    Outgoing,
    Row,
    Rows,
    buffer_of,
    hidden_shape,
)
from pals.types import PeerId, SessionId, SwarmId
from tests.integration.net.harness import Members, open_hosts, until

pytestmark = pytest.mark.trio

HIDDEN = hidden_shape(bytes(range(32)), 3, "bf16", 64)
STATES = np.random.default_rng(0).normal(size=(7, 64)).astype(ml_dtypes.bfloat16)
NEXT_SECRET = b"n" * 32


@dataclass
class Events:
    """Notes what comes and what is lost."""

    taken: list[bytes] = field(default_factory=list)
    states: dict[Lane, list[bytes]] = field(default_factory=lambda: {lane: [] for lane in Lane})
    lost: list[PeerId] = field(default_factory=list)

    def accepted(self, peer: PeerId, lane: Lane) -> tuple[FrameShape, ...]:
        return (CONTROL_SHAPE, HIDDEN)

    def on_frame(self, peer: PeerId, arrival: Arrival) -> None:
        payload = bytes(arrival.frame.payload)
        if arrival.frame.shape == CONTROL_SHAPE:
            self.taken.append(payload)
        else:
            assert arrival.frame.shape == HIDDEN
            self.states[arrival.frame.lane].append(payload)

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

    def send_states(self, other: Side, lane: Lane, states: np.ndarray) -> None:
        row = Rows.of(Row(SessionId(bytes(16)), 0, len(states)))
        self.links.send(other.host.peer_id, lane, Outgoing(HIDDEN, row, (buffer_of(states),)))

    def epochs(self, other: Side) -> list[int]:
        """Return the epoch of each link with the other side."""
        return [live.link.epoch for live in self.links._links_with(other.host.peer_id)]

    def count(self, other: Side) -> int:
        return len(self.links._links_with(other.host.peer_id))


@asynccontextmanager
async def open_sides(
    *codecs: Codec,
) -> AsyncIterator[tuple[Members, Side, Side]]:
    """Open two sides that propose these codecs, or none."""
    async with open_hosts(2) as (members, hosts), trio.open_nursery() as nursery:
        sides: list[Side] = []
        for host, codec in zip(hosts, codecs or (Codec.RAW, Codec.RAW), strict=True):
            secrets = LinkSecrets(
                swarm_id=SwarmId(bytes(32)),
                epoch=0,
                epoch_prk=bytes(32),
                local=host.peer_id,
                prefill_codec=codec,
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


LARGE = bytes(100_000)
"""A frame that does not go out in one go."""


async def lanes_up(side: Side, other: Side) -> None:
    """Wait until every lane of the one link may be written at once."""
    [live] = side.links._links_with(other.host.peer_id)
    await until(lambda: all(outbox.idle is not None for outbox in live._outboxes.values()))


@pytest.mark.parametrize("lane", Lane)
@pytest.mark.parametrize("first", [b"x", LARGE], ids=["before it is up", "behind a large one"])
async def test_a_lane_that_overflows_ends_the_link_unless_it_carries_prompts(
    lane: Lane, first: bytes
) -> None:
    async with open_sides() as (_, one, other):
        await one.dial(other)
        written = first == LARGE
        if written:
            await lanes_up(one, other)
        one.say(other, first, lane)
        for _ in range(OUTBOX_FRAMES[lane] - 1 + written):
            one.say(other, b"x", lane)
        with pytest.raises(QueueFull):
            one.say(other, b"x", lane)
        if lane is Lane.PREFILL:
            await until(lambda: len(other.events.taken) == OUTBOX_FRAMES[lane] + written)
            one.say(other, b"next")
            await until(lambda: other.events.taken[-1] == b"next")
        else:
            await until(lambda: one.events.lost == [other.host.peer_id])
            with pytest.raises(PeerUnreachable):
                one.say(other, b"next")


async def test_frames_leave_in_the_call_that_sends_them_and_in_order_behind_those_that_wait() -> (
    None
):
    async with open_sides() as (_, one, other):
        await one.dial(other)
        await lanes_up(one, other)
        [live] = one.links._links_with(other.host.peer_id)
        said = [b"a", b"b", LARGE, b"c", LARGE, b"d"]
        for payload in said:
            one.say(other, payload)
            is_idle = live._outboxes[Lane.CONTROL].idle is not None
            assert is_idle == (payload in (b"a", b"b"))
        await until(lambda: other.events.taken == said)
        await lanes_up(one, other)
        one.say(other, b"e")
        assert live._outboxes[Lane.CONTROL].idle is not None
        await until(lambda: other.events.taken[-1] == b"e")


async def test_nothing_leaves_on_a_link_that_was_cut_in_the_same_breath() -> None:
    async with open_sides() as (_, one, other):
        await one.dial(other)
        await lanes_up(one, other)
        one.links.drop(other.host.peer_id, "no longer a member")
        one.say(other, b"x")
        await until(lambda: one.events.lost == [other.host.peer_id])
        await until(lambda: other.events.lost == [one.host.peer_id])
        assert other.events.taken == []


async def test_nothing_is_taken_from_a_link_that_was_cut_in_the_same_breath(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_sides() as (_, one, other):
        await one.dial(other)
        await until(lambda: other.count(one) == 1)
        take = other.events.on_frame

        def take_and_cut(peer: PeerId, arrival: Arrival) -> None:
            take(peer, arrival)
            other.links.drop(peer, "no longer a member")

        monkeypatch.setattr(other.events, "on_frame", take_and_cut, raising=False)
        for sides in ((one, other), (other, one)):
            await lanes_up(*sides)
        one.say(other, b"first")
        one.say(other, b"later", Lane.DECODE)
        await until(lambda: other.events.lost == [one.host.peer_id])
        assert other.events.taken == [b"first"]


@pytest.mark.parametrize("problem", [InvalidFrame(peer=PeerId("x"), problem="bad"), ValueError()])
async def test_a_frame_that_cannot_be_taken_ends_its_link_and_no_other_stream(
    monkeypatch: pytest.MonkeyPatch, problem: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_sides() as (_, one, other):
        await one.dial(other)
        await lanes_up(one, other)

        def refuse(peer: PeerId, arrival: Arrival) -> None:
            raise problem

        monkeypatch.setattr(other.events, "on_frame", refuse, raising=False)
        one.say(other, b"x")
        await until(lambda: other.events.lost == [one.host.peer_id])
        await until(lambda: one.events.lost == [other.host.peer_id])
        assert one.host.peer_id in other.host.connected_peers()
        monkeypatch.undo()
        await one.dial(other)
        one.say(other, b"again")
        await until(lambda: other.events.taken == [b"again"])


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


# --- keys ----------------------------------------------------------------------------


async def talk(one: Side, other: Side, *, turns: int) -> None:
    """Send numbered messages both ways, a few at a time, and wait until all are there."""
    first = [len(side.events.taken) for side in (other, one)]
    for turn in range(turns):
        for sender, receiver in ((one, other), (other, one)):
            sender.say(receiver, b"%d" % turn)
        await until(lambda n=turn: len(other.events.taken) > first[0] + n - 8)
    await until(lambda: [len(s.events.taken) for s in (other, one)] == [n + turns for n in first])
    said = [b"%d" % turn for turn in range(turns)]
    assert [s.events.taken[n:] for s, n in zip((other, one), first, strict=True)] == [said, said]


async def test_links_change_keys_on_their_own_while_frames_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "REKEY_INTERVAL_S", 0.0)
    monkeypatch.setattr(links_module, "TICK_S", 0.01)
    async with open_sides() as (_, one, other):
        await one.dial(other)
        await until(lambda: other.count(one) == 1)
        [live] = one.links._links_with(other.host.peer_id)
        seen: set[bytes] = set()
        while len(seen) < 5:
            await talk(one, other, turns=20)
            seen.add(live.link._keys.address.link)
        assert (one.events.lost, other.events.lost) == ([], [])


@pytest.mark.parametrize("first", [0, 1])
async def test_links_enter_the_next_epoch_and_new_ones_begin_in_it(first: int) -> None:
    async with open_sides() as (_, one, other):
        await one.dial(other)
        await until(lambda: other.count(one) == 1)
        sides = (one, other)
        sides[first].links.rekey(1, NEXT_SECRET)
        await talk(one, other, turns=20)  # the other does not know the epoch yet
        assert (one.epochs(other), other.epochs(one)) == ([0], [0])
        sides[1 - first].links.rekey(1, NEXT_SECRET)
        await until(lambda: one.epochs(other) == other.epochs(one) == [1])
        await talk(one, other, turns=20)
        await one.dial(other)
        await until(lambda: other.epochs(one) == [1, 1])
        assert (one.events.lost, other.events.lost) == ([], [])


async def test_link_with_a_peer_that_does_not_follow_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "REKEY_DEADLINE_S", 0.2)
    monkeypatch.setattr(links_module, "EPOCH_DEADLINE_S", 0.1)
    monkeypatch.setattr(links_module, "TICK_S", 0.01)
    async with open_sides() as (_, one, other):
        await one.dial(other)
        await until(lambda: other.count(one) == 1)
        one.links.rekey(1, NEXT_SECRET)
        await until(lambda: bool(one.events.lost and other.events.lost))
        with pytest.raises(OtherEpoch, match="another epoch"):
            await one.dial(other)


@pytest.mark.parametrize("first", [0, 1])
async def test_a_handshake_between_two_epochs_ends_with_both_in_the_newer(first: int) -> None:
    async with open_sides() as (_, one, other):
        sides = (one, other)
        sides[first].links.rekey(1, NEXT_SECRET)
        behind = sides[1 - first]
        told: list[PeerId] = []

        def learn(peer: PeerId) -> None:
            told.append(peer)
            if len(told) == 1:
                behind.links.rekey(1, NEXT_SECRET)

        behind.links.on_other_epoch = learn
        await one.dial(other)
        await until(lambda: other.epochs(one) == [1])
        assert one.epochs(other) == [1]
        assert told == [sides[first].host.peer_id]


@pytest.mark.parametrize("waiting", [0, 1])
async def test_no_link_is_made_before_the_expected_secret_is_there(waiting: int) -> None:
    async with open_sides() as (_, one, other):
        sides = (one, other)
        for side in sides:
            side.links.expect(1)
        sides[1 - waiting].links.rekey(1, NEXT_SECRET)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.dial, other)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert (one.count(other), other.count(one)) == (0, 0)
            sides[waiting].links.rekey(1, NEXT_SECRET)
        await until(lambda: other.epochs(one) == [1])


# --- codec ---------------------------------------------------------------------------


async def states_over(lane: Lane, *codecs: Codec) -> np.ndarray:
    """Send hidden states over a link between sides that propose these codecs."""
    async with open_sides(*codecs) as (_, one, other):
        await one.dial(other)
        one.send_states(other, lane, STATES)
        await until(lambda: len(other.events.states[lane]) == 1)
        [payload] = other.events.states[lane]
        return np.frombuffer(payload, STATES.dtype).reshape(STATES.shape)


async def test_prompts_cross_in_int8_when_both_ends_propose_it() -> None:
    got = await states_over(Lane.PREFILL, Codec.INT8, Codec.INT8)
    error = np.abs(got.astype(np.float32) - STATES.astype(np.float32))
    assert 0 < error.max() < 0.03


@pytest.mark.parametrize(
    ("lane", "codecs"),
    [
        (Lane.DECODE, (Codec.INT8, Codec.INT8)),
        (Lane.PREFILL, (Codec.INT8, Codec.RAW)),
        (Lane.PREFILL, (Codec.RAW, Codec.INT8)),
    ],
)
async def test_everything_else_crosses_as_it_is(lane: Lane, codecs: tuple[Codec, Codec]) -> None:
    got = await states_over(lane, *codecs)
    assert got.tobytes() == STATES.tobytes()
