"""Signed membership records and their one canonical encoding.

A record is a msgpack array that starts with its kind; a signature covers the label
``pals/1 record``, a zero byte, and the record with its signatures left empty. An `Entry`
wraps a record with the place and time that the backend gave it. What decodes but does not
encode to the same bytes again is refused, so that one record has one hash.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from pals.errors import InvalidRecord
from pals.swarm.encoding import decode_strict
from pals.swarm.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, verify
from pals.swarm.kdf import VERSION
from pals.types import SwarmId

MAX_RECORD_BYTES = 4096
MAX_INVITE_USES = 512
MAX_EPOCH = 1 << 31
MAX_NOTE_CHARS = 200

Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
UnixSeconds = Annotated[int, Meta(ge=0, lt=1 << 40)]
Name = Annotated[str, Meta(min_length=1, max_length=100)]
ModelName = Annotated[str, Meta(min_length=1, max_length=200)]
Note = Annotated[str, Meta(max_length=MAX_NOTE_CHARS)]
Appointment = Literal["admin", "backend", "none"]

_LABEL = VERSION + b"record\0"


class _Canonical(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An array without field names, in which nothing may be left over."""


class Genesis(_Canonical, frozen=True, kw_only=True, tag="genesis"):
    """The first record: its hash is the swarm id, its operator key the authority.

    Attributes:
        name: What people call the swarm.
        model: The model it is made for.
        created_at: Unix seconds, by the operator's clock.
        operator: Ed25519 key that signs invites, removals, epochs and appointments.
        peer: Ed25519 identity of the operator's own machine, a member from the start.
        exchange: X25519 key of that machine.
        commitment: Of the first swarm secret; see `pals.swarm.keys.secret_commitment`.
        operator_signature: By ``operator``.
        peer_signature: By ``peer``.
    """

    name: Name
    model: ModelName
    created_at: UnixSeconds
    operator: Key
    peer: Key
    exchange: Key
    commitment: Hash
    operator_signature: Signature = b""
    peer_signature: Signature = b""


class InviteCertificate(_Canonical, frozen=True, kw_only=True, tag="invite"):
    """An administrator's word that whoever holds the invite key may admit peers.

    Attributes:
        swarm_id: Swarm it belongs to.
        invite: Ed25519 key that signs joins.
        redeem_hash: SHA-256 of what a joiner shows to the backend.
        max_uses: Joins it allows.
        not_after: Unix seconds after which it admits nobody; 0 is never.
        note: A reminder; members and the backend can read it.
        signer: Key of the operator or an admin.
        signature: By ``signer``.
    """

    swarm_id: Hash
    invite: Key
    redeem_hash: Hash
    max_uses: Annotated[int, Meta(ge=1, le=MAX_INVITE_USES)]
    not_after: UnixSeconds
    note: Note = ""
    signer: Key = b""
    signature: Signature = b""


class Revoke(_Canonical, frozen=True, kw_only=True, tag="revoke"):
    """The end of an invite; who came by it stays a member.

    Attributes:
        swarm_id: Swarm it belongs to.
        invite: Key of the certificate.
        created_at: Unix seconds, by the signer's clock.
        signer: Key of the operator or an admin.
        signature: By ``signer``.
    """

    swarm_id: Hash
    invite: Key
    created_at: UnixSeconds
    signer: Key = b""
    signature: Signature = b""


class Join(_Canonical, frozen=True, kw_only=True, tag="join"):
    """A machine's entry, signed by the invite it used and by its own identity.

    Attributes:
        swarm_id: Swarm it joins.
        invite: Key of the certificate it used.
        peer: Ed25519 identity of the machine.
        exchange: X25519 key to which members seal secrets for it.
        invite_signature: By ``invite``.
        peer_signature: By ``peer``.
    """

    swarm_id: Hash
    invite: Key
    peer: Key
    exchange: Key
    invite_signature: Signature = b""
    peer_signature: Signature = b""


class Remove(_Canonical, frozen=True, kw_only=True, tag="remove"):
    """The end of a membership, by the operator's or an admin's will.

    Attributes:
        swarm_id: Swarm it is removed from.
        peer: Identity of the machine.
        joined: Hash of the record that made it a member, so that this record cannot be
            used again after a later invitation.
        created_at: Unix seconds, by the signer's clock.
        signer: Key of the operator or an admin.
        signature: By ``signer``.
    """

    swarm_id: Hash
    peer: Key
    joined: Hash
    created_at: UnixSeconds
    signer: Key = b""
    signature: Signature = b""


class Leave(_Canonical, frozen=True, kw_only=True, tag="leave"):
    """The end of a membership, by the machine's own will.

    Attributes:
        swarm_id: Swarm it leaves.
        peer: Identity of the machine.
        joined: Hash of the record that made it a member.
        signature: By ``peer``.
    """

    swarm_id: Hash
    peer: Key
    joined: Hash
    signature: Signature = b""


class Epoch(_Canonical, frozen=True, kw_only=True, tag="epoch"):
    """The start of a new swarm secret, which the record itself does not hold.

    Attributes:
        swarm_id: Swarm it belongs to.
        number: One more than the epoch before.
        commitment: Of the new secret; see `pals.swarm.keys.secret_commitment`.
        created_at: Unix seconds, by the signer's clock.
        signer: Key of the operator or an admin.
        signature: By ``signer``.
    """

    swarm_id: Hash
    number: Annotated[int, Meta(ge=1, lt=MAX_EPOCH)]
    commitment: Hash
    created_at: UnixSeconds
    signer: Key = b""
    signature: Signature = b""


