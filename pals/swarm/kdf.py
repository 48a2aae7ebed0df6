"""HKDF-SHA256 with the project's labels (RFC 5869)."""

from __future__ import annotations

import struct

from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

VERSION = b"pals/1 "
"""Starts every label: the version of the key schedule, with which every key changes."""


def extract(salt: bytes, key_material: bytes) -> bytes:
    """Return the 32-byte pseudorandom key of ``key_material``."""
    mac = hmac.HMAC(salt, hashes.SHA256())
    mac.update(key_material)
    return mac.finalize()


def expand(prk: bytes, label: bytes, context: bytes = b"", length: int = 32) -> bytes:
    """Derive ``length`` bytes for one use; a zero byte ends the label."""
    return expand_info(prk, VERSION + label + b"\0" + context, length)


def expand_info(prk: bytes, info: bytes, length: int) -> bytes:
    """Return ``length`` bytes of HKDF-Expand, for an ``info`` of any form.

    Raises:
        ValueError: More than 255 blocks are asked for.
    """
    return HKDFExpand(hashes.SHA256(), length, info).derive(prk)


def length_prefixed(*fields: bytes) -> bytes:
    """Join fields so that no two lists of fields give the same bytes."""
    return b"".join(struct.pack(">H", len(field)) + field for field in fields)
