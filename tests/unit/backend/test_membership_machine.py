"""The property test of membership: a few games in every run, many in `make slow`."""

from __future__ import annotations

from pathlib import Path

import pytest

from pals.backend.database import sqlite_url
from tests.postgres import PostgresServer
from tests.unit.backend.crashing import Abandoned, ServerKilled
from tests.unit.backend.membership_machine import play


def test_membership_holds_whatever_happens_when(path: Path) -> None:
    backend = Abandoned(sqlite_url(path))
    secrets = play(backend, games=3, steps=25)
    backend.close()
    stored = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"invite" in stored
    assert not [secret for secret in secrets if secret in stored]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_membership_holds_in_many_games(database_url: str) -> None:
    backend = Abandoned(database_url)
    play(backend, games=50, steps=30)
    backend.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_membership_holds_while_postgres_is_killed(postgres: PostgresServer) -> None:
    backend = ServerKilled(postgres)
    play(backend, games=15, steps=25)
    backend.close()
