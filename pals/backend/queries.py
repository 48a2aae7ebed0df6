"""The statements of the membership database; callers own the transactions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from pals.backend import schema
from pals.errors import InviteRefused
from pals.swarm.hints import AddressHint
from pals.swarm.records import Entry, InviteCertificate, Join, digest, encode
from pals.swarm.requests import WINDOW_S, RequestProof
from pals.swarm.roster import Roster
from pals.types import SwarmId

BATCH_ROWS = 500


def count_swarms(connection: Connection) -> int:
    """Return how many swarms are stored."""
    return connection.scalar(sa.select(sa.func.count()).select_from(schema.swarms)) or 0


def insert_swarm(connection: Connection, swarm_id: SwarmId, created_at: int) -> None:
    """Store a swarm without entries."""
    connection.execute(schema.swarms.insert().values(swarm_id=swarm_id, created_at=created_at))


def entries_after(connection: Connection, swarm_id: SwarmId, seq: int) -> tuple[bytes, ...]:
    """Return the encoded entries of a swarm that follow ``seq``, in order."""
    table = schema.entries
    query = (
        sa.select(table.c.entry)
        .where(table.c.swarm_id == swarm_id, table.c.seq > seq)
        .order_by(table.c.seq)
    )
    return tuple(connection.scalars(query))


def all_entries(connection: Connection) -> Iterator[tuple[bytes, bytes]]:
    """Yield the id of a swarm and one of its entries, for every one, in order."""
    table = schema.entries
    query = sa.select(table.c.swarm_id, table.c.entry).order_by(table.c.swarm_id, table.c.seq)
    for row in connection.execution_options(yield_per=BATCH_ROWS).execute(query):
        yield row.swarm_id, row.entry


def entry_of(connection: Connection, swarm_id: SwarmId, record: bytes) -> bytes | None:
    """Return the entry that holds ``record``, if there is one."""
    table = schema.entries
    query = sa.select(table.c.entry).where(
        table.c.swarm_id == swarm_id, table.c.record_hash == digest(record)
    )
    return connection.scalar(query)


def insert_entry(connection: Connection, swarm_id: SwarmId, entry: Entry) -> bytes:
    """Store an entry and return its bytes."""
    data = encode(entry)
    connection.execute(
        schema.entries.insert().values(
            swarm_id=swarm_id, seq=entry.seq, record_hash=digest(entry.record), entry=data
        )
    )
    return data


def insert_invite(
    connection: Connection, swarm_id: SwarmId, certificate: InviteCertificate
) -> None:
    """Store an unused invite."""
    connection.execute(
        schema.invites.insert().values(
            swarm_id=swarm_id,
            redeem_hash=certificate.redeem_hash,
            invite=certificate.invite,
            max_uses=certificate.max_uses,
            used=0,
            not_after=certificate.not_after,
            closed=False,
        )
    )


def close_invites(connection: Connection, before: Roster, after: Roster) -> None:
    """Close the invites that a record closed, as the reducer does."""
    table = schema.invites
    for invite, use in after.invites.items():
        known = before.invites.get(invite)
        if use.closed and known is not None and not known.closed:
            connection.execute(
                table.update()
                .where(table.c.swarm_id == after.swarm_id, table.c.invite == invite)
                .values(closed=True)
            )


def invite_matches(connection: Connection, join: Join, auth: bytes) -> bool:
    """Return whether ``auth`` is that of the invite that signed ``join``."""
    table = schema.invites
    query = sa.select(table.c.invite).where(
        table.c.swarm_id == join.swarm_id,
        table.c.redeem_hash == hashlib.sha256(auth).digest(),
    )
    return connection.scalar(query) == join.invite


def use_invite(connection: Connection, join: Join, auth: bytes, now: int) -> None:
    """Count one use, in one statement.

    Raises:
        InviteRefused: It is unknown, spent, closed or expired.
    """
    table = schema.invites
    usable = sa.and_(
        table.c.swarm_id == join.swarm_id,
        table.c.redeem_hash == hashlib.sha256(auth).digest(),
        table.c.invite == join.invite,
        table.c.used < table.c.max_uses,
        sa.or_(table.c.not_after == 0, table.c.not_after >= now),
        sa.not_(table.c.closed),
    )
    counted = connection.execute(table.update().where(usable).values(used=table.c.used + 1))
    if counted.rowcount != 1:
        raise InviteRefused


def take_nonce(connection: Connection, proof: RequestProof, now: int) -> bool:
    """Return whether the request was never made before, and remember that it was."""
    table = schema.nonces
    # What is older than the window is refused without being remembered.
    connection.execute(table.delete().where(table.c.expires_at < now))
    same = sa.and_(table.c.signer == proof.signer, table.c.nonce == proof.nonce)
    if connection.scalar(sa.select(table.c.expires_at).where(same)) is not None:
        return False
    connection.execute(
        table.insert().values(
            signer=proof.signer, nonce=proof.nonce, expires_at=proof.at + WINDOW_S
        )
    )
    return True


def replace_hint(connection: Connection, hint: AddressHint, data: bytes) -> None:
    """Keep ``data`` unless a newer hint of the same member is there."""
    table = schema.hints
    own_row = sa.and_(table.c.swarm_id == hint.swarm_id, table.c.peer == hint.key)
    newest = connection.scalar(sa.select(table.c.issued_at).where(own_row))
    if newest is not None and newest >= hint.issued_at:
        return
    connection.execute(table.delete().where(own_row))
    connection.execute(
        table.insert().values(
            swarm_id=hint.swarm_id, peer=hint.key, issued_at=hint.issued_at, hint=data
        )
    )


def hints_since(
    connection: Connection, swarm_id: SwarmId, issued_after: int
) -> Sequence[tuple[bytes, bytes]]:
    """Return the public key and the hint of every member that left a recent one."""
    table = schema.hints
    query = sa.select(table.c.peer, table.c.hint).where(
        table.c.swarm_id == swarm_id, table.c.issued_at > issued_after
    )
    return [(row.peer, row.hint) for row in connection.execute(query)]
