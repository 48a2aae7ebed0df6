"""The record layer over socket pairs: stock's wire format, however the bytes arrive."""

from __future__ import annotations

import os

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.io.exceptions import ConnectionClosedError, IncompleteReadError
from libp2p.network.connection.exceptions import RawConnError
from libp2p.security.exceptions import HandshakeFailure

from pals.net.noise import MAX_READ_BYTES
from pals.net.noise_records import MAX_PLAINTEXT_BYTES
from tests.integration.net.pairs import (
    DIALLER,
    LISTENER,
    LISTENER_ID,
    ours,
    raw_pair,
    sessions,
    stock,
)

SIZES = [1, MAX_PLAINTEXT_BYTES - 1, MAX_PLAINTEXT_BYTES, MAX_PLAINTEXT_BYTES + 1, 200_000]


async def carry(sender, receiver, data: bytes) -> bytes:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.write, data)
        return await receiver.read(len(data))


@pytest.mark.trio
@pytest.mark.parametrize("dialling", [ours, stock])
@pytest.mark.parametrize("listening", [ours, stock])
async def test_the_wire_format_is_stock_s_in_both_directions(dialling, listening):
    async with sessions(dialling(DIALLER), listening(LISTENER)) as (dialler, listener):
        for size in SIZES:
            data = bytes(i % 251 for i in range(size))
            assert await carry(dialler, listener, data) == data
            assert await carry(listener, dialler, data) == data


class Rechunked:
    """The receiving end of a socket, which gives bytes in the pieces a test says."""

    def __init__(self, pipe, sizes):
        self.pipe = pipe
        self.sizes = sizes

    async def receive(self, space):
        size = self.sizes.pop() if self.sizes else len(space)
        return await self.pipe.receive(space[:size])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=2000), min_size=1, max_size=5),
    st.lists(st.integers(1, 3000), max_size=60),
    st.lists(st.integers(1, 5000), max_size=30),
)
def test_bytes_arrive_in_order_however_they_are_cut(messages, arrivals, reads):
    async def run():
        async with sessions(ours(DIALLER), ours(LISTENER)) as (dialler, listener):
            listener._pipe = Rechunked(listener._pipe, arrivals)
            whole = b"".join(messages)
            for message in messages:
                await dialler.write(message)
            received = b""
            while len(received) < len(whole):
                size = min(reads.pop() if reads else 70_000, len(whole) - len(received))
                received += await listener.read(size)
            assert received == whole

    trio.run(run)


@pytest.mark.trio
async def test_one_write_is_one_send_and_one_receive_takes_many_records(monkeypatch):
    sends, receives = [], []
    writev, readv = os.writev, os.readv

    def count_send(fd, buffers):
        sends.append(sum(map(len, buffers)))
        return writev(fd, buffers)

    def count_receive(fd, spaces):
        receives.append(fd)
        return readv(fd, spaces)

    async with sessions(ours(DIALLER), ours(LISTENER)) as (dialler, listener):
        monkeypatch.setattr(os, "writev", count_send)
        monkeypatch.setattr(os, "readv", count_receive)
        await dialler.write(bytes(MAX_PLAINTEXT_BYTES + 1))
        assert sends == [MAX_PLAINTEXT_BYTES + 1 + 2 * (2 + 16)]
        for _ in range(10):
            await dialler.write(b"x")
        assert await listener.read(MAX_PLAINTEXT_BYTES + 11)
        assert len(receives) < 11


@pytest.mark.trio
@pytest.mark.parametrize("flip", [2, -1])
async def test_a_record_that_does_not_open_closes_the_connection(flip):
    async with sessions(ours(DIALLER), ours(LISTENER)) as (dialler, listener):
        sealed = bytearray(b"".join(dialler._sealer.seal([b"hello"])))
        sealed[flip] ^= 1
        await dialler._raw.write(bytes(sealed))
        with pytest.raises(RawConnError):
            await listener.read(5)
        with pytest.raises(IncompleteReadError):
            await dialler.read(1)


@pytest.mark.trio
async def test_a_replayed_record_does_not_open():
    async with sessions(ours(DIALLER), ours(LISTENER)) as (dialler, listener):
        sealed = b"".join(dialler._sealer.seal([b"hello"]))
        await dialler._raw.write(sealed)
        assert await listener.read(5) == b"hello"
        await dialler._raw.write(sealed)
        with pytest.raises(RawConnError):
            await listener.read(5)


@pytest.mark.trio
async def test_the_end_of_a_connection_says_how_much_was_missing():
    async with sessions(ours(DIALLER), ours(LISTENER)) as (dialler, listener):
        await dialler.write(b"abc")
        await dialler.close()
        with pytest.raises(IncompleteReadError) as caught:
            await listener.read(5)
        assert (caught.value.expected_bytes, caught.value.received_bytes) == (5, 3)


@pytest.mark.trio
async def test_a_muxer_told_to_expect_too_much_closes_the_connection():
    async with sessions(ours(DIALLER), ours(LISTENER)) as (dialler, listener):
        with pytest.raises(RawConnError, match="at once"):
            await listener.read(MAX_READ_BYTES + 1)
        with pytest.raises(IncompleteReadError):
            await dialler.read(1)


@pytest.mark.trio
async def test_a_peer_that_takes_nothing_is_given_up():
    async with sessions(ours(DIALLER, write_deadline_s=0.1), ours(LISTENER)) as (dialler, _):
        with pytest.raises(ConnectionClosedError, match="took no bytes"):
            await dialler.write(bytes(16 << 20))


@pytest.mark.trio
async def test_a_cancelled_write_is_whole_on_the_wire():
    async with sessions(ours(DIALLER), ours(LISTENER)) as (dialler, listener):
        size = 8 << 20  # more than the socket holds: the send stops half-way
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialler.write, bytes(size))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                assert len(await listener.read(size)) == size
        assert await carry(dialler, listener, b"after") == b"after"


@pytest.mark.trio
async def test_who_is_not_allowed_is_closed_out_after_the_handshake():
    left, right = raw_pair()
    nobody = ours(LISTENER, allow=lambda _: False)
    with pytest.RaisesGroup(HandshakeFailure, allow_unwrapped=True, flatten_subgroups=True):
        async with sessions(ours(DIALLER), nobody, (left, right)):
            pass
    assert right.stream.stream.socket.fileno() == -1
    await left.close()


@pytest.mark.trio
async def test_who_is_not_allowed_is_not_even_greeted():
    left, right = raw_pair()
    with pytest.raises(HandshakeFailure):
        await ours(DIALLER, allow=lambda _: False).secure_outbound(left, LISTENER_ID)
    assert await right.read(1) == b""
    await right.close()
