"""The allow-list: the last verified roster and how old its verification is.

A list that cannot be renewed never widens access: it goes from fresh over stale to
expired, and then allows nobody until the backend answers again.
"""

from __future__ import annotations

from typing import Literal

from pals.errors import RosterRefused
from pals.swarm.roster import Roster
from pals.types import PeerId

FRESH_S = 90.0
MAX_STALE_S = 24 * 3600.0

AllowState = Literal["none", "fresh", "stale", "expired"]


class AllowList:
    """Decides who may connect; ``now`` is monotonic seconds everywhere.

    Args:
        max_stale_s: Age at which a list that could not be renewed allows nobody.
    """

    def __init__(self, *, max_stale_s: float = MAX_STALE_S) -> None:
        self._max_stale_s = max_stale_s
        self._roster: Roster | None = None
        self._verified_at = 0.0

    @property
    def roster(self) -> Roster | None:
        """The newest verified roster, however old."""
        return self._roster

    def update(self, roster: Roster, now: float, *, age_s: float = 0.0) -> None:
        """Take a roster that was verified ``age_s`` seconds before ``now``.

        Raises:
            RosterRefused: It is older than the one held, or not a continuation of it. The
                list stays as it was.
        """
        held = self._roster
        if held is not None and not roster.extends(held):
            problem = "it is older than" if roster.seq < held.seq else "it departs from"
            raise RosterRefused(
                problem=f"{problem} the list verified before: entry {roster.seq} against {held.seq}"
            )
        self._roster = roster
        self._verified_at = now - age_s

    def state(self, now: float) -> AllowState:
        if self._roster is None:
            return "none"
        age_s = now - self._verified_at
        if age_s <= FRESH_S:
            return "fresh"
        return "stale" if age_s <= self._max_stale_s else "expired"

    def expired_s(self, now: float) -> float:
        """Return for how long the list has been expired: 0 while it is not."""
        if self._roster is None:
            return 0.0
        return max(0.0, now - self._verified_at - self._max_stale_s)

    def allows(self, peer: PeerId, now: float) -> bool:
        """Return whether ``peer`` is a member on a list that is not too old."""
        return peer in self.members(now)

    def members(self, now: float) -> frozenset[PeerId]:
        """Return who is allowed now: nobody when there is no list or an expired one."""
        if self._roster is None or self.state(now) == "expired":
            return frozenset()
        return self._roster.members
