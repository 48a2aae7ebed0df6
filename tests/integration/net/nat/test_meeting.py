"""Meetings with members that misbehave."""

from __future__ import annotations

import pytest
import trio

from pals.errors import InvalidFrame, PeerUnreachable
from pals.net.nat import meeting
from pals.net.nat.addresses import Endpoint
from pals.net.nat.conversation import read_expected, send_message
from pals.net.nat.messages import (
    MEET_PROTOCOL,
    MET_PROTOCOL,
    Go,
    Here,
    Meet,
    Met,
    Offer,
    Taken,
)
from pals.types import PeerId
from tests.integration.net.nat.members import PLAIN, no_holes, open_members

pytestmark = pytest.mark.trio

VICTIM = "/ip4/203.0.113.7/tcp/22"


@pytest.fixture(autouse=True)
def short_punches(monkeypatch):
    monkeypatch.setattr(meeting, "PUNCH_S", 0.3)


async def call(member, other, source: PeerId, *addresses: str):
    """Say to ``other``, as a meeting member, that ``source`` calls."""
    stream = await member.host.open_stream(other.peer_id, MET_PROTOCOL, connected_only=True)
    await send_message(stream, Met(source=source, observed=(), addresses=addresses))
    return stream


async def test_a_meeting_member_passes_on_only_addresses_that_it_saw(monkeypatch):
    dialled: list[Endpoint] = []

    async def dial(endpoint, *, source=None):
        dialled.append(endpoint)
        raise OSError

    async with open_members(PLAIN, PLAIN, PLAIN) as (_, (middle, a, b)):
        monkeypatch.setattr(meeting, "dial_endpoint", dial)
        stream = await a.host.open_stream(middle.peer_id, MEET_PROTOCOL)
        await send_message(stream, Meet(target=b.peer_id))
        await read_expected(stream, Here)
        own = str(a.host.listening()[0])

        await send_message(stream, Offer(addresses=(VICTIM, own)))
        await read_expected(stream, Offer)
        await send_message(stream, Go())
        await trio.sleep(0.5)

        assert set(dialled) == {Endpoint.parse(own)}


async def test_a_call_from_somebody_who_is_no_member_is_refused():
    async with open_members(PLAIN, PLAIN) as (_, (middle, a)):
        stream = await call(middle, a, PeerId("12D3KooWStranger"), VICTIM)

        with pytest.raises(PeerUnreachable, match="not a member"):
            await read_expected(stream, Offer)


async def test_a_member_is_called_only_so_often_by_one_other():
    async with open_members(PLAIN, PLAIN, PLAIN) as (_, (middle, a, b)):
        for _ in range(meeting.MEETINGS_AT_ONCE):
            await read_expected(await call(middle, a, b.peer_id), Offer)

        with pytest.raises(PeerUnreachable, match="too often"):
            await read_expected(await call(middle, a, b.peer_id), Offer)


async def test_meetings_of_one_member_are_limited_at_the_meeting_point():
    async with open_members(PLAIN, PLAIN, PLAIN) as (_, (middle, a, b)):
        no_holes(a, b)
        problems = []
        for _ in range(meeting.MEETINGS_AT_ONCE + 1):
            places = await a.traversal._meeter.find(b.peer_id, [middle.peer_id])
            problems.append(await a.traversal._try_punch(b.peer_id, places))

        assert ["too many" in problem for problem in problems] == [
            *[False] * meeting.MEETINGS_AT_ONCE,
            True,
        ]


async def test_a_member_that_does_not_go_to_the_meeting_is_a_typed_error(monkeypatch):
    async def refuse(stream):
        await stream.reset()

    async with open_members(PLAIN, PLAIN, PLAIN) as (_, (middle, a, b)):
        b.host.handle(MET_PROTOCOL, refuse)
        (place,) = await a.traversal._meeter.find(b.peer_id, [middle.peer_id])

        with trio.fail_after(5), pytest.raises(PeerUnreachable):
            await a.traversal._meeter.punch(b.peer_id, place)


async def test_a_meeting_point_that_breaks_the_protocol_is_a_typed_error():
    async def answer_otherwise(stream):
        await read_expected(stream, Meet)
        await send_message(stream, Here(observed=(), relays=False))
        await read_expected(stream, Offer)
        await send_message(stream, Taken())

    async with open_members(PLAIN, PLAIN, PLAIN) as (_, (middle, a, b)):
        middle.host.handle(MEET_PROTOCOL, answer_otherwise)
        (place,) = await a.traversal._meeter.find(b.peer_id, [middle.peer_id])

        with pytest.raises(InvalidFrame, match="Taken"):
            await a.traversal._meeter.punch(b.peer_id, place)


async def test_members_that_are_silent_do_not_hold_up_those_that_answer(monkeypatch):
    monkeypatch.setattr(meeting, "FIND_DEADLINE_S", 0.5)

    async def say_nothing(stream):
        await trio.sleep_forever()

    async with open_members(PLAIN, PLAIN, PLAIN, PLAIN) as (_, (middle, a, b, silent)):
        silent.host.handle(MEET_PROTOCOL, say_nothing)
        await a.host.connect(silent.peer_id, silent.host.addresses())

        places = await a.traversal._meeter.find(b.peer_id, [silent.peer_id, middle.peer_id])

        assert [place.member for place in places] == [middle.peer_id]
