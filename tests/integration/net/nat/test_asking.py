"""Members that say where they see each other, and dial back to nobody else."""

from __future__ import annotations

import pytest
import trio

from pals.errors import InvalidFrame, PeerUnreachable
from pals.net.nat.addresses import Endpoint
from pals.net.nat.asking import ASKS_AT_ONCE, ask_member
from pals.net.nat.conversation import read_expected, send_message
from pals.net.nat.messages import SEEN_PROTOCOL, Ask, Seen
from tests.integration.net.harness import until
from tests.integration.net.nat.members import PLAIN, open_members

pytestmark = pytest.mark.trio


def port_of(member):
    return member.host.listening()[0].port


async def test_a_member_tells_where_it_sees_this_machine_and_that_it_can_dial_it():
    async with open_members(PLAIN, PLAIN) as (_, (middle, a)):
        report = await ask_member(a.host, middle.peer_id, [port_of(a), 1])

        assert report.observed == middle.host.observed(a.peer_id)[0]
        assert report.asked == {port_of(a), 1}
        assert report.reached == {port_of(a)}
        assert len(middle.host._connections(a.peer_id)) == 1


async def test_a_port_with_another_peer_behind_it_does_not_count():
    async with open_members(PLAIN, PLAIN, PLAIN) as (_, (middle, a, b)):
        report = await ask_member(a.host, middle.peer_id, [port_of(b)])

        assert report.reached == set()


async def test_members_are_asked_on_their_own_and_no_more_often_than_they_answer():
    async with open_members(PLAIN, PLAIN) as (_, (middle, a)):
        await until(lambda: a.traversal.state._reports)  # the one that nobody called for

        for _ in range(ASKS_AT_ONCE - 1):
            await ask_member(a.host, middle.peer_id, [])
        with pytest.raises(PeerUnreachable, match="asked too often"):
            await ask_member(a.host, middle.peer_id, [])


async def test_an_answer_that_names_what_was_not_asked_counts_for_nothing():
    async def lie(stream):
        await read_expected(stream, Ask)
        await send_message(stream, Seen(observed="/ip4/203.0.113.7/tcp/1", reached=(1, 2)))

    async with open_members(PLAIN, PLAIN) as (_, (middle, a)):
        middle.host.handle(SEEN_PROTOCOL, lie)

        report = await ask_member(a.host, middle.peer_id, [2])

        assert report.observed == Endpoint("203.0.113.7", 1)
        assert report.reached == {2}


@pytest.mark.parametrize(
    "answer", [b"\x00\x01\xc1", b"\xff\xff", Seen(observed="/dns4/example.org/tcp/1")]
)
async def test_an_answer_that_is_none_is_a_typed_error(answer):
    async def talk(stream):
        if isinstance(answer, bytes):
            await stream.write(answer)
        else:
            await send_message(stream, answer)

    async with open_members(PLAIN, PLAIN) as (_, (middle, a)):
        middle.host.handle(SEEN_PROTOCOL, talk)

        with pytest.raises(InvalidFrame):
            await ask_member(a.host, middle.peer_id, [])


async def test_a_member_that_says_nothing_is_waited_for_only_so_long(monkeypatch):
    monkeypatch.setattr("pals.net.nat.asking.ASK_DEADLINE_S", 0.2)

    async def say_nothing(stream):
        await trio.sleep_forever()

    async with open_members(PLAIN, PLAIN) as (_, (middle, a)):
        middle.host.handle(SEEN_PROTOCOL, say_nothing)

        with trio.fail_after(5), pytest.raises(PeerUnreachable, match="no answer"):
            await ask_member(a.host, middle.peer_id, [])
