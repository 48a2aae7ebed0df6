"""Both databases: a test that asks for `database_url`, or a service on one, runs on each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pals.backend.database import sqlite_url
from pals.backend.service import BackendService
from tests.unit.backend.requests import Clock
from tests.unit.swarm.chains import Chain, identity

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


SIGNER = identity(5)


@pytest.fixture
def wall_clock() -> Clock:
    """Return the wall clock of the service."""
    return Clock()


@pytest.fixture
def service(database_url: str, wall_clock: Clock) -> Iterator[BackendService]:
    """Run a service with a key of its own."""
    service = BackendService(database_url, signer=SIGNER, clock=wall_clock)
    yield service
    service.close()


@pytest.fixture
def chain(service: BackendService) -> Chain:
    """Return a swarm that the service knows."""
    chain = Chain()
    service.create_swarm(chain.genesis)
    return chain
