"""What one member tells another of the list: where its own ends, and what it heard since.

A message proves nothing by itself: entries are verified, words of freshness and removals
are signed, and a head that nobody signed is at most a reason to ask for entries.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from pals.swarm.encoding import decode_strict
from pals.swarm.freshness import MAX_FRESHNESS_BYTES
from pals.swarm.records import MAX_EPOCH, Hash
from pals.swarm.roster import MAX_ENTRIES

MAX_REMOVALS = 16
MAX_REMOVAL_BYTES = 512
MAX_NEWS_BYTES = 12 << 10


class News(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """One member's list in short.

    Attributes:
        seq: Number of its newest entry.
        head: The hash of that entry.
        epoch: Of the swarm secret that it holds.
        freshness: The youngest word that this list is the newest; empty when there is none.
        removals: Signed removals that its chain does not hold yet.
    """

    seq: Annotated[int, Meta(ge=0, lt=MAX_ENTRIES)]
    head: Hash
    epoch: Annotated[int, Meta(ge=0, lt=MAX_EPOCH)]
    freshness: Annotated[bytes, Meta(max_length=MAX_FRESHNESS_BYTES)] = b""
    removals: Annotated[
        tuple[Annotated[bytes, Meta(max_length=MAX_REMOVAL_BYTES)], ...],
        Meta(max_length=MAX_REMOVALS),
    ] = ()


_DECODER = msgspec.msgpack.Decoder(News)


def encode_news(news: News) -> bytes:
    """Return the one form of news on the wire, at most `MAX_NEWS_BYTES` long."""
    return msgspec.msgpack.encode(news)


def decode_news(data: bytes) -> News:
    """Read news; nothing that they say is checked here.

    Raises:
        InvalidRecord: Too long, malformed or not canonical.
    """
    return decode_strict(_DECODER, data, kind="news", max_bytes=MAX_NEWS_BYTES)
