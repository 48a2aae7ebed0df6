"""What a member knows of who serves what now: the newest record of each peer.

Pure: records come in verified, the time is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pals.net.announce import CLOCK_SKEW_S, MAX_LIFETIME_S, Announcement
from pals.types import PeerId

MAX_PEERS = 512
REMEMBERED_S = MAX_LIFETIME_S + CLOCK_SKEW_S
"""After the newest record of a peer expired, no older one is valid any more."""


@dataclass(slots=True)
class _Entry:
    announcement: Announcement
    record: bytes
    gone: bool = False


class LiveTable:
    """The newest announcement of each peer, one a peer, `MAX_PEERS` in all.

    A peer that was found dead is not listed, and its record is kept, so that no copy of
    it comes back from a member that has not noticed yet; a newer record lists it again.

    Args:
        max_peers: Peers that are held.
    """

    def __init__(self, max_peers: int = MAX_PEERS) -> None:
        self._entries: dict[PeerId, _Entry] = {}
        self._max_peers = max_peers

    def take(self, announcement: Announcement, record: bytes, now_unix: float) -> bool:
        """Keep a verified record unless it is no newer than the one held.

        Returns:
            Whether it was news.
        """
        peer = announcement.peer
        held = self._entries.get(peer)
        if held is not None and announcement.seq <= held.announcement.seq:
            return False
        if held is None and not self._make_room(now_unix):
            return False
        self._entries[peer] = _Entry(announcement, record)
        return True

    def drop(self, peer: PeerId, seq: int) -> bool:
        """List ``peer`` no more until it announces anew.

        Args:
            peer: Who does not answer.
            seq: Its record at the time it was asked; a newer one was not in doubt.

        Returns:
            Whether it was listed.
        """
        entry = self._entries.get(peer)
        if entry is None or entry.gone or entry.announcement.seq != seq:
            return False
        entry.gone = True
        return True

    def revive(self, peer: PeerId) -> bool:
        """List a peer again that was dropped and is now connected."""
        entry = self._entries.get(peer)
        if entry is None or not entry.gone:
            return False
        entry.gone = False
        return True

    def announcements(self, now_unix: float) -> dict[PeerId, Announcement]:
        """Return what those announce that serve or drain, as far as known."""
        return {
            peer: entry.announcement
            for peer, entry in self._entries.items()
            if _listed(entry, now_unix)
        }

    def get(self, peer: PeerId, now_unix: float) -> Announcement | None:
        """Return the announcement of a peer that is listed."""
        entry = self._entries.get(peer)
        return entry.announcement if entry is not None and _listed(entry, now_unix) else None

    def last_seq(self, peer: PeerId) -> int:
        """Return the highest number of a record of ``peer``; -1 when none is held."""
        entry = self._entries.get(peer)
        return -1 if entry is None else entry.announcement.seq

    def known(self) -> dict[PeerId, int]:
        """Return the number of each peer's record, dropped ones too."""
        return {peer: entry.announcement.seq for peer, entry in self._entries.items()}

    def newer_than(self, known: Mapping[str, int], now_unix: float) -> list[bytes]:
        """Return the records that somebody lacks who holds those of ``known``."""
        return [
            entry.record
            for peer, entry in self._entries.items()
            if not entry.gone
            and entry.announcement.expires_at > now_unix
            and entry.announcement.seq > known.get(peer, -1)
        ]

    def forget(self, peer: PeerId) -> bool:
        """Hold nothing of a peer any more; return whether there was anything."""
        return self._entries.pop(peer, None) is not None

    def purge(self, now_unix: float) -> None:
        """Forget the peers of which even the memory is of no use any more."""
        for peer, entry in list(self._entries.items()):
            if entry.announcement.expires_at + REMEMBERED_S <= now_unix:
                del self._entries[peer]

    def _make_room(self, now_unix: float) -> bool:
        """Return whether one more peer may be held; one that is not listed makes room."""
        if len(self._entries) < self._max_peers:
            return True
        unlisted = (p for p, entry in self._entries.items() if not _listed(entry, now_unix))
        victim = next(unlisted, None)
        if victim is None:
            return False
        del self._entries[victim]
        return True


def _listed(entry: _Entry, now_unix: float) -> bool:
    announcement = entry.announcement
    is_valid = announcement.expires_at > now_unix and announcement.state != "leaving"
    return is_valid and not entry.gone
