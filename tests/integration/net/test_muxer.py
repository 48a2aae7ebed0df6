"""The muxer over sockets: what goes out when, what a cancellation leaves, how it ends."""

from __future__ import annotations

import contextlib
import os
from functools import partial

import pytest
import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)

from pals.net.mux import MAX_PAYLOAD_BYTES
from pals.net.mux_frames import DATA, INITIAL_WINDOW_BYTES, SYN, WINDOW_UPDATE, pack_header
from pals.net.muxer import BATCH_BYTES
from tests.integration.net.harness import until
from tests.integration.net.pairs import muxed, open_stream, raw_pair

pytestmark = pytest.mark.trio

BULK = 8 << 20


async def read_exactly(stream, n: int) -> bytes:
    received = b""
    while len(received) < n:
        received += await stream.read(n - len(received))
    return received


async def test_streams_carry_bytes_both_ways_and_end():
    async with muxed() as (dialler, listener):
        ours, theirs = await open_stream(dialler, listener)
        await ours.write(b"question")
        await ours.close()
        assert await theirs.read() == b"question"
        with pytest.raises(MuxedStreamEOF):
            await theirs.read()
        await theirs.write(b"answer")
        await theirs.close()
        assert await ours.read(3) == b"ans"
        assert await ours.read(100) == b"wer"
        with pytest.raises(MuxedStreamEOF):
            await ours.read()
        with pytest.raises(MuxedStreamClosed):
            await ours.write(b"more")
        assert not dialler._streams
        assert not listener._streams


async def test_a_write_goes_out_without_a_turn_of_the_scheduler(monkeypatch):
    sends = []
    writev = os.writev
    async with muxed() as (dialler, listener):
        ours, theirs = await open_stream(dialler, listener)
        monkeypatch.setattr(os, "writev", lambda fd, b: sends.append(fd) or writev(fd, b))
        write = ours.write(b"token")
        with pytest.raises(StopIteration):
            write.send(None)
        assert len(sends) == 1
        assert await theirs.read() == b"token"


async def test_a_token_does_not_wait_for_a_bulk_stream():
    async with muxed() as (dialler, listener), trio.open_nursery() as nursery:
        bulk, bulk_in = await open_stream(dialler, listener)
        token, token_in = await open_stream(dialler, listener)
        dialler.secured_conn._pipe = Slow(dialler.secured_conn._pipe)
        received = 0

        async def drain():
            nonlocal received
            while True:
                received += len(await bulk_in.read())

        nursery.start_soon(bulk.write, bytes(BULK))
        nursery.start_soon(drain)
        await until(lambda: received > 1 << 20)
        before = received
        await token.write(b"token")
        assert await token_in.read() == b"token"

        assert received - before <= 2 * BATCH_BYTES
        assert received < BULK
        nursery.cancel_scope.cancel()


class Slow:
    """A connection that takes little at a time, as a thin one does."""

    def __init__(self, pipe):
        self.pipe = pipe

    def send_now(self, buffers):
        return list(buffers)

    async def send(self, buffers):
        first, *rest = buffers
        left = await self.pipe.send([memoryview(first)[:8192]])
        return [*left, *([memoryview(first)[8192:]] if len(first) > 8192 else []), *rest]

    async def receive(self, space):
        return await self.pipe.receive(space)

    def abort(self):
        self.pipe.abort()


async def test_concurrent_writes_of_one_stream_do_not_mix():
    async with muxed() as (dialler, listener), trio.open_nursery() as nursery:
        ours, theirs = await open_stream(dialler, listener)
        size = 500_000
        for letter in b"abc":
            nursery.start_soon(ours.write, bytes([letter]) * size)
        received = await read_exactly(theirs, 3 * size)
        assert received in {
            b"".join(bytes([letter]) * size for letter in order)
            for order in (b"abc", b"acb", b"bac", b"bca", b"cab", b"cba")
        }


