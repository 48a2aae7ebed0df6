"""A driver over shards without sockets or arithmetic, on a clock that jumps.

The next token is a hash of those before it and of the seed, so that one lost, doubled or
changed token changes all that follow.
"""

from __future__ import annotations

import time
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import msgspec
import numpy as np
import trio

from pals.driver.recovery import Patience
from pals.driver.routes import RouteTable, ServedModel
from pals.driver.sessions import SessionClient
from pals.driver.state import ClientSession, SampledToken, SessionEvent, SessionRequest
from pals.errors import (
    PalsError,
    PeerUnreachable,
    SessionRefused,
    ShardDraining,
    ShardFull,
    ShardLost,
)
from pals.net.announce import Announcement
from pals.net.control import (
    Ack,
    Close,
    Control,
    Draining,
    Failed,
    Fork,
    Open,
    Opened,
    Preempted,
    Refused,
    Stats,
    StatsRequest,
    decode_control,
    split_names,
)
from pals.net.links import Arrival
from pals.net.wire import FLAG_LAST, Frame, Lane, Outgoing, Row, Rows, sampled_shape
from pals.types import LayerRange, PeerId, Sampling, SessionId

MANIFEST = b"m" * 32
NUM_LAYERS = 6
MODEL = ServedModel(
    model_id="test/m",
    manifest=MANIFEST,
    num_layers=NUM_LAYERS,
    max_position_embeddings=512,
    hidden_size=8,
)
RANGES = {"head": "0:2", "middle": "2:4", "tail": "4:6"}
STOP_TOKEN = 0
TRAVEL_S = 0.01
STEP_S = 0.05
CHUNK_S = 0.2
DIAL_DEADLINE_S = 10.0


def peer(name: str) -> PeerId:
    return PeerId(f"12D3KooW{name:->12}")


def next_token(history: Sequence[int], seed: int) -> int:
    return zlib.crc32(repr((tuple(history), seed)).encode()) % 1000


def make_request(count: int = 30, seed: int = 7, prompt: Sequence[int] = (3, 1, 4)):
    return SessionRequest(
        prompt=tuple(prompt),
        max_new_tokens=count,
        stop_token_ids=(STOP_TOKEN,),
        sampling=Sampling(temperature=0.7, seed=seed),
    )


def unfailed(request: SessionRequest) -> list[int]:
    """Return the answer of a chain that never fails."""
    history = list(request.prompt)
    assert request.max_new_tokens is not None
    for _ in range(request.max_new_tokens):
        history.append(next_token(history, request.sampling.seed))
        if history[-1] in request.stop_token_ids:
            break
    return history[len(request.prompt) :]


@dataclass(eq=False)
class _Running:
    """One session id as its shards see it."""

    message: Open
    seed: int = 0
    open_at: set[PeerId] = field(default_factory=set)
    linked: set[PeerId] = field(default_factory=set)
    history: list[int] = field(default_factory=list)
    is_decoding: bool = False

    @property
    def peers(self) -> list[PeerId]:
        return [PeerId(hop.peer) for hop in self.message.chain]


