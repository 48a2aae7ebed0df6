"""kill -9 of the backend and of PostgreSQL, under one client's operations and many clients'."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pals.backend.database import sqlite_url
from tests.integration.backend_child import Child
from tests.unit.backend.membership_machine import play

if TYPE_CHECKING:
    from tests.postgres import PostgresServer


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "backend.db")
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return postgres.new_url()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_membership_holds_while_the_backend_is_killed(database_url: str) -> None:
    backend = Child(database_url)
    play(backend, games=4, steps=20)
    backend.close()