class Appoint(_Canonical, frozen=True, kw_only=True, tag="appoint"):
    """What another key may do, by the operator's will alone.

    Attributes:
        swarm_id: Swarm it holds for.
        key: Ed25519 key that is appointed: a member's identity, or a backend's key.
        role: ``admin`` signs invites, removals and epochs and renews the list's freshness;
            ``backend`` only renews freshness; ``none`` ends what was said before.
        created_at: Unix seconds, by the operator's clock.
        signer: Key of the operator.
        signature: By ``signer``.
    """

    swarm_id: Hash
    key: Key
    role: Appointment
    created_at: UnixSeconds
    signer: Key = b""
    signature: Signature = b""


AdminRecord = InviteCertificate | Revoke | Remove | Epoch | Appoint
"""What the operator signs, and but for appointments an admin too."""

Record = Genesis | Join | Leave | AdminRecord


class Entry(_Canonical, frozen=True, kw_only=True):
    """A record in its place in the chain.

    Attributes:
        seq: 0 for the genesis, then one more each.
        previous: SHA-256 of the entry before, zeros for the genesis.
        received_at: Unix seconds, by the backend's clock.
        record: The signed record.
    """

    seq: Annotated[int, Meta(ge=0, lt=1 << 31)]
    previous: Hash
    received_at: UnixSeconds
    record: Annotated[bytes, Meta(max_length=MAX_RECORD_BYTES)]


NO_ENTRY = bytes(32)
MAX_ENTRY_BYTES = MAX_RECORD_BYTES + 128

_A = TypeVar("_A", bound=AdminRecord)


def encode(value: Record | Entry) -> bytes:
    """Return the canonical bytes."""
    return msgspec.msgpack.encode(value)


def digest(data: bytes) -> bytes:
    """Return the SHA-256 by which records and entries refer to each other."""
    return hashlib.sha256(data).digest()


def decode_record(data: bytes) -> Record:
    """Read one record; its signatures are not checked here.

    Raises:
        InvalidRecord: Too long, malformed, not canonical, or a field out of its range.
    """
    record = decode_strict(_RECORD_DECODER, data, kind="record", max_bytes=MAX_RECORD_BYTES)
    for text in _texts(record):
        if not text.isprintable():
            raise InvalidRecord(kind=kind_of(record), problem="a text holds control characters")
    return record


def decode_entry(data: bytes) -> Entry:
    """Read one entry, without its record.

    Raises:
        InvalidRecord: Too long, malformed or not canonical.
    """
    return decode_strict(_ENTRY_DECODER, data, kind="entry", max_bytes=MAX_ENTRY_BYTES)


def kind_of(record: Record) -> str:
    """Return the word that errors use for this kind of record."""
    return str(type(record).__struct_config__.tag)


def sign_genesis(genesis: Genesis, *, operator: Identity, peer: Identity) -> Genesis:
    """Return ``genesis`` with both signatures."""
    data = signed_part(genesis)
    return replace(genesis, operator_signature=operator.sign(data), peer_signature=peer.sign(data))


def sign_by(record: _A, signer: Identity) -> _A:
    """Return ``record`` with the key and the signature of the operator or an admin."""
    record = replace(record, signer=signer.public_key)
    return replace(record, signature=signer.sign(signed_part(record)))


def sign_leave(leave: Leave, *, peer: Identity) -> Leave:
    """Return ``leave`` with its signature."""
    return replace(leave, signature=peer.sign(signed_part(leave)))


def sign_join(join: Join, *, invite: Identity, peer: Identity) -> Join:
    """Return ``join`` with both signatures."""
    data = signed_part(join)
    return replace(join, invite_signature=invite.sign(data), peer_signature=peer.sign(data))


def signed_part(record: Record) -> bytes:
    """Return the bytes that every signature of ``record`` covers."""
    blank = {name: b"" for name in record.__struct_fields__ if name.endswith("signature")}
    return _LABEL + encode(replace(record, **blank))


def check_signature(record: Record, signature: bytes, public_key: bytes, signer: str) -> None:
    """Raise unless ``signature`` is ``public_key``'s over ``record``.

    Raises:
        InvalidRecord: It is not; ``signer`` names whose it should be.
    """
    if not verify(public_key, signature, signed_part(record)):
        raise InvalidRecord(kind=kind_of(record), problem=f"not signed by {signer}")


def check_join(join: Join, swarm_id: SwarmId) -> None:
    """Check what a join proves by itself: its swarm, its invite key, its identity.

    Raises:
        InvalidRecord: For another swarm, or not signed by both keys.
    """
    if join.swarm_id != swarm_id:
        raise InvalidRecord(kind="join", problem="it is for another swarm")
    check_signature(join, join.invite_signature, join.invite, "the invite")
    check_signature(join, join.peer_signature, join.peer, "the peer itself")


_RECORD_DECODER: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)
_ENTRY_DECODER = msgspec.msgpack.Decoder(Entry)


def _texts(record: Record) -> tuple[str, ...]:
    match record:
        case Genesis(name=name, model=model):
            return (name, model)
        case InviteCertificate(note=note):
            return (note,)
        case _:
            return ()