# --- without a turn of the scheduler -------------------------------------------------


async def test_bytes_that_fit_are_written_by_a_plain_call_and_others_not_at_all():
    async with muxed() as (dialler, listener):
        ours, theirs = await open_stream(dialler, listener)
        assert ours.try_write(b"token")
        assert not ours.try_write(bytes(MAX_PAYLOAD_BYTES + 1))
        sent = 5
        while ours.try_write(bytes(MAX_PAYLOAD_BYTES)):
            sent += MAX_PAYLOAD_BYTES
        assert sent <= INITIAL_WINDOW_BYTES
        assert not ours.state.outbox
        received = await read_exactly(theirs, sent)
        assert received[:5] == b"token"
        await until(lambda: ours.state.allowance >= MAX_PAYLOAD_BYTES)
        assert ours.try_write(b"next")
        assert await theirs.read() == b"next"


async def test_a_plain_call_writes_nothing_before_what_waits():
    async with muxed() as (dialler, listener), trio.open_nursery() as nursery:
        ours, theirs = await open_stream(dialler, listener)
        other, _ = await open_stream(dialler, listener)
        nursery.start_soon(ours.write, b"x" * BULK)
        await trio.testing.wait_all_tasks_blocked()
        assert not ours.try_write(b"never")
        assert other.try_write(b"of another stream")
        assert await read_exactly(theirs, BULK) == b"x" * BULK
        await ours.write(b"next")
        assert await theirs.read() == b"next"


async def test_a_plain_call_behind_unsent_records_or_after_others_of_a_batch_writes_nothing():
    async with muxed() as (dialler, listener):
        streams = [await open_stream(dialler, listener) for _ in range(4)]
        dialler.secured_conn._pipe = Slow(dialler.secured_conn._pipe)
        accepted = [stream.try_write(b"token%d" % i) for i, (stream, _) in enumerate(streams)]
        assert accepted == [True, False, False, False]
        assert await streams[0][1].read() == b"token0"
        await until(lambda: streams[1][0].try_write(b"later"))
        assert await streams[1][1].read() == b"later"


@pytest.mark.parametrize("end", ["close", "reset", "lost"])
async def test_a_plain_call_on_an_ended_stream_says_so(end: str):
    async with muxed() as (dialler, listener):
        ours, _ = await open_stream(dialler, listener)
        await (listener.close() if end == "lost" else getattr(ours, end)())
        if end == "lost":
            await until(lambda: bool(ours.state.problem))
        with pytest.raises(MuxedStreamClosed if end == "close" else MuxedStreamReset):
            ours.try_write(b"x")


async def test_a_taker_gets_what_comes_and_a_reader_what_came_before_and_the_end():
    async with muxed() as (dialler, listener), trio.open_nursery() as nursery:
        ours, theirs = await open_stream(dialler, listener)
        await ours.write(b"before")
        await until(lambda: theirs.state.unread_bytes == 6)
        taken, read = [], []
        theirs.deliver_to(taken.append)

        async def read_all():
            with contextlib.suppress(MuxedStreamEOF):
                while True:
                    read.append(await theirs.read())

        nursery.start_soon(read_all)
        await trio.testing.wait_all_tasks_blocked()
        for part in (b"one", b"two", b"three"):
            await ours.write(part)
            await until(lambda part=part: b"".join(taken).endswith(part))
        await ours.write(b"last")
        await ours.close()
        await until(lambda: not nursery.child_tasks)
        assert (read, b"".join(taken)) == ([b"before"], b"onetwothreelast")


async def test_a_taker_opens_the_window_again_and_may_write_to_its_own_stream():
    async with muxed() as (dialler, listener), trio.open_nursery() as nursery:
        ours, theirs = await open_stream(dialler, listener)
        size = 0

        def take(data: bytes) -> None:
            nonlocal size
            size += len(data)
            if size == BULK:
                theirs.try_write(b"all of it")

        theirs.deliver_to(take)
        nursery.start_soon(ours.write, b"x" * BULK)
        assert await ours.read() == b"all of it"


