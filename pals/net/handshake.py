"""The handshake of a link, sans-IO: two peers agree on fresh keys.

A link is the long-lived keyed state between two members. The initiator sends a hello,
the responder a welcome with its key confirmation, the initiator its own confirmation;
each side brings a fresh X25519 key and 16 random bytes, so no key ever repeats. All of
it runs inside Noise, which has already authenticated the two peer ids; the swarm secret
and both ids go into the keys, so a machine that lacks the secret gets no further.

Bytes of the handshake, integers big-endian::

    prefix       = "PALS" || wire version (1) || status (1)
    share        = random (16) || X25519 public key (32) || prefill codec (1)
    proposal     = swarm id (its first 16) || epoch (8) || share
    hello        = prefix || proposal                               initiator
    welcome      = prefix || proposal || confirmation (32)          responder
    finish       = confirmation (32)                                initiator

A responder that refuses answers with a prefix alone. The link uses the prefill codec
that both propose, and raw elements if they differ. Control frames follow the handshake
on its stream; the other lanes' streams begin with link id (16) || lane (1).

Nothing here reads a socket, a clock or randomness: callers pass bytes and keys in.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from pals.errors import LinkRefused, OtherEpoch, WireVersionMismatch
from pals.net.wire import MAGIC, WIRE_VERSION, Codec, LinkAddress
from pals.swarm.keys import Role, key_confirmation, link_id, link_prk
from pals.types import PeerId, SwarmId

NONCE_BYTES = 16
CONFIRMATION_BYTES = 32
_PREFIX = struct.Struct(">4sBB")
_PROPOSAL = struct.Struct(">16sQ16s32sB")
_SHARE = slice(24, None)
PREFIX_BYTES = _PREFIX.size
PROPOSAL_BYTES = _PROPOSAL.size


class Status(IntEnum):
    """First answer of the responder; anything but OK ends the handshake."""

    OK = 0
    WRONG_VERSION = 1
    WRONG_SWARM = 2
    WRONG_EPOCH = 3


_STATUS_TEXT = {Status.WRONG_SWARM: "it belongs to another swarm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSecrets:
    """What one side brings to every key agreement; the repr shows no secret."""

    swarm_id: SwarmId
    epoch: int
    epoch_prk: bytes
    local: PeerId
    prefill_codec: Codec = Codec.RAW

    def __repr__(self) -> str:
        return f"LinkSecrets(swarm={self.swarm_id.hex()[:8]}, epoch={self.epoch})"


@dataclass(frozen=True, slots=True)
class KeyShare:
    """What one side brings to one key agreement: fresh each time; the repr shows no key."""

    ephemeral: X25519PrivateKey
    nonce: bytes

    def __repr__(self) -> str:
        return "KeyShare(…)"


class Proposal(NamedTuple):
    """What the other side sees of a share, and what it is for."""

    swarm: bytes
    epoch: int
    nonce: bytes
    public_key: bytes
    prefill_codec: int


def pack_proposal(secrets: LinkSecrets, share: KeyShare) -> bytes:
    """Return the `PROPOSAL_BYTES` that offer a share to the other side."""
    return _PROPOSAL.pack(
        secrets.swarm_id[:16],
        secrets.epoch,
        share.nonce,
        share.ephemeral.public_key().public_bytes_raw(),
        secrets.prefill_codec,
    )


def parse_proposal(data: bytes) -> Proposal:
    """Split `PROPOSAL_BYTES` into fields; none of them is checked."""
    return Proposal(*_PROPOSAL.unpack(data))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkKeys:
    """The outcome of a key agreement: the link's address and its key-derivation key."""

    address: LinkAddress
    local: PeerId
    remote: PeerId
    prk: bytes
    prefill_codec: Codec = Codec.RAW

    def __repr__(self) -> str:
        return f"LinkKeys(link={self.address.link.hex()[:8]}, remote={self.remote[-8:]})"

    def confirms(self, role: Role, received: bytes) -> bool:
        """Return whether ``received`` shows that ``role`` derived these keys too."""
        return hmac.compare_digest(key_confirmation(self.prk, role), received)


