"""A live link, sans-IO: frames on three lanes, whose keys change while it runs.

Bytes of each lane come in and bytes of each lane go out; `now` is seconds on a monotonic
clock. Nothing here reads a socket, a clock or randomness.

The keys change hourly, long before a lane has used its key up, and with the epoch of the
swarm secret. No frame waits for it, and no key outlives it. Its messages are frames of
the kind KEY, sealed under the keys that they replace; the parts are those of
`pals.net.handshake`::

    offer  = 1 || proposal                      control lane
    answer = 2 || proposal || confirmation      control lane
    switch = 3 || confirmation                  every lane, both ways

Either side offers. Whoever answers has derived the new keys, so that the one who offered
may change: on each lane a switch is its last frame under the old keys, and the next is
frame 0 under the new ones, with their link id and epoch in its header. The first switch
that comes back shows that both have the keys, and the answerer changes its own lanes in
the same way. So each lane changes at one frame of its own, and a receiver tries one key
for a frame. Of two offers that cross, the one for the later epoch holds, and of the same
epoch the one from the peer with the greater id; the other is forgotten by both.

An offer for an epoch that this side does not know yet waits until it does. A change that
is not through in time ends the link, as does a link that stays behind its epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import lru_cache

from pals.errors import InvalidFrame, LinkRefused, PalsError
from pals.net.handshake import (
    CONFIRMATION_BYTES,
    PROPOSAL_BYTES,
    KeyShare,
    LinkKeys,
    LinkSecrets,
    Proposal,
    derive_keys,
    pack_proposal,
    parse_proposal,
)
from pals.net.lanes import LaneReceiver, LaneSender
from pals.net.wire import KEY_SHAPE, NO_ROWS, Codec, Frame, FrameShape, Kind, Lane, Outgoing
from pals.swarm.keys import FRAME_LIMIT, Role, key_confirmation
from pals.types import PeerId

REKEY_INTERVAL_S = 3600.0
REKEY_FRAMES = FRAME_LIMIT - (1 << 24)
"""Frames under one key after which the next is asked for, early enough for those under way."""
REKEY_DEADLINE_S = 120.0
"""How long a change of keys, or of the epoch, may take before the link is cut."""


class _Message(IntEnum):
    OFFER = 1
    ANSWER = 2
    SWITCH = 3


_MESSAGE_BYTES = {
    _Message.OFFER: PROPOSAL_BYTES,
    _Message.ANSWER: PROPOSAL_BYTES + CONFIRMATION_BYTES,
    _Message.SWITCH: CONFIRMATION_BYTES,
}


@dataclass(frozen=True, slots=True)
class Rekeyed:
    """Every lane is on fresh keys, both ways, and the old ones are gone."""

    epoch: int


LinkEvent = Frame | Rekeyed


@dataclass(frozen=True, slots=True)
class _Offer:
    """What this side proposes, until both have the keys or it has lost."""

    secrets: LinkSecrets
    share: KeyShare
    proposal: bytes


@dataclass(slots=True)
class _Change:
    """Keys that both sides have or will have, and the lanes that are not on them yet."""

    role: Role
    keys: LinkKeys
    sending: set[Lane] = field(default_factory=lambda: set(Lane))
    receiving: set[Lane] = field(default_factory=lambda: set(Lane))


class Link:
    """One end of a live link.

    A `PalsError` out of any call has ended the link, and comes out of every call after it.
    Bytes that the link itself has to say lie in `take_outgoing` after each call; `seal`
    puts them first.
    """

    def __init__(
        self,
        keys: LinkKeys,
        secrets: LinkSecrets,
        *,
        now: float,
        make_share: Callable[[], KeyShare],
    ) -> None:
        """Start from a handshake.

        Args:
            keys: What the handshake agreed on.
            secrets: Of the newest epoch that this side knows.
            now: When the handshake ended.
            make_share: Source of fresh keys and random bytes.
        """
        self._keys = keys
        self._newest = secrets
        self._make_share = make_share
        self._senders = {lane: LaneSender(keys, lane) for lane in Lane}
        self._receivers = {lane: LaneReceiver(keys, lane) for lane in Lane}
        self._outgoing: dict[Lane, bytearray] = {lane: bytearray() for lane in Lane}
        self._shapes: dict[Lane, tuple[Sequence[FrameShape], Sequence[FrameShape]]] = {}
        self._keyed_at = now
        self._offer: _Offer | None = None
        self._held: bytes | None = None
        self._change: _Change | None = None
        self._change_due: float | None = None
        self._epoch_due: float | None = None
        self._failure: PalsError | None = None
        self.has_outgoing = False
        """Whether there are `waiting_lanes`."""
        self._offer_if_due(now)

    @property
    def remote(self) -> PeerId:
        return self._keys.remote

    @property
    def epoch(self) -> int:
        """The epoch of the keys that every lane has reached."""
        return self._keys.address.epoch

    @property
    def waiting_lanes(self) -> tuple[Lane, ...]:
        """The lanes on which the link has something to say by itself."""
        return tuple(lane for lane, data in self._outgoing.items() if data)

    def is_coded(self, lane: Lane) -> bool:
        """Return whether hidden states on a lane are written in a codec, now and later."""
        return lane is Lane.PREFILL and self._keys.prefill_codec is not Codec.RAW

    def wire_shape(self, lane: Lane, shape: FrameShape) -> FrameShape:
        """Return the shape as it is written on a lane: the codec is the link's."""
        if lane is Lane.PREFILL and shape.kind is Kind.HIDDEN:
            return _with_codec(shape, self._keys.prefill_codec)
        return shape

    def take_outgoing(self, lane: Lane) -> bytearray:
        """Return what the link has to say on a lane, once."""
        data, self._outgoing[lane] = self._outgoing[lane], bytearray()
        self.has_outgoing = any(self._outgoing.values())
        return data

    def seal(self, lane: Lane, outgoing: Outgoing, now: float) -> bytearray:
        """Return the bytes that carry a frame, after what the link has to say itself.

        Raises:
            FrameKeyExhausted: The lane's key is used up, for the other side did not
                answer in time.
        """
        if self._failure is not None:
            raise self._failure
        sender = self._senders[lane]
        try:
            data = sender.seal(outgoing)
        except PalsError as error:
            self._failure = error
            raise
        if self._outgoing[lane]:
            data = self.take_outgoing(lane) + data
        if sender.counter >= REKEY_FRAMES:
            self._offer_if_due(now)
        return data

    def receive(
        self, lane: Lane, data: bytes, accepted: Sequence[FrameShape], now: float
    ) -> list[LinkEvent]:
        """Take bytes of a lane and return what they complete, in order.

        Args:
            lane: The lane that they came on.
            data: Cut anywhere.
            accepted: The shapes that this process takes on the lane.
            now: When they came.

        Raises:
            InvalidFrame: They are not what the lane may carry now.
            LinkRefused: The other side's new key is degenerate.
        """
        if self._failure is not None:
            raise self._failure
        events: list[LinkEvent] = []
        try:
            for frame in self._receivers[lane].receive(data, self._wire_shapes(lane, accepted)):
                if frame.shape.kind is Kind.KEY:
                    events += self._on_key_frame(lane, frame, now)
                else:
                    events.append(frame)
        except PalsError as error:
            self._failure = error
            raise
        return events

    def _wire_shapes(self, lane: Lane, accepted: Sequence[FrameShape]) -> Sequence[FrameShape]:
        """Return ``accepted`` as it is written on a lane, and the shape of key messages."""
        known, shapes = self._shapes.get(lane, ((), (KEY_SHAPE,)))
        if accepted != known:
            shapes = (*(self.wire_shape(lane, shape) for shape in accepted), KEY_SHAPE)
            self._shapes[lane] = accepted, shapes
        return shapes

    def rekey(self, secrets: LinkSecrets, now: float) -> None:
        """Learn a later epoch's secret; from here the link has `REKEY_DEADLINE_S` to reach it.

        Raises:
            ValueError: It is no later epoch than the newest known one.
        """
        if secrets.epoch <= self._newest.epoch:
            raise ValueError(f"epoch {secrets.epoch} does not follow {self._newest.epoch}")
        self._newest = secrets
        self._epoch_due = now + REKEY_DEADLINE_S
        self._answer_if_known(now)
        self._offer_if_due(now)

    def tick(self, now: float) -> None:
        """Let time pass: ask for new keys when they are due.

        Raises:
            LinkRefused: The other side has let a change of keys wait for too long.
        """
        if self._failure is not None:
            raise self._failure
        for due in (self._change_due, self._epoch_due):
            if due is not None and now >= due:
                problem = f"it did not change keys within {REKEY_DEADLINE_S:g} s"
                self._failure = LinkRefused(peer=self.remote, problem=problem)
                raise self._failure
        self._offer_if_due(now)

    # --- changing keys ---------------------------------------------------------------

    def _offer_if_due(self, now: float) -> None:
        """Propose new keys, unless they are fresh or a change is already under way."""
        if self._offer is not None or self._held is not None or self._change is not None:
            return
        lanes = (*self._senders.values(), *self._receivers.values())
        if (
            self._newest.epoch > self.epoch
            or now - self._keyed_at >= REKEY_INTERVAL_S
            or max(lane.counter for lane in lanes) >= REKEY_FRAMES
        ):
            self._offer = self._make_offer()
            self._say(Lane.CONTROL, _Message.OFFER, self._offer.proposal)
            self._change_due = now + REKEY_DEADLINE_S

    def _make_offer(self) -> _Offer:
        share = self._make_share()
        return _Offer(self._newest, share, pack_proposal(self._newest, share))

    def _derive(self, role: Role, own: _Offer, theirs: bytes) -> LinkKeys:
        keys = derive_keys(role, own.secrets, self.remote, own.share, own.proposal, theirs)
        if keys.prefill_codec is not self._keys.prefill_codec:
            raise self._invalid("it proposes another codec than before")
        return keys

    def _say(self, lane: Lane, message: _Message, content: bytes) -> None:
        outgoing = Outgoing(KEY_SHAPE, NO_ROWS, (bytes([message]), content))
        self._outgoing[lane] += self._senders[lane].seal(outgoing)
        self.has_outgoing = True

    def _on_key_frame(self, lane: Lane, frame: Frame, now: float) -> list[LinkEvent]:
        number, content = frame.payload[0], bytes(frame.payload[1:])
        if number not in _MESSAGE_BYTES or len(content) != _MESSAGE_BYTES[_Message(number)]:
            raise self._invalid(f"key message {number} of {len(content)} bytes")
        if number == _Message.SWITCH:
            return self._on_switch(lane, content, now)
        if lane is not Lane.CONTROL:
            raise self._invalid("a proposal of keys on a data lane")
        if number == _Message.OFFER:
            self._on_offer(content, now)
        else:
            self._on_answer(content)
        return []

    def _on_offer(self, content: bytes, now: float) -> None:
        proposal = self._check_proposal(content)
        if self._held is not None or proposal.epoch < self.epoch:
            raise self._invalid("an offer of keys out of turn")
        if self._offer is not None:
            own = (self._offer.secrets.epoch, self._keys.local)
            if own > (proposal.epoch, self.remote):
                return  # and the other side forgets it when it gets ours
            self._offer = None
        self._held = content
        self._change_due = now + REKEY_DEADLINE_S
        self._answer_if_known(now)

    def _answer_if_known(self, now: float) -> None:
        """Answer the offer that waits, once its epoch is known and the last change is through."""
        if self._held is None or self._change is not None:
            return
        epoch = parse_proposal(self._held).epoch
        if epoch > self._newest.epoch:
            return
        theirs, self._held = self._held, None
        if epoch < self._newest.epoch:
            self._offer_if_due(now)  # for the newest epoch, which theirs gives way to
            return
        own = self._make_offer()
        keys = self._derive("responder", own, theirs)
        self._change = _Change("responder", keys)
        confirmation = key_confirmation(keys.prk, "responder")
        self._say(Lane.CONTROL, _Message.ANSWER, own.proposal + confirmation)

    def _on_answer(self, content: bytes) -> None:
        theirs, confirmation = content[:PROPOSAL_BYTES], content[PROPOSAL_BYTES:]
        offer = self._offer
        if offer is None or self._check_proposal(theirs).epoch != offer.secrets.epoch:
            raise self._invalid("an answer to no offer of keys")
        keys = self._derive("initiator", offer, theirs)
        if not keys.confirms("responder", confirmation):
            raise self._invalid("the swarm secrets differ")
        self._offer = None
        self._change = _Change("initiator", keys)
        self._switch_sending(self._change)

    def _check_proposal(self, content: bytes) -> Proposal:
        proposal = parse_proposal(content)
        if proposal.swarm != self._keys.address.swarm:
            raise self._invalid("keys of another swarm")
        return proposal

    def _switch_sending(self, change: _Change) -> None:
        """Let each lane say its last under the old keys, and go on under the new ones."""
        for lane in sorted(change.sending):
            self._say(lane, _Message.SWITCH, key_confirmation(change.keys.prk, change.role))
            self._senders[lane].change_keys(change.keys)
        change.sending.clear()

    def _on_switch(self, lane: Lane, confirmation: bytes, now: float) -> list[LinkEvent]:
        change = self._change
        if change is None or lane not in change.receiving:
            raise self._invalid("a change to no new keys")
        other: Role = "initiator" if change.role == "responder" else "responder"
        if not change.keys.confirms(other, confirmation):
            raise self._invalid("the new keys differ")
        self._receivers[lane].change_keys(change.keys)
        change.receiving.discard(lane)
        self._switch_sending(change)
        return [] if change.receiving else [self._settle(change.keys, now)]

    def _settle(self, keys: LinkKeys, now: float) -> Rekeyed:
        """Forget the old keys; what has waited for this comes next."""
        self._keys, self._change, self._keyed_at = keys, None, now
        self._change_due = None if self._held is None else now + REKEY_DEADLINE_S
        if self.epoch == self._newest.epoch:
            self._epoch_due = None
        self._answer_if_known(now)
        self._offer_if_due(now)
        return Rekeyed(keys.address.epoch)

    def _invalid(self, problem: str) -> InvalidFrame:
        return InvalidFrame(peer=self.remote, problem=problem)


@lru_cache(maxsize=64)
def _with_codec(shape: FrameShape, codec: Codec) -> FrameShape:
    return replace(shape, codec=codec)
