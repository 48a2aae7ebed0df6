"""Whose turn it is: an order between peers, and between the sessions of each.

Fair queueing (Demers, Keshav, Shenker 1989, https://doi.org/10.1145/75247.75248) on two
levels. Each peer and each session has a clock that runs by what it is given; whoever is
furthest behind comes first. A further clock runs by what all are given, shared equally among
those that wait. Newcomers, and who was away, begin there and have saved up nothing; so
however many come, whoever waits is passed only until that clock has reached its own.

Pure: no clock of the world, only these.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pals.types import PeerId

Member = TypeVar("Member", bound=Hashable)


@dataclass(slots=True)
class _Clocks(Generic[Member]):
    """The clocks of one level.

    Attributes:
        waiting: Of those that stand in line.
        rested: Of those that do not, where they are ahead of the rest.
        floor: Where newcomers begin: what each in line would have been given by now if all
            were given the same. It never falls behind the first in line.
    """

    waiting: dict[Member, float] = field(default_factory=dict[Member, float])
    rested: dict[Member, float] = field(default_factory=dict[Member, float])
    floor: float = 0.0

    def begin(self, member: Member) -> None:
        if member not in self.waiting:
            self.waiting[member] = max(self.rested.pop(member, self.floor), self.floor)

    def rest(self, member: Member) -> None:
        clock = self.waiting.pop(member, self.floor)
        if clock > self.floor:
            self.rested[member] = clock

    def charge(self, member: Member, cost: float) -> None:
        self.floor += cost / len(self.waiting)
        self.waiting[member] += cost

    def forget(self, member: Member) -> None:
        self.waiting.pop(member, None)
        self.rested.pop(member, None)

    def line(self, members: Iterable[Member] | None = None) -> list[Member]:
        """Return those that wait, or some of them, the first last."""
        self.raise_floor()
        line = sorted(self.waiting if members is None else members, key=self.waiting.__getitem__)
        line.reverse()
        return line

    def raise_floor(self) -> None:
        self.floor = max(self.floor, min(self.waiting.values(), default=self.floor))


class FairOrder(Generic[Member]):
    """The clocks of all peers, and of the sessions of each.

    Members are sessions, or whatever else stands in line for a peer. Call `begin` when one
    has something to wait for, `charge` for what it was given, `rest` when it waits for
    nothing more, and `forget` when it is over.
    """

    def __init__(self) -> None:
        self._peers: _Clocks[PeerId] = _Clocks()
        self._members: dict[PeerId, _Clocks[Member]] = {}

    def __len__(self) -> int:
        """Return how many stand in line."""
        return sum(len(clocks.waiting) for clocks in self._members.values())

    def begin(self, peer: PeerId, member: Member) -> None:
        """Let a member stand in line, if it does not yet."""
        self._peers.begin(peer)
        self._members.setdefault(peer, _Clocks()).begin(member)

    def charge(self, peer: PeerId, member: Member, cost: float) -> None:
        """Take what a member that stands in line was given, such as tokens."""
        self._peers.charge(peer, cost)
        self._members[peer].charge(member, cost)

    def rest(self, peer: PeerId, member: Member) -> None:
        """Let a member leave the line, and its peer with the last."""
        if (clocks := self._members.get(peer)) is not None:
            clocks.rest(member)
            if not clocks.waiting:
                self._peers.rest(peer)

    def forget(self, peer: PeerId, member: Member) -> None:
        """Drop a member that is over, if it ever stood in line, and its peer with the last."""
        self.rest(peer, member)
        if (clocks := self._members.get(peer)) is None:
            return
        clocks.forget(member)
        if not clocks.waiting and not clocks.rested:
            del self._members[peer]
            self._peers.forget(peer)

    def order(self, waiting: Iterable[tuple[PeerId, Member]] | None = None) -> Iterator[Member]:
        """Yield those that stand in line, as if each cost 1: furthest behind first.

        Args:
            waiting: Some of them with their peers, if not all. Among equals the order stays;
                of all, that in which they began to wait.
        """
        if not self._peers.waiting:
            return
        self._peers.raise_floor()
        lines = self._all_lines() if waiting is None else self._lines(waiting)
        heap = [(self._peers.waiting[peer], n, peer) for n, peer in enumerate(lines)]
        heapq.heapify(heap)
        while heap:
            clock, n, peer = heapq.heappop(heap)
            line = lines[peer]
            yield line.pop()
            if line:
                heapq.heappush(heap, (clock + 1, n, peer))

    def _lines(self, waiting: Iterable[tuple[PeerId, Member]]) -> dict[PeerId, list[Member]]:
        """Return the line of each peer, its first member last."""
        members: defaultdict[PeerId, list[Member]] = defaultdict(list)
        for peer, member in waiting:
            members[peer].append(member)
        return {peer: self._members[peer].line(line) for peer, line in members.items()}

    def _all_lines(self) -> dict[PeerId, list[Member]]:
        return {peer: self._members[peer].line() for peer in self._peers.waiting}
