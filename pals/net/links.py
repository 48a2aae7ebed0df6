"""Links over libp2p streams: who is linked to whom, and the tasks that move frames.

A link is dialled by whoever first needs it and is used in both directions. It has one
stream for each lane: the control lane runs on the stream of the handshake, the others
name the link when they open. When any stream of a link ends, the whole link ends.

What the bytes mean, and when keys change, is `pals.net.link`'s; this shell has the clock,
the randomness, the streams and the queues.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol
from weakref import WeakValueDictionary

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pals.errors import InvalidFrame, OtherEpoch, PalsError, PeerUnreachable, QueueFull
from pals.net.codec import decode, encode
from pals.net.handshake import NONCE_BYTES, Handshake, KeyShare, LinkKeys, LinkSecrets
from pals.net.host import Host, Stream
from pals.net.link import Link, Rekeyed
from pals.net.wire import Codec, Frame, FrameShape, Lane, Outgoing
from pals.swarm.keys import LINK_ID_BYTES, Role, epoch_prk
from pals.types import PeerId, short_id

_log = logging.getLogger(__name__)

LINK_PROTOCOL = "/pals/link"
LANE_PROTOCOL = "/pals/lane"
HANDSHAKE_DEADLINE_S = 10.0
EPOCH_PAUSE_S = 0.25
"""How long a handshake between two epochs waits before it is tried again."""
EPOCH_DEADLINE_S = 8.0
"""For how long it is tried; within the deadline of the handshake."""
OUTBOX_FRAMES = {Lane.CONTROL: 256, Lane.DECODE: 256, Lane.PREFILL: 1024}
"""A session has one row on its way to a neighbour, but as many chunks as fit its window."""
LOCAL_FRAMES = 256
MAX_LINKS_PER_PEER = 4
READ_BYTES = 1 << 18
SEAL_SAMPLES = 256
TICK_S = 5.0
"""How often links are asked whether their keys are due."""


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


class _LaneQueue:
    """The frames that wait to be written on one lane of one link.

    None among them only wakes the writer: the link has something to say itself.
    """

    def __init__(self, lane: Lane) -> None:
        self.send, self.receive = trio.open_memory_channel[Outgoing | None](OUTBOX_FRAMES[lane])
        self.woken = False

    def wake(self) -> None:
        """Let the writer ask the link; while it is busy, once is enough."""
        if not self.woken:
            with suppress(trio.WouldBlock):  # a full queue has an awake writer
                self.send.send_nowait(None)
                self.woken = True


class _LiveLink:
    """One live link, its outboxes, and the scopes of the tasks that serve it."""

    def __init__(self, keys: LinkKeys, link: Link) -> None:
        self.link_id = keys.address.link
        self.remote = keys.remote
        self.link = link
        self.outboxes = {lane: _LaneQueue(lane) for lane in Lane}
        self.attached: set[Lane] = set()
        self.problem = ""
        self._scopes: list[trio.CancelScope] = []

    def enter(self, scope: trio.CancelScope) -> None:
        self._scopes.append(scope)
        if self.problem:
            scope.cancel()

    def wake_writers(self) -> None:
        for lane in self.link.waiting_lanes:
            self.outboxes[lane].wake()

    def end(self, problem: str) -> None:
        """Stop every lane; the first reason is the one that is told."""
        self.problem = self.problem or problem
        for scope in self._scopes:
            scope.cancel()


class Links:
    """All links of one process."""

    def __init__(
        self,
        host: Host,
        secrets: LinkSecrets,
        events: LinkEvents,
        *,
        make_ephemeral: Callable[[], X25519PrivateKey] = X25519PrivateKey.generate,
        make_nonce: Callable[[], bytes] = lambda: os.urandom(NONCE_BYTES),
    ) -> None:
        self._host = host
        self._secrets = secrets
        self._events = events
        self._make_ephemeral = make_ephemeral
        self._make_nonce = make_nonce
        # Both hold peers that are linked or being dialled, and none that was only named.
        self._links: dict[PeerId, list[_LiveLink]] = {}
        self._dialling: WeakValueDictionary[PeerId, trio.Lock] = WeakValueDictionary()
        self._added = trio.Event()
        self._awaited_epoch = secrets.epoch
        self._entered = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._local_send, self._local_receive = trio.open_memory_channel[Arrival](LOCAL_FRAMES)
        self.decode_seal_s: deque[float] = deque(maxlen=SEAL_SAMPLES)
        """Seconds that sealing took, for the last frames of the decode lane."""
        self.on_other_epoch: Callable[[PeerId], None] = lambda _: None
        """Called with a member whose secret is of another epoch: one of the two is behind."""

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve links until cancelled."""
        self._host.handle(LINK_PROTOCOL, self._serve_link)
        self._host.handle(LANE_PROTOCOL, self._serve_lane)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._deliver_local)
            nursery.start_soon(self._keep_keys)
            task_status.started()

    # --- sending ---------------------------------------------------------------------

    async def ensure(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Return when a link with ``peer`` is up, dialling it if there is none.

        Raises:
            PeerUnreachable: It cannot be dialled, or does not answer in time.
            OtherEpoch: One of the two did not learn the newer secret in time.
            LinkRefused: It does not share this swarm's secret.
            WireVersionMismatch: It speaks another wire version.
        """
        if peer == self._host.peer_id:
            return
        async with self._dialling.setdefault(peer, trio.Lock()):
            if not self._links_with(peer):
                await self._dial(peer, addresses)

    def send(self, peer: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        """Queue a frame for ``peer``.

        Raises:
            PeerUnreachable: There is no link with it.
            QueueFull: It reads too slowly. The link is ended, but for a prompt: that one
                goes on too far ahead of its reader, and is no reason to end the others.
        """
        if peer == self._host.peer_id:
            self._send_local(lane, outgoing)
            return
        links = self._links_with(peer)
        if not links:
            raise PeerUnreachable(peer=peer, problem="no link")
        try:
            links[0].outboxes[lane].send.send_nowait(outgoing)
        except trio.WouldBlock:
            if lane is not Lane.PREFILL:
                links[0].end("it reads too slowly")
            name, limit = f"{lane.name.lower()} lane", f"{OUTBOX_FRAMES[lane]} frames"
            raise QueueFull(queue=name, limit=limit) from None

    def drop(self, peer: PeerId, problem: str) -> None:
        """End every link with ``peer``."""
        for link in self._links_with(peer):
            link.end(problem)

    def is_member(self, peer: PeerId) -> bool:
        """Return whether ``peer`` may be linked with now."""
        return self._host.is_member(peer)

    def _links_with(self, peer: PeerId) -> Sequence[_LiveLink]:
        return tuple(self._links.get(peer, ()))

    def linked_peers(self) -> frozenset[PeerId]:
        """Return the peers that a link is up with."""
        return frozenset(self._links)

    def _send_local(self, lane: Lane, outgoing: Outgoing) -> None:
        """Hand a frame to this same process, which has no link to itself."""
        frame = Frame(lane, outgoing.shape, outgoing.rows, memoryview(b"".join(outgoing.payload)))
        try:
            self._local_send.send_nowait(Arrival(frame, time.perf_counter(), 0.0))
        except trio.WouldBlock:
            raise QueueFull(queue="local", limit=f"{LOCAL_FRAMES} frames") from None

    async def _deliver_local(self) -> None:
        async for arrival in self._local_receive:
            try:
                self._events.on_frame(self._host.peer_id, arrival)
            except PalsError as error:  # another member's messages may have made it stale
                _log.warning("a frame of this machine to itself: %s", error)

    # --- keys ------------------------------------------------------------------------

    def expect(self, epoch: int) -> None:
        """Make no link before `rekey` has brought the secret of ``epoch``, or of a later one.

        A handshake waits for it within its deadline; who was removed knows the older secret.
        """
        self._awaited_epoch = max(self._awaited_epoch, epoch)

    def rekey(self, epoch: int, secret: bytes) -> None:
        """Enter a later epoch of the swarm secret.

        New links are of that epoch at once. Live links change keys while they run; one
        that has not within `pals.net.link.REKEY_DEADLINE_S` is cut.

        Args:
            epoch: Number of the epoch, greater than any before.
            secret: The swarm secret of the epoch, 32 bytes.

        Raises:
            ValueError: The epoch is not later than the newest known one.
        """
        if epoch <= self._secrets.epoch:
            raise ValueError(f"epoch {epoch} does not follow {self._secrets.epoch}")
        prk = epoch_prk(self._secrets.swarm_id, epoch, secret)
        self._secrets = replace(self._secrets, epoch=epoch, epoch_prk=prk)
        self._entered.set()
        self._entered = trio.Event()
        for live in self._all_links():
            live.link.rekey(self._secrets, trio.current_time())
            live.wake_writers()

    async def _keep_keys(self) -> None:
        while True:
            await trio.sleep(TICK_S)
            for live in self._all_links():
                try:
                    live.link.tick(trio.current_time())
                except PalsError as error:
                    _log.warning("link with %s: %s", short_id(live.remote), error)
                    live.end(str(error))
                live.wake_writers()

    def _all_links(self) -> Sequence[_LiveLink]:
        return tuple(live for links in self._links.values() for live in links)

    def _make_share(self) -> KeyShare:
        return KeyShare(self._make_ephemeral(), self._make_nonce())

    # --- making links ----------------------------------------------------------------

    async def _dial(self, peer: PeerId, addresses: Sequence[str]) -> None:
        assert self._nursery is not None
        streams: dict[Lane, Stream] = {}
        try:
            with trio.fail_after(HANDSHAKE_DEADLINE_S):
                if peer not in self._host.connected_peers():
                    await self._host.connect(peer, addresses)
                keys = await self._agree(peer, streams)
                for lane in (Lane.DECODE, Lane.PREFILL):
                    streams[lane] = await self._host.open_stream(peer, LANE_PROTOCOL)
                    await streams[lane].write(keys.address.link + bytes([lane]))
        except BaseException as error:
            await _reset_all(streams.values())
            if isinstance(error, trio.TooSlowError):
                problem = f"no link within {HANDSHAKE_DEADLINE_S} s"
                raise PeerUnreachable(peer=peer, problem=problem) from error
            raise
        live = self._add(keys)
        for lane, stream in streams.items():
            self._nursery.start_soon(self._run_lane, live, lane, stream)

    async def _agree(self, peer: PeerId, streams: dict[Lane, Stream]) -> LinkKeys:
        """Shake hands, again while the two are in different epochs: one learns the newer."""
        due = trio.current_time() + EPOCH_DEADLINE_S
        while True:
            streams[Lane.CONTROL] = await self._host.open_stream(peer, LINK_PROTOCOL)
            try:
                return await self._shake_hands("initiator", streams[Lane.CONTROL])
            except OtherEpoch:
                if trio.current_time() >= due:
                    raise
            await _reset_all(streams.values())
            await trio.sleep(EPOCH_PAUSE_S)

    async def _serve_link(self, stream: Stream) -> None:
        if not self._may_link(stream.peer_id):
            await stream.reset()
            return
        try:
            with trio.fail_after(HANDSHAKE_DEADLINE_S):
                keys = await self._shake_hands("responder", stream)
        except (PalsError, trio.TooSlowError) as error:
            _log.warning("link from %s: %s", short_id(stream.peer_id), error)
            await stream.close()
            return
        if not self._may_link(stream.peer_id):  # it changed during the handshake
            await stream.reset()
            return
        await self._run_lane(self._add(keys), Lane.CONTROL, stream)

    def _may_link(self, peer: PeerId) -> bool:
        """Return whether ``peer`` is still a member and has few links; its connection may live."""
        if not self.is_member(peer):
            _log.warning("link refused: %s is no member", short_id(peer))
            return False
        if len(self._links_with(peer)) >= MAX_LINKS_PER_PEER:
            _log.warning("link refused: %s has %d", short_id(peer), MAX_LINKS_PER_PEER)
            return False
        return True

    async def _serve_lane(self, stream: Stream) -> None:
        try:
            with trio.fail_after(HANDSHAKE_DEADLINE_S):
                preface = await stream.read_exactly(LINK_ID_BYTES + 1)
                live = await self._wait_for(stream.peer_id, preface[:-1])
        except (PalsError, trio.TooSlowError):
            _log.warning("lane of no link from %s", short_id(stream.peer_id))
            await stream.reset()
            return
        lane = preface[-1]
        if not self.is_member(stream.peer_id):
            _log.warning("lane refused: %s is no member", short_id(stream.peer_id))
            await stream.reset()
            return
        if lane not in (Lane.DECODE, Lane.PREFILL) or lane in live.attached:
            _log.warning("no such lane, or taken: %s from %s", lane, short_id(stream.peer_id))
            await stream.reset()
            return
        await self._run_lane(live, Lane(lane), stream)

    async def _shake_hands(self, role: Role, stream: Stream) -> LinkKeys:
        while self._secrets.epoch < self._awaited_epoch:
            await self._entered.wait()
        handshake = Handshake(role, self._secrets, stream.peer_id, share=self._make_share())
        while handshake.keys is None:
            await _write_outgoing(handshake, stream)
            try:
                handshake.receive(await stream.read_exactly(handshake.wanted))
            except PalsError as error:
                await _write_outgoing(handshake, stream)  # tells the other side why
                if isinstance(error, OtherEpoch):
                    self.on_other_epoch(stream.peer_id)
                raise
        await _write_outgoing(handshake, stream)
        return handshake.keys

    def _add(self, keys: LinkKeys) -> _LiveLink:
        now = trio.current_time()
        link = Link(keys, self._secrets, now=now, make_share=self._make_share)
        live = _LiveLink(keys, link)
        self._links.setdefault(keys.remote, []).append(live)
        self._added.set()
        self._added = trio.Event()
        _log.debug("= link with %s", short_id(keys.remote))
        return live

    async def _wait_for(self, peer: PeerId, link_id: bytes) -> _LiveLink:
        """Return a link by its first id; a lane may overtake the end of the handshake."""
        while True:
            for live in self._links_with(peer):
                if live.link_id == link_id:
                    return live
            await self._added.wait()

    # --- moving frames ---------------------------------------------------------------

    async def _run_lane(self, live: _LiveLink, lane: Lane, stream: Stream) -> None:
        live.attached.add(lane)
        with trio.CancelScope() as scope:
            live.enter(scope)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_lane, live, lane, stream)
                    await self._read_lane(live, lane, stream)
                    nursery.cancel_scope.cancel()
            except* PalsError as group:
                self._end_for(live, group)
            except* Exception:  # whatever one peer's bytes did, the others go on
                _log.exception("link with %s failed", short_id(live.remote))
                live.end("internal error")
        await self._end_lane(live, stream)

    async def _read_lane(self, live: _LiveLink, lane: Lane, stream: Stream) -> None:
        peer = live.remote
        while data := await stream.read_some(READ_BYTES):
            arrived_s = time.perf_counter()
            accepted = self._events.accepted(peer, lane)
            events = live.link.receive(lane, data, accepted, trio.current_time())
            codec_s = (time.perf_counter() - arrived_s) / max(1, len(events))
            live.wake_writers()
            for event in events:
                if isinstance(event, Rekeyed):
                    _log.debug("= link with %s: new keys, epoch %d", short_id(peer), event.epoch)
                    continue
                frame = event
                if frame.shape.codec is not Codec.RAW:  # milliseconds, which others need not wait
                    frame = await trio.to_thread.run_sync(decode, frame)
                self._events.on_frame(peer, Arrival(frame, arrived_s, codec_s))
        live.end("it closed the link")

    async def _write_lane(self, live: _LiveLink, lane: Lane, stream: Stream) -> None:
        live.wake_writers()  # the link may have had something to say before the lane was there
        async for outgoing in live.outboxes[lane].receive:
            if outgoing is None:
                live.outboxes[lane].woken = False
                data = live.link.take_outgoing(lane)
            else:
                shape = live.link.wire_shape(lane, outgoing.shape)
                if shape.codec is not Codec.RAW:
                    outgoing = await trio.to_thread.run_sync(encode, outgoing, shape)
                data = self._seal(live, lane, outgoing)
            if data:
                await stream.write(data)

    def _seal(self, live: _LiveLink, lane: Lane, outgoing: Outgoing) -> bytearray:
        started_s = time.perf_counter()
        data = live.link.seal(lane, outgoing, trio.current_time())
        if lane is Lane.DECODE:
            self.decode_seal_s.append(time.perf_counter() - started_s)
        live.wake_writers()
        return data

    async def _end_lane(self, live: _LiveLink, stream: Stream) -> None:
        """Close one stream of an ended link; the first to get here reports the loss."""
        live.end("it closed the link")
        peer = live.remote
        if live in self._links_with(peer):
            self._links[peer].remove(live)
            if not self._links[peer]:
                del self._links[peer]
            _log.debug("= link with %s ended: %s", short_id(peer), live.problem)
            self._events.on_link_lost(peer, live.problem)
        await _reset_all([stream])

    def _end_for(self, live: _LiveLink, group: ExceptionGroup[PalsError]) -> None:
        error = _first_error(group)
        level = logging.WARNING if isinstance(error, InvalidFrame) else logging.DEBUG
        _log.log(level, "link with %s: %s", short_id(live.remote), error)
        live.end(str(error))


def _first_error(group: ExceptionGroup[PalsError]) -> PalsError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, PalsError)
    return error


async def _write_outgoing(handshake: Handshake, stream: Stream) -> None:
    if outgoing := handshake.take_outgoing():
        await stream.write(outgoing)


async def _reset_all(streams: Iterable[Stream]) -> None:
    """Reset streams, even when the caller is being cancelled."""
    with trio.move_on_after(1, shield=True):
        for stream in streams:
            with suppress(PalsError):
                await stream.reset()
