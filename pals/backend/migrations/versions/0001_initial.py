"""Swarms, entries, invites and address hints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the first tables."""
    op.create_table(
        "swarms",
        sa.Column("swarm_id", sa.LargeBinary(32), primary_key=True),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "entries",
        _swarm_id(),
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("record_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("entry", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("swarm_id", "record_hash", name="one_entry_per_record"),
    )
    op.create_table(
        "invites",
        _swarm_id(),
        sa.Column("redeem_hash", sa.LargeBinary(32), primary_key=True),
        sa.Column("invite", sa.LargeBinary(32), nullable=False),
        sa.Column("max_uses", sa.Integer, nullable=False),
        sa.Column("used", sa.Integer, nullable=False),
        sa.Column("not_after", sa.BigInteger, nullable=False),
        sa.Column("closed", sa.Boolean, nullable=False),
    )
    op.create_table(
        "hints",
        _swarm_id(),
        sa.Column("peer", sa.LargeBinary(32), primary_key=True),
        sa.Column("issued_at", sa.BigInteger, nullable=False),
        sa.Column("hint", sa.LargeBinary, nullable=False),
    )


def downgrade() -> None:
    """Drop them again."""
    for table in ("hints", "invites", "entries", "swarms"):
        op.drop_table(table)


def _swarm_id() -> sa.Column[bytes]:
    return sa.Column(
        "swarm_id", sa.LargeBinary(32), sa.ForeignKey("swarms.swarm_id"), primary_key=True
    )
