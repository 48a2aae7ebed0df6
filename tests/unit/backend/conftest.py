"""Both databases: a test that asks for `database_url` runs on each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pals.backend.database import sqlite_url

if TYPE_CHECKING:
    from tests.postgres import PostgresServer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where a SQLite file may be made, in a folder that is not there."""
    return tmp_path / "data" / "backend.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, path: Path) -> str:
    """Return the URL of an empty database."""
    if request.param == "sqlite":
        return sqlite_url(path)
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return postgres.new_url()
