"""Nonces of signed requests, each of which is good for one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table of nonces."""
    op.create_table(
        "nonces",
        sa.Column("signer", sa.LargeBinary(32), primary_key=True),
        sa.Column("nonce", sa.LargeBinary(32), primary_key=True),
        sa.Column("expires_at", sa.BigInteger, nullable=False, index=True),
    )


def downgrade() -> None:
    """Drop it again."""
    op.drop_table("nonces")
