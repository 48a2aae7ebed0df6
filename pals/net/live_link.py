"""One live link over its streams: the tasks and the calls that move its frames.

A frame goes out in the call that sends it, where its stream takes it at once; the lane's
writer task has only what did not fit, and what is written in a codec. A frame comes in on
the task that reads the connection, where the muxer can hand bytes over; else on the lane's
reader task, as do prompts in a codec. Either way the frames of a lane stay in order.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import trio

from pals.errors import InvalidFrame, PalsError, QueueFull
from pals.net.codec import decode, encode
from pals.net.handshake import LinkKeys
from pals.net.host import Stream
from pals.net.link import Link, Rekeyed
from pals.net.wire import Codec, Frame, FrameShape, Lane, Outgoing
from pals.types import PeerId, short_id

_log = logging.getLogger(__name__)

OUTBOX_FRAMES = {Lane.CONTROL: 256, Lane.DECODE: 256, Lane.PREFILL: 1024}
"""A session has one row on its way to a neighbour, but as many chunks as fit its window."""
READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Arrival:
    """A received frame: when it came (`time.perf_counter`) and what opening it took."""

    frame: Frame
    arrived_s: float
    codec_s: float


class LinkEvents(Protocol):
    """What the owner of the links answers and is told; all calls are on the trio thread."""

    def accepted(self, peer: PeerId, lane: Lane) -> tuple[FrameShape, ...]:
        """Return the shapes that ``peer`` may send on ``lane`` now."""
        ...

    def on_frame(self, peer: PeerId, arrival: Arrival) -> None:
        """Take a frame; raise `InvalidFrame` to drop the link."""
        ...

    def on_link_lost(self, peer: PeerId, problem: str) -> None:
        """Learn that a link with ``peer`` ended: frames on it, either way, may be lost.

        Another link with it may be left, but what the frames were part of cannot go on.
        """
        ...


class _Outbox:
    """What waits to be written on one lane: frames, and one that is sealed already.

    None among them only wakes the writer: the link has something to say itself.

    Attributes:
        idle: The stream while nothing waits and nothing is being written: whoever has a
            frame then may write it.
    """

    def __init__(self, lane: Lane) -> None:
        self._send, self._receive = trio.open_memory_channel[Outgoing | bytearray | None](
            OUTBOX_FRAMES[lane]
        )
        self._woken = False
        self.idle: Stream | None = None

    def put(self, item: Outgoing | bytearray | None) -> None:
        """Queue something; raise `trio.WouldBlock` when the queue is full."""
        self.idle = None
        self._send.send_nowait(item)

    def wake(self) -> None:
        """Let the writer ask the link; while it is busy, once is enough."""
        if not self._woken:
            with suppress(trio.WouldBlock):  # a full queue has an awake writer
                self.put(None)
                self._woken = True

    async def take(self, stream: Stream) -> Outgoing | bytearray | None:
        """Return the next thing to write; while there is none, ``stream`` is `idle`."""
        if not self._receive.statistics().current_buffer_used:
            self.idle = stream
        item = await self._receive.receive()
        if item is None:
            self._woken = False
        return item


class LiveLink:
    """One live link, its outboxes, and the scopes of the tasks that serve it.

    Args:
        keys: What its handshake agreed on.
        link: Its state.
        events: Given its frames.
        seal_s: Given the seconds that sealing took, for frames of the decode lane.
    """

    def __init__(
        self, keys: LinkKeys, link: Link, events: LinkEvents, seal_s: deque[float]
    ) -> None:
        self.link_id = keys.address.link
        self.remote = keys.remote
        self.link = link
        self.attached: set[Lane] = set()
        self.problem = ""
        self._events = events
        self._seal_s = seal_s
        self._outboxes = {lane: _Outbox(lane) for lane in Lane}
        self._scopes: list[trio.CancelScope] = []

    def end(self, problem: str) -> None:
        """Stop every lane; the first reason is the one that is told."""
        self.problem = self.problem or problem
        for scope in self._scopes:
            scope.cancel()

    async def run_lane(self, lane: Lane, stream: Stream) -> None:
        """Move the frames of one lane until the link ends."""
        self.attached.add(lane)
        with trio.CancelScope() as scope:
            self._scopes.append(scope)
            if self.problem:
                scope.cancel()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_lane, lane, stream)
                    await self._read_lane(lane, stream)
                    nursery.cancel_scope.cancel()
            except* Exception as group:
                self._end_for(_first_error(group))
        self.end("it closed the link")

    def _end_for(self, error: Exception) -> None:
        """End the link: whatever one peer's bytes did, the others go on."""
        if not isinstance(error, PalsError):
            _log.error("link with %s failed", short_id(self.remote), exc_info=error)
            self.end("internal error")
            return
        level = logging.WARNING if isinstance(error, InvalidFrame) else logging.DEBUG
        _log.log(level, "link with %s: %s", short_id(self.remote), error)
        self.end(str(error))

    # --- out -------------------------------------------------------------------------

    def send(self, lane: Lane, outgoing: Outgoing) -> None:
        """Send a frame, or queue it behind those that wait.

        Raises:
            QueueFull: The peer reads too slowly. The link is ended, but for a prompt: that
                one goes on too far ahead of its reader, and is no reason to end the others.
        """
        outbox = self._outboxes[lane]
        if outbox.idle is not None and not self.problem and not self.link.is_coded(lane):
            self._send_now(lane, outbox, outbox.idle, outgoing)
            return
        try:
            outbox.put(outgoing)
        except trio.WouldBlock:
            if lane is not Lane.PREFILL:
                self.end("it reads too slowly")
            name, limit = f"{lane.name.lower()} lane", f"{OUTBOX_FRAMES[lane]} frames"
            raise QueueFull(queue=name, limit=limit) from None

    def wake_writers(self) -> None:
        """Let the lanes on which the link has something to say itself write it."""
        for lane in self.link.waiting_lanes:
            self._outboxes[lane].wake()

    def _send_now(self, lane: Lane, outbox: _Outbox, stream: Stream, outgoing: Outgoing) -> None:
        """Write a frame without waiting; a link that this fails on is lost like any other."""
        try:
            data = self._seal(lane, outgoing)
            if not stream.try_write(data):
                outbox.put(data)
        except Exception as error:
            self._end_for(error)

    async def _write_lane(self, lane: Lane, stream: Stream) -> None:
        outbox = self._outboxes[lane]
        self.wake_writers()  # the link may have had something to say before the lane was there
        try:
            while True:
                item = await outbox.take(stream)
                if data := await self._bytes_of(lane, item):
                    await stream.write(data)
        finally:
            outbox.idle = None

    async def _bytes_of(self, lane: Lane, item: Outgoing | bytearray | None) -> bytearray:
        """Return what to write for something that waited in an outbox."""
        if item is None:
            return self.link.take_outgoing(lane)
        if isinstance(item, bytearray):
            return item
        shape = self.link.wire_shape(lane, item.shape)
        if shape.codec is not Codec.RAW:  # milliseconds, which others need not wait
            item = await trio.to_thread.run_sync(encode, item, shape)
        return self._seal(lane, item)

    def _seal(self, lane: Lane, outgoing: Outgoing) -> bytearray:
        started_s = time.perf_counter()
        data = self.link.seal(lane, outgoing, trio.current_time())
        if lane is Lane.DECODE:
            self._seal_s.append(time.perf_counter() - started_s)
        if self.link.has_outgoing:
            self.wake_writers()
        return data

    # --- in --------------------------------------------------------------------------

    async def _read_lane(self, lane: Lane, stream: Stream) -> None:
        is_coded = self.link.is_coded(lane)
        take = partial(self._take, lane)
        if not is_coded:
            stream.deliver_to(take)
        while data := await stream.read_some(READ_BYTES):
            if is_coded:
                await self._take_coded(lane, data)
            else:
                take(data)
        self.end("it closed the link")

    def _take(self, lane: Lane, data: bytes) -> None:
        """Take bytes of a lane; an error ends this link and is nobody else's."""
        if self.problem:
            return
        try:
            for arrival in self._open(lane, data):
                self._events.on_frame(self.remote, arrival)
        except Exception as error:
            self._end_for(error)

    async def _take_coded(self, lane: Lane, data: bytes) -> None:
        for arrival in self._open(lane, data):
            if arrival.frame.shape.codec is not Codec.RAW:
                frame = await trio.to_thread.run_sync(decode, arrival.frame)
                arrival = Arrival(frame, arrival.arrived_s, arrival.codec_s)
            self._events.on_frame(self.remote, arrival)

    def _open(self, lane: Lane, data: bytes) -> list[Arrival]:
        arrived_s = time.perf_counter()
        accepted = self._events.accepted(self.remote, lane)
        events = self.link.receive(lane, data, accepted, trio.current_time())
        codec_s = (time.perf_counter() - arrived_s) / max(1, len(events))
        if self.link.has_outgoing:
            self.wake_writers()
        arrivals: list[Arrival] = []
        for event in events:
            if isinstance(event, Rekeyed):
                name = short_id(self.remote)
                _log.debug("= link with %s: new keys, epoch %d", name, event.epoch)
            else:
                arrivals.append(Arrival(event, arrived_s, codec_s))
        return arrivals


def _first_error(group: ExceptionGroup[Exception]) -> Exception:
    """Return one error of a group, a fault of ours before what the peer brought about."""
    errors = list(_flatten(group))
    return next((error for error in errors if not isinstance(error, PalsError)), errors[0])


def _flatten(error: Exception) -> Iterator[Exception]:
    if not isinstance(error, ExceptionGroup):
        yield error
        return
    for part in cast("ExceptionGroup[Exception]", error).exceptions:
        yield from _flatten(part)
