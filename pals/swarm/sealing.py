"""The swarm secret on its way to one member: HPKE, bound to swarm, epoch and member.

Source: RFC 9180, base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM. The
sealed form is the encapsulated key (32 bytes) and the ciphertext (48).
"""

from __future__ import annotations

import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from pals.errors import InvalidRecord
from pals.swarm.identity import Identity
from pals.swarm.kdf import VERSION
from pals.types import PeerId, SwarmId

SECRET_BYTES = 32
SEALED_BYTES = 32 + SECRET_BYTES + 16

_SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


def seal_secret(
    secret: bytes, *, exchange: bytes, swarm_id: SwarmId, epoch: int, peer: PeerId
) -> bytes:
    """Seal a swarm secret to one member.

    Args:
        secret: 32 bytes.
        exchange: The member's X25519 key, from the roster.
        swarm_id: Swarm that it is the secret of.
        epoch: Epoch that it is the secret of.
        peer: The member.

    Returns:
        `SEALED_BYTES` bytes.

    Raises:
        InvalidRecord: ``exchange`` is a degenerate key.
    """
    try:
        key = X25519PublicKey.from_public_bytes(exchange)
        return _SUITE.encrypt(secret, key, info=_info(swarm_id, epoch, peer))
    except ValueError as error:
        raise _invalid("the member's exchange key is degenerate") from error


def open_secret(sealed: bytes, *, identity: Identity, swarm_id: SwarmId, epoch: int) -> bytes:
    """Return the 32-byte swarm secret that was sealed to ``identity``.

    Raises:
        InvalidRecord: It was sealed to another member, for another swarm or epoch, or
            changed on its way.
    """
    if len(sealed) != SEALED_BYTES:
        raise _invalid(f"{len(sealed)} bytes instead of {SEALED_BYTES}")
    info = _info(swarm_id, epoch, identity.peer_id)
    try:
        return _SUITE.decrypt(sealed, identity.exchange_key(), info=info)
    except (InvalidTag, ValueError) as error:
        raise _invalid("it does not open for this member, swarm and epoch") from error


def _info(swarm_id: SwarmId, epoch: int, peer: PeerId) -> bytes:
    return VERSION + b"epoch envelope\0" + swarm_id + struct.pack(">Q", epoch) + peer.encode()


def _invalid(problem: str) -> InvalidRecord:
    return InvalidRecord(kind="sealed secret", problem=problem)
