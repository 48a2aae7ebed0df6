from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from pals.backend import database, schema
from pals.backend.database import (
    WHOLE_DATABASE,
    has_password,
    open_database,
    reading,
    sqlite_url,
    writing,
)
from pals.backend.service import BackendService
from pals.errors import InvalidConfig, MissingExtra, StorageFailed
from tests.postgres import PostgresServer
from tests.unit.swarm.chains import Chain


def test_sqlite_file_is_private_durable_and_in_wal_mode(path: Path) -> None:
    engine = open_database(sqlite_url(path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with engine.connect() as connection:
        assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(sa.text("PRAGMA synchronous")) == 2
        assert connection.scalar(sa.text("PRAGMA foreign_keys")) == 1
    engine.dispose()


def test_postgres_commits_are_on_disk_and_no_wait_is_endless(postgres: PostgresServer) -> None:
    engine = open_database(postgres.new_url())
    with engine.connect() as connection:
        settings = {
            name: connection.scalar(sa.text(f"SHOW {name}"))
            for name in ("synchronous_commit", "lock_timeout", "statement_timeout")
        }
        level = connection.scalar(sa.text("SHOW transaction_isolation"))
    engine.dispose()
    assert settings == {
        "synchronous_commit": "on",
        "lock_timeout": "10s",
        "statement_timeout": "10s",
    }
    assert level == "read committed"


def test_migrations_make_the_tables_that_the_code_uses(database_url: str) -> None:
    engine = open_database(database_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    engine.dispose()


def test_database_of_the_version_before_is_migrated_with_its_rows(database_url: str) -> None:
    chain = Chain()
    old = open_database(database_url, revision="0001")
    assert "nonces" not in sa.inspect(old).get_table_names()
    with writing(old, WHOLE_DATABASE) as connection:
        connection.execute(schema.swarms.insert().values(swarm_id=chain.swarm_id, created_at=1))
        connection.execute(
            schema.entries.insert().values(
                swarm_id=chain.swarm_id, seq=0, record_hash=chain.swarm_id, entry=chain.entries[0]
            )
        )
    old.dispose()
    service = BackendService(database_url)
    assert service.entries(chain.swarm_id).entries == tuple(chain.entries)
    service.close()


def test_two_backends_may_start_at_once(database_url: str) -> None:
    engines = [open_database(database_url) for _ in range(2)]
    with reading(engines[1]) as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(schema.swarms)) == 0
    for engine in engines:
        engine.dispose()


def test_writers_of_one_thing_wait_and_give_up(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(database, "_SESSION", ("SET lock_timeout = '100ms'",))
    engine = open_database(database_url)
    with writing(engine, b"swarm"), pytest.raises(StorageFailed), writing(engine, b"swarm"):
        pytest.fail("two hold it")
    engine.dispose()


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "sqlite:////proc/nowhere/backend.db",
        "other://host/db",
        "postgresql://user:canary@127.0.0.1:1/db",
        "postgresql://127.0.0.1:1/db?password=canary",
        "postgresql://127.0.0.1:1/db?no_such_option=canary",
    ],
)
def test_unusable_database_is_named_without_its_password(url: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        BackendService(url)
    assert caught.value.fields["source"]
    assert "canary" not in f"{caught.value!r} {caught.value.hint}"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://user:secret@host/db", True),
        ("postgresql://host/db?password=secret", True),
        ("postgresql://user@host/db", False),
        ("sqlite:///file", False),
        ("nonsense", False),
    ],
)
def test_password_in_a_url_is_noticed(url: str, expected: bool) -> None:
    assert has_password(url) is expected


def test_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(MissingExtra) as caught:
        open_database("postgresql://127.0.0.1:1/db")
    assert "pals[postgres]" in caught.value.hint


def test_file_that_is_no_database_is_refused_and_kept(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(InvalidConfig):
        BackendService(sqlite_url(path))
    assert path.read_bytes() == b"not a database" * 100


def test_lost_table_gives_a_typed_error(path: Path) -> None:
    service, chain = BackendService(sqlite_url(path)), Chain()
    service.create_swarm(chain.genesis)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE hints")
    with pytest.raises(StorageFailed) as caught:
        service.hints(chain.swarm_id)
    service.close()
    assert "hints" in str(caught.value.fields["problem"])


def test_server_that_came_back_is_used_again(postgres: PostgresServer) -> None:
    service, chain = BackendService(postgres.new_url()), Chain()
    service.create_swarm(chain.genesis)
    service.check()
    postgres.kill()
    for call in (service.check, lambda: service.entries(chain.swarm_id)):
        with pytest.raises(StorageFailed):
            call()
    postgres.start()
    service.check()
    assert service.entries(chain.swarm_id).entries is not None
    service.close()
