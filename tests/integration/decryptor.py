"""A second implementation of the links' encryption, for what `wiretap` recorded.

Written from the docstrings of `pals.swarm.kdf`, `pals.swarm.keys`, `pals.net.handshake`,
`pals.net.link` and `pals.net.wire` alone. It imports nothing of Pals, so that no mistake
is shared with it.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

Role = Literal["initiator", "responder"]

CONTROL, DECODE, PREFILL = range(3)
KIND_CONTROL, KIND_TOKENS, KIND_HIDDEN, KIND_SAMPLED, KIND_KEY = range(5)
KEY_OFFER, KEY_ANSWER, KEY_SWITCH = range(1, 4)
DTYPE_NONE, DTYPE_INT32, DTYPE_BF16, DTYPE_F32 = range(4)
FLAG_LAST = 1

_PREFIX = struct.Struct(">4s B B")
_PROPOSAL = struct.Struct(">16s Q 16s 32s B")
_HEADER = struct.Struct(">4s B B B B B 16s Q 16s Q 32s H H I")
_ROW = struct.Struct(">16s I H H")
_CONFIRMATION_BYTES = 32
_LINK_ID_BYTES = 16
_TAG_BYTES = 16
HEADER_BYTES = _HEADER.size


class RecordedStream(Protocol):
    """Both directions of one stream, complete."""

    protocol: str
    opener: str
    acceptor: str
    from_opener: bytes
    from_acceptor: bytes


def extract(salt: bytes, material: bytes) -> bytes:
    return hmac.digest(salt, material, hashlib.sha256)


def expand(prk: bytes, label: bytes, context: bytes = b"", length: int = 32) -> bytes:
    info = b"pals/1 " + label + b"\0" + context
    blocks = [b""]
    while 32 * (len(blocks) - 1) < length:
        blocks.append(hmac.digest(prk, blocks[-1] + info + bytes([len(blocks)]), hashlib.sha256))
    return b"".join(blocks)[:length]


def length_prefixed(*fields: bytes) -> bytes:
    return b"".join(len(field).to_bytes(2, "big") + field for field in fields)


def derive_link_prk(
    swarm_id: bytes,
    epoch: int,
    secret: bytes,
    dh: bytes,
    shares: tuple[bytes, bytes],
    peers: tuple[str, str],
) -> bytes:
    """Return the link's key; shares and peers are the initiator's, then the responder's."""
    salt = hashlib.sha256(b"pals/1 epoch" + swarm_id + epoch.to_bytes(8, "big")).digest()
    epoch_prk = extract(salt, secret)
    initiator, responder = (peer.encode() for peer in peers)
    transcript = hashlib.sha256(length_prefixed(*shares, initiator, responder)).digest()
    return extract(expand(epoch_prk, b"link salt"), dh + transcript)


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one side of a key agreement shows the other."""

    swarm: bytes
    epoch: int
    nonce: bytes
    public_key: bytes
    codec: int

    @property
    def share(self) -> bytes:
        return self.nonce + self.public_key + bytes([self.codec])


@dataclass(slots=True, kw_only=True)
class Agreement:
    """What two sides told each other on the way to one set of keys.

    The first of a link was in the clear, the later ones were in sealed frames.
    """

    initiator: str
    responder: str
    offer: Proposal
    answer: Proposal
    confirmations: tuple[bytes, bytes]
    """The initiator's, then the responder's."""


@dataclass(frozen=True, slots=True)
class Header:
    """A frame's header, field by field."""

    magic: bytes
    version: int
    lane: int
    kind: int
    dtype: int
    codec: int
    swarm: bytes
    epoch: int
    link: bytes
    counter: int
    manifest: bytes
    boundary: int
    row_count: int
    body_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """One session's part of a frame."""

    session: bytes
    position: int
    num_tokens: int
    flags: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedFrame:
    """A frame as it was on the wire, and where.

    ``generation`` counts the keys of its link, ``number`` the frames under one key.
    """

    sender: str
    receiver: str
    lane: int
    generation: int
    number: int
    aad: bytes
    sealed: bytes

    @property
    def header(self) -> Header:
        return Header(*_HEADER.unpack(self.aad))


@dataclass(frozen=True, slots=True)
class OpenFrame:
    """A frame that opened."""

    wire: SealedFrame
    key: bytes
    nonce: bytes
    body: bytes

    @property
    def header(self) -> Header:
        return self.wire.header

    @property
    def rows(self) -> tuple[Row, ...]:
        table = self.body[: self.header.row_count * _ROW.size]
        return tuple(Row(*fields) for fields in _ROW.iter_unpack(table))

    @property
    def payload(self) -> bytes:
        return self.body[self.header.row_count * _ROW.size :]


