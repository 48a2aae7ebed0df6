"""What the membership service does, apart from any transport.

Each method is one transaction. Every record is checked by the same reducer that members
run, so that an honest backend never stores what members would refuse.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from sqlalchemy.engine import Connection

from pals.backend import queries
from pals.backend.database import open_database, reading, writing
from pals.errors import BackendFull, InvalidRecord, InviteRefused, UnknownSwarm
from pals.swarm.hints import open_hint
from pals.swarm.identity import peer_id_of
from pals.swarm.records import (
    NO_ENTRY,
    AdminRecord,
    Entry,
    InviteCertificate,
    Join,
    Leave,
    check_join,
    decode_entry,
    decode_record,
    digest,
)
from pals.swarm.roster import Roster, apply, begin, next_entry
from pals.types import SwarmId

MAX_SWARMS = 1000
MAX_CACHED_ROSTERS = 256
HINT_LIFE_S = 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryList:
    """A swarm's whole chain.

    Attributes:
        entries: Encoded entries from the genesis on.
        etag: Changes whenever the chain does.
    """

    entries: tuple[bytes, ...]
    etag: str


class BackendService:
    """The service over one database; its methods may be called from many threads.

    Args:
        database_url: SQLAlchemy URL, such as ``sqlite:////var/lib/pals/backend.db``.
        clock: Unix seconds, for receipt times and expiry.
        max_swarms: Swarms it takes.

    Raises:
        InvalidConfig: The database cannot be opened or migrated.
    """

    def __init__(
        self,
        database_url: str,
        *,
        clock: Callable[[], float] = time.time,
        max_swarms: int = MAX_SWARMS,
    ) -> None:
        self._engine = open_database(database_url)
        self._clock = clock
        self._max_swarms = max_swarms
        self._rosters: dict[SwarmId, Roster] = {}
        self._lock = Lock()

    def close(self) -> None:
        self._engine.dispose()

    def create_swarm(self, genesis: bytes) -> bytes:
        """Store a swarm's first record and return its entry; a repetition changes nothing.

        Raises:
            InvalidRecord: ``genesis`` is not a signed genesis.
            BackendFull: There are `MAX_SWARMS` swarms.
            StorageFailed: The database failed; nothing was stored.
        """
        swarm_id = SwarmId(digest(genesis))
        entry = Entry(seq=0, previous=NO_ENTRY, received_at=self._now(), record=genesis)
        roster = begin(swarm_id, entry)
        with writing(self._engine) as connection:
            stored = queries.entry_of(connection, swarm_id, genesis)
            if stored is not None:
                return stored
            count = queries.count_swarms(connection)
            if count >= self._max_swarms:
                raise BackendFull(count=count, what="swarms")
            queries.insert_swarm(connection, swarm_id, entry.received_at)
            data = queries.insert_entry(connection, swarm_id, entry)
        self._remember(roster)
        return data

    def append_record(self, swarm_id: SwarmId, data: bytes) -> bytes:
        """Store an administrator's record, or a member's leave, and return its entry.

        A repetition changes nothing.

        Raises:
            InvalidRecord: It is of another kind, or does not fit the chain.
            UnknownSwarm: There is no such swarm.
            StorageFailed: The database failed; nothing was stored.
        """
        record = decode_record(data)
        if not isinstance(record, AdminRecord | Leave):
            raise InvalidRecord(kind="record", problem="joins go through an invite's redemption")
        with writing(self._engine) as connection:
            roster = self._roster(connection, swarm_id)
            stored = queries.entry_of(connection, swarm_id, data)
            if stored is not None:
                return stored
            after, entry = self._append(connection, roster, data)
            if isinstance(record, InviteCertificate):
                queries.insert_invite(connection, swarm_id, record)
            queries.close_invites(connection, roster, after)
        self._remember(after)
        return entry

    def redeem(self, swarm_id: SwarmId, auth: bytes, data: bytes) -> bytes:
        """Admit a peer by an invite and return its entry.

        The same peer may repeat it after a lost reply and uses the invite once.

        Args:
            swarm_id: The swarm to join.
            auth: The 32 bytes whose hash the operator certified.
            data: The signed join record.

        Raises:
            InvalidRecord: ``data`` is not a join signed by its invite and its peer.
            InviteRefused: The invite is unknown, spent, closed or expired.
            SwarmFull: The swarm has as many members as it may.
            StorageFailed: The database failed; nothing was stored.
        """
        join = decode_record(data)
        if not isinstance(join, Join):
            raise InvalidRecord(kind="join", problem="it is another kind of record")
        check_join(join, swarm_id)
        with writing(self._engine) as connection:
            if not queries.invite_matches(connection, join, auth):
                raise InviteRefused
            roster = self._roster(connection, swarm_id)
            stored = queries.entry_of(connection, swarm_id, data)
            if stored is not None and peer_id_of(join.peer) in roster.live:
                return stored
            queries.use_invite(connection, join, self._now())
            after, entry = self._append(connection, roster, data)
        self._remember(after)
        return entry

    def etag(self, swarm_id: SwarmId) -> str:
        """Return the tag of the chain's present state.

        Raises:
            UnknownSwarm: There is no such swarm.
            StorageFailed: The database failed.
        """
        with reading(self._engine) as connection:
            entry = queries.newest_entry(connection, swarm_id)
        if entry is None:
            raise UnknownSwarm(swarm=swarm_id.hex())
        return digest(entry).hex()

    def entries(self, swarm_id: SwarmId) -> EntryList:
        """Return the whole chain of a swarm.

        Raises:
            UnknownSwarm: There is no such swarm.
            StorageFailed: The database failed.
        """
        with reading(self._engine) as connection:
            entries = queries.entries_after(connection, swarm_id, -1)
        if not entries:
            raise UnknownSwarm(swarm=swarm_id.hex())
        return EntryList(entries=entries, etag=digest(entries[-1]).hex())

    def put_hint(self, swarm_id: SwarmId, data: bytes) -> None:
        """Keep a member's address hint unless a newer one of it is there.

        Raises:
            InvalidRecord: Not a hint signed by a live member.
            UnknownSwarm: There is no such swarm.
            StorageFailed: The database failed; nothing was stored.
        """
        hint = open_hint(data, swarm_id=swarm_id, now_unix=self._clock())
        with writing(self._engine) as connection:
            if hint.peer not in self._roster(connection, swarm_id).live:
                raise InvalidRecord(kind="hint", problem="its signer is no live member")
            queries.replace_hint(connection, hint, data)

    def hints(self, swarm_id: SwarmId) -> tuple[bytes, ...]:
        """Return the address hints of live members, at most a day old.

        Raises:
            UnknownSwarm: There is no such swarm.
            StorageFailed: The database failed.
        """
        with reading(self._engine) as connection:
            live = self._roster(connection, swarm_id).live
            recent = queries.hints_since(connection, swarm_id, self._now() - HINT_LIFE_S)
        return tuple(data for peer, data in recent if peer_id_of(peer) in live)

    def _now(self) -> int:
        return int(self._clock())

    def _roster(self, connection: Connection, swarm_id: SwarmId) -> Roster:
        """Return the roster as this transaction sees it; only new entries are verified."""
        with self._lock:
            roster = self._rosters.get(swarm_id)
        for data in queries.entries_after(
            connection, swarm_id, -1 if roster is None else roster.seq
        ):
            entry = decode_entry(data)
            roster = begin(swarm_id, entry) if roster is None else apply(roster, entry)
        if roster is None:
            raise UnknownSwarm(swarm=swarm_id.hex())
        return roster

    def _append(
        self, connection: Connection, roster: Roster, record: bytes
    ) -> tuple[Roster, bytes]:
        entry = next_entry(roster, record, received_at=self._now())
        after = apply(roster, entry)
        return after, queries.insert_entry(connection, roster.swarm_id, entry)

    def _remember(self, roster: Roster) -> None:
        """Keep a roster whose entries are committed."""
        with self._lock:
            known = self._rosters.get(roster.swarm_id)
            if known is None and len(self._rosters) >= MAX_CACHED_ROSTERS:
                self._rosters.clear()
            if known is None or known.seq < roster.seq:
                self._rosters[roster.swarm_id] = roster
