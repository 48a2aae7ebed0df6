"""Names of prompt pages: what a driver calls its prefixes, and what a shard makes of that.

A driver sends no token to a shard that only wants to know whether it has seen a prompt
before. It sends one keyed hash for each block of the prompt, over that block and all before
it, under a salt that no shard knows. A shard makes its own keys of these hashes, which hold
the model, the range, the dtypes and the driver, so that none of them ever meets another's.

Pure: no clock, no sockets, no arrays.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pals.types import Dtype, LayerRange, PeerId

BLOCK_TOKENS = 64
"""Tokens of a block; a multiple of every page size, so that shards of one chain may differ."""

HASH_BYTES = 16
SALT_BYTES = 32

_BLOCK = struct.Struct(f"<{BLOCK_TOKENS}I")


def hash_blocks(salt: bytes, tokens: Sequence[int]) -> tuple[bytes, ...]:
    """Return the driver's names of the whole blocks of ``tokens``, 16 bytes each.

    Each is HMAC-SHA256 (RFC 2104) over the block and the hash before it, cut to 128 bits, so
    that equal names mean equal tokens from the first one on.

    Args:
        salt: The driver's own, 32 bytes that never leave it.
        tokens: Prompt, or prompt and answer. The last partial block has no name.
    """
    names: list[bytes] = []
    previous = b""
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = _BLOCK.pack(*tokens[start : start + BLOCK_TOKENS])
        previous = hmac.digest(salt, previous + block, "sha256")
        names.append(previous[:HASH_BYTES])
    return tuple(names)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixScope:
    """What two prefixes must share before any of their pages may be the same.

    Attributes:
        manifest: Of the model, 32 bytes.
        layers: Whose keys and values the pages hold.
        dtype: In what the layers compute.
        kv_dtype: In what the pages keep them.
    """

    manifest: bytes
    layers: LayerRange
    dtype: Dtype
    kv_dtype: str

    def page_keys(
        self, driver: PeerId, names: Sequence[bytes], page_tokens: int
    ) -> tuple[bytes, ...]:
        """Return the keys of the pages that ``names`` cover, 32 bytes each, in order."""
        return tuple(_chain(self._root(driver, page_tokens), names, BLOCK_TOKENS // page_tokens))

    def _root(self, driver: PeerId, page_tokens: int) -> bytes:
        digest = hashlib.blake2b(digest_size=32, person=b"pals kv prefix")
        for text in (str(self.layers), self.dtype, self.kv_dtype, str(page_tokens), driver):
            field = text.encode()
            digest.update(struct.pack(">I", len(field)) + field)
        digest.update(self.manifest)
        return digest.digest()


def _chain(key: bytes, names: Sequence[bytes], pages_of_block: int) -> Iterator[bytes]:
    """Yield a key for each page, over its block's name and the key before it.

    The shard chains for itself: a driver whose names are no chain misses, and no more.
    """
    for name in names:
        for part in range(pages_of_block):
            body = key + bytes((part,)) + name
            key = hashlib.blake2b(body, digest_size=32).digest()
            yield key
