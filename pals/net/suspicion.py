"""Members that others say are gone: what is believed, and what is asked first.

Pure: the time is an argument. A notice alone removes nobody. Whoever is accused hears it
too and announces anew, which outdates the notice; only when that does not come is the
accused asked, and only when it does not answer is it dropped. So a member that lies costs
one announcement of its victim, at most each `PAUSE_S`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from pals.swarm.encoding import decode_strict
from pals.types import PeerId

REFUTE_S = 0.75
"""How long the accused has to speak for itself before it is asked."""
PAUSE_S = 5.0
MAX_NOTICE_BYTES = 128


class Notice(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One member lost another and cannot reach it; who says so is who signed the message.

    Attributes:
        peer: Who does not answer.
        seq: The record of it that is in doubt; a newer one is not.
    """

    peer: str
    seq: int


_decoder = msgspec.msgpack.Decoder(Notice)


def encode_notice(notice: Notice) -> bytes:
    """Return the notice's one form on the wire."""
    return msgspec.msgpack.encode(notice)


def decode_notice(data: bytes) -> Notice:
    """Read a notice.

    Raises:
        InvalidRecord: Too long, malformed or not canonical.
    """
    return decode_strict(_decoder, data, kind="notice", max_bytes=MAX_NOTICE_BYTES)


@dataclass(slots=True)
class Suspicions:
    """Which notices are followed: about one record of a peer once, and seldom."""

    _since: dict[PeerId, tuple[int, float]] = field(default_factory=dict[PeerId, tuple[int, float]])

    def accept(self, peer: PeerId, seq: int, *, listed_seq: int | None, now: float) -> bool:
        """Return whether a notice is to be examined.

        Args:
            peer: The accused.
            seq: The record that the notice doubts.
            listed_seq: The number of its listed record; None when it has none.
            now: Seconds, of any steady clock.
        """
        if listed_seq != seq:
            return False
        last = self._since.get(peer)
        if last is not None and now < last[1] + PAUSE_S:
            return False
        self._since[peer] = (seq, now)
        return True

    def purge(self, now: float) -> None:
        """Forget what no longer holds anything back."""
        self._since = {p: last for p, last in self._since.items() if now < last[1] + PAUSE_S}