def derive_keys(
    role: Role, secrets: LinkSecrets, remote: PeerId, share: KeyShare, own: bytes, theirs: bytes
) -> LinkKeys:
    """Return the keys that both sides derive from their two proposals.

    Args:
        role: Of this side in this agreement.
        secrets: Of the epoch that both proposals name.
        remote: The other side, as Noise proved it.
        share: What ``own`` offers.
        own: The proposal of this side.
        theirs: The proposal of the other side.

    Raises:
        LinkRefused: The other side's X25519 key is degenerate.
    """
    proposal = parse_proposal(theirs)
    try:
        dh = share.ephemeral.exchange(X25519PublicKey.from_public_bytes(proposal.public_key))
    except ValueError:
        raise LinkRefused(peer=remote, problem="its ephemeral key is degenerate") from None
    sides = [(own, secrets.local), (theirs, remote)]
    (first, initiator), (second, responder) = sides if role == "initiator" else sides[::-1]
    prk = link_prk(secrets.epoch_prk, dh, first[_SHARE], second[_SHARE], initiator, responder)
    agreed = proposal.prefill_codec == secrets.prefill_codec
    return LinkKeys(
        address=LinkAddress(swarm=secrets.swarm_id[:16], epoch=secrets.epoch, link=link_id(prk)),
        local=secrets.local,
        remote=remote,
        prk=prk,
        prefill_codec=secrets.prefill_codec if agreed else Codec.RAW,
    )


class Handshake:
    """One side of the link handshake.

    Drive it: send `take_outgoing()`, read exactly `wanted` bytes, pass them to
    `receive`, until `keys` is set. `receive` raises on anything unexpected and the
    caller must then close the stream; a responder still sends `take_outgoing()` first,
    which tells the other side why.
    """

    def __init__(
        self, role: Role, secrets: LinkSecrets, remote: PeerId, *, share: KeyShare
    ) -> None:
        self._role: Role = role
        self._secrets = secrets
        self._remote = remote
        self._share = share
        self._own = pack_proposal(secrets, share)
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
            OtherEpoch: The other side holds the secret of another epoch.
            LinkRefused: Another protocol, swarm or secret.
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
        if status == Status.WRONG_EPOCH:
            raise self._other_epoch()
        if status != Status.OK:
            raise self._refusal(_STATUS_TEXT.get(status, f"it answered with status {status}"))
        self._next = self._receive_proposal
        self.wanted = PROPOSAL_BYTES
        if self._role == "initiator":
            self.wanted += CONFIRMATION_BYTES

    def _receive_proposal(self, data: bytes) -> None:
        theirs = data[:PROPOSAL_BYTES]
        proposal = parse_proposal(theirs)
        if proposal.swarm != self._secrets.swarm_id[:16]:
            self._outgoing = self._answer(Status.WRONG_SWARM)
            raise self._refusal(_STATUS_TEXT[Status.WRONG_SWARM])
        if proposal.epoch != self._secrets.epoch:
            self._outgoing = self._answer(Status.WRONG_EPOCH)
            raise self._other_epoch()
        self._derived = derive_keys(
            self._role, self._secrets, self._remote, self._share, self._own, theirs
        )
        own_confirmation = key_confirmation(self._derived.prk, self._role)
        if self._role == "initiator":
            self._check_confirmation("responder", data[PROPOSAL_BYTES:])
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
        if not self._derived.confirms(role, received):
            raise self._refusal("the swarm secrets differ")

    def _answer(self, status: Status) -> bytes:
        if self._role == "initiator":
            return b""
        return _PREFIX.pack(MAGIC, WIRE_VERSION, status)

    def _refusal(self, problem: str) -> LinkRefused:
        return LinkRefused(peer=self._remote, problem=problem)

    def _other_epoch(self) -> OtherEpoch:
        problem = "it is in another epoch of the swarm secret"
        return OtherEpoch(peer=self._remote, problem=problem)
