"""What the muxer knows of one stream: bytes on their way in and out, and both windows."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pals.net.mux_frames import INITIAL_WINDOW_BYTES

JOIN_BYTES = 32 << 10
"""A read joins chunks below this size, and returns a larger one without a copy."""


class ReceiveBudget:
    """How many bytes one peer may have sent us unread, over all its connections.

    Every window that is granted counts whole, so a peer that keeps to its windows cannot
    make us hold more than the limit.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._granted = 0

    def take(self, wanted: int) -> int:
        """Return how much of ``wanted`` bytes may be granted, and count it."""
        taken = max(0, min(wanted, self._limit - self._granted))
        self._granted += taken
        return taken

    def take_all(self, wanted: int) -> bool:
        """Count ``wanted`` bytes, or none of them if they do not all fit."""
        fits = self._granted + wanted <= self._limit
        self._granted += wanted if fits else 0
        return fits

    def overdraw(self, wanted: int) -> None:
        """Count bytes that nobody asked about: windows of streams that we open ourselves."""
        self._granted += wanted

    def give_back(self, taken: int) -> None:
        self._granted -= taken


@dataclass(slots=True, eq=False)
class Message:
    """Bytes that one write queued; they leave in one or more frames, in order.

    Attributes:
        data: The bytes.
        sent: How many of them have left.
        is_awaited: Whether somebody wants to be told when all have.
    """

    data: memoryview
    sent: int = 0
    is_awaited: bool = False

    @property
    def is_sent(self) -> bool:
        return self.sent == len(self.data)


@dataclass(slots=True, eq=False)
class StreamState:
    """One stream.

    Attributes:
        stream_id: Odd if the dialling side opened it.
        is_outbound: Whether this side opened it.
        credit: Bytes that the peer may send now.
        window: Bytes that the peer may have sent us unread; all of it is in the budget.
        unread: Received chunks; of the first, ``offset`` bytes are read already.
        allowance: Bytes that we may send now.
        outbox: Messages that are not yet sent whole.
        turn: Which queue of the schedule it stands in, if any.
        stalled_at: When it had bytes to send and no allowance; ``None`` if it has not.
        closed_at: When this side sent its FIN.
        heard_at: When the last frame for it came.
        problem: Why it ended before both sides had closed it; empty if it did not.
        is_forgotten: Whether it has ended, for this reason or because both closed it.
    """

    stream_id: int
    is_outbound: bool
    heard_at: float
    credit: int = INITIAL_WINDOW_BYTES
    window: int = INITIAL_WINDOW_BYTES
    unread: deque[bytes] = field(default_factory=deque[bytes])
    unread_bytes: int = 0
    offset: int = 0
    allowance: int = INITIAL_WINDOW_BYTES
    outbox: deque[Message] = field(default_factory=deque[Message])
    turn: str = ""
    stalled_at: float | None = None
    is_closing: bool = False
    closed_at: float | None = None
    peer_closed: bool = False
    problem: str = ""
    is_forgotten: bool = False

    @property
    def owed(self) -> int:
        """Bytes of the window that the peer does not know of yet."""
        return self.window - self.credit - self.unread_bytes

    def take(self, limit: int) -> bytes:
        """Remove and return 1 to ``limit`` received bytes; there must be some."""
        first, offset = self.unread[0], self.offset
        if len(first) - offset > limit:
            self.offset += limit
            self.unread_bytes -= limit
            return first[offset : offset + limit]
        self.unread.popleft()
        self.offset = 0
        taken = first[offset:] if offset else first
        self.unread_bytes -= len(taken)
        if self.unread and len(taken) < JOIN_BYTES and len(taken) < limit:
            return self._join(taken, limit)
        return taken

    def _join(self, first: bytes, limit: int) -> bytes:
        """Return ``first`` and what follows it, up to ``limit`` bytes."""
        parts, size = [first], len(first)
        while self.unread and size < limit:
            head = self.unread[0]
            if len(head) > limit - size:
                self.offset = limit - size
                head = head[: self.offset]
            else:
                self.unread.popleft()
            parts.append(head)
            size += len(head)
        self.unread_bytes -= size - len(first)
        return b"".join(parts)

    def forget_received(self) -> None:
        self.unread.clear()
        self.unread_bytes = self.offset = 0

    def forget_queued(self) -> None:
        self.outbox.clear()
        self.stalled_at = None
