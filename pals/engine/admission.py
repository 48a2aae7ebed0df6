"""The line of sessions that wait for room, before any of their tokens are computed.

Pure: no clock; `now` is seconds on a monotonic clock of the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

from pals.engine.batch import BatchRules, Refused, SessionRequest
from pals.engine.fairness import FairOrder
from pals.engine.running import Seniority
from pals.errors import AdmissionTimeout, DeadlineExceeded
from pals.types import PeerId, SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A session that waits for room.

    Attributes:
        request: What its driver asks for.
        keys: Of the pages of its prompt.
        seniority: Its place in line.
        has_yielded: It was preempted before.
        since: When it came.
    """

    request: SessionRequest
    keys: tuple[bytes, ...]
    seniority: Seniority
    has_yielded: bool
    since: float


class AdmissionLine:
    """Who is admitted next: peers in turn by the pages they were given, of each the oldest.

    The first in line is passed by nobody while it waits for its room, however much that is.
    """

    def __init__(self, rules: BatchRules) -> None:
        self._rules = rules
        self._waiting: dict[SessionId, Candidate] = {}
        self._order: FairOrder[SessionId] = FairOrder()
        self._first: SessionId | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, session: SessionId) -> bool:
        return session in self._waiting

    def count(self, peer: PeerId) -> int:
        """Return how many sessions of a peer wait."""
        return sum(c.request.peer == peer for c in self._waiting.values())

    def add(self, candidate: Candidate) -> None:
        """Put a session in line."""
        request = candidate.request
        self._waiting[request.session] = candidate
        self._order.begin(request.peer, request.session)

    def first(self) -> Candidate | None:
        """Return who is next; the same one until it is taken or removed."""
        if self._first is None and self._waiting:
            by_age = sorted(self._waiting.values(), key=lambda c: c.seniority)
            line = [(c.request.peer, c.request.session) for c in by_age]
            self._first = next(self._order.order(line))
        return None if self._first is None else self._waiting[self._first]

    def take(self, candidate: Candidate, pages: int) -> None:
        """Let a session out of the line, which was given some pages."""
        request = candidate.request
        self._order.charge(request.peer, request.session, pages)
        self.remove(request.session)

    def remove(self, session: SessionId) -> Candidate:
        """Let a session out of the line, and return what it was."""
        candidate = self._waiting.pop(session)
        self._order.forget(candidate.request.peer, session)
        if self._first == session:
            self._first = None
        return candidate

    def expire(self, now: float) -> list[tuple[Candidate, Refused]]:
        """Let out those that have waited too long, and return their refusals."""
        over = [c for c in self._waiting.values() if now >= self._until(c)]
        for candidate in over:
            self.remove(candidate.request.session)
        return [(candidate, self._refuse(candidate, now)) for candidate in over]

    def next_expiry(self) -> float:
        """Return when the next one has waited too long."""
        return min(map(self._until, self._waiting.values()), default=float("inf"))

    def _until(self, candidate: Candidate) -> float:
        return min(candidate.request.deadline, candidate.since + self._rules.admission_wait_s)

    def _refuse(self, candidate: Candidate, now: float) -> Refused:
        request = candidate.request
        if now >= request.deadline:
            return Refused(request.session, DeadlineExceeded(tokens=0))
        waited_s = now - candidate.since
        error = AdmissionTimeout(tokens=request.prompt_tokens, waited_s=waited_s)
        return Refused(request.session, error)
