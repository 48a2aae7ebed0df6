"""Ways to members that cannot be dialled, over real sockets on 127.0.0.1.

No peer is given another's address, so that dialling fails at once. Hole punching needs
no hole here; when the two do not tell each other where they are, it fails as it does
behind symmetric NATs, and only a relay is left.
"""

from __future__ import annotations

import pytest

from pals.errors import NoPath, PeerUnreachable
from pals.net.nat import meeting
from pals.net.raw import DIRECT, PUNCHED, Path
from tests.integration.net.harness import ask_echo, until
from tests.integration.net.nat.members import (
    PLAIN,
    RELAYS,
    USES_RELAYS,
    no_holes,
    open_members,
)

pytestmark = pytest.mark.trio


@pytest.fixture
def short_punches(monkeypatch):
    """For punches that fail: one that works takes as long as a loaded machine needs."""
    monkeypatch.setattr(meeting, "PUNCH_S", 0.5)


def is_direct(member, other):
    """Whoever is first decides whether a socket counts as punched where there is no NAT."""
    return member.host.path(other.peer_id) in (DIRECT, PUNCHED)


async def test_two_members_meet_at_a_third_and_connect_past_it():
    async with open_members(PLAIN, PLAIN, PLAIN) as (_, (middle, a, b)):
        await a.host.connect(b.peer_id, [])

        assert is_direct(a, b)
        assert is_direct(b, a)
        await middle.host.drop_peer(a.peer_id)
        await middle.host.drop_peer(b.peer_id)
        assert await ask_echo(a.host, b.host) == b"hello"


async def test_opening_a_stream_finds_the_way_too():
    async with open_members(PLAIN, PLAIN, PLAIN) as (_, (_, a, b)):
        assert await ask_echo(a.host, b.host) == b"hello"


async def test_a_member_is_dialled_before_it_is_met():
    async with open_members(PLAIN, PLAIN, PLAIN) as (_, (_, a, b)):
        await a.host.connect(b.peer_id, b.host.addresses())

        assert a.host.path(b.peer_id) == DIRECT


async def test_a_meeting_place_that_is_announced_is_gone_to():
    async with open_members(PLAIN, PLAIN, PLAIN) as (_, (middle, a, b)):
        await a.host.drop_peer(middle.peer_id)
        await until(lambda: not middle.host.observed(a.peer_id))

        place = f"/p2p/{middle.peer_id}/p2p-circuit/p2p/{b.peer_id}"
        await a.host.connect(b.peer_id, [place])

        assert is_direct(a, b)


@pytest.mark.usefixtures("short_punches")
async def test_what_cannot_be_punched_is_relayed_when_all_three_want_it():
    async with open_members(RELAYS, USES_RELAYS, USES_RELAYS) as (_, (middle, a, b)):
        no_holes(a, b)

        await a.host.connect(b.peer_id, [])

        assert a.host.path(b.peer_id) == Path("relayed", middle.peer_id)
        assert b.host.path(a.peer_id) == Path("relayed", middle.peer_id)
        assert await ask_echo(a.host, b.host, bytes(1 << 20)) == bytes(1 << 20)
        assert await ask_echo(b.host, a.host) == b"hello"
        assert (await a.host.round_trip_s(b.peer_id)) > 0


@pytest.mark.usefixtures("short_punches")
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ((PLAIN, USES_RELAYS, USES_RELAYS), "`--allow-relay`"),
        ((RELAYS, PLAIN, USES_RELAYS), "this machine was started without `--use-relay`"),
        ((RELAYS, USES_RELAYS, PLAIN), "the peer was started without `--use-relay`"),
    ],
    ids=["relay", "dialler", "dialled"],
)
async def test_nothing_is_relayed_when_one_of_the_three_does_not_want_it(options, problem):
    async with open_members(*options) as (_, (_, a, b)):
        no_holes(a, b)

        with pytest.raises(NoPath) as caught:
            await a.host.connect(b.peer_id, [])

        assert problem in caught.value.fields["relayed"]
        assert "no hole" in caught.value.fields["punched"]
        assert not a.host.path(b.peer_id)
        assert "--announce" in caught.value.hint


async def test_a_member_that_nobody_is_connected_to_is_unreachable():
    async with open_members(PLAIN, PLAIN, PLAIN) as (_, (middle, a, b)):
        await b.host.drop_peer(middle.peer_id)
        await until(lambda: not middle.host.observed(b.peer_id))

        with pytest.raises(PeerUnreachable, match="no connected member is connected to it"):
            await a.host.connect(b.peer_id, [])
