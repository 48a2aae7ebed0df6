"""How long a step waits for rows that are about to come.

A step takes nearly as long for a few rows as for one, since it reads the weights once. Rows
that come right after a step began run in one of their own, and so does every row after them:
two halves of a batch then take turns for good, and all decode at half the rate.

Pure: times are arguments, seconds on a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

MOST_OF_A_STEP = 0.125
"""A step waits so much of its own time at most: where shards have a machine each, more idles
them by turns (simulated with 2, 3 and 5 of them)."""

LATE = 0.25
"""Of that, how much later than expected a row may come and still be waited for."""

SMOOTHING = 0.25


@dataclass(slots=True)
class Return:
    """When a session's next row comes: after the rest of the ring, as it did before.

    Attributes:
        left_at: When its last row had run; None while the next one is here.
        away_s: How long its rows were away, smoothed; None before any came back.
    """

    left_at: float | None = None
    away_s: float | None = None

    def leave(self, now: float) -> None:
        """Note that its row has run."""
        self.left_at = now

    def come(self, now: float) -> None:
        """Note that its next row is here."""
        if self.left_at is None:
            return
        away_s, self.left_at = now - self.left_at, None
        before_s = away_s if self.away_s is None else self.away_s
        self.away_s = before_s + SMOOTHING * (away_s - before_s)

    @property
    def way(self) -> tuple[float, float] | None:
        """When its last row left, and how long it is expected to be away; None if not known."""
        if self.left_at is None or self.away_s is None:
            return None
        return self.left_at, self.away_s

    def within(self, seconds: float, now: float) -> float | None:
        """Return in how many seconds it comes; None if that is not about now."""
        if self.way is None:
            return None
        delay_s = sum(self.way) - now
        return max(0.0, delay_s) if -seconds * LATE < delay_s < seconds else None


class Gap(NamedTuple):
    """No row is here, and some are expected.

    Attributes:
        since_s: Ago the last of them left.
        left_s: Until the first of them is expected; 0 or less where it is late.
        until: When it has been away twice as long as before, and may not come.
    """

    since_s: float
    left_s: float
    until: float

    @property
    def whole_s(self) -> float:
        """From when the last row left until the first is expected."""
        return self.since_s + self.left_s


def find_gap(returns: Iterable[Return], now: float) -> Gap | None:
    """Return the gap between rows; None if no row is expected.

    Args:
        returns: Of those who decode.
        now: The time.
    """
    ways = [way for each in returns if (way := each.way) is not None and now < way[0] + 2 * way[1]]
    if not ways:
        return None
    left_at, away_s = min(ways, key=sum)
    since_s = now - max(left_at for left_at, _ in ways)
    return Gap(since_s, left_at + away_s - now, left_at + 2 * away_s)


def gap_after_step(here: Iterable[Return], away: Iterable[Return], ends_at: float) -> float:
    """Return how long a gap there is after a step with all rows that are here; 0 if none is known.

    Args:
        here: Of the rows that run in the step.
        away: Of the others.
        ends_at: When the step does.
    """
    coming = [0.0 if each.away_s is None else each.away_s for each in here]
    if (others := find_gap(away, ends_at)) is not None:
        coming.append(others.left_s)
    return max(0.0, min(coming, default=0.0))


class Gathering:
    """Waits for rows as long as that saves more time of steps than it idles.

    Args:
        seconds_of: How long a step of so many rows takes; 0 for more than there may be.
    """

    def __init__(self, seconds_of: Callable[[int], float]) -> None:
        self._seconds_of = seconds_of
        self._since: float | None = None

    def wait_until(self, rows: int, returns: Iterable[Return], now: float) -> float | None:
        """Return until when a step of ``rows`` rows waits; None if it runs now.

        Args:
            rows: Here.
            returns: Of the sessions whose rows are away.
            now: The time.
        """
        most_s = self._seconds_of(rows) * MOST_OF_A_STEP
        since = now if self._since is None else self._since
        delays = [d for each in returns if (d := each.within(most_s, now)) is not None]
        delay_s = self._best_delay(rows, sorted(delays)) if now < since + most_s else None
        if delay_s is None:
            self._since = None
            return None
        self._since = since
        return min(now + delay_s + most_s * LATE, since + most_s)

    def _best_delay(self, rows: int, delays: list[float]) -> float | None:
        """Return how long to wait so that most is saved, if anything is."""
        best_s, best = 0.0, None
        for more, delay_s in enumerate(delays, start=1):
            together_s = self._seconds_of(rows + more)
            if not together_s:
                break
            apart_s = self._seconds_of(rows) + self._seconds_of(more)
            saved_s = apart_s - together_s - delay_s
            if saved_s > best_s:
                best_s, best = saved_s, delay_s
        return best
