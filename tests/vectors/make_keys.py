"""Write keys.json: the published vectors of the key schedule and of what it keys.

Run it from the repository root: ``python -m tests.vectors.make_keys``. The numbers come from
`tests.vectors.second`, which shares nothing with Pals.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.vectors import second

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

KIND_HIDDEN, DTYPE_BF16, CODEC_RAW, FLAG_NONE = 2, 2, 0, 0
MANIFEST = b"m" * 32
BOUNDARY = 8
ROWS = ((b"s" * 16, 5, 1, FLAG_NONE), (b"t" * 16, 300, 1, FLAG_NONE))
PAYLOAD = bytes(range(16))
"""Two tokens of four elements."""

TOKEN = b"t" * 32
ADDRESS = "https://pals.example:8470"
IDENTITY = b"k" * 32
IDENTITY_PEER = "12D3KooWJeESyB5qGKzSXmo2mztTEzF7kM3fJrJK9TLH5Nq6dRQd"
EPHEMERAL = b"e" * 32


def vectors() -> dict[str, object]:
    """Return the vectors as they stand in keys.json."""
    epoch_prk = second.epoch_prk(SWARM_ID, EPOCH, SECRET)
    link_prk = second.link_prk(epoch_prk, SHARED_DH, SHARES, PEERS)
    material = second.frame_material(link_prk, *PEERS, LANE)
    sealed = [second.seal_frame(material, n, HEADER, body) for n, body in enumerate(BODIES)]
    return {
        "swarm_id": SWARM_ID.hex(),
        "epoch": EPOCH,
        "secret": SECRET.hex(),
        "commitment": second.commitment(EPOCH, SECRET).hex(),
        "epoch_prk": epoch_prk.hex(),
        "shared_dh": SHARED_DH.hex(),
        "initiator_share": SHARES[0].hex(),
        "responder_share": SHARES[1].hex(),
        "initiator": PEERS[0],
        "responder": PEERS[1],
        "link_prk": link_prk.hex(),
        "link_id": second.link_id(link_prk).hex(),
        "confirm_initiator": second.confirmation(link_prk, "initiator").hex(),
        "confirm_responder": second.confirmation(link_prk, "responder").hex(),
        "lane": LANE,
        "key_iv": material.hex(),
        "header": HEADER.hex(),
        "bodies": [body.hex() for body in BODIES],
        "sealed": [data.hex() for data in sealed],
        "frame": _frame(material, second.link_id(link_prk)),
        "invite": _invite(),
        "envelope": _envelope(),
    }


def _frame(material: bytes, link: bytes) -> dict[str, object]:
    """Return the first frame of the lane: hidden states of two sessions, one token each."""
    body = second.pack_rows(*ROWS) + PAYLOAD
    header = second.pack_header(
        LANE,
        KIND_HIDDEN,
        DTYPE_BF16,
        CODEC_RAW,
        SWARM_ID[:16],
        EPOCH,
        link,
        0,
        MANIFEST,
        BOUNDARY,
        len(ROWS),
        len(body),
    )
    return {
        "manifest": MANIFEST.hex(),
        "boundary": BOUNDARY,
        "width": len(PAYLOAD) // 2 // len(ROWS),
        "rows": [[row[0].hex(), *row[1:]] for row in ROWS],
        "payload": PAYLOAD.hex(),
        "bytes": (header + second.seal_frame(material, 0, header, body)).hex(),
    }


def _invite() -> dict[str, object]:
    auth = second.invite_auth(TOKEN)
    return {
        "token": TOKEN.hex(),
        "address": ADDRESS,
        "auth": auth.hex(),
        "redeem_hash": hashlib.sha256(auth).hexdigest(),
        "signing_key": second.invite_key(TOKEN).hex(),
        "text": second.invite_text(TOKEN, SWARM_ID, ADDRESS, EPOCH, SECRET),
    }


def _envelope() -> dict[str, object]:
    """Return the swarm secret, sealed to one member under a known ephemeral key."""
    recipient = second.public_key(second.exchange_key(IDENTITY))
    info = second.envelope_info(SWARM_ID, EPOCH, IDENTITY_PEER)
    return {
        "identity": IDENTITY.hex(),
        "peer": IDENTITY_PEER,
        "exchange": recipient.hex(),
        "ephemeral": EPHEMERAL.hex(),
        "sealed": second.hpke_seal(recipient, EPHEMERAL, info, SECRET).hex(),
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(vectors(), indent=1) + "\n")
