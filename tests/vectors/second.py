"""A second implementation of the key schedule, of frames, of invites and of sealed secrets.

Written from the docstrings of `pals.swarm` and `pals.net.wire` and from RFC 5869, 7748, 8032
and 9180. It imports nothing of Pals and takes its ciphers from other libraries than Pals
does, so that no mistake is shared.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct

from Crypto.Cipher import AES
from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base
from nacl.signing import SigningKey

_HEADER = struct.Struct(">4s5B16sQ16sQ32sHHI")
_ROW = struct.Struct(">16sIHH")
_KEM = b"KEM" + (0x0020).to_bytes(2, "big")
_HPKE = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in (0x0020, 1, 2))


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def extract(salt: bytes, material: bytes) -> bytes:
    return hmac.digest(salt, material, "sha256")


def expand_info(prk: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, section 2.3."""
    out, block, number = b"", b"", 0
    while len(out) < length:
        number += 1
        block = hmac.digest(prk, block + info + bytes([number]), "sha256")
        out += block
    return out[:length]


def expand(prk: bytes, label: bytes, context: bytes = b"", length: int = 32) -> bytes:
    return expand_info(prk, b"pals/1 " + label + b"\0" + context, length)


def lp(*fields: bytes) -> bytes:
    return b"".join(len(field).to_bytes(2, "big") + field for field in fields)


# --- AES-256-GCM ---------------------------------------------------------------------


def gcm_seal(key: bytes, nonce: bytes, body: bytes, header: bytes) -> bytes:
    cipher = AES.new(key, AES.MODE_GCM, nonce=nonce)
    cipher.update(header)
    sealed, tag = cipher.encrypt_and_digest(body)
    return sealed + tag


def gcm_open(key: bytes, nonce: bytes, sealed: bytes, header: bytes) -> bytes:
    """Raise ``ValueError`` when it does not open."""
    cipher = AES.new(key, AES.MODE_GCM, nonce=nonce)
    cipher.update(header)
    return cipher.decrypt_and_verify(sealed[:-16], sealed[-16:])


# --- swarm secret -> epoch -> link -> frame -------------------------------------------


def epoch_prk(swarm_id: bytes, epoch: int, secret: bytes) -> bytes:
    return extract(_hash(b"pals/1 epoch" + swarm_id + epoch.to_bytes(8, "big")), secret)


def commitment(epoch: int, secret: bytes) -> bytes:
    return expand(extract(b"pals/1 secret", secret), b"commitment", epoch.to_bytes(8, "big"))


def link_prk(
    epoch_key: bytes, dh: bytes, shares: tuple[bytes, bytes], peers: tuple[str, str]
) -> bytes:
    """Shares and peers are the initiator's, then the responder's."""
    transcript = _hash(lp(*shares, *(peer.encode() for peer in peers)))
    return extract(expand(epoch_key, b"link salt"), dh + transcript)


def link_id(link_key: bytes) -> bytes:
    return expand(link_key, b"link id", length=16)


def confirmation(link_key: bytes, role: str) -> bytes:
    return expand(link_key, b"confirm", role.encode())


def frame_material(link_key: bytes, sender: str, receiver: str, lane: int) -> bytes:
    """Return the key, 32 bytes, and the iv, 12."""
    context = lp(sender.encode(), receiver.encode(), bytes([lane]))
    return expand(link_key, b"frame", context, 44)


def seal_frame(material: bytes, counter: int, header: bytes, body: bytes) -> bytes:
    """Return what follows the header."""
    nonce = int.from_bytes(material[32:], "big") ^ counter
    return gcm_seal(material[:32], nonce.to_bytes(12, "big"), body, header)


def pack_header(*fields: int | bytes) -> bytes:
    """Lane, kind, dtype, codec, swarm, epoch, link, counter, manifest, boundary, rows, bytes."""
    return _HEADER.pack(b"PALS", 3, *fields)


def pack_rows(*rows: tuple[bytes, int, int, int]) -> bytes:
    return b"".join(_ROW.pack(*row) for row in rows)


# --- invites -------------------------------------------------------------------------


def invite_auth(token: bytes) -> bytes:
    return expand(token, b"invite redeem")


def invite_key(token: bytes) -> bytes:
    """Return the public half of the key that signs joins."""
    return bytes(SigningKey(expand(token, b"invite sign")).verify_key)


def invite_text(token: bytes, swarm_id: bytes, address: str, epoch: int, secret: bytes) -> str:
    redeem = b"\x01" + token + swarm_id + address.encode()
    held = epoch.to_bytes(8, "big") + secret
    checksum = _hash(b"pals/1 invite checksum\0" + redeem + held)[:8]
    halves = (base64.urlsafe_b64encode(half) for half in (redeem, held + checksum))
    return "pp_inv_" + ".".join(half.decode().rstrip("=") for half in halves)


# --- sealed secrets: HPKE, base mode, X25519, HKDF-SHA256, AES-256-GCM (RFC 9180) ----------


def exchange_key(seed: bytes) -> bytes:
    """Return the private X25519 key of an identity."""
    return expand(extract(b"pals/1 identity", seed), b"exchange key")


def public_key(private: bytes) -> bytes:
    return crypto_scalarmult_base(private)


def envelope_info(swarm_id: bytes, epoch: int, peer: str) -> bytes:
    return b"pals/1 epoch envelope\0" + swarm_id + epoch.to_bytes(8, "big") + peer.encode()


def hpke_seal(recipient: bytes, ephemeral: bytes, info: bytes, plaintext: bytes) -> bytes:
    """Return the encapsulated key and the sealed text."""
    enc = crypto_scalarmult_base(ephemeral)
    key, nonce = _hpke_keys(crypto_scalarmult(ephemeral, recipient), enc, recipient, info)
    return enc + gcm_seal(key, nonce, plaintext, b"")


def hpke_open(private: bytes, info: bytes, sealed: bytes) -> bytes:
    """Raise ``ValueError`` when it does not open."""
    enc, rest = sealed[:32], sealed[32:]
    shared = crypto_scalarmult(private, enc)
    key, nonce = _hpke_keys(shared, enc, crypto_scalarmult_base(private), info)
    return gcm_open(key, nonce, rest, b"")


def _hpke_keys(dh: bytes, enc: bytes, recipient: bytes, info: bytes) -> tuple[bytes, bytes]:
    eae = _labeled_extract(_KEM, b"", b"eae_prk", dh)
    shared = _labeled_expand(_KEM, eae, b"shared_secret", enc + recipient, 32)
    context = b"\0" + _labeled_extract(_HPKE, b"", b"psk_id_hash", b"")
    context += _labeled_extract(_HPKE, b"", b"info_hash", info)
    secret = _labeled_extract(_HPKE, shared, b"secret", b"")
    key = _labeled_expand(_HPKE, secret, b"key", context, 32)
    return key, _labeled_expand(_HPKE, secret, b"base_nonce", context, 12)


def _labeled_extract(suite: bytes, salt: bytes, label: bytes, material: bytes) -> bytes:
    return extract(salt, b"HPKE-v1" + suite + label + material)


def _labeled_expand(suite: bytes, prk: bytes, label: bytes, info: bytes, length: int) -> bytes:
    return expand_info(prk, length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info, length)
