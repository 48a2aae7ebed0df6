"""The door for strangers: one protocol, a few seconds, and nothing to learn from a refusal."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.ping import ID as PING
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.peer.id import ID
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.secio import transport as secio
from libp2p.utils.varint import encode_delim, encode_uvarint
from multiaddr import Multiaddr

from pals.errors import PeerUnreachable
from pals.net import backend_members, exchange, links
from pals.net.door import Door, DoorLimits, _DoorSwarm, _running, knock, open_door
from pals.net.framed import read_message, write_message
from pals.net.redemption import PROTOCOL, RedemptionBackend, open_redemption
from pals.swarm.calls import (
    Joined,
    NotJoined,
    RedeemCall,
    decode_redeem_answer,
    encode_message,
)
from tests.integration.net.harness import LISTEN, identity, until

pytestmark = pytest.mark.trio

CALL = RedeemCall(swarm_id=b"s" * 32, auth=b"a" * 32, join=b"join")
JOINED = Joined(entry=b"entry", entries=(b"genesis", b"entry"), freshness=b"", hints=(b"hint",))
QUICK = DoorLimits(handshake_s=0.8, call_s=0.8, connection_s=2.5, write_s=0.8)
GREETING = encode_delim(b"/multistream/1.0.0")
ELSEWHERE = "127.0.0.2"
"""Another address of this machine: what comes from there counts apart."""


class Recorder:
    """A redeemer that admits everybody and remembers who asked."""

    def __init__(self) -> None:
        self.sources: list[str] = []

    def redeem(self, call: RedeemCall, source: str) -> Joined:
        self.sources.append(source)
        return JOINED


@asynccontextmanager
async def open_test_door(limits: DoorLimits = QUICK) -> AsyncIterator[tuple[Door, Recorder]]:
    recorder = Recorder()
    opening = open_redemption(identity(1), listen=LISTEN, redeemer=recorder, limits=limits)
    async with opening as door:
        yield door, recorder


def address_of(door: Door) -> str:
    return door.addresses()[0]


def port_of(door: Door) -> int:
    return int(address_of(door).split("/")[4])


async def join(door: Door) -> bytes:
    return await RedemptionBackend(address_of(door)).redeem(CALL.swarm_id, CALL.auth, CALL.join)


@asynccontextmanager
async def dial_from(source: str, door: Door) -> AsyncIterator[trio.SocketStream]:
    """Open a TCP connection from one of this machine's addresses."""
    plain = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    await plain.bind((source, 0))
    await plain.connect(("127.0.0.1", port_of(door)))
    async with trio.SocketStream(plain) as stream:
        yield stream


async def read_to_end(stream: trio.SocketStream) -> bytes:
    """Return what comes until the other side closes; fail when it does not."""
    received = b""
    with trio.fail_after(5):
        try:
            while data := await stream.receive_some(65536):
                received += data
        except trio.BrokenResourceError:
            pass
    return received


# --- what there is -------------------------------------------------------------------


async def test_a_stranger_joins_and_hears_all_that_it_needs():
    async with open_test_door() as (door, recorder):
        backend = RedemptionBackend(address_of(door))
        assert await backend.redeem(CALL.swarm_id, CALL.auth, CALL.join) == b"entry"
        fetched = await backend.fetch_records(CALL.swarm_id)
        assert fetched.entries == JOINED.entries
        assert await backend.fetch_hints(CALL.swarm_id) == (b"hint",)
        assert recorder.sources == ["127.0.0.1"]


@pytest.mark.parametrize(
    "protocol",
    [
        PING,
        IDENTIFY,
        "/ipfs/id/push/1.0.0",
        "/ipfs/kad/1.0.0",
        "/meshsub/1.1.0",
        exchange.PROTOCOL,
        links.LINK_PROTOCOL,
        backend_members.PROTOCOL,
        "",
    ],
)
async def test_the_door_speaks_no_other_protocol(protocol):
    async with open_test_door() as (door, recorder):
        with pytest.raises(PeerUnreachable):
            async with knock(address_of(door), protocol):
                pass
        assert not recorder.sources


async def test_a_list_of_its_protocols_has_one_name():
    async with open_test_door() as (door, _), open_raw_stream(door) as stream:
        for said in (b"/multistream/1.0.0\n", b"ls\n"):
            await stream.write(encode_uvarint(len(said)) + said)
        received = b""
        with trio.fail_after(5):
            while PROTOCOL.encode() not in received:
                received += await stream.read(1000)
        assert (
            received.replace(b"/multistream/1.0.0\n", b"").strip(b"\x13\x10\n") == PROTOCOL.encode()
        )


@asynccontextmanager
async def open_raw_stream(door: Door):
    """Open a stream on which nothing was said yet."""
    stranger = _DoorSwarm(identity(9), DoorLimits(), lambda _: True)
    async with _running(stranger):
        at = Multiaddr(address_of(door)).decapsulate_code(0x01A5)
        (connection,) = await stranger.dial_peer(ID.from_base58(door.peer_id), (at,), detour=False)
        stream = await connection.new_stream()
        stream.connection = connection
        yield stream


async def test_a_connection_carries_one_stream():
    async with open_test_door() as (door, recorder):
        async with knock(address_of(door), PROTOCOL) as stream:
            await write_message(stream, encode_message(CALL))
            await read_message(stream, max_bytes=1000)
            connection = stream._stream.muxed_conn
            again = await connection.open_stream()
            with pytest.raises(BaseLibp2pError), trio.fail_after(5):
                await again.read(1)
        assert len(recorder.sources) == 1


