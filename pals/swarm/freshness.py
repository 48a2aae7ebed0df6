"""Freshness: the signed word of an authority that a list was the newest at some time.

The backend gives one with each answer; the operator and its admins give theirs to the
other members, so that a swarm outlives its backend. Whoever hides newer entries can still
say that the old ones are fresh, which is why members compare heads among themselves.

Source: TUF's timestamp role, https://theupdateframework.github.io/specification/latest/.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from pals.errors import InvalidRecord
from pals.swarm.encoding import decode_strict
from pals.swarm.identity import Identity, verify
from pals.swarm.kdf import VERSION
from pals.swarm.records import Hash, Key, Signature, UnixSeconds
from pals.swarm.roster import MAX_ENTRIES, Roster

HEADER = "pals-freshness"
MAX_FRESHNESS_BYTES = 256
MAX_CLOCK_SKEW_S = 300

_LABEL = VERSION + b"freshness\0"


class Freshness(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """That entry ``seq`` was the newest.

    Attributes:
        swarm_id: Swarm it is about.
        seq: Number of the newest entry.
        head: Its hash.
        at: Unix seconds, by the signer's clock.
        signer: Ed25519 key of the operator, an admin or the backend.
        signature: By ``signer``.
    """

    swarm_id: Hash
    seq: Annotated[int, Meta(ge=0, lt=MAX_ENTRIES)]
    head: Hash
    at: UnixSeconds
    signer: Key
    signature: Signature = b""

    def age_s(self, now_unix: float) -> float:
        """Return how old the word is, 0 if its signer's clock is ahead."""
        return max(0.0, now_unix - self.at)


def sign_freshness(signer: Identity, roster: Roster, *, at: int) -> bytes:
    """Return the signed bytes that say that ``roster`` is the newest at ``at``."""
    word = Freshness(
        swarm_id=roster.swarm_id,
        seq=roster.seq,
        head=roster.head,
        at=at,
        signer=signer.public_key,
    )
    return msgspec.msgpack.encode(replace(word, signature=signer.sign(_signed_part(word))))


def decode_freshness(data: bytes) -> Freshness:
    """Read a word of freshness; nothing that it says is checked here.

    Raises:
        InvalidRecord: Too long, malformed or not canonical.
    """
    return decode_strict(_DECODER, data, kind="freshness", max_bytes=MAX_FRESHNESS_BYTES)


def open_freshness(
    data: bytes, roster: Roster, *, now_unix: float, max_skew_s: float = MAX_CLOCK_SKEW_S
) -> Freshness:
    """Read a word of freshness and check it against the roster that it is about.

    Args:
        data: The word, from anybody.
        roster: What it has to be about: its newest entry, not an earlier one.
        now_unix: Unix time in seconds.
        max_skew_s: Seconds by which the signer's clock may be ahead.

    Raises:
        InvalidRecord: Malformed, about another list or an older state of it, from the
            future, or not signed by an authority of the roster.
    """
    word = open_word(data, roster, now_unix=now_unix, max_skew_s=max_skew_s)
    if (word.seq, word.head) != (roster.seq, roster.head):
        raise _invalid(f"it is about entry {word.seq}, the list ends with {roster.seq}")
    return word


def open_word(
    data: bytes, roster: Roster, *, now_unix: float, max_skew_s: float = MAX_CLOCK_SKEW_S
) -> Freshness:
    """Read a word of freshness of the roster's swarm, whichever state of a list it is about.

    It shows what an authority said, such as that another list than this one is the newest.

    Raises:
        InvalidRecord: Malformed, for another swarm, from the future, or not signed by an
            authority of the roster.
    """
    word = decode_freshness(data)
    if word.swarm_id != roster.swarm_id:
        raise _invalid("it is for another swarm")
    if word.at > now_unix + max_skew_s:
        ahead_s = word.at - now_unix
        raise _invalid(f"its time lies {ahead_s:.0f} s ahead of this machine's clock")
    if word.signer not in roster.authorities:
        raise _invalid("its signer is no authority of the swarm")
    if not verify(word.signer, word.signature, _signed_part(word)):
        raise _invalid("not signed by whom it names")
    return word


_DECODER = msgspec.msgpack.Decoder(Freshness)


def _signed_part(word: Freshness) -> bytes:
    return _LABEL + msgspec.msgpack.encode(replace(word, signature=b""))


def _invalid(problem: str) -> InvalidRecord:
    return InvalidRecord(kind="freshness", problem=problem)
