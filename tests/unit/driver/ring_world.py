"""Real drivers over a ring of real shard services, in virtual time and without a model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from pals.driver.recovery import Patience
from pals.driver.routes import RouteTable, ServedModel
from pals.driver.sessions import SessionClient
from pals.driver.state import ClientSession, SampledToken, SessionEvent, SessionRequest
from pals.engine.batch import BatchRules, Step
from pals.errors import PalsError
from pals.net.announce import Announcement
from pals.types import EngineLimits, PeerId, Sampling, SessionId
from tests.announcements import make_announcement
from tests.unit.net.virtual_ring import (
    VirtualRing,
    WiredLinks,
    Wires,
    receiver_of,
    tokens_of_a_chain,
)

LIMITS = EngineLimits(max_sessions=32, max_context_tokens=2048, max_chunk_tokens=64, max_rows=16)
SHARDS = 3
HIDDEN_SIZE = 8
DELAY_S = 0.01
DECODE_S = 0.02
TOKEN_S = 0.002
MODEL = ServedModel(
    model_id="test/m",
    manifest=b"m" * 32,
    num_layers=SHARDS,
    max_position_embeddings=LIMITS.max_context_tokens,
    hidden_size=8,
)


def step_s(place: int, step: Step) -> float:
    """A step costs its weights once, and something for each token of a chunk."""
    return DECODE_S + (0.0 if step.chunk is None else TOKEN_S * step.chunk.tokens)


def make_request(
    prompt: Sequence[int], count: int = 20, *, deadline_s: float | None = None, **sampling: Any
) -> SessionRequest:
    return SessionRequest(
        prompt=tuple(prompt),
        max_new_tokens=count,
        stop_token_ids=(),
        sampling=Sampling(**sampling),
        deadline_s=deadline_s,
    )


def expected(request: SessionRequest) -> list[int]:
    """Return the answer of a ring that serves nobody else and loses nothing."""
    assert request.max_new_tokens is not None
    return tokens_of_a_chain(SHARDS, request.prompt, request.max_new_tokens, request.sampling.seed)


class RingNode:
    """What a session client needs of its node, its links and its discovery."""

    hears_news = False

    def __init__(self, name: str, ring: VirtualRing) -> None:
        self.peer_id = PeerId(name)
        self.links = WiredLinks(self.peer_id, ring.wires)
        self.discovery = self
        self._ring = ring

    def announcements(self) -> dict[PeerId, Announcement]:
        return {
            peer: make_announcement(
                peer,
                str(service.layers),
                manifest=MODEL.manifest,
                num_layers=SHARDS,
                free_tokens=service.free_tokens,
                max_context_tokens=compute.core.batcher.max_session_tokens,
            )
            for peer, service, compute in zip(
                self._ring.peers, self._ring.services, self._ring.computes, strict=True
            )
        }

    def members(self) -> frozenset[PeerId]:
        return frozenset((*self._ring.peers, self.peer_id))

    def last_seq(self, peer: PeerId) -> int:
        return 1

    def report_lost(self, peer: PeerId) -> None:
        raise AssertionError(f"{peer} was blamed")

    async def wait_for_change(self) -> None:
        await trio.sleep_forever()

    async def find(self, peers: Iterable[PeerId], *, deadline_s: float) -> dict[PeerId, Any]:
        await trio.sleep(DELAY_S)
        return {p: a for p, a in self.announcements().items() if p in set(peers)}

    async def meet_more(self) -> None:
        await trio.lowlevel.checkpoint()


@dataclass(eq=False)
class Reader:
    """Collects what one session's sink is told."""

    on_token: Callable[[int], None] = lambda _: None
    events: list[SessionEvent] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    begun: trio.Event = field(default_factory=trio.Event)
    over: trio.Event = field(default_factory=trio.Event)
    session: ClientSession | None = None

    def take(self, event: SessionEvent) -> None:
        assert not self.over.is_set(), "an event after the last one"
        self.events.append(event)
        self.times.append(trio.current_time())
        self.begun.set()
        if isinstance(event, PalsError) or event.last:
            self.over.set()
        else:
            self.on_token(len(self.events))

    async def read(self) -> list[int]:
        """Return all tokens; raise the error that ended them."""
        with trio.fail_after(600):
            await self.over.wait()
        if isinstance(self.events[-1], PalsError):
            raise self.events[-1]
        return [event.token for event in self.events if isinstance(event, SampledToken)]

    @property
    def id(self) -> SessionId:
        """What the shards call the session now."""
        assert self.session is not None
        return self.session.attempt.session

    @property
    def start(self) -> int:
        """Where the last prompt that was sent begins."""
        assert self.session is not None
        return self.session.attempt.start


class RingClient:
    """One driver of a ring."""

    def __init__(self, name: str, ring: VirtualRing, nursery: trio.Nursery) -> None:
        self.ring = ring
        node: Any = RingNode(name, ring)
        self.routes = RouteTable(node, MODEL)
        self.client = SessionClient(
            node, MODEL, self.routes, nursery=nursery, patience=Patience(wait_for_peers_s=60.0)
        )
        ring.wires.attach(node.peer_id, receiver_of(self.client))

    async def ask(
        self, request: SessionRequest, on_token: Callable[[int], None] = lambda _: None
    ) -> Reader:
        reader = Reader(on_token)
        reader.session = await self.client.open(request, reader.take)
        return reader

    async def fork(self, parent: Reader, **sampling: Any) -> Reader:
        assert parent.session is not None
        reader = Reader()
        reader.session = await self.client.fork(parent.session, Sampling(**sampling), reader.take)
        return reader

    async def answer(self, request: SessionRequest) -> Reader:
        """Ask, and return when all tokens are there, which are the right ones."""
        reader = await self.ask(request)
        assert await reader.read() == expected(request)
        await trio.sleep(1.0)
        return reader


@asynccontextmanager
async def open_ring(
    *, num_pages: Sequence[int] | None = None, rules: BatchRules | None = None
) -> AsyncIterator[tuple[VirtualRing, Callable[[str], RingClient]]]:
    """Run a ring; the second value makes drivers of it. Nothing may be left in it in the end."""
    async with trio.open_nursery() as nursery:
        ring = VirtualRing(
            nursery,
            Wires(nursery, delay_s=DELAY_S, bytes_per_s=1e9),
            shards=SHARDS,
            step_s=step_s,
            limits=LIMITS,
            hidden_size=HIDDEN_SIZE,
            num_pages=num_pages,
            rules=rules,
        )
        yield ring, lambda name: RingClient(name, ring, nursery)
        await trio.sleep(1.0)
        assert [service.sessions for service in ring.services] == [0] * SHARDS
        assert [compute.core.batcher.num_running for compute in ring.computes] == [0] * SHARDS
        assert [compute.core.queued_bytes for compute in ring.computes] == [0] * SHARDS
        nursery.cancel_scope.cancel()