class VirtualShards:
    """Plays `Links`, `Discovery` and the node for one driver."""

    peer_id = peer("driver")

    def __init__(self, nursery: trio.Nursery, *, slots: int = 4) -> None:
        self.nursery = nursery
        self.slots = slots
        self.travel_s = TRAVEL_S
        self.full: set[PeerId] = set()
        self.links = self.discovery = self
        self.announced: dict[PeerId, Announcement] = {}
        self.hears_news = False
        self.dead: set[PeerId] = set()
        self.silent: set[PeerId] = set()
        self.removed: set[PeerId] = set()
        self.draining: set[PeerId] = set()
        self.hung: set[PeerId] = set()
        self.cut: set[frozenset[PeerId]] = set()
        self.linked: set[PeerId] = set()
        self.dialled: list[PeerId] = []
        self.prompts: list[tuple[float, list[PeerId]]] = []
        self.client: SessionClient | None = None
        self.on_moment: dict[str, Any] = {}
        self.opens: list[tuple[PeerId, Open]] = []
        self.starts: list[int] = []
        self.holds_no_more_than: dict[PeerId, int] = {}
        self._blocks: dict[bytes, tuple[int, ...]] = {}
        self._pages: defaultdict[PeerId, set[bytes]] = defaultdict(set)
        self._sessions: dict[SessionId, _Running] = {}
        self._unread: list[tuple[PeerId, SessionId]] = []

    # --- the world -------------------------------------------------------------------

    def serve(self, name: str, layers: str, **changes: Any) -> PeerId:
        """Announce a shard, or announce it again."""
        served = LayerRange.parse(layers)
        known = self.announced.get(peer(name))
        values: dict[str, Any] = {
            "peer": peer(name),
            "model_id": MODEL.model_id,
            "manifest": MANIFEST,
            "layers": served,
            "num_layers": NUM_LAYERS,
            "layer_hashes": (bytes(16),) * len(served),
            "dtype": "f32",
            "free_tokens": 2,
            "max_context_tokens": 512,
            "step_ms": 1.0,
            "addresses": ("/ip4/127.0.0.1/tcp/1",),
            "seq": 1 if known is None else known.seq + 1,
            "expires_at": time.time() + 3600,
        }
        self.announced[peer(name)] = Announcement(**(values | changes))
        return peer(name)

    def kill(self, victim: PeerId, *, told_first: bool = False) -> None:
        """End a process: every link with it is reset."""
        self.dead.add(victim)
        self.draining.discard(victim)
        self.silent.discard(victim)
        self._forget(victim, told_first=told_first)

    def remove(self, victim: PeerId) -> None:
        """Take a member from the list, which cuts its links."""
        self.removed.add(victim)
        self._forget(victim)

    def cut_between(self, one: PeerId, other: PeerId) -> None:
        """End the link of two shards and let them make no other."""
        self.cut.add(frozenset((one, other)))
        for running in list(self._sessions.values()):
            if self._is_broken(running):
                self._fail_at(running, one, lost=other)
                self._fail_at(running, other, lost=one)

    def revive(self, name: str) -> None:
        """Start a process again, which announces itself."""
        for state in (self.dead, self.silent, self.hung, self.removed, self.draining):
            state.discard(peer(name))
        for shard, session in self._unread:
            if shard == peer(name):
                self._close(shard, session)
        known = self.announced[peer(name)]
        self.serve(name, str(known.layers))

    def drain(self, leaver: PeerId) -> None:
        """Let a shard tell its drivers that it is about to stop."""
        self.draining.add(leaver)
        if any(leaver in running.open_at for running in self._sessions.values()):
            self._tell(leaver, Draining())

    def preempt(self, shard: PeerId) -> None:
        """Let a shard give the room of its sessions to others."""
        for running in list(self._sessions.values()):
            if shard in running.open_at:
                running.open_at.discard(shard)
                self._tell(shard, Preempted(session=running.message.session))

    def sessions_at(self, shard: PeerId) -> int:
        return sum(shard in running.open_at for running in self._sessions.values())

    def _forget(self, victim: PeerId, *, told_first: bool = False) -> None:
        self.linked.discard(victim)
        ended = [r for r in self._sessions.values() if victim in r.open_at]
        if told_first:
            self._tell_neighbours(ended, victim)
        assert self.client is not None
        self.client.on_peer_lost(victim, "the stream was reset")
        if not told_first:
            self._tell_neighbours(ended, victim)
        for running in ended:
            running.open_at.discard(victim)

    def _tell_neighbours(self, ended: Iterable[_Running], victim: PeerId) -> None:
        for running in ended:
            ring = running.peers
            index = ring.index(victim)
            for neighbour in {ring[index - 1], ring[(index + 1) % len(ring)]} - {victim}:
                self._fail_at(running, neighbour, lost=victim)

    def _fail_at(self, running: _Running, shard: PeerId, *, lost: PeerId) -> None:
        if shard in running.open_at:
            running.open_at.discard(shard)
            session = running.message.session
            failed = Failed(session=session, code=ShardLost.code, problem="lost", peer=lost)
            self._tell(shard, failed)

    def _tell(self, shard: PeerId, message: Control) -> None:
        assert self.client is not None
        if shard not in self.dead | self.silent:
            self.client.on_control(shard, message)

    # --- the node --------------------------------------------------------------------

    def members(self) -> frozenset[PeerId]:
        return frozenset(self.announced) - self.removed

    def announcements(self) -> dict[PeerId, Announcement]:
        return {p: a for p, a in self.announced.items() if p not in self.removed}

    def last_seq(self, peer: PeerId) -> int:
        return self.announced[peer].seq if peer in self.announced else -1

    async def meet_more(self) -> None:
        await trio.sleep(self.travel_s)

    def report_lost(self, shard: PeerId) -> None:
        """Change nothing: here the announcement of a dead shard outlives it for long."""

    async def wait_for_change(self) -> None:
        await trio.sleep_forever()

    async def find(self, peers: Iterable[PeerId], *, deadline_s: float) -> dict[PeerId, Any]:
        await trio.sleep(self.travel_s)
        wanted = set(peers)
        return {p: a for p, a in self.announced.items() if p in wanted}

    async def ensure(self, shard: PeerId, addresses: Sequence[str]) -> None:
        if shard in self.linked:
            return
        self.dialled.append(shard)
        await trio.sleep(self.travel_s)
        if shard in self.silent:
            await trio.sleep(DIAL_DEADLINE_S)
        if shard in self.dead | self.silent | self.removed:
            raise PeerUnreachable(peer=shard, problem="it does not answer")
        self.linked.add(shard)

    def send(self, shard: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        if shard not in self.linked:
            raise PeerUnreachable(peer=shard, problem="no link")
        if lane is Lane.PREFILL:
            if shard not in self.silent:
                self._take_prompt(outgoing)
            return
        message = decode_control(shard, memoryview(b"".join(outgoing.payload)))
        if shard in self.silent:
            # What a suspended process does not read yet waits for it in its socket.
            if isinstance(message, Close):
                self._unread.append((shard, SessionId(message.session)))
            return
        match message:
            case Open():
                self.opens.append((shard, message))
                running = _Running(message)
                running = self._sessions.setdefault(SessionId(message.session), running)
                if message.sampler is not None:
                    running.seed = message.sampler.seed
                # At once, as a shard takes one message after another: a close may be right behind.
                is_full = self._take_place(shard, running)
                self.nursery.start_soon(self._open, shard, message, is_full)
            case Fork():
                self._fork(shard, message)
            case Close():
                self._close(shard, SessionId(message.session), message.names)
            case Ack():
                pass
            case StatsRequest():
                self.nursery.start_soon(self._answer_stats, shard)
            case _:
                raise AssertionError(message)

    def _close(self, shard: PeerId, session: SessionId, names: bytes = b"") -> None:
        running = self._sessions.get(session)
        if running is not None and shard in running.open_at:
            running.open_at.discard(shard)
            self._keep_pages(running, shard, names)

    def _fork(self, shard: PeerId, message: Fork) -> None:
        parent = self._sessions.get(SessionId(message.session))
        child = SessionId(message.child)
        if parent is None or shard not in parent.open_at:
            self._tell(shard, Refused(session=child, code=SessionRefused.code, problem="no parent"))
            return
        assert message.position < parent.message.prompt_tokens
        total = parent.message.prompt_tokens + parent.message.max_new_tokens
        opening = msgspec.structs.replace(
            parent.message,
            session=child,
            prompt_tokens=message.position + 1,
            max_new_tokens=total - message.position - 1,
            names=b"",
        )
        running = self._sessions.setdefault(child, _Running(opening))
        running.history = parent.history[: message.position]
        if message.sampler is not None:
            running.seed = message.sampler.seed
        running.open_at.add(shard)
        running.linked.add(shard)
        self._tell(shard, Opened(session=child, held=message.position))

    def _keep_pages(self, running: _Running, shard: PeerId, names: bytes) -> None:
        """Let what a session has computed be found by the names that its driver gives it."""
        for number, name in enumerate(split_names(names)):
            block = tuple(running.history[64 * number : 64 * number + 64])
            if len(block) == 64:
                assert self._blocks.setdefault(name, block) == block, "a name of other tokens"
                self._pages[shard].add(name)

    def _held(self, shard: PeerId, message: Open) -> int:
        """Return how many tokens of a prompt a shard has."""
        names = takewhile(self._pages[shard].__contains__, split_names(message.names))
        return min(64 * len(list(names)), self.holds_no_more_than.get(shard, 1 << 20))

    async def _answer_stats(self, shard: PeerId) -> None:
        await trio.sleep(self.travel_s)
        self._tell(
            shard,
            Stats(steps=1, step_ms=1.0, queue_ms=0.0, handover_ms=0.0, codec_ms=0.0, turn_ms=3.0),
        )

    # --- the shards ------------------------------------------------------------------

    def _take_place(self, shard: PeerId, running: _Running) -> bool:
        """Give a session room at a shard; return whether there is none."""
        is_full = shard in self.full or self.sessions_at(shard) >= self.slots
        if not is_full and shard not in self.draining:
            running.open_at.add(shard)
        return is_full

    async def _open(self, shard: PeerId, message: Open, is_full: bool) -> None:
        session = SessionId(message.session)
        running = self._sessions[session]
        room = self.announced[shard].max_context_tokens
        assert message.prompt_tokens + message.max_new_tokens <= room
        self._reach("open", shard)
        await trio.sleep(self.travel_s)
        ring = running.peers
        onward = ring[(ring.index(shard) + 1) % len(ring)]
        if shard in self.draining:
            refused = Refused(session=session, code=ShardDraining.code, problem="leaving")
            self._tell(shard, refused)
        elif is_full:
            self._tell(shard, Refused(session=session, code=ShardFull.code, problem="full"))
        elif onward in self.dead | self.removed or frozenset((shard, onward)) in self.cut:
            running.open_at.discard(shard)
            code = PeerUnreachable.code
            self._tell(shard, Refused(session=session, code=code, problem="cut", peer=onward))
        elif shard in running.open_at:
            running.linked.add(shard)
            self._run_if_ready(running)
            self._tell(shard, Opened(session=session, held=self._held(shard, message)))

    def _take_prompt(self, outgoing: Outgoing) -> None:
        for row in outgoing.rows:
            running = self._sessions[row.session]
            if not running.history:
                self._begin_at(running, row.position)
            assert row.position == len(running.history)
            running.history += np.frombuffer(b"".join(outgoing.payload), "<i4").tolist()
            if len(running.history) == running.message.prompt_tokens:
                self.prompts.append((trio.current_time(), running.peers))
                self._run_if_ready(running)

    def _begin_at(self, running: _Running, position: int) -> None:
        """Take what the shards have of a prompt that they are not sent."""
        self.starts.append(position)
        names = split_names(running.message.names)[: -(-position // 64)]
        assert all(self._held(shard, running.message) >= position for shard in running.peers)
        running.history = [t for name in names for t in self._blocks[name]][:position]

    def _run_if_ready(self, running: _Running) -> None:
        """Compute a prompt once it is whole and every shard can send on what it makes."""
        is_whole = len(running.history) == running.message.prompt_tokens
        if is_whole and running.linked >= set(running.peers):
            self.nursery.start_soon(self._run, running)

    async def _run(self, running: _Running) -> None:
        self._reach("prefill", *running.peers)
        await self._wait(CHUNK_S, running)
        for shard in running.open_at:
            self._keep_pages(running, shard, running.message.names)
        for number in range(1, running.message.max_new_tokens + 1):
            if self._is_broken(running):
                return
            token = next_token(running.history, running.seed)
            running.history.append(token)
            stops = token in running.message.stop_token_ids
            last = stops or number == running.message.max_new_tokens
            self._sample(running, token, last=last)
            self._reach("end" if last else f"token {number}", *running.peers)
            if last:
                return
            await self._wait(STEP_S, running)

    async def _wait(self, seconds: float, running: _Running) -> None:
        """Let a step pass; it does not while one of the chain stands still."""
        await trio.sleep(seconds)
        while not self._is_broken(running) and set(running.peers) & (self.silent | self.hung):  # noqa: ASYNC110
            await trio.sleep(STEP_S)

    def _is_broken(self, running: _Running) -> bool:
        ring = running.peers
        pairs = (frozenset(pair) for pair in zip(ring, ring[1:] + ring[:1], strict=True))
        return not running.open_at >= set(ring) or any(pair in self.cut for pair in pairs)

    def _sample(self, running: _Running, token: int, *, last: bool) -> None:
        assert self.client is not None
        position = len(running.history) - 1
        row = Row(SessionId(running.message.session), position, 1, FLAG_LAST if last else 0)
        payload = memoryview(np.array([token], "<i4").tobytes())
        shape = sampled_shape(MANIFEST, NUM_LAYERS)
        frame = Frame(Lane.DECODE, shape, Rows.of(row), payload)
        self.client.on_rows(running.peers[-1], Arrival(frame, 0.0, 0.0))

    def _reach(self, moment: str, *shards: PeerId) -> None:
        """Let a test act at a moment of the first session that gets there."""
        action = self.on_moment.get(moment)
        if action is not None and action(*shards):
            del self.on_moment[moment]


@dataclass(eq=False)
class Reader:
    """Collects what one session's sink is told, and when."""

    events: list[SessionEvent] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    over: trio.Event = field(default_factory=trio.Event)
    session: ClientSession | None = None

    def take(self, event: SessionEvent) -> None:
        assert not self.over.is_set(), "an event after the last one"
        self.events.append(event)
        self.times.append(trio.current_time())
        if isinstance(event, PalsError) or event.last:
            self.over.set()

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if isinstance(event, SampledToken)]

    @property
    def longest_silence_s(self) -> float:
        pairs = zip(self.times, self.times[1:], strict=False)
        return max((later - earlier for earlier, later in pairs), default=0.0)

    async def read(self, *, within_s: float = 600.0) -> list[int]:
        """Return all tokens; raise the error that ended them."""
        with trio.fail_after(within_s):
            await self.over.wait()
        if isinstance(self.events[-1], PalsError):
            raise self.events[-1]
        return self.tokens


class World:
    """A driver, its shards and its table."""

    def __init__(self, nursery: trio.Nursery, *, patience: Patience, slots: int) -> None:
        self.shards = VirtualShards(nursery, slots=slots)
        node: Any = self.shards
        self.routes = RouteTable(node, MODEL)
        self.client = SessionClient(node, MODEL, self.routes, nursery=nursery, patience=patience)
        self.shards.client = self.client

    async def ask(self, request: SessionRequest | None = None) -> Reader:
        reader = Reader()
        reader.session = await self.client.open(request or make_request(), reader.take)
        return reader

    def chain_of(self, reader: Reader) -> list[PeerId]:
        assert reader.session is not None
        return [hop.peer for hop in reader.session.chain.hops]


@asynccontextmanager
async def open_world(
    *,
    replicas: int = 2,
    patience: Patience | None = None,
    slots: int = 4,
    context_tokens: int = 512,
) -> AsyncIterator[World]:
    """Run a driver over ``replicas`` shards of each range, such as ``head-0``."""
    async with trio.open_nursery() as nursery:
        world = World(nursery, patience=patience or Patience(), slots=slots)
        for name, layers in RANGES.items():
            for number in range(replicas):
                name_of = f"{name}-{number}"
                world.shards.serve(name_of, layers, max_context_tokens=context_tokens)
        nursery.start_soon(world.routes.run)
        yield world
        nursery.cancel_scope.cancel()
