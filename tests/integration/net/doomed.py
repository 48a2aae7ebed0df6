"""Connects members of a host by the dozen and says so; whoever runs it kills it."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack

import trio

from pals.net.host import open_host
from pals.types import PeerId
from tests.integration.net.harness import LISTEN, identity


async def main(first: int, count: int, peer: PeerId, address: str) -> None:
    async with AsyncExitStack() as stack:
        for number in range(first, first + count):
            opening = open_host(identity(number), listen=LISTEN, allow=lambda _: True)
            host = await stack.enter_async_context(opening)
            await host.connect(peer, [address], deadline_s=30.0)
        sys.stdout.write("connected\n")
        sys.stdout.flush()
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]), int(sys.argv[2]), PeerId(sys.argv[3]), sys.argv[4])
