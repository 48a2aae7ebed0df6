"""What a relay carries, what it sees of it, and where it stops."""

from __future__ import annotations

import pytest
import trio

from pals.errors import PeerUnreachable, RelayRefused
from pals.net.nat import relay as relay_module
from pals.net.nat.conversation import read_expected, send_message
from pals.net.nat.limits import RelayLimits
from pals.net.nat.messages import RELAYED_PROTOCOL, Relayed, Taken
from pals.net.nat.traversal import TraversalOptions
from tests.integration.net.harness import ECHO, ask_echo, until
from tests.integration.net.nat.members import PLAIN, RELAYS, USES_RELAYS, open_members

pytestmark = pytest.mark.trio

CANARY = b"the quick brown fox jumps over the lazy dog " * 32


def relaying(**limits):
    return TraversalOptions(allow_relay=True, limits=RelayLimits(**limits))


async def exchange_for_ever(member, other):
    stream = await member.host.open_stream(other.peer_id, ECHO, connected_only=True)
    while True:
        await stream.write(b"x")
        await stream.read_exactly(1)


async def relay_to(member, other, middle):
    """Connect through ``middle`` without trying anything else."""
    await member.traversal._user.connect(other.peer_id, middle.peer_id)


async def test_a_relay_sees_sizes_and_no_content(monkeypatch):
    carried = []
    copy = relay_module.RelayService._copy

    async def listen(self, circuit, sender, receiver):
        write = receiver.write

        async def keep(data):
            carried.append(bytes(data))
            await write(data)

        receiver.write = keep
        await copy(self, circuit, sender, receiver)

    monkeypatch.setattr(relay_module.RelayService, "_copy", listen)
    async with open_members(RELAYS, USES_RELAYS, USES_RELAYS) as (_, (middle, a, b)):
        await relay_to(a, b, middle)

        assert await ask_echo(a.host, b.host, CANARY) == CANARY

        seen = b"".join(carried)
        assert len(seen) > 2 * len(CANARY)
        assert not any(CANARY[n : n + 16] in seen for n in range(44))
        assert ECHO.encode() not in seen


async def test_a_byte_that_a_relay_changes_ends_the_connection(monkeypatch):
    armed = []
    copy = relay_module.RelayService._copy

    async def meddle(self, circuit, sender, receiver):
        write = receiver.write

        async def flip(data):
            await write(bytes([*data[:-1], data[-1] ^ 1]) if armed else data)

        receiver.write = flip
        await copy(self, circuit, sender, receiver)

    monkeypatch.setattr(relay_module.RelayService, "_copy", meddle)
    async with open_members(RELAYS, USES_RELAYS, USES_RELAYS) as (_, (middle, a, b)):
        await relay_to(a, b, middle)
        armed.append(True)

        with pytest.raises(PeerUnreachable):
            await ask_echo(a.host, b.host)

        await until(lambda: not b.host.path(a.peer_id))
        await until(lambda: not middle.traversal.relay.book.circuits)


async def test_a_relay_cannot_pass_itself_off_as_the_peer():
    async with open_members(RELAYS, USES_RELAYS, USES_RELAYS) as (_, (middle, a, b)):

        async def answer_itself(stream):
            await read_expected(stream, relay_module.Relay)
            await send_message(stream, Taken())
            raw = relay_module.relayed_connection(
                relay_module.RelayedStream(stream), initiator=False
            )
            await middle.host.serve_inbound(raw, "/p2p-circuit")

        middle.host.handle(relay_module.RELAY_PROTOCOL, answer_itself)

        with pytest.raises(PeerUnreachable, match="no handshake"):
            await relay_to(a, b, middle)
        assert not a.host.path(b.peer_id)


async def test_a_member_that_is_removed_loses_its_circuit_and_gets_no_other():
    async with open_members(RELAYS, USES_RELAYS, USES_RELAYS) as (members, (middle, a, b)):
        await relay_to(a, b, middle)

        members.discard(a.peer_id)
        await b.host.drop_peer(a.peer_id)

        await until(lambda: not middle.traversal.relay.book.circuits)
        with pytest.raises(PeerUnreachable):
            await relay_to(a, b, middle)


async def test_the_end_of_a_connection_is_the_end_of_its_circuit():
    async with open_members(RELAYS, USES_RELAYS, USES_RELAYS) as (_, (middle, a, b)):
        await relay_to(a, b, middle)
        assert middle.traversal.relay.book.circuits

        await a.host.drop_peer(b.peer_id)

        await until(lambda: not middle.traversal.relay.book.circuits)
        await until(lambda: not b.host.path(a.peer_id))


async def test_a_relay_that_goes_away_takes_its_circuits_along():
    async with open_members(RELAYS, USES_RELAYS, USES_RELAYS) as (_, (middle, a, b)):
        await relay_to(a, b, middle)

        await middle.host.drop_peer(a.peer_id)

        await until(lambda: not a.host.path(b.peer_id) and not b.host.path(a.peer_id))


async def test_a_circuit_does_not_go_through_two_relays():
    both = TraversalOptions(allow_relay=True, use_relay=True)
    async with open_members(RELAYS, USES_RELAYS, both, USES_RELAYS) as (_, (middle, a, second, b)):
        await b.host.connect(second.peer_id, second.host.addresses())
        await relay_to(a, second, middle)

        with pytest.raises(RelayRefused, match="not directly connected"):
            await relay_to(a, b, second)


async def test_a_peer_gets_no_more_circuits_than_its_share():
    async with open_members(relaying(max_circuits_per_peer=1), *[USES_RELAYS] * 3) as (
        _,
        (middle, a, b, c),
    ):
        await relay_to(a, b, middle)

        with pytest.raises(RelayRefused, match="has 1 circuits"):
            await relay_to(c, a, middle)
        assert await ask_echo(a.host, b.host) == b"hello"


async def test_an_idle_circuit_ends():
    async with open_members(relaying(idle_s=0.2), USES_RELAYS, USES_RELAYS) as (
        _,
        (middle, a, b),
    ):
        await relay_to(a, b, middle)

        await until(lambda: not middle.traversal.relay.book.circuits)
        await until(lambda: not a.host.path(b.peer_id))


async def test_a_circuit_ends_when_its_time_is_over():
    async with open_members(relaying(circuit_s=0.3), USES_RELAYS, USES_RELAYS) as (
        _,
        (middle, a, b),
    ):
        await relay_to(a, b, middle)

        with trio.fail_after(5), pytest.raises(PeerUnreachable):
            await exchange_for_ever(a, b)
        await until(lambda: not middle.traversal.relay.book.circuits)


async def test_bytes_are_carried_no_faster_than_allowed():
    rate = 1 << 20
    async with open_members(relaying(peer_bytes_per_s=rate), USES_RELAYS, USES_RELAYS) as (
        _,
        (middle, a, b),
    ):
        await relay_to(a, b, middle)
        started_s = trio.current_time()

        await ask_echo(a.host, b.host, bytes(rate))

        assert trio.current_time() - started_s >= 0.7  # a second, less the burst
        (circuit,) = middle.traversal.relay.book.circuits
        assert circuit.carried_bytes > 2 * rate


async def test_a_circuit_from_somebody_who_is_no_member_is_refused():
    async with open_members(PLAIN, USES_RELAYS) as (_, (middle, a)):
        stream = await middle.host.open_stream(a.peer_id, RELAYED_PROTOCOL)
        await send_message(stream, Relayed(source="12D3KooWStranger"))

        with pytest.raises(PeerUnreachable, match="not a member"):
            await read_expected(stream, Taken)
