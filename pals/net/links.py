"""Links over libp2p streams: who is linked to whom, and how links begin and end.

A link is dialled by whoever first needs it and is used in both directions. It has one
stream for each lane: the control lane runs on the stream of the handshake, the others
name the link when they open. When any stream of a link ends, the whole link ends.

What the bytes mean, and when keys change, is `pals.net.link`'s; how frames move is
`pals.net.live_link`'s; this shell has the clock and the randomness.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from weakref import WeakValueDictionary

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pals.errors import OtherEpoch, PalsError, PeerUnreachable, QueueFull
from pals.net.handshake import NONCE_BYTES, Handshake, KeyShare, LinkKeys, LinkSecrets
from pals.net.host import Host, Stream
from pals.net.link import Link
from pals.net.live_link import Arrival, LinkEvents, LiveLink
from pals.net.wire import Frame, Lane, Outgoing
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
LOCAL_FRAMES = 256
MAX_LINKS_PER_PEER = 4
SEAL_SAMPLES = 256
TICK_S = 5.0
"""How often links are asked whether their keys are due."""


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
        self._links: dict[PeerId, list[LiveLink]] = {}
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
        """Send a frame to ``peer``, or queue it where that has to wait.

        Raises:
            PeerUnreachable: There is no link with it.
            QueueFull: It reads too slowly. The link is ended, but for a prompt: that one
                goes on too far ahead of its reader, and is no reason to end the others.
        """
        if peer == self._host.peer_id:
            self._send_local(lane, outgoing)
            return
        links = self._links.get(peer)
        if not links:
            raise PeerUnreachable(peer=peer, problem="no link")
        links[0].send(lane, outgoing)

    def drop(self, peer: PeerId, problem: str) -> None:
        """End every link with ``peer``."""
        for link in self._links_with(peer):
            link.end(problem)

    def is_member(self, peer: PeerId) -> bool:
        """Return whether ``peer`` may be linked with now."""
        return self._host.is_member(peer)

    def _links_with(self, peer: PeerId) -> Sequence[LiveLink]:
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

    def _all_links(self) -> Sequence[LiveLink]:
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

    async def _open_streams(self, peer: PeerId, streams: dict[Lane, Stream]) -> None:
        """Open a stream for each lane, all in the same round trip, into ``streams``."""
        errors: list[PalsError] = []

        async def open_stream(lane: Lane, protocol: str) -> None:
            try:
                streams[lane] = await self._host.open_stream(peer, protocol)
            except PalsError as error:
                errors.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_stream, Lane.CONTROL, LINK_PROTOCOL)
            for lane in (Lane.DECODE, Lane.PREFILL):
                nursery.start_soon(open_stream, lane, LANE_PROTOCOL)
        if errors:
            raise errors[0]

    async def _agree(self, peer: PeerId, streams: dict[Lane, Stream]) -> LinkKeys:
        """Shake hands, again while the two are in different epochs: one learns the newer."""
        due = trio.current_time() + EPOCH_DEADLINE_S
        while True:
            await self._open_streams(peer, streams)
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

    def _add(self, keys: LinkKeys) -> LiveLink:
        now = trio.current_time()
        link = Link(keys, self._secrets, now=now, make_share=self._make_share)
        live = LiveLink(keys, link, self._events, self.decode_seal_s)
        self._links.setdefault(keys.remote, []).append(live)
        self._added.set()
        self._added = trio.Event()
        _log.debug("= link with %s", short_id(keys.remote))
        return live

    async def _wait_for(self, peer: PeerId, link_id: bytes) -> LiveLink:
        """Return a link by its first id; a lane may overtake the end of the handshake."""
        while True:
            for live in self._links_with(peer):
                if live.link_id == link_id:
                    return live
            await self._added.wait()

    # --- serving links ---------------------------------------------------------------

    async def _run_lane(self, live: LiveLink, lane: Lane, stream: Stream) -> None:
        """Serve one stream of a link to its end; the first to end reports the loss."""
        await live.run_lane(lane, stream)
        peer = live.remote
        if live in self._links_with(peer):
            self._links[peer].remove(live)
            if not self._links[peer]:
                del self._links[peer]
            _log.debug("= link with %s ended: %s", short_id(peer), live.problem)
            self._events.on_link_lost(peer, live.problem)
        await _reset_all([stream])


async def _write_outgoing(handshake: Handshake, stream: Stream) -> None:
    if outgoing := handshake.take_outgoing():
        await stream.write(outgoing)


async def _reset_all(streams: Iterable[Stream]) -> None:
    """Reset streams, even when the caller is being cancelled."""
    with trio.move_on_after(1, shield=True):
        for stream in streams:
            with suppress(PalsError):
                await stream.reset()
