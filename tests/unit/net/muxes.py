"""Two muxers and the wire between them, without sockets and with a clock of the test."""

from __future__ import annotations

from pals.net.mux import (
    ConnectionEnded,
    Event,
    Multiplexer,
    MuxLimits,
    StreamOpened,
)
from pals.net.mux_frames import HEADER, HEADER_BYTES
from pals.net.mux_stream import ReceiveBudget, StreamState

LIMIT = 16 << 20
BATCH = 1 << 17


def make_mux(
    *, is_initiator: bool = False, limit: int = LIMIT, now: float = 0.0, **limits: float
) -> Multiplexer:
    return Multiplexer(
        is_initiator=is_initiator,
        limits=MuxLimits(**limits),
        budget=ReceiveBudget(limit),
        now=now,
    )


def output(mux: Multiplexer, now: float = 0.0) -> bytes:
    """Return all that a muxer has to send."""
    parts = []
    while batch := mux.next_batch(BATCH, now):
        parts += batch
    return b"".join(parts)


def frame(kind: int, flags: int, stream_id: int, length: int, body: bytes = b"") -> bytes:
    return HEADER.pack(0, kind, flags, stream_id, length) + body


def headers(data: bytes) -> list[tuple[int, int, int, int]]:
    """Return type, flags, stream id and length of each whole frame."""
    found = []
    while data:
        _, kind, flags, stream_id, length = HEADER.unpack_from(data)
        found.append((kind, flags, stream_id, length))
        data = data[HEADER_BYTES + (length if kind == 0 else 0) :]
    return found


def opened(events: list[Event]) -> list[StreamState]:
    return [event.stream for event in events if isinstance(event, StreamOpened)]


def problem(events: list[Event]) -> str:
    """Return why the connection ended, or an empty string if no event says so."""
    return "".join(event.problem for event in events if isinstance(event, ConnectionEnded))


class Wire:
    """A dialling and a listening muxer whose bytes arrive when the test carries them."""

    def __init__(self, **limits: float) -> None:
        self.dialler = make_mux(is_initiator=True, **limits)
        self.listener = make_mux(**limits)

    def carry(self, now: float = 0.0) -> None:
        """Carry bytes both ways until nobody has any."""
        while True:
            sent = output(self.dialler, now)
            answered = output(self.listener, now)
            if not sent and not answered:
                return
            self.listener.receive(sent, now)
            self.dialler.receive(answered, now)

    def open(self) -> tuple[StreamState, StreamState]:
        """Open a stream and return what each side has of it."""
        ours = self.dialler.open(0.0)
        self.carry()
        (theirs,) = opened(self.listener.take_events())
        self.listener.accept(theirs)
        self.carry()
        self.dialler.take_events()
        return ours, theirs
