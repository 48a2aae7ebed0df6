"""Prompt rows that came before the `Open` of their session, kept for a while.

A driver sends its prompt right behind the `Open` messages, and those travel other ways: a
shard may be given rows of a session that its driver has not told it of yet. They wait here,
within limits for each peer that sends them. Rows that were given up are remembered, so that
their session is refused when it comes after all, and does not wait for them for ever.

Pure: `now` is seconds on a monotonic clock, and what is kept is opaque.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pals.net.flow import PREFILL_WINDOW_BYTES
from pals.net.wire import MAX_ROWS
from pals.types import PeerId, SessionId

EARLY_S = 10.0
"""How long an `Open` may be behind: a link is dialled within this time, or not at all."""
EARLY_BYTES = PREFILL_WINDOW_BYTES
"""For each peer: what one session may have under way."""
EARLY_ROWS = 4 * MAX_ROWS
MAX_REMEMBERED = 1024

Kept = TypeVar("Kept")


@dataclass(slots=True)
class _Waiting(Generic[Kept]):
    """The rows of one session, since the first of them came."""

    since: float
    rows: list[Kept] = field(default_factory=list[Kept])
    size: int = 0


@dataclass(slots=True)
class _OfPeer(Generic[Kept]):
    """What one peer sent: sessions in the order in which their first rows came."""

    waiting: OrderedDict[SessionId, _Waiting[Kept]] = field(
        default_factory=OrderedDict[SessionId, _Waiting[Kept]]
    )
    lost: OrderedDict[SessionId, None] = field(default_factory=OrderedDict[SessionId, None])
    rows: int = 0
    size: int = 0

    def remove(self, session: SessionId) -> list[Kept]:
        waiting = self.waiting.pop(session, None)
        if waiting is None:
            return []
        self.rows -= len(waiting.rows)
        self.size -= waiting.size
        return waiting.rows

    def lose(self, session: SessionId) -> None:
        self.remove(session)
        _remember(self.lost, session)


class EarlyRows(Generic[Kept]):
    """The early rows of one shard."""

    def __init__(self) -> None:
        self._peers: dict[PeerId, _OfPeer[Kept]] = {}
        self._over: OrderedDict[SessionId, None] = OrderedDict()

    def __len__(self) -> int:
        """Return how many rows are kept."""
        return sum(of_peer.rows for of_peer in self._peers.values())

    def is_over(self, session: SessionId) -> bool:
        """Return whether a session has ended here lately, so that its rows are late."""
        return session in self._over

    def note_over(self, session: SessionId) -> None:
        """Note that a session has ended or was refused, and forget the rows it has here."""
        for of_peer in self._peers.values():
            of_peer.remove(session)
        _remember(self._over, session)

    def keep(self, peer: PeerId, session: SessionId, row: Kept, size: int, now: float) -> None:
        """Keep a row of a session that is not known, at the cost of older ones of its peer.

        Args:
            peer: Who sent it.
            session: Whose it is.
            row: Given back by `take`.
            size: Bytes that it holds.
            now: When it came.
        """
        of_peer = self._peers.setdefault(peer, _OfPeer())
        if session in of_peer.lost:
            return
        waiting = of_peer.waiting.setdefault(session, _Waiting(now))
        waiting.rows.append(row)
        waiting.size += size
        of_peer.rows += 1
        of_peer.size += size
        while of_peer.size > EARLY_BYTES or of_peer.rows > EARLY_ROWS:
            of_peer.lose(next(iter(of_peer.waiting)))

    def take(self, peer: PeerId, session: SessionId) -> list[Kept] | None:
        """Return and forget the rows that ``peer`` sent of a session that is known now.

        Returns:
            ``None`` when some of them were given up.
        """
        self._over.pop(session, None)
        of_peer = self._peers.get(peer)
        if of_peer is None:
            return []
        if session in of_peer.lost:
            del of_peer.lost[session]
            return None
        return of_peer.remove(session)

    def forget_peer(self, peer: PeerId) -> None:
        """Forget what ``peer`` sent: the link with it is gone, which fails its sessions."""
        self._peers.pop(peer, None)

    def expire(self, now: float) -> None:
        """Give up the rows that have waited for too long."""
        for of_peer in self._peers.values():
            for session, waiting in list(of_peer.waiting.items()):
                if now - waiting.since > EARLY_S:
                    of_peer.lose(session)


def _remember(sessions: OrderedDict[SessionId, None], session: SessionId) -> None:
    sessions[session] = None
    sessions.move_to_end(session)
    if len(sessions) > MAX_REMEMBERED:
        sessions.popitem(last=False)