class LinkKeys:
    """The keys of one agreement, from the swarm secret and one side's ephemeral private key."""

    def __init__(
        self, agreement: Agreement, swarm_id: bytes, secret: bytes, role: Role, private_key: bytes
    ) -> None:
        other = agreement.answer if role == "initiator" else agreement.offer
        own = X25519PrivateKey.from_private_bytes(private_key)
        self.prk = derive_link_prk(
            swarm_id,
            agreement.offer.epoch,
            secret,
            own.exchange(X25519PublicKey.from_public_bytes(other.public_key)),
            (agreement.offer.share, agreement.answer.share),
            (agreement.initiator, agreement.responder),
        )
        self.link_id = expand(self.prk, b"link id", length=_LINK_ID_BYTES)
        self.confirmations = (
            expand(self.prk, b"confirm", b"initiator"),
            expand(self.prk, b"confirm", b"responder"),
        )
        self._lanes: dict[tuple[str, str, int], tuple[bytes, int]] = {}

    def open(self, frame: SealedFrame) -> OpenFrame | None:
        """Return the frame, or None when it does not open under these keys."""
        key, iv = self._lane(frame.sender, frame.receiver, frame.lane)
        nonce = (iv ^ frame.number).to_bytes(12, "big")
        try:
            body = AESGCM(key).decrypt(nonce, frame.sealed, frame.aad)
        except InvalidTag:
            return None
        return OpenFrame(frame, key, nonce, body)

    def _lane(self, sender: str, receiver: str, lane: int) -> tuple[bytes, int]:
        if (sender, receiver, lane) not in self._lanes:
            context = length_prefixed(sender.encode(), receiver.encode(), bytes([lane]))
            material = expand(self.prk, b"frame", context, 44)
            self._lanes[sender, receiver, lane] = (
                material[:32],
                int.from_bytes(material[32:], "big"),
            )
        return self._lanes[sender, receiver, lane]


@dataclass(slots=True)
class Link:
    """One recorded link: its agreements, the keys of each, and every frame of its lanes."""

    agreements: list[Agreement]
    keys: list[LinkKeys]
    frames: list[SealedFrame]

    def open(self, frame: SealedFrame) -> OpenFrame | None:
        return self.keys[frame.generation].open(frame)


@dataclass(frozen=True, slots=True)
class Secrets:
    """All that the second implementation is given.

    Attributes:
        swarm_id: 32 bytes.
        epochs: The swarm secret of each epoch.
        private_keys: Ephemeral private keys by their public keys.
    """

    swarm_id: bytes
    epochs: dict[int, bytes]
    private_keys: dict[bytes, bytes]

    def keys_of(self, agreement: Agreement) -> LinkKeys:
        private_key = self.private_keys[agreement.offer.public_key]
        secret = self.epochs[agreement.offer.epoch]
        return LinkKeys(agreement, self.swarm_id, secret, "initiator", private_key)


def read_links(streams: Sequence[RecordedStream], secrets: Secrets) -> list[Link]:
    """Sort recorded bytes into handshakes and frames; nothing may be left over.

    Args:
        streams: Every stream of the recording.
        secrets: What opens them.

    Raises:
        ValueError: Bytes that are no part of a handshake or of a whole frame.
    """
    links: dict[bytes, Link] = {}
    for stream in (s for s in streams if s.protocol == "/pals/link"):
        agreement, from_opener, from_acceptor = _read_handshake(stream)
        keys = secrets.keys_of(agreement)
        links[keys.link_id] = Link([agreement], [keys], [])
        _read_control(stream, links[keys.link_id], secrets, from_opener, from_acceptor)
    for stream in (s for s in streams if s.protocol != "/pals/link"):
        if stream.protocol != "/pals/lane" or len(stream.from_opener) <= _LINK_ID_BYTES:
            raise ValueError(f"not a lane: {stream}")
        link_id, lane = stream.from_opener[:_LINK_ID_BYTES], stream.from_opener[_LINK_ID_BYTES]
        rest = stream.from_opener[_LINK_ID_BYTES + 1 :]
        for sender, receiver, data in (
            (stream.opener, stream.acceptor, rest),
            (stream.acceptor, stream.opener, stream.from_acceptor),
        ):
            reader = _LaneReader(sender, receiver, lane, data)
            for frame in iter(reader.read, None):
                links[link_id].frames.append(frame)
                if frame.header.kind == KIND_KEY:  # on these lanes it can only be a switch
                    reader.switch()
    return list(links.values())


