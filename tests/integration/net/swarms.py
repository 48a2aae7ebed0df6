"""Members with discovery on 127.0.0.1, and the announcements that they make."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import trio

from pals.net.announce import Announcement, sign_announcement
from pals.net.discovery import ALL_SOURCES, Discovery, Sources
from pals.net.host import Host, open_host
from pals.swarm.identity import Identity
from pals.types import LayerRange, PeerId, SwarmId
from tests.integration.net.harness import LISTEN, Members

SWARM_ID = SwarmId(bytes(range(32)))
NUM_LAYERS = 30


class Clock:
    """Unix time that a test moves."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset_s


def numbered(number: int) -> Identity:
    """Return identity ``number``, of more than a byte can tell apart."""
    return Identity.from_seed(number.to_bytes(2, "big") * 16)


def announcement(
    number: int,
    clock: Callable[[], float] = time.time,
    *,
    layer_hash: bytes = bytes(16),
    **changes,
) -> Announcement:
    """Return what member ``number`` announces: ten of thirty layers, unless changed."""
    basis = Announcement(
        peer=numbered(number).peer_id,
        model_id="org/model",
        manifest=bytes(32),
        layers=LayerRange(0, 10),
        num_layers=NUM_LAYERS,
        layer_hashes=(),
        dtype="bf16",
        free_tokens=4096,
        max_context_tokens=2048,
        step_ms=1.0,
        addresses=(),
        seq=1,
        expires_at=clock() + 180,
    )
    changed = replace(basis, **changes)
    return replace(changed, layer_hashes=(layer_hash,) * len(changed.layers))


def record(number: int, clock: Callable[[], float] = time.time, **changes) -> bytes:
    return sign_announcement(numbered(number), announcement(number, clock, **changes))


@dataclass(slots=True)
class Member:
    """One host with discovery; `stop` ends it as a killed process would."""

    number: int
    host: Host
    discovery: Discovery
    scope: trio.CancelScope
    stopped: trio.Event = field(default_factory=trio.Event)

    @property
    def peer_id(self) -> PeerId:
        return self.host.peer_id

    async def announce(self, **changes) -> None:
        changes = {"addresses": self.host.addresses()} | changes
        await self.discovery.announce(record(self.number, **changes))

    async def meet(self, *others: Member) -> None:
        for other in others:
            await self.host.connect(other.peer_id, other.host.addresses())

    async def stop(self) -> None:
        self.scope.cancel()
        await self.stopped.wait()


@dataclass(slots=True)
class Swarm:
    """Members that a test starts one by one."""

    nursery: trio.Nursery
    members: Members
    clock: Clock
    running: list[Member] = field(default_factory=list)

    async def start(self, number: int | None = None, *, sources: Sources = ALL_SOURCES) -> Member:
        """Start a member, on the member list from now on; it knows nobody yet."""
        number = len(self.running) + 1 if number is None else number
        self.members.add(numbered(number).peer_id)
        member = await self.nursery.start(self._run, number, sources)
        self.running.append(member)
        return member

    async def start_many(self, count: int, *, sources: Sources = ALL_SOURCES) -> list[Member]:
        return [await self.start(sources=sources) for _ in range(count)]

    async def _run(self, number: int, sources: Sources, *, task_status) -> None:
        identity = numbered(number)
        with trio.CancelScope() as scope:
            async with (
                open_host(identity, listen=LISTEN, allow=self.members.allow) as host,
                trio.open_nursery() as nursery,
            ):
                discovery = Discovery(
                    host, SWARM_ID, self.members.allow, sources=sources, now_unix=self.clock
                )
                await nursery.start(discovery.run)
                member = Member(number, host, discovery, scope)
                task_status.started(member)
        member.stopped.set()


@asynccontextmanager
async def open_swarm() -> AsyncIterator[Swarm]:
    async with trio.open_nursery() as nursery:
        yield Swarm(nursery, Members(), Clock())
        nursery.cancel_scope.cancel()


def seen_by(member: Member) -> dict[str, int]:
    """Return the number of each listed record."""
    return {peer: a.seq for peer, a in member.discovery.announcements().items()}


def is_meshed(member: Member) -> bool:
    """Return whether gossip runs and reaches every connected member."""
    gossip = member.discovery._gossip
    if gossip is None or gossip._running is None:
        return False
    topics = gossip._running.peer_topics.get(gossip._topic, set())
    meshed = gossip._running.router.mesh.get(gossip._topic, set()) & topics
    return len(meshed) >= min(4, len(member.host.connected_peers())) > 0
