"""Members on 127.0.0.1 that find ways to each other; no process, no jax."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from pals.net.host import Host, open_host
from pals.net.nat.traversal import Traversal, TraversalOptions, open_traversal
from pals.types import PeerId
from tests.integration.net.harness import ECHO, LISTEN, Members, echo, identity

PLAIN = TraversalOptions(upnp=False)
RELAYS = TraversalOptions(upnp=False, allow_relay=True)
USES_RELAYS = TraversalOptions(upnp=False, use_relay=True)


@dataclass(frozen=True, slots=True)
class Member:
    """A host and what finds ways for it."""

    host: Host
    traversal: Traversal

    @property
    def peer_id(self) -> PeerId:
        return self.host.peer_id


@asynccontextmanager
async def open_members(
    *options: TraversalOptions, listen: str = LISTEN
) -> AsyncIterator[tuple[Members, list[Member]]]:
    """Run one member for each of ``options``; the first is connected to by all others."""
    members = Members(identity(n + 1).peer_id for n in range(len(options)))
    async with AsyncExitStack() as stack:
        opened: list[Member] = []
        for n, one in enumerate(options):
            host = await stack.enter_async_context(
                open_host(identity(n + 1), listen=listen, allow=members.allow)
            )
            host.handle(ECHO, echo)
            traversal = await stack.enter_async_context(open_traversal(host, one))
            opened.append(Member(host, traversal))
        await connect_to_first(opened)
        yield members, opened


async def connect_to_first(opened: Sequence[Member]) -> None:
    first = opened[0].host
    for member in opened[1:]:
        await member.host.connect(first.peer_id, first.addresses())


def no_holes(*members: Member) -> None:
    """Keep members from telling where they are, so that punching fails as behind bad NATs."""
    for member in members:
        member.traversal._meeter._endpoints = lambda _: ()
