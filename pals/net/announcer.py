"""What a shard tells the swarm, and when: news at once, and again before it expires."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import trio

from pals.errors import InvalidRecord
from pals.net.announce import Announcement, ShardState, sign_announcement
from pals.net.discovery import Discovery
from pals.swarm.identity import Identity

ANNOUNCE_INTERVAL_S = 60.0
ANNOUNCE_SOON_S = 2.0
ANNOUNCE_SOON_TIMES = 5
ANNOUNCEMENT_LIFETIME_S = 180.0
MIN_INTERVAL_S = 0.5
LOOK_INTERVAL_S = 2.0
WITHDRAW_DEADLINE_S = 2.0
NEWS_FACTOR = 4
"""So many times more or fewer free tokens than announced are worth an announcement."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Sequence:
    """Numbers the records of one peer; they grow even when the wall clock steps back.

    Attributes:
        last: The highest number that was used, by this process or one before.
    """

    last: int = 0

    def next(self, now_unix: float) -> int:
        """Return a number above every one before, by default the time in milliseconds."""
        self.last = max(self.last + 1, int(now_unix * 1000))
        return self.last


class Announcer:
    """Announces one shard.

    It announces often at first, while the members find each other, and then steadily; at
    once when what it says changes, and when a member doubts that the shard is there.

    Args:
        discovery: Where to announce; this machine's part in it.
        identity: Signs the records.
        describe: Returns the announcement as of now; number, time and state are set here.
    """

    def __init__(
        self, discovery: Discovery, identity: Identity, describe: Callable[[], Announcement]
    ) -> None:
        self._discovery = discovery
        self._identity = identity
        self._describe = describe
        self._sequence = Sequence()
        self._state: ShardState = "serving"
        self._wanted = trio.Event()
        discovery.on_doubt(self.announce_soon)

    async def run(self, on_announced: Callable[[], None]) -> None:
        """Announce until cancelled.

        Args:
            on_announced: Called once the first record is out.
        """
        count = 0
        while True:
            said = self._describe()
            if await self._announce(said):
                if count == 0:
                    on_announced()
                count += 1
            soon = count < ANNOUNCE_SOON_TIMES
            await trio.sleep(MIN_INTERVAL_S)
            await self._wait_for_news(said, ANNOUNCE_SOON_S if soon else ANNOUNCE_INTERVAL_S)

    def announce_soon(self) -> None:
        """Announce anew, though at most each `MIN_INTERVAL_S`."""
        self._wanted.set()

    def drain(self) -> None:
        """Tell members to open no new sessions here."""
        self._state = "draining"
        self.announce_soon()

    async def withdraw(self) -> None:
        """Tell members that this shard leaves; call it while the network still runs.

        Returns when it was told, at the latest after `WITHDRAW_DEADLINE_S`.
        """
        self._state = "leaving"
        with trio.move_on_after(WITHDRAW_DEADLINE_S):
            await self._announce(self._describe())

    async def _wait_for_news(self, said: Announcement, timeout_s: float) -> None:
        """Wait until something is to be said, or for ``timeout_s`` seconds."""
        deadline = trio.current_time() + timeout_s
        while trio.current_time() < deadline and not _differs(said, self._describe()):
            with trio.move_on_after(LOOK_INTERVAL_S):
                await self._wanted.wait()
                break
        self._wanted = trio.Event()

    async def _announce(self, said: Announcement) -> bool:
        """Announce once and return whether it was accepted here.

        An expired member list or a clock that was changed refuses a record for a while;
        the sessions that run are not to end with it.
        """
        now = time.time()
        self._sequence.last = max(self._sequence.last, self._discovery.last_seq(said.peer))
        announcement = replace(
            said,
            seq=self._sequence.next(now),
            expires_at=now + ANNOUNCEMENT_LIFETIME_S,
            state=self._state,
        )
        try:
            await self._discovery.announce(sign_announcement(self._identity, announcement))
        except InvalidRecord as error:
            _log.warning("this shard could not be announced: %s", error)
            return False
        return True


def _differs(said: Announcement, now: Announcement) -> bool:
    """Return whether drivers would choose otherwise by what is true now."""
    least, most = sorted((said.free_tokens, now.free_tokens))
    return most > NEWS_FACTOR * least or said.addresses != now.addresses
