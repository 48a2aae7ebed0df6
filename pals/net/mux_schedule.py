"""Which stream sends next: each in turn, and one that had nothing to send before the rest.

A stream that starts to send goes first for one frame, then takes its turn. So a short
message waits for no more than the frame that is being sent, however much other streams
have to send; and a stream that stops and starts again before its turn came gains nothing.

Source: RFC 8290 (FQ-CoDel), section 4.2, with frames for packets.
"""

from __future__ import annotations

from collections import deque

from pals.net.mux_stream import StreamState

FIRST = "first"
"""It may send one frame before all that wait for their turn."""
WAITING = "waiting"
"""It takes its turn."""


class Schedule:
    """The streams that have something to send."""

    def __init__(self) -> None:
        self._first: deque[StreamState] = deque()
        self._waiting: deque[StreamState] = deque()

    def add(self, stream: StreamState) -> None:
        """Let ``stream`` send; nothing happens if it is in the schedule already."""
        if not stream.turn:
            stream.turn = FIRST
            self._first.append(stream)

    def next(self) -> StreamState | None:
        """Return the stream that sends the next frame, or ``None`` if there is none.

        It has been moved behind the others, where it stays although its outbox may be empty
        by then.
        """
        while self._first or self._waiting:
            stream = (self._first or self._waiting).popleft()
            if stream.turn == WAITING and not (stream.outbox and stream.allowance):
                stream.turn = ""
                continue
            stream.turn = WAITING
            self._waiting.append(stream)
            if stream.outbox and stream.allowance:
                return stream
        return None
