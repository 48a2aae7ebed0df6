"""The sessions that a shard runs: their place in line, and who gives way to whom.

Pure: no clock, no arrays.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from pals.engine.batch import RowKind, SessionRequest
from pals.engine.fairness import FairOrder
from pals.engine.gathering import Return
from pals.engine.pages import PagePool
from pals.types import PeerId, SessionId

MAX_FORMER = 1024

Seniority = tuple[float, int]
"""When a session was first asked for, and a number that tells two of one moment apart."""


@dataclass(slots=True, kw_only=True)
class WaitingRow:
    """Tokens of one session that wait for a step; a prompt's leave it from the front."""

    kind: RowKind
    position: int
    tokens: int

    @property
    def end(self) -> int:
        return self.position + self.tokens


@dataclass(slots=True, kw_only=True, eq=False)
class Running:
    """One session that holds pages; equal only to itself, since its id may come again.

    Attributes:
        request: What the driver asked for.
        session: Its id.
        peer: The driver.
        seniority: Its place in line; a session that is replayed keeps it.
        has_yielded: It was preempted before, and gives way to no peer's share again.
        end: Where its next row stands unless it steps back.
        last_row: When its last row came.
        decodes: Its prompt is over.
        is_started: Its first row, which may begin below what was held, has come to a step.
        origin: The session and position that it is a fork of, until it has those pages.
        returns: When its next token comes.
        line: Where it stands for its next row.
    """

    request: SessionRequest
    session: SessionId = field(init=False)
    peer: PeerId = field(init=False)
    seniority: Seniority
    has_yielded: bool
    end: int
    last_row: float
    rows: deque[WaitingRow] = field(default_factory=deque[WaitingRow])
    decodes: bool = False
    is_started: bool = False
    origin: tuple[SessionId, int] | None = None
    returns: Return = field(default_factory=Return)
    line: FairOrder[SessionId] | None = None

    def __post_init__(self) -> None:
        self.session, self.peer = self.request.session, self.request.peer

    @property
    def next_row(self) -> WaitingRow | None:
        """What runs next, as far as it may."""
        return self.rows[0] if self.rows and self.origin is None else None

    def add_row(self, kind: RowKind, position: int, tokens: int, now: float) -> None:
        """Queue a row behind the others; a prompt's parts that follow one another are one."""
        last = self.rows[-1] if self.rows else None
        if last is not None and last.kind == kind == "prefill" and last.end == position:
            last.tokens += tokens
        else:
            self.rows.append(WaitingRow(kind=kind, position=position, tokens=tokens))
        self.end = position + tokens
        self.last_row = now
        if kind != "prefill":
            self.decodes = True
            self.returns.come(now)

    def take_tokens(self, tokens: int) -> None:
        """Note that the first ``tokens`` of the next row have come to a step."""
        row = self.rows[0]
        row.position += tokens
        row.tokens -= tokens
        self.is_started = True
        if row.tokens == 0:
            self.rows.popleft()


@dataclass(frozen=True, slots=True)
class Former:
    """What is remembered of a session that is over."""

    seniority: Seniority
    has_yielded: bool
    prompt_tokens: int
    max_tokens: int

    def goes_on_in(self, request: SessionRequest) -> bool:
        """Return whether ``request`` can be the same answer, played again."""
        grown = request.prompt_tokens >= self.prompt_tokens
        return grown and request.max_tokens == self.max_tokens


class Archive:
    """The sessions that ended last, by their peers, so that a replay keeps its place."""

    def __init__(self) -> None:
        self._former: OrderedDict[tuple[PeerId, SessionId], Former] = OrderedDict()

    def keep(self, request: SessionRequest, seniority: Seniority, *, has_yielded: bool) -> None:
        """Remember a session that ends, or that found no room."""
        self._former[request.peer, request.session] = Former(
            seniority, has_yielded, request.prompt_tokens, request.max_tokens
        )
        if len(self._former) > MAX_FORMER:
            self._former.popitem(last=False)

    def take(self, request: SessionRequest) -> Former | None:
        """Return what the session that ``request`` replaces was; once, and to its peer only."""
        if request.replaces is None:
            return None
        former = self._former.pop((request.peer, request.replaces), None)
        return former if former is not None and former.goes_on_in(request) else None


@dataclass(frozen=True, slots=True)
class Need:
    """Somebody who lacks pages.

    Attributes:
        seniority: Of the session; None for one that is only about to begin.
        active_since: Sessions without rows since then pause, and hold nobody up.
    """

    peer: PeerId
    pages: int
    seniority: Seniority | None
    active_since: float


@dataclass(frozen=True, slots=True)
class Shares:
    """Who has to give pages back for whom.

    Every peer keeps a guaranteed part of the pool while others want more; beyond it the
    older session stays. Two rules keep everybody going: the oldest session of those that do
    not pause may take from every younger one, so that it ends; and a session gives way to
    another peer's guarantee only once, so that it does not begin again and again.
    """

    pool: PagePool
    kv_share: float

    @property
    def guaranteed(self) -> int:
        """Pages that a peer keeps."""
        return int(self.pool.num_pages * self.kv_share)

    def is_over(self, peer: PeerId) -> bool:
        """Return whether a peer has more than it is guaranteed."""
        return self.pool.used_by(peer) > self.guaranteed

    def is_within(self, peer: PeerId, more: int) -> bool:
        """Return whether a peer has no more than that with some pages more."""
        return self.pool.used_by(peer) + more <= self.guaranteed

    def victims(self, need: Need, running: Collection[Running]) -> list[Running]:
        """Return who may be preempted for a need, whoever should go first in front.

        They are of the peers that use most, and of each the youngest first.
        """
        holding = (r for r in running if r.origin is None and self.pool.length(r.session))
        active = (r for r in running if r.next_row or r.last_row > need.active_since)
        oldest = min((r.seniority for r in active), default=None)
        is_oldest = need.seniority is not None and need.seniority == oldest
        found = [r for r in holding if self._yields(r, need, is_oldest=is_oldest)]
        found.sort(key=lambda r: (self.pool.used_by(r.peer), r.seniority), reverse=True)
        return found

    def _yields(self, running: Running, need: Need, *, is_oldest: bool) -> bool:
        is_younger = need.seniority is not None and running.seniority > need.seniority
        if running.peer == need.peer or is_oldest:
            return is_younger
        if not self.is_over(running.peer):
            return False
        return is_younger or (not running.has_yielded and self.is_within(need.peer, need.pages))


def promised_pages(pool: PagePool, running: Iterable[Running]) -> int:
    """Return the pages that the prompts of admitted sessions will still take."""
    pages_of = pool.format.pages_of
    return sum(
        max(0, pages_of(r.request.prompt_tokens) - pages_of(pool.length(r.session)))
        for r in running
        if r.origin is None
    )
