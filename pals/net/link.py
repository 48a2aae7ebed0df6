"""The link protocol, sans-IO: one keyed handshake, then sealed frames on three lanes.

A link is the long-lived keyed state between two members. The initiator sends a hello,
the responder a welcome with its key confirmation, the initiator its own confirmation;
each side brings a fresh X25519 key and 16 random bytes, so no key ever repeats. All of
it runs inside Noise, which has already authenticated the two peer ids; the swarm secret
and both ids go into the keys, so a machine that lacks the secret gets no further.

Bytes of the handshake, integers big-endian::

    prefix       = "PALS" || wire version (1) || status (1)
    proposal     = swarm id (its first 16) || epoch (8) || random (16) || X25519 public key (32)
    hello        = prefix || proposal                               initiator
    welcome      = prefix || proposal || confirmation (32)          responder
    finish       = confirmation (32)                                initiator
    share        = random || X25519 public key

A responder that refuses answers with a prefix alone. Control frames follow the handshake
on its stream; the other lanes' streams begin with link id (16) || lane (1).

Nothing here reads a socket, a clock or randomness: callers pass bytes and keys in.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from pals.errors import LinkRefused, WireVersionMismatch
from pals.net.wire import (
    HEADER_BYTES,
    MAGIC,
    TAG_BYTES,
    WIRE_VERSION,
    Frame,
    FrameHead,
    FrameShape,
    Lane,
    LinkAddress,
    Outgoing,
    check_header,
    pack_header,
    pack_rows,
    parse_body,
)
from pals.swarm.keys import Role, frame_key, key_confirmation, link_id, link_prk
from pals.types import PeerId, SwarmId

NONCE_BYTES = 16
CONFIRMATION_BYTES = 32
_PROPOSAL = struct.Struct(">16sQ16s32s")
_SHARE = slice(24, 72)
_EPHEMERAL = slice(40, 72)
_PREFIX = struct.Struct(">4sBB")
PREFIX_BYTES = _PREFIX.size


class Status(IntEnum):
    """First answer of the responder; anything but OK ends the handshake."""

    OK = 0
    WRONG_VERSION = 1
    WRONG_SWARM = 2
    WRONG_EPOCH = 3


_STATUS_TEXT = {
    Status.WRONG_SWARM: "it belongs to another swarm",
    Status.WRONG_EPOCH: "it is in another epoch of the swarm secret",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSecrets:
    """What one side brings to every handshake; the repr shows no secret."""

    swarm_id: SwarmId
    epoch: int
    epoch_prk: bytes
    local: PeerId

    def __repr__(self) -> str:
        return f"LinkSecrets(swarm={self.swarm_id.hex()[:8]}, epoch={self.epoch})"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkKeys:
    """The outcome of a handshake: the link's address and its key-derivation key."""

    address: LinkAddress
    local: PeerId
    remote: PeerId
    prk: bytes

    def __repr__(self) -> str:
        return f"LinkKeys(link={self.address.link.hex()[:8]}, remote={self.remote[-8:]})"

    def sender(self, lane: Lane) -> LaneSender:
        return LaneSender(self, lane)

    def receiver(self, lane: Lane) -> LaneReceiver:
        return LaneReceiver(self, lane)


