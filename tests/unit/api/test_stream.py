from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from pals.api.openai.stream import with_heartbeats


async def paced(gate: asyncio.Event) -> AsyncGenerator[bytes]:
    yield b"first"
    await gate.wait()
    yield b"second"


def test_a_silent_stream_carries_comments_and_then_goes_on() -> None:
    async def collect() -> list[bytes]:
        gate = asyncio.Event()
        seen: list[bytes] = []
        async for event in with_heartbeats(paced(gate), interval_s=0.001):
            seen.append(event)
            if seen.count(b": waiting\n\n") == 2:
                gate.set()
        return seen

    seen = asyncio.run(collect())

    assert seen[0] == b"first"
    assert seen[-1] == b"second"
    assert set(seen[1:-1]) == {b": waiting\n\n"}


def test_closing_the_stream_closes_its_source() -> None:
    closed: list[bool] = []

    async def source() -> AsyncGenerator[bytes]:
        try:
            yield b"one"
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async def read_one_and_leave() -> None:
        stream = with_heartbeats(source())
        assert await anext(stream) == b"one"
        await stream.aclose()

    asyncio.run(read_one_and_leave())

    assert closed == [True]
