"""The key schedule: swarm secret -> epoch -> link -> one frame key per direction and lane.

::

    epoch_prk    = Extract(SHA256("pals/1 epoch" || swarm_id || epoch), secret)
    commitment   = Expand(Extract("pals/1 secret", secret), "commitment", epoch)
    link_prk     = Extract(Expand(epoch_prk, "link salt"), dh || SHA256(lp(shares, peer ids)))
    link_id      = Expand(link_prk, "link id", 16)
    confirmation = Expand(link_prk, "confirm", role)
    key32||iv12  = Expand(link_prk, "frame", lp(sender, receiver, lane), 44)
    nonce        = iv XOR counter (96 bits, big-endian, from 0, in memory only)

The secret keeps strangers out; the ephemeral Diffie-Hellman keeps other members out and
keeps recordings closed when the secret leaks later. Vectors: tests/vectors/keys.json.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pals.errors import FrameKeyExhausted, InvalidFrame
from pals.swarm.kdf import VERSION, expand, extract, length_prefixed
from pals.types import PeerId, SwarmId

Role = Literal["initiator", "responder"]

LINK_ID_BYTES = 16
FRAME_LIMIT = 1 << 32
"""Frames under one key; the link is keyed anew before it gets there (SP 800-38D)."""

TAG_BYTES = 16
_KEY_BYTES = 32
_IV_BYTES = 12


def epoch_prk(swarm_id: SwarmId, epoch: int, secret: bytes) -> bytes:
    """Return the 32-byte key of one epoch from its swarm secret."""
    salt = hashlib.sha256(VERSION + b"epoch" + swarm_id + struct.pack(">Q", epoch)).digest()
    return extract(salt, secret)


def secret_commitment(epoch: int, secret: bytes) -> bytes:
    """Return the public 32 bytes by which members know the right secret of an epoch.

    It leaves the swarm out, whose id is the hash of a record that holds a commitment.
    """
    return expand(extract(VERSION + b"secret", secret), b"commitment", struct.pack(">Q", epoch))


def link_prk(
    epoch_key: bytes,
    shared_dh: bytes,
    initiator_share: bytes,
    responder_share: bytes,
    initiator: PeerId,
    responder: PeerId,
) -> bytes:
    """Return the 32-byte key of one link in one epoch.

    Args:
        epoch_key: What `epoch_prk` returned.
        shared_dh: X25519 of the two ephemeral keys, 32 bytes, not all zero.
        initiator_share: What the initiator brings: 16 fresh random bytes, its ephemeral
            X25519 public key, then what else it proposes.
        responder_share: The same of the responder.
        initiator: Peer that dialled, as Noise proved it.
        responder: Peer that was dialled, as Noise proved it.
    """
    transcript = hashlib.sha256(
        length_prefixed(initiator_share, responder_share, initiator.encode(), responder.encode())
    ).digest()
    return extract(expand(epoch_key, b"link salt"), shared_dh + transcript)


def link_id(link_key: bytes) -> bytes:
    """Return the public 16-byte name of a link, which every frame header carries."""
    return expand(link_key, b"link id", length=LINK_ID_BYTES)


def key_confirmation(link_key: bytes, role: Role) -> bytes:
    """Return the 32 bytes by which ``role`` proves that it derived ``link_key``."""
    return expand(link_key, b"confirm", role.encode())


def frame_key(link_key: bytes, sender: PeerId, receiver: PeerId, lane: int) -> FrameKey:
    """Return the key of the frames that ``sender`` writes to ``receiver`` on one lane.

    Make one object for each side and use: a key that seals must not also open.
    """
    context = length_prefixed(sender.encode(), receiver.encode(), bytes([lane]))
    material = expand(link_key, b"frame", context, _KEY_BYTES + _IV_BYTES)
    return FrameKey(material[:_KEY_BYTES], material[_KEY_BYTES:], sender=sender)


class FrameKey:
    """AES-256-GCM with an implicit counter, for one direction of one lane.

    A copy would repeat nonces, so there is none: no copy, no pickle.
    """

    __slots__ = ("_aead", "_counter", "_iv", "_sender")

    def __init__(self, key: bytes, iv: bytes, *, sender: PeerId) -> None:
        self._aead = AESGCM(key)
        self._iv = int.from_bytes(iv, "big")
        self._sender = sender
        self._counter = 0

    @property
    def counter(self) -> int:
        """Number of frames sealed or opened so far: the number of the next frame."""
        return self._counter

    def seal(self, header: bytes, body: bytes) -> bytearray:
        """Return a whole frame: the header, then the sealed body, which is bound to it.

        The sealed body is 16 bytes longer than ``body``; it is written where it stays.

        Raises:
            FrameKeyExhausted: 2**32 frames were sealed; key the link anew.
        """
        nonce = self._nonce()
        frame = bytearray(len(header) + len(body) + TAG_BYTES)
        frame[: len(header)] = header
        with memoryview(frame) as view:
            self._aead.encrypt_into(nonce, body, header, view[len(header) :])
        self._counter += 1
        return frame

    def open(self, header: bytes, sealed: bytes | memoryview) -> bytes:
        """Return the body of the next frame.

        Args:
            header: The header the receiver expects, which must equal the wire's.
            sealed: What followed the header in the frame that `seal` returned.

        Raises:
            InvalidFrame: Not the next frame of this direction, lane and link under this
                header. The counter stays; the caller drops the link.
            FrameKeyExhausted: 2**32 frames were opened; key the link anew.
        """
        try:
            body = self._aead.decrypt(self._nonce(), sealed, header)
        except InvalidTag:
            raise InvalidFrame(
                peer=self._sender, problem=f"frame {self._counter} does not open"
            ) from None
        self._counter += 1
        return body

    def _nonce(self) -> bytes:
        if self._counter >= FRAME_LIMIT:
            raise FrameKeyExhausted(peer=self._sender, limit=FRAME_LIMIT)
        return (self._iv ^ self._counter).to_bytes(_IV_BYTES, "big")

    def __repr__(self) -> str:
        return f"FrameKey(sender={self._sender}, counter={self._counter})"

    def __reduce__(self) -> str:
        raise TypeError("a FrameKey is not copied or pickled: its nonces would repeat")
