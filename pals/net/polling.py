"""Asks the backend, again and again, for the list and its word that it is the newest."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence

import trio

from pals.errors import PalsError, RosterRefused
from pals.net.backend import Backend, FetchedRecords
from pals.net.membership import verify_in_thread
from pals.swarm.ledger import Action, Ledger
from pals.swarm.roster import Roster

_log = logging.getLogger(__name__)

POLL_SPREAD = (8 / 9, 10 / 9)
"""27 s on average are 24 to 30."""
MAX_BACKOFF_S = 30.0
MAX_COUNTED_FAILURES = 8


class Polling:
    """What a keeper hears from the backend.

    Args:
        client: The backend.
        ledger: What is known.
        act: Does what the ledger makes of an answer.
        interval_s: Seconds between two polls, on average.
        rng: Source of variation.
    """

    def __init__(
        self,
        client: Backend,
        ledger: Ledger,
        act: Callable[[Sequence[Action]], None],
        *,
        interval_s: float,
        rng: random.Random,
    ) -> None:
        self._client = client
        self._ledger = ledger
        self._act = act
        self._interval_s = interval_s
        self._rng = rng
        self._etag, self._polled_seq = "", -1

    async def run(self) -> None:
        """Ask again and again; one that lies or is away changes nothing."""
        failures = 0
        while True:
            await trio.sleep(poll_pause_s(self._interval_s, failures, self._rng))
            try:
                await self.poll_once()
            except PalsError as error:
                # Once for each time it fails, not every half minute.
                level = logging.DEBUG if failures else logging.WARNING
                _log.log(level, "the member list could not be renewed: %s", error)
                failures, self._etag = min(failures + 1, MAX_COUNTED_FAILURES), ""
            else:
                if failures:
                    _log.info("the member list is renewed again")
                failures = 0

    async def poll_once(self) -> None:
        """Ask the backend for the list and its word that it is the newest.

        Raises:
            BackendUnreachable: There is no proper answer.
            BackendRefused: The answer is an error.
            InvalidRecord: A record does not verify.
            RosterRefused: The list does not contain the one held.
        """
        ledger = self._ledger
        etag = self._etag if self._polled_seq == ledger.roster.seq else ""
        fetched = await self._client.fetch_records(ledger.roster.swarm_id, etag=etag)
        if fetched.entries is None and not etag:
            raise RosterRefused(problem="an answer without a list")
        entries, roster = ledger.entries, ledger.roster
        if fetched.entries is not None:
            entries, roster = fetched.entries, await self._verify_fetched(fetched)
        now, now_unix = trio.current_time(), time.time()
        self._act(ledger.answered(entries, roster, fetched.freshness, now, now_unix))
        self._etag, self._polled_seq = fetched.etag, roster.seq

    async def _verify_fetched(self, fetched: FetchedRecords) -> Roster:
        ledger, swarm_id = self._ledger, self._ledger.roster.swarm_id
        assert fetched.entries is not None
        try:
            return await verify_in_thread(swarm_id, fetched.entries, ledger.roster)
        except RosterRefused:
            other = await verify_in_thread(swarm_id, fetched.entries, None)
            self._act(ledger.contradicted(other, fetched.freshness, time.time()))
            raise


def poll_pause_s(interval_s: float, failures: int, rng: random.Random) -> float:
    """Return how long to wait for the next poll, after ``failures`` in a row."""
    if not failures:
        return interval_s * rng.uniform(*POLL_SPREAD)
    return min(MAX_BACKOFF_S, 2.0**failures * rng.uniform(*POLL_SPREAD))
