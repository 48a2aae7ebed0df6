"""The allow-list: the last verified roster and how old the word is that it is the newest.

A list that cannot be renewed never widens access: it goes from fresh over stale to
expired, and then allows nobody until an authority says anew that it is the newest. What
denies is taken from wherever it comes: a signed removal holds before the chain has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from pals.errors import RosterRefused
from pals.swarm.records import Remove
from pals.swarm.roster import Roster, denies
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
        self._verified_at = -math.inf
        self._denied: dict[PeerId, Remove] = {}

    @property
    def roster(self) -> Roster | None:
        """The newest verified roster, however old."""
        return self._roster

    @property
    def max_stale_s(self) -> float:
        return self._max_stale_s

    @property
    def denied(self) -> Mapping[PeerId, Remove]:
        """The members whom a removal ends that the chain does not hold yet."""
        return MappingProxyType(self._denied)

    @property
    def listed(self) -> frozenset[PeerId]:
        """Return the members of the roster, however old it is, but for the denied."""
        return frozenset() if self._roster is None else self._roster.members - self._denied.keys()

    def update(self, roster: Roster, now: float, *, age_s: float | None) -> None:
        """Take a verified roster.

        Args:
            roster: The one held or a continuation of it.
            now: Monotonic seconds.
            age_s: How old the word is that it is the newest; None when there is none, which
                renews nothing. The youngest word counts.

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
        self._denied = {p: r for p, r in self._denied.items() if _is_about(roster, p, r)}
        if age_s is not None:
            self._verified_at = max(self._verified_at, now - age_s)

    def deny(self, removal: Remove) -> PeerId | None:
        """Follow a removal that the chain does not hold yet.

        Returns:
            Whom it removes, or None when it ends no membership that lasts.

        Raises:
            InvalidRecord: It is for another swarm, or signed by no administrator.
        """
        if self._roster is None:
            return None
        peer = denies(self._roster, removal)
        if peer is None or peer in self._denied:
            return None
        self._denied[peer] = removal
        return peer

    def age_s(self, now: float) -> float:
        """Return how old the word is that the list is the newest; infinite without one."""
        return now - self._verified_at

    def state(self, now: float) -> AllowState:
        if self._roster is None:
            return "none"
        age_s = self.age_s(now)
        if age_s <= FRESH_S:
            return "fresh"
        return "stale" if age_s <= self._max_stale_s else "expired"

    def expired_s(self, now: float) -> float:
        """Return for how long the list has been expired: 0 while it is not."""
        if self._roster is None:
            return 0.0
        return max(0.0, self.age_s(now) - self._max_stale_s)

    def allows(self, peer: PeerId, now: float) -> bool:
        """Return whether ``peer`` is a member on a list that is not too old."""
        roster = self._roster
        if roster is None or self.state(now) == "expired":
            return False
        return peer in roster.live and peer not in self._denied

    def members(self, now: float) -> frozenset[PeerId]:
        """Return who is allowed now: nobody when there is no list or an expired one."""
        return frozenset() if self.state(now) == "expired" else self.listed


def _is_about(roster: Roster, peer: PeerId, removal: Remove) -> bool:
    member = roster.live.get(peer)
    return member is not None and member.joined == removal.joined
