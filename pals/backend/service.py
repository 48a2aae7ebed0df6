"""What the membership service does, apart from any transport.

Each method is one transaction. Every record is checked by the same reducer that members
run, so that an honest backend never stores what members would refuse.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from pals.backend import queries
from pals.backend.database import WHOLE_DATABASE, open_database, reading, writing
from pals.errors import (
    BackendFull,
    InvalidRecord,
    InviteRefused,
    PalsError,
    StorageFailed,
    UnknownSwarm,
)
from pals.swarm.freshness import sign_freshness
from pals.swarm.hints import open_hint
from pals.swarm.identity import Identity, peer_id_of
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
from pals.swarm.requests import RequestProof, open_request
from pals.swarm.roster import Roster, apply, begin, next_entry
from pals.types import SwarmId

MAX_SWARMS = 1000
MAX_CACHED_ROSTERS = 256
HINT_LIFE_S = 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryList:
    """A swarm's whole chain.

    Attributes:
        entries: Encoded entries from the genesis on; None when the caller has them.
        etag: Changes whenever the chain does.
        freshness: The backend's signed word that this is the newest chain; empty unless the
            swarm's operator appointed this backend.
    """

    entries: tuple[bytes, ...] | None
    etag: str
    freshness: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedRequest:
    """A request as it came, and what should prove who made it.

    Attributes:
        method: Such as ``POST``.
        path: Such as ``/v1/swarms/…/records``, without a query.
        body: Every byte of it.
        authorization: Value of the header `pals.swarm.requests.HEADER`; empty without one.
    """

    method: str
    path: str
    body: bytes
    authorization: str


class BackendService:
    """The service over one database; its methods may be called from many threads.

    Args:
        database_url: SQLAlchemy URL, such as ``sqlite:////var/lib/pals/backend.db``.
        signer: Key with which it signs how new a list is; one that ends with the process
            when left out.
        clock: Unix seconds, for receipt times and expiry.
        max_swarms: Swarms it takes.

    Raises:
        InvalidConfig: The database cannot be opened or migrated.
        MissingExtra: It is one of PostgreSQL, whose driver is not installed.
    """

    def __init__(
        self,
        database_url: str,
        *,
        signer: Identity | None = None,
        clock: Callable[[], float] = time.time,
        max_swarms: int = MAX_SWARMS,
    ) -> None:
        self._engine = open_database(database_url)
        self._signer = signer or Identity.generate()
        self._clock = clock
        self._max_swarms = max_swarms
        self._rosters: dict[SwarmId, Roster] = {}
        self._lock = Lock()

    @property
    def public_key(self) -> bytes:
        """The key that an operator appoints, so that members believe this backend's time."""
        return self._signer.public_key

    def close(self) -> None:
        self._engine.dispose()

    def check(self) -> None:
        """Raise `StorageFailed` unless the database answers."""
        with reading(self._engine) as connection:
            connection.scalar(sa.select(sa.literal(1)))

    def create_swarm(self, genesis: bytes) -> bytes:
        """Store a swarm's first record and return its entry; a repetition changes nothing.

        Raises:
            InvalidRecord: ``genesis`` is not a signed genesis.
            BackendFull: There are `MAX_SWARMS` swarms.
            StorageFailed: The database failed; repeat it.
        """
        swarm_id = SwarmId(digest(genesis))
        entry = Entry(seq=0, previous=NO_ENTRY, received_at=self._now(), record=genesis)
        roster = begin(swarm_id, entry)
        with writing(self._engine, WHOLE_DATABASE) as connection:
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

    def append_record(self, swarm_id: SwarmId, data: bytes, request: SignedRequest | None) -> bytes:
        """Store an administrator's record, or a member's leave, and return its entry.

        A repetition changes nothing, but needs a proof of its own.

        Args:
            swarm_id: The swarm.
            data: The signed record.
            request: What an administrator proves to have made; nobody asks a leave for it.

        Raises:
            InvalidRecord: It is of another kind, does not fit the chain, or the request
                proves no administrator, or was made before.
            UnknownSwarm: There is no such swarm.
            StorageFailed: The database failed; repeat it.
        """
        record = decode_record(data)
        if not isinstance(record, AdminRecord | Leave):
            raise InvalidRecord(kind="record", problem="joins go through an invite's redemption")
        proof = None if isinstance(record, Leave) else self._open(request)
        with writing(self._engine, swarm_id) as connection:
            roster = self._roster(connection, swarm_id)
            if proof is not None:
                self._authorize(connection, roster, proof)
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

        The same peer may repeat it after a lost reply and uses the invite once. Whatever is
        wrong with an invite, the same statements run and the same error comes.

        Args:
            swarm_id: The swarm to join.
            auth: The 32 bytes whose hash the operator certified.
            data: The signed join record.

        Raises:
            InvalidRecord: ``data`` is not a join signed by its invite and its peer.
            InviteRefused: The invite is unknown, spent, closed or expired.
            SwarmFull: The swarm has as many members as it may.
            StorageFailed: The database failed; repeat it.
        """
        join = decode_record(data)
        if not isinstance(join, Join):
            raise InvalidRecord(kind="join", problem="it is another kind of record")
        check_join(join, swarm_id)
        with writing(self._engine, swarm_id) as connection:
            roster = self._roster_or_none(connection, swarm_id)
            known = queries.invite_matches(connection, join, auth)
            stored = queries.entry_of(connection, swarm_id, data)
            if known and stored is not None and _is_live(roster, join, data):
                return stored
            queries.use_invite(connection, join, auth, self._now())
            if roster is None:
                raise InviteRefused
            after, entry = self._append(connection, roster, data)
        self._remember(after)
        return entry

    def entries(self, swarm_id: SwarmId, known: str | None = None) -> EntryList:
        """Return the whole chain of a swarm, or only how new it is.

        Args:
            swarm_id: The swarm.
            known: Tag of the chain that the caller has.

        Raises:
            UnknownSwarm: There is no such swarm.
            StorageFailed: The database failed, or holds a chain that does not verify.
        """
        with reading(self._engine) as connection:
            roster = self._roster(connection, swarm_id)
            entries = None
            if known != roster.head.hex():
                # Another process may have appended since; freshness is about these alone.
                entries = queries.entries_after(connection, swarm_id, -1)[: roster.seq + 1]
        self._remember(roster)
        appointed = self.public_key in roster.authorities
        word = sign_freshness(self._signer, roster, at=self._now()) if appointed else b""
        return EntryList(entries=entries, etag=roster.head.hex(), freshness=word)

    def put_hint(self, swarm_id: SwarmId, data: bytes) -> None:
        """Keep a member's address hint unless a newer one of it is there.

        Raises:
            InvalidRecord: Not a hint signed by a live member.
            UnknownSwarm: There is no such swarm.
            StorageFailed: The database failed; repeat it.
        """
        hint = open_hint(data, swarm_id=swarm_id, now_unix=self._clock())
        with writing(self._engine, swarm_id) as connection:
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

    def _open(self, request: SignedRequest | None) -> RequestProof:
        if request is None or not request.authorization:
            raise InvalidRecord(kind="request", problem="it is not signed by an administrator")
        return open_request(
            request.authorization,
            method=request.method,
            path=request.path,
            body=request.body,
            now_unix=self._clock(),
        )

    def _authorize(self, connection: Connection, roster: Roster, proof: RequestProof) -> None:
        if not roster.may_administer(proof.signer):
            raise InvalidRecord(kind="request", problem="it is not signed by an administrator")
        if not queries.take_nonce(connection, proof, self._now()):
            raise InvalidRecord(kind="request", problem="it was made before; sign it anew")

    def _roster(self, connection: Connection, swarm_id: SwarmId) -> Roster:
        roster = self._roster_or_none(connection, swarm_id)
        if roster is None:
            raise UnknownSwarm(swarm=swarm_id.hex())
        return roster

    def _roster_or_none(self, connection: Connection, swarm_id: SwarmId) -> Roster | None:
        """Return the roster as this transaction sees it; only new entries are verified."""
        with self._lock:
            roster = self._rosters.get(swarm_id)
        seq = -1 if roster is None else roster.seq
        try:
            for data in queries.entries_after(connection, swarm_id, seq):
                entry = decode_entry(data)
                roster = begin(swarm_id, entry) if roster is None else apply(roster, entry)
        except PalsError as error:
            raise StorageFailed(problem=f"the stored chain was changed: {error}") from error
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


def _is_live(roster: Roster | None, join: Join, data: bytes) -> bool:
    """Return whether ``data`` is the join of a membership that goes on."""
    member = None if roster is None else roster.live.get(peer_id_of(join.peer))
    return member is not None and member.joined == digest(data)
