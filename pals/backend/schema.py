"""The tables; pals/backend/migrations makes them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    UniqueConstraint,
)

metadata = MetaData()


def _swarm_id() -> Column[bytes]:
    return Column("swarm_id", LargeBinary(32), ForeignKey("swarms.swarm_id"), primary_key=True)


swarms = Table(
    "swarms",
    metadata,
    Column("swarm_id", LargeBinary(32), primary_key=True),
    Column("created_at", BigInteger, nullable=False),
)

entries = Table(
    "entries",
    metadata,
    _swarm_id(),
    Column("seq", Integer, primary_key=True),
    Column("record_hash", LargeBinary(32), nullable=False),
    Column("entry", LargeBinary, nullable=False),
    UniqueConstraint("swarm_id", "record_hash", name="one_entry_per_record"),
)

invites = Table(
    "invites",
    metadata,
    _swarm_id(),
    Column("redeem_hash", LargeBinary(32), primary_key=True),
    Column("invite", LargeBinary(32), nullable=False),
    Column("max_uses", Integer, nullable=False),
    Column("used", Integer, nullable=False),
    Column("not_after", BigInteger, nullable=False),
    Column("closed", Boolean, nullable=False),
)

hints = Table(
    "hints",
    metadata,
    _swarm_id(),
    Column("peer", LargeBinary(32), primary_key=True),
    Column("issued_at", BigInteger, nullable=False),
    Column("hint", LargeBinary, nullable=False),
)

nonces = Table(
    "nonces",
    metadata,
    Column("signer", LargeBinary(32), primary_key=True),
    Column("nonce", LargeBinary(32), primary_key=True),
    Column("expires_at", BigInteger, nullable=False, index=True),
)
