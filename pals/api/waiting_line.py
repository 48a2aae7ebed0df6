"""Who may run and who waits: fair over clients, pure, and bounded.

The next place goes to the client that runs least; among equals to the one that was served
longest ago. Within one client it is first come, first served.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from pals.errors import RateLimitExceeded

MAX_RETRY_AFTER_S = 60
_WEIGHT_OF_NEWEST = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class LineLimits:
    """How many requests there may be.

    Attributes:
        running: At once.
        waiting: For one of these to end.
    """

    running: int = 64
    waiting: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What becomes of a new request.

    Attributes:
        runs: Whether it may run now; else it waits.
        displaced: The ticket that lost its place to it, which the caller must refuse.
    """

    runs: bool
    displaced: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    client: str
    since_s: float


class WaitingLine:
    """The requests of one endpoint. Tickets are any numbers that differ from each other.

    Args:
        limits: How many there may be.
    """

    def __init__(self, limits: LineLimits) -> None:
        self.limits = limits
        self._runs: dict[int, _Run] = {}
        self._waiting: dict[str, deque[int]] = {}
        self._running_of: Counter[str] = Counter()
        self._served: dict[str, int] = {}
        self._turn = 0
        self._mean_run_s = 1.0

    @property
    def running(self) -> int:
        return len(self._runs)

    @property
    def waiting(self) -> int:
        return sum(len(tickets) for tickets in self._waiting.values())

    @property
    def clients(self) -> int:
        """Of how many clients something is kept."""
        return len(self._served.keys() | self._running_of.keys() | self._waiting.keys())

    def arrive(self, ticket: int, client: str, now: float) -> Arrival:
        """Let a request run, or wait.

        When nobody more may wait, whoever waits most often gives up its newest place, if it
        has at least two more than the new request's client.

        Args:
            ticket: Names the request.
            client: Whose it is.
            now: Monotonic seconds.

        Raises:
            RateLimitExceeded: It can neither run nor wait.
        """
        if self.running < self.limits.running:
            self._run(ticket, client, now)
            return Arrival(runs=True)
        displaced = None
        if self.waiting >= self.limits.waiting:
            displaced = self._displace_for(client)
        self._waiting.setdefault(client, deque()).append(ticket)
        return Arrival(runs=False, displaced=displaced)

    def leave(self, ticket: int, now: float) -> int | None:
        """Forget a request that ended or waits no more; return the ticket that may run now.

        Args:
            ticket: What `arrive` was given; one that is not known changes nothing.
            now: Monotonic seconds.
        """
        run = self._runs.pop(ticket, None)
        if run is None:
            self._stop_waiting(ticket)
            return None
        weight = _WEIGHT_OF_NEWEST
        self._mean_run_s += weight * (now - run.since_s - self._mean_run_s)
        self._running_of[run.client] -= 1
        following = self._next(now)
        self._forget_absent(run.client)
        return following

    def refusal(self) -> RateLimitExceeded:
        """Return the error for a request without a place, with the time until there may be one."""
        runs_ahead = (self.waiting + 1) / self.limits.running
        wait_s = min(MAX_RETRY_AFTER_S, max(1, round(self._mean_run_s * runs_ahead)))
        return RateLimitExceeded(running=self.running, waiting=self.waiting, retry_after_s=wait_s)

    def _run(self, ticket: int, client: str, now: float) -> None:
        self._runs[ticket] = _Run(client=client, since_s=now)
        self._running_of[client] += 1
        self._turn += 1
        self._served[client] = self._turn

    def _next(self, now: float) -> int | None:
        if not self._waiting or self.running >= self.limits.running:
            return None
        client = min(
            self._waiting, key=lambda name: (self._running_of[name], self._served.get(name, 0))
        )
        ticket = self._waiting[client].popleft()
        if not self._waiting[client]:
            del self._waiting[client]
        self._run(ticket, client, now)
        return ticket

    def _displace_for(self, client: str) -> int:
        most = max(self._waiting, key=lambda name: len(self._waiting[name]), default=client)
        own = len(self._waiting.get(client, ()))
        if len(self._waiting.get(most, ())) < own + 2:
            raise self.refusal()
        return self._waiting[most].pop()

    def _stop_waiting(self, ticket: int) -> None:
        for client, tickets in self._waiting.items():
            if ticket in tickets:
                tickets.remove(ticket)
                if not tickets:
                    del self._waiting[client]
                self._forget_absent(client)
                return

    def _forget_absent(self, client: str) -> None:
        """Keep nothing of a client that has no request here: there may be very many."""
        if client not in self._waiting and self._running_of[client] == 0:
            del self._running_of[client]
            self._served.pop(client, None)
