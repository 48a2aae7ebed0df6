"""What this driver calls its prompts, and which chains have seen which of them.

Shards find a prompt's pages by names that only this driver can make: they are keyed hashes
under a salt that never leaves the process (`pals.engine.prefix`).
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence

from pals.driver.recovery import Offer, offers_of
from pals.engine.prefix import HASH_BYTES, SALT_BYTES, hash_blocks
from pals.net.route import Chain

MAX_REMEMBERED = 1024


class Prefixes:
    """The names of one process's prompts.

    Args:
        salt: 32 bytes; drawn by default.
    """

    def __init__(self, salt: bytes | None = None) -> None:
        self._salt = salt or secrets.token_bytes(SALT_BYTES)
        self._seen: OrderedDict[tuple[bytes, tuple[Offer, ...]], None] = OrderedDict()

    def name(self, tokens: Sequence[int]) -> bytes:
        """Return the names of the whole blocks of ``tokens``, 16 bytes each."""
        return b"".join(hash_blocks(self._salt, tokens))

    def note(self, names: bytes, chain: Chain) -> None:
        """Remember that a chain computes tokens of these names."""
        if names:
            key = names[:HASH_BYTES], offers_of(chain)
            self._seen[key] = None
            self._seen.move_to_end(key)
            if len(self._seen) > MAX_REMEMBERED:
                self._seen.popitem(last=False)

    def are_likely_held(self, names: bytes, chain: Chain) -> bool:
        """Return whether a chain has computed a prompt before that begins with the same block."""
        return (names[:HASH_BYTES], offers_of(chain)) in self._seen
