"""Round trips over links that are queues here, on a clock that jumps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from pals.errors import PeerUnreachable
from pals.net.control import Ping, Pong, decode_control
from pals.net.pings import Pings
from pals.net.wire import Lane, Outgoing
from pals.types import PeerId

HERE, THERE = PeerId("here"), PeerId("there")

pytestmark = pytest.mark.trio


class Wire:
    """Links whose frames ``deliver`` takes."""

    def __init__(self, deliver: Callable[[Ping | Pong], None]) -> None:
        self.deliver = deliver

    def send(self, peer: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        assert (peer, lane) == (THERE, Lane.CONTROL)
        message = decode_control(HERE, memoryview(b"".join(outgoing.payload)))
        assert isinstance(message, Ping | Pong)
        self.deliver(message)


class NoLink:
    def send(self, peer: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        raise PeerUnreachable(peer=peer, problem="no link")


async def test_a_round_trip_lasts_until_its_own_answer(
    autojump_clock: trio.abc.Clock, nursery: trio.Nursery
) -> None:
    pings = Pings()

    async def answer(message: Ping) -> None:
        await trio.sleep(0.02)
        pings.take(PeerId("another"), Pong(number=message.number))
        pings.take(THERE, Pong(number=message.number + 1))
        await trio.sleep(0.05)
        pings.take(THERE, Pong(number=message.number))

    pings.use(Wire(lambda message: nursery.start_soon(answer, message)))

    assert await pings.round_trip_s(THERE, deadline_s=1) == pytest.approx(0.07)


async def test_silence_ends_at_the_deadline_and_a_late_answer_is_ignored(
    autojump_clock: trio.abc.Clock,
) -> None:
    sent: list[Ping | Pong] = []
    pings = Pings()
    pings.use(Wire(sent.append))

    with pytest.raises(PeerUnreachable, match="no answer within 2 s"):
        await pings.round_trip_s(THERE, deadline_s=2)

    assert trio.current_time() >= 2
    pings.take(THERE, Pong(number=sent[0].number))


async def test_a_ping_is_answered_with_its_number() -> None:
    sent: list[Ping | Pong] = []
    pings = Pings()
    pings.use(Wire(sent.append))

    pings.take(THERE, Ping(number=7))

    assert sent == [Pong(number=7)]


async def test_an_answer_that_cannot_be_sent_harms_nobody() -> None:
    pings = Pings()
    pings.use(NoLink())

    pings.take(THERE, Ping(number=7))
    with pytest.raises(PeerUnreachable, match="no link"):
        await pings.round_trip_s(THERE, deadline_s=2)