async def test_a_taker_is_never_called_out_of_another():
    async with muxed() as (dialler, listener):
        pairs = [await open_stream(dialler, listener) for _ in range(3)]
        running, calls = [], []

        def take(number: int, data: bytes) -> None:
            assert not running
            running.append(number)
            calls.append((number, data))
            for _, theirs in pairs:
                theirs.try_write(b"answer")
            running.pop()

        for number, (_, theirs) in enumerate(pairs):
            theirs.deliver_to(partial(take, number))
        for number, (ours, _) in enumerate(pairs):
            assert ours.try_write(b"%d" % number)
        await until(lambda: len(calls) == 3)
        assert calls == [(number, b"%d" % number) for number in range(3)]


# --- cancelled and ended -------------------------------------------------------------


async def test_a_cancelled_write_ends_at_once_and_its_message_is_whole():
    async with muxed() as (dialler, listener):
        ours, theirs = await open_stream(dialler, listener)
        with trio.move_on_after(0.05) as scope:
            await ours.write(b"x" * BULK)
        assert scope.cancelled_caught
        await ours.close()
        assert await read_exactly(theirs, BULK) == b"x" * BULK
        with pytest.raises(MuxedStreamEOF):
            await theirs.read()


async def test_a_write_that_has_not_begun_is_withdrawn_when_cancelled():
    async with muxed() as (dialler, listener), trio.open_nursery() as nursery:
        ours, theirs = await open_stream(dialler, listener)
        nursery.start_soon(ours.write, b"x" * BULK)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.05):
            await ours.write(b"never")
        assert await read_exactly(theirs, BULK) == b"x" * BULK
        await ours.write(b"next")
        assert await theirs.read() == b"next"


async def test_a_cancelled_read_takes_nothing():
    async with muxed() as (dialler, listener):
        ours, theirs = await open_stream(dialler, listener)
        with trio.move_on_after(0.02):
            await theirs.read()
        await ours.write(b"kept")
        assert await theirs.read() == b"kept"


async def test_a_slow_reader_stops_its_own_stream_alone():
    async with muxed() as (dialler, listener), trio.open_nursery() as nursery:
        slow, slow_in = await open_stream(dialler, listener)
        fast, fast_in = await open_stream(dialler, listener)
        nursery.start_soon(slow.write, bytes(BULK))
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(20):
            await fast.write(b"token")
            assert await fast_in.read() == b"token"
        assert len(await read_exactly(slow_in, BULK)) == BULK


async def test_a_peer_that_takes_nothing_from_its_socket_costs_the_connection():
    async with muxed(write_deadline_s=0.2) as (dialler, listener):
        streams = [(await open_stream(dialler, listener))[0] for _ in range(8)]
        listener.secured_conn._pipe.receive = deaf
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(write_until_it_fails, stream)
        with trio.fail_after(5):
            await dialler.event_closed.wait()
        assert dialler.mux.problem == "peer took no bytes for 0.2 s"


async def deaf(space):
    await trio.sleep_forever()


async def write_until_it_fails(stream) -> None:
    with contextlib.suppress(MuxedStreamReset):
        while True:
            await stream.write(bytes(INITIAL_WINDOW_BYTES))


async def test_a_lost_connection_wakes_everybody():
    async with muxed() as (dialler, listener), trio.open_nursery() as nursery:
        ours, _ = await open_stream(dialler, listener)
        ended = []

        async def expect(error, call, *arguments):
            with pytest.raises(error):
                await call(*arguments)
            ended.append(call)

        nursery.start_soon(expect, MuxedStreamReset, ours.read)
        nursery.start_soon(expect, MuxedStreamReset, ours.write, bytes(BULK))
        nursery.start_soon(expect, MuxedConnUnavailable, dialler.accept_stream)
        await trio.testing.wait_all_tasks_blocked()
        listener.abort()
        with trio.fail_after(5):
            await dialler.event_closed.wait()
        await until(lambda: len(ended) == 3)
        with pytest.raises(MuxedConnUnavailable):
            await dialler.open_stream()
        with pytest.raises(MuxedStreamReset):
            await ours.write(b"more")
        await ours.close()
        await ours.reset()


