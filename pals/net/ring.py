"""The sessions of one shard: who may send what, at which position, and where it goes next.

Pure: no clock, no sockets, no arrays. The shell asks this table about every message
and every row before any tensor is built, and does what it answers. `now` is seconds on
a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from pals.errors import InvalidFrame, SessionRefused
from pals.net.control import Fork, Hop, Open, Sampler
from pals.net.wire import Lane, Row
from pals.types import EngineLimits, LayerRange, PeerId, SessionId

MAX_ROWS_AHEAD = 8
"""Rows behind its prompt that a session may have waiting here: the ring sends the next one
once this one has gone round, and drafts a few more at most."""

_GREEDY = Sampler()


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
        prompt_tokens: Length of the prompt.
        max_new_tokens: Most tokens that the tail samples.
        stop_token_ids: Ids after which the tail stops.
        sampler: How the tail samples.
        is_fork: It began with tokens of another session, and its first row, which comes as
            a prompt does, is short.
        last_seen: When the last row or message of the session came.
        start: Where its first row stood; None before that came.
        position: Where the last row ended: no row may leave a gap behind it.
        sampled_tokens: Tokens that the tail has sampled so far.
        rows_ahead: Rows behind the prompt that have come and are not computed.
    """

    session: SessionId
    driver: PeerId
    upstream: PeerId
    ring_upstream: PeerId
    downstream: Hop | None
    head: Hop
    prompt_tokens: int
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    sampler: Sampler
    is_fork: bool
    last_seen: float
    start: int | None = None
    position: int = 0
    sampled_tokens: int = 0
    rows_ahead: int = 0

    @property
    def max_tokens(self) -> int:
        """Positions that prompt and answer may take."""
        return self.prompt_tokens + self.max_new_tokens

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
    """All sessions of one shard. How many there may be is the batcher's to say."""

    local: PeerId
    layers: LayerRange
    num_layers: int
    limits: EngineLimits
    idle_s: float
    _sessions: dict[SessionId, ShardSession] = field(default_factory=dict[SessionId, ShardSession])

    def __len__(self) -> int:
        return len(self._sessions)

    def drivers(self) -> frozenset[PeerId]:
        """Return the drivers of the sessions that run."""
        return frozenset(session.driver for session in self._sessions.values())

    def open(self, driver: PeerId, message: Open, now: float) -> ShardSession:
        """Take a session.

        Raises:
            SessionRefused: The chain does not fit this shard, or the context its limit.
        """
        session = SessionId(message.session)
        self._check_new(session)
        index = self._check_chain(message)
        wanted = message.prompt_tokens + message.max_new_tokens
        if wanted > self.limits.max_context_tokens:
            limit = self.limits.max_context_tokens
            raise self._refusal(f"{wanted} tokens, the shard takes {limit} a session")
        opened = self._build(session, driver, message, index, now)
        self._sessions[session] = opened
        return opened

    def fork(self, driver: PeerId, message: Fork, now: float) -> ShardSession:
        """Take a session that begins with tokens of another one over the same chain.

        Raises:
            SessionRefused: There is no such session of this driver, or no such position.
        """
        child = SessionId(message.child)
        self._check_new(child)
        parent = self._sessions.get(SessionId(message.session))
        if parent is None or parent.driver != driver:
            raise self._refusal("there is no session of its driver to fork")
        if parent.sampler.pooling or (message.sampler is not None and message.sampler.pooling):
            raise self._refusal("a fork of what is pooled, or that is to be")
        if not message.position < min(parent.position + 1, parent.max_tokens - 1):
            raise self._refusal(f"a fork at {message.position} of {parent.position} tokens")
        forked = replace(
            parent,
            session=child,
            prompt_tokens=message.position + 1,
            max_new_tokens=parent.max_tokens - message.position - 1,
            sampler=message.sampler or _GREEDY,
            is_fork=True,
            last_seen=now,
            start=message.position,
            position=message.position,
            sampled_tokens=0,
            rows_ahead=0,
        )
        self._sessions[child] = forked
        return forked

    def _check_new(self, session: SessionId) -> None:
        if session in self._sessions:
            raise self._refusal("a session of this id is open")

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
            prompt_tokens=message.prompt_tokens,
            max_new_tokens=message.max_new_tokens,
            stop_token_ids=frozenset(message.stop_token_ids),
            sampler=message.sampler or _GREEDY,
            is_fork=False,
            last_seen=now,
        )

    def take_row(self, sender: PeerId, lane: Lane, row: Row, now: float) -> ShardSession | None:
        """Admit one row, or return None when the session is over (a late row is no fault).

        The first row of a prompt says where the session starts, behind what all shards of
        the chain hold of it; the others follow without a gap. After the prompt a row may also
        step back, over tokens that were verified and found wrong.

        Raises:
            InvalidFrame: The row is from the wrong peer or lane, or at the wrong position.
        """
        session = self._sessions.get(row.session)
        if session is None:
            return None
        if row.position < session.prompt_tokens:
            self._check_prompt_row(session, sender, lane, row)
        else:
            self._check_short_row(session, sender, lane, row)
        if session.start is None:
            session.start = row.position
        session.position = row.position + row.num_tokens
        session.last_seen = now
        return session

    def _check_prompt_row(
        self, session: ShardSession, sender: PeerId, lane: Lane, row: Row
    ) -> None:
        _check_way(sender, lane, session.upstream, Lane.PREFILL)
        if session.start is not None and row.position != session.position:
            problem = f"a row at position {row.position}, expected {session.position}"
            raise InvalidFrame(peer=sender, problem=problem)
        if row.position + row.num_tokens > session.prompt_tokens:
            raise InvalidFrame(peer=sender, problem=f"a row of {row.num_tokens} tokens")

    def _check_short_row(self, session: ShardSession, sender: PeerId, lane: Lane, row: Row) -> None:
        _check_way(sender, lane, session.ring_upstream, Lane.DECODE)
        if session.sampler.pooling:
            raise InvalidFrame(peer=sender, problem="a row behind a prompt that is pooled")
        if row.position > session.position:
            problem = f"a row at position {row.position}, expected {session.position}"
            raise InvalidFrame(peer=sender, problem=problem)
        end = row.position + row.num_tokens
        if row.num_tokens > self.limits.verify_tokens or end > session.max_tokens:
            raise InvalidFrame(peer=sender, problem=f"a row of {row.num_tokens} tokens")
        if session.rows_ahead >= MAX_ROWS_AHEAD:
            problem = f"more than {MAX_ROWS_AHEAD} rows before they were computed"
            raise InvalidFrame(peer=sender, problem=problem)
        session.rows_ahead += 1

    def note_computed(self, session: ShardSession, position: int) -> None:
        """Take that a row, or a part of a prompt, that begins at ``position`` has run."""
        if position >= session.prompt_tokens:
            session.rows_ahead -= 1

    def take_sample(self, session: ShardSession, position: int, token: int) -> bool:
        """Take that the tail sampled a token; return whether it is the last one.

        What is counted follows from where it stands, so that a step back takes it back.
        """
        session.sampled_tokens = position + 1 - session.prompt_tokens
        return token in session.stop_token_ids or session.sampled_tokens >= session.max_new_tokens

    def get(self, session: SessionId) -> ShardSession | None:
        return self._sessions.get(session)

    def close(self, session: SessionId, sender: PeerId) -> ShardSession | None:
        """Drop and return a session if ``sender`` is its driver; else return None."""
        found = self._sessions.get(session)
        if found is None or found.driver != sender:
            return None
        self.remove(found)
        return found

    def has(self, session: ShardSession) -> bool:
        """Return whether a session runs still: another one may have its id by now."""
        return self._sessions.get(session.session) is session

    def remove(self, session: ShardSession) -> bool:
        """Drop a session, and return whether it was there still."""
        if not self.has(session):
            return False
        del self._sessions[session.session]
        return True

    def needs(self, peer: PeerId) -> bool:
        """Return whether any session cannot go on without ``peer``."""
        return any(peer in session.peers for session in self._sessions.values())

    def remove_peer(self, peer: PeerId) -> list[ShardSession]:
        """Drop and return the sessions that cannot go on without ``peer``."""
        return self._remove_all(s for s in self._sessions.values() if peer in s.peers)

    def remove_idle(self, now: float) -> list[ShardSession]:
        """Drop and return the sessions without traffic for longer than `idle_s`."""
        return self._remove_all(
            s for s in self._sessions.values() if now - s.last_seen > self.idle_s
        )

    def remove_all(self) -> list[ShardSession]:
        """Drop and return every session."""
        return self._remove_all(self._sessions.values())

    def _remove_all(self, sessions: Iterable[ShardSession]) -> list[ShardSession]:
        found = list(sessions)
        for session in found:
            self.remove(session)
        return found

    def _refusal(self, problem: str) -> SessionRefused:
        return SessionRefused(peer=self.local, problem=problem)


def _check_way(sender: PeerId, lane: Lane, expected: PeerId, expected_lane: Lane) -> None:
    if sender != expected or lane != expected_lane:
        raise InvalidFrame(peer=sender, problem="a row of a session that is not its own")
