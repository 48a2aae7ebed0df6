"""Hosts on 127.0.0.1 that know each other, and a wait that has a deadline."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from pals.net.host import Host, HostLimits, Stream, open_host
from pals.swarm.identity import Identity
from pals.types import PeerId

LISTEN = "/ip4/127.0.0.1/tcp/0"
ECHO = "/test/echo/1"


def identity(number: int) -> Identity:
    return Identity.from_seed(bytes([number]) * 32)


class Members(set[PeerId]):
    """A member list that a test changes; `allow` is what hosts ask."""

    def allow(self, peer: PeerId) -> bool:
        return peer in self


@asynccontextmanager
async def open_hosts(
    count: int, *, limits: HostLimits | None = None
) -> AsyncIterator[tuple[Members, list[Host]]]:
    """Run hosts 1 to ``count``, all members of one list, which serve `ECHO`."""
    members = Members(identity(n + 1).peer_id for n in range(count))
    async with AsyncExitStack() as stack:
        hosts = []
        for n in range(count):
            opening = open_host(identity(n + 1), listen=LISTEN, allow=members.allow, limits=limits)
            hosts.append(await stack.enter_async_context(opening))
            hosts[-1].handle(ECHO, echo)
        yield members, hosts


async def echo(stream: Stream) -> None:
    while data := await stream.read_some(65536):
        await stream.write(data)


async def ask_echo(client: Host, server: Host, data: bytes = b"hello") -> bytes:
    stream = await client.open_stream(server.peer_id, ECHO)
    await stream.write(data)
    answer = await stream.read_exactly(len(data))
    await stream.close()
    return answer


async def until(condition: Callable[[], bool], *, deadline_s: float = 5.0) -> None:
    """Wait for a condition that no event announces; fail when it does not come."""
    with trio.fail_after(deadline_s):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)
