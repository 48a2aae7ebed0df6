"""The sessions of one shard: who may send what, at which position, and where it goes next.

Pure: no clock, no sockets, no arrays. The shell asks this table about every message
and every row before any tensor is built, and does what it answers. `now` is seconds on
a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pals.errors import InvalidFrame, SessionRefused, ShardFull
from pals.net.control import Hop, Open
from pals.net.wire import Lane, Row
from pals.types import EngineLimits, LayerRange, PeerId, Sampling, SessionId

MAX_SESSIONS_PER_PEER = 256
GUARANTEED_PARTS = 4
"""A driver that asks gets one slot in so many, whoever took the others first."""


@dataclass(slots=True, kw_only=True, eq=False)
class ShardSession:
    """One session as this shard sees it; equal only to itself, since its id may come again.

    Attributes:
        session: Its id.
        driver: The peer that opened it and alone may close it.
        upstream: The peer whose prompt chunks are taken.
        ring_upstream: The peer whose decode rows are taken: at the head, the tail.
        downstream: The next hop; None at the tail.
        head: The first hop, where the tail sends each sampled token.
        slot: Its place in the KV cache.
        prompt_tokens: Length of the prompt.
        max_new_tokens: Most tokens that the tail samples.
        stop_token_ids: Ids after which the tail stops.
        sampling: How the tail samples.
        position: Tokens taken so far, which is the position the next row must state.
        sampled_tokens: Tokens that the tail has sampled so far.
        last_seen: When the last row or message of the session came.
    """

    session: SessionId
    driver: PeerId
    upstream: PeerId
    ring_upstream: PeerId
    downstream: Hop | None
    head: Hop
    slot: int
    prompt_tokens: int
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    sampling: Sampling
    last_seen: float
    position: int = 0
    sampled_tokens: int = 0

    @property
    def receiver(self) -> PeerId:
        """Who takes what this shard makes of the session: the next hop, or the driver."""
        return self.driver if self.downstream is None else PeerId(self.downstream.peer)

    @property
    def peers(self) -> frozenset[PeerId]:
        """The peers without whom the session cannot go on here."""
        neighbours = {self.driver, self.upstream, self.ring_upstream}
        if self.downstream is not None:
            neighbours.add(PeerId(self.downstream.peer))
        return frozenset(neighbours)


@dataclass(slots=True, kw_only=True)
class SessionTable:
    """All sessions of one shard, within its limits."""

    local: PeerId
    layers: LayerRange
    num_layers: int
    limits: EngineLimits
    idle_s: float
    _sessions: dict[SessionId, ShardSession] = field(default_factory=dict[SessionId, ShardSession])
    _free_slots: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        self._free_slots = list(range(self.limits.max_sessions))

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def drivers(self) -> frozenset[PeerId]:
        """Return the drivers of the sessions that run."""
        return frozenset(session.driver for session in self._sessions.values())

    def open(self, driver: PeerId, message: Open, now: float) -> ShardSession:
        """Take a session and reserve its slot.

        Raises:
            SessionRefused: The chain does not fit this shard, or the context its limit.
            ShardFull: Every slot is taken; see `yield_slot`.
        """
        session = SessionId(message.session)
        if session in self._sessions:
            raise self._refusal("a session of this id is open")
        if len(self._sessions_of(driver)) >= MAX_SESSIONS_PER_PEER:
            raise self._refusal(f"its driver has {MAX_SESSIONS_PER_PEER} sessions open")
        index = self._check_chain(message)
        wanted = message.prompt_tokens + message.max_new_tokens
        if wanted > self.limits.max_context_tokens:
            limit = self.limits.max_context_tokens
            raise self._refusal(f"{wanted} tokens, the shard takes {limit} a session")
        if not self._free_slots:
            raise ShardFull(slots=self.limits.max_sessions)
        opened = self._build(session, driver, message, index, now)
        self._sessions[session] = opened
        return opened

    def yield_slot(self, driver: PeerId) -> ShardSession | None:
        """Free and return a session whose slot is due to ``driver``, if one is.

        A lone driver may use every slot. Under contention each has a quarter of them: one
        that has less takes from the driver that has most, and of its sessions the one that
        has been quiet for longest.
        """
        guaranteed = max(1, self.limits.max_sessions // GUARANTEED_PARTS)
        if self._free_slots or len(self._sessions_of(driver)) >= guaranteed:
            return None
        largest = max((self._sessions_of(peer) for peer in self.drivers()), key=len)
        if len(largest) <= guaranteed:
            return None
        quietest = min(largest, key=lambda session: session.last_seen)
        self.remove(quietest)
        return quietest

    def _sessions_of(self, driver: PeerId) -> list[ShardSession]:
        return [session for session in self._sessions.values() if session.driver == driver]

    def _check_chain(self, message: Open) -> int:
        """Return this shard's place in the chain; every layer must be covered once."""
        expected = 0
        for hop in message.chain:
            if hop.start != expected or hop.stop <= hop.start:
                raise self._refusal(f"the chain has a gap at layer {expected}")
            expected = hop.stop
        if expected != self.num_layers:
            raise self._refusal(f"the chain ends at layer {expected} of {self.num_layers}")
        own = [i for i, hop in enumerate(message.chain) if hop.peer == self.local]
        layers = [LayerRange(message.chain[i].start, message.chain[i].stop) for i in own]
        if layers != [self.layers]:
            raise self._refusal(f"the chain does not hold this shard's layers {self.layers} once")
        return own[0]

    def _build(
        self, session: SessionId, driver: PeerId, message: Open, index: int, now: float
    ) -> ShardSession:
        chain = message.chain
        is_head, is_tail = index == 0, index == len(chain) - 1
        previous = driver if is_head else PeerId(chain[index - 1].peer)
        return ShardSession(
            session=session,
            driver=driver,
            upstream=previous,
            ring_upstream=PeerId(chain[-1].peer) if is_head else previous,
            downstream=None if is_tail else chain[index + 1],
            head=chain[0],
            slot=self._free_slots.pop(),
            prompt_tokens=message.prompt_tokens,
            max_new_tokens=message.max_new_tokens,
            stop_token_ids=frozenset(message.stop_token_ids),
            sampling=Sampling(
                temperature=message.temperature, top_p=message.top_p, seed=message.seed
            ),
            last_seen=now,
        )

    def take_row(self, sender: PeerId, lane: Lane, row: Row, now: float) -> ShardSession | None:
        """Admit one row, or return None when the session is over (a late row is no fault).

        Raises:
            InvalidFrame: The row is from the wrong peer or lane, or at the wrong position.
        """
        session = self._sessions.get(row.session)
        if session is None:
            return None
        prefilling = session.position < session.prompt_tokens
        allowed = session.upstream if prefilling else session.ring_upstream
        lane_wanted = Lane.PREFILL if prefilling else Lane.DECODE
        if sender != allowed or lane != lane_wanted:
            raise InvalidFrame(peer=sender, problem="a row of a session that is not its own")
        if row.position != session.position:
            problem = f"a row at position {row.position}, expected {session.position}"
            raise InvalidFrame(peer=sender, problem=problem)
        end = session.prompt_tokens if prefilling else session.position + 1
        if row.position + row.num_tokens > end or end > self.limits.max_context_tokens:
            raise InvalidFrame(peer=sender, problem=f"a row of {row.num_tokens} tokens")
        session.position += row.num_tokens
        session.last_seen = now
        return session

    def take_sample(self, session: ShardSession, token: int) -> bool:
        """Count a token that the tail sampled; return whether it was the last one."""
        session.sampled_tokens += 1
        return token in session.stop_token_ids or session.sampled_tokens >= session.max_new_tokens

    def get(self, session: SessionId) -> ShardSession | None:
        return self._sessions.get(session)

    def close(self, session: SessionId, sender: PeerId) -> ShardSession | None:
        """Free and return a session if ``sender`` is its driver; else return None."""
        found = self._sessions.get(session)
        if found is None or found.driver != sender:
            return None
        self.remove(found)
        return found

    def remove(self, session: ShardSession) -> None:
        """Free a session's slot, unless that was done before."""
        if self._sessions.get(session.session) is session:
            del self._sessions[session.session]
            self._free_slots.append(session.slot)

    def needs(self, peer: PeerId) -> bool:
        """Return whether any session cannot go on without ``peer``."""
        return any(peer in session.peers for session in self._sessions.values())

    def remove_peer(self, peer: PeerId) -> list[ShardSession]:
        """Free and return the sessions that cannot go on without ``peer``."""
        return self._remove_all(s for s in self._sessions.values() if peer in s.peers)

    def remove_idle(self, now: float) -> list[ShardSession]:
        """Free and return the sessions without traffic for longer than `idle_s`."""
        return self._remove_all(
            s for s in self._sessions.values() if now - s.last_seen > self.idle_s
        )

    def remove_all(self) -> list[ShardSession]:
        """Free and return every session."""
        return self._remove_all(self._sessions.values())

    def _remove_all(self, sessions: Iterable[ShardSession]) -> list[ShardSession]:
        found = list(sessions)
        for session in found:
            self.remove(session)
        return found

    def _refusal(self, problem: str) -> SessionRefused:
        return SessionRefused(peer=self.local, problem=problem)
