"""A second implementation of the links' encryption, for what `wiretap` recorded.

Written from the docstrings of `pals.swarm.kdf`, `pals.swarm.keys`, `pals.net.handshake`,
`pals.net.link` and `pals.net.wire` alone. It imports nothing of Pals, so that no mistake
is shared with it.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

Role = Literal["initiator", "responder"]

CONTROL, DECODE, PREFILL = range(3)
KIND_CONTROL, KIND_TOKENS, KIND_HIDDEN, KIND_SAMPLED = range(4)
DTYPE_NONE, DTYPE_INT32, DTYPE_BF16, DTYPE_F32 = range(4)
FLAG_LAST = 1

_GREETING = struct.Struct(">4s B B 16s Q 16s 32s B")
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
class Greeting:
    """A hello, or what of a welcome is alike."""

    magic: bytes
    version: int
    status: int
    swarm: bytes
    epoch: int
    nonce: bytes
    public_key: bytes
    codec: int

    @property
    def share(self) -> bytes:
        return self.nonce + self.public_key + bytes([self.codec])


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake:
    """What the two sides of a link told each other in the clear."""

    initiator: str
    responder: str
    hello: Greeting
    welcome: Greeting
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
    """A frame as it was on the wire, and where: ``number`` counts on its lane, one way."""

    sender: str
    receiver: str
    lane: int
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
    """The keys of one link, from the swarm secret and one side's ephemeral private key."""

    def __init__(
        self, handshake: Handshake, swarm_id: bytes, secret: bytes, role: Role, private_key: bytes
    ) -> None:
        other = handshake.welcome if role == "initiator" else handshake.hello
        own = X25519PrivateKey.from_private_bytes(private_key)
        self.prk = derive_link_prk(
            swarm_id,
            handshake.hello.epoch,
            secret,
            own.exchange(X25519PublicKey.from_public_bytes(other.public_key)),
            (handshake.hello.share, handshake.welcome.share),
            (handshake.initiator, handshake.responder),
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


@dataclass(frozen=True, slots=True)
class Link:
    """One recorded link: its handshake and every frame of its three lanes."""

    handshake: Handshake
    keys: LinkKeys
    frames: list[SealedFrame]


def read_links(
    streams: Sequence[RecordedStream],
    swarm_id: bytes,
    secret: bytes,
    private_keys: dict[bytes, bytes],
) -> list[Link]:
    """Sort recorded bytes into handshakes and frames; nothing may be left over.

    Args:
        streams: Every stream of the recording.
        swarm_id: 32 bytes.
        secret: The swarm secret.
        private_keys: Ephemeral private keys by their public keys.

    Raises:
        ValueError: Bytes that are no part of a handshake or of a whole frame.
    """
    links: dict[bytes, Link] = {}
    for stream in (s for s in streams if s.protocol == "/pals/link"):
        handshake, from_opener, from_acceptor = _read_handshake(stream)
        private_key = private_keys[handshake.hello.public_key]
        keys = LinkKeys(handshake, swarm_id, secret, "initiator", private_key)
        frames = _split_both(stream, CONTROL, from_opener, from_acceptor)
        links[keys.link_id] = Link(handshake, keys, frames)
    for stream in (s for s in streams if s.protocol != "/pals/link"):
        if stream.protocol != "/pals/lane" or len(stream.from_opener) <= _LINK_ID_BYTES:
            raise ValueError(f"not a lane: {stream}")
        link_id, lane = stream.from_opener[:_LINK_ID_BYTES], stream.from_opener[_LINK_ID_BYTES]
        rest = stream.from_opener[_LINK_ID_BYTES + 1 :]
        links[link_id].frames.extend(_split_both(stream, lane, rest, stream.from_acceptor))
    return list(links.values())


def _read_handshake(stream: RecordedStream) -> tuple[Handshake, bytes, bytes]:
    """Return the handshake and what each side wrote after it."""
    cut = _GREETING.size
    end = cut + _CONFIRMATION_BYTES
    from_opener, from_acceptor = stream.from_opener, stream.from_acceptor
    if min(len(from_opener), len(from_acceptor)) < end:
        raise ValueError("half a handshake")
    handshake = Handshake(
        initiator=stream.opener,
        responder=stream.acceptor,
        hello=Greeting(*_GREETING.unpack(from_opener[:cut])),
        welcome=Greeting(*_GREETING.unpack(from_acceptor[:cut])),
        confirmations=(from_opener[cut:end], from_acceptor[cut:end]),
    )
    return handshake, from_opener[end:], from_acceptor[end:]


def _split_both(
    stream: RecordedStream, lane: int, from_opener: bytes, from_acceptor: bytes
) -> list[SealedFrame]:
    return [
        *_split(stream.opener, stream.acceptor, lane, from_opener),
        *_split(stream.acceptor, stream.opener, lane, from_acceptor),
    ]


def _split(sender: str, receiver: str, lane: int, data: bytes) -> Iterator[SealedFrame]:
    number = 0
    while data:
        aad = data[:HEADER_BYTES]
        if len(aad) < HEADER_BYTES:
            raise ValueError(f"{len(data)} bytes are left over")
        end = HEADER_BYTES + Header(*_HEADER.unpack(aad)).body_bytes + _TAG_BYTES
        if len(data) < end:
            raise ValueError(f"{len(data)} bytes of a frame of {end}")
        yield SealedFrame(
            sender=sender,
            receiver=receiver,
            lane=lane,
            number=number,
            aad=aad,
            sealed=data[HEADER_BYTES:end],
        )
        number, data = number + 1, data[end:]
