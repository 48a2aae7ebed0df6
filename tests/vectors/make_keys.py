"""Write keys.json: the key schedule's vectors, from a second implementation in plain hashlib.

Run it from the repository root: ``python -m tests.vectors.make_keys``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FILE = Path(__file__).with_name("keys.json")
SWARM_ID = hashlib.sha256(b"genesis").digest()
SECRET = bytes(range(32))
EPOCH = 7
SHARED_DH = b"d" * 32
SHARES = (b"i" * 48, b"r" * 48)
PEERS = (
    "12D3KooWA4N6HVs4QGA3wt4hNxDGgegwe1fPT1XKymC6Sx2y9hTW",
    "12D3KooWMbsW5zypyE1NYRAf2EnvuSsZBt6uNDSLXaUGHRvGUYxH",
)
LANE = 1
HEADER = b"header"
BODIES = (b"", b"second", bytes(1000))


def extract(salt: bytes, material: bytes) -> bytes:
    return hmac.new(salt, material, hashlib.sha256).digest()


def expand(prk: bytes, label: bytes, context: bytes = b"", length: int = 32) -> bytes:
    info = b"pals/1 " + label + b"\0" + context
    out = block = b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.new(prk, block + info + bytes([number]), hashlib.sha256).digest()
        out += block
    return out[:length]


def lp(*fields: bytes) -> bytes:
    return b"".join(struct.pack(">H", len(field)) + field for field in fields)


def vectors() -> dict[str, object]:
    """Return the vectors as they stand in keys.json."""
    salt = hashlib.sha256(b"pals/1 epoch" + SWARM_ID + struct.pack(">Q", EPOCH)).digest()
    epoch_prk = extract(salt, SECRET)
    sender, receiver = (peer.encode() for peer in PEERS)
    transcript = hashlib.sha256(lp(*SHARES, sender, receiver)).digest()
    link_prk = extract(expand(epoch_prk, b"link salt"), SHARED_DH + transcript)
    material = expand(link_prk, b"frame", lp(sender, receiver, bytes([LANE])), 44)
    key, iv = material[:32], int.from_bytes(material[32:], "big")
    sealed = [
        AESGCM(key).encrypt((iv ^ counter).to_bytes(12, "big"), body, HEADER)
        for counter, body in enumerate(BODIES)
    ]
    return {
        "swarm_id": SWARM_ID.hex(),
        "epoch": EPOCH,
        "secret": SECRET.hex(),
        "epoch_prk": epoch_prk.hex(),
        "shared_dh": SHARED_DH.hex(),
        "initiator_share": SHARES[0].hex(),
        "responder_share": SHARES[1].hex(),
        "initiator": PEERS[0],
        "responder": PEERS[1],
        "link_prk": link_prk.hex(),
        "link_id": expand(link_prk, b"link id", length=16).hex(),
        "confirm_initiator": expand(link_prk, b"confirm", b"initiator").hex(),
        "confirm_responder": expand(link_prk, b"confirm", b"responder").hex(),
        "lane": LANE,
        "key_iv": material.hex(),
        "header": HEADER.hex(),
        "bodies": [body.hex() for body in BODIES],
        "sealed": [data.hex() for data in sealed],
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(vectors(), indent=1) + "\n")