class Handshake:
    """One side of the link handshake.

    Drive it: send `take_outgoing()`, read exactly `wanted` bytes, pass them to
    `receive`, until `keys` is set. `receive` raises on anything unexpected and the
    caller must then close the stream; a responder still sends `take_outgoing()` first,
    which tells the other side why.
    """

    def __init__(
        self,
        role: Role,
        secrets: LinkSecrets,
        remote: PeerId,
        *,
        ephemeral: X25519PrivateKey,
        nonce: bytes,
    ) -> None:
        self._role: Role = role
        self._secrets = secrets
        self._remote = remote
        self._ephemeral = ephemeral
        self._own = _PROPOSAL.pack(
            secrets.swarm_id[:16],
            secrets.epoch,
            nonce,
            ephemeral.public_key().public_bytes_raw(),
        )
        self._outgoing = b""
        self._derived: LinkKeys | None = None
        self.keys: LinkKeys | None = None
        self._next = self._receive_prefix
        self.wanted = PREFIX_BYTES
        if role == "initiator":
            self._outgoing = _PREFIX.pack(MAGIC, WIRE_VERSION, Status.OK) + self._own

    def take_outgoing(self) -> bytes:
        data, self._outgoing = self._outgoing, b""
        return data

    def receive(self, data: bytes) -> None:
        """Take exactly `wanted` bytes.

        Raises:
            WireVersionMismatch: The other side speaks another wire version.
            LinkRefused: Another protocol, swarm, epoch or secret.
        """
        assert len(data) == self.wanted
        self._next(data)

    def _receive_prefix(self, data: bytes) -> None:
        magic, version, status = _PREFIX.unpack(data)
        if magic != MAGIC:
            raise self._refusal("it does not speak the link protocol")
        if version != WIRE_VERSION:
            self._outgoing = self._answer(Status.WRONG_VERSION)
            raise WireVersionMismatch(peer=self._remote, theirs=version, ours=WIRE_VERSION)
        if status != Status.OK:
            raise self._refusal(_STATUS_TEXT.get(status, f"it answered with status {status}"))
        self._next = self._receive_proposal
        self.wanted = _PROPOSAL.size
        if self._role == "initiator":
            self.wanted += CONFIRMATION_BYTES

    def _receive_proposal(self, data: bytes) -> None:
        theirs = data[: _PROPOSAL.size]
        swarm, epoch, _, _ = _PROPOSAL.unpack(theirs)
        if swarm != self._secrets.swarm_id[:16]:
            self._outgoing = self._answer(Status.WRONG_SWARM)
            raise self._refusal(_STATUS_TEXT[Status.WRONG_SWARM])
        if epoch != self._secrets.epoch:
            self._outgoing = self._answer(Status.WRONG_EPOCH)
            raise self._refusal(_STATUS_TEXT[Status.WRONG_EPOCH])
        self._derived = self._derive(theirs)
        own_confirmation = key_confirmation(self._derived.prk, self._role)
        if self._role == "initiator":
            self._check_confirmation("responder", data[_PROPOSAL.size :])
            self._outgoing = own_confirmation
            self.keys = self._derived
        else:
            self._outgoing = self._answer(Status.OK) + self._own + own_confirmation
            self._next = self._receive_confirmation
            self.wanted = CONFIRMATION_BYTES

    def _receive_confirmation(self, data: bytes) -> None:
        self._check_confirmation("initiator", data)
        self.keys = self._derived

    def _check_confirmation(self, role: Role, received: bytes) -> None:
        assert self._derived is not None
        if not hmac.compare_digest(key_confirmation(self._derived.prk, role), received):
            raise self._refusal("the swarm secrets differ")

    def _derive(self, theirs: bytes) -> LinkKeys:
        try:
            dh = self._ephemeral.exchange(X25519PublicKey.from_public_bytes(theirs[_EPHEMERAL]))
        except ValueError:
            raise self._refusal("its ephemeral key is degenerate") from None
        local, remote = self._secrets.local, self._remote
        if self._role == "initiator":
            (first, initiator), (second, responder) = (self._own, local), (theirs, remote)
        else:
            (first, initiator), (second, responder) = (theirs, remote), (self._own, local)
        prk = link_prk(
            self._secrets.epoch_prk, dh, first[_SHARE], second[_SHARE], initiator, responder
        )
        address = LinkAddress(
            swarm=self._secrets.swarm_id[:16], epoch=self._secrets.epoch, link=link_id(prk)
        )
        return LinkKeys(address=address, local=local, remote=remote, prk=prk)

    def _answer(self, status: Status) -> bytes:
        if self._role == "initiator":
            return b""
        return _PREFIX.pack(MAGIC, WIRE_VERSION, status)

    def _refusal(self, problem: str) -> LinkRefused:
        return LinkRefused(peer=self._remote, problem=problem)


class LaneSender:
    """Seals the frames of one lane in one direction; the counter is the nonce."""

    def __init__(self, keys: LinkKeys, lane: Lane) -> None:
        self._address = keys.address
        self._lane = lane
        self._key = frame_key(keys.prk, keys.local, keys.remote, lane)

    def seal(self, outgoing: Outgoing) -> bytes:
        """Return header and sealed body of the lane's next frame."""
        shape, row_count = outgoing.shape, len(outgoing.rows)
        body = b"".join((pack_rows(outgoing.rows), *outgoing.payload))
        header = pack_header(
            self._address, self._lane, self._key.counter, shape, row_count, len(body)
        )
        return header + self._key.seal(header, body)


class LaneReceiver:
    """Opens the frames of one lane in one direction, from bytes cut anywhere.

    After the first `InvalidFrame` the lane is dead and the caller drops the link: there
    is no second try for whoever probes it.
    """

    def __init__(self, keys: LinkKeys, lane: Lane) -> None:
        self._address = keys.address
        self._remote = keys.remote
        self._lane = lane
        self._key = frame_key(keys.prk, keys.remote, keys.local, lane)
        self._buffer = bytearray()
        self._head: FrameHead | None = None

    def receive(self, data: bytes, accepted: tuple[FrameShape, ...]) -> list[Frame]:
        """Add received bytes and return the frames that are now complete.

        Args:
            data: Bytes of the lane's stream, in order.
            accepted: The shapes this process takes on this lane.

        Raises:
            InvalidFrame: A header is not the expected one, or a body does not open.
        """
        self._buffer += data
        frames: list[Frame] = []
        while (frame := self._next_frame(accepted)) is not None:
            frames.append(frame)
        return frames

    def _next_frame(self, accepted: tuple[FrameShape, ...]) -> Frame | None:
        if len(self._buffer) < HEADER_BYTES:
            return None
        if self._head is None:
            self._head = check_header(
                bytes(self._buffer[:HEADER_BYTES]),
                peer=self._remote,
                address=self._address,
                lane=self._lane,
                counter=self._key.counter,
                accepted=accepted,
            )
        end = HEADER_BYTES + self._head.body_bytes + TAG_BYTES
        if len(self._buffer) < end:
            return None
        return self._open(self._head, end)

    def _open(self, head: FrameHead, end: int) -> Frame:
        with memoryview(self._buffer) as view:
            header = bytes(view[:HEADER_BYTES])
            sealed = bytes(view[HEADER_BYTES:end])
        frame = parse_body(self._remote, self._lane, head, self._key.open(header, sealed))
        # Only now: a frame that was refused stays first, so that the lane stays dead.
        del self._buffer[:end]
        self._head = None
        return frame
