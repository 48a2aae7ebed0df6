"""The muxer, sans-IO: many streams over one connection, fair and bounded.

Bytes of the connection go into `Multiplexer.receive` in any pieces; what is to be sent
comes out of `next_batch`, and what happened out of `take_events`. Times are seconds of
one monotonic clock; the caller runs `tick` at `next_deadline`.

What it keeps to, beyond yamux's own rules:

- A peer may send 256 KiB on a stream, and 4 MiB once it uses them, as far as its budget
  of unread bytes goes. More than its window costs the peer its connection.
- Whoever has least to send goes first (`pals.net.mux_schedule`).
- A stream that makes no progress is reset; a peer that is silent loses its connection.

Nothing that a peer sends makes a method raise: it ends the connection, which an event
says. Source: hashicorp/yamux, spec.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pals.net.mux_frames import (
    ACK,
    ALL_FLAGS,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    HEADER_BYTES,
    INITIAL_WINDOW_BYTES,
    MAX_WINDOW,
    NORMAL,
    PING,
    PROTOCOL_ERROR,
    RST,
    SYN,
    WINDOW_UPDATE,
    pack_header,
)
from pals.net.mux_schedule import Schedule
from pals.net.mux_stream import Message, ReceiveBudget, StreamState
from pals.types import Buffer

MAX_PAYLOAD_BYTES = 65519
"""Payload of one frame: what one Noise record holds, so that neither is ever split."""
JOIN_PAYLOAD_BYTES = 16 << 10
"""A larger payload is left apart from its header, which saves a copy at both ends."""
MAX_WAITING_CONTROL = 1024
"""Answers to a peer that wait to be sent; one that asks for more does not read them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxLimits:
    """What one connection spends on its peer.

    Attributes:
        max_inbound_streams: Streams that the peer holds open.
        window_bytes: The largest window of one stream.
        write_s: Seconds in which the peer must take some of what is written to a stream.
        idle_s: Seconds after which a connection without a stream is closed.
        half_closed_s: Seconds after which a stream that only this side closed is reset,
            if nothing came on it.
        ping_after_s: Seconds of silence after which the peer is asked whether it is there.
        pong_s: Seconds in which it must say anything then.
    """

    max_inbound_streams: int = 64
    window_bytes: int = 4 << 20
    write_s: float = 10.0
    idle_s: float = 60.0
    half_closed_s: float = 60.0
    ping_after_s: float = 15.0
    pong_s: float = 10.0


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer opened a stream; `Multiplexer.accept` or `Multiplexer.reset` it."""

    stream: StreamState


@dataclass(frozen=True, slots=True)
class StreamChanged:
    """Bytes or an end came, or a message left that is awaited: whoever waits may look again."""

    stream: StreamState


@dataclass(frozen=True, slots=True)
class ConnectionEnded:
    """Nothing more goes in or out, but for the last batch."""

    problem: str


Event = StreamOpened | StreamChanged | ConnectionEnded


class Multiplexer:
    """One side of one connection.

    Args:
        is_initiator: Whether this side dialled.
        limits: What it spends on the peer.
        budget: The peer's unread bytes, shared by all its connections.
        now: The time.
    """

    def __init__(
        self, *, is_initiator: bool, limits: MuxLimits, budget: ReceiveBudget, now: float
    ) -> None:
        self._limits = limits
        self._budget = budget
        self._streams: dict[int, StreamState] = {}
        self._inbound = 0
        self._next_id = 1 if is_initiator else 2
        self._last_inbound_id = 0
        self._inbound_parity = 0 if is_initiator else 1
        self._schedule = Schedule()
        self._control: list[bytes] = []
        self._events: list[Event] = []
        self._header = b""
        self._body_left = 0
        self._body_stream: StreamState | None = None
        self._body_flags = 0
        self._now = self._heard_at = self._idle_since = now
        self._pinged_at: float | None = None
        self._pings = 0
        self.problem = ""
        """Why the connection ended; empty while it has not."""
        self.has_more = False
        """Whether the last batch was full, so that there may be another one."""
        self.has_new_deadline = False
        """Whether `next_deadline` may have come nearer since it was last asked for."""

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def has_news(self) -> bool:
        """Whether there are events, or answers to send."""
        return bool(self._events or self._control)

    def take_events(self) -> list[Event]:
        """Return what happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    # --- streams ---------------------------------------------------------------------

    def open(self, now: float) -> StreamState:
        """Open a stream; the connection has not ended."""
        assert not self.problem, self.problem
        self._now = now
        stream = StreamState(self._next_id, is_outbound=True, heard_at=now)
        self._next_id += 2
        self._budget.overdraw(INITIAL_WINDOW_BYTES)
        self._streams[stream.stream_id] = stream
        self._control.append(pack_header(WINDOW_UPDATE, SYN, stream.stream_id, 0))
        return stream

    def accept(self, stream: StreamState) -> None:
        """Tell the peer that a stream of its has somebody who serves it."""
        if not stream.problem:
            self._control.append(pack_header(WINDOW_UPDATE, ACK, stream.stream_id, 0))

    def queue(self, stream: StreamState, data: Buffer, now: float) -> Message:
        """Queue bytes; ``data`` must not change until the message `is_sent`.

        The stream is neither closed nor ended, and ``data`` is not empty.
        """
        assert not stream.problem
        assert not stream.is_closing
        self._now = now
        message = Message(memoryview(data).cast("B"))
        stream.outbox.append(message)
        if stream.allowance:
            self._schedule.add(stream)
        elif stream.stalled_at is None:
            self._stall(stream)
        return message

    def withdraw(self, stream: StreamState, message: Message) -> None:
        """Give up a message: none of it is sent, or all that is left, from a copy of it."""
        if message.is_sent or message not in stream.outbox:
            return
        if message.sent:
            message.data = memoryview(bytes(message.data[message.sent :]))
            message.sent = 0
        else:
            stream.outbox.remove(message)
            stream.stalled_at = stream.stalled_at if stream.outbox else None
            self._finish_if_flushed(stream)

    def read(self, stream: StreamState, limit: int) -> bytes:
        """Return 1 to ``limit`` received bytes, or ``b""`` if there are none now.

        What came before a stream was lost can still be read after it.
        """
        if not stream.unread:
            return b""
        taken = stream.take(limit)
        self._grant(stream)
        self._forget_if_done(stream)
        return taken

    def close(self, stream: StreamState, now: float) -> None:
        """Send an end after what is queued; the peer may go on sending."""
        if stream.is_closing or stream.problem:
            return
        stream.is_closing = True
        stream.closed_at = self._now = now
        self.has_new_deadline = True
        self._finish_if_flushed(stream)

    def reset(self, stream: StreamState, problem: str = "it was reset here") -> None:
        """End both directions at once."""
        if stream.problem or stream.stream_id not in self._streams:
            return
        self._control.append(pack_header(WINDOW_UPDATE, RST, stream.stream_id, 0))
        stream.forget_received()
        self._end_stream(stream, problem)

    def end(self, problem: str, reason: int = NORMAL) -> None:
        """End the connection from here; the last batch tells the peer so."""
        if self.problem:
            return
        for stream in self._streams.values():
            stream.forget_received()
        self.lose(problem)
        self._control = [pack_header(GO_AWAY, 0, 0, reason)]

    def lose(self, problem: str) -> None:
        """Learn that the connection has ended; what came before can still be read."""
        if self.problem:
            return
        self.problem = problem
        self._control.clear()
        for stream in list(self._streams.values()):
            self._end_stream(stream, problem)
        self._events.append(ConnectionEnded(problem))

    # --- sending ---------------------------------------------------------------------

    def next_batch(self, limit: int, now: float) -> list[Buffer]:
        """Return what to send next, in order: frames of ``limit`` bytes or a little more."""
        self._now = now
        batch: list[Buffer] = list(self._control)
        self._control.clear()
        size = HEADER_BYTES * len(batch)
        while size < limit and (stream := self._schedule.next()):
            size += self._send_frame(stream, batch)
        self.has_more = size >= limit
        return batch

    def _send_frame(self, stream: StreamState, batch: list[Buffer]) -> int:
        message = stream.outbox[0]
        size = min(len(message.data) - message.sent, stream.allowance, MAX_PAYLOAD_BYTES)
        part = message.data[message.sent : message.sent + size]
        header = pack_header(DATA, 0, stream.stream_id, size)
        if size < JOIN_PAYLOAD_BYTES:
            batch.append(header + part)
        else:
            batch += (header, part)
        message.sent += size
        stream.allowance -= size
        if message.is_sent:
            stream.outbox.popleft()
            if message.is_awaited:
                self._events.append(StreamChanged(stream))
            if stream.is_closing and not stream.outbox:
                batch.append(pack_header(WINDOW_UPDATE, FIN, stream.stream_id, 0))
                self._forget_if_done(stream)
        if stream.outbox and not stream.allowance:
            self._stall(stream)
        return size

    def _stall(self, stream: StreamState) -> None:
        stream.stalled_at = self._now
        self.has_new_deadline = True

    def _finish_if_flushed(self, stream: StreamState) -> None:
        if stream.is_closing and not stream.outbox:
            self._control.append(pack_header(WINDOW_UPDATE, FIN, stream.stream_id, 0))
            self._forget_if_done(stream)

    def _grant(self, stream: StreamState) -> None:
        """Tell the peer of room, once it is half of a window."""
        if stream.peer_closed or stream.problem:
            return
        if stream.window < self._limits.window_bytes and stream.credit < stream.window // 2:
            stream.window += self._budget.take(self._limits.window_bytes - stream.window)
        owed = stream.owed
        if owed >= stream.window // 2:
            stream.credit += owed
            self._control.append(pack_header(WINDOW_UPDATE, 0, stream.stream_id, owed))

    # --- receiving -------------------------------------------------------------------

    def receive(self, data: bytes, now: float) -> None:
        """Take bytes of the connection, cut anywhere."""
        self._now = self._heard_at = now
        position = 0
        while position < len(data) and not self.problem:
            if self._body_left:
                part = data[position : position + self._body_left]
                self._receive_body(part)
            else:
                part = data[position : position + HEADER_BYTES - len(self._header)]
                self._header += part
                if len(self._header) == HEADER_BYTES:
                    header, self._header = self._header, b""
                    self._receive_header(header, now)
            position += len(part)

    def _receive_header(self, header: bytes, now: float) -> None:
        version, kind, flags, stream_id, length = HEADER.unpack(header)
        if version or flags & ~ALL_FLAGS or kind > GO_AWAY:
            self._violation("it sent a frame that yamux does not have")
        elif kind <= WINDOW_UPDATE:
            self._receive_stream_frame(kind, flags, stream_id, length, now)
        elif stream_id:
            self._violation("it sent a ping or an end of a stream")
        elif kind == GO_AWAY:
            self.lose(f"the peer left, with reason {length}")
        elif flags & SYN:
            self._answer(pack_header(PING, ACK, 0, length))

    def _receive_stream_frame(
        self, kind: int, flags: int, stream_id: int, length: int, now: float
    ) -> None:
        if flags & SYN:
            self._receive_open(stream_id, now)
        stream = self._streams.get(stream_id)
        if stream is None and not self._was_open(stream_id):
            self._violation("it sent on a stream that was never opened")
        if self.problem:
            return
        if stream is not None:
            stream.heard_at = now
        if kind == DATA:
            self._begin_body(stream, length, flags)
        elif stream is not None:
            self._receive_window(stream, length)
            self._receive_flags(stream, flags)

    def _was_open(self, stream_id: int) -> bool:
        if stream_id % 2 == self._inbound_parity:
            return 0 < stream_id <= self._last_inbound_id
        return 0 < stream_id < self._next_id

    def _receive_open(self, stream_id: int, now: float) -> None:
        if stream_id % 2 != self._inbound_parity or stream_id <= self._last_inbound_id:
            self._violation("it opened a stream under an id that it may not use")
            return
        self._last_inbound_id = stream_id
        is_full = self._inbound >= self._limits.max_inbound_streams
        if is_full or not self._budget.take_all(INITIAL_WINDOW_BYTES):
            self._answer(pack_header(WINDOW_UPDATE, RST, stream_id, 0))
            return
        self._inbound += 1
        stream = StreamState(stream_id, is_outbound=False, heard_at=now)
        self._streams[stream_id] = stream
        self._events.append(StreamOpened(stream))

    def _begin_body(self, stream: StreamState | None, length: int, flags: int) -> None:
        allowed = self._limits.window_bytes if stream is None else stream.credit
        if length > allowed:
            self._violation("it sent more than its window")
        elif length and stream is not None and stream.peer_closed:
            self._violation("it sent on a stream that it had closed")
        self._body_left, self._body_stream, self._body_flags = length, stream, flags
        if not length and stream is not None:
            self._receive_flags(stream, flags)

    def _receive_body(self, part: bytes) -> None:
        self._body_left -= len(part)
        stream = self._body_stream
        if stream is None or stream.problem:
            return
        stream.credit -= len(part)
        stream.unread.append(part)
        stream.unread_bytes += len(part)
        self._events.append(StreamChanged(stream))
        self._grant(stream)
        if not self._body_left:
            self._receive_flags(stream, self._body_flags)

    def _receive_window(self, stream: StreamState, length: int) -> None:
        if not length:
            return
        if stream.allowance + length > MAX_WINDOW:
            self._violation("it opened a window of more than 4 GiB")
            return
        stream.allowance += length
        stream.stalled_at = None
        if stream.outbox:
            self._schedule.add(stream)

    def _receive_flags(self, stream: StreamState, flags: int) -> None:
        if flags & RST:
            self._end_stream(stream, "the peer reset it")
        elif flags & FIN:
            stream.peer_closed = True
            self._events.append(StreamChanged(stream))
            self._forget_if_done(stream)

    def _answer(self, frame: bytes) -> None:
        self._control.append(frame)
        if len(self._control) > MAX_WAITING_CONTROL:
            self._violation("it asks for more answers than it reads")

    def _violation(self, problem: str) -> None:
        self.end(problem, PROTOCOL_ERROR)

    # --- ends ------------------------------------------------------------------------

    def _end_stream(self, stream: StreamState, problem: str) -> None:
        stream.problem = problem
        stream.forget_queued()
        self._forget(stream)

    def _forget_if_done(self, stream: StreamState) -> None:
        has_closed = stream.is_closing and not stream.outbox
        if has_closed and stream.peer_closed and not stream.unread:
            self._forget(stream)

    def _forget(self, stream: StreamState) -> None:
        if self._streams.pop(stream.stream_id, None) is None:
            return
        stream.is_forgotten = self.has_new_deadline = True
        self._events.append(StreamChanged(stream))
        self._budget.give_back(stream.window)
        self._inbound -= not stream.is_outbound
        self._idle_since = self._now

    # --- time ------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """Return when `tick` has something to do."""
        self.has_new_deadline = False
        limits = self._limits
        deadlines = [self._heard_at + limits.ping_after_s]
        if self._pinged_at is not None:
            deadlines = [self._pinged_at + limits.pong_s]
        if not self._streams:
            deadlines.append(self._idle_since + limits.idle_s)
        deadlines += (deadline for _, deadline, _ in self._stream_deadlines())
        return min(deadlines)

    def tick(self, now: float) -> None:
        """Do what the time asks for."""
        self._now = now
        for stream, deadline, problem in list(self._stream_deadlines()):
            if now >= deadline:
                self.reset(stream, problem)
        if not self._streams and now >= self._idle_since + self._limits.idle_s:
            self.end("nothing used it")
        elif self._pinged_at is not None:
            self._check_answer(self._pinged_at, now)
        elif now >= self._heard_at + self._limits.ping_after_s:
            self._pinged_at = now
            self._pings += 1
            self._control.append(pack_header(PING, SYN, 0, self._pings))

    def _check_answer(self, pinged_at: float, now: float) -> None:
        if self._heard_at > pinged_at:
            self._pinged_at = None
        elif now >= pinged_at + self._limits.pong_s:
            self.end("the peer is silent")

    def _stream_deadlines(self) -> Iterable[tuple[StreamState, float, str]]:
        """Yield the streams that end unless something happens, when, and why."""
        limits = self._limits
        for stream in self._streams.values():
            if stream.stalled_at is not None:
                problem = f"the peer took no bytes for {limits.write_s} s"
                yield stream, stream.stalled_at + limits.write_s, problem
            elif stream.closed_at is not None and not stream.peer_closed:
                since = max(stream.closed_at, stream.heard_at)
                yield stream, since + limits.half_closed_s, "the peer left it half closed"