async def test_closing_says_goodbye_and_calls_back_once():
    async with muxed() as (dialler, listener):
        closed = []

        async def on_close():
            closed.append(True)

        listener.on_close = on_close
        await dialler.close()
        await dialler.close()
        with trio.fail_after(5):
            await listener.event_closed.wait()
        assert listener.mux.problem == "the peer left, with reason 0"
        await until(lambda: closed == [True])


@pytest.mark.parametrize(
    "attack",
    [
        bytes(100),
        b"\xff" * 100,
        pack_header(DATA, SYN, 1, INITIAL_WINDOW_BYTES + 1),
        pack_header(WINDOW_UPDATE, SYN, 2, 0),
    ],
    ids=["zeros", "garbage", "overrun", "foreign id"],
)
async def test_a_violation_ends_the_connection_and_closes_its_socket(attack):
    async with muxed() as (dialler, listener):
        dialler.secured_conn.send_now([attack])
        with trio.fail_after(5):
            await listener.event_closed.wait()
            await dialler.event_closed.wait()
        assert "reason 1" in dialler.mux.problem


async def test_a_changed_record_ends_the_connection():
    async with muxed() as (dialler, listener):
        dialler.secured_conn._sealer._number += 1
        await dialler.open_stream()
        with trio.fail_after(5):
            await listener.event_closed.wait()
        assert "does not open" in listener.mux.problem


async def test_streams_that_nobody_accepts_are_bounded():
    async with muxed(max_inbound_streams=4) as (dialler, listener):
        streams = [await dialler.open_stream() for _ in range(10)]
        await until(lambda: sum(bool(stream.state.problem) for stream in streams) == 6)
        for stream in streams[:4]:
            await stream.reset()
        late = await dialler.open_stream()
        await until(lambda: bool(late.state.problem))  # the first four still wait to be accepted
        for _ in range(4):
            await listener.accept_stream()
        await dialler.open_stream()
        with trio.fail_after(5):
            await listener.accept_stream()


class Relayed:
    """A connection that is no socket, such as one through a relay."""

    def __init__(self, stream: trio.abc.Stream):
        self.stream = stream

    async def write(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(str(error)) from error

    async def read(self, n: int | None = None) -> bytes:
        try:
            return await self.stream.receive_some(n)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(str(error)) from error

    async def close(self) -> None:
        await self.stream.aclose()

    def get_remote_address(self):
        return None


async def test_a_connection_without_a_socket_is_muxed_too():
    raws = tuple(
        RawConnection(Relayed(end), initiator)
        for end, initiator in zip(trio.testing.memory_stream_pair(), (True, False), strict=True)
    )
    async with muxed(raws) as (dialler, listener), trio.open_nursery() as nursery:
        ours, theirs = await open_stream(dialler, listener)
        nursery.start_soon(ours.write, b"x" * (1 << 20))
        assert await read_exactly(theirs, 1 << 20) == b"x" * (1 << 20)
        dialler.abort()
        with trio.fail_after(5):
            await listener.event_closed.wait()


async def test_a_closed_socket_s_number_is_not_written_to():
    """After a close the number is another connection's."""
    left, right = raw_pair()
    async with muxed((left, right)) as (dialler, listener):
        ours, _ = await open_stream(dialler, listener)
        number = left.stream.stream.socket.fileno()
        reader, writer = os.pipe()
        left.stream.stream.socket.close()
        os.dup2(writer, number)
        with pytest.raises(MuxedStreamReset):
            await ours.write(b"secret")
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        for end in (reader, writer, number):
            os.close(end)
