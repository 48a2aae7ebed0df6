"""The sessions of one shard from their opening to their end, and the pages they hold.

Pure: no clock, no arrays; `now` is seconds on a monotonic clock of the caller.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import replace

from pals.engine.admission import AdmissionLine, Candidate
from pals.engine.batch import (
    Admitted,
    BatchRules,
    Ended,
    Event,
    Preempted,
    SessionRequest,
)
from pals.engine.fairness import FairOrder
from pals.engine.pages import PageCopy, PagePool
from pals.engine.prefix import BLOCK_TOKENS
from pals.engine.running import Archive, Need, Running, Shares, promised_pages
from pals.errors import (
    DeadlineExceeded,
    InvalidStep,
    PagesExhausted,
    PalsError,
    PeerSessionsFull,
    SessionTooLong,
    ShardFull,
)
from pals.types import PeerId, SessionId


class Sessions:
    """Who runs, who waits to, and who has to give way.

    Attributes:
        pool: The pages.
        running: The sessions that hold pages.
        short_line: The order of those whose next row is short.
        prompt_line: The order of those whose next row is of a prompt.
        waiting_tokens: Of all rows that wait for a step.
    """

    def __init__(self, pool: PagePool, rules: BatchRules) -> None:
        self.pool = pool
        self.running: dict[SessionId, Running] = {}
        self.short_line: FairOrder[SessionId] = FairOrder()
        self.prompt_line: FairOrder[SessionId] = FairOrder()
        self.waiting_tokens = 0
        self._rules = rules
        self._shares = Shares(pool, rules.kv_share)
        self._waiting = AdmissionLine(rules)
        self._archive = Archive()
        self._forks: dict[SessionId, Running] = {}
        self._first_deadline = float("inf")
        self._numbers = itertools.count()
        self._events: list[Event] = []

    # --- from outside ----------------------------------------------------------------

    @property
    def free_tokens(self) -> int:
        """Tokens that sessions to come find room for, as a shard announces them."""
        pages = self.pool.available - promised_pages(self.pool, self.running.values())
        return max(0, pages) * self.pool.format.page_tokens

    def open(self, request: SessionRequest, now: float) -> None:
        """Let a session wait for room; an event says when it has it, or that it has not.

        Raises:
            InvalidStep: The id is taken, or the lengths are no lengths.
            SessionTooLong: It would not fit if it were alone.
            PeerSessionsFull: Its peer has as many sessions as one may.
            ShardFull: As many wait already as may.
        """
        self._check_new(request.session)
        if not 1 <= request.prompt_tokens < request.max_tokens:
            problem = f"a prompt of {request.prompt_tokens} of {request.max_tokens} tokens"
            raise InvalidStep(problem=problem)
        if request.max_tokens > self.pool.num_tokens:
            raise SessionTooLong(tokens=request.max_tokens, limit=self.pool.num_tokens)
        self._check_room_for(request.peer)
        if len(self._waiting) >= self._rules.max_waiting_sessions:
            raise ShardFull(slots=self._rules.max_sessions)
        self._waiting.add(self._build_candidate(request, now))

    def fork(self, parent: SessionId, child: SessionId, position: int, now: float) -> None:
        """Begin a session with the first tokens of another; an event says when it has them.

        Args:
            parent: It runs, and is the same driver's.
            child: The new one.
            position: At most as many tokens as came back from the tail, so that what every
                shard has of them is what they are.
            now: The time.

        Raises:
            InvalidStep: There is no such parent or position, or the id is taken.
            PeerSessionsFull: Its peer has as many sessions as one may.
            ShardFull: As many run as may.
        """
        origin = self.running.get(parent)
        self._check_new(child)
        if origin is None or not 0 < position < origin.request.max_tokens:
            raise InvalidStep(problem=f"a fork at position {position} of a session that has none")
        self._check_room_for(origin.peer)
        if len(self.running) >= self._rules.max_sessions:
            raise ShardFull(slots=self._rules.max_sessions)
        forked = Running(
            request=replace(origin.request, session=child, names=(), replaces=None),
            seniority=(now, next(self._numbers)),
            has_yielded=False,
            end=position,
            last_row=now,
            origin=(parent, position),
        )
        self._add(forked)
        self._forks[child] = forked

    def close(self, session: SessionId, names: tuple[bytes, ...] = ()) -> None:
        """End a session and free its pages at once; it may be over already, or wait still.

        Args:
            session: Its id.
            names: Of the blocks of prompt and answer, under which they may be found later. The
                last token that was sampled is in none: nobody has computed with it yet.
        """
        if session in self._waiting:
            self._forget(self._waiting.remove(session))
        elif (running := self.running.get(session)) is not None:
            if names and running.origin is None:
                self.pool.name(session, self.pool.keys_of(running.peer, names))
                self.pool.publish(session, self.pool.length(session))
            self._remove(running, yielded=False)

    def fail(self, error: PalsError) -> None:
        """End every session that runs: a failed step took the cache along."""
        for running in list(self.running.values()):
            self._remove(running, yielded=False)
            self._events.append(Ended(running.session, error))
        self.pool.clear()

    def take_events(self) -> list[Event]:
        """Return what has happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def next_at(self) -> float:
        """Return when `tend` has something to do although nothing was added."""
        return min(self._waiting.next_expiry(), self._first_deadline)

    # --- for the batcher -------------------------------------------------------------

    def tend(self, now: float) -> None:
        """End what is late, and admit what has room."""
        for candidate, refusal in self._waiting.expire(now):
            self._forget(candidate)
            self._events.append(refusal)
        if now >= self._first_deadline:
            self._end_late(now)
        if self._forks:
            self._settle_forks()
        while (first := self._waiting.first()) is not None and self._admit(first, now):
            pass

    def stand_in_line(self, running: Running) -> None:
        """Let a session wait in the line of its next row, and in no other."""
        row = running.next_row
        line = None
        if row is not None:
            line = self.prompt_line if row.kind == "prefill" else self.short_line
        if line is running.line:
            return
        if running.line is not None:
            running.line.rest(running.peer, running.session)
        if line is not None:
            line.begin(running.peer, running.session)
        running.line = line

    def move_to_next_row(self, running: Running) -> None:
        """Step back to where the next row of a session stands, if it is behind the session."""
        row = running.next_row
        assert row is not None
        if row.position < self.pool.length(running.session):
            move = self.pool.rewind if running.is_started else self.pool.start
            move(running.session, row.position)

    def reserve(
        self, running: Running, tokens: int, spared: Collection[Running], now: float
    ) -> tuple[PageCopy, ...] | None:
        """Give a session pages for its next tokens, if need be from others.

        Args:
            running: Who needs them.
            tokens: How many it will write.
            spared: Sessions that are in the coming step already.
            now: The time.

        Returns:
            What the step has to copy; None when the session has to wait.
        """
        while True:
            try:
                return self.pool.reserve(running.session, tokens)
            except PagesExhausted:
                pages = self.pool.pages_needed(running.session, tokens)
            need = Need(running.peer, pages, running.seniority, self._active_since(now))
            victims = self._shares.victims(need, self.running.values())
            victim = next((v for v in victims if v not in spared), None)
            if victim is None:
                return None
            self._preempt(victim)

    # --- inside ----------------------------------------------------------------------

    def _check_new(self, session: SessionId) -> None:
        if session in self.running or session in self._waiting:
            raise InvalidStep(problem="a session of this id is open")

    def _check_room_for(self, peer: PeerId) -> None:
        count = sum(r.peer == peer for r in self.running.values()) + self._waiting.count(peer)
        if count >= self._rules.max_sessions_per_peer:
            raise PeerSessionsFull(limit=self._rules.max_sessions_per_peer)

    def _build_candidate(self, request: SessionRequest, now: float) -> Candidate:
        former = self._archive.take(request)
        names = request.names[: request.prompt_tokens // BLOCK_TOKENS]
        return Candidate(
            request=request,
            keys=self.pool.keys_of(request.peer, names),
            seniority=former.seniority if former else (now, next(self._numbers)),
            has_yielded=former is not None and former.has_yielded,
            since=now,
        )

    def _admit(self, candidate: Candidate, now: float) -> bool:
        """Give the first in line its room, if there is as much."""
        if len(self.running) >= self._rules.max_sessions:
            return False
        request, match = candidate.request, self.pool.match(candidate.keys)
        # One token beyond the prompt: whoever cannot begin to answer is better not begun.
        held = self.pool.format.pages_of(match.tokens)
        new_pages = self.pool.format.pages_of(request.prompt_tokens + 1) - held
        needed = max(0, new_pages) + match.idle
        need = Need(request.peer, needed, None, self._active_since(now))
        if not self._find_room(need):
            return False
        self._waiting.take(candidate, needed)
        tokens = self.pool.open(request.session, request.peer, candidate.keys)
        self._add(
            Running(
                request=request,
                seniority=candidate.seniority,
                has_yielded=candidate.has_yielded,
                end=tokens,
                last_row=now,
            )
        )
        self._events.append(Admitted(request.session, tokens))
        return True

    def _active_since(self, now: float) -> float:
        return now - self._rules.decoding_s

    def _find_room(self, need: Need) -> bool:
        """Return whether pages may be promised to a peer, taking them back if it may."""
        # A page for each that runs: else the newcomer would soon be preempted again.
        wanted = need.pages + promised_pages(self.pool, self.running.values()) + len(self.running)
        lacking = wanted - self.pool.available
        if lacking <= 0 or not self.running:
            return True
        chosen: list[Running] = []
        for victim in self._shares.victims(need, self.running.values()):
            chosen.append(victim)
            lacking -= self.pool.format.pages_of(self.pool.length(victim.session)) + 1
            if lacking <= 0:
                break
        if lacking > 0:
            return False
        for victim in chosen:
            self._preempt(victim)
        return True

    def _preempt(self, running: Running) -> None:
        self._remove(running, yielded=True)
        self._events.append(Preempted(running.session))

    def _end_late(self, now: float) -> None:
        """End the sessions whose answers nobody wants any more."""
        for running in [r for r in self.running.values() if now >= r.request.deadline]:
            self._remove(running, yielded=False)
            late = DeadlineExceeded(tokens=running.end)
            self._events.append(Ended(running.session, late))

    def _settle_forks(self) -> None:
        """Give forks the pages of their parents, as far as these have them now."""
        for running in list(self._forks.values()):
            assert running.origin is not None
            parent, position = running.origin
            origin = self.running.get(parent)
            if origin is None:  # nothing is left to fork: its driver replays it as any other
                self._preempt(running)
            elif origin.origin is None and self.pool.length(parent) >= position:
                self.pool.fork(parent, running.session, position)
                running.origin = None
                del self._forks[running.session]
                self.stand_in_line(running)
                self._events.append(Admitted(running.session, position))

    def _forget(self, candidate: Candidate) -> None:
        """Remember a session that found no room, so that it keeps its place when it asks again."""
        self._archive.keep(
            candidate.request, candidate.seniority, has_yielded=candidate.has_yielded
        )

    def _add(self, running: Running) -> None:
        self.running[running.session] = running
        self._first_deadline = min(self._first_deadline, running.request.deadline)

    def _remove(self, running: Running, *, yielded: bool) -> None:
        del self.running[running.session]
        self._forks.pop(running.session, None)
        if running.request.deadline == self._first_deadline < float("inf"):
            deadlines = (r.request.deadline for r in self.running.values())
            self._first_deadline = min(deadlines, default=float("inf"))
        has_yielded = running.has_yielded or yielded
        self._archive.keep(running.request, running.seniority, has_yielded=has_yielded)
        self.waiting_tokens -= sum(row.tokens for row in running.rows)
        if running.origin is None:
            self.pool.close(running.session)
        for line in (self.short_line, self.prompt_line):
            line.forget(running.peer, running.session)
