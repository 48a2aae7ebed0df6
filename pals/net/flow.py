"""How far a session may run ahead of whoever takes what a shard makes of it.

Each shard tells the one before it which tokens of a prompt it has computed, and the driver
tells the tail which sampled tokens it has taken (`pals.net.control.Ack`). Nobody is ever
more than a window ahead, so a slow or stopped receiver stops its own sessions: they wait
where they are, and cost their neighbours neither memory nor time. Both ends derive the same
window from the shape of the frames between them.

Pure: no clock, no sockets; positions are absolute, as in rows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pals.net.wire import MAX_ROW_TOKENS, FrameShape, Kind

PREFILL_WINDOW_BYTES = 8 << 20
SAMPLED_WINDOW_TOKENS = 64
ACKS_PER_WINDOW = 4

Chunk = TypeVar("Chunk")


def window_tokens(shape: FrameShape) -> int:
    """Return how many tokens of one session may be on their way in frames of ``shape``.

    Token ids into the head are never held back: a whole prompt of them fits the window.
    """
    if shape.kind in (Kind.SAMPLED, Kind.SCORED, Kind.POOLED):
        return SAMPLED_WINDOW_TOKENS
    return max(2 * MAX_ROW_TOKENS, PREFILL_WINDOW_BYTES // shape.token_bytes)


def window_bytes(shape: FrameShape) -> int:
    """Return the payload bytes of a full window."""
    return window_tokens(shape) * shape.token_bytes


@dataclass(slots=True)
class AckPolicy:
    """The receiver's side of a window: when it says what it has taken.

    Attributes:
        window: Tokens of the window.
        taken: Position before which everything was taken.
        told: The last position that the sender was told.
    """

    window: int
    taken: int = 0
    told: int = 0

    def take(self, position: int, end: int | None = None) -> int | None:
        """Note that all before ``position`` is taken; return what to tell the sender.

        Args:
            position: Where the next token stands.
            end: Where the last token stands that will come, where that is known: what is
                left is then often inside the window already, and nothing needs telling.
        """
        self.taken = position
        is_over = end is not None and end - self.told <= self.window
        if is_over or position - self.told < max(1, self.window // ACKS_PER_WINDOW):
            return None
        self.told = position
        return position


@dataclass(slots=True)
class SessionFlow(Generic[Chunk]):
    """Both windows of one session at one shard.

    Attributes:
        inbound: Of the prompt that comes in.
        window: Tokens that may leave before the receiver says that it has taken them.
        acknowledged: Position before which the receiver has taken everything.
        passes_prompt: What a prompt makes leaves for the receiver, and needs room there; at
            the tail nothing of it does.
        held: Tokens of the prompt that were there when the session was admitted; None while
            it waits for that, and nothing of it runs.
        is_linked: Whether the receiver can be reached yet; nothing has room before.
        has_begun: Whether its first row has said where it starts.
        waiting: Parts of the prompt that may not run yet, each with the position at which it
            ends.
        held_token: At the tail, the position and id of a sampled token that has not gone
            back to the head, because its driver takes none.
    """

    inbound: AckPolicy
    window: int
    acknowledged: int
    passes_prompt: bool
    held: int | None = None
    is_linked: bool = False
    has_begun: bool = False
    waiting: deque[tuple[int, Chunk]] = field(default_factory=deque[tuple[int, Chunk]])
    held_token: tuple[int, int] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the session is admitted, and its receiver can be reached."""
        return self.is_linked and self.held is not None

    def begin(self, position: int) -> None:
        """Take that the first row stands at ``position``: what is before it is there already."""
        self.has_begun = True
        self.inbound.taken = self.inbound.told = position
        self.acknowledged = max(self.acknowledged, position)

    def fits_inbound(self, end: int) -> bool:
        """Return whether the sender may be at ``end`` already."""
        return end - self.inbound.taken <= self.inbound.window

    def has_room(self, end: int) -> bool:
        """Return whether tokens up to ``end`` may leave."""
        return self.is_linked and end - self.acknowledged <= self.window

    def acknowledge(self, position: int) -> None:
        """Note what the receiver has taken; late and repeated news changes nothing."""
        self.acknowledged = max(self.acknowledged, position)

    def release(self) -> list[Chunk]:
        """Return the waiting parts of the prompt that may run now."""
        released: list[Chunk] = []
        while self.waiting and self._may_run(self.waiting[0][0]):
            released.append(self.waiting.popleft()[1])
        return released

    def _may_run(self, end: int) -> bool:
        return self.held is not None and (not self.passes_prompt or self.has_room(end))

    def release_token(self) -> tuple[int, int] | None:
        """Return the held token when it has room now."""
        if self.held_token is None or not self.has_room(self.held_token[0]):
            return None
        token, self.held_token = self.held_token, None
        return token