def _read_handshake(stream: RecordedStream) -> tuple[Agreement, bytes, bytes]:
    """Return the handshake and what each side wrote after it."""
    start = _PREFIX.size
    cut = start + _PROPOSAL.size
    end = cut + _CONFIRMATION_BYTES
    from_opener, from_acceptor = stream.from_opener, stream.from_acceptor
    if min(len(from_opener), len(from_acceptor)) < end:
        raise ValueError("half a handshake")
    if {_PREFIX.unpack(data[:start]) for data in (from_opener, from_acceptor)} != {(b"PALS", 3, 0)}:
        raise ValueError("no handshake of wire version 3")
    agreement = Agreement(
        initiator=stream.opener,
        responder=stream.acceptor,
        offer=Proposal(*_PROPOSAL.unpack(from_opener[start:cut])),
        answer=Proposal(*_PROPOSAL.unpack(from_acceptor[start:cut])),
        confirmations=(from_opener[cut:end], from_acceptor[cut:end]),
    )
    return agreement, from_opener[end:], from_acceptor[end:]


def _read_control(
    stream: RecordedStream, link: Link, secrets: Secrets, from_opener: bytes, from_acceptor: bytes
) -> None:
    """Read both directions of a control lane, following its changes of keys.

    A direction is read up to its switch to keys of which the answer, in one of the
    directions, has not been read yet; then the other has its turn.
    """
    readers = [
        _LaneReader(stream.opener, stream.acceptor, CONTROL, from_opener),
        _LaneReader(stream.acceptor, stream.opener, CONTROL, from_acceptor),
    ]
    messages = _KeyMessages()
    while any(reader.data for reader in readers):
        before = sum(len(reader.data) for reader in readers)
        for reader in readers:
            while len(link.keys) > reader.generation and (frame := reader.read()) is not None:
                link.frames.append(frame)
                opened = link.open(frame)
                if opened is None:
                    raise ValueError(f"frame {frame.number} of the control lane does not open")
                if opened.header.kind == KIND_KEY:
                    _follow(reader, link, secrets, messages, opened.body)
        if before == sum(len(reader.data) for reader in readers):
            raise ValueError("a switch to keys that nobody agreed on")
    for reader in readers:
        for agreement, content in zip(link.agreements[1:], reader.confirmations, strict=True):
            if reader.sender == agreement.initiator:
                agreement.confirmations = (content, agreement.confirmations[1])
            elif content != agreement.confirmations[1]:
                raise ValueError("the answer and the switch confirm different keys")


def _follow(
    reader: _LaneReader, link: Link, secrets: Secrets, messages: _KeyMessages, body: bytes
) -> None:
    message, content = body[0], body[1:]
    if message == KEY_SWITCH:
        reader.switch()
        reader.confirmations.append(content)
        return
    (messages.offers if message == KEY_OFFER else messages.answers)[reader.sender] = content
    agreement = messages.match()
    if agreement is not None:
        link.agreements.append(agreement)
        link.keys.append(secrets.keys_of(agreement))


@dataclass(slots=True)
class _KeyMessages:
    """Offers and answers by their senders, of a change of keys that is not complete."""

    offers: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, bytes] = field(default_factory=dict)

    def match(self) -> Agreement | None:
        """Return the agreement once its offer and its answer were read, in whatever order."""
        for (responder, answer), (initiator, offer) in product(
            self.answers.items(), self.offers.items()
        ):
            if initiator != responder:
                self.answers.clear()
                self.offers.clear()  # of two that crossed, the other is forgotten
                return Agreement(
                    initiator=initiator,
                    responder=responder,
                    offer=Proposal(*_PROPOSAL.unpack(offer)),
                    answer=Proposal(*_PROPOSAL.unpack(answer[: _PROPOSAL.size])),
                    confirmations=(b"", answer[_PROPOSAL.size :]),
                )
        return None


@dataclass(slots=True)
class _LaneReader:
    """Cuts one direction of one lane into frames and counts them."""

    sender: str
    receiver: str
    lane: int
    data: bytes
    generation: int = 0
    number: int = 0
    confirmations: list[bytes] = field(default_factory=list)

    def read(self) -> SealedFrame | None:
        """Return the next frame, or None at the end."""
        if not self.data:
            return None
        aad = self.data[:HEADER_BYTES]
        if len(aad) < HEADER_BYTES:
            raise ValueError(f"{len(self.data)} bytes are left over")
        end = HEADER_BYTES + Header(*_HEADER.unpack(aad)).body_bytes + _TAG_BYTES
        if len(self.data) < end:
            raise ValueError(f"{len(self.data)} bytes of a frame of {end}")
        frame = SealedFrame(
            sender=self.sender,
            receiver=self.receiver,
            lane=self.lane,
            generation=self.generation,
            number=self.number,
            aad=aad,
            sealed=self.data[HEADER_BYTES:end],
        )
        self.number, self.data = self.number + 1, self.data[end:]
        return frame

    def switch(self) -> None:
        """Count on under the next keys."""
        self.generation, self.number = self.generation + 1, 0
