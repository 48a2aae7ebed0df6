"""What becomes of whoever uses a connection that was closed here."""

from __future__ import annotations

import pytest
import trio
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection

from pals.net.pipe import Pipe, PipeBroken, open_pipe

pytestmark = pytest.mark.trio


async def open_pipes(count: int) -> list[Pipe]:
    listener, *_ = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        streams = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(count)]
        return [open_pipe(RawConnection(TrioTCPStream(stream), True)) for stream in streams]


async def test_each_closed_connection_says_that_it_is_closed():
    for pipe in await open_pipes(3):
        pipe.abort()
        with pytest.raises(PipeBroken):
            await pipe.receive(memoryview(bytearray(8)))
        with pytest.raises(PipeBroken):
            await pipe.send([b"late"])
        with pytest.raises(PipeBroken):
            pipe.send_now([b"late"])


async def test_closing_ends_the_wait_of_a_reader():
    (pipe,) = await open_pipes(1)
    ended = trio.Event()

    async def read() -> None:
        with pytest.raises(PipeBroken):
            await pipe.receive(memoryview(bytearray(8)))
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        pipe.abort()
        with trio.fail_after(5):
            await ended.wait()
