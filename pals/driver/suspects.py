"""Whom a driver uses last, and for how long: nobody is ever shut out for good.

Pure: the time is an argument, in seconds of a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pals.net.announce import Announcement
from pals.types import PeerId

FAILED_FOR_S = 15.0
MAX_FAILED_FOR_S = 300.0


@dataclass(frozen=True, slots=True)
class _Failure:
    """What is held against one peer.

    Attributes:
        count: Failures since it last gave an answer.
        until: When it may be trusted again, by a newer announcement.
        seq: Of the announcement that it failed under.
    """

    count: int
    until: float
    seq: int


@dataclass(slots=True)
class Suspects:
    """Peers that failed, and peers that said that they leave."""

    _failures: dict[PeerId, _Failure] = field(default_factory=dict[PeerId, _Failure])
    _leaving: dict[PeerId, int] = field(default_factory=dict[PeerId, int])

    def mark_failed(self, peer: PeerId, *, seq: int, now: float) -> None:
        """Use ``peer`` last for a while, longer each time.

        A dead peer's announcement outlives it, so the time alone clears nobody: it also
        takes a newer announcement, or an answer.

        Args:
            peer: Who failed.
            seq: Number of its newest announcement; 0 when none is known.
            now: The time.
        """
        known = self._failures.get(peer)
        count = 1 if known is None else known.count + 1
        pause_s = min(FAILED_FOR_S * 2.0 ** min(count - 1, 16), MAX_FAILED_FOR_S)
        self._failures[peer] = _Failure(count, now + pause_s, seq)

    def mark_leaving(self, peer: PeerId, *, seq: int) -> None:
        """Do not use ``peer`` under the announcement ``seq``: it refuses new sessions."""
        self._leaving[peer] = seq

    def mark_good(self, peers: Iterable[PeerId]) -> None:
        """Forget the failures of peers that gave an answer."""
        for peer in peers:
            self._failures.pop(peer, None)

    def failures(self, announcement: Announcement, now: float) -> int:
        """Return how often its peer failed lately; 0 for one that is trusted."""
        failure = self._failures.get(announcement.peer)
        if failure is None or (announcement.seq > failure.seq and now >= failure.until):
            return 0
        return failure.count

    def is_leaving(self, announcement: Announcement) -> bool:
        """Return whether its peer said, at or after this announcement, that it leaves."""
        seq = self._leaving.get(announcement.peer)
        return seq is not None and announcement.seq <= seq
