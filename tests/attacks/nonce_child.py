"""Seals frames until it is killed, and prints what each was sealed under, hashed.

Run as ``python -m tests.attacks.nonce_child``: all randomness is the machine's own.
"""

from __future__ import annotations

import hashlib
import itertools
import os

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pals.net.handshake import NONCE_BYTES, KeyShare
from pals.net.wire import Lane
from tests.unit.net.link_pairs import NAMES, frame_of, make_pair

REPORT_FRAMES = 100


def fresh_share() -> KeyShare:
    return KeyShare(X25519PrivateKey.generate(), os.urandom(NONCE_BYTES))


def main() -> None:
    pair = make_pair(shares=dict.fromkeys(NAMES, fresh_share))
    for number in itertools.count():
        used = b"".join(seal(pair, name, lane) for name in NAMES for lane in Lane)
        if number % REPORT_FRAMES == 0:
            print(used.hex(), flush=True)  # noqa: T201


def seal(pair, name, lane) -> bytes:
    """Seal a frame and return a hash of its key and nonce."""
    key = pair.ends[name].link._senders[lane]._key
    nonce = key._nonce()
    pair.ends[name].link.seal(lane, frame_of(lane, 1), 0.0)
    material = key._iv.to_bytes(12, "big") + nonce + pair.ends[name].link._keys.prk
    return hashlib.sha256(material).digest()[:16]


if __name__ == "__main__":
    main()