async def test_whoever_knocks_shows_another_identity_each_time():
    peers = []

    async def see(stream, _source):
        peers.append(stream.peer_id)

    async with open_door(identity(1), listen=LISTEN, protocol="/test/1", handler=see) as door:
        for _ in range(2):
            async with knock(address_of(door), "/test/1") as stream:
                assert await stream.read_some(1) == b""
    assert len(set(peers)) == 2


async def test_somebody_else_at_the_door_s_address_is_not_spoken_to():
    async with open_test_door() as (door, recorder):
        elsewhere = address_of(door).replace(door.peer_id, identity(5).peer_id)
        with pytest.raises(PeerUnreachable):
            async with knock(elsewhere, PROTOCOL):
                pass
        assert not recorder.sources


# --- attacks -------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["plaintext", "secio"])
async def test_the_door_speaks_noise_alone(transport):
    key_pair = create_new_key_pair(identity(7).reveal_seed())
    transports = {
        "plaintext": {PLAINTEXT_PROTOCOL_ID: InsecureTransport(key_pair)},
        "secio": {secio.ID: secio.Transport(key_pair)},
    }
    async with open_test_door() as (door, recorder):
        attacker = new_host(key_pair=key_pair, sec_opt=transports[transport])
        async with attacker.run([]):
            with pytest.raises(BaseLibp2pError):
                await attacker.get_network().dial_addr(
                    Multiaddr(address_of(door)), ID.from_base58(door.peer_id)
                )
        assert not recorder.sources


@pytest.mark.parametrize(
    "said",
    [
        os.urandom(4096),
        b"GET / HTTP/1.1\r\nHost: door\r\n\r\n",
        encode_uvarint(1 << 40) + b"x" * 1000,
        b"\xff" * 64,
        encode_delim(b"/multistream/1.0.0") + encode_delim(b"/noise") + b"\xff\xff" + b"n" * 70_000,
        encode_delim(b"/multistream/1.0.0") + encode_delim(b"\xc3\x28"),
    ],
    ids=["random", "http", "huge length", "endless varint", "huge handshake", "no text"],
)
async def test_garbage_is_closed_out_and_costs_nobody_else(said):
    async with open_test_door() as (door, recorder):
        async with dial_from(ELSEWHERE, door) as stranger:
            with suppress(trio.BrokenResourceError):
                await stranger.send_all(said)
            await read_to_end(stranger)
        assert await join(door) == b"entry"
        assert recorder.sources == ["127.0.0.1"]


async def test_silent_connections_from_one_address_leave_room_for_others():
    limits = replace(QUICK, handshake_s=5.0, connection_s=5.0, connection_burst=100.0)
    async with open_test_door(limits) as (door, _), trio.open_nursery() as nursery:
        closed = []

        async def stay_silent():
            async with dial_from(ELSEWHERE, door) as stranger:
                closed.append(await read_to_end(stranger))

        for _ in range(40):
            nursery.start_soon(stay_silent)
        # Those without a seat are closed at once, the others when their time is over.
        await until(lambda: len(closed) == 40 - limits.max_connections_per_source)
        assert await join(door) == b"entry"
        nursery.cancel_scope.cancel()


async def test_a_silent_connection_ends_in_the_time_of_a_handshake():
    async with open_test_door() as (door, _), dial_from(ELSEWHERE, door) as stranger:
        assert await read_to_end(stranger) in (b"", GREETING)


async def test_an_address_that_connects_too_often_is_closed_out_before_any_handshake():
    limits = replace(QUICK, connection_burst=3.0, connections_per_s=0.001)
    async with open_test_door(limits) as (door, _):
        said = []
        for _ in range(5):
            async with dial_from(ELSEWHERE, door) as stranger:
                said.append(await read_to_end(stranger))
        assert said == [GREETING, GREETING, GREETING, b"", b""]
        assert await join(door) == b"entry"


async def test_a_stranger_that_says_nothing_on_its_stream_is_cut():
    async with open_test_door() as (door, recorder):
        async with knock(address_of(door), PROTOCOL) as stream:
            await stream.write(b"\x00")
            with trio.fail_after(5), pytest.raises(PeerUnreachable):
                await stream.read_exactly(1)
        assert not recorder.sources


async def test_a_call_that_is_announced_as_too_long_is_not_read():
    async with open_test_door() as (door, recorder):
        async with knock(address_of(door), PROTOCOL) as stream:
            await stream.write((1 << 31).to_bytes(4, "big"))
            with trio.fail_after(5), pytest.raises(PeerUnreachable):
                await stream.read_exactly(1)
        assert not recorder.sources


async def test_a_greeting_without_an_end_is_cut():
    async with open_test_door() as (door, _), open_raw_stream(door) as stream:
        await stream.write(encode_uvarint(1 << 40))
        with pytest.raises(BaseLibp2pError), trio.fail_after(5):
            await write_for_ever(stream)


async def write_for_ever(stream):
    while True:
        await stream.write(bytes(1 << 16))


async def test_a_connection_ends_when_its_time_is_over():
    limits = replace(QUICK, connection_s=0.5)
    async with open_test_door(limits) as (door, _), open_raw_stream(door) as stream:
        await until(lambda: stream.connection.is_closed)


async def test_a_call_that_is_none_is_refused_like_a_bad_invite():
    async with open_test_door() as (door, recorder):
        async with knock(address_of(door), PROTOCOL) as stream:
            await write_message(stream, b"\x81\xa4type")
            answer = await read_message(stream, max_bytes=1000)
        assert decode_redeem_answer(answer) == NotJoined(reason="refused")
        assert not recorder.sources
